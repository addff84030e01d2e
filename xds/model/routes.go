package model

import (
	"fmt"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Match is one condition of a rule.
type Match struct {
	PathPrefix, PathExact string // at most one
	Method                string // empty: any
	Headers               []Header
}

// Header must be there, with Value when that is not empty.
type Header struct{ Name, Value string }

// RuleSpec is how a rule's requests are treated.
type RuleSpec struct {
	Timeout time.Duration // whole request; 0: default
	Retry   *Retry        // nil: default
}

// Retry of failed requests.
type Retry struct {
	Attempts      int
	PerTryTimeout time.Duration // 0: none
	On            []string      // empty: default
}

func (b *builder) routes() {
	hosts := map[string]Key{}
	for _, m := range sorted(b.in.Routes, func(m *nodev1.MeshRoute) Key { return Key{m.GetTenant(), m.GetRoute()} }) {
		key := Key{m.GetTenant(), m.GetRoute()}
		resource := "route/" + key.String()
		var own *Service
		if name := m.GetSpec().GetService(); name != "" {
			s, ok := b.g.byKey[Key{key.Tenant, name}]
			if !ok {
				b.problem(resource, "spec.service", "there is no service %q", name)
				continue
			}
			own = s
		}
		if len(m.GetSpec().GetRules()) == 0 {
			b.problem(resource, "spec.rules", "must have at least one")
			continue
		}
		r := &Route{Key: key}
		for i, rule := range m.GetSpec().GetRules() {
			r.Rules = append(r.Rules, b.rule(resource, fmt.Sprintf("spec.rules[%d]", i), key.Tenant, own, rule))
		}
		b.claim(resource, r, own, m.GetSpec().GetIngressHosts(), hosts)
	}
	slices.SortFunc(b.g.Hosts, func(x, y *Host) int { return Key{x.Name, ""}.compare(Key{y.Name, ""}) })
	for _, s := range b.g.Services {
		slices.Sort(s.Revisions)
		s.Revisions = slices.Compact(s.Revisions)
	}
}

// claim makes r answer for its service and hosts. The first route by name wins.
func (b *builder) claim(resource string, r *Route, own *Service, names []string, hosts map[string]Key) {
	if own != nil {
		if own.Route != nil {
			b.problem(resource, "spec.service", "service %s has route %s already", own.Name, own.Route.Name)
		} else {
			own.Route = r
		}
	}
	for i, h := range names {
		if other, ok := hosts[h]; ok {
			b.problem(resource, fmt.Sprintf("spec.ingress_hosts[%d]", i), "%s belongs to route %s already", h, other)
			continue
		}
		hosts[h] = r.Key
		b.g.Hosts = append(b.g.Hosts, &Host{Name: h, Route: r})
	}
}

func (b *builder) rule(resource, field, tenant string, own *Service, m *portolanv1.RouteRule) Rule {
	r := Rule{Spec: RuleSpec{Timeout: m.GetTimeout().AsDuration()}}
	for _, x := range m.GetMatches() {
		match := Match{PathPrefix: x.GetPathPrefix(), PathExact: x.GetPathExact(), Method: x.GetMethod()}
		for _, h := range x.GetHeaders() {
			match.Headers = append(match.Headers, Header{Name: h.GetName(), Value: h.GetValue()})
		}
		r.Matches = append(r.Matches, match)
	}
	if p := m.GetRetry(); p != nil {
		r.Spec.Retry = &Retry{Attempts: int(p.GetAttempts()), PerTryTimeout: p.GetPerTryTimeout().AsDuration(), On: p.GetRetryOn()}
	}
	for i, x := range m.GetBackends() {
		backend, ok := b.backend(resource, fmt.Sprintf("%s.backends[%d]", field, i), tenant, own, x, len(m.GetBackends()) == 1)
		if !ok {
			r.Broken = true
		} else if backend.Weight > 0 {
			r.Backends = append(r.Backends, backend)
		}
	}
	if len(r.Backends) == 0 && !r.Broken {
		b.problem(resource, field+".backends", "no back end has a weight")
		r.Broken = true
	}
	return r
}

func (b *builder) backend(resource, field, tenant string, own *Service, m *portolanv1.RouteBackend, single bool) (Backend, bool) {
	s := own
	if m.GetService() != "" {
		s = b.g.byKey[Key{tenant, m.GetService()}]
	}
	if s == nil {
		b.problem(resource, field+".service", "there is no service %q", m.GetService())
		return Backend{}, false
	}
	out := Backend{Service: s, Port: m.GetPort(), Revision: m.GetRevision(), Weight: uint32(max(m.GetWeight(), 0))}
	if single && out.Weight == 0 {
		out.Weight = 100
	}
	switch {
	case out.Port != "":
		if _, ok := s.Port(out.Port); !ok {
			b.problem(resource, field+".port", "service %s has no port %q", s.Name, out.Port)
			return Backend{}, false
		}
	case len(s.Ports) == 1:
		out.Port = s.Ports[0].Name
	case s != own:
		b.problem(resource, field+".port", "service %s has %d ports: name one", s.Name, len(s.Ports))
		return Backend{}, false
	}
	if out.Revision != "" {
		s.Revisions = append(s.Revisions, out.Revision)
	}
	return out, true
}

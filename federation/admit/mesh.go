package admit

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const defaultRouteTimeout = 15 * time.Second

// retryOn are Envoy's names of what is tried again.
var retryOn = []string{"5xx", "connect-failure", "gateway-error", "refused-stream", "reset", "retriable-4xx"}

// forbiddenHeaders cannot be matched: the router has them consumed or they are
// another field of the match.
var forbiddenHeaders = []string{"host", "connection", "transfer-encoding", "upgrade"}

func defaultService(s *portolanv1.Service) {
	if s.Spec == nil {
		s.Spec = &portolanv1.ServiceSpec{}
	}
	if s.Spec.Workload == "" {
		s.Spec.Workload = id(s)
	}
	for _, p := range s.Spec.Ports {
		if p.Name == "" && len(s.Spec.Ports) == 1 {
			p.Name = "http"
		}
		if p.TargetPort == 0 {
			p.TargetPort = p.Port
		}
		if p.Protocol == portolanv1.PortProtocol_PORT_PROTOCOL_UNSPECIFIED {
			p.Protocol = portolanv1.PortProtocol_PORT_PROTOCOL_HTTP
		}
	}
}

func defaultRoute(r *portolanv1.Route, snap *Snapshot) {
	for _, rule := range r.GetSpec().GetRules() {
		for _, b := range rule.GetBackends() {
			if b.Service == "" {
				b.Service = r.Spec.Service
			}
			if snap != nil && b.Port == "" {
				if ports := snap.Services[b.Service].GetSpec().GetPorts(); len(ports) == 1 {
					b.Port = ports[0].GetName()
				}
			}
		}
		if len(rule.Backends) == 1 && rule.Backends[0].Weight == 0 {
			rule.Backends[0].Weight = 100
		}
		if rule.Timeout == nil {
			rule.Timeout = durationpb.New(defaultRouteTimeout)
		}
		if rule.Retry != nil && len(rule.Retry.RetryOn) == 0 {
			rule.Retry.RetryOn = []string{"connect-failure", "refused-stream"}
		}
	}
}

func (c *checker) service(s *portolanv1.Service) {
	if c.id("spec.workload", s.GetSpec().GetWorkload()) {
		w, ok := c.snap.Workloads[s.GetSpec().GetWorkload()]
		switch {
		case !ok:
			c.add("spec.workload", "workload %q does not exist: apply the workload first", s.GetSpec().GetWorkload())
		case w.GetSpec().GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED:
			c.add("spec.workload", "workload %q is a gateway and serves nothing of its own", s.GetSpec().GetWorkload())
		case w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
			c.add("spec.workload", "workload %q is a job and serves nothing", s.GetSpec().GetWorkload())
		}
	}
	if len(s.GetSpec().GetPorts()) == 0 {
		c.add("spec.ports", "at least one port is required")
	}
	names, ports := map[string]bool{}, map[int32]bool{}
	for i, p := range s.GetSpec().GetPorts() {
		f := at("spec.ports", i)
		if c.id(f+".name", p.GetName()) {
			if names[p.GetName()] {
				c.add(f+".name", "%q is there twice", p.GetName())
			}
			names[p.GetName()] = true
		}
		if ports[p.GetPort()] {
			c.add(f+".port", "port %d is there twice", p.GetPort())
		}
		ports[p.GetPort()] = true
		c.port(f+".port", p.GetPort())
		c.port(f+".target_port", p.GetTargetPort())
	}
}

func (c *checker) route(r *portolanv1.Route) {
	s := r.GetSpec()
	if s == nil {
		c.add("spec", "is required")
		return
	}
	c.routeService(r)
	c.ingressHosts(r)
	if len(s.GetRules()) == 0 {
		c.add("spec.rules", "at least one rule is required")
	}
	for i, rule := range s.GetRules() {
		f := at("spec.rules", i)
		for j, m := range rule.GetMatches() {
			c.match(at(f+".matches", j), m)
		}
		c.backends(f, rule, s.GetService())
		c.duration(f+".timeout", rule.GetTimeout(), callWait)
		c.retry(f+".retry", rule)
	}
	c.cycle(r)
}

func (c *checker) routeService(r *portolanv1.Route) {
	svc := r.GetSpec().GetService()
	if svc == "" {
		if len(r.GetSpec().GetIngressHosts()) == 0 {
			c.add("spec.service", "a route answers for a service, for ingress hosts, or for both: name one")
		}
		return
	}
	if !c.id("spec.service", svc) {
		return
	}
	if _, ok := c.snap.Services[svc]; !ok {
		c.add("spec.service", "service %q does not exist: apply the service first", svc)
	}
	for _, other := range keys(c.snap.Routes) {
		if o := c.snap.Routes[other]; o.GetName() != r.GetName() && o.GetSpec().GetService() == svc {
			c.add("spec.service", "%s already answers for service %q", o.GetName(), svc)
		}
	}
}

func (c *checker) ingressHosts(r *portolanv1.Route) {
	hosts := r.GetSpec().GetIngressHosts()
	granted := c.snap.Tenant.GetSpec().GetIngressSuffixes()
	for i, h := range hosts {
		f := at("spec.ingress_hosts", i)
		if !c.dns(f, h) {
			continue
		}
		if slices.Contains(hosts[:i], h) {
			c.add(f, "%q is there twice", h)
			continue
		}
		if !underSuffix(h, granted) {
			c.add(f, "%q is under no suffix granted to the tenant; granted are %v", h, granted)
			continue
		}
		if owner, ok := c.snap.Hosts[h]; ok && owner != r.GetName() {
			// Another tenant's route is not named to this one.
			c.add(f, "%q is taken", h)
		}
	}
}

func underSuffix(host string, suffixes []string) bool {
	return slices.ContainsFunc(suffixes, func(s string) bool { return host == s || strings.HasSuffix(host, "."+s) })
}

func (c *checker) match(field string, m *portolanv1.RouteMatch) {
	if m.GetPathPrefix() != "" && m.GetPathExact() != "" {
		c.add(field+".path_exact", "path_prefix and path_exact exclude each other")
	}
	if p := m.GetPathPrefix(); p != "" {
		c.urlPath(field+".path_prefix", p)
	}
	if p := m.GetPathExact(); p != "" {
		c.urlPath(field+".path_exact", p)
	}
	if v := m.GetMethod(); v != "" && !methodToken.MatchString(v) {
		c.add(field+".method", "%q is no method: write it in capitals", clip(v))
	}
	for i, h := range m.GetHeaders() {
		f := at(field+".headers", i)
		switch name := h.GetName(); {
		case !headerName.MatchString(name):
			c.add(f+".name", "%q is no header name: write it in lower case, without ':' and spaces", clip(name))
		case slices.Contains(forbiddenHeaders, name):
			c.add(f+".name", "%q cannot be matched", name)
		}
		if strings.ContainsAny(h.GetValue(), "\r\n\x00") {
			c.add(f+".value", "holds a line break or NUL byte")
		}
	}
	if m.GetPathPrefix() == "" && m.GetPathExact() == "" && m.GetMethod() == "" && len(m.GetHeaders()) == 0 {
		c.add(field, "matches nothing in particular: leave matches out to match all requests")
	}
}

func (c *checker) backends(rule string, r *portolanv1.RouteRule, own string) {
	field := rule + ".backends"
	if len(r.GetBackends()) == 0 {
		c.add(field, "at least one back end is required")
		return
	}
	sum := int32(0)
	type target struct{ service, port, revision string }
	seen := map[target]bool{}
	for i, b := range r.GetBackends() {
		f := at(field, i)
		t := target{b.GetService(), b.GetPort(), b.GetRevision()}
		if seen[t] {
			c.add(f, "the same back end is there twice: give it one weight")
		}
		seen[t] = true
		sum += b.GetWeight()
		c.backend(f, rule, b, r, own)
	}
	if sum != 100 {
		c.add(field, "weights sum to %d, not to 100", sum)
	}
}

// backend checks that what it names exists, so that every snapshot is closed.
func (c *checker) backend(f, rule string, b *portolanv1.RouteBackend, r *portolanv1.RouteRule, own string) {
	if b.GetService() == "" {
		if own == "" {
			c.add(f+".service", "is required: the route has no service of its own")
		}
		return
	}
	if !c.id(f+".service", b.GetService()) {
		return
	}
	svc, ok := c.snap.Services[b.GetService()]
	if !ok {
		c.add(f+".service", "service %q does not exist: apply the service first", b.GetService())
		return
	}
	port := findPort(svc, b.GetPort())
	switch {
	case port == nil && b.GetPort() == "":
		c.add(f+".port", "service %q has several ports: name one of %v", b.GetService(), portNames(svc))
	case port == nil:
		c.add(f+".port", "service %q has no port %q; it has %v", b.GetService(), clip(b.GetPort()), portNames(svc))
	case port.GetProtocol() == portolanv1.PortProtocol_PORT_PROTOCOL_TCP && (len(r.GetMatches()) > 0 || r.GetRetry() != nil):
		c.add(rule, "port %q of service %q is TCP: matches and retries are for HTTP", port.GetName(), b.GetService())
	}
	if rev := b.GetRevision(); rev != "" {
		w := svc.GetSpec().GetWorkload()
		if _, ok := c.snap.Revisions[w][rev]; !ok {
			c.add(f+".revision", "workload %q has no revision %q; it has %v", w, clip(rev), keys(c.snap.Revisions[w]))
		}
	}
}

func findPort(s *portolanv1.Service, name string) *portolanv1.ServicePort {
	ports := s.GetSpec().GetPorts()
	if name == "" && len(ports) == 1 {
		return ports[0]
	}
	for _, p := range ports {
		if p.GetName() == name {
			return p
		}
	}
	return nil
}

func portNames(s *portolanv1.Service) []string {
	var out []string
	for _, p := range s.GetSpec().GetPorts() {
		out = append(out, p.GetName())
	}
	return out
}

func (c *checker) retry(field string, rule *portolanv1.RouteRule) {
	r := rule.GetRetry()
	if r == nil {
		return
	}
	for i, on := range r.GetRetryOn() {
		if !slices.Contains(retryOn, on) {
			c.add(at(field+".retry_on", i), "%q is unknown; known are %v", clip(on), retryOn)
		}
	}
	c.duration(field+".per_try_timeout", r.GetPerTryTimeout(), callWait)
	if t := rule.GetTimeout(); t != nil && r.GetPerTryTimeout().AsDuration() > t.AsDuration() {
		c.add(field+".per_try_timeout", "is longer than the whole timeout")
	}
}

// cycle refuses a route whose back ends lead back to its own service over other
// routes. Weights between revisions of its own service are no cycle.
func (c *checker) cycle(r *portolanv1.Route) {
	own := r.GetSpec().GetService()
	if own == "" {
		return
	}
	next := map[string][]string{}
	for _, name := range keys(c.snap.Routes) {
		if o := c.snap.Routes[name]; o.GetName() != r.GetName() {
			next[o.GetSpec().GetService()] = append(next[o.GetSpec().GetService()], targets(o)...)
		}
	}
	for i, rule := range r.GetSpec().GetRules() {
		for j, b := range rule.GetBackends() {
			if b.GetService() == "" || b.GetService() == own {
				continue
			}
			if trail := reach(next, b.GetService(), own, map[string]bool{}); trail != nil {
				c.add(at(at("spec.rules", i)+".backends", j)+".service",
					"is a cycle: %s", strings.Join(append([]string{own}, trail...), " → "))
			}
		}
	}
}

func targets(r *portolanv1.Route) []string {
	var out []string
	for _, rule := range r.GetSpec().GetRules() {
		for _, b := range rule.GetBackends() {
			if b.GetService() != "" && b.GetService() != r.GetSpec().GetService() {
				out = append(out, b.GetService())
			}
		}
	}
	return out
}

// reach gives a path from one service to another, both included; nil if none.
func reach(next map[string][]string, from, to string, seen map[string]bool) []string {
	if from == to {
		return []string{to}
	}
	if seen[from] {
		return nil
	}
	seen[from] = true
	for _, n := range next[from] {
		if trail := reach(next, n, to, seen); trail != nil {
			return append([]string{from}, trail...)
		}
	}
	return nil
}

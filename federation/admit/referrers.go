package admit

import (
	"fmt"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// mostNamed bounds how many referrers a sentence names.
const mostNamed = 5

// Deletion says why the stored object in.Old may not be deleted now: each
// violation names what still refers to it.
func Deletion(in Input) []api.Violation {
	c := &checker{snap: in.Snapshot}
	var refs []string
	switch o := in.Old.(type) {
	case *portolanv1.Workload:
		for _, s := range keys(c.snap.Services) {
			if svc := c.snap.Services[s]; svc.GetSpec().GetWorkload() == id(o) {
				refs = append(refs, svc.GetName())
			}
		}
	case *portolanv1.Service:
		for _, r := range keys(c.snap.Routes) {
			if route := c.snap.Routes[r]; usesService(route, id(o)) {
				refs = append(refs, route.GetName())
			}
		}
	case *portolanv1.Tenant:
		refs = c.tenantObjects(id(o))
		if id(o) == api.SystemTenant {
			c.add("name", "tenant %q owns the gateways and stays", api.SystemTenant)
		}
	case *portolanv1.RoleBinding:
		c.lastAdmin(o, nil)
	}
	refs = append(refs, c.snap.Others...)
	c.refuse("name", "is used by", refs)
	return c.out
}

// Update says why the change from in.Old to in.Object would leave something that
// refers to it without what it refers to.
func Update(in Input) []api.Violation {
	c := &checker{snap: in.Snapshot}
	switch o := in.Object.(type) {
	case *portolanv1.Service:
		c.keepBackends(o)
	case *portolanv1.Tenant:
		c.keepHosts(o)
	case *portolanv1.RoleBinding:
		if old, ok := in.Old.(*portolanv1.RoleBinding); ok {
			c.lastAdmin(old, o)
		}
	}
	return c.out
}

func (c *checker) refuse(field, how string, refs []string) {
	if len(refs) == 0 {
		return
	}
	named := refs[:min(len(refs), mostNamed)]
	more := ""
	if n := len(refs) - len(named); n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	c.add(field, "%s %s%s", how, strings.Join(named, ", "), more)
}

func usesService(r *portolanv1.Route, service string) bool {
	return r.GetSpec().GetService() == service || slices.Contains(targets(r), service)
}

func (c *checker) tenantObjects(tenant string) []string {
	var refs []string
	for _, k := range keys(c.snap.Workloads) {
		refs = append(refs, c.snap.Workloads[k].GetName())
	}
	for _, k := range keys(c.snap.Services) {
		refs = append(refs, c.snap.Services[k].GetName())
	}
	for _, k := range keys(c.snap.Routes) {
		refs = append(refs, c.snap.Routes[k].GetName())
	}
	for _, b := range c.snap.RoleBindings {
		if b.GetSpec().GetTenant() == tenant {
			refs = append(refs, b.GetName())
		}
	}
	return refs
}

// lastAdmin keeps the fleet from being locked out of itself.
func (c *checker) lastAdmin(old, next *portolanv1.RoleBinding) {
	admin := func(b *portolanv1.RoleBinding) bool {
		return b.GetSpec().GetRole() == portolanv1.Role_ROLE_FLEET_ADMIN
	}
	if !admin(old) || next != nil && admin(next) {
		return
	}
	for _, b := range c.snap.RoleBindings {
		if b.GetName() != old.GetName() && admin(b) {
			return
		}
	}
	c.add("name", "is the last fleet admin: bind another first")
}

// keepBackends refuses a change of a service that a route's back end needs as it was.
func (c *checker) keepBackends(s *portolanv1.Service) {
	w := s.GetSpec().GetWorkload()
	var noPort, noRevision []string
	for _, name := range keys(c.snap.Routes) {
		r := c.snap.Routes[name]
		for _, rule := range r.GetSpec().GetRules() {
			for _, b := range rule.GetBackends() {
				if b.GetService() != id(s) {
					continue
				}
				if findPort(s, b.GetPort()) == nil && !slices.Contains(noPort, r.GetName()) {
					noPort = append(noPort, r.GetName())
				}
				if _, ok := c.snap.Revisions[w][b.GetRevision()]; b.GetRevision() != "" && !ok && !slices.Contains(noRevision, r.GetName()) {
					noRevision = append(noRevision, r.GetName())
				}
			}
		}
	}
	c.refuse("spec.ports", "a port that goes is used by", noPort)
	c.refuse("spec.workload", "the workload has not the revisions used by", noRevision)
}

// keepHosts refuses to take a suffix away under which a route has a host.
func (c *checker) keepHosts(t *portolanv1.Tenant) {
	var refs []string
	for _, name := range keys(c.snap.Routes) {
		r := c.snap.Routes[name]
		if slices.ContainsFunc(r.GetSpec().GetIngressHosts(), func(h string) bool { return !underSuffix(h, t.GetSpec().GetIngressSuffixes()) }) {
			refs = append(refs, r.GetName())
		}
	}
	c.refuse("spec.ingress_suffixes", "a suffix that goes is used by", refs)
}

// ReferencedRevisions gives the revisions of a workload that routes name.
func ReferencedRevisions(workload string, services map[string]*portolanv1.Service, routes map[string]*portolanv1.Route) map[string]bool {
	out := map[string]bool{}
	for _, r := range routes {
		for _, rule := range r.GetSpec().GetRules() {
			for _, b := range rule.GetBackends() {
				if b.GetRevision() != "" && services[b.GetService()].GetSpec().GetWorkload() == workload {
					out[b.GetRevision()] = true
				}
			}
		}
	}
	return out
}

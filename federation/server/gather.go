package server

import (
	"strings"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// gatherer collects what admit may look at, from one snapshot, and only what the
// kind needs.
type gatherer struct {
	r    store.Reader
	snap *admit.Snapshot
	err  error
}

// gather makes the snapshot for a decision on an object; old is nil when there
// is none, deleting says that old is to go.
func (s *Server) gather(r store.Reader, o, old object, deleting bool) (*admit.Snapshot, error) {
	g := &gatherer{r: r, snap: &admit.Snapshot{Fleet: s.cfg.Fleet}}
	name := o.GetName()
	t := api.TenantOf(name)
	if rec, ok := get[*portolanv1.Tenant](g, store.Tenant, api.TenantName(t)); ok && t != "" {
		g.snap.Tenant = rec
	}
	switch m := o.(type) {
	case *portolanv1.Workload:
		g.revisions(t, lastID(name))
		if deleting {
			g.services(t)
		}
	case *portolanv1.Service:
		g.service(t, m, old, deleting)
	case *portolanv1.Route:
		if !deleting {
			g.route(t, m)
		}
	case *portolanv1.Tenant:
		g.tenant(t, old, deleting)
	case *portolanv1.RoleBinding:
		g.roleBindings()
		bound := m.GetSpec().GetTenant()
		_, there := get[*portolanv1.Tenant](g, store.Tenant, api.TenantName(bound))
		g.snap.Tenants = map[string]bool{bound: there}
	case *portolanv1.Cluster:
		if deleting {
			g.placementsIn(lastID(name))
		}
	}
	return g.snap, g.err
}

// get reads one message; false when it is absent.
func get[T any](g *gatherer, kind store.Kind, name string) (T, bool) {
	var zero T
	if g.err != nil {
		return zero, false
	}
	rec, err := g.r.Get(kind, name)
	if err != nil {
		if api.KindOf(err) != api.NotFound {
			g.err = err
		}
		return zero, false
	}
	m, ok := rec.Message.(T)
	return m, ok
}

// each calls fn for each record of a kind.
func each[T any](g *gatherer, kind store.Kind, opts store.ListOptions, fn func(name string, m T)) {
	if g.err != nil {
		return
	}
	for rec, err := range g.r.List(kind, opts) {
		if err != nil {
			g.err = err
			return
		}
		if m, ok := rec.Message.(T); ok {
			fn(rec.Name, m)
		}
	}
}

func (g *gatherer) revisions(tenant, workload string) {
	if g.snap.Revisions == nil {
		g.snap.Revisions = map[string]map[string]*portolanv1.WorkloadSpec{}
	}
	if g.snap.Revisions[workload] != nil {
		return
	}
	revs := map[string]*portolanv1.WorkloadSpec{}
	prefix := api.RevisionName(tenant, workload, "")
	each(g, store.Revision, store.ListOptions{Prefix: prefix}, func(name string, m *portolanv1.WorkloadRevision) {
		revs[lastID(name)] = m.GetSpec()
	})
	g.snap.Revisions[workload] = revs
}

func (g *gatherer) services(tenant string) {
	g.snap.Services = map[string]*portolanv1.Service{}
	each(g, store.Service, store.ListOptions{Tenant: tenant}, func(name string, m *portolanv1.Service) {
		g.snap.Services[lastID(name)] = m
	})
}

func (g *gatherer) routes(tenant string) {
	g.snap.Routes = map[string]*portolanv1.Route{}
	each(g, store.Route, store.ListOptions{Tenant: tenant}, func(name string, m *portolanv1.Route) {
		g.snap.Routes[lastID(name)] = m
	})
}

func (g *gatherer) service(tenant string, svc *portolanv1.Service, old object, deleting bool) {
	w := svc.GetSpec().GetWorkload()
	if m, ok := get[*portolanv1.Workload](g, store.Workload, api.WorkloadName(tenant, w)); ok {
		g.snap.Workloads = map[string]*portolanv1.Workload{w: m}
	}
	if old != nil || deleting {
		g.routes(tenant)
		g.revisions(tenant, w)
	}
}

func (g *gatherer) route(tenant string, r *portolanv1.Route) {
	g.services(tenant)
	g.routes(tenant)
	for _, rule := range r.GetSpec().GetRules() {
		for _, b := range rule.GetBackends() {
			if svc, ok := g.snap.Services[b.GetService()]; ok && b.GetRevision() != "" {
				g.revisions(tenant, svc.GetSpec().GetWorkload())
			}
		}
	}
	if len(r.GetSpec().GetIngressHosts()) == 0 {
		return
	}
	g.snap.Hosts = map[string]string{}
	each(g, store.Route, store.ListOptions{}, func(name string, m *portolanv1.Route) {
		for _, h := range m.GetSpec().GetIngressHosts() {
			g.snap.Hosts[h] = name
		}
	})
}

func (g *gatherer) tenant(tenant string, old object, deleting bool) {
	if old != nil || deleting {
		g.routes(tenant)
	}
	if !deleting {
		return
	}
	g.services(tenant)
	g.snap.Workloads = map[string]*portolanv1.Workload{}
	each(g, store.Workload, store.ListOptions{Tenant: tenant}, func(name string, m *portolanv1.Workload) {
		g.snap.Workloads[lastID(name)] = m
	})
	each(g, store.PolicyBundle, store.ListOptions{Tenant: tenant}, func(name string, _ *portolanv1.PolicyBundle) {
		g.snap.Others = append(g.snap.Others, name)
	})
	// What a deleted workload leaves until the control loop has seen it.
	each(g, store.Placement, store.ListOptions{Tenant: tenant}, func(name string, _ *portolanv1.Placement) {
		g.snap.Others = append(g.snap.Others, name)
	})
	g.roleBindings()
}

func (g *gatherer) roleBindings() {
	each(g, store.RoleBinding, store.ListOptions{}, func(_ string, m *portolanv1.RoleBinding) {
		g.snap.RoleBindings = append(g.snap.RoleBindings, m)
	})
}

func (g *gatherer) placementsIn(cluster string) {
	each(g, store.Placement, store.ListOptions{}, func(name string, _ *portolanv1.Placement) {
		if strings.HasSuffix(name, "/placements/"+cluster) {
			g.snap.Others = append(g.snap.Others, name)
		}
	})
}

package control

import (
	"maps"
	"slices"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// ledger is what every placement reserves, and the sums by cluster and tenant.
type ledger struct {
	claims  map[string]claim // by placement name
	pots    map[string]*place.Pot
	tenants map[string]api.Resources
	// cuts are replicas that a higher priority took away, by placement name, until
	// their workload is decided anew.
	cuts map[string]int
}

// claim is a reservation, what nodes it may lie on, and its workload's priority.
type claim struct {
	api.Resources
	on       portolanv1.CapacityType
	priority int32
}

func claimAs(r api.Resources, w *portolanv1.Workload) claim {
	return claim{r, place.CapacityOf(w.GetSpec()), w.GetSpec().GetPriority()}
}

func newLedger() *ledger {
	return &ledger{claims: map[string]claim{}, pots: map[string]*place.Pot{}, tenants: map[string]api.Resources{}, cuts: map[string]int{}}
}

// clone is for who goes on to book.
func (l *ledger) clone() *ledger {
	c := &ledger{claims: maps.Clone(l.claims), pots: map[string]*place.Pot{}, tenants: maps.Clone(l.tenants), cuts: maps.Clone(l.cuts)}
	for cluster, pot := range l.pots {
		p := *pot
		c.pots[cluster] = &p
	}
	return c
}

// set books a placement's reservation; none is the zero value.
func (l *ledger) set(placement string, c claim) {
	cluster, tenant, old := lastID(placement), api.TenantOf(placement), l.claims[placement]
	pot := l.pots[cluster]
	if pot == nil {
		pot = &place.Pot{}
		l.pots[cluster] = pot
	}
	pot.Book(old.on, negative(old.Resources))
	pot.Book(c.on, c.Resources)
	t := l.tenants[tenant]
	t.CPUMilli += c.CPUMilli - old.CPUMilli
	t.MemoryBytes += c.MemoryBytes - old.MemoryBytes
	l.tenants[tenant] = t
	if c.Resources == (api.Resources{}) {
		delete(l.claims, placement)
	} else {
		l.claims[placement] = c
	}
}

func negative(r api.Resources) api.Resources {
	return api.Resources{CPUMilli: -r.CPUMilli, MemoryBytes: -r.MemoryBytes}
}

// total is all that is reserved in a cluster.
func (l *ledger) total(cluster string) api.Resources {
	if p := l.pots[cluster]; p != nil {
		return p.Claims()
	}
	return api.Resources{}
}

// free is what a cluster's room leaves for one claim, all others apart.
func (l *ledger) free(cluster string, room place.Pot, own claim) (onDemand, spot api.Resources) {
	var pot place.Pot
	if p := l.pots[cluster]; p != nil {
		pot = *p
	}
	pot.OnDemand, pot.Spot = room.OnDemand, room.Spot
	pot.Book(own.on, negative(own.Resources))
	return pot.Free()
}

// cut is what a workload has after what was taken away.
func (l *ledger) cut(placement string, c *place.Cluster, w place.Workload, p place.Previous) place.Previous {
	if n := l.cuts[placement]; n > 0 {
		return w.Cut(c, p, n)
	}
	return p
}

func reservation(p *portolanv1.PlacementSpec) api.Resources {
	return api.Resources{CPUMilli: p.GetReservedCpuMilli(), MemoryBytes: p.GetReservedMemoryBytes()}
}

// claimOf is what a stored placement reserves.
func claimOf(s source, placement string, p *portolanv1.PlacementSpec) claim {
	w, _ := s.get(store.Workload, workloadOf(placement))
	return claimAs(reservation(p), message[*portolanv1.Workload](w))
}

func ledgerOf(s source) *ledger {
	l := newLedger()
	for _, rec := range s.under(store.Placement, "") {
		l.set(rec.Name, claimOf(s, rec.Name, message[*portolanv1.Placement](rec).GetSpec()))
	}
	return l
}

// lower fills in whom a workload may displace in the clusters of its snapshot. It
// says whether there is anybody.
func lower(s source, led *ledger, name string, snap place.Snapshot) bool {
	spec := snap.Workload.Spec
	if spec.GetNeverPreempt() {
		return false
	}
	clusters := map[string]*place.Cluster{}
	for i := range snap.Clusters {
		clusters[snap.Clusters[i].ID] = &snap.Clusters[i]
	}
	some := false
	for placement, have := range led.claims { // place puts them in order
		c := clusters[lastID(placement)]
		if have.priority >= spec.GetPriority() || !place.MakesRoom(have.on, spec) || c == nil || workloadOf(placement) == name {
			continue
		}
		if l, ok := claimant(s, led, placement, c); ok {
			c.Lower, some = append(c.Lower, l), true
		}
	}
	return some
}

// claimant is what a workload has in a cluster, as another may take it.
func claimant(s source, led *ledger, placement string, c *place.Cluster) (place.Claimant, bool) {
	name := workloadOf(placement)
	p, placed := s.get(store.Placement, placement)
	rec, exists := s.get(store.Workload, name)
	if !placed || !exists {
		return place.Claimant{}, false
	}
	var has []string
	for _, r := range message[*portolanv1.Placement](p).GetSpec().GetRevisions() {
		has = append(has, r.GetRevision())
	}
	revs, err := runningRevisions(s, name, message[*portolanv1.Workload](rec), has)
	if err != nil {
		return place.Claimant{}, false
	}
	w := place.Workload{ID: lastID(name), Spec: message[*portolanv1.Workload](rec).GetSpec(), Revisions: revs}
	return w.Claimant(name, c, led.cut(placement, c, w, place.PreviousOf(message[*portolanv1.Placement](p).GetSpec())))
}

// relations are the workloads that each workload's affinity names, by both names.
type relations struct {
	named  map[string]map[string]bool // by who is named: who names it
	naming map[string][]string        // by who names: whom
}

func newRelations() relations {
	return relations{map[string]map[string]bool{}, map[string][]string{}}
}

func relationsOf(s source) relations {
	r := newRelations()
	for _, rec := range s.under(store.Workload, "") {
		r.set(rec.Name, message[*portolanv1.Workload](rec).GetSpec())
	}
	return r
}

// set takes in whom a workload names now.
func (r relations) set(name string, spec *portolanv1.WorkloadSpec) {
	for _, other := range r.naming[name] {
		delete(r.named[other], name)
		if len(r.named[other]) == 0 {
			delete(r.named, other)
		}
	}
	delete(r.naming, name)
	for _, a := range spec.GetPlacement().GetAffinity() {
		other := api.WorkloadName(api.TenantOf(name), a.GetWorkload())
		if r.named[other] == nil {
			r.named[other] = map[string]bool{}
		}
		r.named[other][name] = true
		r.naming[name] = append(r.naming[name], other)
	}
}

// of are those that name a workload, in order.
func (r relations) of(name string) []string {
	var out []string
	for other := range r.named[name] {
		out = append(out, other)
	}
	slices.Sort(out)
	return out
}

// othersOf are the workloads that a workload's affinity relates it to.
func othersOf(s source, name string, spec *portolanv1.WorkloadSpec) []place.Other {
	names := s.naming(name)
	for _, a := range spec.GetPlacement().GetAffinity() {
		names = append(names, api.WorkloadName(api.TenantOf(name), a.GetWorkload()))
	}
	slices.Sort(names)
	var out []place.Other
	for _, other := range slices.Compact(names) {
		rec, ok := s.get(store.Workload, other)
		if !ok || other == name {
			continue
		}
		o := place.Other{ID: lastID(other), Affinity: message[*portolanv1.Workload](rec).GetSpec().GetPlacement().GetAffinity()}
		for _, p := range s.under(store.Placement, other+"/placements/") {
			if had := place.PreviousOf(message[*portolanv1.Placement](p).GetSpec()); had.Declared+had.Failover > 0 || message[*portolanv1.Placement](p).GetSpec().GetDaemon() {
				o.Clusters = append(o.Clusters, lastID(p.Name))
			}
		}
		out = append(out, o)
	}
	return out
}

package control

import (
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// absorb takes a newer view in: it marks the workloads whose decision may
// change, and brings the ledger up to date. Marking too many is harmless.
func (l *loop) absorb(v *store.View) {
	if !l.all && l.view != nil {
		if v.Revision == l.view.Revision {
			return
		}
		if changes, ok := l.mirror.Since(l.view.Revision, v.Revision); ok {
			before := l.view
			l.view = v
			for _, c := range changes {
				l.changed(before, c)
			}
			return
		}
	}
	l.view, l.all = v, false
	src := viewSource{v: v}
	l.ledger, l.near = ledgerOf(src), relationsOf(src)
	l.markAll()
	// Placements whose workload is gone.
	for rec := range v.List(store.Placement, store.ListOptions{}) {
		l.dirty[workloadOf(rec.Name)] = true
	}
}

func (l *loop) changed(before *store.View, c store.Change) {
	switch r := c.Record; r.Kind {
	case store.Workload, store.Rollout:
		l.dirty[r.Name] = true
		w, _ := store.One[*portolanv1.Workload](l.view, store.Workload, r.Name)
		l.near.set(r.Name, w.GetSpec())
	case store.Revision:
		l.dirty[workloadOf(r.Name)] = true
	case store.Tenant, store.Service, store.Route:
		for rec := range l.view.List(store.Workload, store.ListOptions{Prefix: "tenants/" + api.TenantOf(r.Name) + "/workloads/"}) {
			l.dirty[rec.Name] = true
		}
	case store.Placement:
		l.placementChanged(c)
	case store.PlacementStatus:
		if w := workloadOf(r.Name); l.standing[w] || l.rolling[w] {
			l.dirty[w] = true
		}
	case store.Cluster:
		l.markAll()
	case store.ClusterStatus:
		l.statusChanged(before, r.Name)
	default: // decides no placement
	}
}

func (l *loop) placementChanged(c store.Change) {
	name := c.Record.Name
	l.dirty[workloadOf(name)] = true
	for _, other := range l.near.of(workloadOf(name)) {
		l.dirty[other] = true
	}
	var now claim
	if !c.Deleted {
		now = claimOf(viewSource{l.view, l.near}, name, message[*portolanv1.Placement](c.Record).GetSpec())
	}
	l.book(name, now)
}

// statusChanged marks what a cluster's status decides: everything when it comes
// or goes, else who waits for room, and daemons when it has other nodes.
func (l *loop) statusChanged(before *store.View, name string) {
	was, _ := store.One[*storev1.ClusterStatusRecord](before, store.ClusterStatus, name)
	is, _ := store.One[*storev1.ClusterStatusRecord](l.view, store.ClusterStatus, name)
	if was.GetStatus().GetState() != is.GetStatus().GetState() {
		l.markAll()
		return
	}
	l.markShort()
	if was.GetStatus().GetNodes() != is.GetStatus().GetNodes() {
		for name, w := range store.All[*portolanv1.Workload](l.view, store.Workload) {
			if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
				l.dirty[name] = true
			}
		}
	}
}

func (l *loop) markAll() {
	for rec := range l.view.List(store.Workload, store.ListOptions{}) {
		l.dirty[rec.Name] = true
	}
}

func (l *loop) markShort() {
	for name := range l.short {
		l.dirty[name] = true
	}
}

package control

import (
	"fmt"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// source is what a decision reads: the mirror's view, or a transaction. Errors
// of a transaction are kept in it.
type source interface {
	get(kind store.Kind, name string) (store.Record, bool)
	under(kind store.Kind, prefix string) []store.Record
	// naming are the workloads whose affinity names this one.
	naming(workload string) []string
}

type viewSource struct {
	v    *store.View
	near relations
}

func (s viewSource) naming(workload string) []string { return s.near.of(workload) }

func (s viewSource) get(kind store.Kind, name string) (store.Record, bool) {
	return s.v.Get(kind, name)
}

func (s viewSource) under(kind store.Kind, prefix string) []store.Record {
	var out []store.Record
	for r := range s.v.List(kind, store.ListOptions{Prefix: prefix}) {
		out = append(out, r)
	}
	return out
}

type readerSource struct {
	r   store.Reader
	err error
}

func (s *readerSource) get(kind store.Kind, name string) (store.Record, bool) {
	rec, err := s.r.Get(kind, name)
	if err != nil {
		if api.KindOf(err) != api.NotFound && s.err == nil {
			s.err = err
		}
		return store.Record{}, false
	}
	return rec, true
}

func (s *readerSource) under(kind store.Kind, prefix string) []store.Record {
	var out []store.Record
	for rec, err := range s.r.List(kind, store.ListOptions{Prefix: prefix}) {
		if err != nil {
			if s.err == nil {
				s.err = err
			}
			return nil
		}
		out = append(out, rec)
	}
	return out
}

func (s *readerSource) naming(workload string) []string { return relationsOf(s).of(workload) }

func message[T any](r store.Record) T {
	m, _ := r.Message.(T)
	return m
}

func lastID(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// workloadOf is the name of the workload above a revision or placement.
func workloadOf(name string) string {
	i := strings.LastIndexByte(name, '/')
	return name[:strings.LastIndexByte(name[:max(i, 0)], '/')]
}

// currentRevision is the ID of the revision that the spec stands for.
func currentRevision(w *portolanv1.Workload) string {
	switch {
	case w.GetStatus().GetCurrentRevision() != "":
		return w.GetStatus().GetCurrentRevision()
	case w.GetSpec().GetRevision() != "":
		return w.GetSpec().GetRevision()
	}
	return fmt.Sprintf("r%d", w.GetGeneration())
}

// runningRevisions are those that are to run, in that order, and those that routes
// name, each with what placement needs of it.
func runningRevisions(s source, name string, w *portolanv1.Workload, want []string) ([]place.Revision, error) {
	var out []place.Revision
	add := func(id string, spec *portolanv1.WorkloadSpec) error {
		r, err := place.NewRevision(id, spec)
		out = append(out, r)
		return err
	}
	for _, id := range want {
		spec := w.GetSpec()
		if id != currentRevision(w) {
			rec, ok := s.get(store.Revision, name+"/revisions/"+id)
			if !ok {
				continue
			}
			spec = admit.Overlay(message[*portolanv1.WorkloadRevision](rec).GetSpec(), w.GetSpec())
		}
		if err := add(id, spec); err != nil {
			return nil, err
		}
	}
	named := namedRevisions(s, name)
	for _, rec := range s.under(store.Revision, name+"/revisions/") {
		id := lastID(rec.Name)
		if slices.Contains(want, id) || !named[id] {
			continue
		}
		if err := add(id, admit.Overlay(message[*portolanv1.WorkloadRevision](rec).GetSpec(), w.GetSpec())); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// namedRevisions are the revisions of a workload that a route's back end names.
func namedRevisions(s source, workload string) map[string]bool {
	tenant, id := "tenants/"+api.TenantOf(workload)+"/", lastID(workload)
	out := map[string]bool{}
	for _, rec := range s.under(store.Route, tenant+"routes/") {
		route := message[*portolanv1.Route](rec).GetSpec()
		for _, rule := range route.GetRules() {
			for _, b := range rule.GetBackends() {
				if b.GetRevision() == "" {
					continue
				}
				service := b.GetService()
				if service == "" {
					service = route.GetService()
				}
				svc, ok := s.get(store.Service, tenant+"services/"+service)
				selects := message[*portolanv1.Service](svc).GetSpec().GetWorkload()
				if selects == "" {
					selects = service
				}
				if ok && selects == id {
					out[b.GetRevision()] = true
				}
			}
		}
	}
	return out
}

// snapshot gathers what the decision on one workload depends on.
func snapshot(s source, led *ledger, name string, w *portolanv1.Workload, want []string) (place.Snapshot, error) {
	revs, err := runningRevisions(s, name, w, want)
	if err != nil {
		return place.Snapshot{}, err
	}
	out := place.Snapshot{Workload: place.Workload{ID: lastID(name), Spec: w.GetSpec(), Revisions: revs}, Others: othersOf(s, name, w.GetSpec())}
	if rec, ok := s.get(store.Tenant, api.TenantName(api.TenantOf(name))); ok {
		out.Workload.Residency = message[*portolanv1.Tenant](rec).GetSpec().GetAllowedRegions()
	}
	for _, rec := range s.under(store.Cluster, "") {
		out.Clusters = append(out.Clusters, clusterOf(s, led, name, rec, out.Workload))
	}
	return out, nil
}

// clusterOf is one cluster as the decision on a workload sees it.
func clusterOf(s source, led *ledger, workload string, rec store.Record, w place.Workload) place.Cluster {
	cl := message[*portolanv1.Cluster](rec)
	c := place.Cluster{ID: lastID(rec.Name), Labels: cl.GetLabels(), Spec: cl.GetSpec(), Changed: cl.GetUpdateTime().AsTime()}
	var room place.Pot
	if st, ok := s.get(store.ClusterStatus, rec.Name); ok {
		status := message[*storev1.ClusterStatusRecord](st).GetStatus()
		c.State, c.LastSeen, c.Nodes, c.Pools = status.GetState(), status.GetLastSeenTime().AsTime(), int(status.GetNodes()), status.GetPools()
		room = place.PotOf(status)
	}
	name := workload + "/placements/" + c.ID
	var generation int64
	if p, ok := s.get(store.Placement, name); ok {
		placement := message[*portolanv1.Placement](p)
		generation = placement.GetGeneration()
		c.Previous = led.cut(name, &c, w, place.PreviousOf(placement.GetSpec()))
	}
	c.Free, c.Spot = led.free(c.ID, room, led.claims[name])
	if st, ok := s.get(store.PlacementStatus, name); ok {
		status := message[*storev1.PlacementStatusRecord](st).GetStatus()
		c.Ready = readyOf(status, w.Revisions)
		c.Stopped = status.GetObservedGeneration() >= generation && !runsSome(status)
	}
	return c
}

func runsSome(st *portolanv1.PlacementStatus) bool {
	for _, r := range st.GetRevisions() {
		if r.GetReplicas() > 0 {
			return true
		}
	}
	return false
}

// readyOf is how many replicas of every one of the revisions are ready.
func readyOf(st *portolanv1.PlacementStatus, revs []place.Revision) int {
	ready := map[string]int{}
	for _, r := range st.GetRevisions() {
		ready[r.GetRevision()] = int(r.GetReadyReplicas())
	}
	least := ready[revs[0].ID]
	for _, r := range revs {
		least = min(least, ready[r.ID])
	}
	return least
}

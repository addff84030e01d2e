package control

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// changed is a source in which one thing is otherwise, and what was decided
// because of it is taken for stored.
type changed struct {
	source
	what api.WhatIf
	now  time.Time
	near relations
	// placements by workload and by name, and rollouts, as they were decided; nil
	// where there would be none.
	placements map[string]map[string]*portolanv1.Placement
	rollouts   map[string]*storev1.Rollout
}

func newChanged(s source, what api.WhatIf, now time.Time) *changed {
	c := &changed{source: s, what: what, now: now, placements: map[string]map[string]*portolanv1.Placement{}, rollouts: map[string]*storev1.Rollout{}}
	c.near = relationsOf(c)
	return c
}

func (s *changed) naming(workload string) []string { return s.near.of(workload) }

// take lets the decisions that follow see this one.
func (s *changed) take(d decision) {
	of := s.placements[d.workload]
	if of == nil {
		of = map[string]*portolanv1.Placement{}
		s.placements[d.workload] = of
	}
	for name, spec := range d.puts {
		p := &portolanv1.Placement{Name: name}
		if rec, ok := s.get(store.Placement, name); ok {
			p = proto.CloneOf(message[*portolanv1.Placement](rec))
		}
		// Later than all that its cluster has reported.
		epoch := p.GetSpec().GetEpoch() + 1
		p.Generation++
		p.Spec = proto.CloneOf(spec)
		p.Spec.Epoch = epoch
		of[name] = p
	}
	for _, name := range d.deletes {
		of[name] = nil
	}
	if d.rollout != nil || d.dropRollout {
		s.rollouts[d.workload] = d.rollout
	}
}

// decided is what would be stored of a kind and name by now; known is false when no
// decision was about it.
func (s *changed) decided(kind store.Kind, name string) (rec store.Record, exists, known bool) {
	rec = store.Record{Kind: kind, Name: name}
	switch kind {
	case store.Placement:
		p, known := s.placements[workloadOf(name)][name]
		rec.Message = p
		return rec, p != nil, known
	case store.Rollout:
		r, known := s.rollouts[name]
		rec.Message = r
		return rec, r != nil, known
	default:
		return rec, false, false
	}
}

func (s *changed) get(kind store.Kind, name string) (store.Record, bool) {
	if rec, exists, known := s.decided(kind, name); known {
		if !exists {
			return store.Record{}, false
		}
		return rec, true
	}
	rec, ok := s.source.get(kind, name)
	switch {
	case kind == store.Workload && name == s.what.Deleted:
		return store.Record{}, false
	case kind == store.Workload && s.what.Workload != nil && name == s.what.Workload.GetName():
		rec.Kind, rec.Name, rec.Message = kind, name, s.what.Workload
		return rec, true
	case s.what.Cluster != nil && name == s.what.Cluster.GetCluster().GetName():
		return s.otherwise(kind, rec, ok)
	}
	return rec, ok
}

func (s *changed) under(kind store.Kind, prefix string) []store.Record {
	recs := s.source.under(kind, prefix)
	if kind == store.Placement {
		return s.placementsUnder(recs, prefix)
	}
	var name string
	switch {
	case kind == store.Workload && s.what.Workload != nil:
		name = s.what.Workload.GetName()
	case kind == store.Workload:
		name = s.what.Deleted
	case kind == store.Cluster || kind == store.ClusterStatus:
		name = s.what.Cluster.GetCluster().GetName()
	default:
	}
	if name == "" || !strings.HasPrefix(name, prefix) {
		return recs
	}
	out := slices.DeleteFunc(slices.Clone(recs), func(r store.Record) bool { return r.Name == name })
	if rec, ok := s.get(kind, name); ok {
		out = append(out, rec)
	}
	slices.SortFunc(out, func(a, b store.Record) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// placementsUnder lays what was decided over what is stored: decisions list the
// placements of one workload.
func (s *changed) placementsUnder(recs []store.Record, prefix string) []store.Record {
	decided := s.placements[strings.TrimSuffix(prefix, "/placements/")]
	if len(decided) == 0 {
		return recs
	}
	out := slices.DeleteFunc(slices.Clone(recs), func(r store.Record) bool { _, known := decided[r.Name]; return known })
	for name, p := range decided {
		if p != nil {
			out = append(out, store.Record{Kind: store.Placement, Name: name, Message: p})
		}
	}
	slices.SortFunc(out, func(a, b store.Record) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// otherwise is the changed cluster's record, or its status'.
func (s *changed) otherwise(kind store.Kind, rec store.Record, ok bool) (store.Record, bool) {
	added := s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_ADDED
	switch kind {
	case store.Cluster:
		cl := proto.CloneOf(message[*portolanv1.Cluster](rec))
		if added {
			cl, ok = proto.CloneOf(s.what.Cluster.GetCluster()), true
		}
		if s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_DRAINED && cl.GetSpec() != nil {
			cl.Spec.Taints = append(cl.Spec.Taints, &portolanv1.Taint{Key: place.DrainTaint, Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE})
		}
		rec.Name, rec.Message = s.what.Cluster.GetCluster().GetName(), cl
	case store.ClusterStatus:
		st := &storev1.ClusterStatusRecord{Status: &portolanv1.ClusterStatus{}}
		if ok {
			st = proto.CloneOf(message[*storev1.ClusterStatusRecord](rec))
		}
		if added {
			st.Status = proto.CloneOf(s.what.Cluster.GetCluster().GetStatus())
			st.Status.State, st.Status.LastSeenTime, ok = portolanv1.ClusterState_CLUSTER_STATE_READY, timestamppb.New(s.now), true
		}
		if s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_LOST {
			// Long enough for every failover to be due.
			st.Status.State, st.Status.LastSeenTime = portolanv1.ClusterState_CLUSTER_STATE_LOST, timestamppb.New(s.now.AddDate(-1, 0, 0))
		}
		rec.Name, rec.Message = s.what.Cluster.GetCluster().GetName(), st
	default:
	}
	return rec, ok
}

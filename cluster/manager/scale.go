package manager

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/autoscale"
	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// scaleEvery is how often a workload's metrics are looked at. What replicas use
// wakes nobody.
const scaleEvery = 5 * time.Second

// scaling is when a workload is looked at next, by which intent it was, and what
// that came to.
type scaling struct {
	intent  *linkv1.WorkloadIntent
	next    time.Time
	verdict *portolanv1.ScaleVerdict
}

// scalingNotes say what the last looks came to, by the workloads' keys.
func scalingNotes(scaled map[reconcile.Key]scaling) map[string]*portolanv1.ScaleVerdict {
	out := make(map[string]*portolanv1.ScaleVerdict, len(scaled))
	for k, s := range scaled {
		out[k.String()] = s.verdict
	}
	return out
}

// scaleChange is what autoscaling decided.
type scaleChange struct {
	states map[reconcile.Key]*clusterv1.WorkloadState
	events []*portolanv1.Event
	next   time.Time
	// looked says when each workload is looked at again, once this is written.
	looked map[reconcile.Key]scaling
	// saved are the profiles that are written with it.
	saved []*profile
}

// scale decides how many replicas workloads should have, those that are due, and
// puts the result into the input of reconcile.
func (m *Manager) scale(s *state.Snapshot, in *reconcile.Input, now time.Time) scaleChange {
	c := scaleChange{states: map[reconcile.Key]*clusterv1.WorkloadState{}, looked: map[reconcile.Key]scaling{}}
	var due []reconcile.Key
	for k, w := range in.Workloads {
		rev := scaledRevision(w.Intent)
		if rev == nil {
			continue
		}
		if was, ok := m.scaled[k]; ok && was.intent == w.Intent && now.Before(was.next) {
			c.looked[k], c.next = was, earlier(c.next, was.next)
			continue
		}
		due = append(due, k)
	}
	if len(due) == 0 {
		return c
	}
	slices.SortFunc(due, compareKeys)
	by := replicasOf(s, due)
	for _, k := range due {
		m.scaleOne(s, in, k, by[k], now, &c)
	}
	return c
}

// scaledRevision is the revision whose bounds and rules hold; nil when the workload
// does not scale by itself.
func scaledRevision(w *linkv1.WorkloadIntent) *linkv1.RevisionIntent {
	for _, r := range w.GetRevisions() {
		if r.GetRevision() == w.GetCurrentRevision() && r.GetMaxReplicas() > 0 && r.GetSpec().GetAutoscale() != nil {
			return r
		}
	}
	return nil
}

// replicasOf gives the replicas of workloads that are meant to stay, sorted.
func replicasOf(s *state.Snapshot, keys []reconcile.Key) map[reconcile.Key][]*clusterv1.Allocation {
	out := make(map[reconcile.Key][]*clusterv1.Allocation, len(keys))
	for _, k := range keys {
		out[k] = nil
	}
	for _, a := range s.Allocations {
		k := reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}
		if as, asked := out[k]; asked && !a.GetStop() && a.GetFinal() == nil && a.GetReplacedBy() == "" {
			out[k] = append(as, a)
		}
	}
	for _, as := range out {
		slices.SortFunc(as, func(a, b *clusterv1.Allocation) int { return cmp.Compare(a.GetAllocation(), b.GetAllocation()) })
	}
	return out
}

func (m *Manager) scaleOne(s *state.Snapshot, in *reconcile.Input, k reconcile.Key, as []*clusterv1.Allocation, now time.Time, c *scaleChange) {
	w := in.Workloads[k].Intent
	rev := scaledRevision(w)
	was := in.States[k]
	if was.GetUid() != w.GetUid() {
		was = nil
	}
	current := int(rev.GetReplicas())
	if was.GetScale() != nil {
		current = int(was.GetScale().GetReplicas())
	}
	plan := autoscale.Decide(autoscale.Input{
		Now: now, Current: current, Min: int(rev.GetMinReplicas()), Max: int(rev.GetMaxReplicas()), Spec: rev.GetSpec().GetAutoscale(),
		Samples: samples(s, w, as), State: was.GetScale(),
	})
	next := earlier(plan.Next, now.Add(scaleEvery))
	c.looked[k], c.next = scaling{w, next, &portolanv1.ScaleVerdict{Replicas: int32(plan.Replicas), Reasons: plan.Reasons}}, earlier(c.next, next)
	if !plan.Changed {
		return
	}
	st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: w.GetUid()}
	if was != nil {
		st = proto.CloneOf(was)
	}
	st.Scale = plan.Scale
	c.states[k] = st
	in.States = maps.Clone(in.States)
	in.States[k] = st
	if plan.Replicas != current {
		why := plan.Scale.GetReason()
		c.events = append(c.events, m.workloadEvent(k, "Scaled", fmt.Sprintf("from %d to %d replicas: %s: %s", current, plan.Replicas, why.GetCode(), why.GetMessage()), now))
	}
}

// samples are what was measured of the replicas that serve.
func samples(s *state.Snapshot, w *linkv1.WorkloadIntent, as []*clusterv1.Allocation) []autoscale.Sample {
	var out []autoscale.Sample
	for _, a := range as {
		if active := w.GetActiveRevision(); a.GetUid() != w.GetUid() || active != "" && a.GetRevision() != active {
			continue
		}
		sample := autoscale.Sample{Allocation: a.GetAllocation(), Bound: a.GetBound().AsTime()}
		if r, err := api.RequestsOf(a.GetSpec()); err == nil {
			sample.Request = r
		}
		n := s.Nodes[a.GetNode()]
		if st := s.NodeStatus[a.GetNode()]; st != nil && n.GetLostTime() == nil {
			o := st.Allocations[a.GetAllocation()]
			sample.Ready, sample.Usage = o.GetReady(), o.GetUsage()
			if at := o.GetTimeline().GetReady(); at != nil {
				sample.ReadyAt = at.AsTime()
			}
		}
		out = append(out, sample)
	}
	return out
}

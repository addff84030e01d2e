package sim

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/autoscale"
	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// scaleEvery is how often metrics are looked at.
const scaleEvery = 5 * time.Second

// scale lets workloads that scale by themselves have another number, as the loop
// does before it reconciles.
func (c *Cluster) scale() {
	if c.Now.Sub(c.scaled) < scaleEvery {
		return
	}
	c.scaled = c.Now
	told := c.input().Workloads
	for _, k := range slices.SortedFunc(maps.Keys(told), compareKeys) {
		i := told[k].Intent
		if r := i.GetRevisions()[0]; r.GetMaxReplicas() > 0 {
			c.scaleOne(k, i, r)
		}
	}
}

func (c *Cluster) scaleOne(k reconcile.Key, i *linkv1.WorkloadIntent, r *linkv1.RevisionIntent) {
	st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: i.GetUid()}
	if was := c.states[k]; was != nil && was.GetUid() == i.GetUid() {
		st = proto.CloneOf(was)
	}
	current := int(r.GetReplicas())
	if st.GetScale() != nil {
		current = int(st.GetScale().GetReplicas())
	}
	p := autoscale.Decide(autoscale.Input{
		Now: c.Now, Current: current, Min: int(r.GetMinReplicas()), Max: int(r.GetMaxReplicas()), Spec: r.GetSpec().GetAutoscale(), Samples: c.samples(k, i), State: st.GetScale(),
	})
	if !p.Changed {
		return
	}
	switch {
	case p.Replicas > current:
		c.Reached["scaled up"]++
	case p.Replicas < current:
		c.Reached["scaled down"]++
	}
	st.Scale = p.Scale
	c.states[k] = st
	if p.Replicas != current {
		c.say("scale %s from %d to %d: %s", k, current, p.Replicas, p.Scale.GetReason().GetMessage())
	}
}

// samples are what the replicas that are meant to stay use.
func (c *Cluster) samples(k reconcile.Key, i *linkv1.WorkloadIntent) []autoscale.Sample {
	var out []autoscale.Sample
	for _, id := range slices.Sorted(maps.Keys(c.allocs)) {
		a := c.allocs[id]
		if keyOf(a) != k || a.GetUid() != i.GetUid() || a.GetStop() || a.GetReplacedBy() != "" {
			continue
		}
		s := autoscale.Sample{Allocation: id, Bound: a.GetBound().AsTime()}
		if r, err := api.RequestsOf(a.GetSpec()); err == nil {
			s.Request = r
		}
		if n := c.nodes[a.GetNode()]; !n.gone() {
			o := n.reported[id]
			s.Ready, s.Usage = o.GetReady(), o.GetUsage()
			if at := o.GetTimeline().GetReady(); at != nil {
				s.ReadyAt = at.AsTime()
			}
		}
		out = append(out, s)
	}
	return out
}

// wanted is how many replicas a workload should have now, in all its revisions. A
// number of its own stays within what is reserved for it.
func (c *Cluster) wanted(k reconcile.Key) int {
	n := 0
	for _, r := range c.intents[k].Intent.GetRevisions() {
		n += int(c.scaledTo(k, r))
	}
	return n
}

func (c *Cluster) scaledTo(k reconcile.Key, r *linkv1.RevisionIntent) int32 {
	st := c.states[k]
	if r.GetMaxReplicas() == 0 || st.GetScale() == nil || st.GetUid() != c.intents[k].Intent.GetUid() {
		return r.GetReplicas()
	}
	return min(max(st.GetScale().GetReplicas(), r.GetMinReplicas()), r.GetMaxReplicas())
}

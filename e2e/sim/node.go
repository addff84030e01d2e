package sim

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// sync has every reachable node do what it is told and report.
func (c *Cluster) sync() {
	ready := c.serving()
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[id]
		n.live(c)
		if n.cut {
			continue
		}
		n.heard, n.applied = c.Now, c.gen
		n.known = map[string]*clusterv1.Allocation{}
		for a, rec := range c.allocs {
			if rec.GetNode() == id {
				n.known[a] = rec
			}
		}
		n.obey(c)
		n.reported = map[string]*nodev1.AllocationStatus{}
		for a, p := range n.procs {
			n.reported[a] = p.status
			n.measure(c, a, p, ready)
		}
	}
}

// obey starts and stops processes as the node was last told.
func (n *node) obey(c *Cluster) {
	for _, a := range slices.Sorted(maps.Keys(n.known)) {
		rec, p := n.known[a], n.procs[a]
		switch {
		case p == nil && !rec.GetStop() && rec.GetFinal() == nil:
			p = &process{key: keyOf(rec), spec: rec.GetSpec(), volumes: rec.GetVolumes(), began: c.Now, status: &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_STARTING}}
			if k := rec.GetSpec().GetKind(); k == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || k == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
				p.until = c.Now.Add(time.Duration(1+c.rand.IntN(20)) * time.Second)
			}
			n.procs[a] = p
		case p != nil && rec.GetStop() && !p.stopping:
			p.stopping, p.until = true, c.Now.Add(time.Duration(c.rand.IntN(3000))*time.Millisecond)
		}
	}
	for a, p := range n.procs {
		if n.known[a] == nil {
			p.stopping, p.until = true, c.Now // nobody wants it any more
		}
	}
	n.end(c)
}

// live lets processes get on: ready after two seconds, done when their time is up.
func (n *node) live(c *Cluster) {
	for _, a := range slices.Sorted(maps.Keys(n.procs)) {
		p := n.procs[a]
		finite := p.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || p.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
		rev := n.known[a].GetRevision()
		switch {
		case p.stopping || p.status.GetState() == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED || p.status.GetState() == portolanv1.ReplicaState_REPLICA_STATE_FAILED:
		case finite && !c.Now.Before(p.until):
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED}
			if c.bad[rev] || c.rand.IntN(5) == 0 {
				p.status.State = portolanv1.ReplicaState_REPLICA_STATE_FAILED
			}
		case finite:
		case c.bad[rev] && c.Now.Sub(p.began) > 2*time.Second:
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_BACKOFF, Containers: []*portolanv1.ContainerState{{
				Restarts: int32(c.Now.Sub(p.began) / (10 * time.Second)), LastExitReason: "Error", LastExitTime: timestamppb.New(c.Now),
			}}}
		case !p.status.GetReady() && c.Now.Sub(p.began) > 2*time.Second:
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true, Timeline: &portolanv1.Timeline{Ready: timestamppb.New(c.Now)}}
		}
	}
	n.end(c)
}

func (n *node) end(c *Cluster) {
	for a, p := range n.procs {
		if p.stopping && !c.Now.Before(p.until) {
			delete(n.procs, a)
		}
	}
}

// measure has a replica of a workload that scales say what it uses: its share of
// the load that all of them have.
func (n *node) measure(c *Cluster, id string, p *process, ready map[reconcile.Key]int) {
	k := keyOf(n.known[id])
	load, scales := c.load[k]
	if !scales || p.spec.GetAutoscale() == nil || n.known[id] == nil {
		return
	}
	n.reported[id] = &nodev1.AllocationStatus{
		Allocation: id, State: p.status.GetState(), Ready: p.status.GetReady(), Timeline: p.status.GetTimeline(), Containers: p.status.GetContainers(),
		Usage: &nodev1.Usage{Time: timestamppb.New(c.Now), CpuMilli: load / int64(max(1, ready[k]))},
	}
}

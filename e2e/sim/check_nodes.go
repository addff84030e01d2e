package sim

import (
	"maps"
	"slices"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// checkWorld: no two processes in the world have one volume or are of one exclusive
// workload, cut-off nodes included, and who has a volume is where it is.
func (c *Cluster) checkWorld(broken report) {
	at, only := map[string]string{}, map[reconcile.Key]string{}
	for _, id := range c.nodeIDs() {
		for _, a := range slices.Sorted(maps.Keys(c.nodes[id].procs)) {
			p := c.nodes[id].procs[a]
			here := a + " on " + id
			for _, v := range p.volumes {
				if other, taken := at[v]; taken {
					broken(2, "%s has a process %s, and %s", v, here, other)
				}
				at[v] = here
			}
			if c.original(p.spec).GetPlacement().GetExclusive() {
				if other, taken := only[p.key]; taken {
					broken(2, "%s may have one process in the world, and has %s and %s", p.key, other, here)
				}
				only[p.key] = here
			}
		}
	}
	for _, id := range c.pass.bound {
		a := c.allocs[id]
		for _, v := range a.GetVolumes() {
			if vol := c.volumes[v]; vol != nil && vol.GetNode() != a.GetNode() {
				broken(2, "%s is on %s, its volume %s on %s", id, a.GetNode(), v, vol.GetNode())
			}
		}
	}
}

// original is the spec that a planted fault changed, or the spec itself.
func (c *Cluster) original(s *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	for was, told := range c.faults.specs {
		if told == s {
			return was
		}
	}
	return s
}

// checkBound: what was bound now is where labels, taints, modes and other workloads
// let it be, and has the devices that it asks for.
func (c *Cluster) checkBound(broken report) {
	for _, id := range c.pass.bound {
		a := c.allocs[id]
		n := c.nodes[a.GetNode()]
		switch {
		case n.gone():
			broken(3, "%s was bound to the lost node %s", id, a.GetNode())
			continue
		case n.record.GetMode() != 0:
			broken(3, "%s was bound to %s, which is %v", id, a.GetNode(), n.record.GetMode())
		case !schedule.Admit(&clusterv1.Node{Node: a.GetNode(), Facts: n.record.GetFacts()}, a.GetSpec()).Begin:
			broken(3, "%s was bound to %s, whose labels and taints refuse it", id, a.GetNode())
		}
		for _, o := range c.allocs {
			if o != a && o.GetTenant() == a.GetTenant() && !o.GetStop() && o.GetFinal() == nil && !c.nodes[o.GetNode()].gone() && o.GetReplacedBy() == "" && (c.apart(a, o) || c.apart(o, a)) {
				broken(3, "%s was bound to %s, and keeps apart from %s on %s", id, a.GetNode(), o.GetAllocation(), o.GetNode())
			}
		}
		var asked, has int32
		for _, d := range a.GetSpec().GetScheduling().GetDevices() {
			asked += d.GetCount()*1000 + d.GetShareMilli()
		}
		for _, d := range a.GetDevices() {
			has += d.GetMilli()
		}
		if asked != has {
			broken(4, "%s was bound to %s with %d thousandths of devices, and asks for %d", id, a.GetNode(), has, asked)
		}
	}
}

// apart says that a may not be in one domain with o, and is.
func (c *Cluster) apart(a, o *clusterv1.Allocation) bool {
	for _, f := range a.GetSpec().GetScheduling().GetAffinity() {
		if !f.GetAnti() || f.GetPrefer() || f.GetWorkload() != o.GetWorkload() {
			continue
		}
		domain := func(x *clusterv1.Allocation) string {
			if f.GetTopologyKey() == schedule.NodeKey {
				return x.GetNode()
			}
			return c.nodes[x.GetNode()].record.GetFacts().GetLabels()[f.GetTopologyKey()]
		}
		if domain(a) == domain(o) {
			return true
		}
	}
	return false
}

// checkNodes: no node promises more than it may when it takes one more. A node that
// shrinks may have promised more before.
func (c *Cluster) checkNodes(broken report) {
	seen := map[string]bool{}
	for _, bound := range c.pass.bound {
		id := c.allocs[bound].GetNode()
		if seen[id] || c.nodes[id].gone() {
			continue
		}
		seen[id] = true
		may := c.capacity(c.nodes[id])
		used, shares := c.used(id)
		if used.CPUMilli > may.CPUMilli || used.MemoryBytes > may.MemoryBytes {
			broken(4, "node %s takes %s and has promised %v of %v", id, bound, used, may)
		}
		for _, d := range slices.Sorted(maps.Keys(shares)) {
			if shares[d] > 1000 {
				broken(4, "device %d of node %s is promised %d thousandths", d, id, shares[d])
			}
		}
	}
}

// checkOrphans: a process of a node that has just been told everything belongs to
// a record, or is ending.
func (c *Cluster) checkOrphans(broken report) {
	for _, id := range c.nodeIDs() {
		n := c.nodes[id]
		for a, p := range n.procs {
			if !n.cut && !p.stopping && n.known[a] == nil {
				broken(5, "%s runs on %s and belongs to nothing", a, id)
			}
			if r := c.allocs[a]; r == nil && !p.stopping {
				broken(5, "%s runs on %s, and its record is gone", a, id)
			} else if r != nil && r.GetNode() != id && !p.stopping {
				broken(5, "%s runs on %s, and its record is of %s", a, id, r.GetNode())
			}
		}
	}
}

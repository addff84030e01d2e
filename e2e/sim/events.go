package sim

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Step makes one random event happen, lets the cluster do what follows, and says
// what invariant is broken.
func (c *Cluster) Step() error {
	c.event()
	return c.settle()
}

func (c *Cluster) event() {
	switch r := c.rand.IntN(100); {
	case r < 55:
		c.tick(time.Duration(100+c.rand.IntN(4000)) * time.Millisecond)
	case r < 57:
		c.tick(time.Duration(1+c.rand.IntN(20)) * time.Minute)
	case r < 62:
		c.declare(c.key())
	case r < 69:
		c.redeclare(c.any())
	case r < 71:
		c.remove(c.any())
	case r < 72:
		c.demand()
	case r < 78:
		c.cutOrHeal()
	case r < 86:
		c.mode()
	case r < 90:
		c.taint()
	case r < 95:
		c.crash()
	case r < 96:
		c.resize()
	case r < 98:
		c.nodes1()
	default:
		c.heal()
	}
}

// key is one of a few workloads, of two tenants.
func (c *Cluster) key() reconcile.Key {
	return reconcile.Key{Tenant: []string{"red", "blue"}[c.rand.IntN(2)], Workload: fmt.Sprintf("w%d", c.rand.IntN(maxWorkloads))}
}

// any is one that is there.
func (c *Cluster) any() reconcile.Key {
	keys := slices.SortedFunc(maps.Keys(c.intents), compareKeys)
	if len(keys) == 0 {
		return c.key()
	}
	return keys[c.rand.IntN(len(keys))]
}

// nodeIDs in order.
func (c *Cluster) nodeIDs() []string { return slices.Sorted(maps.Keys(c.nodes)) }

func (c *Cluster) anyNode() *node {
	ids := c.nodeIDs()
	return c.nodes[ids[c.rand.IntN(len(ids))]]
}

func (c *Cluster) cutOrHeal() {
	if c.chance(12) { // everything at once
		for _, id := range c.nodeIDs() {
			c.nodes[id].cut = true
		}
		c.say("all nodes are cut off")
		return
	}
	n := c.anyNode()
	n.cut = !n.cut
	c.say("node %s cut off: %v", n.record.GetNode(), n.cut)
}

func (c *Cluster) mode() {
	n := c.anyNode()
	n.record = proto.CloneOf(n.record)
	n.record.Mode = portolanv1.NodeMode(c.rand.IntN(3))
	n.record.DrainDeadline = nil
	if n.record.GetMode() == portolanv1.NodeMode_NODE_MODE_DRAINING && c.chance(3) {
		n.record.DrainDeadline = timestamppb.New(c.Now.Add(time.Minute))
	}
	c.say("node %s is %v", n.record.GetNode(), n.record.GetMode())
}

// taint gives a node a taint, or takes all away.
func (c *Cluster) taint() {
	n := c.anyNode()
	n.record = proto.CloneOf(n.record)
	n.record.Facts = proto.CloneOf(n.record.GetFacts())
	if len(n.record.GetFacts().GetTaints()) > 0 {
		n.record.Facts.Taints, n.record.TaintTimes = nil, nil
		c.say("node %s has no taint", n.record.GetNode())
		return
	}
	t := &portolanv1.Taint{Key: "busy", Value: "yes", Effect: portolanv1.TaintEffect(1 + c.rand.IntN(3))}
	n.record.Facts.Taints = []*portolanv1.Taint{t}
	n.record.TaintTimes = map[string]*timestamppb.Timestamp{"busy=yes": timestamppb.New(c.Now)}
	c.say("node %s has taint %v", n.record.GetNode(), t)
}

// resize gives a node more or less CPU: part of it was lost, or came back.
func (c *Cluster) resize() {
	n := c.anyNode()
	n.record = proto.CloneOf(n.record)
	n.record.Facts = proto.CloneOf(n.record.GetFacts())
	n.record.Facts.CpuMilli = 2000 + 2000*c.rand.Int64N(5)
	c.say("node %s has %d millicores", n.record.GetNode(), n.record.GetFacts().GetCpuMilli())
}

// demand changes what is asked of a workload that scales.
func (c *Cluster) demand() {
	keys := slices.SortedFunc(maps.Keys(c.load), compareKeys)
	if len(keys) == 0 {
		return
	}
	k := keys[c.rand.IntN(len(keys))]
	c.load[k] = 100 * c.rand.Int64N(60)
	c.say("%s needs %d millicores", k, c.load[k])
}

// crash ends a process; its node starts it again, as an agent does.
func (c *Cluster) crash() {
	n := c.anyNode()
	for _, id := range slices.Sorted(maps.Keys(n.procs)) {
		if p := n.procs[id]; !p.stopping && p.status.GetReady() && c.chance(2) {
			p.began = c.Now
			p.status = proto.CloneOf(p.status)
			p.status.Ready, p.status.State = false, portolanv1.ReplicaState_REPLICA_STATE_STARTING
			c.say("%s on %s crashed", id, n.record.GetNode())
			return
		}
	}
}

// nodes1 adds a node, or takes one that is lost and empty out for good.
func (c *Cluster) nodes1() {
	if len(c.nodes) < maxNodes && c.chance(2) {
		c.addNode()
		return
	}
	for _, id := range c.nodeIDs() {
		if n := c.nodes[id]; n.gone() && len(n.procs) == 0 && len(c.nodes) > 2 {
			delete(c.nodes, id)
			c.table.DeleteNode(id)
			c.say("node %s is taken out", id)
			return
		}
	}
}

// heal mends everything, so that long runs do not end in ruins.
func (c *Cluster) heal() {
	for _, id := range c.nodeIDs() {
		n := c.nodes[id]
		n.cut = false
		n.record = proto.CloneOf(n.record)
		n.record.Facts = proto.CloneOf(n.record.GetFacts())
		n.record.Mode, n.record.DrainDeadline, n.record.Facts.Taints, n.record.TaintTimes = 0, nil, nil, nil
	}
	c.say("all nodes are well")
	c.tick(time.Second)
}

package sim

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// settle does what the cluster's loop does after an event, until nothing is left
// to do or, after a bound, reports that it never settles.
func (c *Cluster) settle() error {
	c.leases()
	c.scale()
	for range 20 {
		c.proposals()
		c.pass = trace{before: c.serving(), created: map[reconcile.Key]bool{}}
		in := c.input()
		plan := reconcile.Reconcile(in)
		c.note(plan)
		c.gen++
		did := c.apply(plan)
		if err := c.check(plan); err != nil {
			return err
		}
		if !did {
			return nil
		}
	}
	return fmt.Errorf("the loop does not settle")
}

// leases marks who was silent for too long, and takes back who speaks again.
func (c *Cluster) leases() {
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[id]
		lost := c.Now.Sub(n.heard) > silence
		if lost == (n.record.GetLostTime() != nil) {
			continue
		}
		n.record = proto.CloneOf(n.record)
		if n.record.LostTime = nil; lost {
			n.record.LostTime = timestamppb.New(c.Now)
			c.say("node %s is lost", id)
		} else {
			c.say("node %s is back", id)
		}
	}
}

// proposals are looked for now and then, as the loop does.
func (c *Cluster) proposals() {
	if c.Now.Sub(c.swept) < sweep {
		c.moves = nil
		return
	}
	c.swept = c.Now
	c.fill()
	c.moves = nil
	for _, m := range schedule.Misfits(c.table) {
		c.moves = append(c.moves, reconcile.Move{Allocation: m.Replica, Code: m.Code.String(), Reason: m.Message})
		c.Reached["no longer fits"]++
	}
	for _, m := range schedule.Moves(c.table, 3, 10) {
		c.moves = append(c.moves, reconcile.Move{Allocation: m.Replica, Node: m.To, Code: reconcile.Rebalance, Reason: m.Message})
	}
}

// fill brings the table up to date.
func (c *Cluster) fill() {
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[id]
		put := schedule.Node{ID: id, Facts: n.record.GetFacts(), Addresses: addresses, Mode: n.record.GetMode()}
		if n.record.GetLostTime() != nil {
			put.Down = schedule.NodeLost
		}
		c.faults.node(&put)
		c.table.PutNode(put)
	}
	for _, id := range slices.Sorted(maps.Keys(c.allocs)) {
		c.put(c.allocs[id])
	}
}

func (c *Cluster) put(a *clusterv1.Allocation) {
	r := schedule.Replica{
		ID: a.GetAllocation(), Node: a.GetNode(), Class: c.class(reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}, a.GetRevision(), a.GetSpec()),
		Bound: a.GetBound().GetSeconds(), Leaving: a.GetStop() || c.nodes[a.GetNode()].gone(), Ended: a.GetFinal() != nil || a.GetStop() && c.faults.roomFreedEarly,
	}
	for _, d := range a.GetDevices() {
		r.Devices = append(r.Devices, schedule.Share{Kind: d.GetKind(), Index: d.GetIndex(), Milli: d.GetMilli()})
	}
	c.table.PutReplica(r)
}

func (n *node) gone() bool { return n == nil || n.record.GetLostTime() != nil }

// note counts what the run came to.
func (c *Cluster) note(p reconcile.Plan) {
	if p.Held != "" {
		c.Reached["all dark"]++
	}
	for _, n := range []map[reconcile.Key]reconcile.Note{p.Halted, p.Waiting, p.Draining} {
		for _, v := range n {
			c.Reached[v.Code]++
		}
	}
	for _, s := range p.Steps {
		c.Reached[s.Code]++
	}
}

// tick lets time pass.
func (c *Cluster) tick(d time.Duration) {
	c.Now = c.Now.Add(d)
	c.sync()
	for id, v := range c.volumes {
		// A node that hears of a volume's end deletes it and says so.
		if n := c.nodes[v.GetNode()]; v.GetDelete() && n != nil && !n.cut {
			c.dropVolume(id)
		}
	}
}

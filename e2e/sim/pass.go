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
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// settle does what the cluster's loop does after an event, until nothing is left
// to do or, after a bound, reports that it never settles.
func (c *Cluster) settle() error {
	c.leases()
	for range 20 {
		c.proposals()
		c.pass = trace{before: c.serving(), disrupts: map[reconcile.Key]int{}}
		in := c.input()
		plan := reconcile.Reconcile(in)
		c.pass.held = plan.Held != ""
		c.note(plan)
		c.gen++
		did := c.apply(plan)
		if err := c.check(in, plan); err != nil {
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
	for _, m := range schedule.Misfits(c.table, 10) {
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
		c.table.PutNode(put)
	}
	for _, id := range slices.Sorted(maps.Keys(c.allocs)) {
		c.put(c.allocs[id])
	}
}

func (c *Cluster) put(a *clusterv1.Allocation) {
	r := schedule.Replica{
		ID: a.GetAllocation(), Node: a.GetNode(), Class: c.class(reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}, a.GetRevision(), a.GetSpec()),
		Bound: a.GetBound().GetSeconds(), Leaving: a.GetStop() || c.nodes[a.GetNode()].gone(), Ended: a.GetFinal() != nil,
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

// apply does a plan: everything but creating first, then what finds a node.
func (c *Cluster) apply(p reconcile.Plan) bool {
	var create []reconcile.Step
	for _, s := range p.Steps {
		if s.Kind == reconcile.Create {
			create = append(create, s)
			continue
		}
		c.say("%s %s%s %s: %s", s.Kind, s.Allocation, s.Volume.GetVolume(), s.Code, s.Reason)
		c.do(s)
	}
	c.fill()
	clear(c.pending)
	did := len(p.Steps) > len(create)
	if len(create) == 0 {
		c.withdraw(nil)
	} else if c.create(create, p.Allowances) {
		did = true
	}
	return did
}

func (c *Cluster) edit(id string) *clusterv1.Allocation {
	a := proto.CloneOf(c.allocs[id])
	a.Spec = c.allocs[id].GetSpec() // shared: classes go by it
	c.allocs[id], c.modified[id] = a, c.gen
	return a
}

func (c *Cluster) do(s reconcile.Step) {
	switch s.Kind {
	case reconcile.Stop:
		a := c.edit(s.Allocation)
		a.Stop, a.StopReason, a.StopTime = true, s.Code, timestamppb.New(c.Now)
		a.Disrupted = a.GetDisrupted() || s.Disrupt
		c.pass.stops = append(c.pass.stops, s)
		if s.Disrupt {
			c.pass.disrupts[s.Key]++
		}
	case reconcile.Remove:
		delete(c.allocs, s.Allocation)
		delete(c.modified, s.Allocation)
		c.table.DeleteReplica(s.Allocation)
	case reconcile.Finish:
		a := c.edit(s.Allocation)
		a.Final, a.EndTime = s.Final, timestamppb.New(c.Now)
	case reconcile.Renew:
		c.edit(s.Allocation).Epoch = s.Workload.Intent.GetEpoch()
	case reconcile.Update:
		a := c.edit(s.Allocation)
		a.Revision, a.Spec = s.Revision.GetRevision(), s.Revision.GetSpec()
	case reconcile.PutState:
		c.states[s.Key] = s.State
	case reconcile.DeleteState:
		delete(c.states, s.Key)
	case reconcile.PutVolume:
		c.volumes[s.Volume.GetVolume()] = s.Volume
	case reconcile.DeleteVolume:
		c.dropVolume(s.Volume.GetVolume())
	case reconcile.Create:
	}
}

func (c *Cluster) dropVolume(id string) {
	delete(c.volumes, id)
	c.table.DeleteVolume(id)
}

// create finds nodes, in one batch, for what is to be created.
func (c *Cluster) create(steps []reconcile.Step, allow map[reconcile.Key]int) bool {
	type group struct{ steps []reconcile.Step }
	var order []string
	groups := map[string]*group{}
	for _, s := range steps {
		key := fmt.Sprintf("%s/%s/%s/%s", s.Key, s.Revision.GetRevision(), s.Node, notOn(c, s))
		if groups[key] == nil {
			groups[key] = &group{}
			order = append(order, key)
		}
		groups[key].steps = append(groups[key].steps, s)
	}
	slices.SortStableFunc(order, func(a, b string) int {
		return int(groups[b].steps[0].Revision.GetSpec().GetPriority()) - int(groups[a].steps[0].Revision.GetSpec().GetPriority())
	})
	c.withdraw(order)
	b := schedule.Batch{Allowance: map[string]int{}}
	for k, n := range allow {
		b.Allowance[k.String()] = n
	}
	for _, key := range order {
		s := groups[key].steps[0]
		g := schedule.Group{Key: key, Class: c.class(s.Key, s.Revision.GetRevision(), s.Revision.GetSpec()), Count: len(groups[key].steps), Node: s.Node, NotOn: notOn(c, s)}
		for _, v := range c.volumes {
			if v.GetTenant() == s.Key.Tenant && v.GetWorkload() == s.Key.Workload && v.GetIndex() == s.Index && v.GetNode() == s.Node {
				g.VolumesThere = true
			}
		}
		b.Groups = append(b.Groups, g)
	}
	did := false
	for i, p := range schedule.Schedule(c.table, b).Placed {
		did = c.placed(groups[order[i]].steps, b.Groups[i], p) || did
	}
	return did
}

// withdraw gives up the room that is kept for groups that want nothing any more.
func (c *Cluster) withdraw(wanted []string) {
	for _, key := range slices.Sorted(maps.Keys(c.nominated)) {
		if !slices.Contains(wanted, key) {
			c.table.Withdraw(key, "")
			delete(c.nominated, key)
		}
	}
}

// notOn is the node that a replica which is meant to leave is on.
func notOn(c *Cluster, s reconcile.Step) string {
	if a := c.allocs[s.Allocation]; a != nil && s.Disrupt {
		return a.GetNode()
	}
	return ""
}

func (c *Cluster) placed(steps []reconcile.Step, g schedule.Group, p schedule.Placed) bool {
	for j, bind := range p.Bindings {
		if bind.Kept {
			c.table.Withdraw(g.Key, bind.Node)
		}
		c.bind(steps[j], bind)
	}
	for _, n := range p.Nominations {
		c.table.Nominate(g.Key, g.Class, n.Node)
		c.nominated[g.Key] = true
		c.displace(n, g)
	}
	if p.Refusal != nil && p.Missing > 0 {
		c.Reached["refused"]++
		k := steps[0].Key
		for _, r := range p.Refusal.Reasons {
			c.pending[k] = append(c.pending[k], &portolanv1.Reason{Code: r.Code.String(), Message: r.Message, Count: int32(r.Nodes)})
		}
		if len(p.Refusal.Reasons) == 0 {
			c.pending[k] = append(c.pending[k], &portolanv1.Reason{Code: "Refused"})
		}
	}
	return len(p.Bindings)+len(p.Nominations) > 0
}

// displace stops who makes room.
func (c *Cluster) displace(n schedule.Nomination, g schedule.Group) {
	c.Reached["displaced"]++
	for _, id := range n.Victims {
		v := c.allocs[id]
		k := reconcile.Key{Tenant: v.GetTenant(), Workload: v.GetWorkload()}
		c.say("displace %s on %s for %s", id, n.Node, g.Key)
		c.do(reconcile.Step{Kind: reconcile.Stop, Key: k, Allocation: id, Code: reconcile.Displaced, Disrupt: true})
		c.put(c.allocs[id])
	}
}

func (c *Cluster) bind(s reconcile.Step, b schedule.Binding) {
	id := s.Name
	if id == "" {
		c.named++
		id = fmt.Sprintf("%s-%d", s.Key.Workload, c.named)
	}
	if c.allocs[id] != nil {
		panic("two records of one name: " + id)
	}
	a := &clusterv1.Allocation{
		Allocation: id, Tenant: s.Key.Tenant, Workload: s.Key.Workload, Revision: s.Revision.GetRevision(), Epoch: s.Workload.Intent.GetEpoch(), Node: b.Node,
		Spec: s.Revision.GetSpec(), Bound: timestamppb.New(c.Now), Index: s.Index, Run: s.Run, Uid: s.Workload.Intent.GetUid(),
	}
	for _, d := range b.Devices {
		a.Devices = append(a.Devices, &nodev1.DeviceShare{Kind: d.Kind, Index: d.Index, Milli: d.Milli})
	}
	for _, v := range s.Revision.GetSpec().GetVolumes() {
		vid := fmt.Sprintf("%s.%s-%d.%s", s.Key.Tenant, s.Key.Workload, s.Index, v.GetName())
		a.Volumes = append(a.Volumes, vid)
		if c.volumes[vid] == nil {
			size, err := api.ParseBytes(v.GetSize())
			if err != nil {
				panic(err)
			}
			c.volumes[vid] = &clusterv1.Volume{Volume: vid, Tenant: s.Key.Tenant, Workload: s.Key.Workload, Uid: a.GetUid(), Index: s.Index, Name: v.GetName(), Node: b.Node, SizeBytes: size}
			c.table.PutVolume(vid, b.Node, size)
		}
	}
	if s.Allocation != "" {
		old := c.edit(s.Allocation)
		old.ReplacedBy = id
		old.Disrupted = old.GetDisrupted() || s.Disrupt
		if s.Code == reconcile.NodeLost {
			c.pass.evicted++
		}
	}
	c.say("bind %s to %s (%s: %s)", id, b.Node, s.Code, s.Reason)
	c.allocs[id], c.modified[id] = a, c.gen
	c.pass.bound = append(c.pass.bound, id)
	c.put(a)
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

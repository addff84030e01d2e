package sim

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

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
		c.stop(s)
	case reconcile.Remove:
		c.forget(s.Allocation)
	case reconcile.Finish:
		if c.faults.finishForgotten {
			return
		}
		a := c.edit(s.Allocation)
		a.Final, a.EndTime = s.Final, timestamppb.New(c.Now)
	case reconcile.Renew:
		c.edit(s.Allocation).Epoch = s.Workload.Intent.GetEpoch()
	case reconcile.Update:
		a := c.edit(s.Allocation)
		a.Revision, a.Spec = s.Revision.GetRevision(), s.Revision.GetSpec()
	case reconcile.PutState:
		c.states[s.Key] = c.faults.state(s.State)
	case reconcile.DeleteState:
		delete(c.states, s.Key)
	case reconcile.PutVolume:
		c.volumes[s.Volume.GetVolume()] = s.Volume
	case reconcile.DeleteVolume:
		c.dropVolume(s.Volume.GetVolume())
	case reconcile.Create:
	}
}

func (c *Cluster) stop(s reconcile.Step) {
	s.Allocation = c.faults.victim(c, s.Allocation)
	a := c.edit(s.Allocation)
	if n := c.nodes[a.GetNode()]; s.Disrupt && !n.gone() && n.reported[s.Allocation].GetReady() && !a.GetStop() {
		id := s.Key.String() + " " + a.GetUid()
		c.disrupted[id] = append(c.disrupted[id], c.Now)
	}
	a.Stop, a.StopReason, a.StopTime = true, s.Code, timestamppb.New(c.Now)
	a.Disrupted = a.GetDisrupted() || s.Disrupt
	c.pass.stops = append(c.pass.stops, s)
	if c.faults.removedAtOnce {
		c.forget(s.Allocation)
	}
}

// forget deletes the record of a replica.
func (c *Cluster) forget(id string) {
	delete(c.allocs, id)
	delete(c.modified, id)
	c.table.DeleteReplica(id)
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
	for k := range c.intents {
		if c.faults.budgetIgnored {
			b.Allowance[k.String()] = 100
		}
	}
	for _, key := range order {
		s := groups[key].steps[0]
		g := schedule.Group{Key: key, Class: c.class(s.Key, s.Revision.GetRevision(), s.Revision.GetSpec()), Count: len(groups[key].steps), Node: s.Node, NotOn: notOn(c, s)}
		if c.faults.volumeAnywhere && len(s.Revision.GetSpec().GetVolumes()) > 0 {
			g.Node = ""
		}
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
	for _, node := range p.Unkept {
		c.table.Withdraw(g.Key, node)
		c.Reached["room of no use"]++
	}
	for _, n := range p.Nominations {
		for _, key := range n.Withdrawn {
			c.table.Withdraw(key, n.Node)
			c.Reached["room given up"]++
		}
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
		k := keyOf(v)
		c.say("displace %s on %s for %s", id, n.Node, g.Key)
		c.do(reconcile.Step{Kind: reconcile.Stop, Key: k, Allocation: id, Code: reconcile.Displaced, Disrupt: true})
		c.disrupt(k, v.GetUid())
		c.put(c.allocs[id])
	}
}

// disrupt notes a displacement in the workload's state, as the loop does.
func (c *Cluster) disrupt(k reconcile.Key, uid string) {
	st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: uid}
	if was := c.states[k]; was.GetUid() == uid && was != nil {
		st = proto.CloneOf(was)
	}
	st.Disruptions = append(st.Disruptions, timestamppb.New(c.Now))
	c.states[k] = c.faults.state(st)
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
	c.faults.bound(a)
	if s.Allocation != "" {
		old := c.edit(s.Allocation)
		if !c.faults.replacedForgotten {
			old.ReplacedBy = id
		}
		old.Disrupted = old.GetDisrupted() || s.Disrupt
		if s.Code == reconcile.NodeLost {
			c.pass.evicted++
			c.evicted = append(c.evicted, eviction{s.Allocation, c.Now})
			if !c.faults.evictionUnseen {
				old.EvictTime = timestamppb.New(c.Now)
			}
		}
	}
	c.say("bind %s to %s (%s: %s)", id, b.Node, s.Code, s.Reason)
	c.allocs[id], c.modified[id] = a, c.gen
	c.pass.bound = append(c.pass.bound, id)
	c.pass.created[s.Key] = true
	c.put(a)
}

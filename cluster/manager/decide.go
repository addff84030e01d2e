package manager

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// maxDisruptions bounds the disruptions that a workload's state remembers.
const maxDisruptions = 1000

// decision is a plan made into records.
type decision struct {
	change state.Change
	events []*portolanv1.Event
	// committed is what is done in memory once the change is written.
	committed []func()
	// next is when a gang's deadline is over; zero for never.
	next time.Time
}

// decider makes a decision.
type decider struct {
	m   *Manager
	s   *state.Snapshot
	now time.Time
	// stamp is now as the records of this decision share it.
	stamp *timestamppb.Timestamp
	out   decision
	// put are changed and new allocations by ID, edited their IDs in the order of the
	// steps; states and volumes likewise.
	put     map[string]*clusterv1.Allocation
	edited  []string
	states  map[reconcile.Key]*clusterv1.WorkloadState
	volumes map[string]*clusterv1.Volume
	// taken are the addresses that this decision gives: nodes have ranges apart.
	taken map[netip.Addr]bool
}

// decide turns the steps of a plan into a change: it finds nodes, names and
// addresses for what is to be created. states are those that autoscaling changed.
func (m *Manager) decide(s *state.Snapshot, plan reconcile.Plan, states map[reconcile.Key]*clusterv1.WorkloadState, now time.Time) *decision {
	n := len(plan.Steps)
	d := &decider{
		m: m, s: s, now: now, stamp: timestamppb.New(now), put: make(map[string]*clusterv1.Allocation, n), edited: make([]string, 0, n),
		states: maps.Clone(states), volumes: map[string]*clusterv1.Volume{},
		taken: map[netip.Addr]bool{}, out: decision{change: state.Change{Base: s.Generation}, events: make([]*portolanv1.Event, 0, n)},
	}
	if d.states == nil {
		d.states = map[reconcile.Key]*clusterv1.WorkloadState{}
	}
	create := make([]*reconcile.Step, 0, n)
	for i := range plan.Steps {
		if st := &plan.Steps[i]; st.Kind == reconcile.Create {
			create = append(create, st)
		} else {
			d.apply(*st)
		}
	}
	d.create(create, plan.Allowances)
	d.removedVolumes()
	d.check()
	c := &d.out.change
	c.PutAllocations = make([]*clusterv1.Allocation, 0, len(d.put))
	for _, id := range d.edited {
		if a, ok := d.put[id]; ok {
			c.PutAllocations = append(c.PutAllocations, a)
			delete(d.put, id) // an ID stands twice when it was removed in between
		}
	}
	for _, id := range slices.Sorted(maps.Keys(d.volumes)) {
		c.PutVolumes = append(c.PutVolumes, d.volumes[id])
	}
	for _, k := range slices.SortedFunc(maps.Keys(d.states), compareKeys) {
		c.PutStates = append(c.PutStates, d.states[k])
	}
	return &d.out
}

func compareKeys(a, b reconcile.Key) int {
	return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Workload, b.Workload))
}

// edit gives the record of an allocation for changing.
func (d *decider) edit(id string) *clusterv1.Allocation {
	a, ok := d.put[id]
	if !ok {
		a = copyAllocation(d.s.Allocations[id])
		d.keep(id, a)
	}
	return a
}

// keep makes a record part of the change.
func (d *decider) keep(id string, a *clusterv1.Allocation) {
	d.put[id] = a
	d.edited = append(d.edited, id)
}

// copyAllocation copies a record, sharing the messages in it.
func copyAllocation(a *clusterv1.Allocation) *clusterv1.Allocation {
	return &clusterv1.Allocation{
		Allocation: a.GetAllocation(), Tenant: a.GetTenant(), Workload: a.GetWorkload(), Revision: a.GetRevision(), Epoch: a.GetEpoch(),
		Node: a.GetNode(), Address: a.GetAddress(), Spec: a.GetSpec(), AtCluster: a.GetAtCluster(), Bound: a.GetBound(), Stop: a.GetStop(),
		StopReason: a.GetStopReason(), StopTime: a.GetStopTime(), Index: a.GetIndex(), FederationRevision: a.GetFederationRevision(),
		Final: a.GetFinal(), Uid: a.GetUid(), ReplacedBy: a.GetReplacedBy(), EndTime: a.GetEndTime(),
		Run: a.GetRun(), Volumes: a.GetVolumes(), Devices: a.GetDevices(), Disrupted: a.GetDisrupted(), EvictTime: a.GetEvictTime(),
	}
}

// apply does a step that needs no node.
func (d *decider) apply(st reconcile.Step) {
	switch st.Kind {
	case reconcile.Stop:
		d.stop(st)
	case reconcile.Remove:
		delete(d.put, st.Allocation)
		d.out.change.DeleteAllocations = append(d.out.change.DeleteAllocations, st.Allocation)
		d.event(st.Key, st.Allocation, "Stopped", st.Reason)
	case reconcile.Finish:
		a := d.edit(st.Allocation)
		a.Final, a.EndTime = st.Final, d.stamp
		d.event(st.Key, st.Allocation, "Finished", stateName(st.Final.GetState()))
	case reconcile.Renew:
		a := d.edit(st.Allocation)
		a.Epoch, a.FederationRevision = st.Workload.Intent.GetEpoch(), st.Workload.Revision
	case reconcile.Update:
		a := d.edit(st.Allocation)
		a.Revision, a.Spec = st.Revision.GetRevision(), st.Revision.GetSpec()
		a.Epoch, a.FederationRevision = st.Workload.Intent.GetEpoch(), st.Workload.Revision
		d.event(st.Key, st.Allocation, "Updated", "in place, to revision "+a.Revision+": "+st.Reason)
	case reconcile.PutState:
		d.states[st.Key] = st.State
		d.runEvents(st)
	case reconcile.DeleteState:
		delete(d.states, st.Key)
		d.out.change.DeleteStates = append(d.out.change.DeleteStates, st.Key.String())
	case reconcile.PutVolume:
		d.volumes[st.Volume.GetVolume()] = st.Volume
		d.out.events = append(d.out.events, d.m.workloadEvent(st.Key, "VolumeLeaving", st.Volume.GetVolume()+": "+st.Reason, d.now))
	case reconcile.DeleteVolume:
		d.out.change.DeleteVolumes = append(d.out.change.DeleteVolumes, st.Volume.GetVolume())
		d.out.events = append(d.out.events, d.m.workloadEvent(st.Key, "VolumeLost", st.Volume.GetVolume()+": "+st.Reason, d.now))
	case reconcile.Create:
	}
}

// stopEvents are the types of the events of stops that are nobody's wish for the
// workload; the others are "Stopping".
var stopEvents = map[string]string{
	reconcile.NodeDraining: "Drained", reconcile.DrainDeadline: "Drained",
	reconcile.NodeRefuses: "Evicted", reconcile.StayOver: "Evicted",
	reconcile.Rebalance: "Moved", reconcile.Displaced: "Preempted",
	reconcile.ScaleDown: "Stopping", reconcile.RevisionReplaced: "Stopping", reconcile.WorkloadRemoved: "Stopping", reconcile.Surplus: "Stopping",
}

func (d *decider) stop(st reconcile.Step) {
	a := d.edit(st.Allocation)
	a.Stop, a.StopReason, a.StopTime = true, st.Code+": "+st.Reason, d.stamp
	a.Disrupted = a.GetDisrupted() || st.Disrupt
	typ, known := stopEvents[st.Code]
	switch {
	case known:
	case st.Disrupt:
		typ = "Moved" // it no longer fits; the code is the scheduler's
	default:
		typ = "Stopping"
	}
	d.event(st.Key, st.Allocation, typ, st.Code+": "+st.Reason)
}

// runEvents tells of what a cron workload did with its times.
func (d *decider) runEvents(st reconcile.Step) {
	switch st.Code {
	case reconcile.RunBegan, reconcile.RunMissed, reconcile.RunSkipped, reconcile.RunReplaced:
		d.out.events = append(d.out.events, d.m.workloadEvent(st.Key, st.Code, st.Reason, d.now))
	}
}

// disrupted notes in a workload's state that replicas were disrupted now.
func (d *decider) disrupted(k reconcile.Key, uid string, n int) {
	was := d.states[k]
	if was == nil {
		was = d.s.States[k.String()]
	}
	st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: uid}
	if was.GetUid() == uid && was != nil {
		st = proto.CloneOf(was)
	}
	for range n {
		st.Disruptions = append(st.Disruptions, d.stamp)
	}
	st.Disruptions = st.Disruptions[max(0, len(st.Disruptions)-maxDisruptions):]
	d.states[k] = st
}

// removedVolumes deletes the records of volumes that their nodes have deleted.
func (d *decider) removedVolumes() {
	var gone []*clusterv1.Volume
	for id, v := range d.s.Volumes {
		if st := d.s.NodeStatus[v.GetNode()]; v.GetDelete() && st != nil && st.RemovedVolumes[id] {
			gone = append(gone, v)
		}
	}
	slices.SortFunc(gone, func(a, b *clusterv1.Volume) int { return cmp.Compare(a.GetVolume(), b.GetVolume()) })
	for _, v := range gone {
		d.out.change.DeleteVolumes = append(d.out.change.DeleteVolumes, v.GetVolume())
		d.out.events = append(d.out.events, d.m.workloadEvent(reconcile.Key{Tenant: v.GetTenant(), Workload: v.GetWorkload()}, "VolumeDeleted", v.GetVolume(), d.now))
	}
}

func stateName(s portolanv1.ReplicaState) string {
	switch s {
	case portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED:
		return "succeeded"
	case portolanv1.ReplicaState_REPLICA_STATE_FAILED:
		return "failed"
	default:
		return s.String()
	}
}

// isGateway says that a replica lives in the node's own network.
func isGateway(spec *portolanv1.WorkloadSpec) bool {
	return spec.GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED
}

// event tells of a replica. Tenants read it: its node stands in a field of its own,
// which they are not shown.
func (d *decider) event(k reconcile.Key, allocation, typ, message string) {
	a := d.put[allocation]
	if a == nil {
		a = d.s.Allocations[allocation]
	}
	d.out.events = append(d.out.events, &portolanv1.Event{
		Time: d.stamp, Object: api.ReplicaName(k.Tenant, k.Workload, allocation), Type: typ, Message: message,
		Cluster: d.m.cfg.Cluster, Count: 1, Node: a.GetNode(),
	})
}

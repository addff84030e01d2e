package manager

import (
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/schedule/old"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// specKey stands for a spec; specs are never changed after they were stored.
type specKey = *portolanv1.WorkloadSpec

// decision is a plan made into records.
type decision struct {
	change  state.Change
	pending map[string][]state.PendingReason
	events  []*portolanv1.Event
}

func (d *decision) any() bool {
	return len(d.change.PutAllocations)+len(d.change.DeleteAllocations) > 0
}

// decider makes a decision.
type decider struct {
	m   *Manager
	s   *state.Snapshot
	now time.Time
	out decision
	// put are changed and new allocations by ID.
	put map[string]*clusterv1.Allocation
	// taken are the addresses in use on a node.
	taken map[string]map[netip.Addr]bool
	// requests of every spec that was looked at.
	requests map[specKey]api.Resources
}

// decide turns the steps of a plan into a change: it finds nodes, names and
// addresses for what is to be created.
func (m *Manager) decide(s *state.Snapshot, plan reconcile.Plan, now time.Time) *decision {
	d := &decider{
		m: m, s: s, now: now, put: map[string]*clusterv1.Allocation{}, taken: map[string]map[netip.Addr]bool{}, requests: map[specKey]api.Resources{},
		out: decision{change: state.Change{Base: s.Generation}, pending: map[string][]state.PendingReason{}},
	}
	var create []reconcile.Step
	for _, st := range plan.Steps {
		if st.Kind == reconcile.Create {
			create = append(create, st)
		} else {
			d.apply(st)
		}
	}
	if len(create) > 0 {
		d.create(create)
		m.requests = d.requests
	}
	d.check()
	for _, id := range slices.Sorted(maps.Keys(d.put)) {
		d.out.change.PutAllocations = append(d.out.change.PutAllocations, d.put[id])
	}
	return &d.out
}

// edit gives the record of an allocation for changing.
func (d *decider) edit(id string) *clusterv1.Allocation {
	a, ok := d.put[id]
	if !ok {
		a = copyAllocation(d.s.Allocations[id])
		d.put[id] = a
	}
	return a
}

// copyAllocation copies a record, sharing the messages in it.
func copyAllocation(a *clusterv1.Allocation) *clusterv1.Allocation {
	return &clusterv1.Allocation{
		Allocation: a.GetAllocation(), Tenant: a.GetTenant(), Workload: a.GetWorkload(), Revision: a.GetRevision(), Epoch: a.GetEpoch(),
		Node: a.GetNode(), Address: a.GetAddress(), Spec: a.GetSpec(), AtCluster: a.GetAtCluster(), Bound: a.GetBound(), Stop: a.GetStop(),
		StopReason: a.GetStopReason(), StopTime: a.GetStopTime(), Index: a.GetIndex(), FederationRevision: a.GetFederationRevision(),
		Final: a.GetFinal(), Uid: a.GetUid(), ReplacedBy: a.GetReplacedBy(), EndTime: a.GetEndTime(),
	}
}

// apply does a step that needs no node.
func (d *decider) apply(st reconcile.Step) {
	switch st.Kind {
	case reconcile.Stop:
		a := d.edit(st.Allocation)
		a.Stop, a.StopReason, a.StopTime = true, st.Code+": "+st.Reason, timestamppb.New(d.now)
		d.event(st.Key, st.Allocation, "Stopping", st.Code+": "+st.Reason)
	case reconcile.Remove:
		delete(d.put, st.Allocation)
		d.out.change.DeleteAllocations = append(d.out.change.DeleteAllocations, st.Allocation)
		d.event(st.Key, st.Allocation, "Stopped", st.Reason)
	case reconcile.Finish:
		a := d.edit(st.Allocation)
		a.Final, a.EndTime = st.Final, timestamppb.New(d.now)
		d.event(st.Key, st.Allocation, "Finished", stateName(st.Final.GetState()))
	case reconcile.Renew:
		a := d.edit(st.Allocation)
		a.Epoch, a.FederationRevision = st.Workload.Intent.GetEpoch(), st.Workload.Revision
	case reconcile.Create:
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

// batch is a group of identical replicas to create.
type batch struct {
	steps []reconcile.Step
	group old.Group
	bad   error
}

// create finds nodes for new replicas.
func (d *decider) create(steps []reconcile.Step) {
	batches := d.batches(steps)
	in := old.Input{Nodes: d.nodes(), Seed: d.m.cfg.Seed}
	var served []*batch
	for _, b := range batches {
		if b.bad != nil {
			d.refuse(b, []old.Refusal{{Code: "InvalidResources", Message: b.bad.Error()}})
			continue
		}
		in.Groups = append(in.Groups, b.group)
		served = append(served, b)
	}
	for i, placed := range old.Schedule(in) {
		b := served[i]
		for j, n := range placed.Nodes {
			d.bind(b.steps[j], in.Nodes[n].ID)
		}
		if placed.Missing > 0 {
			d.refuse(b, placed.Refusals)
		}
	}
}

// batches puts the steps for the same revision, and the same node if it must be
// one, together.
func (d *decider) batches(steps []reconcile.Step) []*batch {
	type key struct {
		workload       reconcile.Key
		revision, node string
	}
	byKey := map[key]*batch{}
	var out []*batch
	for _, st := range steps {
		k := key{st.Key, st.Revision.GetRevision(), st.Node}
		b := byKey[k]
		if b == nil {
			b = &batch{group: d.group(st)}
			b.group.Request, b.bad = d.request(st.Revision.GetSpec())
			byKey[k] = b
			out = append(out, b)
		}
		b.steps = append(b.steps, st)
		b.group.Count++
	}
	for id, a := range d.s.Allocations {
		b := byKey[key{reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}, a.GetRevision(), ""}]
		if b == nil || a.GetFinal() != nil || d.s.Nodes[a.GetNode()].GetLostTime() != nil {
			continue
		}
		if now, ok := d.put[id]; (ok && now.GetStop()) || a.GetStop() {
			continue
		}
		b.group.Running[a.GetNode()]++
	}
	return out
}

func (d *decider) group(st reconcile.Step) old.Group {
	spec := st.Revision.GetSpec()
	sc := spec.GetScheduling()
	return old.Group{
		Key: st.Key.String() + "/" + st.Revision.GetRevision(), Node: st.Node, Selector: sc.GetNodeSelector(), Tolerations: sc.GetTolerations(),
		SpreadKey: sc.GetSpreadKey(), MaxSkew: int(sc.GetMaxSkew()), Address: !isGateway(spec), Running: map[string]int{},
	}
}

// isGateway says that a replica lives in the node's own network.
func isGateway(spec *portolanv1.WorkloadSpec) bool {
	return spec.GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED
}

// request gives what a replica of a spec takes, remembered from pass to pass.
func (d *decider) request(spec *portolanv1.WorkloadSpec) (api.Resources, error) {
	r, ok := d.requests[spec]
	if ok {
		return r, nil
	}
	if r, ok = d.m.requests[spec]; !ok {
		var err error
		if r, err = schedule.Requests(spec, *d.m.cfg.Overhead); err != nil {
			return r, err
		}
	}
	d.requests[spec] = r
	return r, nil
}

// nodes gives the scheduler's view of the nodes, sorted. A replica counts until
// its record is gone; a finished one until its node has cleared it away.
func (d *decider) nodes() []old.Node {
	ids := slices.Sorted(maps.Keys(d.s.Nodes))
	out := make([]old.Node, len(ids))
	index := make(map[string]int, len(ids))
	for i, id := range ids {
		n := d.s.Nodes[id]
		index[id] = i
		d.taken[id] = map[netip.Addr]bool{}
		out[i] = old.Node{
			ID: id, Labels: n.GetFacts().GetLabels(), Taints: n.GetFacts().GetTaints(), NotReady: d.m.notReady(d.s, n, d.now),
			Capacity: api.Resources{CPUMilli: n.GetFacts().GetCpuMilli(), MemoryBytes: n.GetFacts().GetMemoryBytes()},
		}
	}
	for _, a := range d.s.Allocations {
		i, ok := index[a.GetNode()]
		if !ok {
			continue
		}
		if a.GetFinal() == nil {
			if r, err := d.request(a.GetSpec()); err == nil {
				out[i].Used = out[i].Used.Add(r)
			}
		}
		if d.holdsAddress(a) {
			if ip, err := netip.ParseAddr(a.GetAddress()); err == nil {
				d.taken[a.GetNode()][ip] = true
			}
		}
	}
	for i, id := range ids {
		out[i].Addresses = lastHost - firstHost + 1 - len(d.taken[id])
	}
	return out
}

// holdsAddress says whether a replica's address is in use.
func (d *decider) holdsAddress(a *clusterv1.Allocation) bool {
	if isGateway(a.GetSpec()) {
		return false
	}
	if a.GetFinal() == nil || !a.GetStop() {
		return true
	}
	st := d.s.NodeStatus[a.GetNode()]
	return st == nil || st.Allocations[a.GetAllocation()] != nil
}

// Hosts of a node's /24 that replicas get.
const (
	firstHost = 2
	lastHost  = 254
)

// address gives a free one of a node, beginning at a place that the name of the
// replica says, so that an address is not used again at once.
func (d *decider) address(node, allocation string) (string, error) {
	p, err := netip.ParsePrefix(d.s.Nodes[node].GetReplicaCidr())
	if err != nil {
		return "", fmt.Errorf("range of node %s: %w", node, err)
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(allocation))
	base := p.Masked().Addr().As4()
	const hosts = lastHost - firstHost + 1
	for i := range uint32(hosts) {
		base[3] = byte(firstHost + (h.Sum32()%hosts+i)%hosts)
		if ip := netip.AddrFrom4(base); !d.taken[node][ip] {
			d.taken[node][ip] = true
			return ip.String(), nil
		}
	}
	return "", fmt.Errorf("range %s of node %s is used up", p, node)
}

// bind makes the record of a new replica.
func (d *decider) bind(st reconcile.Step, node string) {
	w, spec := st.Workload, st.Revision.GetSpec()
	id := d.name(st.Key.Workload)
	address := d.s.Nodes[node].GetFacts().GetAddress()
	if !isGateway(spec) {
		var err error
		if address, err = d.address(node, id); err != nil {
			d.m.cfg.Log.Error("node has no address for a replica", "node", node, "error", err)
			return
		}
	}
	at := w.Committed
	if at.IsZero() {
		at = d.now
	}
	d.put[id] = &clusterv1.Allocation{
		Allocation: id, Tenant: st.Key.Tenant, Workload: st.Key.Workload, Revision: st.Revision.GetRevision(), Epoch: w.Intent.GetEpoch(),
		Node: node, Address: address, Spec: spec, AtCluster: timestamppb.New(at), Bound: timestamppb.New(d.now), Index: st.Index,
		FederationRevision: w.Revision, Uid: w.Intent.GetUid(),
	}
	d.event(st.Key, id, "Bound", fmt.Sprintf("to node %s: %s: %s", node, st.Code, st.Reason))
	if st.Allocation != "" {
		d.edit(st.Allocation).ReplacedBy = id
		d.event(st.Key, st.Allocation, "Replaced", "by "+id+" on node "+node+": "+st.Reason)
	}
}

const (
	nameLetters = "abcdefghijklmnopqrstuvwxyz0123456789"
	nameRandom  = 5
	// maxStem keeps the name of a replica within the 40 characters of an ID.
	maxStem = 40 - 1 - nameRandom
)

// name gives a new name to a replica.
func (d *decider) name(workload string) string {
	stem := workload[:min(len(workload), maxStem)]
	for {
		b := []byte(stem + "-")
		for range nameRandom {
			b = append(b, nameLetters[d.m.rand.IntN(len(nameLetters))])
		}
		_, used := d.s.Allocations[string(b)]
		if _, fresh := d.put[string(b)]; !used && !fresh {
			return string(b)
		}
	}
}

// refuse notes why replicas of a revision found no node.
func (d *decider) refuse(b *batch, refusals []old.Refusal) {
	k := b.steps[0].Key.String()
	rev := b.steps[0].Revision.GetRevision()
	for _, r := range refusals {
		i := slices.IndexFunc(d.out.pending[k], func(p state.PendingReason) bool { return p.Replica == rev && p.Code == r.Code })
		if i >= 0 {
			d.out.pending[k][i].Count += r.Nodes
			continue
		}
		d.out.pending[k] = append(d.out.pending[k], state.PendingReason{Replica: rev, Code: r.Code, Message: r.Message, Count: r.Nodes})
	}
}

func (d *decider) event(k reconcile.Key, allocation, typ, message string) {
	d.out.events = append(d.out.events, &portolanv1.Event{
		Time: timestamppb.New(d.now), Object: api.ReplicaName(k.Tenant, k.Workload, allocation), Type: typ, Message: message, Cluster: d.m.cfg.Cluster, Count: 1,
	})
}

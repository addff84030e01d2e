package manager

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Ports of gateways, on their nodes' addresses. The same as nodeagent/network's.
const (
	eastWestPort = 15443
	ingressPort  = 8080
)

// maxWaiting bounds the groups that wait for nodes.
const maxWaiting = 10_000

// minSweep is how many classes are kept before unused ones are looked for.
const minSweep = 1024

// mirror is the scheduler's table, and what is known of its content: it follows the
// snapshots by their differences, record by record, and is never built anew.
type mirror struct {
	table    *schedule.Table
	queue    *schedule.Queue
	overhead api.Resources
	// last is the snapshot that it follows; nil before the first.
	last     *state.Snapshot
	nodes    map[string]mirrored[*clusterv1.Node]
	replicas map[string]mirrored[*clusterv1.Allocation]
	volumes  map[string]*clusterv1.Volume
	spec     *linkv1.Intent // of the cluster, with its pools
	classes  map[schedule.Owner]*compiled
	swept    int // classes that were left by the last sweep
	// taken are the addresses in use, by node.
	taken map[string]map[netip.Addr]string
	// changed: nodes or pools changed since it was cleared.
	changed bool
}

// mirrored is a record as it was put, and what else the table was told of it.
type mirrored[M any] struct {
	record M
	down   schedule.Code // of a node
	gone   bool          // of a replica that has ended: its node has cleared it away
	addr   netip.Addr
}

// compiled is a spec's class, or what is wrong with the spec.
type compiled struct {
	spec  *portolanv1.WorkloadSpec
	class *schedule.Class
	err   error
}

func newMirror(seed uint64, overhead api.Resources) *mirror {
	return &mirror{
		table: schedule.NewTable(seed), queue: schedule.NewQueue(maxWaiting), overhead: overhead,
		nodes: map[string]mirrored[*clusterv1.Node]{}, replicas: map[string]mirrored[*clusterv1.Allocation]{}, volumes: map[string]*clusterv1.Volume{},
		classes: map[schedule.Owner]*compiled{}, taken: map[string]map[netip.Addr]string{},
	}
}

// class compiles a spec once for its owner. The error names the field.
func (x *mirror) class(owner schedule.Owner, spec *portolanv1.WorkloadSpec) (*schedule.Class, error) {
	c := x.classes[owner]
	switch {
	case c != nil && c.spec == spec:
	case c != nil && proto.Equal(c.spec, spec):
		c.spec = spec
	default:
		c = &compiled{spec: spec}
		c.class, c.err = schedule.Compile(spec, schedule.Options{Owner: owner, Overhead: x.overhead, Ports: portsOf(spec)})
		x.classes[owner] = c
	}
	return c.class, c.err
}

// portsOf are those of the node's own network that a replica takes.
func portsOf(spec *portolanv1.WorkloadSpec) []int32 {
	switch spec.GetGateway() {
	case portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST:
		return []int32{eastWestPort}
	case portolanv1.GatewayKind_GATEWAY_KIND_INGRESS:
		return []int32{ingressPort}
	default:
		return nil
	}
}

// sweep forgets the classes that no replica has and nobody waits for.
func (x *mirror) sweep(waiting map[string]*waiting) {
	if len(x.classes) < max(minSweep, 2*x.swept) {
		return
	}
	used := make(map[schedule.Owner]bool, len(x.classes))
	for _, r := range x.replicas {
		used[ownerOf(r.record)] = true
	}
	for _, w := range waiting {
		used[w.owner()] = true
	}
	for o := range x.classes {
		if !used[o] {
			delete(x.classes, o)
		}
	}
	x.swept = len(x.classes)
}

func ownerOf(a *clusterv1.Allocation) schedule.Owner {
	return schedule.Owner{Tenant: a.GetTenant(), Workload: a.GetWorkload(), Revision: a.GetRevision()}
}

// observeBound tells the table, once, of the devices that were asked for before this
// process began: pools that keep fragmentation low learn from it.
func (x *mirror) observeBound() {
	for _, id := range slices.Sorted(maps.Keys(x.replicas)) {
		if a := x.replicas[id].record; len(a.GetDevices()) > 0 && a.GetFinal() == nil {
			if class, err := x.class(ownerOf(a), a.GetSpec()); err == nil {
				x.table.Observe(class, 1)
			}
		}
	}
}

// follow brings the table to a snapshot. down is why a node takes nothing now.
func (x *mirror) follow(s *state.Snapshot, down func(*clusterv1.Node) schedule.Code) {
	x.followPools(s)
	x.followNodes(s, down)
	x.followReplicas(s)
	if x.last == nil || !sameMap(x.last.Volumes, s.Volumes) {
		x.followVolumes(s)
	}
	x.last = s
}

// sameMap says that two maps are one: snapshots share what did not change.
func sameMap[V any](a, b map[string]V) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

func (x *mirror) followPools(s *state.Snapshot) {
	in := s.Intents["cluster"]
	if in == x.spec && x.last != nil {
		return
	}
	x.spec, x.changed = in, true
	spec := in.GetCluster().GetSpec()
	x.table.SetPools(schedule.Pools{Pools: spec.GetPools(), CPUCoreHourMicros: spec.GetCpuCoreHourMicros(), MemGiBHourMicros: spec.GetMemoryGibHourMicros()})
	x.queue.Wake(x.table, schedule.PoolsChanged, "")
}

func (x *mirror) followNodes(s *state.Snapshot, down func(*clusterv1.Node) schedule.Code) {
	for id, n := range s.Nodes {
		was, known := x.nodes[id]
		is := mirrored[*clusterv1.Node]{record: n, down: down(n)}
		if known && was.record == n && was.down == is.down {
			continue
		}
		x.nodes[id], x.changed = is, true
		x.readyKept(id)
		x.table.PutNode(schedule.Node{ID: id, Facts: n.GetFacts(), Addresses: lastHost - firstHost + 1, Mode: n.GetMode(), Down: is.down})
		x.queue.Wake(x.table, schedule.NodeBetter, id)
	}
	for id := range x.nodes {
		if s.Nodes[id] == nil {
			delete(x.nodes, id)
			x.readyKept(id)
			x.table.DeleteNode(id)
			x.changed = true
		}
	}
}

// readyKept has those looked at again for whom a node keeps room: it may be of no use
// to them now.
func (x *mirror) readyKept(node string) {
	for _, key := range x.table.KeptFor(node) {
		x.queue.Ready(key)
	}
}

func (x *mirror) followVolumes(s *state.Snapshot) {
	for id, v := range s.Volumes {
		if x.volumes[id] != v {
			x.volumes[id] = v
			x.table.PutVolume(id, v.GetNode(), v.GetSizeBytes())
		}
	}
	for id, v := range x.volumes {
		if s.Volumes[id] == nil {
			delete(x.volumes, id)
			x.table.DeleteVolume(id)
			x.queue.Wake(x.table, schedule.RoomFreed, v.GetNode())
		}
	}
}

func (x *mirror) followReplicas(s *state.Snapshot) {
	if x.last == nil || !sameMap(x.last.Allocations, s.Allocations) {
		for id, a := range s.Allocations {
			if was, known := x.replicas[id]; !known || was.record != a {
				x.putReplica(s, a)
			}
		}
		for id, was := range x.replicas {
			if s.Allocations[id] == nil {
				delete(x.replicas, id)
				x.drop(id, was)
			}
		}
	}
	// What has ended holds its address until its node has cleared it away, which no
	// record says.
	for id, r := range x.replicas {
		if r.record.GetFinal() != nil && !r.gone && clearedAway(s, r.record) {
			x.drop(id, r)
			r.gone, r.addr = true, netip.Addr{}
			x.replicas[id] = r
		}
	}
}

// clearedAway says that nothing is left on its node of a replica that has ended.
func clearedAway(s *state.Snapshot, a *clusterv1.Allocation) bool {
	st := s.NodeStatus[a.GetNode()]
	return a.GetFinal() != nil && a.GetStop() && st != nil && st.Allocations[a.GetAllocation()] == nil
}

func (x *mirror) putReplica(s *state.Snapshot, a *clusterv1.Allocation) {
	id := a.GetAllocation()
	was, known := x.replicas[id]
	is := mirrored[*clusterv1.Allocation]{record: a, gone: clearedAway(s, a)}
	if known && !was.gone {
		x.release(was)
	}
	if is.gone {
		x.replicas[id] = is
		x.drop(id, is)
		return
	}
	if ip, err := netip.ParseAddr(a.GetAddress()); err == nil && !isGateway(a.GetSpec()) {
		is.addr = ip
		if x.taken[a.GetNode()] == nil {
			x.taken[a.GetNode()] = map[netip.Addr]string{}
		}
		x.taken[a.GetNode()][ip] = id
	}
	x.replicas[id] = is
	class, err := x.class(ownerOf(a), a.GetSpec())
	if err != nil {
		return // it was checked when it was bound; a spec of another version takes no room
	}
	x.table.PutReplica(schedule.Replica{
		ID: id, Class: class, Node: a.GetNode(), Devices: sharesOf(a), Bound: a.GetBound().GetSeconds(),
		Leaving: a.GetStop() || a.GetReplacedBy() != "", Ended: a.GetFinal() != nil,
	})
	switch {
	case known && was.record.GetSpec() != a.GetSpec() && !proto.Equal(was.record.GetSpec(), a.GetSpec()):
		// Changed in place: it may have lost its place, or others be let in.
		x.changed = true
		x.queue.Wake(x.table, schedule.RoomFreed, a.GetNode())
		x.queue.Wake(x.table, schedule.ReplicaBound, a.GetNode())
	case !known:
		x.queue.Wake(x.table, schedule.ReplicaBound, a.GetNode())
	case a.GetFinal() != nil && was.record.GetFinal() == nil:
		x.queue.Wake(x.table, schedule.RoomFreed, a.GetNode())
	}
}

func sharesOf(a *clusterv1.Allocation) []schedule.Share {
	out := make([]schedule.Share, 0, len(a.GetDevices()))
	for _, d := range a.GetDevices() {
		out = append(out, schedule.Share{Kind: d.GetKind(), Index: d.GetIndex(), Milli: d.GetMilli()})
	}
	return out
}

// release frees the address of a replica.
func (x *mirror) release(r mirrored[*clusterv1.Allocation]) {
	if used := x.taken[r.record.GetNode()]; r.addr.IsValid() && used[r.addr] == r.record.GetAllocation() {
		delete(used, r.addr)
	}
}

// drop takes a replica out of the table.
func (x *mirror) drop(id string, r mirrored[*clusterv1.Allocation]) {
	x.release(r)
	x.table.DeleteReplica(id)
	x.queue.Wake(x.table, schedule.RoomFreed, r.record.GetNode())
}

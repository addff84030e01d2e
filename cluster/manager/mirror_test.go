package manager

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// TestMirrorFollows: after any history of changes the table that followed them
// decides as one that is made of the last snapshot alone, and knows the same
// addresses. Scoring by least fragmentation is left out: it learns what is asked
// for, which a fresh table has not.
func TestMirrorFollows(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := &history{t: rt, store: mem.New(), r: rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))}
		followed := newMirror(1, schedule.DefaultOverhead)
		for step := range rapid.IntRange(1, 30).Draw(rt, "steps") {
			h.change()
			s := h.store.Snapshot()
			followed.follow(s, h.down)
			fresh := newMirror(1, schedule.DefaultOverhead)
			fresh.follow(s, h.down)
			got, want := h.decide(followed), h.decide(fresh)
			if got != want {
				rt.Fatalf("step %d: the table that followed decides\n%s\na fresh one\n%s", step, got, want)
			}
			if a, b := addressesOf(followed), addressesOf(fresh); !reflect.DeepEqual(a, b) {
				rt.Fatalf("step %d: addresses %v, want %v", step, a, b)
			}
		}
	})
}

func addressesOf(m *mirror) map[string]map[netip.Addr]string {
	out := map[string]map[netip.Addr]string{}
	for node, used := range m.taken {
		if len(used) > 0 {
			out[node] = maps.Clone(used)
		}
	}
	return out
}

// history makes random changes of a cluster's state.
type history struct {
	t     *rapid.T
	store *mem.Store
	r     *rand.Rand
	rev   int64
	lost  string
}

var historySpecs = []*portolanv1.WorkloadSpec{
	spec(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, "300m"),
	spec(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, "900m"),
	{
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "64Mi"}}},
		Scheduling: &portolanv1.WorkloadSpec_Scheduling{Devices: []*portolanv1.DeviceRequest{{ShareMilli: 400}}, SpreadKey: "zone", MaxSkew: 1},
	},
	{
		Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL, Priority: 10, Volumes: []*portolanv1.Volume{{Name: "d", Size: "1Gi"}},
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "200m", Memory: "64Mi"}}},
	},
}

func (h *history) down(n *clusterv1.Node) schedule.Code {
	if n.GetNode() == h.lost {
		return schedule.NodeLost
	}
	return 0
}

func (h *history) change() {
	s := h.store.Snapshot()
	c := state.Change{Base: s.Generation}
	node := fmt.Sprintf("n%d", h.r.IntN(5))
	id := fmt.Sprintf("w%d-%d", h.r.IntN(4), h.r.IntN(6))
	a := s.Allocations[id]
	switch h.r.IntN(9) {
	case 0, 1:
		c.PutNodes = []*clusterv1.Node{h.node(node)}
	case 2:
		c.DeleteNodes = []string{node}
	case 3, 4, 5:
		if a == nil && s.Nodes[node] != nil {
			c.PutAllocations = []*clusterv1.Allocation{h.allocation(id, node, s)}
		}
	case 6:
		if a != nil {
			up := copyAllocation(a)
			switch h.r.IntN(3) {
			case 0:
				up.Stop = true
			case 1:
				up.Final = &nodev1.AllocationStatus{State: portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED}
			case 2:
				up.Revision, up.Spec = "r2", historySpecs[h.r.IntN(len(historySpecs))]
			}
			c.PutAllocations = []*clusterv1.Allocation{up}
		}
	case 7:
		if a != nil {
			c.DeleteAllocations = []string{id}
		}
	case 8:
		h.observeOrElse(node, s, &c)
	}
	if !c.Empty() {
		if err := h.store.Commit(h.t.Context(), c); err != nil {
			h.t.Fatal(err)
		}
	}
}

// observeOrElse lets a node say that nothing runs on it, changes pools or volumes,
// or loses a node.
func (h *history) observeOrElse(node string, s *state.Snapshot, c *state.Change) {
	switch h.r.IntN(4) {
	case 0:
		if s.Nodes[node] != nil {
			_ = h.store.Observe(node, &state.NodeStatus{Session: 1, Connected: true, LastSeen: time.Unix(int64(s.Generation), 0)})
		}
	case 1:
		h.rev++
		spec := &portolanv1.ClusterSpec{Pools: []*portolanv1.NodePool{{Name: "default", Scoring: portolanv1.Scoring(1 + h.r.IntN(3)), CpuOvercommitPercent: int32(100 + h.r.IntN(50))}}}
		in := map[string]*linkv1.Intent{"cluster": {Revision: h.rev, Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{Spec: spec}}}}
		if err := h.store.CommitIntents(h.t.Context(), h.rev, in, time.Unix(h.rev, 0)); err != nil {
			h.t.Fatal(err)
		}
		c.Base = h.store.Snapshot().Generation
	case 2:
		h.lost = node
	case 3:
		id := fmt.Sprintf("t.w-%d.d", h.r.IntN(3))
		if s.Volumes[id] != nil {
			c.DeleteVolumes = []string{id}
		} else {
			c.PutVolumes = []*clusterv1.Volume{{Volume: id, Node: node, SizeBytes: 1 << 30}}
		}
	}
}

func (h *history) node(id string) *clusterv1.Node {
	n := &clusterv1.Node{Node: id, ReplicaCidr: "10.1." + id[1:] + ".0/24", Mode: portolanv1.NodeMode(h.r.IntN(8) / 6), Facts: &nodev1.NodeFacts{
		CpuMilli: 1000 * int64(1+h.r.IntN(4)), MemoryBytes: 4 << 30, StorageBytes: 3 << 30, Labels: map[string]string{"zone": string(rune('a' + h.r.IntN(2)))},
	}}
	for i := range h.r.IntN(3) {
		n.Facts.Devices = append(n.Facts.Devices, &nodev1.Device{Kind: "gpu", Model: "T4", Index: int32(i)})
	}
	return n
}

func (h *history) allocation(id, node string, s *state.Snapshot) *clusterv1.Allocation {
	taken := map[string]bool{}
	for _, a := range s.Allocations {
		taken[a.GetAddress()] = true
	}
	address := ""
	for address == "" || taken[address] {
		address = fmt.Sprintf("10.1.%s.%d", node[1:], 2+h.r.IntN(40))
	}
	spec := proto.CloneOf(historySpecs[h.r.IntN(len(historySpecs))]) // as after a load: equal, and another message
	return &clusterv1.Allocation{
		Allocation: id, Tenant: "t", Workload: id[:2], Revision: "r1", Node: node, Spec: spec, Bound: timestamppb.New(time.Unix(int64(h.r.IntN(100)), 0)),
		Address: address,
	}
}

// decide has the table find nodes for some of each spec.
func (h *history) decide(m *mirror) string {
	var b schedule.Batch
	for i, spec := range historySpecs {
		class, err := m.class(schedule.Owner{Tenant: "t", Workload: fmt.Sprintf("new%d", i), Revision: "r"}, spec)
		if err != nil {
			h.t.Fatal(err)
		}
		b.Groups = append(b.Groups, schedule.Group{Key: fmt.Sprintf("new%d", i), Class: class, Count: 3})
	}
	b.Allowance = map[string]int{"t/w0": 1, "t/w1": 2}
	out := ""
	for i, p := range schedule.Schedule(m.table, b).Placed {
		out += fmt.Sprintf("%d: %v %v missing %d", i, p.Bindings, p.Nominations, p.Missing)
		if p.Refusal != nil {
			out += fmt.Sprintf(" %v", p.Refusal.Reasons)
		}
		out += "\n"
	}
	for _, f := range sortedMisfits(m.table) {
		out += fmt.Sprintf("misfit %v\n", f)
	}
	return out
}

func sortedMisfits(t *schedule.Table) []schedule.Misfit {
	out := schedule.Misfits(t)
	slices.SortFunc(out, func(a, b schedule.Misfit) int { return strings.Compare(a.Replica, b.Replica) })
	return out
}

package dispatch

import (
	"fmt"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// An operator sees of a node what it can be promised, what of it is taken, its mode,
// and why a drain is not done; and changes modes by node or by pool.
func TestNodesAreShownAndSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		admin := &adminServer{d: r.d}
		pools := []*portolanv1.NodePool{{Name: "gpu", CpuOvercommitPercent: 150, Reserved: &portolanv1.ResourceList{Cpu: "1", Memory: "1Gi"}}}
		if err := r.store.CommitIntents(t.Context(), 1, map[string]*linkv1.Intent{
			"cluster": {Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{Spec: &portolanv1.ClusterSpec{Pools: pools}}}},
		}, time.Now()); err != nil {
			t.Fatal(err)
		}
		r.commit(state.Change{
			PutNodes: []*clusterv1.Node{
				{Node: "n1", ReplicaCidr: "10.1.1.0/24", Facts: &nodev1.NodeFacts{
					CpuMilli: 5000, MemoryBytes: 9 << 30, StorageBytes: 10 << 30, Labels: map[string]string{"pool": "gpu"},
					Devices: []*nodev1.Device{{Kind: "gpu", Model: "A100", Index: 0}, {Kind: "gpu", Model: "A100", Index: 1}, {Kind: "fpga"}},
				}},
				{Node: "n2", ReplicaCidr: "10.1.2.0/24", Facts: &nodev1.NodeFacts{CpuMilli: 1000, MemoryBytes: 1 << 30}},
			},
			PutAllocations: []*clusterv1.Allocation{{
				Allocation: "db-0", Tenant: "t", Workload: "db", Node: "n1", Devices: []*nodev1.DeviceShare{{Kind: "gpu", Index: 1, Milli: 300}},
				Spec: &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "500m", Memory: "64Mi", Storage: "1Gi"}}}},
			}},
			PutVolumes: []*clusterv1.Volume{{Volume: "t.db-0.data", Node: "n1", SizeBytes: 2 << 30}},
		})
		r.store.SetNotes(state.Notes{Blocked: map[string][]state.Blocked{"n1": {{Code: "BudgetExhausted", Message: "t/db: 1 of 1", Count: 1}}}})
		list, err := admin.ListNodes(t.Context(), &linkv1.ListNodesRequest{})
		if err != nil || len(list.GetNodes()) != 2 {
			t.Fatalf("%v, %v", list, err)
		}
		n := list.GetNodes()[0]
		if n.GetPool() != "gpu" || n.GetAllocatableCpuMilli() != 6000 || n.GetAllocatableMemoryBytes() != 8<<30 || n.GetAllocatedCpuMilli() != 550 ||
			n.GetStorageBytes() != 10<<30 || n.GetAllocatedStorageBytes() != 3<<30 {
			t.Errorf("node %v", n)
		}
		if !maps.Equal(n.GetDevicesMilli(), map[string]int64{"gpu/A100": 2000, "fpga": 1000}) || !maps.Equal(n.GetAllocatedDevicesMilli(), map[string]int64{"gpu/A100": 300}) {
			t.Errorf("devices %v, taken %v", n.GetDevicesMilli(), n.GetAllocatedDevicesMilli())
		}
		if b := n.GetBlocked(); len(b) != 1 || b[0].GetCode() != "BudgetExhausted" || b[0].GetCount() != 1 {
			t.Errorf("blocked %v", b)
		}
		until := time.Now().Add(time.Hour)
		set, err := admin.SetNode(t.Context(), &linkv1.SetNodeRequest{Pool: "gpu", Mode: portolanv1.NodeMode_NODE_MODE_DRAINING, Deadline: timestamppb.New(until)})
		if err != nil || len(set.GetNodes()) != 1 || set.GetNodes()[0].GetMode() != portolanv1.NodeMode_NODE_MODE_DRAINING {
			t.Errorf("after setting the pool: %v, %v", set, err)
		}
		if got := r.store.Snapshot().Nodes["n1"].GetDrainDeadline().AsTime(); !got.Equal(until) {
			t.Errorf("deadline %v", got)
		}
		_, err = admin.SetNode(t.Context(), &linkv1.SetNodeRequest{Node: "n1", Deadline: &timestamppb.Timestamp{Seconds: -5}})
		if api.KindOf(err) != api.Invalid {
			t.Errorf("a deadline before 1970: %v", err)
		}
	})
}

// What is allocated is what the scheduler charges: what is left of it takes six more,
// not the thirteen that the containers alone would leave room for.
func TestAllocatedIsWhatTheSchedulerCharges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		change := state.Change{PutNodes: []*clusterv1.Node{{Node: "n1", ReplicaCidr: "10.1.1.0/24", Facts: &nodev1.NodeFacts{CpuMilli: 4000, MemoryBytes: 8 << 30}}}}
		spec := &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Requests: &portolanv1.ResourceList{Cpu: "100m", Memory: "10Mi"}}}}
		for i := range 20 {
			change.PutAllocations = append(change.PutAllocations, &clusterv1.Allocation{Allocation: fmt.Sprintf("web-%d", i), Tenant: "t", Workload: "web", Node: "n1", Spec: spec})
		}
		r.commit(change)
		list, err := (&adminServer{d: r.d}).ListNodes(t.Context(), &linkv1.ListNodesRequest{})
		if err != nil || len(list.GetNodes()) != 1 {
			t.Fatalf("%v, %v", list, err)
		}
		n := list.GetNodes()[0]
		one, err := schedule.Requests(spec, schedule.DefaultOverhead)
		if err != nil {
			t.Fatal(err)
		}
		if got := (n.GetAllocatableCpuMilli() - n.GetAllocatedCpuMilli()) / one.CPUMilli; got != 6 {
			t.Errorf("room for %d more, want 6: node %v", got, n)
		}
		if got := n.GetAllocatedMemoryBytes(); got != 20*one.MemoryBytes {
			t.Errorf("%d bytes are allocated, want %d", got, 20*one.MemoryBytes)
		}
	})
}

func TestPendingIsExplainedWithNearestAndRemedies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.store.SetPending(map[string][]state.PendingReason{"t/w": {
			{Replica: "r1", Code: "InsufficientCPU", Message: "m", Count: 3, Nearest: "n2", NearestReason: "500m of CPU more", Remedies: []state.Remedy{{Code: "AskLessCPU", Message: "ask for 500m"}}},
			{Replica: "r1", Code: "NodeCordoned", Message: "m", Count: 1},
		}})
		r.store.SetNotes(state.Notes{
			Waiting:  map[string]state.Blocked{"t/w": {Code: "VolumeNodeLost", Message: "its volume is on n9"}},
			Requests: map[string]*portolanv1.RequestAdvice{"t/w": {Target: &portolanv1.ReplicaResources{CpuMilli: 70}}},
			Scaling:  map[string]*portolanv1.ScaleVerdict{"t/w": {Replicas: 8}},
		})
		res, err := (&adminServer{d: r.d}).ExplainPending(t.Context(), &linkv1.ExplainPendingRequest{Workload: "tenants/t/workloads/w"})
		if err != nil || len(res.GetVerdicts()) != 2 {
			t.Fatalf("%v, %v", res, err)
		}
		if got := res.GetRequests().GetTarget().GetCpuMilli(); got != 70 {
			t.Errorf("%dm should be requested", got)
		}
		if got := res.GetScaling().GetReplicas(); got != 8 {
			t.Errorf("it scales to %d", got)
		}
		if v := res.GetVerdicts()[0]; v.GetReasons()[0].GetCode() != "VolumeNodeLost" {
			t.Errorf("%v", v)
		}
		v := res.GetVerdicts()[1]
		if got := fmt.Sprintf("%s %s: %s, %d %d %s", v.GetReplica(), v.GetNearest(), v.GetNearestReason(), len(v.GetReasons()), v.GetReasons()[0].GetCount(), v.GetRemedies()[0].GetCode()); got != "r1 n2: 500m of CPU more, 2 3 AskLessCPU" {
			t.Errorf("verdict %s", got)
		}
	})
}

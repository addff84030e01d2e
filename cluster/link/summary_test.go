package link

import (
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func poolNode(id, pool string, mode portolanv1.NodeMode, devices ...*nodev1.Device) *clusterv1.Node {
	return &clusterv1.Node{Node: id, Mode: mode, Facts: &nodev1.NodeFacts{CpuMilli: 4000, MemoryBytes: 8 << 30, Labels: map[string]string{"pool": pool}, Devices: devices}}
}

// The federation is told of room by pool: with overcommit, without what is reserved,
// and without nodes that are drained, lost, or cordoned and empty.
func TestPoolsAreSummedUp(t *testing.T) {
	lost := poolNode("n4", "gpu", 0)
	lost.LostTime = timestamppb.Now()
	s := &state.Snapshot{
		Intents: map[string]*linkv1.Intent{"cluster": {Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{Spec: &portolanv1.ClusterSpec{Pools: []*portolanv1.NodePool{
			{Name: "gpu", Spot: true, CpuOvercommitPercent: 200, CpuCoreHourMicros: 7, Reserved: &portolanv1.ResourceList{Cpu: "1"}}, {Name: "new", MaxNodes: 3},
		}}}}}},
		Nodes: map[string]*clusterv1.Node{
			"n1": poolNode("n1", "gpu", 0, &nodev1.Device{Kind: "gpu", Model: "T4"}, &nodev1.Device{Kind: "gpu", Model: "T4", Index: 1}),
			"n2": poolNode("n2", "gpu", portolanv1.NodeMode_NODE_MODE_DRAINING), "n3": poolNode("n3", "gpu", portolanv1.NodeMode_NODE_MODE_CORDONED), "n4": lost,
		},
		Allocations: map[string]*clusterv1.Allocation{"a": {Allocation: "a", Node: "n3", Spec: &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "500m", Memory: "1Gi"}}}}}},
		Notes:       state.Notes{Wishes: map[string]state.PoolWish{"new": {Nodes: 2, Reason: "PoolGrows: …"}}},
	}
	got := clusterSummary(s)
	if len(got.GetPools()) != 2 {
		t.Fatalf("pools %v", got.GetPools())
	}
	gpu, fresh := got.GetPools()[0], got.GetPools()[1]
	if gpu.GetCpuMilli() != 6000+500 || gpu.GetMemoryBytes() != 9<<30 || gpu.GetNodes() != 4 || gpu.GetNodesReady() != 3 || !gpu.GetSpot() || gpu.GetCpuCoreHourMicros() != 7 || gpu.GetDevices()["gpu/T4"] != 2 {
		t.Errorf("pool gpu %v", gpu)
	}
	if fresh.GetWantedNodes() != 2 || fresh.GetNodes() != 0 {
		t.Errorf("pool new %v", fresh)
	}
	if got.GetCpuMilli() != 6500 || got.GetNodes() != 4 || got.GetNodesReady() != 3 {
		t.Errorf("summary %v", got)
	}
}

// What other clusters send to a service here is weighed by the revision that serves.
func TestExportsCountTheActiveRevision(t *testing.T) {
	s := &state.Snapshot{
		Intents: map[string]*linkv1.Intent{
			"service/t/web":  {Body: &linkv1.Intent_Service{Service: &linkv1.ServiceIntent{Tenant: "t", Service: "web", Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 80}}}}}},
			"workload/t/web": {Body: &linkv1.Intent_Workload{Workload: &linkv1.WorkloadIntent{Tenant: "t", Workload: "web", ActiveRevision: "v1"}}},
		},
		Nodes: map[string]*clusterv1.Node{"n1": {Node: "n1"}}, Allocations: map[string]*clusterv1.Allocation{},
		NodeStatus: map[string]*state.NodeStatus{"n1": {Session: 1, Allocations: map[string]*nodev1.AllocationStatus{}}},
	}
	for _, a := range []struct{ id, revision string }{{"a", "v1"}, {"b", "v2"}, {"c", "v2"}} {
		s.Allocations[a.id] = &clusterv1.Allocation{Allocation: a.id, Tenant: "t", Workload: "web", Revision: a.revision, Node: "n1"}
		s.NodeStatus["n1"].Allocations[a.id] = &nodev1.AllocationStatus{Allocation: a.id, Ready: true, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING}
	}
	ready := func() map[string]int32 {
		out := map[string]int32{}
		for _, p := range exports(s, "eu", []string{"10.0.0.1:15443"})["t/web"].GetPorts() {
			out[p.GetRevision()] = p.GetReadyReplicas()
		}
		return out
	}
	if got := ready(); got[""] != 1 || got["v1"] != 1 || got["v2"] != 2 {
		t.Errorf("with v1 active: %v", got)
	}
	delete(s.Allocations, "a")
	if got := ready(); got[""] != 2 {
		t.Errorf("with none of v1 left: %v", got)
	}
}

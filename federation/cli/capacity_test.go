package cli

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// fakeFleet answers what capacity and cost ask. Cluster "us" does not answer for
// its nodes.
type fakeFleet struct {
	portolanv1.UnimplementedClusterServiceServer
	portolanv1.UnimplementedWorkloadServiceServer
}

func (fakeFleet) GetCapacity(_ context.Context, req *portolanv1.GetCapacityRequest) (*portolanv1.GetCapacityResponse, error) {
	out := &portolanv1.GetCapacityResponse{}
	for _, c := range []*portolanv1.ClusterCapacity{
		{
			Cluster: "clusters/eu", Region: "eu-west", State: portolanv1.ClusterState_CLUSTER_STATE_READY, CpuMilli: 16000, MemoryBytes: 64 << 30, ReservedCpuMilli: 3500, ReservedMemoryBytes: 9 << 30,
			CpuCoreHourMicros: 30000, MemoryGibHourMicros: 4000, ReservedCostMicros: 141000, CapacityCostMicros: 736000,
			Pools: []*portolanv1.PoolStatus{
				{Pool: "default", CpuMilli: 8000, MemoryBytes: 32 << 30, Nodes: 3, NodesReady: 2, WantedNodes: -2, WantedReason: "NodesUnneeded: shrink by 2", UnneededNodes: []string{"n3", "n7"}, WantedHourMicros: -400000},
				{Pool: "gpu", CpuMilli: 8000, MemoryBytes: 32 << 30, Nodes: 1, NodesReady: 1, Spot: true, Devices: map[string]int32{"gpu/T4": 4}, WantedNodes: 1, WantedReason: "PoolGrows: 2 train wait", WantedHourMicros: 368000},
			},
		},
		{Cluster: "clusters/us", Region: "us-east", State: portolanv1.ClusterState_CLUSTER_STATE_LOST, CpuMilli: 8000, MemoryBytes: 32 << 30, CpuCoreHourMicros: 20000, MemoryGibHourMicros: 3000, CapacityCostMicros: 256000},
	} {
		if req.GetCluster() == "" || req.GetCluster() == c.GetCluster() {
			out.Clusters = append(out.Clusters, c)
		}
	}
	return out, nil
}

func (fakeFleet) ListNodes(_ context.Context, req *portolanv1.ListNodesRequest) (*portolanv1.ListNodesResponse, error) {
	if req.GetCluster() == "clusters/us" {
		return nil, status.Error(codes.Unavailable, "clusters/us is not connected")
	}
	return &portolanv1.ListNodesResponse{Nodes: []*portolanv1.NodeInfo{
		{Name: "clusters/eu/nodes/n1", Ready: true, AllocatableCpuMilli: 4000, AllocatableMemoryBytes: 16 << 30, AllocatedCpuMilli: 3500, AllocatedMemoryBytes: 1 << 30},
		{Name: "clusters/eu/nodes/n2", Ready: true, CpuMilli: 4000, MemoryBytes: 16 << 30, AllocatedMemoryBytes: 8 << 30},
		{Name: "clusters/eu/nodes/n3", AllocatableCpuMilli: 4000, AllocatableMemoryBytes: 16 << 30},
		{Name: "clusters/eu/nodes/g1", Ready: true, Pool: "gpu", AllocatableCpuMilli: 8000, AllocatableMemoryBytes: 32 << 30},
		{Name: "clusters/eu/nodes/g2", Ready: true, Pool: "gpu", Mode: portolanv1.NodeMode_NODE_MODE_CORDONED, AllocatableCpuMilli: 8000, AllocatableMemoryBytes: 32 << 30},
	}}, nil
}

func (fakeFleet) ListPlacements(_ context.Context, req *portolanv1.ListPlacementsRequest) (*portolanv1.ListPlacementsResponse, error) {
	out := &portolanv1.ListPlacementsResponse{}
	for _, p := range []*portolanv1.Placement{
		{Name: "tenants/shop/workloads/web/placements/eu", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 2000, ReservedMemoryBytes: 8 << 30}},
		{Name: "tenants/shop/workloads/cart/placements/eu", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 500, ReservedMemoryBytes: 1 << 30}},
		{Name: "tenants/data/workloads/etl/placements/eu", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 1000}},
	} {
		if req.GetParent() == "" || strings.HasPrefix(p.GetName(), req.GetParent()+"/") {
			out.Placements = append(out.Placements, p)
		}
	}
	return out, nil
}

func (fakeFleet) ExplainWorkload(_ context.Context, req *portolanv1.ExplainWorkloadRequest) (*portolanv1.ExplainWorkloadResponse, error) {
	switch last(req.GetName()) {
	case "near":
		return &portolanv1.ExplainWorkloadResponse{
			DesiredReplicas: 4, FailoverUnplacedReplicas: 2, ScoreOf: portolanv1.Objective_OBJECTIVE_LATENCY,
			Clusters: []*portolanv1.ClusterVerdict{{Cluster: "eu", Feasible: true, Replicas: 4, Score: -12500, Reasons: []*portolanv1.Reason{{Code: "overflow", Message: "fallback group away takes what earlier groups have no room for", Count: 4}}}},
			Reasons: []*portolanv1.Reason{
				{Code: "min-groups", Message: "the spread asks for 3 regions, 2 can be used"},
				{Code: "failover", Message: "not every replica of the lost clusters found room elsewhere", Count: 2},
				{Code: "displaces", Message: "3 replicas of lower priority make room", Count: 3},
			},
		}, nil
	case "agent":
		return &portolanv1.ExplainWorkloadResponse{
			DesiredReplicas: 2, UnplacedReplicas: 1, Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, ScoreOf: portolanv1.Objective_OBJECTIVE_COST,
			Clusters: []*portolanv1.ClusterVerdict{
				{Cluster: "eu", Feasible: true, Reasons: []*portolanv1.Reason{{Code: "chosen", Message: "one replica on each eligible node"}}},
				{Cluster: "us", Reasons: []*portolanv1.Reason{{Code: "capacity", Message: "one replica on each node would need 200m CPU more than is free"}}, Remedies: []*portolanv1.Reason{{Message: "free 200m CPU"}}},
			},
			Reasons: []*portolanv1.Reason{{Code: "capacity", Message: "1 of 2 clusters have no room for one replica on each node", Count: 1}},
		}, nil
	}
	amount := func(milli, mib int64) *portolanv1.ReplicaResources {
		return &portolanv1.ReplicaResources{CpuMilli: milli, MemoryBytes: mib << 20}
	}
	return &portolanv1.ExplainWorkloadResponse{
		DesiredReplicas: 5, UnplacedReplicas: 1, ScoreOf: portolanv1.Objective_OBJECTIVE_COST,
		Clusters: []*portolanv1.ClusterVerdict{
			{Cluster: "clusters/eu", Feasible: true, Replicas: 4, Score: -48500, Reasons: []*portolanv1.Reason{{Code: "kept", Message: "4 replicas were here before", Count: 4}}},
			{Cluster: "clusters/us", Reasons: []*portolanv1.Reason{{Code: "lost", Message: "the cluster is silent"}}, Remedies: []*portolanv1.Reason{{Code: "lost", Message: "connect the cluster again"}}},
		},
		Nodes: []*portolanv1.NodeVerdict{{
			Cluster: "eu", Replica: "r2", Reasons: []*portolanv1.Reason{{Code: "InsufficientCPU", Message: "2 nodes: 1000m of CPU are asked for, at most 500m are free"}},
			Remedies: []*portolanv1.Reason{{Code: "AskLessCPU", Message: "ask for 500m of CPU"}}, Nearest: "n2", NearestReason: "500m of CPU more",
		}, {
			Cluster: "us", Replica: "r2", Reasons: []*portolanv1.Reason{{Code: "NodeCordoned", Message: "1 node is cordoned"}}, NearestReason: "cordoned",
		}},
		Scaling: []*portolanv1.ScaleVerdict{{Cluster: "eu", Replicas: 4, Reasons: []*portolanv1.Reason{
			{Code: "MetricAsks", Message: "cpu is 90% of the request, target 50%: 8"}, {Code: "AtMax", Message: "at most 4 are allowed here, 8 would be wanted"},
		}}},
		Requests: []*portolanv1.RequestAdvice{{
			Cluster: "eu", Requested: amount(1000, 64), Lower: amount(150, 80), Target: amount(200, 96), Upper: amount(400, 200),
			Reason: &portolanv1.Reason{Code: "Recommended", Message: "90% of the time 200m of CPU and 96 MiB are enough (180 samples over 3h, 15% margin)"},
		}},
	}, nil
}

// fakeApp is the CLI over a fake server.
func fakeApp(t *testing.T) (*app, *bytes.Buffer) {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer()
	portolanv1.RegisterClusterServiceServer(s, fakeFleet{})
	portolanv1.RegisterWorkloadServiceServer(s, fakeFleet{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	cc, err := grpc.NewClient("passthrough:///fake", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cc.Close()
		s.Stop()
		<-done
	})
	out := &bytes.Buffer{}
	return &app{out: out, err: out, conn: cc}, out
}

// The scripts in testdata/capacity: each line is a command as it is typed.
func TestCapacityAndCost(t *testing.T) {
	datadriven.RunTest(t, "testdata/capacity", func(t *testing.T, d *datadriven.TestData) string {
		t.Helper()
		a, out := fakeApp(t)
		root := &cobra.Command{Use: "portolan", SilenceUsage: true, SilenceErrors: true}
		root.PersistentFlags().StringVarP(&a.tenant, "tenant", "t", "", "")
		root.AddGroup(&cobra.Group{ID: "fleet", Title: "Fleet:"}, &cobra.Group{ID: "objects", Title: "Objects:"})
		root.AddCommand(a.capacityCommand(), a.costCommand(), a.explainCommand())
		root.SetOut(out)
		root.SetErr(out)
		root.SetArgs(strings.Fields(strings.TrimPrefix(d.Input, "portolan ")))
		if err := root.ExecuteContext(t.Context()); err != nil {
			return out.String() + "portolan: " + explainError(err) + "\n"
		}
		for line := range strings.Lines(out.String()) {
			if a.output == "table" && len([]rune(line)) > 101 {
				t.Errorf("%s: a line of %d characters fits no terminal: %s", d.Pos, len([]rune(line)), line)
			}
		}
		return out.String()
	})
}

// describe says how a workload scales by itself as explain does, and nothing of one
// that does not.
func TestDescribeSaysHowItScales(t *testing.T) {
	for _, c := range []struct {
		spec *portolanv1.WorkloadSpec
		want string
	}{
		{&portolanv1.WorkloadSpec{}, ""},
		{&portolanv1.WorkloadSpec{Autoscale: &portolanv1.Autoscale{Max: 4}}, "at most 4 are allowed here, 8 would be wanted"},
	} {
		a, out := fakeApp(t)
		if err := a.describeScaling(t.Context(), a.conn, &portolanv1.Workload{Name: "tenants/shop/workloads/web", Spec: c.spec}); err != nil {
			t.Fatal(err)
		}
		if c.want == "" && out.Len() > 0 || !strings.Contains(out.String(), c.want) {
			t.Errorf("%v: %q", c.spec, out)
		}
	}
}

func TestMoney(t *testing.T) {
	for micros, want := range map[int64]string{0: "0.00", 6409e6: "6,409.00", 1234567891234: "1,234,567.89", 100: "0.0001", -3263e6: "-3,263.00", 150000: "0.15", 999e6: "999.00"} {
		if got := money(micros); got != want {
			t.Errorf("money(%d) = %s, want %s", micros, got, want)
		}
	}
}

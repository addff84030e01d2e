package capacity

import (
	"fmt"
	"math"
	"math/big"
	"strconv"
	"testing"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The worked examples in testdata/arithmetic. Commands, amounts in the API's
// notation:
//
//	node cpu= memory= reserve-cpu= reserve-memory= request-cpu= request-memory= [overhead-cpu= overhead-memory= busy=]
//	bill control-planes= control-plane= nodes= node= operator-hours= operator= [hours=]
//	replicas current= used= target= | rate= each= target=
//	nodes replicas= each=
//	bandwidth rate= bytes=
func TestArithmetic(t *testing.T) {
	datadriven.RunTest(t, "testdata/arithmetic", func(t *testing.T, d *datadriven.TestData) string {
		t.Helper()
		x := arguments{t, d}
		out, err := x.answer()
		if err != nil {
			return err.Error() + "\n"
		}
		return out
	})
}

type arguments struct {
	t *testing.T
	d *datadriven.TestData
}

func (x arguments) text(key string) string {
	for _, a := range x.d.CmdArgs {
		if a.Key == key {
			return a.Vals[0]
		}
	}
	return ""
}

func (x arguments) number(key string) float64 {
	if x.text(key) == "" {
		return 0
	}
	v, err := strconv.ParseFloat(x.text(key), 64)
	if err != nil {
		x.t.Fatal(err)
	}
	return v
}

func (x arguments) amount(prefix string) api.Resources {
	c, err := api.ParseCPU(x.text(prefix + "cpu"))
	if err != nil {
		x.t.Fatal(err)
	}
	m, err := api.ParseBytes(x.text(prefix + "memory"))
	if err != nil {
		x.t.Fatal(err)
	}
	return api.Resources{CPUMilli: c, MemoryBytes: m}
}

func (x arguments) price(key string) int64 {
	v, err := Micros(x.number(key))
	if err != nil {
		x.t.Fatal(err)
	}
	return v
}

func (x arguments) answer() (string, error) {
	whole := func(key string) int64 { return int64(x.number(key)) }
	count := func(n int64, err error) (string, error) { return fmt.Sprintln(n), err }
	switch x.d.Cmd {
	case "node":
		f, err := Node{Size: x.amount(""), Reserved: x.amount("reserve-"), Request: x.amount("request-"), Overhead: x.amount("overhead-"), BusyOneIn: whole("busy")}.Fit()
		return fmt.Sprintf("min(%d, %d) = %d, safe %d by %s\n", f.ByCPU, f.ByMemory, f.Most, f.Safe, f.Bound), err
	case "bill":
		b, err := Operation{
			ControlPlanes: whole("control-planes"), Nodes: whole("nodes"), ControlPlaneHour: x.price("control-plane"), NodeHour: x.price("node"),
			OperatorHours: whole("operator-hours"), OperatorPrice: x.price("operator"), Hours: whole("hours"),
		}.Bill()
		return fmt.Sprintf("%.2f + %.2f + %.2f = %.2f\n", float64(b.ControlPlanes)/1e6, float64(b.Nodes)/1e6, float64(b.Operators)/1e6, float64(b.Total)/1e6), err
	case "replicas":
		if x.text("rate") != "" {
			return count(ReplicasForRate(x.number("rate"), x.number("each"), x.number("target")))
		}
		return count(Replicas(whole("current"), x.number("used"), x.number("target")))
	case "nodes":
		return count(NodesFor(whole("replicas"), whole("each")))
	case "bandwidth":
		b, err := BandwidthOf(x.number("rate"), x.number("bytes"))
		return fmt.Sprintf("%.0f B/s, %.0f bit/s, %.0f B a month\n", b.BytesPerSecond, b.BitsPerSecond, b.BytesPerMonth), err
	}
	x.t.Fatalf("command %s is not known", x.d.Cmd)
	return "", nil
}

// So many fit, and one more does not; told by adding up.
func TestFitIsTheMost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(what string, most int64) api.Resources {
			return api.Resources{CPUMilli: rapid.Int64Range(0, most).Draw(t, what+" cpu"), MemoryBytes: rapid.Int64Range(0, most).Draw(t, what+" memory")}
		}
		n := Node{Size: draw("size", math.MaxInt64/2), Reserved: draw("reserved", 1000), Request: draw("request", 1000), Overhead: draw("overhead", 1000), BusyOneIn: rapid.Int64Range(1, 10).Draw(t, "busy")}
		f, err := n.Fit()
		if err != nil {
			if n.Size.CPUMilli >= n.Reserved.CPUMilli && n.Size.MemoryBytes >= n.Reserved.MemoryBytes && n.Request != (api.Resources{}) {
				t.Fatal(err)
			}
			return
		}
		fits := func(count, available, request, overhead, busy int64) bool {
			// count × request + count × overhead ÷ busy ≤ available
			sum := new(big.Int).Mul(big.NewInt(count), big.NewInt(request*busy+overhead))
			return sum.Cmp(new(big.Int).Mul(big.NewInt(available), big.NewInt(busy))) <= 0
		}
		all := func(count int64, o api.Resources) bool {
			return fits(count, f.Available.CPUMilli, n.Request.CPUMilli, o.CPUMilli, n.BusyOneIn) && fits(count, f.Available.MemoryBytes, n.Request.MemoryBytes, o.MemoryBytes, 1)
		}
		if !all(f.Safe, n.Overhead) || f.Safe < Unbounded && all(f.Safe+1, n.Overhead) {
			t.Fatalf("safe is %d: %+v", f.Safe, n)
		}
		if !all(f.Most, api.Resources{}) || f.Most < Unbounded && all(f.Most+1, api.Resources{}) || f.Safe > f.Most {
			t.Fatalf("most is %d, safe %d: %+v", f.Most, f.Safe, n)
		}
	})
}

// The fewest replicas that bring the use to its target or below.
func TestReplicasAreTheFewest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		current, used, target := rapid.Int64Range(0, 1000).Draw(t, "current"), rapid.IntRange(0, 300).Draw(t, "used"), rapid.IntRange(1, 100).Draw(t, "target")
		n, err := Replicas(current, float64(used), float64(target))
		if err != nil {
			t.Fatal(err)
		}
		load := current * int64(used)
		if n*int64(target) < load || n > 0 && (n-1)*int64(target) >= load {
			t.Fatalf("%d at %d%% with a target of %d%%: %d", current, used, target, n)
		}
	})
}

func fleet() []*portolanv1.ClusterCapacity {
	return []*portolanv1.ClusterCapacity{
		{Cluster: "clusters/us", Region: "us", CpuMilli: 8000, MemoryBytes: 32 << 30, ReservedCpuMilli: 2000, ReservedMemoryBytes: 4 << 30, CpuCoreHourMicros: 30000, MemoryGibHourMicros: 4000, CapacityCostMicros: 368000, ReservedCostMicros: 76000},
		{Cluster: "clusters/eu-1", Region: "eu", CpuMilli: 4000, MemoryBytes: 16 << 30, CpuCoreHourMicros: 40000, MemoryGibHourMicros: 5000, CapacityCostMicros: 240000},
		{Cluster: "clusters/eu-2", Region: "eu", CpuMilli: 4000, MemoryBytes: 16 << 30, ReservedCpuMilli: 1000, CpuCoreHourMicros: 40000, MemoryGibHourMicros: 5000, CapacityCostMicros: 240000, ReservedCostMicros: 40000},
	}
}

func TestFleetPrice(t *testing.T) {
	lines := ByRegion(fleet())
	if len(lines) != 2 || lines[0].Name != "eu" || lines[0].CapacityHour != 480000 || lines[0].ReservedHour != 40000 || lines[0].Idle() != 440000 || lines[0].Capacity.CPUMilli != 8000 || lines[1].Name != "us" {
		t.Errorf("by region: %+v", lines)
	}
	if lines := ByCluster(fleet()); len(lines) != 3 || lines[0].Name != "eu-1" || lines[2].ReservedHour != 76000 {
		t.Errorf("by cluster: %+v", lines)
	}
	ps := []*portolanv1.Placement{
		{Name: "tenants/shop/workloads/web/placements/us", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 1500, ReservedMemoryBytes: 4 << 30}},
		{Name: "tenants/shop/workloads/web/placements/eu-2", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 1000}},
		{Name: "tenants/data/workloads/etl/placements/us", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 500}},
		{Name: "tenants/data/workloads/etl/placements/gone", Spec: &portolanv1.PlacementSpec{ReservedCpuMilli: 500}},
	}
	by := ByPlacement(fleet(), ps, func(p *portolanv1.Placement) string { return api.TenantOf(p.GetName()) })
	if len(by) != 2 || by[0].Name != "data" || by[0].ReservedHour != 15000 || by[0].Reserved.CPUMilli != 1000 || by[1].ReservedHour != 45000+16000+40000 {
		t.Errorf("by tenant: %+v", by)
	}
	two := fleet()[0] // half of its cores are spot, a quarter is in no pool
	two.Pools = []*portolanv1.PoolStatus{{CpuMilli: 4000, MemoryBytes: 32 << 30, Spot: true, CpuCoreHourMicros: 10000}, {CpuMilli: 2000}}
	if got := MeanPrice(two); got != (Price{CoreHour: 20000, GiBHour: 4000}) {
		t.Errorf("the mean price of 4 spot cores at 0.01 and 4 at 0.03 is %+v", got)
	}
	own := PriceOf(fleet()[0], &portolanv1.PoolStatus{CpuCoreHourMicros: 9000})
	if own.CoreHour != 9000 || own.GiBHour != 4000 || own.PerHour(api.Resources{CPUMilli: 1500, MemoryBytes: 1 << 29}) != 13500+2000 {
		t.Errorf("the price of a pool is %+v", own)
	}
}

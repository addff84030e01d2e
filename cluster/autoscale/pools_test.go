package autoscale

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The stories in testdata/pools. One command, grow, with a line each:
//
//	pool NAME cpu=8 memory=32Gi price=0.40 max=10 [min=] [have=] [spot] [gpu=A100:8] [label=k:v] [taint=k:v]
//	pending KEY n=3 cpu=2 memory=4Gi [priority=] [gpu=1|gpu=500m] [model=] [label=k:v] [tolerate=k:v] [spot]
//	node ID pool=NAME [pinned] [KEY:N …]        replicas of pending lines with n=0
func TestPoolStories(t *testing.T) {
	datadriven.Walk(t, "testdata/pools", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			if d.Cmd != "grow" {
				t.Fatalf("command %s is not known", d.Cmd)
			}
			in := readPools(t, d)
			return showPools(GrowPools(in))
		})
	})
}

func readPools(t *testing.T, d *datadriven.TestData) PoolsInput {
	t.Helper()
	var in PoolsInput
	shapes := map[string]Shape{}
	for line := range strings.Lines(d.Input) {
		words := strings.Fields(line)
		opt := map[string]string{}
		for _, w := range words[2:] {
			k, v, _ := strings.Cut(w, "=")
			opt[k] = v
		}
		amount := func() api.Resources {
			c, err := api.ParseCPU(opt["cpu"])
			if err != nil {
				t.Fatal(err)
			}
			m, err := api.ParseBytes(opt["memory"])
			if err != nil {
				t.Fatal(err)
			}
			return api.Resources{CPUMilli: c, MemoryBytes: m}
		}
		number := func(k string) int { n, _ := strconv.Atoi(opt[k]); return n }
		k, v, _ := strings.Cut(opt["label"], ":")
		_, spot := opt["spot"]
		switch words[0] {
		case "pool":
			price, _ := strconv.ParseFloat(opt["price"], 64)
			p := Pool{Name: words[1], Size: amount(), HourMicros: int64(math.Round(price * 1e6)), Min: number("min"), Max: number("max"), Current: number("have"), Spot: spot, Labels: map[string]string{k: v}}
			if model, n, ok := strings.Cut(opt["gpu"], ":"); ok {
				count, _ := strconv.Atoi(n)
				p.Devices = []DeviceStock{{Kind: "gpu", Model: model, Count: count}}
			}
			if tk, tv, ok := strings.Cut(opt["taint"], ":"); ok {
				p.Taints = []*portolanv1.Taint{{Key: tk, Value: tv, Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE}}
			}
			in.Pools = append(in.Pools, p)
		case "pending":
			s := Shape{Key: words[1], Count: number("n"), Priority: number("priority"), Request: amount()}
			if k != "" {
				s.Selector = map[string]string{k: v}
			}
			if tk, tv, ok := strings.Cut(opt["tolerate"], ":"); ok {
				s.Tolerations = []*portolanv1.Toleration{{Key: tk, Value: tv}}
			}
			if g := opt["gpu"]; g != "" {
				need := &portolanv1.DeviceRequest{Count: int32(number("gpu"))}
				if milli, ok := strings.CutSuffix(g, "m"); ok {
					n, _ := strconv.Atoi(milli)
					need = &portolanv1.DeviceRequest{ShareMilli: int32(n)}
				}
				if opt["model"] != "" {
					need.Models = []string{opt["model"]}
				}
				s.Devices = []*portolanv1.DeviceRequest{need}
			}
			if spot {
				s.Capacity = portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED
			}
			in.Pending = append(in.Pending, s)
			s.Count = 1
			shapes[s.Key] = s
		case "node":
			_, pinned := opt["pinned"]
			n := PoolNode{ID: words[1], Pool: opt["pool"], Pinned: pinned}
			for _, w := range words[2:] {
				if key, count, ok := strings.Cut(w, ":"); ok {
					c, _ := strconv.Atoi(count)
					n.Replicas = append(n.Replicas, slices.Repeat([]Shape{shapes[key]}, c)...)
				}
			}
			in.Nodes = append(in.Nodes, n)
		}
	}
	return in
}

func showPools(p PoolsPlan) string {
	var b strings.Builder
	for _, c := range p.Changes {
		fmt.Fprintf(&b, "%s %+d, %+.2f an hour, %s: %s\n", c.Pool, c.Delta, float64(c.HourMicros)/1e6, c.Reason.GetCode(), c.Reason.GetMessage())
		if len(c.Nodes) > 0 {
			fmt.Fprintf(&b, "  %s\n", strings.Join(c.Nodes, " "))
		}
	}
	for _, f := range p.Fills {
		fmt.Fprintf(&b, "  %d nodes of %s:", f.Nodes, f.Pool)
		for _, k := range f.Takes {
			fmt.Fprintf(&b, " %d %s", k.Count, k.Key)
		}
		b.WriteString("\n")
	}
	for _, u := range p.Unmet {
		fmt.Fprintf(&b, "%d %s stay pending\n", u.Count, u.Key)
		for _, r := range u.Reasons {
			fmt.Fprintf(&b, "  %s: %s\n", r.GetCode(), r.GetMessage())
		}
	}
	if b.Len() == 0 {
		return "as it is\n"
	}
	return b.String()
}

func drawPools(t *rapid.T) PoolsInput {
	var in PoolsInput
	for i := range rapid.IntRange(1, 4).Draw(t, "pools") {
		p := Pool{
			Name: fmt.Sprintf("p%d", i), Size: api.Resources{CPUMilli: rapid.Int64Range(1, 8).Draw(t, "cpu") * 1000, MemoryBytes: rapid.Int64Range(1, 16).Draw(t, "memory") << 30},
			StorageBytes: 100 << 30, HourMicros: rapid.Int64Range(0, 20).Draw(t, "price") * 10000, Spot: rapid.IntRange(0, 4).Draw(t, "spot") == 0,
			Min: rapid.IntRange(0, 2).Draw(t, "min"), Current: rapid.IntRange(0, 3).Draw(t, "current"), Labels: map[string]string{"kind": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "label")},
		}
		if m := rapid.IntRange(0, 5).Draw(t, "max"); m > 0 {
			p.Max = max(m, p.Min, p.Current)
		} else {
			p.Min = 0
		}
		if n := rapid.IntRange(0, 4).Draw(t, "gpus"); n > 0 && i%2 == 0 {
			p.Devices = []DeviceStock{{Kind: "gpu", Model: rapid.SampledFrom([]string{"T4", "A100"}).Draw(t, "model"), Count: n}}
		}
		if rapid.IntRange(0, 3).Draw(t, "tainted") == 0 {
			p.Taints = []*portolanv1.Taint{{Key: "only", Value: "x", Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE}}
		}
		in.Pools = append(in.Pools, p)
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "shapes") {
		s := drawShape(t, fmt.Sprintf("s%d", i))
		s.Count = rapid.IntRange(1, 12).Draw(t, "count")
		in.Pending = append(in.Pending, s)
	}
	return in
}

func drawShape(t *rapid.T, key string) Shape {
	s := Shape{Key: key, Count: 1, Request: api.Resources{CPUMilli: rapid.Int64Range(0, 30).Draw(t, "cpu") * 100, MemoryBytes: rapid.Int64Range(0, 20).Draw(t, "memory") << 28}, StorageBytes: rapid.Int64Range(0, 3).Draw(t, "storage") << 34}
	s.Priority = rapid.IntRange(0, 1).Draw(t, "priority")
	if l := rapid.SampledFrom([]string{"", "", "a", "b"}).Draw(t, "selector"); l != "" {
		s.Selector = map[string]string{"kind": l}
	}
	if rapid.Bool().Draw(t, "tolerates") {
		s.Tolerations = []*portolanv1.Toleration{{Key: "only"}}
	}
	s.Capacity = portolanv1.CapacityType(rapid.IntRange(0, 3).Draw(t, "capacity"))
	switch rapid.IntRange(0, 5).Draw(t, "devices") {
	case 0:
		s.Devices = []*portolanv1.DeviceRequest{{Count: int32(rapid.IntRange(1, 2).Draw(t, "whole"))}}
	case 1:
		s.Devices = []*portolanv1.DeviceRequest{{ShareMilli: int32(rapid.IntRange(1, 9).Draw(t, "share") * 100), Models: []string{"T4"}}}
	}
	return s
}

// What is grown holds what it is said to hold, never exceeds a bound, and nothing
// stays pending that another node could have taken.
func TestGrownPoolsFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawPools(t)
		plan := GrowPools(in)
		grown, placed, filled := map[string]int{}, map[string]int{}, map[string]int{}
		for _, f := range plan.Fills {
			filled[f.Pool] += f.Nodes
			pool := in.Pools[slices.IndexFunc(in.Pools, func(p Pool) bool { return p.Name == f.Pool })]
			var all []Shape
			for _, k := range f.Takes {
				s := in.Pending[slices.IndexFunc(in.Pending, func(s Shape) bool { return s.Key == k.Key })]
				placed[k.Key] += k.Count * f.Nodes
				all = append(all, slices.Repeat([]Shape{s}, k.Count)...)
			}
			if why := overfull(pool, all); why != "" {
				t.Fatalf("a node of %s with %v: %s", f.Pool, f.Takes, why)
			}
		}
		for _, c := range plan.Changes {
			grown[c.Pool] = c.Delta
		}
		for _, p := range in.Pools {
			if n := p.Current + grown[p.Name]; n > p.Max && grown[p.Name] > 0 || n < p.Min {
				t.Fatalf("%s has %d nodes, of %d to %d", p.Name, n, p.Min, p.Max)
			}
			if filled[p.Name] > grown[p.Name] {
				t.Fatalf("%s grows by %d, and %d are filled", p.Name, grown[p.Name], filled[p.Name])
			}
		}
		for _, u := range plan.Unmet {
			placed[u.Key] += u.Count
			s := in.Pending[slices.IndexFunc(in.Pending, func(s Shape) bool { return s.Key == u.Key })]
			for _, p := range in.Pools {
				if p.Current+grown[p.Name] < p.Max && overfull(p, []Shape{s}) == "" {
					t.Fatalf("%s stays pending, and %s could grow for it", s.Key, p.Name)
				}
			}
		}
		for _, s := range in.Pending {
			if placed[s.Key] != s.Count {
				t.Fatalf("%d of %d %s are accounted for", placed[s.Key], s.Count, s.Key)
			}
		}
		slices.Reverse(in.Pending)
		slices.Reverse(in.Pools)
		if again := GrowPools(in); showPools(again) != showPools(plan) {
			t.Fatalf("another order gives another plan:\n%s\n%s", showPools(plan), showPools(again))
		}
	})
}

// overfull says by plain sums why replicas do not fit one node; devices by trying
// every assignment.
func overfull(p Pool, all []Shape) string {
	var cpu, mem, disk int64
	free := []int32{}
	for _, d := range p.Devices {
		free = append(free, slices.Repeat([]int32{1000}, d.Count)...)
	}
	var needs []*portolanv1.DeviceRequest
	for _, s := range all {
		cpu, mem, disk = cpu+s.Request.CPUMilli, mem+s.Request.MemoryBytes, disk+s.StorageBytes
		if s.Selector["kind"] != "" && s.Selector["kind"] != p.Labels["kind"] {
			return "selector"
		}
		if len(p.Taints) > 0 && len(s.Tolerations) == 0 {
			return "taint"
		}
		if p.Spot && s.Capacity < 2 || !p.Spot && s.Capacity == 3 {
			return "spot"
		}
		needs = append(needs, s.Devices...)
	}
	if cpu > p.Size.CPUMilli || mem > p.Size.MemoryBytes || disk > p.StorageBytes {
		return "size"
	}
	if !assignable(p, free, needs) {
		return "devices"
	}
	return ""
}

func assignable(p Pool, free []int32, needs []*portolanv1.DeviceRequest) bool {
	if len(needs) == 0 {
		return true
	}
	d := needs[0]
	if len(p.Devices) == 0 || len(d.GetModels()) > 0 && !slices.Contains(d.GetModels(), p.Devices[0].Model) {
		return false
	}
	if d.GetCount() > 0 {
		rest, need := slices.Clone(free), d.GetCount()
		for i := range rest {
			if rest[i] == 1000 && need > 0 {
				rest[i], need = 0, need-1
			}
		}
		return need == 0 && assignable(p, rest, needs[1:])
	}
	for i := range free {
		if free[i] >= d.GetShareMilli() {
			rest := slices.Clone(free)
			rest[i] -= d.GetShareMilli()
			if assignable(p, rest, needs[1:]) {
				return true
			}
		}
	}
	return false
}

// cheapest tries every number of nodes, for one resource.
func cheapest(pools []Pool, load []int64) int64 {
	best := int64(math.MaxInt64)
	var try func(i int, bins []int64, cost int64)
	try = func(i int, bins []int64, cost int64) {
		if cost >= best {
			return
		}
		if i == len(pools) {
			if packs(bins, load) {
				best = cost
			}
			return
		}
		for n := range pools[i].Max + 1 {
			try(i+1, append(slices.Clone(bins), slices.Repeat([]int64{pools[i].Size.CPUMilli}, n)...), cost+int64(n)*pools[i].HourMicros)
		}
	}
	try(0, nil, 0)
	return best
}

func packs(bins, load []int64) bool {
	if len(load) == 0 {
		return true
	}
	for i, b := range bins {
		if b < load[0] || slices.Contains(bins[:i], b) {
			continue
		}
		bins[i] -= load[0]
		ok := packs(bins, load[1:])
		bins[i] += load[0]
		if ok {
			return true
		}
	}
	return false
}

// The greedy choice costs at most twice what the best one does, on small inputs
// and with room for more.
func TestGrowthIsNearTheCheapest(t *testing.T) {
	worst := 1.0
	rapid.Check(t, func(t *rapid.T) {
		var in PoolsInput
		for i := range rapid.IntRange(1, 3).Draw(t, "pools") {
			size := rapid.Int64Range(2, 8).Draw(t, "size")
			in.Pools = append(in.Pools, Pool{Name: fmt.Sprintf("p%d", i), Size: api.Resources{CPUMilli: size, MemoryBytes: 1}, HourMicros: size*10 + rapid.Int64Range(0, 30).Draw(t, "more"), Max: 4})
		}
		var load []int64
		for i := range rapid.IntRange(1, 3).Draw(t, "shapes") {
			s := Shape{Key: fmt.Sprintf("s%d", i), Count: rapid.IntRange(1, 2).Draw(t, "count"), Request: api.Resources{CPUMilli: rapid.Int64Range(1, 4).Draw(t, "cpu")}}
			in.Pending = append(in.Pending, s)
			load = append(load, slices.Repeat([]int64{s.Request.CPUMilli}, s.Count)...)
		}
		slices.SortFunc(load, func(a, b int64) int { return int(b - a) })
		best := cheapest(in.Pools, load)
		plan := GrowPools(in)
		if best == math.MaxInt64 || len(plan.Unmet) > 0 {
			return
		}
		cost := int64(0)
		for _, c := range plan.Changes {
			cost += c.HourMicros
		}
		if cost < best {
			t.Fatalf("%d is cheaper than the cheapest, %d", cost, best)
		}
		worst = max(worst, float64(cost)/float64(best))
		if float64(cost) > 2*float64(best) {
			t.Fatalf("costs %d, %d is possible:\n%s", cost, best, showPools(plan))
		}
	})
	t.Logf("at worst %.2f times the cheapest", worst)
}

// What runs on nodes that go fits the others, beside what runs there; pinned ones
// and the least number stay.
func TestShrunkPoolsFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawPools(t)
		in.Pending = nil
		for i := range in.Pools {
			p := &in.Pools[i]
			p.Current = rapid.IntRange(p.Min, 4).Draw(t, "nodes")
			p.Max = max(p.Max, p.Current)
			for j := range p.Current {
				n := PoolNode{ID: fmt.Sprintf("%s-%d", p.Name, j), Pool: p.Name, Pinned: rapid.IntRange(0, 5).Draw(t, "pinned") == 0}
				for k := range rapid.IntRange(0, 3).Draw(t, "replicas") {
					s := drawShape(t, fmt.Sprintf("%s-r%d", n.ID, k))
					if overfull(*p, append(slices.Clone(n.Replicas), s)) == "" {
						n.Replicas = append(n.Replicas, s)
					}
				}
				in.Nodes = append(in.Nodes, n)
			}
		}
		plan := GrowPools(in)
		gone := map[string]bool{}
		for _, c := range plan.Changes {
			p := in.Pools[slices.IndexFunc(in.Pools, func(p Pool) bool { return p.Name == c.Pool })]
			if c.Delta != -len(c.Nodes) || p.Current+c.Delta < p.Min {
				t.Fatalf("%s: %d nodes, %+d, named %v, at least %d", p.Name, p.Current, c.Delta, c.Nodes, p.Min)
			}
			for _, id := range c.Nodes {
				gone[id] = true
			}
		}
		var homeless []Shape
		var stay []PoolNode
		for _, n := range in.Nodes {
			switch {
			case !gone[n.ID]:
				stay = append(stay, PoolNode{ID: n.ID, Pool: n.Pool, Replicas: slices.Clone(n.Replicas)})
			case n.Pinned:
				t.Fatalf("%s is pinned, and goes", n.ID)
			default:
				homeless = append(homeless, n.Replicas...)
			}
		}
		if len(homeless) <= 6 && !housed(in.Pools, stay, homeless) {
			t.Fatalf("what runs on %v fits nowhere", plan.Changes)
		}
	})
}

func housed(pools []Pool, nodes []PoolNode, homeless []Shape) bool {
	if len(homeless) == 0 {
		return true
	}
	for i := range nodes {
		p := pools[slices.IndexFunc(pools, func(p Pool) bool { return p.Name == nodes[i].Pool })]
		if overfull(p, append(slices.Clone(nodes[i].Replicas), homeless[0])) != "" {
			continue
		}
		nodes[i].Replicas = append(nodes[i].Replicas, homeless[0])
		if housed(pools, nodes, homeless[1:]) {
			return true
		}
		nodes[i].Replicas = nodes[i].Replicas[:len(nodes[i].Replicas)-1]
	}
	return false
}

// The input stays as it was.
func TestPoolsInputIsOnlyRead(t *testing.T) {
	in := PoolsInput{
		Pools:   []Pool{{Name: "b", Size: api.Resources{CPUMilli: 1000, MemoryBytes: 1 << 30}, Max: 3}, {Name: "a", Size: api.Resources{CPUMilli: 2000, MemoryBytes: 1 << 30}, Max: 3}},
		Pending: []Shape{{Key: "x", Count: 2, Request: api.Resources{CPUMilli: 900}, Devices: nil}, {Key: "y", Count: 1, Devices: []*portolanv1.DeviceRequest{{Count: 1}}}},
	}
	need := proto.CloneOf(in.Pending[1].Devices[0])
	before := fmt.Sprint(in.Pools, in.Pending[0])
	GrowPools(in)
	if after := fmt.Sprint(in.Pools, in.Pending[0]); before != after || !proto.Equal(need, in.Pending[1].Devices[0]) {
		t.Errorf("the input changed:\n%s\n%s", before, after)
	}
}

func BenchmarkGrowPools(b *testing.B) {
	in := PoolsInput{}
	for i := range 10 {
		in.Pools = append(in.Pools, Pool{Name: fmt.Sprintf("p%d", i), Size: api.Resources{CPUMilli: int64(i+2) * 4000, MemoryBytes: int64(i+2) * 8 << 30}, HourMicros: int64(i+2) * 100000, Max: 1000})
	}
	for i := range 100 {
		in.Pending = append(in.Pending, Shape{Key: fmt.Sprintf("s%d", i), Count: 200, Request: api.Resources{CPUMilli: int64(i%7+1) * 250, MemoryBytes: int64(i%5+1) << 29}})
	}
	b.ReportAllocs()
	for b.Loop() {
		if p := GrowPools(in); len(p.Unmet) > 0 {
			b.Fatal("not all fit")
		}
	}
}

package schedule

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// check runs a property SIM_CASES times (`make sim`), or as often as rapid does.
func check(t *testing.T, prop func(*rapid.T)) {
	t.Helper()
	if n := os.Getenv("SIM_CASES"); n != "" {
		if _, err := strconv.Atoi(n); err != nil {
			t.Fatal(err)
		}
		old := flag.Lookup("rapid.checks").Value.String()
		if err := flag.Set("rapid.checks", n); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = flag.Set("rapid.checks", old) }()
	}
	rapid.Check(t, prop)
}

// scene is a drawn world and a batch for it.
type scene struct {
	w       *world
	classes map[Owner]*Class
	groups  []Group
	wanted  []*wanted
	batch   Batch
	seed    uint64
	faults  faults
}

func pick[T any](t *rapid.T, label string, of ...T) T { return rapid.SampledFrom(of).Draw(t, label) }

// rarely is true one time in n.
func rarely(t *rapid.T, n int, label string) bool {
	return rapid.IntRange(0, n-1).Draw(t, label) == n-1
}

var effects = map[string]portolanv1.TaintEffect{
	"NoSchedule": portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE, "Prefer": portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE, "NoExecute": portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE,
}

func drawNode(t *rapid.T, id string, gpus bool) Node {
	f := &nodev1.NodeFacts{
		CpuMilli: rapid.Int64Range(0, 12).Draw(t, "cpu"), MemoryBytes: rapid.Int64Range(2, 12).Draw(t, "memory"), StorageBytes: rapid.Int64Range(0, 12).Draw(t, "storage"),
		Labels: map[string]string{},
	}
	n := Node{ID: id, Facts: f, Addresses: rapid.IntRange(0, 6).Draw(t, "addresses")}
	for _, values := range [][]string{{"zone", "a", "b", "a", "b", "c", ""}, {"rack", "1", "2", "3", ""}, {"disk", "ssd", "hdd", ""}, {"pool", "", "", "spot", "pack", "price", "frag"}} {
		if v := pick(t, values[0]+id, values[1:]...); v != "" {
			f.Labels[values[0]] = v
		}
	}
	switch {
	case rarely(t, 12, "down"):
		n.Down = pick(t, "why", NodeLost, NodeNotReady)
	case rarely(t, 12, "mode"):
		n.Mode = pick(t, "which", portolanv1.NodeMode_NODE_MODE_CORDONED, portolanv1.NodeMode_NODE_MODE_DRAINING)
	}
	for _, k := range []string{"k", "l"} {
		if rarely(t, 6, "taint") {
			f.Taints = append(f.Taints, &portolanv1.Taint{Key: k, Value: pick(t, "value", "v", "w"), Effect: effects[pick(t, "effect", "NoSchedule", "Prefer", "NoExecute")]})
		}
	}
	if rarely(t, 3, "image") {
		f.Images = []string{"sha256:x"}
	}
	if gpus {
		for k := range rapid.IntRange(0, 3).Draw(t, "gpus") {
			f.Devices = append(f.Devices, &nodev1.Device{Kind: "gpu", Model: pick(t, "model", "A", "B"), Index: int32(k)})
		}
	}
	return n
}

func drawTerm(t *rapid.T) *portolanv1.RequirementTerm {
	return &portolanv1.RequirementTerm{Requirements: []*portolanv1.Requirement{pick(
		t, "requirement",
		&portolanv1.Requirement{Key: "disk", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN, Values: []string{"ssd"}},
		&portolanv1.Requirement{Key: "disk", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_IN, Values: []string{"ssd"}},
		&portolanv1.Requirement{Key: "zone", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS},
		&portolanv1.Requirement{Key: "zone", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_EXISTS},
		&portolanv1.Requirement{Key: "rack", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_GREATER, Values: []string{"1"}},
		&portolanv1.Requirement{Key: "rack", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_LESS, Values: []string{"3"}},
	)}}
}

func drawSpec(t *rapid.T, workloads []string, gpus bool) *portolanv1.WorkloadSpec {
	s := &portolanv1.WorkloadSpec_Scheduling{}
	spec := &portolanv1.WorkloadSpec{Scheduling: s, Priority: pick[int32](t, "priority", 0, 0, 1, 5), NeverPreempt: rarely(t, 8, "never")}
	spec.Containers = []*portolanv1.Container{{Requests: &portolanv1.ResourceList{
		Cpu: fmt.Sprintf("%dm", rapid.IntRange(0, 5).Draw(t, "askcpu")), Memory: strconv.Itoa(rapid.IntRange(0, 5).Draw(t, "askmemory")),
		Storage: strconv.Itoa(pick(t, "askstorage", 0, 0, 0, 2)),
	}}}
	if rarely(t, 4, "hasimage") {
		spec.Containers[0].ResolvedImage = "r/x@sha256:x"
	}
	if rarely(t, 8, "select") {
		s.NodeSelector = map[string]string{"disk": "ssd"}
		if rarely(t, 3, "select2") {
			s.NodeSelector["zone"] = "a"
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "tolerations") {
		o := &portolanv1.Toleration{Key: pick(t, "tolkey", "k", "l"), Value: pick(t, "tolvalue", "", "v"), Effect: effects[pick(t, "toleffect", "", "NoExecute")]}
		if rarely(t, 4, "stay") {
			o.Stay = durationpb.New(5e9)
		}
		s.Tolerations = append(s.Tolerations, o)
	}
	if rarely(t, 5, "affine") {
		for range rapid.IntRange(1, 2).Draw(t, "terms") {
			s.NodeAffinity = append(s.NodeAffinity, drawTerm(t))
		}
	}
	if rarely(t, 5, "prefers") {
		s.PreferredNodes = append(s.PreferredNodes, &portolanv1.WorkloadSpec_PreferredNodes{Weight: int32(rapid.IntRange(1, 100).Draw(t, "weight")), Term: drawTerm(t)})
	}
	if rarely(t, 4, "spreads") {
		s.SpreadKey, s.MaxSkew = pick(t, "spreadkey", "zone", "rack", "node"), int32(rapid.IntRange(0, 2).Draw(t, "skew"))
	}
	if rarely(t, 5, "spreads2") {
		s.Spreads = append(s.Spreads, &portolanv1.WorkloadSpec_TopologySpread{TopologyKey: pick(t, "spreadkey2", "zone", "rack", "node"), MaxSkew: int32(rapid.IntRange(1, 2).Draw(t, "skew2")), Prefer: rapid.Bool().Draw(t, "preferspread")})
	}
	for range pick(t, "affinities", 0, 0, 0, 1, 1, 2) {
		s.Affinity = append(s.Affinity, &portolanv1.WorkloadSpec_WorkloadAffinity{
			Workload: pick(t, "other", workloads...), Anti: rapid.Bool().Draw(t, "anti"), TopologyKey: pick(t, "affinitykey", "zone", "rack", "node"),
			Prefer: rapid.Bool().Draw(t, "preferaffinity"), Weight: int32(rapid.IntRange(0, 100).Draw(t, "affinityweight")),
		})
	}
	if gpus {
		for range pick(t, "asks", 0, 1, 1, 2) {
			d := &portolanv1.DeviceRequest{Count: int32(rapid.IntRange(1, 2).Draw(t, "count"))}
			if rapid.Bool().Draw(t, "shared") {
				d.Count, d.ShareMilli = 0, pick[int32](t, "share", 300, 500, 700)
			}
			if rarely(t, 3, "models") {
				d.Models = []string{pick(t, "askmodel", "A", "B")}
			}
			s.Devices = append(s.Devices, d)
		}
	}
	switch rapid.IntRange(0, 19).Draw(t, "kind") {
	case 0:
		spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
	case 1:
		spec.Volumes = []*portolanv1.Volume{{Name: "data", Size: "2"}}
	case 2, 3:
		spec.Placement = &portolanv1.WorkloadSpec_Placement{Capacity: pick(t, "capacity", portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY, portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED)}
	case 4, 5:
		s.Gang = &portolanv1.WorkloadSpec_Gang{}
	}
	return spec
}

var drawnPools = Pools{
	CPUCoreHourMicros: 1000000, MemGiBHourMicros: 1 << 30,
	Pools: []*portolanv1.NodePool{
		{Name: "spot", Spot: true, CpuOvercommitPercent: 150},
		{Name: "pack", Scoring: portolanv1.Scoring_SCORING_PACK, Reserved: &portolanv1.ResourceList{Cpu: "1m", Memory: "1"}},
		{Name: "frag", Scoring: portolanv1.Scoring_SCORING_LEAST_FRAGMENTATION},
		{Name: "price", Scoring: portolanv1.Scoring_SCORING_PRICE, CpuCoreHourMicros: 500000, MemoryGibHourMicros: 1 << 29},
	},
}

func drawScene(t *rapid.T) *scene {
	sc := &scene{
		w: &world{nodes: map[string]Node{}, pools: drawnPools, replicas: map[string]*guest{}, volumes: map[string]volume{}}, classes: map[Owner]*Class{},
		seed: rapid.Uint64().Draw(t, "seed"), batch: Batch{Allowance: map[string]int{}},
	}
	gpus := rarely(t, 3, "hasgpus")
	for i := range rapid.IntRange(0, 5).Draw(t, "nodes") {
		n := drawNode(t, fmt.Sprintf("n%d", i), gpus)
		sc.w.nodes[n.ID] = n
	}
	workloads := []string{"w0", "w1", "w2"}
	specs := map[string]*portolanv1.WorkloadSpec{}
	kind := pick(t, "scene", anything, anything, ofGangs, crowded, ofShares)
	for _, name := range workloads {
		specs[name] = drawSpec(t, workloads, gpus)
		sc.batch.Allowance["t/"+name] = rapid.IntRange(0, 3).Draw(t, "allowance")
	}
	kind.shape(t, sc, specs)
	for i := range rapid.IntRange(0, 6).Draw(t, "bound") {
		sc.drawBound(t, i, specs, workloads)
	}
	for i := range rapid.IntRange(1, 3).Draw(t, "groups") {
		name := workloads[i]
		q := &wanted{spec: specs[name], owner: Owner{"t", name, "r1"}}
		if rarely(t, 10, "port") {
			q.ports = []int32{80}
		}
		g := Group{Key: "t/" + name + "/r1", Count: rapid.IntRange(kind.least(), 4).Draw(t, "replicas")}
		if rarely(t, 10, "pinned") {
			g.Node = fmt.Sprintf("n%d", rapid.IntRange(0, 4).Draw(t, "pin"))
			g.VolumesThere = rapid.Bool().Draw(t, "there")
		}
		if rarely(t, 10, "leaves") {
			g.NotOn = "n0"
		}
		q.node, q.notOn, q.volumesThere = g.Node, g.NotOn, g.VolumesThere
		sc.groups, sc.wanted = append(sc.groups, g), append(sc.wanted, q)
	}
	if kind == ofShares {
		// The last tells enough for all to be learned, whatever was known before.
		for i, q := range sc.wanted {
			n := rapid.IntRange(1, 4).Draw(t, "asked")
			if i == len(sc.wanted)-1 {
				n = firstLearn
			}
			sc.w.asked = append(sc.w.asked, asked{q, n})
		}
	}
	sc.batch.NoPreemption = rarely(t, 4, "nopreemption")
	return sc
}

// drawBound puts a replica somewhere, whether it fits there or not.
func (sc *scene) drawBound(t *rapid.T, i int, specs map[string]*portolanv1.WorkloadSpec, workloads []string) {
	name := pick(t, "boundof", workloads...)
	q := &wanted{spec: specs[name], owner: Owner{"t", name, pick(t, "revision", "r0", "r1", "r1")}, volumesThere: true}
	g := sc.w.add(fmt.Sprintf("b%d", i), q, Binding{Node: fmt.Sprintf("n%d", rapid.IntRange(0, 4).Draw(t, "on"))})
	g.Bound, g.Leaving, g.Ended = int64(rapid.IntRange(0, 2).Draw(t, "since")), rarely(t, 10, "leaving"), rarely(t, 15, "ended")
	for _, d := range sc.w.nodes[g.Node].Facts.GetDevices() {
		if len(g.Devices) == 0 && rapid.Bool().Draw(t, "holds") {
			g.Devices = []Share{{d.GetKind(), d.GetIndex(), pick[int32](t, "holdsmilli", 300, 1000)}}
		}
	}
}

func (sc *scene) class(t *rapid.T, q *wanted) *Class {
	k := q.owner
	if len(q.ports) > 0 {
		k.Revision += "+port"
	}
	if c, ok := sc.classes[k]; ok {
		return c
	}
	c, err := Compile(q.spec, Options{Owner: q.owner, Overhead: q.overhead, Ports: q.ports})
	if err != nil {
		t.Fatal(err)
	}
	sc.classes[k] = c
	return c
}

// table makes the world into a table, in a drawn order and with detours.
func (sc *scene) table(t *rapid.T, label string) *Table {
	tab := NewTable(sc.seed)
	tab.faults = sc.faults
	var steps []func()
	for _, n := range sorted(sc.w.nodes) {
		steps = append(steps, func() { tab.PutNode(n) })
	}
	for _, g := range sorted(sc.w.replicas) {
		r := g.Replica
		r.Class = sc.class(t, &wanted{spec: g.spec, owner: g.owner, overhead: g.overhead, ports: g.ports})
		steps = append(steps, func() { tab.PutReplica(r) })
	}
	for _, id := range slices.Sorted(maps.Keys(sc.w.volumes)) {
		v := sc.w.volumes[id]
		steps = append(steps, func() { tab.PutVolume(id, v.node, v.bytes) })
	}
	steps = append(steps, func() { tab.SetPools(sc.w.pools) })
	order := rapid.Permutation(sequence(len(steps))).Draw(t, label)
	for _, k := range order {
		if rarely(t, 6, label+"detour") && len(sc.w.nodes) > 0 {
			id := slices.Sorted(maps.Keys(sc.w.nodes))[0]
			n := sc.w.nodes[id]
			other := proto.Clone(n.Facts).(*nodev1.NodeFacts)
			other.Labels = map[string]string{"zone": "c"}
			tab.PutNode(Node{ID: id, Facts: other, Addresses: 3})
			Schedule(tab, sc.batchFor(t))
			tab.DeleteNode(id)
			defer tab.PutNode(n)
		}
		steps[k]()
	}
	for _, n := range sc.w.nodes {
		tab.PutNode(n)
	}
	for _, x := range sc.w.asked {
		tab.Observe(sc.class(t, x.q), x.n)
		sc.w.learned = &tab.fragments
	}
	return tab
}

func sequence(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

func sorted[V any](m map[string]V) []V {
	var out []V
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}

func (sc *scene) batchFor(t *rapid.T) Batch {
	b := sc.batch
	for i, g := range sc.groups {
		g.Class = sc.class(t, sc.wanted[i])
		b.Groups = append(b.Groups, g)
	}
	return b
}

// copyResult takes a result out of the table's memory.
func copyResult(r Result) []Placed {
	out := slices.Clone(r.Placed)
	for i := range out {
		out[i].Bindings = append([]Binding(nil), out[i].Bindings...)
		for k := range out[i].Bindings {
			out[i].Bindings[k].Devices = slices.Clone(out[i].Bindings[k].Devices)
		}
	}
	return out
}

// Every decision is one that the dumb world allows, and none that it does not; the
// table is as it was, and neither the order of its changes nor asking twice matters.
func TestAgainstBruteForce(t *testing.T) {
	check(t, func(t *rapid.T) {
		sc := drawScene(t)
		tab := sc.table(t, "order")
		b := sc.batchFor(t)
		t.Log(sc.dump())
		out := copyResult(Schedule(tab, b))
		if again := copyResult(Schedule(tab, b)); show(out) != show(again) {
			t.Fatalf("asked twice:\n%s\n%s", show(out), show(again))
		}
		if other := copyResult(Schedule(sc.table(t, "other"), b)); show(out) != show(other) {
			t.Fatalf("another way to the same table:\n%s\n%s", show(out), show(other))
		}
		sc.verifyAll(t, out)
	})
}

// show gives the bytes of a result.
func show(out []Placed) string {
	b, err := json.MarshalIndent(out, "", " ")
	if err != nil {
		panic(err)
	}
	return string(b)
}

// dump is the world in words, for a failure.
func (sc *scene) dump() string {
	s := fmt.Sprintf("allowance %v nopreemption %v\n", sc.batch.Allowance, sc.batch.NoPreemption)
	for _, n := range sorted(sc.w.nodes) {
		s += fmt.Sprintf("node %s addresses %d mode %v down %v: %v\n", n.ID, n.Addresses, n.Mode, n.Down, n.Facts)
	}
	for _, g := range sorted(sc.w.replicas) {
		s += fmt.Sprintf("replica %s of %v on %s priority %d bound %d leaving %v ended %v promised %v devices %v\n", g.ID, g.owner, g.Node, g.spec.GetPriority(), g.Bound, g.Leaving, g.Ended, g.promised, g.Devices)
	}
	for i, q := range sc.wanted {
		s += fmt.Sprintf("group %d %v x%d node %q not on %q there %v ports %v: %v\n", i, q.owner, sc.groups[i].Count, q.node, q.notOn, q.volumesThere, q.ports, q.spec)
	}
	return s
}

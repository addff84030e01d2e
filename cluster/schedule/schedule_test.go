package schedule

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The stories in testdata/stories. Commands:
//
//	node n1 [cpu=4000] [memory=8192] [zone=a] [taint=(key,Effect)] [notready=Code] [addresses=N]
//	used n1 cpu=… memory=…       what runs there already
//	place key n=3 [cpu=500] [memory=256] [select=(k:v)] [tolerate=key] [spread=zone] [skew=1] [node=n1] [pack] [running=(n1:2)]
//
// Nodes keep what was placed on them.
func TestStories(t *testing.T) {
	told := 0
	defer func() {
		if told == 0 {
			t.Error("no story was told")
		}
	}()
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		told++
		var nodes []Node
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			switch d.Cmd {
			case "node":
				nodes = append(nodes, parseNode(t, d))
				return ""
			case "place":
				g := parseGroup(t, d)
				p := Schedule(Input{Nodes: nodes, Groups: []Group{g}, Seed: 1})[0]
				for _, i := range p.Nodes {
					nodes[i].Used = nodes[i].Used.Add(g.Request)
					if g.Address {
						nodes[i].Addresses--
					}
				}
				return tell(nodes, p)
			}
			t.Fatalf("command %s is not known", d.Cmd)
			return ""
		})
	})
}

func tell(nodes []Node, p Placed) string {
	n := map[string]int{}
	for _, i := range p.Nodes {
		n[nodes[i].ID]++
	}
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(n)) {
		fmt.Fprintf(&b, "%s: %d\n", id, n[id])
	}
	if p.Missing > 0 {
		fmt.Fprintf(&b, "%d find no node:\n", p.Missing)
		for _, r := range p.Refusals {
			fmt.Fprintf(&b, "  %s: %s\n", r.Code, r.Message)
		}
	}
	return b.String()
}

func number(t *testing.T, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

var effects = map[string]portolanv1.TaintEffect{
	"NoSchedule": portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE, "Prefer": portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE, "NoExecute": portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE,
}

func parseNode(t *testing.T, d *datadriven.TestData) Node {
	t.Helper()
	n := Node{ID: d.CmdArgs[0].Key, Capacity: api.Resources{CPUMilli: 4000, MemoryBytes: 8 << 30}, Addresses: 253, Labels: map[string]string{}}
	for _, a := range d.CmdArgs[1:] {
		switch a.Key {
		case "cpu":
			n.Capacity.CPUMilli = number(t, a.Vals[0])
		case "memory":
			n.Capacity.MemoryBytes = number(t, a.Vals[0]) << 20
		case "usedcpu":
			n.Used.CPUMilli = number(t, a.Vals[0])
		case "addresses":
			n.Addresses = int(number(t, a.Vals[0]))
		case "taint":
			n.Taints = append(n.Taints, &portolanv1.Taint{Key: a.Vals[0], Effect: effects[a.Vals[1]]})
		case "notready":
			n.NotReady = a.Vals[0]
		default:
			n.Labels[a.Key] = a.Vals[0]
		}
	}
	return n
}

func parseGroup(t *testing.T, d *datadriven.TestData) Group {
	t.Helper()
	g := Group{Key: d.CmdArgs[0].Key, Count: 1, Request: api.Resources{CPUMilli: 500, MemoryBytes: 256 << 20}, Selector: map[string]string{}, Running: map[string]int{}, Address: true}
	for _, a := range d.CmdArgs[1:] {
		switch a.Key {
		case "n":
			g.Count = int(number(t, a.Vals[0]))
		case "cpu":
			g.Request.CPUMilli = number(t, a.Vals[0])
		case "memory":
			g.Request.MemoryBytes = number(t, a.Vals[0]) << 20
		case "select":
			k, v, _ := strings.Cut(a.Vals[0], ":")
			g.Selector[k] = v
		case "tolerate":
			g.Tolerations = append(g.Tolerations, &portolanv1.Toleration{Key: a.Vals[0]})
		case "spread":
			g.SpreadKey = a.Vals[0]
		case "skew":
			g.MaxSkew = int(number(t, a.Vals[0]))
		case "node":
			g.Node = a.Vals[0]
		case "pack":
			g.Pack = true
		case "running":
			for _, v := range a.Vals {
				id, n, _ := strings.Cut(v, ":")
				g.Running[id] = int(number(t, n))
			}
		default:
			t.Fatalf("argument %s is not known", a.Key)
		}
	}
	return g
}

// drawInput makes a small cluster with everything in it.
func drawInput(t *rapid.T) Input {
	in := Input{Seed: rapid.Uint64().Draw(t, "seed")}
	for i := range rapid.IntRange(0, 6).Draw(t, "nodes") {
		n := Node{
			ID: fmt.Sprintf("n%d", i), Capacity: api.Resources{CPUMilli: rapid.Int64Range(0, 8).Draw(t, "cpu"), MemoryBytes: rapid.Int64Range(0, 8).Draw(t, "memory")},
			Addresses: rapid.IntRange(0, 5).Draw(t, "addresses"), Labels: map[string]string{},
			NotReady: rapid.SampledFrom([]string{"", "", "", NodeLost, NodeNotReady}).Draw(t, "notready"),
		}
		n.Used = api.Resources{CPUMilli: rapid.Int64Range(0, 3).Draw(t, "usedcpu"), MemoryBytes: rapid.Int64Range(0, 3).Draw(t, "usedmemory")}
		for _, k := range []string{"zone", "disk"} {
			if v := rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, k); v != "" {
				n.Labels[k] = v
			}
		}
		if e := rapid.SampledFrom([]string{"", "", "NoSchedule", "Prefer", "NoExecute"}).Draw(t, "taint"); e != "" {
			n.Taints = []*portolanv1.Taint{{Key: "k", Effect: effects[e]}}
		}
		in.Nodes = append(in.Nodes, n)
	}
	for i := range rapid.IntRange(1, 4).Draw(t, "groups") {
		g := Group{
			Key: fmt.Sprintf("g%d", i), Count: rapid.IntRange(0, 8).Draw(t, "count"), Pack: rapid.Bool().Draw(t, "pack"), Address: rapid.Bool().Draw(t, "address"),
			Request:   api.Resources{CPUMilli: rapid.Int64Range(0, 3).Draw(t, "requestcpu"), MemoryBytes: rapid.Int64Range(0, 3).Draw(t, "requestmemory")},
			SpreadKey: rapid.SampledFrom([]string{"", "", "zone", NodeKey}).Draw(t, "spread"), MaxSkew: rapid.IntRange(0, 2).Draw(t, "skew"), Running: map[string]int{},
		}
		if v := rapid.SampledFrom([]string{"", "", "a", "b"}).Draw(t, "select"); v != "" {
			g.Selector = map[string]string{"disk": v}
		}
		if rapid.Bool().Draw(t, "tolerates") {
			g.Tolerations = []*portolanv1.Toleration{{Key: "k"}}
		}
		for _, n := range in.Nodes {
			if c := rapid.IntRange(-2, 2).Draw(t, "running"); c > 0 {
				g.Running[n.ID] = c
			}
		}
		in.Groups = append(in.Groups, g)
	}
	return in
}

// allowed is the dumb form of every constraint but capacity and spread.
func allowed(n Node, g Group) bool {
	if n.NotReady != "" {
		return false
	}
	for k, v := range g.Selector {
		if n.Labels[k] != v {
			return false
		}
	}
	for _, taint := range n.Taints {
		if len(g.Tolerations) == 0 && taint.GetEffect() != effects["Prefer"] {
			return false
		}
	}
	return g.SpreadKey != "zone" || g.MaxSkew == 0 || n.Labels["zone"] != ""
}

func domain(n Node, g Group) string {
	if g.SpreadKey == NodeKey {
		return n.ID
	}
	return n.Labels[g.SpreadKey]
}

// Whatever is asked for: never over capacity, never on a node that refuses, never
// beyond max_skew by its own doing, always the same, and as many as a search over
// all ways of placing them finds room for.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		out := Schedule(in)
		if again := Schedule(in); !reflect.DeepEqual(out, again) {
			t.Fatalf("two results of one input: %+v, %+v", out, again)
		}
		nodes := slices.Clone(in.Nodes)
		for i, p := range out {
			g := in.Groups[i]
			if best := most(nodes, g); len(p.Nodes) != best || p.Missing != g.Count-best {
				t.Fatalf("group %+v on %+v: %d placed and %d missing, %d have room", g, nodes, len(p.Nodes), p.Missing, best)
			}
			counts := domainCounts(nodes, g)
			for _, n := range p.Nodes {
				nd := &nodes[n]
				if !allowed(*nd, g) {
					t.Fatalf("group %+v on node %+v", g, *nd)
				}
				nd.Used = nd.Used.Add(g.Request)
				if g.Address {
					nd.Addresses--
				}
				if !nd.Used.Fits(nd.Capacity) && (g.Request.CPUMilli > 0 && nd.Used.CPUMilli > nd.Capacity.CPUMilli || g.Request.MemoryBytes > 0 && nd.Used.MemoryBytes > nd.Capacity.MemoryBytes) || nd.Addresses < 0 {
					t.Fatalf("node %+v is over its capacity", *nd)
				}
				if g.SpreadKey != "" && g.MaxSkew > 0 {
					counts[domain(*nd, g)]++
					if least := slices.Min(slices.Collect(maps.Values(counts))); counts[domain(*nd, g)]-least > g.MaxSkew {
						t.Fatalf("group %+v: %v is beyond max_skew", g, counts)
					}
				}
			}
			if p.Missing > 0 && len(p.Refusals) == 0 {
				t.Fatalf("group %+v: %d are missing without a reason", g, p.Missing)
			}
		}
	})
}

func domainCounts(nodes []Node, g Group) map[string]int {
	counts := map[string]int{}
	for _, n := range nodes {
		if allowed(n, g) {
			counts[domain(n, g)] += 0
		}
	}
	for _, n := range nodes {
		if _, ok := counts[domain(n, g)]; ok {
			counts[domain(n, g)] += g.Running[n.ID]
		}
	}
	return counts
}

// most is how many replicas of a group could be placed at most, by trying every
// number in every domain.
func most(nodes []Node, g Group) int {
	room := map[string]int{}
	for _, n := range nodes {
		if !allowed(n, g) {
			continue
		}
		k := 0
		for k < g.Count {
			used := n.Used.Add(g.Request.Times(int64(k + 1)))
			if used.CPUMilli > n.Capacity.CPUMilli || used.MemoryBytes > n.Capacity.MemoryBytes || (g.Address && k >= n.Addresses) {
				break
			}
			k++
		}
		room[domain(n, g)] += k
	}
	if g.SpreadKey == "" || g.MaxSkew == 0 {
		sum := 0
		for _, r := range room {
			sum += r
		}
		return min(sum, g.Count)
	}
	counts := domainCounts(nodes, g)
	best := 0
	var try func(ds []string, placed map[string]int, total int)
	try = func(ds []string, placed map[string]int, total int) {
		if len(ds) == 0 {
			if total <= g.Count && reachable(counts, placed, g.MaxSkew) {
				best = max(best, total)
			}
			return
		}
		for k := 0; k <= min(room[ds[0]], g.Count-total); k++ {
			placed[ds[0]] = k
			try(ds[1:], placed, total+k)
		}
		delete(placed, ds[0])
	}
	try(slices.Sorted(maps.Keys(room)), map[string]int{}, 0)
	return best
}

// reachable says that no domain that grew is beyond max_skew at the end.
func reachable(counts, placed map[string]int, skew int) bool {
	least := -1
	for d, c := range counts {
		if v := c + placed[d]; least < 0 || v < least {
			least = v
		}
	}
	for d, k := range placed {
		if k > 0 && counts[d]+k-least > skew {
			return false
		}
	}
	return true
}

func TestAdmit(t *testing.T) {
	gpu := map[string]string{"gpu": "yes"}
	for _, c := range []struct {
		name        string
		labels      map[string]string
		taint       string
		spec        *portolanv1.WorkloadSpec_Scheduling
		begin, stay bool
	}{
		{"plain", nil, "", nil, true, true},
		{"selector", nil, "", &portolanv1.WorkloadSpec_Scheduling{NodeSelector: gpu}, false, true},
		{"selected", gpu, "", &portolanv1.WorkloadSpec_Scheduling{NodeSelector: gpu}, true, true},
		{"tainted", nil, "NoSchedule", nil, false, true},
		{"driven out", nil, "NoExecute", nil, false, false},
		{"disliked", nil, "Prefer", nil, true, true},
		{"tolerated", nil, "NoExecute", &portolanv1.WorkloadSpec_Scheduling{Tolerations: []*portolanv1.Toleration{{Key: "k"}}}, true, true},
		{"other effect tolerated", nil, "NoExecute", &portolanv1.WorkloadSpec_Scheduling{Tolerations: []*portolanv1.Toleration{{Key: "k", Effect: effects["NoSchedule"]}}}, false, false},
	} {
		var taints []*portolanv1.Taint
		if c.taint != "" {
			taints = []*portolanv1.Taint{{Key: "k", Value: "v", Effect: effects[c.taint]}}
		}
		if begin, stay := Admit(c.labels, taints, &portolanv1.WorkloadSpec{Scheduling: c.spec}); begin != c.begin || stay != c.stay {
			t.Errorf("%s: begin %v stay %v", c.name, begin, stay)
		}
	}
}

func TestRequests(t *testing.T) {
	r, err := Requests(&portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "250m", Memory: "64Mi"}}}}, DefaultOverhead)
	if err != nil || r.CPUMilli != 300 || r.MemoryBytes != 114<<20 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Requests(&portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "much"}}}}, DefaultOverhead); err == nil {
		t.Error("a bad amount was accepted")
	}
}

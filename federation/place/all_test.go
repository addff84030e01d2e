package place

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// item is a workload of single-core replicas.
func item(tenant, id string, priority, replicas int32) Item {
	spec := &portolanv1.WorkloadSpec{
		Replicas: &replicas, Priority: priority, Update: &portolanv1.WorkloadSpec_UpdateStrategy{MaxUnavailable: new(int32(1))},
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "1"}}}, Placement: &portolanv1.WorkloadSpec_Placement{},
	}
	rev, err := NewRevision("r", spec)
	if err != nil {
		panic(err)
	}
	return Item{Name: tenant + "/" + id, Tenant: tenant, Workload: Workload{ID: id, Spec: spec, Revisions: []Revision{rev}}}
}

func site(id string, cores int64) Cluster {
	return Cluster{ID: id, State: portolanv1.ClusterState_CLUSTER_STATE_READY, Nodes: 1, Spec: &portolanv1.ClusterSpec{Region: id}, Free: api.Resources{CPUMilli: 1000 * cores, MemoryBytes: 1 << 30}}
}

// after makes what was planned what is held.
func (w World) after(plans []Plan) World {
	w.Workloads = slices.Clone(w.Workloads)
	for i, p := range plans {
		w.Workloads[i].Held = nil
		for _, a := range p.Assignments {
			w.Workloads[i].Held = append(w.Workloads[i].Held, Held{Cluster: a.Cluster, Previous: Previous{
				Present: true, Declared: max(a.Replicas, a.Max) - a.Failover, Failover: a.Failover, Claim: a.Claim, Basis: p.Basis,
			}})
		}
	}
	return w
}

func placed(p Plan) int {
	n := 0
	for _, a := range p.Assignments {
		n += max(a.Replicas, a.Max)
	}
	return n
}

// TestFair: tenants that want more than there is get it in proportion to their
// weights, within one workload.
func TestFair(t *testing.T) {
	w := World{Clusters: []Cluster{site("a", 30), site("b", 30)}}
	for i := range 40 {
		w.Workloads = append(w.Workloads, item("one", fmt.Sprintf("w%02d", i), 0, 2), item("two", fmt.Sprintf("w%02d", i), 0, 2))
		w.Workloads[len(w.Workloads)-1].Weight = 2
	}
	got := map[string]int{}
	for i, p := range PlaceAll(w, epoch) {
		got[w.Workloads[i].Tenant] += placed(p)
	}
	if got["one"]+got["two"] != 60 || got["one"] < 18 || got["one"] > 22 {
		t.Errorf("60 cores are shared %v, want 20 and 40 within 2", got)
	}
}

// TestWhatIf: a cluster lost, drained, cordoned, added and removed.
func TestWhatIf(t *testing.T) {
	w := World{Clusters: []Cluster{site("a", 10), site("b", 10)}}
	web := item("t", "web", 0, 8)
	web.Workload.Spec.Placement.Failover = &portolanv1.WorkloadSpec_Failover{}
	w.Workloads = []Item{web, item("t", "plain", 0, 4)}
	w = w.after(PlaceAll(w, epoch))
	text := func(w World) string {
		out := ""
		for i, p := range PlaceAll(w, epoch) {
			for _, a := range p.Assignments {
				out += fmt.Sprintf("%s@%s %d", w.Workloads[i].Workload.ID, a.Cluster, a.Replicas)
				if a.Failover > 0 {
					out += fmt.Sprintf("(%d)", a.Failover)
				}
				out += " "
			}
			if p.Unplaced+p.FailoverUnplaced > 0 {
				out += fmt.Sprintf("short %d ", p.Unplaced+p.FailoverUnplaced)
			}
		}
		return out
	}
	for _, c := range []struct {
		name string
		ch   Change
		c    Cluster
		want string
	}{
		{"lost", Lose, Cluster{ID: "a"}, "web@a 4 web@b 8(4) plain@a 2 plain@b 2 "},
		{"drained", Drain, Cluster{ID: "a"}, "web@b 6 short 2 plain@b 4 "},
		{"cordoned", Cordon, Cluster{ID: "a"}, "web@a 4 web@b 4 plain@a 2 plain@b 2 "},
		{"added", Add, site("c", 10), "web@a 4 web@b 4 plain@a 2 plain@b 2 "},
		{"removed", Remove, Cluster{ID: "a"}, "web@b 6 short 2 plain@b 4 "},
	} {
		if got := text(w.With(c.ch, c.c)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if got := text(w); got != "web@a 4 web@b 4 plain@a 2 plain@b 2 " {
		t.Errorf("the World was changed: %s", got)
	}
}

func drawWorld(t *rapid.T) World {
	var w World
	for i := range rapid.IntRange(1, 4).Draw(t, "clusters") {
		c := site(fmt.Sprintf("c%d", i), rapid.Int64Range(0, 12).Draw(t, "cores"))
		c.Spot = api.Resources{CPUMilli: 1000 * rapid.SampledFrom([]int64{0, 0, 4}).Draw(t, "spot"), MemoryBytes: 1 << 30}
		w.Clusters = append(w.Clusters, c)
	}
	for i := range rapid.IntRange(1, 8).Draw(t, "workloads") {
		it := item(rapid.SampledFrom([]string{"t", "u"}).Draw(t, "tenant"), fmt.Sprintf("w%d", i), rapid.SampledFrom([]int32{0, 0, 5, 9}).Draw(t, "priority"), rapid.Int32Range(0, 8).Draw(t, "replicas"))
		p := it.Workload.Spec.GetPlacement()
		p.Capacity = rapid.SampledFrom([]portolanv1.CapacityType{0, 0, 0, 2, 3}).Draw(t, "capacity")
		p.Exclusive = oneIn(t, 8, "exclusive")
		it.Workload.Spec.NeverPreempt = oneIn(t, 4, "polite")
		if oneIn(t, 3, "rule") {
			p.Failover = &portolanv1.WorkloadSpec_Failover{}
		}
		if oneIn(t, 6, "affinity") {
			p.Affinity = []*portolanv1.WorkloadSpec_ClusterAffinity{{Workload: "w0", Anti: rapid.Bool().Draw(t, "anti")}}
		}
		if !p.GetExclusive() && oneIn(t, 8, "daemon") {
			it.Workload.Spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
		}
		w.Workloads = append(w.Workloads, it)
	}
	return w
}

// checkWorld: no cluster is promised more than it has, spot and on demand apart,
// and nobody loses anything to its like.
func checkWorld(t *rapid.T, w World, plans []Plan) {
	pots := map[string]*Pot{}
	for _, c := range w.Clusters {
		pots[c.ID] = &Pot{OnDemand: c.Free, Spot: c.Spot}
	}
	byName := map[string]*Item{}
	for i := range w.Workloads {
		byName[w.Workloads[i].Name] = &w.Workloads[i]
	}
	for i, p := range plans {
		for _, a := range p.Assignments {
			pots[a.Cluster].Book(CapacityOf(w.Workloads[i].Workload.Spec), a.Claim)
		}
		for _, v := range p.Displaced {
			me, victim := w.Workloads[i].Workload.Spec, byName[v.Workload].Workload.Spec
			if victim.GetPriority() >= me.GetPriority() || me.GetNeverPreempt() || victim.GetPlacement().GetExclusive() {
				t.Errorf("%s displaced %+v", w.Workloads[i].Name, v)
			}
		}
	}
	for id, pot := range pots {
		if onDemand, spot := pot.Free(); onDemand.CPUMilli < 0 || spot.CPUMilli < 0 {
			t.Errorf("%s is overcommitted: %+v on demand, %+v on spot", id, onDemand, spot)
		}
	}
}

// TestWorlds: of many workloads at once, new, grown under pressure, and after a
// cluster is lost: no cluster is overcommitted, nothing moves twice, and who
// matters more is never short where who matters less has room that would help.
func TestWorlds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		plans := PlaceAll(w, epoch)
		checkWorld(t, w, plans)
		if d := cmp.Diff(plans, PlaceAll(w, epoch)); d != "" {
			t.Errorf("the same World, another plan:\n%s", d)
		}
		w = w.after(plans)
		// Who must be near another can only follow when that is placed, in the next round.
		related := slices.ContainsFunc(w.Workloads, func(it Item) bool { return len(it.Workload.Spec.GetPlacement().GetAffinity()) > 0 })
		for i, p := range PlaceAll(w, epoch) {
			if !related && (p.Moved > 0 || len(p.Displaced) > 0) {
				t.Errorf("asked again, %s moves %d and displaces %v", w.Workloads[i].Name, p.Moved, p.Displaced)
			}
		}
		more := item("t", "new", 7, rapid.Int32Range(1, 12).Draw(t, "new"))
		more.Workload.Spec.NeverPreempt = oneIn(t, 4, "polite")
		w.Workloads = append(slices.Clone(w.Workloads), more)
		plans = PlaceAll(w, epoch)
		checkWorld(t, w, plans)
		checkServed(t, w, plans)
		if ch := rapid.SampledFrom([]Change{Lose, Drain, Cordon, Remove}).Draw(t, "change"); ch != Remove {
			lost := w.after(plans).With(ch, Cluster{ID: "c0"})
			checkWorld(t, lost, PlaceAll(lost, epoch))
		}
	})
}

// checkServed: when the newcomer is short, no lower priority that could be
// displaced has a replica in any cluster.
func checkServed(t *rapid.T, w World, plans []Plan) {
	last := len(plans) - 1
	if plans[last].Unplaced == 0 || w.Workloads[last].Workload.Spec.GetNeverPreempt() {
		return
	}
	for i, p := range plans[:last] {
		spec := w.Workloads[i].Workload.Spec
		if spec.GetPriority() < 7 && !spec.GetPlacement().GetExclusive() && class(spec.GetPlacement().GetCapacity()) == 0 && placed(p) > 0 {
			t.Errorf("%d of the newcomer are short while %s has %d", plans[last].Unplaced, w.Workloads[i].Name, placed(p))
		}
	}
}

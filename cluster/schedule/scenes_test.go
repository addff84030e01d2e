package schedule

import (
	"fmt"
	"maps"
	"slices"

	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// sceneKind is what a scene is about: what is drawn from everything rarely has
// what only some parts of the scheduler come to.
type sceneKind int

const (
	anything sceneKind = iota
	ofGangs            // that several terms bind
	crowded            // with many that may be displaced
	ofShares           // of devices, where fragmentation counts
)

// shape makes the workloads of a scene, and its nodes, what it is about.
func (k sceneKind) shape(t *rapid.T, sc *scene, specs map[string]*portolanv1.WorkloadSpec) {
	switch k {
	case ofGangs:
		shapeGangs(t, sc, specs)
	case crowded:
		shapeCrowd(t, sc, specs)
	case ofShares:
		shapeShares(t, sc, specs)
	}
}

func askLittle(t *rapid.T, spec *portolanv1.WorkloadSpec, least, most int) {
	spec.Containers[0].Requests = &portolanv1.ResourceList{Cpu: fmt.Sprintf("%dm", rapid.IntRange(least, most).Draw(t, "kindcpu")), Memory: "1"}
}

// shapeGangs makes gangs that must keep apart in several ways at once.
func shapeGangs(t *rapid.T, sc *scene, specs map[string]*portolanv1.WorkloadSpec) {
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		spec := specs[name]
		askLittle(t, spec, 1, 3)
		spec.Kind = 0
		if rapid.Bool().Draw(t, "nothingelse") {
			spec.Scheduling = &portolanv1.WorkloadSpec_Scheduling{}
		}
		spec.Scheduling.Gang = &portolanv1.WorkloadSpec_Gang{}
		for _, key := range pick(t, "keeps", []string{"rack", "node"}, []string{"zone", "rack"}, []string{"zone", "rack"}, []string{"rack"}) {
			spec.Scheduling.Affinity = append(spec.Scheduling.Affinity, &portolanv1.WorkloadSpec_WorkloadAffinity{Workload: name, TopologyKey: key, Anti: !rarely(t, 4, "together")})
		}
	}
	sc.level(t)
}

// level makes nodes alike, of few domains, and open: what keeps replicas from them
// is what is bound.
func (sc *scene) level(t *rapid.T) {
	for _, n := range sorted(sc.w.nodes) {
		f := n.Facts
		delete(f.Labels, "pool")
		f.Labels["zone"], f.Labels["rack"] = pick(t, "levelzone", "a", "b"), pick(t, "levelrack", "1", "2")
		f.CpuMilli, f.MemoryBytes, f.StorageBytes = rapid.Int64Range(3, 8).Draw(t, "levelcpu"), 12, 12
		if !rarely(t, 4, "closed") {
			f.Taints, n.Mode, n.Down = nil, 0, 0
		}
		n.Addresses = max(n.Addresses, 2)
		sc.w.nodes[n.ID] = n
	}
}

// shapeCrowd makes one workload that may displace the others.
func shapeCrowd(t *rapid.T, sc *scene, specs map[string]*portolanv1.WorkloadSpec) {
	askLittle(t, specs["w0"], 1, 3)
	askLittle(t, specs["w1"], 2, 5)
	specs["w0"].Priority, specs["w1"].Priority, specs["w2"].Priority = pick[int32](t, "low", 0, 1), 5, pick[int32](t, "between", 0, 2)
	specs["w1"].NeverPreempt = false
	switch high := specs["w1"].Scheduling; pick(t, "terms", 0, 1, 2, 3) {
	case 1:
		high.SpreadKey, high.MaxSkew = pick(t, "crowdspread", "zone", "node"), 1
	case 2:
		specs["w0"].Scheduling.Affinity = append(specs["w0"].Scheduling.Affinity, &portolanv1.WorkloadSpec_WorkloadAffinity{Workload: "w1", TopologyKey: "zone", Anti: true})
	case 3:
		high.Affinity = append(high.Affinity, &portolanv1.WorkloadSpec_WorkloadAffinity{Workload: "w1", TopologyKey: "rack", Anti: true})
	}
	for _, name := range []string{"w0", "w2"} {
		sc.batch.Allowance["t/"+name] = rapid.IntRange(1, 4).Draw(t, "more")
	}
	sc.level(t)
}

// shapeShares makes nodes with devices of one model, in a pool that keeps
// fragmentation low, and workloads that ask for parts of them.
func shapeShares(t *rapid.T, sc *scene, specs map[string]*portolanv1.WorkloadSpec) {
	for _, n := range sorted(sc.w.nodes) {
		n.Facts.Labels["pool"], n.Facts.Devices = "frag", nil
		model := pick(t, "onemodel", "A", "A", "B")
		for k := range rapid.IntRange(1, 3).Draw(t, "onegpus") {
			n.Facts.Devices = append(n.Facts.Devices, &nodev1.Device{Kind: "gpu", Model: model, Index: int32(k)})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		askLittle(t, specs[name], 0, 3)
		d := &portolanv1.DeviceRequest{Count: pick[int32](t, "kindcount", 0, 0, 1, 2)}
		if d.GetCount() == 0 {
			d.ShareMilli = pick[int32](t, "kindshare", 300, 500, 700)
		}
		if rarely(t, 4, "kindmodels") {
			d.Models = []string{pick(t, "kindmodel", "A", "B")}
		}
		specs[name].Scheduling.Devices, specs[name].Kind = []*portolanv1.DeviceRequest{d}, 0
	}
}

// least is how many replicas a group has at least: one alone shows little of a gang.
func (k sceneKind) least() int {
	if k == ofGangs || k == crowded {
		return 2
	}
	return 0
}

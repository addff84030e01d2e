package schedule

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Whoever follows a remedy, any one of them and nothing else, gets the place: one
// more replica of a group, or all of a gang.
func TestRemediesHelp(t *testing.T) {
	kinds := map[RemedyKind]int{}
	check(t, func(t *rapid.T) {
		sc := drawScene(t)
		sc.groups, sc.wanted = sc.groups[:1], sc.wanted[:1]
		q := sc.wanted[0]
		q.overhead = api.Resources{CPUMilli: 1, MemoryBytes: 1}
		for _, g := range sc.w.replicas {
			g.overhead = q.overhead
		}
		p := copyResult(Schedule(sc.table(t, "order"), sc.batchFor(t)))[0]
		if p.Refusal == nil || len(p.Nominations) > 0 {
			return
		}
		for k, b := range p.Bindings {
			sc.w.add(fmt.Sprintf("new%d", k), q, b)
		}
		n := 1
		if q.spec.GetScheduling().GetGang() != nil {
			n = sc.groups[0].Count
		}
		for _, r := range p.Refusal.Remedies {
			kinds[r.Kind]++
			t.Log(sc.dump())
			sc.tryRemedy(t, r, n)
		}
	})
	for k := AskLessCPU; k <= WaitForNode; k++ {
		if kinds[k] == 0 && k != FreePort {
			t.Logf("no remedy of kind %d was drawn", k)
		}
	}
}

// tryRemedy makes a world in which only the remedy was followed.
func (sc *scene) tryRemedy(t *rapid.T, r Remedy, n int) {
	q := *sc.wanted[0]
	q.spec = proto.Clone(q.spec).(*portolanv1.WorkloadSpec)
	g := sc.groups[0]
	g.Count = n
	w := &world{nodes: maps.Clone(sc.w.nodes), pools: sc.w.pools, replicas: maps.Clone(sc.w.replicas), volumes: maps.Clone(sc.w.volumes)}
	if r.Kind == FewerReplicas {
		g.Count = int(r.Amount)
	}
	followOnNode(w, r)
	followInSpec(q.spec, r)
	after := &scene{w: w, groups: []Group{g}, wanted: []*wanted{&q}, batch: sc.batch, seed: sc.seed, classes: map[Owner]*Class{}}
	// Those that run keep the spec that they have.
	c, err := Compile(q.spec, Options{Owner: q.owner, Overhead: q.overhead, Ports: q.ports})
	if err != nil {
		t.Fatal(err)
	}
	b := sc.batch
	g.Class = c
	b.Groups = []Group{g}
	p := Schedule(after.table(t, "after"), b).Placed[0]
	if len(p.Bindings)+len(p.Nominations) < g.Count {
		t.Fatalf("%+v did not help:\n%s", r, show([]Placed{p}))
	}
}

func followOnNode(w *world, r Remedy) {
	n, ok := w.nodes[r.Node]
	if !ok {
		return
	}
	f := proto.Clone(n.Facts).(*nodev1.NodeFacts)
	n.Facts = f
	switch r.Kind {
	case FreeCPU, FreeMemory, FreeStorage:
		// As much more as if somebody had left.
		w.pools = Pools{CPUCoreHourMicros: w.pools.CPUCoreHourMicros, MemGiBHourMicros: w.pools.MemGiBHourMicros, Pools: w.pools.Pools}
		give := map[RemedyKind]*int64{FreeCPU: &f.CpuMilli, FreeMemory: &f.MemoryBytes, FreeStorage: &f.StorageBytes}[r.Kind]
		before := w.capacity(n)
		for grown(before, w.capacity(n), r.Kind) < r.Amount {
			*give++
		}
	case FreeAddress:
		n.Addresses += int(r.Amount)
	case FreePort:
		for id, o := range w.replicas {
			if o.Node == n.ID && slices.Contains(o.ports, int32(r.Amount)) {
				w.drop(id)
			}
		}
	case Uncordon:
		n.Mode = 0
	case LabelNode:
		f.Labels = maps.Clone(f.Labels)
		if f.Labels == nil {
			f.Labels = map[string]string{}
		}
		f.Labels[r.Key] = r.Value
	case WaitForNode:
		n.Down = 0
	case AddNode:
		n.ID, n.Mode, n.Down = "added", 0, 0
	}
	w.nodes[n.ID] = n
}

func grown(before, now room, k RemedyKind) int64 {
	switch k {
	case FreeCPU:
		return now.cpu - before.cpu
	case FreeMemory:
		return now.memory - before.memory
	default:
		return now.storage - before.storage
	}
}

func followInSpec(spec *portolanv1.WorkloadSpec, r Remedy) {
	s, ask := spec.GetScheduling(), spec.GetContainers()[0].GetRequests()
	switch r.Kind {
	case AskLessCPU:
		ask.Cpu = fmt.Sprintf("%dm", r.Amount)
	case AskLessMemory:
		ask.Memory = strconv.FormatInt(r.Amount, 10)
	case AskLessStorage:
		ask.Storage = strconv.FormatInt(r.Amount, 10)
	case AskSmallerShare:
		lastAsk(s).ShareMilli = int32(r.Amount)
	case AskFewerDevices:
		lastAsk(s).Count = int32(r.Amount)
	case AllowModel:
		lastAsk(s).Models = append(lastAsk(s).Models, r.Value)
	case Tolerate:
		s.Tolerations = append(s.Tolerations, &portolanv1.Toleration{Key: r.Taint.GetKey(), Value: r.Taint.GetValue(), Effect: r.Taint.GetEffect()})
	case DropSelector:
		delete(s.NodeSelector, r.Key)
	case DropNodeAffinity:
		s.NodeAffinity = nil
	case PreferAffinity, PreferAntiAffinity:
		for _, a := range s.GetAffinity() {
			if a.GetAnti() == (r.Kind == PreferAntiAffinity) && a.GetWorkload() == r.Value && a.GetTopologyKey() == r.Key && !a.GetPrefer() {
				a.Prefer = true
				return
			}
		}
	case RaiseSkew, PreferSpread:
		followSpread(s, r)
	case AllowSpot:
		spec.Placement = &portolanv1.WorkloadSpec_Placement{Capacity: portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED}
	case RaisePriority:
		spec.Priority = int32(r.Amount)
	}
}

func lastAsk(s *portolanv1.WorkloadSpec_Scheduling) *portolanv1.DeviceRequest {
	return s.GetDevices()[len(s.GetDevices())-1]
}

func followSpread(s *portolanv1.WorkloadSpec_Scheduling, r Remedy) {
	skew := int32(r.Amount)
	if s.GetSpreadKey() == r.Key && s.GetMaxSkew() > 0 && (r.Kind == PreferSpread || s.GetMaxSkew() < skew) {
		s.MaxSkew = skew // 0 sets no bound
		return
	}
	for _, sp := range s.GetSpreads() {
		if sp.GetTopologyKey() == r.Key && !sp.GetPrefer() {
			if r.Kind == PreferSpread {
				sp.Prefer = true
			} else {
				sp.MaxSkew = skew
			}
			return
		}
	}
}

package sim

import (
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// faults are bugs that a test plants where the cores are fed and where their plans
// are carried out, to see that the checks find them. The cores' own tests plant
// others inside of them.
type faults struct {
	surgeOffByOne     bool // the cores hear of one replica more than surge allows
	parallelOffByOne  bool // and of one more at a time than a job allows
	maxIgnored        bool // and of twice the maximum of what scales
	exclusiveDropped  bool // and not that at most one may be in the world
	intentStale       bool // and at times of a decision that was replaced
	taintHidden       bool // the scheduler does not hear of taints
	modeHidden        bool // nor that nodes are cordoned
	apartDropped      bool // nor what replicas keep away from
	capacityStale     bool // nor that nodes shrink
	budgetIgnored     bool // and may displace as it likes
	roomFreedEarly    bool // the room of who is stopping is given away
	volumeAnywhere    bool // a replica is bound wherever its volume is
	devicesForgotten  bool // the devices of a replica are not noted
	replacedForgotten bool // nor by whom it was replaced
	evictionUnseen    bool // nor when its replacement was bound
	epochAhead        bool // records get a newer epoch than their intent
	removedAtOnce     bool // the record of a stopped replica goes before its process
	finishForgotten   bool // the end of a job's replica is not kept
	runForgotten      bool // nor which runs were dealt with
	rateForgotten     bool // nor what was disrupted within the hour
	wrongStopped      bool // another replica of the workload is stopped than was meant

	specs   map[*portolanv1.WorkloadSpec]*portolanv1.WorkloadSpec
	intents map[*linkv1.WorkloadIntent]*linkv1.WorkloadIntent
	facts   map[*nodev1.NodeFacts]*nodev1.NodeFacts
	earlier map[reconcile.Key]reconcile.Workload
	first   map[string]*nodev1.NodeFacts
}

// input changes what reconcile is told.
func (f *faults) input(in *reconcile.Input, revision int64) {
	if !f.surgeOffByOne && !f.parallelOffByOne && !f.maxIgnored && !f.exclusiveDropped && !f.intentStale {
		return
	}
	told := make(map[reconcile.Key]reconcile.Workload, len(in.Workloads))
	for k, w := range in.Workloads {
		told[k] = w
		if was, ok := f.earlier[k]; f.intentStale && ok && revision%7 == 0 {
			told[k] = was
		} else if f.intentStale {
			put(&f.earlier, k, w)
		} else {
			w.Intent = f.intent(w.Intent)
			told[k] = w
		}
	}
	in.Workloads = told
}

func put[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
}

func (f *faults) intent(i *linkv1.WorkloadIntent) *linkv1.WorkloadIntent {
	if out := f.intents[i]; out != nil {
		return out
	}
	out := proto.CloneOf(i)
	for n, r := range out.GetRevisions() {
		if f.maxIgnored {
			r.MaxReplicas *= 2
		}
		r.Spec = f.spec(i.GetRevisions()[n].GetSpec())
	}
	put(&f.intents, i, out)
	return out
}

// spec is another one in place of each, always the same: the table knows classes
// by it.
func (f *faults) spec(s *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	if out := f.specs[s]; out != nil {
		return out
	}
	out := proto.CloneOf(s)
	if u := out.GetUpdate(); f.surgeOffByOne && u != nil {
		u.MaxSurge = new(u.GetMaxSurge() + 1)
	}
	if j := out.GetJob(); f.parallelOffByOne && j != nil {
		j.Parallelism++
	}
	if f.exclusiveDropped {
		out.Placement = nil
	}
	put(&f.specs, s, out)
	return out
}

// node changes what the scheduler's table is told.
func (f *faults) node(n *schedule.Node) {
	if f.modeHidden {
		n.Mode = 0
	}
	if f.capacityStale {
		if f.first[n.ID] == nil {
			put(&f.first, n.ID, n.Facts)
		}
		if was := f.first[n.ID]; was.GetCpuMilli() != n.Facts.GetCpuMilli() {
			n.Facts = f.without(n.Facts, func(x *nodev1.NodeFacts) { x.CpuMilli = was.GetCpuMilli() })
		}
	}
	if f.taintHidden && len(n.Facts.GetTaints()) > 0 {
		n.Facts = f.without(n.Facts, func(x *nodev1.NodeFacts) { x.Taints = nil })
	}
}

func (f *faults) without(facts *nodev1.NodeFacts, change func(*nodev1.NodeFacts)) *nodev1.NodeFacts {
	if f.facts[facts] == nil {
		out := proto.CloneOf(facts)
		change(out)
		put(&f.facts, facts, out)
	}
	return f.facts[facts]
}

// compiled is the spec that the scheduler is told of.
func (f *faults) compiled(s *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	if !f.apartDropped || len(s.GetScheduling().GetAffinity()) == 0 {
		return s
	}
	out := proto.CloneOf(s)
	out.Scheduling.Affinity = nil
	return out
}

// bound changes a new record.
func (f *faults) bound(a *clusterv1.Allocation) {
	if f.devicesForgotten {
		a.Devices = nil
	}
	if f.epochAhead {
		a.Epoch++
	}
	if f.evictionUnseen {
		a.Bound = nil
	}
}

// state changes what is written of a workload.
func (f *faults) state(st *clusterv1.WorkloadState) *clusterv1.WorkloadState {
	if !f.runForgotten && !f.rateForgotten {
		return st
	}
	out := proto.CloneOf(st)
	if f.runForgotten {
		out.LastRun = 0
	}
	if f.rateForgotten {
		out.Disruptions = nil
	}
	return out
}

// victim is who is stopped in a replica's place.
func (f *faults) victim(c *Cluster, id string) string {
	if !f.wrongStopped {
		return id
	}
	a := c.allocs[id]
	for other, b := range c.allocs {
		if other > id && keyOf(b) == keyOf(a) && !b.GetStop() && b.GetFinal() == nil && b.GetNode() != a.GetNode() && !c.nodes[b.GetNode()].gone() {
			return other
		}
	}
	return id
}

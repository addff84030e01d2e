package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// world is a cluster that does what reconcile says: the dumbest scheduler and
// nodes that report what the test tells them to.
type world struct {
	now       time.Time
	workloads map[Key]Workload
	nodes     map[string]*Node
	taken     map[string]bool // nodes that are full
	allocs    map[string]*clusterv1.Allocation
	modified  map[string]int64
	gen       int64
	named     int
}

func newWorld() *world {
	return &world{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), workloads: map[Key]Workload{}, nodes: map[string]*Node{}, taken: map[string]bool{}, allocs: map[string]*clusterv1.Allocation{}, modified: map[string]int64{}}
}

func (w *world) addNode(id string) *Node {
	n := &Node{Record: &clusterv1.Node{Node: id, Facts: &nodev1.NodeFacts{}}, Observed: true, Allocations: map[string]*nodev1.AllocationStatus{}}
	w.nodes[id] = n
	return n
}

func (w *world) input() Input {
	in := Input{Now: w.now, Workloads: w.workloads, Nodes: map[string]Node{}, Allocations: w.allocs, Modified: w.modified, Admit: w.admit}
	for id, n := range w.nodes {
		in.Nodes[id] = *n
	}
	return in
}

// admit reads labels of the node's facts: refuse=<anything> and full=<anything>.
func (w *world) admit(n *clusterv1.Node, _ *portolanv1.WorkloadSpec) Admission {
	switch {
	case n.GetFacts().GetLabels()["refuse"] != "":
		return Refused
	case n.GetFacts().GetLabels()["stay"] != "":
		return Stay
	}
	return Admitted
}

// apply does the steps. A replica that finds no node stays pending. It gives a
// line per step.
func (w *world) apply(p Plan) []string {
	var lines []string
	w.gen++
	for _, s := range p.Steps {
		line := fmt.Sprintf("%s %s", s.Kind, s.Allocation)
		switch s.Kind {
		case Create:
			id, node := w.bind(s)
			line = fmt.Sprintf("create %s %s", s.Revision.GetRevision(), id)
			if node == "" {
				line = fmt.Sprintf("create %s: no node", s.Revision.GetRevision())
			} else {
				line += " on " + node
			}
		case Stop:
			a := w.edit(s.Allocation)
			a.Stop, a.StopReason, a.StopTime = true, s.Code, timestamppb.New(w.now)
		case Remove:
			delete(w.allocs, s.Allocation)
		case Finish:
			a := w.edit(s.Allocation)
			a.Final, a.EndTime = s.Final, timestamppb.New(w.now)
		case Renew:
			w.edit(s.Allocation).Epoch = s.Workload.Intent.GetEpoch()
			line += fmt.Sprintf(" to epoch %d", s.Workload.Intent.GetEpoch())
		}
		lines = append(lines, fmt.Sprintf("%s  (%s: %s)", strings.TrimRight(line, " "), s.Code, s.Reason))
	}
	for _, k := range sortedKeys(p.Halted) {
		lines = append(lines, fmt.Sprintf("halted %s: %s: %s", k, p.Halted[k].Code, p.Halted[k].Message))
	}
	for _, k := range sortedKeys(p.Waiting) {
		lines = append(lines, fmt.Sprintf("waiting %s: %s: %s", k, p.Waiting[k].Code, p.Waiting[k].Message))
	}
	for _, k := range sortedKeys(p.Draining) {
		if p.Draining[k].Code != Leaving {
			lines = append(lines, fmt.Sprintf("draining %s: %s: %s", k, p.Draining[k].Code, p.Draining[k].Message))
		}
	}
	if p.Held != "" {
		lines = append(lines, "held: "+p.Held)
	}
	return lines
}

func (w *world) edit(id string) *clusterv1.Allocation {
	old := w.allocs[id]
	a := &clusterv1.Allocation{
		Allocation: id, Tenant: old.GetTenant(), Workload: old.GetWorkload(), Revision: old.GetRevision(), Epoch: old.GetEpoch(), Uid: old.GetUid(), Node: old.GetNode(),
		Spec: old.GetSpec(), Bound: old.GetBound(), Stop: old.GetStop(), StopReason: old.GetStopReason(), StopTime: old.GetStopTime(), Index: old.GetIndex(), Final: old.GetFinal(),
		ReplacedBy: old.GetReplacedBy(), EndTime: old.GetEndTime(),
	}
	w.allocs[id], w.modified[id] = a, w.gen
	return a
}

func (w *world) bind(s Step) (id, node string) {
	load := map[string]int{}
	for _, a := range w.allocs {
		load[a.GetNode()]++
	}
	for _, n := range slices.Sorted(maps.Keys(w.nodes)) {
		ok := !w.nodes[n].lost() && !w.taken[n] && w.admit(w.nodes[n].Record, nil) == Admitted && (s.Node == "" || s.Node == n)
		if ok && (node == "" || load[n] < load[node]) {
			node = n
		}
	}
	if node == "" {
		return "", ""
	}
	w.named++
	id = fmt.Sprintf("%s-%d", s.Key.Workload, w.named)
	w.allocs[id] = &clusterv1.Allocation{
		Allocation: id, Tenant: s.Key.Tenant, Workload: s.Key.Workload, Revision: s.Revision.GetRevision(), Epoch: s.Workload.Intent.GetEpoch(), Uid: s.Workload.Intent.GetUid(),
		Node: node, Spec: s.Revision.GetSpec(), Bound: timestamppb.New(w.now), Index: s.Index,
	}
	w.modified[id] = w.gen
	if s.Allocation != "" {
		w.edit(s.Allocation).ReplacedBy = id
	}
	return id, node
}

// report has a replica's node say something of it.
func (w *world) report(id string, st portolanv1.ReplicaState, ready bool) {
	s := &nodev1.AllocationStatus{Allocation: id, State: st, Ready: ready, Timeline: &portolanv1.Timeline{}}
	if ready {
		s.Timeline.Ready = timestamppb.New(w.now)
	}
	n := w.nodes[w.allocs[id].GetNode()]
	n.Allocations = maps.Clone(n.Allocations)
	n.Allocations[id] = s
	n.Applied = w.gen
}

// gone has a node say that it knows a replica no more.
func (w *world) gone(id string) {
	n := w.nodes[w.allocs[id].GetNode()]
	n.Allocations = maps.Clone(n.Allocations)
	delete(n.Allocations, id)
	n.Applied = w.gen
}

// settle has every reachable node carry out what it is told, and says whether
// there was anything.
func (w *world) settle() bool {
	any := false
	for _, id := range slices.Sorted(maps.Keys(w.allocs)) {
		a := w.allocs[id]
		n := w.nodes[a.GetNode()]
		if n == nil || n.lost() {
			continue
		}
		switch {
		case a.GetStop():
			any = any || n.Allocations[id] != nil
			w.gone(id)
		case a.GetFinal() == nil && !n.Allocations[id].GetReady():
			any = true
			w.report(id, portolanv1.ReplicaState_REPLICA_STATE_RUNNING, true)
		}
	}
	return any
}

// want sets an intent.
func (w *world) want(k Key, in *linkv1.WorkloadIntent) {
	w.workloads[k] = Workload{Intent: in, Revision: in.GetEpoch(), Committed: w.now}
}

func serviceSpec(surge, down int, minReady time.Duration) *portolanv1.WorkloadSpec {
	return &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, Update: &portolanv1.WorkloadSpec_UpdateStrategy{
		MaxSurge: new(int32(surge)), MaxUnavailable: new(int32(down)), MinReady: durationpb.New(minReady),
	}}
}

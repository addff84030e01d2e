package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
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
	volumes   map[string]*clusterv1.Volume
	states    map[Key]*clusterv1.WorkloadState
	moves     []Move
	rebalance *portolanv1.Rebalance
	pending   map[Key][]*portolanv1.Reason
	gen       int64
	named     int
	faults    faults
}

func newWorld() *world {
	return &world{
		now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), workloads: map[Key]Workload{}, nodes: map[string]*Node{}, taken: map[string]bool{},
		allocs: map[string]*clusterv1.Allocation{}, modified: map[string]int64{}, volumes: map[string]*clusterv1.Volume{}, states: map[Key]*clusterv1.WorkloadState{},
		pending: map[Key][]*portolanv1.Reason{},
	}
}

func (w *world) addNode(id string) *Node {
	n := &Node{Record: &clusterv1.Node{Node: id, Facts: &nodev1.NodeFacts{}}, Observed: true, Allocations: map[string]*nodev1.AllocationStatus{}}
	w.nodes[id] = n
	return n
}

func (w *world) input() Input {
	in := Input{
		Now: w.now, Workloads: w.workloads, Nodes: map[string]Node{}, Allocations: w.allocs, Modified: w.modified, Admit: w.admit,
		Volumes: w.volumes, States: w.states, Moves: w.moves, Rebalance: w.rebalance, Pending: w.pending, faults: w.faults,
	}
	for id, n := range w.nodes {
		in.Nodes[id] = *n
	}
	return in
}

// admit reads labels of the node's facts, refuse=<anything> and stay=<anything>,
// and its taints.
func (w *world) admit(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) Admission {
	switch {
	case n.GetFacts().GetLabels()["refuse"] != "":
		return Refused
	case n.GetFacts().GetLabels()["stay"] != "":
		return Stay
	}
	out := Admitted
	for _, t := range n.GetFacts().GetTaints() {
		i := slices.IndexFunc(spec.GetScheduling().GetTolerations(), func(o *portolanv1.Toleration) bool { return o.GetKey() == t.GetKey() })
		switch {
		case i < 0:
			return Refused
		case spec.GetScheduling().GetTolerations()[i].GetStay() != nil:
			out = Stay // what may stay only for a time does not begin
		}
	}
	return out
}

// apply does the steps. A replica that finds no node stays pending. It gives a
// line per step.
func (w *world) apply(p Plan) []string {
	var lines []string
	w.gen++
	clear(w.pending)
	for _, s := range p.Steps {
		lines = append(lines, fmt.Sprintf("%s  (%s: %s)", strings.TrimRight(w.do(s), " "), s.Code, s.Reason))
	}
	return lines
}

// notes are what a plan says beside its steps.
func notes(p Plan) []string {
	var lines []string
	for _, n := range []struct {
		what string
		of   map[Key]Note
	}{{"halted", p.Halted}, {"waiting", p.Waiting}, {"draining", p.Draining}} {
		for _, k := range sortedKeys(n.of) {
			if n.of[k].Code != Leaving {
				lines = append(lines, fmt.Sprintf("%s %s: %s: %s", n.what, k, n.of[k].Code, n.of[k].Message))
			}
		}
	}
	if p.Held != "" {
		lines = append(lines, "held: "+p.Held)
	}
	return lines
}

// do does one step, and says it.
func (w *world) do(s Step) string {
	line := fmt.Sprintf("%s %s", s.Kind, s.Allocation)
	switch s.Kind {
	case Create:
		id, node := w.bind(s)
		if node == "" {
			return fmt.Sprintf("create %s: no node", s.Revision.GetRevision())
		}
		line = fmt.Sprintf("create %s %s on %s", s.Revision.GetRevision(), id, node)
		if s.Run != 0 {
			line += " for " + stamp(s.Run)
		}
	case Stop:
		a := w.edit(s.Allocation)
		a.Stop, a.StopReason, a.StopTime = true, s.Code, timestamppb.New(w.now)
		if s.Disrupt {
			a.Disrupted = true
			line += " disrupted"
		}
	case Remove:
		delete(w.allocs, s.Allocation)
	case Finish:
		a := w.edit(s.Allocation)
		a.Final, a.EndTime = s.Final, timestamppb.New(w.now)
	case Renew:
		w.edit(s.Allocation).Epoch = s.Workload.Intent.GetEpoch()
		line += fmt.Sprintf(" to epoch %d", s.Workload.Intent.GetEpoch())
	case Update:
		a := w.edit(s.Allocation)
		a.Revision, a.Spec = s.Revision.GetRevision(), s.Revision.GetSpec()
	case PutState:
		w.states[s.Key] = s.State
		line += s.Key.String()
		if s.State.GetLastRun() != 0 {
			line += " run " + stamp(s.State.GetLastRun())
		}
	case DeleteState:
		delete(w.states, s.Key)
		line += s.Key.String()
	case PutVolume:
		w.volumes[s.Volume.GetVolume()] = s.Volume
		line += s.Volume.GetVolume() + " to go"
	case DeleteVolume:
		delete(w.volumes, s.Volume.GetVolume())
		line += s.Volume.GetVolume()
	}
	return line
}

func (w *world) edit(id string) *clusterv1.Allocation {
	a := proto.CloneOf(w.allocs[id])
	a.Spec = w.allocs[id].GetSpec()
	w.allocs[id], w.modified[id] = a, w.gen
	return a
}

// node finds the least loaded one, as a scheduler would.
func (w *world) node(s Step) string {
	load, node := map[string]int{}, ""
	for _, a := range w.allocs {
		load[a.GetNode()]++
	}
	for _, n := range slices.Sorted(maps.Keys(w.nodes)) {
		x := w.nodes[n]
		ok := !x.lost() && !w.taken[n] && x.Record.GetMode() == portolanv1.NodeMode_NODE_MODE_UNSPECIFIED &&
			w.admit(x.Record, s.Revision.GetSpec()) == Admitted && (s.Node == "" || s.Node == n)
		if ok && (node == "" || load[n] < load[node]) {
			node = n
		}
	}
	return node
}

func (w *world) bind(s Step) (id, node string) {
	node = w.node(s)
	if node == "" {
		w.pending[s.Key] = []*portolanv1.Reason{{Code: "NoNode", Message: "no node takes it"}}
		return "", ""
	}
	if id = s.Name; id == "" {
		w.named++
		id = fmt.Sprintf("%s-%d", s.Key.Workload, w.named)
	}
	if w.allocs[id] != nil {
		panic("the name " + id + " is taken")
	}
	a := &clusterv1.Allocation{
		Allocation: id, Tenant: s.Key.Tenant, Workload: s.Key.Workload, Revision: s.Revision.GetRevision(), Epoch: s.Workload.Intent.GetEpoch(), Uid: s.Workload.Intent.GetUid(),
		Node: node, Spec: s.Revision.GetSpec(), Bound: timestamppb.New(w.now), Index: s.Index, Run: s.Run,
	}
	for _, v := range s.Revision.GetSpec().GetVolumes() {
		vid := VolumeID(s.Key, s.Index, v.GetName())
		a.Volumes = append(a.Volumes, vid)
		if w.volumes[vid] == nil {
			w.volumes[vid] = &clusterv1.Volume{Volume: vid, Tenant: s.Key.Tenant, Workload: s.Key.Workload, Uid: a.GetUid(), Index: s.Index, Name: v.GetName(), Node: node}
		}
	}
	w.allocs[id], w.modified[id] = a, w.gen
	if s.Allocation != "" {
		was := w.edit(s.Allocation)
		was.ReplacedBy, was.Disrupted = id, was.GetDisrupted() || s.Disrupt
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

// crash has a replica's main container crash once more.
func (w *world) crash(id string) {
	was := w.nodes[w.allocs[id].GetNode()].Allocations[id]
	w.report(id, portolanv1.ReplicaState_REPLICA_STATE_BACKOFF, false)
	now := w.nodes[w.allocs[id].GetNode()].Allocations[id]
	now.Timeline.Ready = was.GetTimeline().GetReady()
	now.Containers = []*portolanv1.ContainerState{{Name: "main", Restarts: 1, LastExitReason: "Error", LastExitTime: timestamppb.New(w.now)}}
	if len(was.GetContainers()) > 0 {
		now.Containers[0].Restarts += was.GetContainers()[0].GetRestarts()
	}
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
		case a.GetFinal() == nil && !n.Allocations[id].GetReady() && n.Allocations[id].GetState() < portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED:
			any = true
			w.report(id, portolanv1.ReplicaState_REPLICA_STATE_RUNNING, true)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.volumes)) {
		if n := w.nodes[w.volumes[id].GetNode()]; w.volumes[id].GetDelete() && n != nil && !n.lost() {
			any = true
			delete(w.volumes, id)
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

// image is a spec with another image: what a revision differs by.
func image(spec *portolanv1.WorkloadSpec, name string) *portolanv1.WorkloadSpec {
	out := proto.CloneOf(spec)
	out.Containers = []*portolanv1.Container{{Image: name}}
	return out
}

package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The stories in testdata/stories. Commands:
//
//	nodes n1 n2                 nodes that are there
//	zone z1 n1 n2               their zone
//	lost|back|refuse|full|mute|heard|remove-node n1
//	cordon|drain|undrain n1 [deadline=1h]
//	taint|untaint n1 key        a taint that nothing tolerates for ever by itself
//	want web revisions=(r1:3 or r1:3:min:max) current=r1 epoch=1 [active=r1 uid= kind= same surge= down= minready= progress= ...]
//	                            input: more of the spec, as text. The image is the revision's name, the same for all with "same"
//	unwant web
//	scale web 5                 what autoscale decided
//	moves web-1=n2:Rebalance:reason …   proposals, until the next ones
//	rebalance 5                 moves in an hour
//	step                        reconcile once and do what it says
//	displace web-1 …            the scheduler's victims, after a step
//	settle                      nodes start and stop what they are told
//	ready|starting|crash|succeed|fail|gone ID…
//	clock 2026-01-01T00:00:00Z
//	wait 5s
//	roll                        step and settle until nothing is left to do
//	due                         when time alone changes something
//	status                      what the federation is told
//	show                        the replicas and volumes
func TestStories(t *testing.T) {
	told := 0
	defer func() {
		if told == 0 {
			t.Error("no story was told")
		}
	}()
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		told++
		w := newWorld()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			return w.command(t, d)
		})
	})
}

func (w *world) command(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	names := func(do func(string)) string {
		for _, a := range d.CmdArgs {
			do(a.Key)
		}
		return ""
	}
	if st, ok := replicaStates[d.Cmd]; ok {
		return names(func(id string) { w.said(t, d, id, st) })
	}
	switch d.Cmd {
	case "nodes":
		return names(func(id string) { w.addNode(id) })
	case "lost", "back", "refuse", "full", "mute", "heard", "remove-node":
		return names(func(id string) { w.fault(d.Cmd, id) })
	case "want":
		w.wantArgs(t, d)
	case "unwant":
		return names(func(name string) { delete(w.workloads, Key{"t", name}) })
	case "step":
		p := Reconcile(w.input())
		return lines(append(w.apply(p), notes(p)...))
	case "displace":
		return w.displace(d)
	case "zone":
		for _, a := range d.CmdArgs[1:] {
			w.nodes[a.Key].Record.Facts.Labels = map[string]string{"zone": d.CmdArgs[0].Key}
		}
	case "cordon", "drain", "undrain":
		w.mode(t, d)
	case "taint":
		n := w.nodes[d.CmdArgs[0].Key].Record
		n.Facts.Taints = append(n.Facts.Taints, &portolanv1.Taint{Key: d.CmdArgs[1].Key, Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE})
		n.TaintTimes = map[string]*timestamppb.Timestamp{d.CmdArgs[1].Key + "=": timestamppb.New(w.now)}
	case "untaint":
		w.nodes[d.CmdArgs[0].Key].Record.Facts.Taints = nil
	case "scale":
		n, err := strconv.Atoi(d.CmdArgs[1].Key)
		if err != nil {
			t.Fatal(err)
		}
		k := Key{"t", d.CmdArgs[0].Key}
		st := w.input().newState(k, w.workloads[k].Intent.GetUid())
		st.Scale = &clusterv1.Scale{Replicas: int32(n), Reason: &portolanv1.Reason{Code: "AboveTarget", Message: "cpu is at 80 %, the target is 50 %"}}
		w.states[k] = st
	case "moves":
		w.moves = nil
		for _, a := range d.CmdArgs {
			v := strings.SplitN(a.Vals[0], ":", 3)
			w.moves = append(w.moves, Move{Allocation: a.Key, Node: v[0], Code: v[1], Reason: v[2]})
		}
	case "rebalance":
		n, err := strconv.Atoi(d.CmdArgs[0].Key)
		if err != nil {
			t.Fatal(err)
		}
		w.rebalance = &portolanv1.Rebalance{MaxMovesPerHour: int32(n)}
	case "clock":
		at, err := time.Parse(time.RFC3339, d.CmdArgs[0].Key)
		if err != nil {
			t.Fatal(err)
		}
		w.now = at
	case "settle":
		w.settle()
	case "gone":
		return names(w.gone)
	case "wait":
		dur, err := time.ParseDuration(d.CmdArgs[0].Key)
		if err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(dur)
	case "due":
		if next := Reconcile(w.input()).Next; !next.IsZero() {
			return fmt.Sprintf("in %v\n", next.Sub(w.now))
		}
		return "never\n"
	case "roll":
		return w.roll()
	case "status":
		return w.status()
	case "show":
		return w.show()
	default:
		t.Fatalf("command %s is not known", d.Cmd)
	}
	return ""
}

// replicaStates are the commands by which a node says something of a replica.
var replicaStates = map[string]portolanv1.ReplicaState{
	"ready": portolanv1.ReplicaState_REPLICA_STATE_RUNNING, "starting": portolanv1.ReplicaState_REPLICA_STATE_STARTING, "crash": portolanv1.ReplicaState_REPLICA_STATE_BACKOFF,
	"succeed": portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED, "fail": portolanv1.ReplicaState_REPLICA_STATE_FAILED,
}

func (w *world) said(t *testing.T, d *datadriven.TestData, id string, st portolanv1.ReplicaState) {
	t.Helper()
	switch {
	case w.allocs[id] == nil:
		t.Fatalf("%s: there is no replica %s", d.Pos, id)
	case d.Cmd == "crash":
		w.crash(id)
	default:
		w.report(id, st, d.Cmd == "ready")
	}
}

func (w *world) fault(cmd, id string) {
	n := w.nodes[id]
	switch cmd {
	case "lost":
		n.Record.LostTime = timestamppb.New(w.now)
	case "back":
		n.Record.LostTime = nil
	case "refuse":
		n.Record.Facts.Labels = map[string]string{"refuse": "yes"}
	case "full":
		w.taken[id] = true
	case "mute":
		n.Observed = false
	case "heard":
		n.Observed = true
	case "remove-node":
		delete(w.nodes, id)
	}
}

func (w *world) wantArgs(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	in := &linkv1.WorkloadIntent{Tenant: "t", Workload: d.CmdArgs[0].Key, Uid: "u1"}
	spec := &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, Update: &portolanv1.WorkloadSpec_UpdateStrategy{}, Job: &portolanv1.WorkloadSpec_JobSpec{}}
	number := func(s string) int32 {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return int32(n)
	}
	length := func(s string) *durationpb.Duration {
		dur, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		return durationpb.New(dur)
	}
	same := ""
	for _, a := range d.CmdArgs[1:] {
		v := ""
		if len(a.Vals) > 0 {
			v = a.Vals[0]
		}
		switch a.Key {
		case "revisions":
			for _, r := range a.Vals {
				part := append(strings.Split(r, ":"), "0", "0")
				in.Revisions = append(in.Revisions, &linkv1.RevisionIntent{Revision: part[0], Replicas: number(part[1]), MinReplicas: number(part[2]), MaxReplicas: number(part[3])})
			}
		case "same":
			same = "same"
		case "active":
			in.ActiveRevision = v
		case "paused":
			spec.Update.Paused = true
		case "current":
			in.CurrentRevision = v
		case "epoch":
			in.Epoch = int64(number(v))
		case "uid":
			in.Uid = v
		case "kind":
			spec.Kind = map[string]portolanv1.WorkloadKind{
				"job": portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, "daemon": portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON,
				"stateful": portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL, "cron": portolanv1.WorkloadKind_WORKLOAD_KIND_CRON,
			}[v]
		case "surge":
			spec.Update.MaxSurge = new(number(v))
		case "down":
			spec.Update.MaxUnavailable = new(number(v))
		case "minready":
			spec.Update.MinReady = length(v)
		case "progress":
			spec.Update.ProgressDeadline = length(v)
		case "deadline":
			spec.Job.Deadline = length(v)
		case "completions":
			spec.Job.Completions = number(v)
		case "parallelism":
			spec.Job.Parallelism = number(v)
		case "retries":
			spec.Job.MaxRetries = new(number(v))
		default:
			t.Fatalf("argument %s is not known", a.Key)
		}
	}
	extra := &portolanv1.WorkloadSpec{}
	if err := prototext.Unmarshal([]byte(d.Input), extra); err != nil {
		t.Fatalf("%s: %v", d.Pos, err)
	}
	proto.Merge(spec, extra)
	for _, r := range in.GetRevisions() {
		r.Spec = proto.CloneOf(spec)
		r.Spec.Containers = []*portolanv1.Container{{Image: cmp.Or(same, r.GetRevision())}}
	}
	w.want(Key{"t", in.Workload}, in)
}

func (w *world) mode(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	n := w.nodes[d.CmdArgs[0].Key].Record
	n.Mode = map[string]portolanv1.NodeMode{"cordon": portolanv1.NodeMode_NODE_MODE_CORDONED, "drain": portolanv1.NodeMode_NODE_MODE_DRAINING}[d.Cmd]
	n.DrainDeadline = nil
	for _, a := range d.CmdArgs[1:] {
		dur, err := time.ParseDuration(a.Vals[0])
		if err != nil {
			t.Fatal(err)
		}
		n.DrainDeadline = timestamppb.New(w.now.Add(dur))
	}
}

// displace reconciles once, with victims of a preemption.
func (w *world) displace(d *datadriven.TestData) string {
	var victims []Move
	for _, a := range d.CmdArgs {
		victims = append(victims, Move{Allocation: a.Key, Reason: "a higher priority needs its place"})
	}
	p, refused := Displace(w.input(), Reconcile(w.input()), victims)
	out := append(w.apply(p), notes(p)...)
	for _, id := range refused {
		out = append(out, id+" may not be displaced")
	}
	return lines(out)
}

// roll steps and settles until nothing changes, and tells it round by round.
func (w *world) roll() string {
	var b strings.Builder
	for round := 1; round <= 50; round++ {
		p := Reconcile(w.input())
		done := w.apply(p)
		moved := w.settle()
		w.now = w.now.Add(time.Second)
		if len(done) == 0 && !moved {
			for _, n := range notes(p) {
				fmt.Fprintln(&b, n)
			}
			return b.String() + "settled\n"
		}
		if len(done) > 0 {
			fmt.Fprintf(&b, "round %d:\n", round)
		}
		for _, l := range done {
			fmt.Fprintf(&b, "  %s\n", l)
		}
	}
	return b.String() + "did not settle\n"
}

func lines(ls []string) string {
	if len(ls) == 0 {
		return "nothing\n"
	}
	return strings.Join(ls, "\n") + "\n"
}

func (w *world) status() string {
	var b strings.Builder
	for _, r := range Summarize(w.input()) {
		fmt.Fprintf(&b, "%s/%s epoch %d\n", r.GetTenant(), r.GetWorkload(), r.GetEpoch())
		for _, rev := range r.GetRevisions() {
			fmt.Fprintf(&b, "  %s: %d replicas, %d ready", rev.GetRevision(), rev.GetReplicas(), rev.GetReadyReplicas())
			if rev.GetAvailableReplicas() != rev.GetReadyReplicas() {
				fmt.Fprintf(&b, ", %d available", rev.GetAvailableReplicas())
			}
			b.WriteString("\n")
		}
		for _, c := range r.GetConditions() {
			fmt.Fprintf(&b, "  %s %s: %s: %s\n", c.GetType(), strings.ToLower(strings.TrimPrefix(c.GetState().String(), "CONDITION_STATE_")), c.GetReason(), c.GetMessage())
		}
	}
	return b.String()
}

func (w *world) show() string {
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(w.allocs)) {
		a := w.allocs[id]
		fmt.Fprintf(&b, "%s %s on %s", id, a.GetRevision(), a.GetNode())
		if n := w.nodes[a.GetNode()]; n != nil && n.lost() {
			b.WriteString(" lost")
		} else if n != nil && n.Allocations[id].GetReady() {
			b.WriteString(" ready")
		}
		if a.GetStop() {
			b.WriteString(" stopping")
		}
		if a.GetFinal() != nil {
			b.WriteString(" " + strings.ToLower(strings.TrimPrefix(a.GetFinal().GetState().String(), "REPLICA_STATE_")))
		}
		b.WriteString("\n")
	}
	for _, id := range slices.Sorted(maps.Keys(w.volumes)) {
		fmt.Fprintf(&b, "volume %s on %s", id, w.volumes[id].GetNode())
		if w.volumes[id].GetDelete() {
			b.WriteString(" to go")
		}
		b.WriteString("\n")
	}
	return b.String()
}

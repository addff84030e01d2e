package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The stories in testdata/stories. Commands:
//
//	nodes n1 n2                 nodes that are there
//	lost|back|refuse|full|mute|heard n1
//	want web revisions=(r1:3) current=r1 epoch=1 [uid= kind= surge= down= minready= deadline= completions= parallelism= retries=]
//	unwant web
//	step                        reconcile once and do what it says
//	settle                      nodes start and stop what they are told
//	ready|starting|crash|succeed|fail|gone ID…
//	wait 5s
//	roll [max=N]                step and settle until nothing is left to do
//	status                      what the federation is told
//	show                        the replicas
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
	states := map[string]portolanv1.ReplicaState{
		"ready": portolanv1.ReplicaState_REPLICA_STATE_RUNNING, "starting": portolanv1.ReplicaState_REPLICA_STATE_STARTING, "crash": portolanv1.ReplicaState_REPLICA_STATE_BACKOFF,
		"succeed": portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED, "fail": portolanv1.ReplicaState_REPLICA_STATE_FAILED,
	}
	if st, ok := states[d.Cmd]; ok {
		return names(func(id string) {
			if w.allocs[id] == nil {
				t.Fatalf("%s: there is no replica %s", d.Pos, id)
			}
			w.report(id, st, d.Cmd == "ready")
		})
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
		return lines(w.apply(Reconcile(w.input())))
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
	for _, a := range d.CmdArgs[1:] {
		v := a.Vals[0]
		switch a.Key {
		case "revisions":
			for _, r := range a.Vals {
				rev, n, _ := strings.Cut(r, ":")
				in.Revisions = append(in.Revisions, &linkv1.RevisionIntent{Revision: rev, Replicas: number(n), Spec: spec})
			}
		case "current":
			in.CurrentRevision = v
		case "epoch":
			in.Epoch = int64(number(v))
		case "uid":
			in.Uid = v
		case "kind":
			spec.Kind = map[string]portolanv1.WorkloadKind{"job": portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, "daemon": portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON}[v]
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
	w.want(Key{"t", in.Workload}, in)
}

// roll steps and settles until nothing changes, and tells it round by round.
func (w *world) roll() string {
	var b strings.Builder
	for round := 1; round <= 50; round++ {
		done := w.apply(Reconcile(w.input()))
		moved := w.settle()
		w.now = w.now.Add(time.Second)
		if len(done) == 0 && !moved {
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
			fmt.Fprintf(&b, "  %s: %d replicas, %d ready\n", rev.GetRevision(), rev.GetReplicas(), rev.GetReadyReplicas())
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
	return b.String()
}

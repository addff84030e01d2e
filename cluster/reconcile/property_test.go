package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var web = Key{"t", "web"}

// census counts what the promises speak of.
func (w *world) census() (live, ready int) {
	for id, a := range w.allocs {
		n := w.nodes[a.GetNode()]
		if n.lost() || a.GetFinal() != nil {
			continue
		}
		live++
		if !a.GetStop() && n.Allocations[id].GetReady() {
			ready++
		}
	}
	return live, ready
}

// checkPlan holds a plan for a service against the promises: creating never
// brings live replicas above desired plus surge, and stopping never takes ready
// ones below desired less unavailable.
func checkPlan(t *rapid.T, w *world, p Plan, total, surge, down int) {
	live, ready := w.census()
	creates, stopsReady := 0, 0
	seen := map[string]bool{}
	for _, s := range p.Steps {
		switch s.Kind {
		case Create:
			creates++
		case Stop:
			if seen[s.Allocation] {
				t.Fatalf("%s is stopped twice", s.Allocation)
			}
			seen[s.Allocation] = true
			if n := w.nodes[w.allocs[s.Allocation].GetNode()]; !n.lost() && n.Allocations[s.Allocation].GetReady() {
				stopsReady++
			}
		case Remove:
			if a := w.allocs[s.Allocation]; w.nodes[a.GetNode()].Allocations[s.Allocation] != nil {
				t.Fatalf("the record of %s goes while its node knows it", s.Allocation)
			}
			live--
		default:
		}
	}
	if creates > 0 && live+creates > total+surge {
		t.Fatalf("%d live and %d to create are more than %d + %d", live, creates, total, surge)
	}
	if stopsReady > 0 && ready-stopsReady < total-down {
		t.Fatalf("%d of %d ready ones are stopped: fewer than %d - %d stay", stopsReady, ready, total, down)
	}
}

func drawIntent(t *rapid.T, epoch int64) (in *linkv1.WorkloadIntent, total, surge, down int) {
	surge, down = rapid.IntRange(0, 3).Draw(t, "surge"), rapid.IntRange(0, 3).Draw(t, "down")
	spec := serviceSpec(surge, down, 0)
	if surge == 0 && down == 0 {
		surge = 1
	}
	in = &linkv1.WorkloadIntent{Tenant: "t", Workload: "web", Uid: "u", Epoch: epoch}
	revs := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"r1", "r2", "r3"}), 1, 2, rapid.ID).Draw(t, "revisions")
	for _, r := range revs {
		n := rapid.IntRange(0, 5).Draw(t, "replicas")
		total += n
		in.Revisions = append(in.Revisions, &linkv1.RevisionIntent{Revision: r, Replicas: int32(n), Spec: image(spec, r)})
	}
	in.CurrentRevision = revs[0]
	return in, total, surge, down
}

// A service under random updates, losses, returns, crashes and reports never
// breaks the promises, and is as desired some time after the faults end.
func TestServiceProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		for i := range rapid.IntRange(1, 4).Draw(t, "nodes") {
			w.addNode(fmt.Sprintf("n%d", i+1))
		}
		epoch := int64(1)
		in, total, surge, down := drawIntent(t, epoch)
		w.want(web, in)
		nodes := slices.Sorted(maps.Keys(w.nodes))
		for range rapid.IntRange(1, 60).Draw(t, "events") {
			w.now = w.now.Add(time.Duration(rapid.IntRange(0, 3000).Draw(t, "ms")) * time.Millisecond)
			switch rapid.IntRange(0, 7).Draw(t, "event") {
			case 0:
				epoch++
				in, total, surge, down = drawIntent(t, epoch)
				w.want(web, in)
			case 1:
				n := w.nodes[rapid.SampledFrom(nodes).Draw(t, "lost")]
				n.Record.LostTime = timestamppb.New(w.now)
			case 2:
				w.nodes[rapid.SampledFrom(nodes).Draw(t, "back")].Record.LostTime = nil
			case 3:
				if ids := slices.Sorted(maps.Keys(w.allocs)); len(ids) > 0 {
					id := rapid.SampledFrom(ids).Draw(t, "crash")
					if n := w.nodes[w.allocs[id].GetNode()]; !n.lost() && n.Allocations[id] != nil {
						w.report(id, portolanv1.ReplicaState_REPLICA_STATE_BACKOFF, false)
					}
				}
			case 4:
				w.settle()
			default:
				p := Reconcile(w.input())
				checkPlan(t, w, p, total, surge, down)
				w.apply(p)
			}
		}
		for _, n := range w.nodes {
			n.Record.LostTime = nil
		}
		for range 80 {
			w.settle()
			p := Reconcile(w.input())
			checkPlan(t, w, p, total, surge, down)
			w.apply(p)
			w.now = w.now.Add(time.Second)
		}
		checkDesired(t, w, in)
	})
}

func checkDesired(t *rapid.T, w *world, in *linkv1.WorkloadIntent) {
	have := map[string]int{}
	for _, a := range w.allocs {
		have[a.GetRevision()]++
		if a.GetStop() {
			t.Errorf("%s is still stopping", a.GetAllocation())
		}
	}
	for _, r := range in.GetRevisions() {
		if have[r.GetRevision()] != int(r.GetReplicas()) {
			t.Errorf("%d replicas of %s, %d are desired", have[r.GetRevision()], r.GetRevision(), r.GetReplicas())
		}
		delete(have, r.GetRevision())
	}
	if len(have) > 0 {
		t.Errorf("replicas of other revisions are left: %v", have)
	}
}

// A job ends with exactly its completions, whatever fails or is lost, as long as
// retries last.
func TestJobProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		for i := range 3 {
			w.addNode(fmt.Sprintf("n%d", i+1))
		}
		completions, parallelism := rapid.IntRange(1, 5).Draw(t, "completions"), rapid.IntRange(1, 4).Draw(t, "parallelism")
		w.want(web, &linkv1.WorkloadIntent{Tenant: "t", Workload: "web", Uid: "u", Epoch: 1, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{
			Revision: "r1", Replicas: int32(completions),
			Spec: &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, Job: &portolanv1.WorkloadSpec_JobSpec{Parallelism: int32(parallelism), MaxRetries: new(int32(1000))}},
		}}})
		faults := rapid.SliceOfN(rapid.IntRange(0, 5), 0, 40).Draw(t, "faults")
		for round := range 400 {
			p := Reconcile(w.input())
			checkJobPlan(t, w, p, parallelism)
			w.apply(p)
			for _, id := range slices.Sorted(maps.Keys(w.allocs)) {
				a := w.allocs[id]
				n := w.nodes[a.GetNode()]
				switch {
				case n.lost() || a.GetFinal() != nil:
				case a.GetStop():
					w.gone(id)
				default:
					st := portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED
					if round < len(faults) && faults[round] <= 1 {
						st = portolanv1.ReplicaState_REPLICA_STATE_FAILED
					}
					if round%2 == 1 {
						w.report(id, st, false)
					}
				}
			}
			if round < len(faults) {
				w.loseOrReturn(faults[round])
			} else {
				w.loseOrReturn(5)
			}
			w.now = w.now.Add(time.Second)
		}
		succeeded := map[int32]bool{}
		for _, a := range w.allocs {
			if a.GetFinal().GetState() == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED {
				succeeded[a.GetIndex()] = true
			}
		}
		if len(succeeded) != completions {
			t.Fatalf("%d indexes succeeded of %d", len(succeeded), completions)
		}
	})
}

// checkJobPlan holds that creating never brings those that may run above
// parallelism.
func checkJobPlan(t *rapid.T, w *world, p Plan, parallelism int) {
	live, _ := w.census()
	creates := 0
	for _, s := range p.Steps {
		switch s.Kind {
		case Create:
			creates++
		case Finish, Remove:
			if w.allocs[s.Allocation].GetFinal() == nil {
				live--
			}
		default:
		}
	}
	if creates > 0 && live+creates > parallelism {
		t.Fatalf("%d may run and %d are to begin: more than %d", live, creates, parallelism)
	}
}

func (w *world) loseOrReturn(fault int) {
	switch fault {
	case 3:
		w.nodes["n1"].Record.LostTime = timestamppb.New(w.now)
	case 4:
		w.nodes["n2"].Record.LostTime = timestamppb.New(w.now)
	case 5:
		w.nodes["n1"].Record.LostTime, w.nodes["n2"].Record.LostTime = nil, nil
	}
}

// The same input gives the same plan, and summarizing does not change it.
func TestDeterministic(t *testing.T) {
	w := newWorld()
	for i := range 5 {
		w.addNode(fmt.Sprintf("n%d", i))
	}
	for i := range 20 {
		name := fmt.Sprintf("w%d", i)
		w.want(Key{"t", name}, &linkv1.WorkloadIntent{Tenant: "t", Workload: name, Epoch: 1, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Replicas: 4, Spec: serviceSpec(1, 0, 0)}}})
	}
	w.apply(Reconcile(w.input()))
	w.settle()
	w.nodes["n1"].Record.LostTime = timestamppb.New(w.now)
	first := fmt.Sprint(Reconcile(w.input()).Steps)
	for range 10 {
		Summarize(w.input())
		if again := fmt.Sprint(Reconcile(w.input()).Steps); again != first {
			t.Fatalf("two plans of one input differ:\n%s\n%s", first, again)
		}
	}
}

// A settled cluster, with specs that allocations and intents share, and as they are
// after a restart, when each has a copy.
func BenchmarkReconcile(b *testing.B) {
	for _, shared := range []bool{true, false} {
		b.Run(fmt.Sprintf("shared=%v", shared), func(b *testing.B) {
			w := newWorld()
			for i := range 100 {
				w.addNode(fmt.Sprintf("n%d", i))
			}
			for i := range 100 {
				name := fmt.Sprintf("w%d", i)
				w.want(Key{"t", name}, &linkv1.WorkloadIntent{Tenant: "t", Workload: name, Epoch: 1, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Replicas: 50, Spec: image(serviceSpec(1, 0, 0), "r1")}}})
			}
			w.apply(Reconcile(w.input()))
			w.settle()
			for _, a := range w.allocs {
				if !shared {
					a.Spec = proto.CloneOf(a.GetSpec())
				}
			}
			for b.Loop() {
				if p := Reconcile(w.input()); len(p.Steps) > 0 {
					b.Fatal("a settled cluster has steps")
				}
			}
			b.ReportMetric(float64(b.N)*5000/b.Elapsed().Seconds(), "replicas/s")
		})
	}
}

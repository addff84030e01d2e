package server

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// place puts what control decided ("r1=2 r2=1") and what a cluster said of it
// ("r1=2/2": replicas, ready).
func (e *env) place(cluster string, epoch int64, decided string, reported int64, said string, conditions ...*portolanv1.Condition) {
	e.t.Helper()
	name := "tenants/shop/workloads/web/placements/" + cluster
	p := &portolanv1.Placement{Name: name, Spec: &portolanv1.PlacementSpec{Epoch: epoch}}
	for f := range strings.FieldsSeq(decided) {
		r := &portolanv1.RevisionReplicas{}
		rev, n, _ := strings.Cut(f, "=")
		r.Revision = rev
		must[int](e.t)(fmt.Sscanf(n, "%d", &r.Replicas))
		p.Spec.Revisions = append(p.Spec.Revisions, r)
	}
	e.put(store.Placement, name, p)
	st := &storev1.PlacementStatusRecord{Epoch: reported, Status: &portolanv1.PlacementStatus{Conditions: conditions}}
	for f := range strings.FieldsSeq(said) {
		r := &portolanv1.RevisionReplicas{}
		rev, n, _ := strings.Cut(f, "=")
		r.Revision = rev
		must[int](e.t)(fmt.Sscanf(n, "%d/%d", &r.Replicas, &r.ReadyReplicas))
		st.Status.Revisions = append(st.Status.Revisions, r)
	}
	e.put(store.PlacementStatus, name, st)
}

func cond(typ string, is bool, message string) *portolanv1.Condition {
	c := condition(typ, &portolanv1.Workload{}, is, "Because", message)
	return c
}

// TestAvailableIsPerRevision: the workload wants two replicas, of revision r2
// since its second generation.
func TestAvailableIsPerRevision(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	w := workload("shop", "web")
	w.Spec.Containers[0].Args = []string{"new"}
	must[*portolanv1.Workload](t)(e.workloads().UpdateWorkload(e.as("shop"), &portolanv1.UpdateWorkloadRequest{Workload: w}))
	get := func() (*portolanv1.WorkloadStatus, map[string]*portolanv1.Condition) {
		t.Helper()
		got := must[*portolanv1.Workload](t)(e.workloads().GetWorkload(e.as("shop"), &portolanv1.GetWorkloadRequest{Name: "tenants/shop/workloads/web"}))
		by := map[string]*portolanv1.Condition{}
		for _, c := range got.GetStatus().GetConditions() {
			if by[c.GetType()] != nil {
				t.Fatalf("%s stands twice: %v", c.GetType(), got.GetStatus().GetConditions())
			}
			by[c.GetType()] = c
			if c.GetObservedGeneration() != got.GetStatus().GetObservedGeneration() {
				t.Errorf("%s speaks of generation %d, the status of %d", c.GetType(), c.GetObservedGeneration(), got.GetStatus().GetObservedGeneration())
			}
		}
		return got.GetStatus(), by
	}
	check := func(what string, available bool, observed int64, says string) {
		t.Helper()
		st, by := get()
		a := by["Available"]
		if (a.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE) != available || st.GetObservedGeneration() != observed || !strings.Contains(a.GetMessage(), says) {
			t.Errorf("%s: observed %d, %v", what, st.GetObservedGeneration(), a)
		}
	}
	check("nothing is placed", false, 1, "in no cluster")
	e.place("eu", 1, "r1=2", 1, "r1=2/2")
	check("only the old revision is there", false, 1, "0 of 2 replicas of revision r2")
	e.place("eu", 2, "r2=2", 1, "r1=2/2", cond("Halted", true, "of the old decision"))
	check("the cluster has not seen the decision", false, 1, "0 of 2 replicas of revision r2")
	if _, by := get(); by["Halted"] != nil {
		t.Error("what was said of an older decision counts:", by["Halted"])
	}
	p := must[*portolanv1.Placement](t)(e.workloads().GetPlacement(e.as("shop"), &portolanv1.GetPlacementRequest{Name: "tenants/shop/workloads/web/placements/eu"}))
	if p.GetStatus() != nil {
		t.Error("the placement's status is of an older decision:", p.GetStatus())
	}
	e.place("eu", 2, "r2=2", 2, "r1=1/1 r2=2/1")
	check("an update under way", false, 2, "1 of 2 replicas of revision r2")
	e.place("eu", 2, "r2=2", 2, "r2=2/2")
	check("done", true, 2, "every replica")
	e.place("eu", 3, "r1=1 r2=2", 3, "r1=1/0 r2=3/3")
	check("a canary's other half is down", false, 2, "0 of 1 replicas of revision r1")
	e.place("eu", 4, "r1=1 r2=1", 4, "r1=1/1 r2=1/1", cond("Available", true, "here"), cond("Progressing", false, "up to date"))
	e.place("us", 4, "r2=1", 4, "r2=1/1", cond("Available", false, "not here"), cond("Progressing", true, "1 to go"), cond("Scheduled", false, "no node"))
	check("both halves, over two clusters", true, 2, "every replica")
	st, by := get()
	if c := by["Progressing"]; c.GetState() != portolanv1.ConditionState_CONDITION_STATE_TRUE || c.GetMessage() != "us: 1 to go" {
		t.Error(c)
	}
	if c := by["Scheduled"]; c.GetState() != portolanv1.ConditionState_CONDITION_STATE_FALSE || c.GetMessage() != "us: no node" {
		t.Error(c)
	}
	if cs := st.GetPlacements()[1].GetConditions(); len(cs) != 3 || cs[0].GetMessage() != "not here" {
		t.Error("us speaks for itself with its placement:", cs)
	}
}

func TestJobIsCompleteWhenEveryClusterSaysSo(t *testing.T) {
	st := &portolanv1.WorkloadStatus{Placements: []*portolanv1.PlacementSummary{
		{Cluster: "eu", Conditions: []*portolanv1.Condition{cond("Complete", true, "2 of 2")}},
		{Cluster: "us"},
	}}
	state := func() portolanv1.ConditionState { return rollUp(&portolanv1.Workload{}, st)[0].GetState() }
	if state() != portolanv1.ConditionState_CONDITION_STATE_FALSE {
		t.Error("one of two clusters made it complete")
	}
	st.Placements[1].Conditions = []*portolanv1.Condition{cond("Complete", false, "1 of 2")}
	if state() != portolanv1.ConditionState_CONDITION_STATE_FALSE {
		t.Error("a cluster that says no was not heard")
	}
	st.Placements[1].Conditions = []*portolanv1.Condition{cond("Complete", true, "2 of 2")}
	if got := rollUp(&portolanv1.Workload{}, st); len(got) != 1 || !proto.Equal(got[0], cond("Complete", true, "eu: 2 of 2; us: 2 of 2")) {
		t.Error(got)
	}
}

// TestShortfallIsOfTheKind: what a workload lacks is counted as its kind is placed.
func TestShortfallIsOfTheKind(t *testing.T) {
	cases := []struct {
		name             string
		spec             func(*portolanv1.WorkloadSpec)
		placed           []string
		standsIn         int32
		desired, lacking int32
		says             string
	}{
		{"a cron in no cluster", func(s *portolanv1.WorkloadSpec) {
			s.Kind, s.Replicas, s.Update = portolanv1.WorkloadKind_WORKLOAD_KIND_CRON, nil, nil
			s.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: 1, Parallelism: 1}
			s.Cron = &portolanv1.WorkloadSpec_CronSpec{Schedule: "0 3 * * *"}
		}, nil, 0, 0, 1, "no cluster has it"},
		{"all in every cluster", func(s *portolanv1.WorkloadSpec) {
			s.Placement = &portolanv1.WorkloadSpec_Placement{Division: portolanv1.Division_DIVISION_DUPLICATED}
		}, []string{"r1=2", "r1=2"}, 0, 4, 0, "every replica"},
		{"not all in one", func(s *portolanv1.WorkloadSpec) {
			s.Placement = &portolanv1.WorkloadSpec_Placement{Division: portolanv1.Division_DIVISION_DUPLICATED}
		}, []string{"r1=2", "r1=1"}, 0, 4, 1, "1 of 4"},
		{"what stands in hides nothing", func(*portolanv1.WorkloadSpec) {}, []string{"r1=1", "r1=1"}, 1, 2, 1, "1 of 2"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t)
			e.tenant("shop")
			w := workload("shop", "web")
			c.spec(w.Spec)
			e.create("shop", w)
			for i, decided := range c.placed {
				name := fmt.Sprintf("c%d", i)
				e.place(name, 1, decided, 1, "")
				if full := "tenants/shop/workloads/web/placements/" + name; i == 1 && c.standsIn > 0 {
					spec := &portolanv1.PlacementSpec{
						Epoch: 1, Revisions: []*portolanv1.RevisionReplicas{{Revision: "r1", Replicas: c.standsIn}},
						Reasons: []*portolanv1.Reason{{Code: place.Failover, Count: c.standsIn}},
					}
					e.put(store.Placement, full, &portolanv1.Placement{Name: full, Spec: spec})
				}
			}
			got := must[*portolanv1.Workload](t)(e.workloads().GetWorkload(e.as("shop"), &portolanv1.GetWorkloadRequest{Name: "tenants/shop/workloads/web"})).GetStatus()
			if got.GetDesiredReplicas() != c.desired || got.GetUnplacedReplicas() != c.lacking {
				t.Errorf("%d of %d are unplaced, want %d of %d", got.GetUnplacedReplicas(), got.GetDesiredReplicas(), c.lacking, c.desired)
			}
			placed := got.GetConditions()[0]
			if is := placed.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE; is != (c.lacking == 0) || !strings.Contains(placed.GetMessage(), c.says) {
				t.Error(placed)
			}
		})
	}
}

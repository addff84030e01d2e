package place

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// stored is a plan as it is kept.
func stored(w Workload, p Plan) []*portolanv1.PlacementSpec {
	var out []*portolanv1.PlacementSpec
	for _, a := range p.Assignments {
		s := &portolanv1.PlacementSpec{}
		for _, r := range w.Running() {
			s.Revisions = append(s.Revisions, &portolanv1.RevisionReplicas{Revision: r.ID, Replicas: int32(a.Replicas), MaxReplicas: int32(a.Max)})
		}
		for _, r := range a.Reasons {
			s.Reasons = append(s.Reasons, &portolanv1.Reason{Code: r.Code, Count: int32(r.Count)})
		}
		out = append(out, s)
	}
	return out
}

func TestCount(t *testing.T) {
	kind := func(k portolanv1.WorkloadKind) *portolanv1.WorkloadSpec { return &portolanv1.WorkloadSpec{Kind: k} }
	service := func(n int32) *portolanv1.WorkloadSpec {
		return &portolanv1.WorkloadSpec{Replicas: &n, Placement: &portolanv1.WorkloadSpec_Placement{}}
	}
	everywhere := service(2)
	everywhere.Placement.Division = portolanv1.Division_DIVISION_DUPLICATED
	alone := service(3)
	alone.Placement.Exclusive = true
	job := kind(portolanv1.WorkloadKind_WORKLOAD_KIND_JOB)
	job.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: 50, Parallelism: 4}
	cron := kind(portolanv1.WorkloadKind_WORKLOAD_KIND_CRON)
	cron.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: 3, Parallelism: 2}
	in := func(n, instead int32) *portolanv1.PlacementSpec {
		p := &portolanv1.PlacementSpec{Revisions: []*portolanv1.RevisionReplicas{{Revision: "r", Replicas: n}, {Revision: "old", Replicas: n}}}
		if instead > 0 {
			p.Reasons = []*portolanv1.Reason{{Code: Failover, Count: instead}}
		}
		return p
	}
	type ps = []*portolanv1.PlacementSpec
	for _, c := range []struct {
		name string
		spec *portolanv1.WorkloadSpec
		ps   ps
		want Counts
	}{
		{"nowhere", service(2), nil, Counts{2, 2}},
		{"one when it does not say", &portolanv1.WorkloadSpec{}, nil, Counts{1, 1}},
		{"in two clusters", service(3), ps{in(1, 0), in(2, 0)}, Counts{3, 0}},
		{"only the old revision", service(1), ps{{Revisions: []*portolanv1.RevisionReplicas{{Revision: "old", Replicas: 1}}}}, Counts{1, 1}},
		{"what stands in hides nothing", service(4), ps{in(2, 0), in(3, 2)}, Counts{4, 1}},
		{"all in every cluster", everywhere, ps{in(2, 0), in(2, 0)}, Counts{4, 0}},
		{"all in every cluster but one", everywhere, ps{in(2, 0), in(1, 0)}, Counts{4, 1}},
		{"all in no cluster", everywhere, nil, Counts{2, 2}},
		{"alone", alone, ps{in(1, 0)}, Counts{1, 0}},
		{"a job", job, ps{in(50, 0)}, Counts{4, 0}},
		{"a job nowhere", job, nil, Counts{4, 4}},
		{"a cron", cron, ps{in(3, 0)}, Counts{0, 0}},
		{"a cron nowhere", cron, nil, Counts{0, 2}},
		{"a daemon", kind(portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON), ps{in(0, 0)}, Counts{}},
	} {
		if got := Count(c.spec, "r", c.ps); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// TestCountsAgree: what is stored tells the shortfall that was decided.
func TestCountsAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSnapshot(t)
		s.Workload.Spec.Autoscale = nil // its shortfall is of the maximum
		p := Place(s, epoch)
		if p.Frozen || isDaemon(s.Workload.Spec) || isJob(s.Workload.Spec) {
			return
		}
		got := Count(s.Workload.Spec, "0", stored(s.Workload, p))
		if duplicated(s.Workload.Spec) {
			// Clusters that got none at all are not among what is stored.
			if n := len(p.Assignments) * begin(s.Workload.Spec); n > 0 && got.Desired != n {
				t.Errorf("%d desired in %d clusters", got.Desired, len(p.Assignments))
			}
			return
		}
		if got.Desired != p.Desired || got.Unplaced != p.Unplaced {
			t.Errorf("%+v is stored, decided was %d unplaced of %d", got, p.Unplaced, p.Desired)
		}
	})
}

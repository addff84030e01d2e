package control

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

func (r *rig) plan(c *Control, what api.WhatIf) *portolanv1.PlanResponse {
	r.t.Helper()
	var out *portolanv1.PlanResponse
	if _, err := r.s.View(r.t.Context(), func(rd store.Reader) error {
		var err error
		out, err = c.Plan(rd, what)
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	return out
}

func clusterIs(kind portolanv1.ClusterChange_Kind, id string) api.WhatIf {
	return api.WhatIf{Cluster: &portolanv1.ClusterChange{Kind: kind, Cluster: &portolanv1.Cluster{Name: "clusters/" + id}}}
}

func wouldBe(id, revision string, s *portolanv1.WorkloadSpec) api.WhatIf {
	return api.WhatIf{Workload: &portolanv1.Workload{Name: api.WorkloadName("t", id), Spec: s, Status: &portolanv1.WorkloadStatus{CurrentRevision: revision}}}
}

// foretells compares what a plan says, as "workload@cluster before→after", who is
// displaced and what has no place.
func (r *rig) foretells(when string, p *portolanv1.PlanResponse, want string) {
	r.t.Helper()
	var out []string
	for _, w := range p.GetWorkloads() {
		id := lastID(w.GetWorkload())
		for _, x := range w.GetPlacements() {
			out = append(out, fmt.Sprintf("%s@%s %d→%d", id, x.GetCluster(), x.GetReplicasBefore(), x.GetReplicasAfter()))
		}
		for _, d := range w.GetDisplaced() {
			out = append(out, fmt.Sprintf("%s takes %d of %s@%s", id, d.GetReplicas(), lastID(d.GetWorkload()), d.GetCluster()))
		}
		if w.GetUnplacedReplicas() > 0 {
			out = append(out, fmt.Sprintf("%s lacks %d", id, w.GetUnplacedReplicas()))
		}
	}
	if got := strings.Join(out, ", "); got != want {
		r.t.Errorf("%s:\n got %s\nwant %s", when, got, want)
	}
}

func only(s *portolanv1.WorkloadSpec, regions ...string) *portolanv1.WorkloadSpec {
	s.Placement.AllowedRegions = regions
	return s
}

// TestPlanGoesOn: a displacement ends a step of the loop, not the plan.
func TestPlanGoesOn(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 5)
		r.cluster("us", "us", 4)
		r.workload("mid", "v1", only(important(5, 4), "us"))
		r.workload("high", "v1", only(important(10, 4), "eu", "us"))
		r.workload("low", "v1", only(important(0, 1), "eu", "ap"))
		r.cluster("ap", "ap", 1)
		r.want("placed", "high@eu v1×4, low@eu v1×1, mid@us v1×4")
		r.foretells("drained", r.plan(c, clusterIs(portolanv1.ClusterChange_KIND_DRAINED, "eu")),
			"high@eu 4→0, high@us 0→4, high takes 4 of mid@us, low@ap 0→1, low@eu 1→0, mid@us 4→0, mid lacks 4")
	})
}

// TestPlanTellsShortfall: also what changes no placement is told, when replicas
// have no place because of the change; who lacked it before is not.
func TestPlanTellsShortfall(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.cluster("us", "us", 4)
		s := spec(8)
		s.Placement.Failover = &portolanv1.WorkloadSpec_Failover{After: durationpb.New(0)}
		r.workload("web", "v1", s)
		r.workload("waits", "v1", spec(2))
		r.want("full", "web@eu v1×4, web@us v1×4")
		r.foretells("lost", r.plan(c, clusterIs(portolanv1.ClusterChange_KIND_LOST, "eu")), "web@eu 4→4, web@us 4→4, web lacks 4")
		more := proto.CloneOf(s)
		more.Replicas = proto.Int32(11)
		r.foretells("scaled", r.plan(c, wouldBe("web", "v1", more)), "web@eu 4→4, web@us 4→4, web lacks 3")
		job := spec(0)
		job.Kind, job.Job = portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, &portolanv1.WorkloadSpec_JobSpec{Completions: 3, Parallelism: 3}
		r.foretells("a new job", r.plan(c, wouldBe("etl", "v1", job)), "etl lacks 3")
		r.want("nothing was changed", "web@eu v1×4, web@us v1×4")
	})
}

// TestPlanGivesRoom: room that a change makes goes to who waits for it.
func TestPlanGivesRoom(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.workload("web", "v1", spec(4))
		r.workload("waits", "v1", spec(2))
		r.want("full", "web@eu v1×4")
		r.foretells("scaled down", r.plan(c, wouldBe("web", "v1", spec(3))), "waits@eu 0→1, waits lacks 1, web@eu 4→3")
		r.foretells("deleted", r.plan(c, api.WhatIf{Deleted: api.WorkloadName("t", "web")}), "waits@eu 0→2, web@eu 4→0")
		r.update(func(tx store.Tx) error { return tx.Delete(store.Workload, api.WorkloadName("t", "web")) })
		r.want("as it was foretold", "waits@eu v1×2")
	})
}

// TestPlanFollowsAffinity: who must be near another is foretold to follow it, and
// what is foretold comes about.
func TestPlanFollowsAffinity(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.workload("db", "v1", spec(1))
		near := spec(1)
		near.Placement.Affinity = []*portolanv1.WorkloadSpec_ClusterAffinity{{Workload: "db"}}
		r.workload("api", "v1", near)
		r.cluster("us", "us", 4)
		r.want("placed", "api@eu v1×1, db@eu v1×1")
		r.foretells("drained", r.plan(c, clusterIs(portolanv1.ClusterChange_KIND_DRAINED, "eu")), "api@eu 1→0, api@us 0→1, db@eu 1→0, db@us 0→1")
		moved := only(spec(1), "us")
		r.foretells("one moves, the other follows", r.plan(c, wouldBe("db", "v2", moved)), "api@eu 1→0, api@us 0→1, db@eu 1→0, db@us 0→1")
		r.workload("db", "v2", moved)
		r.want("as it was foretold", "api@us v1×1, db@us v2×1")
	})
}

// TestPlanCountsPools: a plan costs what placing counts: the prices of pools, spot
// nodes first.
func TestPlanCountsPools(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 6)
		st := status(ready, 6)
		st.Status.Pools = []*portolanv1.PoolStatus{
			{Pool: "default", CpuMilli: 4000, MemoryBytes: 1 << 39, CpuCoreHourMicros: 1000},
			{Pool: "spot", CpuMilli: 2000, MemoryBytes: 1 << 39, Spot: true, CpuCoreHourMicros: 100},
		}
		r.update(func(tx store.Tx) error { return errors.Join(tx.Put(store.ClusterStatus, "clusters/eu", st)) })
		s := spec(1)
		s.Placement.Capacity = portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED
		r.workload("web", "v1", s)
		more := proto.CloneOf(s)
		more.Replicas = proto.Int32(3)
		if p := r.plan(c, wouldBe("web", "v1", more)); p.GetCostBeforeMicros() != 100 || p.GetCostAfterMicros() != 1200 {
			t.Errorf("one on spot nodes, then two and one beside: %d → %d, want 100 → 1200", p.GetCostBeforeMicros(), p.GetCostAfterMicros())
		}
		if p := r.plan(c, wouldBe("plain", "v1", spec(2))); p.GetCostAfterMicros() != 2000 {
			t.Errorf("two on demand cost %d, want 2000", p.GetCostAfterMicros())
		}
	})
}

package control

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

func important(priority, replicas int32) *portolanv1.WorkloadSpec {
	s := spec(replicas)
	s.Priority = priority
	return s
}

// TestDisplacement: who matters more takes the room of who matters less, and the
// latter goes elsewhere, in the same transaction; equals lose nothing.
func TestDisplacement(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.workload("low", "v1", important(0, 4))
		r.want("alone", "low@eu v1×4")
		r.workload("equal", "v1", important(0, 1))
		r.want("equals wait", "low@eu v1×4")
		polite := important(5, 1)
		polite.NeverPreempt = true
		r.workload("polite", "v1", polite)
		r.want("the polite wait", "low@eu v1×4")
		r.workload("high", "v1", important(10, 3))
		r.want("three are taken", "high@eu v1×3, low@eu v1×1")
		r.cluster("us", "us", 8)
		r.want("the displaced go elsewhere", "equal@us v1×1, high@eu v1×3, low@eu v1×1, low@us v1×3, polite@us v1×1")
		r.workload("top", "v1", important(20, 6))
		r.want("a chain: who is displaced displaces", "equal@us v1×1, high@eu v1×3, low@us v1×1, polite@us v1×1, top@eu v1×1, top@us v1×5")
	})
}

// TestDisplacementEverywhere: a daemon and replicas that every cluster has make room
// in each.
func TestDisplacementEverywhere(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.cluster("us", "us", 4)
		r.workload("low", "v1", important(0, 8))
		agent := important(0, 1)
		agent.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
		r.workload("agent", "v1", agent)
		r.want("equals wait", "low@eu v1×4, low@us v1×4")
		agent = proto.CloneOf(agent)
		agent.Priority = 10
		r.workload("agent", "v1", agent) // on two nodes
		r.want("it takes two in each", "agent@eu v1×0, agent@us v1×0, low@eu v1×2, low@us v1×2")
		all := important(5, 1)
		all.Placement.Division = portolanv1.Division_DIVISION_DUPLICATED
		r.workload("all", "v1", all)
		r.want("they take one in each", "agent@eu v1×0, agent@us v1×0, all@eu v1×1, all@us v1×1, low@eu v1×1, low@us v1×1")
	})
}

// TestPriorityOrder: the room goes to who matters more, whoever came first.
func TestPriorityOrder(t *testing.T) {
	run(t, func(r *rig) {
		r.cluster("eu", "eu", 4)
		r.workload("a", "v1", important(0, 4))
		r.workload("b", "v1", important(10, 3))
		r.start("one", r.s)
		r.want("together", "a@eu v1×1, b@eu v1×3")
	})
}

// TestExclusiveMoves: it begins elsewhere only when its cluster tells that it has
// stopped, under the generation that told it to.
func TestExclusiveMoves(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.cluster("us", "us", 4)
		s := spec(1)
		s.Placement.Exclusive = true
		r.workload("one", "v1", s)
		r.want("placed", "one@eu v1×1")
		report := func(generation int64, replicas int32) {
			r.update(func(tx store.Tx) error {
				return tx.Put(store.PlacementStatus, "tenants/t/workloads/one/placements/eu", &storev1.PlacementStatusRecord{Status: &portolanv1.PlacementStatus{
					ObservedGeneration: generation, Revisions: []*portolanv1.RevisionReplicas{{Revision: "v1", Replicas: replicas}},
				}})
			})
		}
		report(1, 1)
		r.state("eu", lost, 4)
		r.want("stays with a lost cluster", "one@eu v1×1")
		r.state("eu", ready, 4)
		s = spec(1)
		s.Placement.Exclusive, s.Placement.ForbiddenRegions = true, []string{"eu"}
		r.workload("one", "v1", s)
		r.want("told to stop", "one@eu v1×0")
		report(1, 0)
		r.want("an old report", "one@eu v1×0")
		report(2, 1)
		r.want("it still runs", "one@eu v1×0")
		report(2, 0)
		r.want("stopped", "one@us v1×1")
	})
}

// TestAffinityFollows: who must be near another is decided anew when that moves.
func TestAffinityFollows(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		r.cluster("us", "us", 4)
		near := spec(1)
		near.Placement.Affinity = []*portolanv1.WorkloadSpec_ClusterAffinity{{Workload: "db"}}
		r.workload("app", "v1", near)
		r.want("db runs nowhere", "")
		db := spec(1)
		db.Placement.AllowedRegions = []string{"us"}
		r.workload("db", "v1", db)
		r.want("beside it", "app@us v1×1, db@us v1×1")
		db = spec(1)
		db.Placement.AllowedRegions = []string{"eu"}
		r.workload("db", "v1", db)
		r.want("it follows", "app@eu v1×1, db@eu v1×1")
	})
}

// TestSpot: spot nodes are only for who allows them.
func TestSpot(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 5)
		r.update(func(tx store.Tx) error {
			st := status(ready, 5)
			st.Status.Pools = []*portolanv1.PoolStatus{{Pool: "default", CpuMilli: 2000, MemoryBytes: 1 << 39}, {Pool: "spot", CpuMilli: 3000, MemoryBytes: 1 << 39, Spot: true}}
			return errors.Join(tx.Put(store.ClusterStatus, "clusters/eu", st))
		})
		r.workload("plain", "v1", spec(4))
		r.want("only on demand", "plain@eu v1×2")
		s := spec(4)
		s.Placement.Capacity = portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED
		r.workload("spot", "v1", s)
		r.want("spot, and nothing is left on demand", "plain@eu v1×2, spot@eu v1×3")
	})
}

// TestDemandIsDemand: who names on-demand nodes and who names none share them, and
// displace each other.
func TestDemandIsDemand(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		named := func(priority int32) *portolanv1.WorkloadSpec {
			s := important(priority, 3)
			s.Placement.Capacity = portolanv1.CapacityType_CAPACITY_TYPE_ON_DEMAND
			return s
		}
		r.workload("low", "v1", important(0, 4))
		r.workload("mid", "v1", named(5))
		r.want("the named takes from the unnamed", "low@eu v1×1, mid@eu v1×3")
		r.workload("high", "v1", important(10, 4))
		r.want("and the other way round", "high@eu v1×4")
	})
}

package schedule

import (
	"fmt"
	"testing"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

type affinityTerm = portolanv1.WorkloadSpec_WorkloadAffinity

func nearTo(workload, key string) *affinityTerm {
	return &affinityTerm{Workload: workload, TopologyKey: key}
}

func awayFrom(workload, key string) *affinityTerm {
	return &affinityTerm{Workload: workload, TopologyKey: key, Anti: true}
}

func wished(a *affinityTerm) *affinityTerm {
	a.Prefer, a.Weight = true, 50
	return a
}

// families are those of Kubernetes' scheduler_perf: 1,000 replicas of "seed" are
// bound, then 5 workloads of 200 are placed.
var families = []struct {
	name   string
	change func(s *portolanv1.WorkloadSpec_Scheduling, own string)
}{
	{"basic", nil},
	{"node-affinity", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.NodeAffinity = []*portolanv1.RequirementTerm{{Requirements: []*portolanv1.Requirement{{Key: "zone", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN, Values: []string{"z1", "z2"}}}}}
	}},
	{"preferred-nodes", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.PreferredNodes = []*portolanv1.WorkloadSpec_PreferredNodes{{Weight: 50, Term: &portolanv1.RequirementTerm{Requirements: []*portolanv1.Requirement{{Key: "zone", Operator: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN, Values: []string{"z1"}}}}}}
	}},
	{"anti-affinity-node", func(s *portolanv1.WorkloadSpec_Scheduling, own string) {
		s.Affinity = []*affinityTerm{awayFrom(own, NodeKey), awayFrom("seed", NodeKey)}
	}},
	{"affinity-zone", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.Affinity = []*affinityTerm{nearTo("seed", "zone")}
	}},
	{"affinity-own-rack", func(s *portolanv1.WorkloadSpec_Scheduling, own string) {
		s.Affinity = []*affinityTerm{nearTo(own, "rack")}
	}},
	{"affinity-node", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.Affinity = []*affinityTerm{nearTo("seed", NodeKey)}
	}},
	{"preferred-affinity-node", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.Affinity = []*affinityTerm{wished(nearTo("seed", NodeKey))}
	}},
	{"preferred-anti-affinity-node", func(s *portolanv1.WorkloadSpec_Scheduling, own string) {
		s.Affinity = []*affinityTerm{wished(awayFrom(own, NodeKey)), wished(awayFrom("seed", NodeKey))}
	}},
	{"spread-zone", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) { s.SpreadKey, s.MaxSkew = "zone", 5 }},
	{"preferred-spread", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) {
		s.Spreads = []*portolanv1.WorkloadSpec_TopologySpread{{TopologyKey: "rack", MaxSkew: 5, Prefer: true}}
	}},
	{"spread-node", func(s *portolanv1.WorkloadSpec_Scheduling, _ string) { s.SpreadKey, s.MaxSkew = NodeKey, 1 }},
	{"mixed", func(s *portolanv1.WorkloadSpec_Scheduling, own string) {
		s.SpreadKey, s.MaxSkew = "rack", 2
		s.Affinity = []*affinityTerm{nearTo("seed", "zone"), awayFrom(own, NodeKey), wished(awayFrom("seed", NodeKey))}
	}},
}

// BenchmarkT3_Affinity places every family; the worst over the best is the distance
// of the slowest line from the fastest with as many nodes.
func BenchmarkT3_Affinity(b *testing.B) {
	const workloads, replicas, seeds = 5, 200, 1000
	for _, n := range []int{1000, 5000, 10000, 100000} {
		for _, f := range families {
			b.Run(fmt.Sprintf("nodes=%d/family=%s", n, f.name), func(b *testing.B) {
				fl := &fleet{t: w1Table(n)}
				seed := mustCompile(b, w1Spec(func(s *portolanv1.WorkloadSpec_Scheduling) { s.NodeSelector = nil }), "seed")
				for i := range seeds {
					fl.t.PutReplica(Replica{ID: fmt.Sprintf("seed%d", i), Class: seed, Node: fmt.Sprintf("n%06d", i*7919%(n/2))})
				}
				var batch Batch
				for j := range workloads {
					own := fmt.Sprintf("job%d", j)
					c := mustCompile(b, w1Spec(func(s *portolanv1.WorkloadSpec_Scheduling) {
						s.NodeSelector = nil
						if f.change != nil {
							f.change(s, own)
						}
					}), own)
					batch.Groups = append(batch.Groups, Group{Key: own, Class: c, Count: replicas})
				}
				want := workloads * replicas
				benchBatches(b, fl, batch, want)
			})
		}
	}
}

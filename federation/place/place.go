// Package place decides how many replicas of a workload run in which cluster.
// It is a pure function of one snapshot: it reads no clock, holds no state and
// writes nothing; who calls it checks the plan again against the present and
// commits it. Every cluster gets reasons, also those that are not chosen, and the
// smallest changes that would let it take one more.
//
// The order of what counts: hard constraints; then the domains that spreads ask
// for; then that everything is placed; then that nothing moves without need; then
// wishes, and last the objective. What moves repairs a broken constraint, returns
// to an earlier group of the fallbacks, or follows another objective.
//
// Concurrency: Place and PlaceAll may be called from anywhere; they keep nothing
// and only read what they are given.
package place

import (
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// defaultFailoverAfter is how long a cluster must be silent when the workload's
// failover does not say.
const defaultFailoverAfter = 5 * time.Second

// Snapshot is what a decision depends on, besides the time.
type Snapshot struct {
	Workload Workload
	// Clusters of the whole fleet, in any order, IDs unique.
	Clusters []Cluster
	// Others are the workloads of the same tenant that this one's affinity names,
	// and those whose affinity names this one.
	Others []Other
	// Brief leaves out the verdicts on clusters that get nothing.
	Brief bool
}

// Workload is what is placed.
type Workload struct {
	// ID within its tenant, by which affinity may name it.
	ID   string
	Spec *portolanv1.WorkloadSpec
	// Residency are the regions that the tenant may run in; empty means all.
	Residency []string
	// Revisions that run beside each other, each with all replicas. Of an exclusive
	// workload only the first runs.
	Revisions []Revision
}

// Other is a workload as affinity sees it.
type Other struct {
	ID string
	// Clusters that run it.
	Clusters []string
	// Affinity of it, of which those count that name the workload to be placed.
	Affinity []*portolanv1.WorkloadSpec_ClusterAffinity
}

// Cluster is one cluster as the decision sees it.
type Cluster struct {
	ID     string
	Labels map[string]string
	Spec   *portolanv1.ClusterSpec
	State  portolanv1.ClusterState
	// LastSeen is when it last spoke; Changed is the latest time at which its taints
	// may have come.
	LastSeen, Changed time.Time
	// Nodes that the cluster has; a daemon runs on each.
	Nodes int
	// Pools that it tells of, for prices and devices.
	Pools []*portolanv1.PoolStatus
	// Free is the capacity on demand, and Spot that of spot pools, less what is
	// promised to all other workloads (Pot.Free). Negative: too much is promised.
	Free, Spot api.Resources
	// Previous is what this workload has there.
	Previous Previous
	// Ready replicas of each revision that the cluster last reported. It only
	// says how long replicas go on standing in for a cluster that came back.
	Ready int
	// Stopped says that the cluster has carried out what was last written, and runs
	// nothing of this workload. An exclusive one moves only then.
	Stopped bool
	// Lower are claims there of workloads with a lower priority, that may be
	// displaced. Without any, nothing is displaced.
	Lower []Claimant
}

// Claimant is a claim that a workload of higher priority may take away.
type Claimant struct {
	Workload string
	Priority int
	// Replicas that it has there, what each of them claims, and what all do with the
	// surge of an update (Workload.Claimant).
	Replicas    int
	Each, Claim api.Resources
	// per is how many replicas each of them stands for: a job is displaced whole.
	per int
}

// Previous is an earlier decision for one cluster.
type Previous struct {
	// Present says that there is a placement, be it of no replicas.
	Present bool
	// Declared replicas, and those more that stand in for lost clusters; of a
	// workload that scales by itself, its share of the maximum.
	Declared, Failover int
	// Claim is what it reserves.
	Claim api.Resources
	// Basis is what it was to bring about (Plan.Basis); unknown when empty.
	Basis string
}

// PreviousOf reads it from the stored placement.
func PreviousOf(p *portolanv1.PlacementSpec) Previous {
	out := Previous{Present: true, Basis: p.GetBasis(), Claim: api.Resources{CPUMilli: p.GetReservedCpuMilli(), MemoryBytes: p.GetReservedMemoryBytes()}}
	for _, r := range p.GetRevisions() {
		out.Declared = max(out.Declared, int(r.GetReplicas()), int(r.GetMaxReplicas()))
	}
	for _, r := range p.GetReasons() {
		if r.GetCode() == Failover {
			out.Failover = min(int(r.GetCount()), out.Declared)
			out.Declared -= out.Failover
		}
	}
	return out
}

// Reason is a stable code and a sentence.
type Reason struct {
	Code, Message string
	// Count of replicas that it speaks of; 0 when none.
	Count int
}

// Remedy is a change after which a cluster could take one more, together with the
// other remedies of its verdict.
type Remedy struct {
	// Code of the refusal that it lifts.
	Code, Message string
	// Key and Value say what is to be changed: a region, a label and its value, a
	// taint's key, another workload.
	Key, Value string
	// Amount is the room to be made.
	Amount api.Resources
	// Number is the least new value of a bound, and Index whose, of the spreads.
	Number, Index int
}

// Assignment is the decision for one cluster that runs the workload.
type Assignment struct {
	Cluster string
	// Replicas of each revision, those for lost clusters included; of a daemon 0, and
	// 0 where an exclusive workload leaves.
	Replicas int
	// Min and Max bound what the cluster scales to by itself; both 0 when it does
	// not. Replicas is then where it begins.
	Min, Max int
	// Failover is how many of them stand in for lost clusters.
	Failover int
	// Claim is what to reserve: replicas (or Max) and surge of all revisions.
	Claim   api.Resources
	Reasons []Reason
}

// Verdict is what the decision has to say about one cluster.
type Verdict struct {
	Cluster string
	// Feasible: it may run replicas of this workload and has room for one.
	Feasible bool
	Replicas int
	// Score orders clusters of the same standing; higher is better. It is the
	// price of the next replica-hour in micro-units of currency, negative; with the
	// objective latency the mean round trip in microseconds, negative.
	Score   int64
	Reasons []Reason
	// Remedies, all of them together, let it take one more; none where it takes one
	// more anyway, or where nothing would.
	Remedies []Remedy
}

// Displaced is what a workload of lower priority loses in a cluster.
type Displaced struct {
	Workload, Cluster string
	Replicas          int
}

// Plan is the decision.
type Plan struct {
	// Desired replicas of each revision over the fleet, and how many of them no
	// cluster could take; of a workload that scales by itself, of its maximum. Of a
	// daemon they are clusters: that are to have it, and that have no room.
	Desired, Unplaced int
	// FailoverUnplaced replicas of lost clusters could not be placed elsewhere.
	FailoverUnplaced int
	// Moved is how many replicas leave a cluster for another.
	Moved int
	// CostMicros of an hour of what is placed, in micro-units of currency.
	CostMicros int64
	// Basis is what the decision was asked to bring about. Kept with the placements,
	// it tells the next decision whether that was changed since.
	Basis string
	// Assignments in order of cluster ID.
	Assignments []Assignment
	// Verdicts on every cluster, in order of ID.
	Verdicts []Verdict
	// Displaced claims of lower priority, in order of cluster and workload. Whoever
	// carries the plan out takes them away.
	Displaced []Displaced
	// Reasons that are about no single cluster.
	Reasons []Reason
	// Frozen: everything looks dead, so the plan is what was there before.
	Frozen bool
	// Scored is what scores measure: OBJECTIVE_LATENCY or OBJECTIVE_COST.
	Scored portolanv1.Objective
	// Again is when time alone may change the decision; zero when it cannot.
	Again time.Time
}

// Place decides. The same snapshot and time give the same plan.
func Place(s Snapshot, now time.Time) Plan {
	d := newDecision(&s, now)
	d.decide()
	return d.plan()
}

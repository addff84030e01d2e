package sim

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func compareKeys(a, b reconcile.Key) int { return strings.Compare(a.String(), b.String()) }

// Bounds on evictions, as reconcile states them: within ten seconds at most a
// quarter of what runs, and at least twenty.
const (
	evictionWindow = 10 * time.Second
	evictionMin    = 20
	evictionShare  = 4
)

// check holds the invariants of reliability against the state after a pass.
func (c *Cluster) check(in reconcile.Input, plan reconcile.Plan) error {
	var errs []error
	broken := func(number int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("invariant %d: %s", number, fmt.Sprintf(format, args...)))
	}
	c.checkNumbers(broken)
	c.checkServing(broken)
	c.checkVolumes(broken)
	c.checkBound(broken)
	c.checkNodes(broken)
	c.checkOrphans(broken)
	c.checkEvictions(plan, broken)
	c.checkEpochs(broken)
	c.checkRuns(broken)
	return errors.Join(errs...)
}

type report func(number int, format string, args ...any)

// mine are the records of the present workload of a key.
func (c *Cluster) mine(k reconcile.Key) []*clusterv1.Allocation {
	var out []*clusterv1.Allocation
	uid := c.intents[k].Intent.GetUid()
	for _, id := range slices.Sorted(maps.Keys(c.allocs)) {
		if a := c.allocs[id]; a.GetTenant() == k.Tenant && a.GetWorkload() == k.Workload && a.GetUid() == uid {
			out = append(out, a)
		}
	}
	return out
}

func (c *Cluster) spec0(k reconcile.Key) *portolanv1.WorkloadSpec {
	return c.intents[k].Intent.GetRevisions()[0].GetSpec()
}

func longRunning(s *portolanv1.WorkloadSpec) bool {
	return s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE || s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL
}

// serving counts, by workload, the replicas that are ready and meant to stay.
func (c *Cluster) serving() map[reconcile.Key]int {
	out := map[reconcile.Key]int{}
	for _, a := range c.allocs {
		if n := c.nodes[a.GetNode()]; !n.gone() && !a.GetStop() && n.reported[a.GetAllocation()].GetReady() {
			out[reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}]++
		}
	}
	return out
}

// checkNumbers: never more than desired and surge; who is to leave and waits for
// its replacement apart.
func (c *Cluster) checkNumbers(broken report) {
	for k, w := range c.intents {
		s := c.spec0(k)
		if !longRunning(s) {
			continue
		}
		active, leaving := 0, 0
		for _, a := range c.mine(k) {
			switch {
			case a.GetStop() || a.GetFinal() != nil || c.nodes[a.GetNode()].gone():
			case a.GetDisrupted() && a.GetReplacedBy() != "":
				leaving++
			default:
				active++
			}
		}
		want := int(w.Intent.GetRevisions()[0].GetReplicas()) + max(int(s.GetUpdate().GetMaxSurge()), 1)
		if s.GetUpdate().GetMaxUnavailable() > 0 && s.GetUpdate().GetMaxSurge() == 0 {
			want-- // no surge at all
		}
		if created := c.createdNow(k); active > want && created {
			broken(1, "%s has %d replicas (%d more are leaving), %d are the most", k, active, leaving, want)
		}
	}
}

// createdNow says whether this pass made replicas of a workload: what was too much
// before may take a while to go.
func (c *Cluster) createdNow(k reconcile.Key) bool {
	return slices.ContainsFunc(c.pass.bound, func(id string) bool {
		a := c.allocs[id]
		return a.GetTenant() == k.Tenant && a.GetWorkload() == k.Workload
	})
}

// voluntary are the codes of stops that must leave enough replicas serving.
var voluntary = map[string]bool{
	reconcile.RevisionReplaced: true, reconcile.NodeDraining: true, reconcile.Rebalance: true, reconcile.Moved: true, reconcile.Displaced: true,
}

// checkServing: what is stopped on purpose leaves as many serving as updates and
// budgets ask for.
func (c *Cluster) checkServing(broken report) {
	after := c.serving()
	byKey := map[reconcile.Key]bool{}
	for _, s := range c.pass.stops {
		if ok, seen := byKey[s.Key]; !seen || ok {
			byKey[s.Key] = voluntary[s.Code]
		}
	}
	for k, onlyVoluntary := range byKey {
		if _, wanted := c.intents[k]; !wanted || !onlyVoluntary || !longRunning(c.spec0(k)) || c.foreign(k) {
			continue
		}
		s, total := c.spec0(k), int(c.intents[k].Intent.GetRevisions()[0].GetReplicas())
		floor := min(total-int(s.GetUpdate().GetMaxUnavailable()), c.floor(s, total))
		if before := c.pass.before[k]; after[k] < min(before, floor) {
			broken(1, "%s has %d replicas serving after voluntary stops, %d before, %d are the least", k, after[k], before, floor)
		}
	}
}

// foreign says that replicas of an earlier workload of the name are around: these
// go whatever serves.
func (c *Cluster) foreign(k reconcile.Key) bool {
	for _, a := range c.allocs {
		if a.GetTenant() == k.Tenant && a.GetWorkload() == k.Workload && a.GetUid() != c.intents[k].Intent.GetUid() {
			return true
		}
	}
	return false
}

// floor is how many must serve under the budget of a spec.
func (c *Cluster) floor(s *portolanv1.WorkloadSpec, total int) int {
	b := s.GetDisruption()
	switch {
	case b.GetMaxPerHour() > 0 || b != nil && b.MaxPerHour != nil:
		return 0 // a rate only, checked by count
	case b != nil && b.MaxUnavailable != nil:
		return total - int(b.GetMaxUnavailable())
	case b != nil && b.MaxUnavailablePercent != nil:
		return total - (total*int(b.GetMaxUnavailablePercent())+99)/100
	case b != nil && b.MinAvailable != nil:
		return int(b.GetMinAvailable())
	}
	return max(total-1, (total+1)/2)
}

// checkVolumes: no two processes in the world have one volume, cut-off nodes
// included, and who has one is where it is.
func (c *Cluster) checkVolumes(broken report) {
	at := map[string]string{}
	for _, id := range c.nodeIDs() {
		for _, a := range slices.Sorted(maps.Keys(c.nodes[id].procs)) {
			for _, v := range c.nodes[id].procs[a].volumes {
				if other, taken := at[v]; taken {
					broken(2, "%s has a process %s on %s, and %s", v, a, id, other)
				}
				at[v] = a + " on " + id
			}
		}
	}
	for _, a := range c.allocs {
		for _, v := range a.GetVolumes() {
			if vol := c.volumes[v]; vol != nil && vol.GetNode() != a.GetNode() && vol.GetUid() == a.GetUid() {
				broken(2, "%s is on %s, its volume %s on %s", a.GetAllocation(), a.GetNode(), v, vol.GetNode())
			}
		}
	}
}

// checkBound: what was bound now is where labels, taints, modes and other workloads
// let it be.
func (c *Cluster) checkBound(broken report) {
	for _, id := range c.pass.bound {
		a := c.allocs[id]
		n := c.nodes[a.GetNode()]
		daemon := a.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
		switch {
		case n.gone():
			broken(3, "%s was bound to the lost node %s", id, a.GetNode())
			continue
		case n.record.GetMode() != 0 && !daemon:
			broken(3, "%s was bound to %s, which is %v", id, a.GetNode(), n.record.GetMode())
		case !schedule.Admit(&clusterv1.Node{Node: a.GetNode(), Facts: n.record.GetFacts()}, a.GetSpec()).Begin:
			broken(3, "%s was bound to %s, whose labels and taints refuse it", id, a.GetNode())
		}
		for _, o := range c.allocs {
			if o != a && o.GetTenant() == a.GetTenant() && !o.GetStop() && o.GetFinal() == nil && !c.nodes[o.GetNode()].gone() && o.GetReplacedBy() == "" && (c.apart(a, o) || c.apart(o, a)) {
				broken(3, "%s was bound to %s, and keeps apart from %s on %s", id, a.GetNode(), o.GetAllocation(), o.GetNode())
			}
		}
	}
}

// apart says that a may not be in one domain with o, and is.
func (c *Cluster) apart(a, o *clusterv1.Allocation) bool {
	for _, f := range a.GetSpec().GetScheduling().GetAffinity() {
		if !f.GetAnti() || f.GetPrefer() || f.GetWorkload() != o.GetWorkload() {
			continue
		}
		domain := func(x *clusterv1.Allocation) string {
			if f.GetTopologyKey() == schedule.NodeKey {
				return x.GetNode()
			}
			return c.nodes[x.GetNode()].record.GetFacts().GetLabels()[f.GetTopologyKey()]
		}
		if domain(a) == domain(o) {
			return true
		}
	}
	return false
}

// checkNodes: no node promises more than it has.
func (c *Cluster) checkNodes(broken report) {
	for _, id := range c.nodeIDs() {
		f := c.nodes[id].record.GetFacts()
		used, shares := c.used(id)
		if used.CPUMilli > f.GetCpuMilli() || used.MemoryBytes > f.GetMemoryBytes() {
			broken(4, "node %s has promised %v of %d and %d", id, used, f.GetCpuMilli(), f.GetMemoryBytes())
		}
		for d, milli := range shares {
			if milli > 1000 {
				broken(4, "device %d of node %s is promised %d thousandths", d, id, milli)
			}
		}
	}
}

// checkOrphans: a process of a node that has just been told everything belongs to
// a record, or is ending.
func (c *Cluster) checkOrphans(broken report) {
	for _, id := range c.nodeIDs() {
		n := c.nodes[id]
		for a, p := range n.procs {
			if !n.cut && !p.stopping && n.known[a] == nil {
				broken(5, "%s runs on %s and belongs to nothing", a, id)
			}
		}
	}
}

func (c *Cluster) checkEvictions(plan reconcile.Plan, broken report) {
	dark := len(c.nodes) > 0
	for _, n := range c.nodes {
		dark = dark && n.gone()
	}
	if dark && len(plan.Steps) > 0 {
		broken(6, "every node is silent, and still: %v", plan.Steps[0])
	}
	live, recent := 0, 0
	for _, a := range c.allocs {
		if b := c.allocs[a.GetReplacedBy()]; b != nil {
			if !a.GetDisrupted() && b.GetBound().AsTime().Add(evictionWindow).After(c.Now) {
				recent++
			}
		} else {
			live++
		}
	}
	if limit := max(evictionMin, (live+recent)/evictionShare); c.pass.evicted > 0 && recent > limit {
		broken(6, "%d replicas of lost nodes were replaced within %v, %d are the most", recent, evictionWindow, limit)
	}
}

func (c *Cluster) checkEpochs(broken report) {
	for k, w := range c.intents {
		for _, a := range c.mine(k) {
			if a.GetEpoch() > w.Intent.GetEpoch() {
				broken(12, "%s has epoch %d, its intent %d", a.GetAllocation(), a.GetEpoch(), w.Intent.GetEpoch())
			}
		}
	}
}

// checkRuns: a job keeps its parallelism, and a cron workload that forbids it has
// no two runs at a time.
func (c *Cluster) checkRuns(broken report) {
	for k := range c.intents {
		s := c.spec0(k)
		if s.GetJob() == nil || !c.createdNow(k) {
			continue
		}
		runs := map[int64]int{}
		for _, a := range c.mine(k) {
			if a.GetFinal() == nil && !a.GetStop() && !c.nodes[a.GetNode()].gone() && a.GetRevision() == c.intents[k].Intent.GetCurrentRevision() {
				runs[a.GetRun()]++
			}
		}
		for run, n := range runs {
			if n > int(s.GetJob().GetParallelism()) {
				broken(1, "%s has %d replicas at a time in run %d, %d are allowed", k, n, run, s.GetJob().GetParallelism())
			}
		}
		if s.GetCron().GetConcurrency() == portolanv1.CronConcurrency_CRON_CONCURRENCY_FORBID && len(runs) > 1 {
			broken(1, "%s forbids it, and has runs %v at a time", k, slices.Sorted(maps.Keys(runs)))
		}
	}
}

package sim

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func compareKeys(a, b reconcile.Key) int { return strings.Compare(a.String(), b.String()) }

// Bounds on evictions, as reconcile states them: within ten seconds at most a
// quarter of what runs, and at least twenty; a tenth of that when most nodes are
// lost.
const (
	evictionWindow = 10 * time.Second
	evictionMin    = 20
	evictionShare  = 4
	evictionDark   = 10
)

// report takes an invariant that is broken, by its number in reliability.md.
type report func(number int, format string, args ...any)

// check holds the invariants of reliability against the state after a pass.
func (c *Cluster) check(plan reconcile.Plan) error {
	var errs []error
	broken := func(number int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("invariant %d: %s", number, fmt.Sprintf(format, args...)))
	}
	c.sort()
	c.checkNumbers(broken)
	c.checkServing(broken)
	c.checkListed(broken)
	c.checkRates(broken)
	c.checkRuns(broken)
	c.checkWorld(broken)
	c.checkBound(broken)
	c.checkNodes(broken)
	c.checkOrphans(broken)
	c.checkEvictions(plan, broken)
	c.checkEpochs(broken)
	return errors.Join(errs...)
}

// sort puts the records of each key's present workload together.
func (c *Cluster) sort() {
	c.pass.mine, c.pass.foreign = map[reconcile.Key][]*clusterv1.Allocation{}, map[reconcile.Key]bool{}
	for _, id := range slices.Sorted(maps.Keys(c.allocs)) {
		a := c.allocs[id]
		k := keyOf(a)
		if w, ok := c.intents[k]; ok && w.Intent.GetUid() == a.GetUid() {
			c.pass.mine[k] = append(c.pass.mine[k], a)
		} else {
			c.pass.foreign[k] = true
		}
	}
}

func (c *Cluster) spec0(k reconcile.Key) *portolanv1.WorkloadSpec {
	return c.intents[k].Intent.GetRevisions()[0].GetSpec()
}

func isService(s *portolanv1.WorkloadSpec) bool {
	return s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE
}

func isStateful(s *portolanv1.WorkloadSpec) bool {
	return s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL
}

// serving counts, by workload, the replicas that are ready and meant to stay.
func (c *Cluster) serving() map[reconcile.Key]int {
	out := map[reconcile.Key]int{}
	for _, a := range c.allocs {
		if n := c.nodes[a.GetNode()]; !n.gone() && !a.GetStop() && n.reported[a.GetAllocation()].GetReady() {
			out[keyOf(a)]++
		}
	}
	return out
}

// checkNumbers: where replicas begin there are no more than desired and surge
// after it, but for those that are to leave and wait for their replacement.
func (c *Cluster) checkNumbers(broken report) {
	for k := range c.pass.created {
		if _, wanted := c.intents[k]; !wanted {
			continue // see checkEpochs
		}
		if s := c.spec0(k); isService(s) {
			c.checkSurge(k, s, broken)
		} else if isStateful(s) {
			c.checkIndexes(k, broken)
		}
	}
}

func (c *Cluster) checkSurge(k reconcile.Key, s *portolanv1.WorkloadSpec, broken report) {
	active, leaving := 0, 0
	for _, a := range c.pass.mine[k] {
		switch {
		case a.GetStop() || a.GetFinal() != nil || c.nodes[a.GetNode()].gone():
		case a.GetDisrupted() && a.GetReplacedBy() != "":
			leaving++
		default:
			active++
		}
	}
	u := s.GetUpdate()
	surge := int(u.GetMaxSurge())
	switch {
	case s.GetPlacement().GetExclusive():
		surge = 0
	case surge == 0 && u.GetMaxUnavailable() == 0:
		surge = 1 // or none could ever be replaced
	}
	if most := c.wanted(k) + surge; active > most {
		broken(1, "%s has %d replicas (%d more are leaving), %d are the most", k, active, leaving, most)
	}
}

// checkIndexes: of stateful replicas there is at most one record for each index,
// and none begins beyond those that are wanted.
func (c *Cluster) checkIndexes(k reconcile.Key, broken report) {
	seen := map[int32]string{}
	for _, a := range c.pass.mine[k] {
		if !isStateful(a.GetSpec()) {
			continue
		}
		if other := seen[a.GetIndex()]; other != "" {
			broken(2, "%s and %s are both %s-%d", a.GetAllocation(), other, k, a.GetIndex())
		}
		seen[a.GetIndex()] = a.GetAllocation()
		if int(a.GetIndex()) >= c.wanted(k) && slices.Contains(c.pass.bound, a.GetAllocation()) {
			broken(1, "%s begins, %d replicas are wanted", a.GetAllocation(), c.wanted(k))
		}
	}
}

// voluntary are the codes of stops that must leave enough replicas serving.
var voluntary = map[string]bool{
	reconcile.RevisionReplaced: true, reconcile.NodeDraining: true, reconcile.Rebalance: true, reconcile.Moved: true, reconcile.Displaced: true, reconcile.StayOver: true,
}

// checkServing: what is stopped on purpose leaves as many serving as updates and
// budgets ask for.
func (c *Cluster) checkServing(broken report) {
	if len(c.pass.stops) == 0 {
		return
	}
	after := c.serving()
	byKey := map[reconcile.Key]bool{}
	for _, s := range c.pass.stops {
		if ok, seen := byKey[s.Key]; !seen || ok {
			byKey[s.Key] = voluntary[s.Code]
		}
	}
	for k, onlyVoluntary := range byKey {
		// What an earlier workload of the name leaves behind goes whatever serves.
		if _, wanted := c.intents[k]; !wanted || !onlyVoluntary || c.pass.foreign[k] {
			continue
		}
		s, total := c.spec0(k), c.wanted(k)
		if !isService(s) && !isStateful(s) {
			continue
		}
		down := int(s.GetUpdate().GetMaxUnavailable())
		if s.GetPlacement().GetExclusive() || isStateful(s) {
			down = max(1, down) // the one before goes first
		}
		floor := min(total-down, c.floor(s, total))
		if before := c.pass.before[k]; after[k] < min(before, floor) {
			broken(1, "%s has %d replicas serving after voluntary stops, %d before, %d are the least", k, after[k], before, floor)
		}
	}
}

// floor is how many must serve under the budget of a spec.
func (c *Cluster) floor(s *portolanv1.WorkloadSpec, total int) int {
	b := s.GetDisruption()
	switch {
	case b != nil && b.MaxPerHour != nil:
		return 0 // a rate only: see checkRates
	case b != nil && b.MaxUnavailable != nil:
		return total - int(b.GetMaxUnavailable())
	case b != nil && b.MaxUnavailablePercent != nil:
		return total - (total*int(b.GetMaxUnavailablePercent())+99)/100
	case b != nil && b.MinAvailable != nil:
		return int(b.GetMinAvailable())
	}
	return max(total-1, (total+1)/2)
}

// checkListed: no replica of a revision that is wanted makes way for another one.
// Blue and green stay until the switch is done.
func (c *Cluster) checkListed(broken report) {
	for _, s := range c.pass.stops {
		a, w := c.allocs[s.Allocation], c.intents[s.Key].Intent
		if s.Code != reconcile.RevisionReplaced || a.GetUid() != w.GetUid() || isStateful(a.GetSpec()) {
			continue
		}
		for _, r := range w.GetRevisions() {
			if r.GetRevision() == a.GetRevision() && r.GetReplicas() > 0 && a.GetSpec().GetKind() == r.GetSpec().GetKind() {
				broken(1, "%s makes way, although its revision %s is wanted", s.Allocation, a.GetRevision())
			}
		}
	}
}

// forced are the codes of disruptions that no budget holds up.
var forced = map[string]bool{reconcile.DrainDeadline: true}

// checkRates: no more is disrupted within an hour than a budget says, and nothing
// outside of its windows.
func (c *Cluster) checkRates(broken report) {
	for _, s := range c.pass.stops {
		a := c.allocs[s.Allocation]
		w, wanted := c.intents[s.Key]
		if !s.Disrupt || !wanted || forced[s.Code] || a.GetUid() != w.Intent.GetUid() || !c.nodes[a.GetNode()].reported[s.Allocation].GetReady() {
			continue
		}
		b := c.spec0(s.Key).GetDisruption()
		if hour := c.Now.Hour(); len(b.GetWindows()) > 0 && hour != 2 {
			broken(1, "%s is disrupted (%s) outside of the windows of its budget", s.Allocation, s.Code)
		}
		if b == nil || b.MaxPerHour == nil || slices.ContainsFunc(c.pass.stops, func(o reconcile.Step) bool { return o.Key == s.Key && forced[o.Code] }) {
			continue
		}
		recent := 0
		for _, at := range c.disrupted[s.Key.String()+" "+a.GetUid()] {
			if at.Add(time.Hour).After(c.Now) {
				recent++
			}
		}
		if recent > int(b.GetMaxPerHour()) {
			broken(1, "%s is the disruption %d of the hour, %d are allowed", s.Allocation, recent, b.GetMaxPerHour())
		}
	}
}

// checkRuns: a job keeps its parallelism; a run of a cron workload begins once, in
// order, and not beside another one where that is forbidden.
func (c *Cluster) checkRuns(broken report) {
	for k := range c.pass.created {
		if _, wanted := c.intents[k]; !wanted {
			continue // see checkEpochs
		}
		s := c.spec0(k)
		if s.GetJob() == nil {
			continue
		}
		active, records := map[int64]int{}, map[int64][]*clusterv1.Allocation{}
		for _, a := range c.pass.mine[k] {
			if a.GetSpec().GetKind() != s.GetKind() {
				continue
			}
			records[a.GetRun()] = append(records[a.GetRun()], a)
			if a.GetFinal() == nil && !a.GetStop() && !c.nodes[a.GetNode()].gone() && (a.GetRun() != 0 || a.GetRevision() == c.intents[k].Intent.GetCurrentRevision()) {
				active[a.GetRun()]++
			}
		}
		for _, id := range c.pass.bound {
			a := c.allocs[id]
			if keyOf(a) != k || len(records[a.GetRun()]) == 0 {
				continue
			}
			// A run goes on as it began, so any of its records says how. The intent does
			// for what is one job.
			p := s.GetJob().GetParallelism()
			if a.GetRun() != 0 {
				p = c.original(records[a.GetRun()][0].GetSpec()).GetJob().GetParallelism()
			}
			if active[a.GetRun()] > int(p) {
				broken(1, "%s has %d replicas at a time in run %d, %d are allowed", k, active[a.GetRun()], a.GetRun(), p)
			}
			if a.GetRun() != 0 {
				c.checkBegin(k, a, records[a.GetRun()], active, broken)
			}
		}
	}
}

// checkBegin looks at a replica of a cron workload that has just been bound.
func (c *Cluster) checkBegin(k reconcile.Key, a *clusterv1.Allocation, run []*clusterv1.Allocation, active map[int64]int, broken report) {
	if slices.ContainsFunc(run, func(o *clusterv1.Allocation) bool { return !slices.Contains(c.pass.bound, o.GetAllocation()) }) {
		return // it goes on
	}
	id := k.String() + " " + a.GetUid()
	if a.GetRun() < c.began[id] || a.GetRun() == c.began[id] && len(run) == 1 {
		broken(1, "run %d of %s begins after that of %d", a.GetRun(), k, c.began[id])
	}
	c.began[id] = a.GetRun()
	how := c.spec0(k).GetCron().GetConcurrency()
	if how == portolanv1.CronConcurrency_CRON_CONCURRENCY_ALLOW {
		return
	}
	for _, other := range slices.Sorted(maps.Keys(active)) {
		if other != a.GetRun() {
			broken(1, "run %d of %s begins beside that of %d (%v)", a.GetRun(), k, other, how)
		}
	}
}

func (c *Cluster) checkEvictions(plan reconcile.Plan, broken report) {
	lost := 0
	for _, n := range c.nodes {
		if n.gone() {
			lost++
		}
	}
	if lost == len(c.nodes) && len(plan.Steps) > 0 {
		broken(6, "every node is silent, and still: %v", plan.Steps[0])
	}
	if c.pass.evicted == 0 {
		return
	}
	// What has come back since and was cleared away is no eviction any more, and one
	// whose replacement came to nothing and is made again is one.
	c.evicted = slices.DeleteFunc(c.evicted, func(e eviction) bool {
		return !e.at.Add(evictionWindow).After(c.Now) || c.allocs[e.of] == nil
	})
	limit := max(evictionMin, len(c.allocs)/evictionShare)
	if lost*2 > len(c.nodes) {
		limit /= evictionDark
	}
	of := map[string]bool{}
	for _, e := range c.evicted {
		of[e.of] = true
	}
	if n := len(of); n > limit {
		broken(6, "%d replicas of lost nodes were replaced within %v, %d are the most", n, evictionWindow, limit)
	}
}

// checkEpochs: nothing is of a newer decision than there is, and what begins is of
// the newest.
func (c *Cluster) checkEpochs(broken report) {
	for _, id := range c.pass.bound {
		a := c.allocs[id]
		if i := c.intents[keyOf(a)].Intent; a.GetUid() != i.GetUid() || a.GetEpoch() < i.GetEpoch() {
			broken(13, "%s begins for the decision %d on %s, %d on %s is there", id, a.GetEpoch(), a.GetUid(), i.GetEpoch(), i.GetUid())
		}
	}
	for k, w := range c.intents {
		for _, a := range c.pass.mine[k] {
			if a.GetEpoch() > w.Intent.GetEpoch() {
				broken(12, "%s has epoch %d, its intent %d", a.GetAllocation(), a.GetEpoch(), w.Intent.GetEpoch())
			}
		}
	}
}

package sim

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// live is one cluster's life.
func (c *Cluster) live(events int) error {
	for range events {
		if err := c.Step(); err != nil {
			return err
		}
	}
	return c.Rest()
}

// Rest ends all faults and lets half an hour pass: then desired is actual, or there
// is a reason why not.
func (c *Cluster) Rest() error {
	c.heal()
	for _, k := range slices.SortedFunc(maps.Keys(c.intents), compareKeys) {
		if rev := c.intents[k].Intent.GetCurrentRevision(); c.bad[rev] {
			delete(c.bad, rev) // it was fixed from outside
		}
	}
	for range 360 {
		c.tick(5 * time.Second)
		if err := c.settle(); err != nil {
			return err
		}
	}
	var errs []error
	for _, k := range slices.SortedFunc(maps.Keys(c.intents), compareKeys) {
		if what := c.unlike(k); what != "" && len(c.pending[k]) == 0 && !c.excused(k) {
			errs = append(errs, fmt.Errorf("after half an hour without faults %s %s, and nothing says why", k, what))
		}
	}
	return errors.Join(append(errs, c.leftovers())...)
}

// unlike says in what a workload is not as declared.
func (c *Cluster) unlike(k reconcile.Key) string {
	s, serving := c.spec0(k), c.serving()[k]
	switch s.GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		if want := c.wanted(k); serving != want {
			return fmt.Sprintf("has %d of %d replicas", serving, want)
		}
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		nodes := 0
		for _, n := range c.nodes {
			if !n.gone() && admit(n.record, s) == reconcile.Admitted {
				nodes++
			}
		}
		if serving != nodes {
			return fmt.Sprintf("has replicas on %d of %d nodes", serving, nodes)
		}
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		for _, r := range reconcile.Summarize(c.input()) {
			ended := func(x *portolanv1.Condition) bool {
				return (x.GetType() == reconcile.Complete || x.GetType() == reconcile.Failed) && x.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE
			}
			if r.GetTenant() == k.Tenant && r.GetWorkload() == k.Workload && !slices.ContainsFunc(r.GetConditions(), ended) {
				return "has not come to its end"
			}
		}
	default: // a cron workload goes on
	}
	return ""
}

// leftovers are records that should be gone.
func (c *Cluster) leftovers() error {
	var errs []error
	held := func(k reconcile.Key) bool { return len(c.pending[k]) > 0 || c.excused(k) }
	uids := map[string]bool{}
	for id, a := range c.allocs {
		k := keyOf(a)
		uids[a.GetUid()] = true
		// A job's record of its end stays when its node has cleared it away.
		// The last record of a run that cannot go on says that it has begun.
		if a.GetStop() && a.GetFinal() == nil && (a.GetRun() == 0 || !held(k)) && c.Now.Sub(a.GetStopTime().AsTime()) > time.Minute {
			errs = append(errs, fmt.Errorf("%s was stopped %v ago, and its record is still there", id, c.Now.Sub(a.GetStopTime().AsTime())))
		}
		// An earlier workload of the name makes way as the present one gets ready.
		if w, wanted := c.intents[k]; !wanted || (w.Intent.GetUid() != a.GetUid() && !held(k)) {
			errs = append(errs, fmt.Errorf("%s belongs to no workload any more", id))
		}
	}
	for id, v := range c.volumes {
		if w := c.intents[reconcile.Key{Tenant: v.GetTenant(), Workload: v.GetWorkload()}]; w.Intent.GetUid() != v.GetUid() && !uids[v.GetUid()] {
			errs = append(errs, fmt.Errorf("volume %s belongs to no workload any more", id))
		}
	}
	for k := range c.states {
		if _, wanted := c.intents[k]; !wanted {
			errs = append(errs, fmt.Errorf("the state of %s belongs to no workload any more", k))
		}
	}
	return errors.Join(errs...)
}

// justDisplaced is how long a displaced replica takes to stop, and until its
// workload is looked at again.
const justDisplaced = time.Minute

// excused says that the plan itself says why a workload is not as declared, or that
// a replica of it makes way for a higher priority at this moment, which events tell.
func (c *Cluster) excused(k reconcile.Key) bool {
	for _, a := range c.allocs {
		if a.GetTenant() == k.Tenant && a.GetWorkload() == k.Workload && a.GetStopReason() == reconcile.Displaced && c.Now.Sub(a.GetStopTime().AsTime()) < justDisplaced {
			return true
		}
	}
	p := reconcile.Reconcile(c.input())
	return p.Halted[k].Code != "" || p.Waiting[k].Code != "" || p.Draining[k].Code != ""
}

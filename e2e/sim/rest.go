package sim

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
)

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
	serving := c.serving()
	var errs []error
	for _, k := range slices.SortedFunc(maps.Keys(c.intents), compareKeys) {
		if want := int(c.intents[k].Intent.GetRevisions()[0].GetReplicas()); longRunning(c.spec0(k)) && serving[k] != want && len(c.pending[k]) == 0 && !c.excused(k) {
			errs = append(errs, fmt.Errorf("after half an hour without faults %s has %d of %d replicas, and nothing says why", k, serving[k], want))
		}
	}
	for id, a := range c.allocs {
		// A job's record of its end stays when its node has cleared it away.
		if a.GetStop() && a.GetFinal() == nil && c.Now.Sub(a.GetStopTime().AsTime()) > time.Minute {
			errs = append(errs, fmt.Errorf("%s was stopped %v ago, and its record is still there", id, c.Now.Sub(a.GetStopTime().AsTime())))
		}
	}
	return errors.Join(errs...)
}

// excused says that the plan itself says why a workload is not as declared.
func (c *Cluster) excused(k reconcile.Key) bool {
	p := reconcile.Reconcile(c.input())
	return p.Halted[k].Code != "" || p.Waiting[k].Code != ""
}

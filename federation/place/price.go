package place

import (
	"github.com/portolan-io/portolan/federation/api"
)

// HourMicros is what replicas of each revision cost in a cluster for an hour, in
// micro-units of currency, as Plan.CostMicros counts it: at the prices of the
// cluster's pools, and on spot nodes first, as far as Cluster.Spot goes, when the
// workload prefers these. A daemon has one on each node. What requests nothing
// costs nothing.
func (w Workload) HourMicros(c *Cluster, replicas int) int64 {
	d := decision{w: &w, plain: w.Spec.GetPlacement(), units: newUnits(w.Spec)}
	x := cell{Cluster: c, n: (replicas + d.perUnit - 1) / d.perUnit}
	for _, r := range w.Running() {
		x.unit = x.unit.Add(r.requestsIn(c).Times(int64(d.running)))
	}
	if x.unit == (api.Resources{}) {
		return 0
	}
	if d.isDaemon() {
		x.n = 1
	}
	d.price(&x)
	return d.cost(&x)
}

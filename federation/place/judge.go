package place

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// judge holds a cluster against every hard constraint, and notes all that fail,
// so that explain can name each.
func (d *decision) judge(x *cell) {
	bar := func(code, format string, args ...any) {
		x.barred = true
		x.verdict = append(x.verdict, Reason{Code: code, Message: fmt.Sprintf(format, args...)})
	}
	region := x.Spec.GetRegion()
	if r := d.w.Residency; len(r) > 0 && !slices.Contains(r, region) {
		bar(Residency, "the tenant may run only in %s, this is %s", strings.Join(r, ", "), region)
	}
	if r := d.plain.GetAllowedRegions(); len(r) > 0 && !slices.Contains(r, region) {
		bar(NotAllowed, "region %s is not among spec.placement.allowed_regions (%s)", region, strings.Join(r, ", "))
	}
	if slices.Contains(d.plain.GetForbiddenRegions(), region) {
		bar(Forbidden, "region %s is in spec.placement.forbidden_regions", region)
	}
	want := d.plain.GetClusterSelector()
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if have, ok := x.Labels[k]; !ok {
			bar(Selector, "the cluster has no label %s, spec.placement.cluster_selector wants %s=%s", k, k, want[k])
		} else if have != want[k] {
			bar(Selector, "label %s is %s, spec.placement.cluster_selector wants %s", k, have, want[k])
		}
	}
	d.judgeTaints(x)
	d.judgeState(x)
}

func (d *decision) judgeTaints(x *cell) {
	for _, t := range x.Spec.GetTaints() {
		if tolerated(t, d.plain.GetTolerations()) {
			continue
		}
		name := t.GetKey()
		if t.GetValue() != "" {
			name += "=" + t.GetValue()
		}
		switch t.GetEffect() {
		case portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE:
			x.soft++
			x.verdict = append(x.verdict, Reason{Code: SoftTaint, Message: "taint " + name + " is to be avoided"})
		case portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE:
			x.barred = true
			x.verdict = append(x.verdict, Reason{Code: Taint, Message: "taint " + name + " is not tolerated, and nothing may stay under it"})
		default:
			x.closed = true
			x.verdict = append(x.verdict, Reason{Code: Taint, Message: "taint " + name + " is not tolerated: nothing new here"})
		}
	}
}

func tolerated(t *portolanv1.Taint, list []*portolanv1.Toleration) bool {
	for _, tol := range list {
		if tol.GetKey() == t.GetKey() && (tol.GetValue() == "" || tol.GetValue() == t.GetValue()) &&
			(tol.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED || tol.GetEffect() == t.GetEffect()) {
			return true
		}
	}
	return false
}

func (d *decision) judgeState(x *cell) {
	if x.Spec.GetCordoned() {
		x.closed = true
		x.verdict = append(x.verdict, Reason{Code: Cordoned, Message: "the cluster is cordoned: nothing new here"})
	}
	switch x.State {
	case portolanv1.ClusterState_CLUSTER_STATE_READY:
	case portolanv1.ClusterState_CLUSTER_STATE_LOST:
		x.closed = true
		x.verdict = append(x.verdict, Reason{Code: Lost, Message: "the cluster is silent: what it had stays declared, nothing new here"})
	default:
		x.barred = true
		x.verdict = append(x.verdict, Reason{Code: Pending, Message: "the cluster has never joined"})
	}
}

// explain completes a cluster's reasons by what the decision made of it.
func (d *decision) explain(x *cell) []Reason {
	out := slices.Clone(x.verdict)
	note := func(code string, count int, format string, args ...any) {
		out = append(out, Reason{Code: code, Message: fmt.Sprintf(format, args...), Count: count})
	}
	switch {
	case d.frozen:
		note(ObserverSuspect, 0, "every cluster looks dead, so the observer is suspected: nothing is changed")
		if x.extra > 0 {
			note(Failover, x.Previous.Failover, "%d replicas stand in for lost clusters", x.Previous.Failover)
		}
		return out
	case x.barred || d.isDaemon() && x.n > 0:
		if x.n > 0 {
			note(Chosen, 0, "one replica on each eligible node")
		}
		return out
	}
	if kept := min(x.had, x.n); kept > 0 {
		note(Kept, kept*d.perUnit, "%d replicas were here before", kept*d.perUnit)
	}
	if added := x.n - x.had; added > 0 {
		note(Chosen, added*d.perUnit, "%d replicas placed here: %s", added*d.perUnit, d.because())
	}
	if x.extra > 0 {
		note(Failover, x.extra*d.perUnit, "%d replicas stand in for lost clusters", x.extra*d.perUnit)
	}
	if x.n+x.extra > 0 && !d.assignment(x).Claim.Fits(x.Free) {
		note(OverCapacity, 0, "holds more than is free now; nothing is moved for that")
	}
	if x.n > 0 && d.missing == 0 || x.closed {
		return out
	}
	switch {
	case d.units == 0:
		note(NotNeeded, 0, "no replicas are declared")
	case x.room <= x.n+x.extra:
		note(Capacity, 0, "%s", d.lacks(x))
	case d.missing > 0:
		note(Spread, 0, "one more here would break spec.placement.spread")
	default:
		note(NotNeeded, 0, "has room, but %s", d.because())
	}
	return out
}

func (d *decision) because() string {
	switch d.plain.GetObjective() {
	case portolanv1.Objective_OBJECTIVE_COST:
		return "the cheapest clusters come first"
	case portolanv1.Objective_OBJECTIVE_PACK:
		return "as few clusters as possible are used"
	default:
		return "replicas are spread evenly"
	}
}

// lacks says what one more unit would take: the smallest change that would make
// it fit.
func (d *decision) lacks(x *cell) string {
	next := d.claim(x.n + x.extra + 1)
	if d.isDaemon() {
		next = d.daemonClaim(x)
	}
	var parts []string
	if n := next.CPUMilli - x.Free.CPUMilli; n > 0 {
		parts = append(parts, fmt.Sprintf("%dm CPU", n))
	}
	if n := next.MemoryBytes - x.Free.MemoryBytes; n > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes of memory", n))
	}
	if len(parts) == 0 {
		return "as many as are wanted"
	}
	return "one more would need " + strings.Join(parts, " and ") + " more than is free"
}

// allDark: every cluster that ever joined is silent. Then it is more likely that
// we are deaf.
func (d *decision) allDark() bool {
	lost := 0
	for _, x := range d.cells {
		switch x.State {
		case portolanv1.ClusterState_CLUSTER_STATE_READY:
			return false
		case portolanv1.ClusterState_CLUSTER_STATE_LOST:
			lost++
		default: // never joined
		}
	}
	return lost > 0
}

// freeze keeps what was there.
func (d *decision) freeze() {
	d.frozen = true
	d.reasons = append(d.reasons, Reason{Code: ObserverSuspect, Message: "every cluster looks dead, so the observer is suspected: nothing is changed"})
	for _, x := range d.cells {
		x.n, x.extra, x.room = 0, 0, 0
		if x.Previous.Present {
			x.n, x.extra = max(1, x.Previous.Declared), x.Previous.Failover
		}
	}
}

// daemon runs on every cluster that may have it.
func (d *decision) daemon() {
	for _, x := range d.cells {
		if !x.barred && x.room > 0 && (!x.closed || x.Previous.Present) {
			x.n = 1
		}
	}
}

func (d *decision) daemonClaim(x *cell) api.Resources { return d.w.Claim(x.Nodes) }

// daemonRoom is 1 when one replica on each node fits, or when a claim of that
// size is already held.
func (d *decision) daemonRoom(x *cell) int {
	c := d.daemonClaim(x)
	if c.Fits(x.Free) || x.Previous.Present && c.Fits(x.Previous.Claim) {
		return 1
	}
	return 0
}

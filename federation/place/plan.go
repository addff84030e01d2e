package place

import (
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// plan turns the state into the answer.
func (d *decision) plan() Plan {
	p := Plan{
		Desired: d.desired * d.perUnit, Unplaced: d.missing * d.perUnit, FailoverUnplaced: d.extraMissing * d.perUnit,
		Basis: d.basis, Reasons: d.reasons, Frozen: d.frozen, Again: d.again, Displaced: d.displaced,
	}
	p.Scored = portolanv1.Objective_OBJECTIVE_COST
	if d.order == byLatency {
		p.Scored = portolanv1.Objective_OBJECTIVE_LATENCY
	}
	bounds := d.divide()
	if !d.s.Brief {
		p.Verdicts = make([]Verdict, 0, len(d.cells))
	}
	gone, came := 0, 0
	for i := range d.cells {
		x := &d.cells[i]
		gone, came = gone+max(0, x.had-x.n), came+max(0, x.n-x.had)
		p.CostMicros += d.cost(x)
		if x.n+x.extra > 0 || x.leaving {
			a := d.assignment(x)
			if bounds != nil {
				a.Min, a.Max, a.Replicas = bounds[i].low, a.Replicas, bounds[i].begin
			}
			a.Reasons = d.explain(x)
			p.Assignments = append(p.Assignments, a)
			if !d.s.Brief {
				p.Verdicts = append(p.Verdicts, d.verdict(x, a.Reasons))
			}
		} else if !d.s.Brief {
			p.Verdicts = append(p.Verdicts, d.verdict(x, d.explain(x)))
		}
	}
	p.Moved = min(gone, came) * d.perUnit
	return p
}

func (d *decision) verdict(x *cell, reasons []Reason) Verdict {
	v := Verdict{Cluster: x.ID, Replicas: d.assignment(x).Replicas, Score: -x.priceOf(x.n + 1), Reasons: reasons}
	if d.order == byLatency {
		v.Score = -x.latency
	}
	v.Feasible = !x.barred && (x.n+x.extra > 0 || x.room > 0)
	if !v.Feasible || d.missing > 0 && !d.isDaemon() {
		v.Remedies = d.remedies(x)
	}
	return v
}

// cost of an hour of what is in a cell.
func (d *decision) cost(x *cell) int64 {
	if d.isDaemon() {
		return x.price * int64(x.Nodes*x.n)
	}
	units := x.n + x.extra
	spot := min(units, x.spotRoom)
	return int64(spot)*x.spotPrice + int64(units-spot)*x.price
}

func (d *decision) assignment(x *cell) Assignment {
	a := Assignment{Cluster: x.ID, Replicas: (x.n + x.extra) * d.perUnit, Failover: x.extra * d.perUnit, Claim: x.claim(x.n + x.extra)}
	if plant.surgeForgotten && x.n+x.extra > 0 {
		a.Claim = minus(a.Claim, x.surge)
	}
	switch {
	case d.frozen:
		a.Replicas, a.Failover, a.Claim = x.Previous.Declared+x.Previous.Failover, x.Previous.Failover, x.Previous.Claim
	case x.leaving, x.lost() && d.plain.GetExclusive():
		a.Claim = x.Previous.Claim // what it is, whatever the template is now
	case d.isDaemon():
		a.Replicas, a.Claim = 0, api.Resources{}
		if x.n > 0 {
			a.Claim = d.daemonClaim(x)
		}
	}
	return a
}

// bound is a cluster's share of a workload that scales by itself.
type bound struct{ low, begin int }

// divide shares minimum and beginning out in proportion to the shares of the
// maximum. A cluster that has a share keeps at least one replica, unless the
// workload may go to zero; so the shares of the minimum sum to no less than it.
func (d *decision) divide() []bound {
	if !scales(d.w.Spec) || d.frozen {
		return nil
	}
	low, first := least(d.w.Spec), max(begin(d.w.Spec), least(d.w.Spec))
	sum := 0
	for i := range d.cells {
		sum += d.cells[i].n
	}
	lows, firsts := d.apportion(min(low, sum)), d.apportion(min(first, sum))
	out := make([]bound, len(d.cells))
	for i := range d.cells {
		x, b := &d.cells[i], &out[i]
		if n := x.n + x.extra; n > 0 {
			if b.low = lows[i]; low > 0 {
				b.low = max(1, b.low)
			}
			b.begin = max(b.low, firsts[i])
			if sum > 0 && x.extra > 0 {
				// What stands in has the same share of the minimum as what it stands in for.
				b.low += (x.extra*low + sum - 1) / sum
				b.begin += (x.extra*first + sum - 1) / sum
			}
			b.low, b.begin = min(b.low, n), min(max(b.begin, b.low), n)
		}
	}
	return out
}

// apportion divides a number over the cells in proportion to their units, none
// getting more than it has (Sainte-Laguë). total is not more than all have.
func (d *decision) apportion(total int) []int {
	out := make([]int, len(d.cells))
	for range total {
		best := -1
		for i := range d.cells {
			n := d.cells[i].n
			if out[i] < n && (best < 0 || (2*out[i]+1)*d.cells[best].n < (2*out[best]+1)*n) {
				best = i
			}
		}
		if best < 0 {
			return out
		}
		out[best]++
	}
	return out
}

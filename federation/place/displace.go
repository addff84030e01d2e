package place

import (
	"cmp"
	"math"
	"slices"

	"github.com/portolan-io/portolan/federation/api"
)

// lower are the claims in a cluster that this workload may displace, the first
// to go first: the lowest priority, and the largest of the same, so that few lose
// something.
func (d *decision) lower(x *cell) []Claimant {
	if d.w.Spec.GetNeverPreempt() {
		return nil
	}
	out := slices.DeleteFunc(slices.Clone(x.Lower), func(l Claimant) bool {
		own := int(d.w.Spec.GetPriority())
		return l.Replicas <= 0 || l.Priority > min(own, d.level) || l.Priority == own && !plant.displacesEquals
	})
	slices.SortFunc(out, func(a, b Claimant) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(b.Claim.CPUMilli, a.Claim.CPUMilli),
			cmp.Compare(b.Claim.MemoryBytes, a.Claim.MemoryBytes), cmp.Compare(a.Workload, b.Workload))
	})
	return out
}

// displace places what found no room by taking it from workloads of lower
// priority: as little as is needed, and nothing where that does not help.
func (d *decision) displace() {
	if d.missing == 0 {
		return
	}
	before := make([]int, len(d.cells))
	for i := range d.cells {
		before[i] = d.cells[i].room
	}
	d.roomFromLower = true
	levels := d.levels()
	for _, d.level = range levels {
		if d.missing > 0 {
			d.spreadOver(before)
		}
	}
	for i := range d.cells {
		x := &d.cells[i]
		if len(levels) > 0 && len(x.Lower) > 0 && x.n > 0 {
			d.victims(x)
		}
		x.room = max(before[i], x.n)
	}
	d.roomFromLower = false
}

// displaceEach does the same for what every cluster is to have by itself, a daemon or
// all replicas: one makes no room for another, so that only the order within each
// counts.
func (d *decision) displaceEach() {
	if d.missing == 0 {
		return
	}
	d.roomFromLower, d.level = true, math.MaxInt
	for i := range d.cells {
		x := &d.cells[i]
		if x.barred || x.closed || len(x.Lower) == 0 {
			continue
		}
		want := d.want
		if d.isDaemon() {
			want = 1
		}
		if n := min(want, d.roomIn(x)); n > x.n {
			d.missing -= n - x.n
			x.n, x.room = n, max(x.room, n)
			d.victims(x)
		}
	}
	d.roomFromLower = false
}

// levels are the priorities that may be displaced, the lowest first: a higher one
// loses nothing while a lower one anywhere could.
func (d *decision) levels() []int {
	var out []int
	d.level = math.MaxInt
	for i := range d.cells {
		if x := &d.cells[i]; !x.barred && !x.closed {
			for _, l := range d.lower(x) {
				out = append(out, l.Priority)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// spreadOver goes on placing, with the room of claims up to the level.
func (d *decision) spreadOver(room []int) {
	for i := range d.cells {
		if x := &d.cells[i]; !x.barred && !x.closed && len(x.Lower) > 0 {
			x.room = max(room[i], d.roomIn(x))
		}
	}
	d.spread()
}

// victims are who loses what in a cluster. What was held before is not new, and
// displaces nobody.
func (d *decision) victims(x *cell) {
	claim := x.claim(x.n)
	if d.isDaemon() {
		claim = d.daemonClaim(x)
	}
	if claim.Fits(x.Previous.Claim) {
		return
	}
	need := minus(claim, d.free(x))
	for _, l := range d.lower(x) {
		if need.CPUMilli <= 0 && need.MemoryBytes <= 0 {
			return
		}
		n := replicasFor(need, l)
		if n == 0 {
			continue
		}
		part := l.Claim
		if n < l.Replicas {
			part = l.Each.Times(int64(n))
		}
		need, x.gained = minus(need, part), x.gained.Add(part)
		d.displaced = append(d.displaced, Displaced{Workload: l.Workload, Cluster: x.ID, Replicas: n * max(1, l.per)})
	}
}

// replicasFor is how many replicas of a claim make as much room as is needed, or
// all; none when they have nothing of it.
func replicasFor(need api.Resources, l Claimant) int {
	n := 0
	for _, q := range [][2]int64{{need.CPUMilli, l.Each.CPUMilli}, {need.MemoryBytes, l.Each.MemoryBytes}} {
		if q[0] > 0 && q[1] > 0 {
			n = max(n, int(min((q[0]+q[1]-1)/q[1], int64(l.Replicas))))
		}
	}
	return n
}

// Claimant is what a workload of higher priority may take of what the workload
// has in a cluster. Daemons, exclusive workloads and what has volumes lose
// nothing: they have no other place. ok is false also when nothing is claimed.
func (w Workload) Claimant(name string, c *Cluster, p Previous) (l Claimant, ok bool) {
	d := newUnits(w.Spec)
	n := (p.Declared + p.Failover) / d.perUnit
	if n <= 0 || p.Claim == (api.Resources{}) || len(w.Spec.GetVolumes()) > 0 || w.Spec.GetPlacement().GetExclusive() || isDaemon(w.Spec) {
		return Claimant{}, false
	}
	l = Claimant{Workload: name, Priority: int(w.Spec.GetPriority()), Replicas: n, Claim: p.Claim, per: d.perUnit}
	for _, r := range w.Running() {
		l.Each = l.Each.Add(r.requestsIn(c).Times(int64(d.running)))
	}
	return l, true
}

// Cut is what is left in a cluster after so many replicas were displaced; those
// that stand in go first.
func (w Workload) Cut(c *Cluster, p Previous, replicas int) Previous {
	l, ok := w.Claimant("", c, p)
	if !ok {
		return p
	}
	if replicas >= l.Replicas*l.per {
		return Previous{Present: p.Present, Basis: p.Basis}
	}
	extra := min(p.Failover, replicas)
	p.Failover -= extra
	p.Declared -= replicas - extra
	p.Claim = minus(p.Claim, l.Each.Times(int64(replicas/l.per)))
	return p
}

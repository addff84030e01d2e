package place

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// group is one domain of the spread: its clusters, and its units.
type group struct {
	name  string
	cells []*cell
	n     int
	room  int // declared units that fit
	fixed int // units of lost clusters, which count but cannot move
	// grow and shrink are the clusters for the next unit to come and to go, known
	// while fresh.
	grow, shrink *cell
	fresh        bool
}

// live groups can take units; one that is all lost does not bind the skew, for
// its loss must not keep replicas from running elsewhere.
func (g *group) live() bool { return g.room > g.fixed }

// keepLost leaves in lost clusters what they had: they are cut off and run it,
// whatever is written here.
func (d *decision) keepLost() {
	left := d.units
	for _, x := range d.cells {
		if x.State == portolanv1.ClusterState_CLUSTER_STATE_LOST && !x.barred {
			x.fixed = min(x.had, x.room, left)
			x.n, x.extra = x.fixed, min(x.hadExtra, x.room-x.fixed)
			left -= x.fixed
		}
	}
}

// spread fills the declared units: what was there stays, as far as it is still
// allowed; then units are taken away or added one by one in the order of the
// objective; at last the bounds of the spread are restored by moves.
func (d *decision) spread() {
	f := d.newFill()
	f.take()
	f.add()
	f.balance()
	d.missing = f.left
	if least := min(int(d.plain.GetSpread().GetMinGroups()), d.units); least > 0 && f.used() < least {
		d.reasons = append(d.reasons, Reason{Code: MinGroups, Message: fmt.Sprintf("the spread asks for %d domains, %d can be used", d.plain.GetSpread().GetMinGroups(), f.used())})
	}
	if d.missing > 0 {
		d.reasons = append(d.reasons, Reason{Code: Capacity, Message: "not every replica found a cluster", Count: d.missing * d.perUnit})
	}
}

// fill is the state of one distribution of units over groups.
type fill struct {
	d      *decision
	groups []*group // those that are to be used
	all    []*group
	least  int // groups to use at least
	skew   int // greatest difference between used groups
	left   int // units without a place
}

func (d *decision) newFill() *fill {
	f := &fill{d: d, least: max(1, int(d.plain.GetSpread().GetMinGroups())), skew: math.MaxInt, left: d.units}
	if s := int(d.plain.GetSpread().GetMaxSkew()); s > 0 {
		f.skew = s
	}
	byName := map[string]*group{}
	for _, x := range d.cells {
		g := byName[x.group]
		if g == nil {
			g = &group{name: x.group}
			byName[x.group] = g
			f.all = append(f.all, g)
		}
		g.cells = append(g.cells, x)
		if x.State == portolanv1.ClusterState_CLUSTER_STATE_LOST {
			g.fixed += x.fixed
			g.room += x.fixed
		} else {
			x.n = min(x.had, x.room)
			g.room += x.room
		}
		g.n += x.n
		f.left -= x.n
	}
	f.choose()
	return f
}

// rank orders groups: those in use first, then by the objective.
func (f *fill) rank(a, b *group) int {
	inUse := func(g *group) int {
		if g.n > 0 {
			return 0
		}
		return 1
	}
	c := cmp.Compare(inUse(a), inUse(b))
	if c == 0 && f.d.plain.GetObjective() == portolanv1.Objective_OBJECTIVE_PACK {
		c = cmp.Or(cmp.Compare(a.softest(), b.softest()), cmp.Compare(b.room, a.room))
	}
	return cmp.Or(c, cmp.Compare(a.softest(), b.softest()), cmp.Compare(a.cheapest(), b.cheapest()), cmp.Compare(a.name, b.name))
}

func (g *group) softest() int {
	least := math.MaxInt
	for _, x := range g.cells {
		if x.room > 0 {
			least = min(least, x.soft)
		}
	}
	return least
}

func (g *group) cheapest() float64 {
	least := math.Inf(1)
	for _, x := range g.cells {
		if x.room > 0 && x.soft == g.softest() {
			least = min(least, x.price)
		}
	}
	return least
}

// holds is how many units some groups can take within the skew.
func (f *fill) holds(groups []*group) int {
	least := math.MaxInt
	for _, g := range groups {
		if g.live() {
			least = min(least, g.room)
		}
	}
	sum := 0
	for _, g := range groups {
		room := g.room
		if f.skew < math.MaxInt-least {
			room = min(room, least+f.skew)
		}
		sum += max(room, g.fixed)
	}
	return min(sum, f.d.units)
}

// choose picks the groups to use: the fewest that hold everything when packing or
// saving, else the most; never fewer than are in use or asked for.
func (f *fill) choose() {
	var usable []*group
	inUse := 0
	for _, g := range f.all {
		if g.room > 0 {
			usable = append(usable, g)
		}
		if g.n > 0 {
			inUse++
		}
	}
	slices.SortStableFunc(usable, f.rank)
	most := min(len(usable), max(f.d.units, inUse))
	least := min(max(f.least, inUse), most)
	few := f.d.plain.GetObjective() == portolanv1.Objective_OBJECTIVE_COST || f.d.plain.GetObjective() == portolanv1.Objective_OBJECTIVE_PACK
	best := -1
	for k := least; k <= most; k++ {
		if h := f.holds(usable[:k]); h > best || h == best && !few {
			best, f.groups = h, usable[:k]
		}
	}
	f.drop(min(f.least, most), best)
}

// drop leaves out the smallest group while the skew to it keeps more units out
// than it takes.
func (f *fill) drop(least, best int) {
	for f.skew < math.MaxInt && len(f.groups) > least {
		i := -1
		for j, g := range f.groups {
			if g.live() && (i < 0 || g.room < f.groups[i].room) {
				i = j
			}
		}
		if i < 0 || f.groups[i].fixed > 0 {
			return
		}
		rest := slices.Delete(slices.Clone(f.groups), i, i+1)
		h := f.holds(rest)
		if h <= best {
			return
		}
		f.groups, best = rest, h
	}
}

func (f *fill) used() int {
	n := 0
	for _, g := range f.all {
		if g.n > 0 {
			n++
		}
	}
	return n
}

func (f *fill) chosen(g *group) bool { return slices.Contains(f.groups, g) }

// give and strip move one unit into and out of a group; they say whether there
// was one to move.
func (f *fill) give(g *group) bool {
	x, _ := f.d.ends(g)
	if x == nil {
		return false
	}
	x.n++
	g.n++
	g.fresh = false
	f.left--
	return true
}

func (f *fill) strip(g *group) bool {
	_, x := f.d.ends(g)
	if x == nil {
		return false
	}
	x.n--
	g.n--
	g.fresh = false
	f.left++
	return true
}

// ends are the clusters of a group for the next unit to come and to go; nil when
// there is none.
func (d *decision) ends(g *group) (grow, shrink *cell) {
	if g.fresh {
		return g.grow, g.shrink
	}
	g.grow, g.shrink, g.fresh = nil, nil, true
	for _, x := range g.cells {
		if x.n < x.room && x.State != portolanv1.ClusterState_CLUSTER_STATE_LOST && (g.grow == nil || d.before(x, g.grow) < 0) {
			g.grow = x
		}
		if x.n > x.fixed && (g.shrink == nil || d.before(x, g.shrink) >= 0) {
			g.shrink = x
		}
	}
	return g.grow, g.shrink
}

// before orders clusters for the next unit; the last is the first to give one.
func (d *decision) before(a, b *cell) int {
	c := cmp.Compare(a.soft, b.soft)
	switch d.plain.GetObjective() {
	case portolanv1.Objective_OBJECTIVE_COST:
		c = cmp.Or(c, cmp.Compare(a.price, b.price), cmp.Compare(a.n, b.n))
	case portolanv1.Objective_OBJECTIVE_PACK:
		c = cmp.Or(c, cmp.Compare(b.n, a.n), cmp.Compare(b.room, a.room), cmp.Compare(a.price, b.price))
	default:
		c = cmp.Or(c, cmp.Compare(a.n, b.n), cmp.Compare(a.price, b.price))
	}
	return cmp.Or(c, cmp.Compare(a.ID, b.ID))
}

// next orders groups for the next unit.
func (f *fill) next(a, b *group) int {
	x, _ := f.d.ends(a)
	y, _ := f.d.ends(b)
	c := cmp.Compare(x.soft, y.soft)
	switch f.d.plain.GetObjective() {
	case portolanv1.Objective_OBJECTIVE_COST:
		c = cmp.Or(c, cmp.Compare(x.price, y.price))
	case portolanv1.Objective_OBJECTIVE_PACK:
		c = cmp.Or(c, cmp.Compare(b.n, a.n), cmp.Compare(b.room, a.room))
	default: // evenly
	}
	return cmp.Or(c, cmp.Compare(a.n, b.n), cmp.Compare(x.price, y.price), cmp.Compare(a.name, b.name))
}

// take empties groups that are not to be used, and takes away what is too much.
func (f *fill) take() {
	for _, g := range f.all {
		for !f.chosen(g) && f.strip(g) {
		}
	}
	for f.left < 0 {
		g := f.toShrink()
		if g == nil || !f.strip(g) {
			return
		}
	}
}

// toShrink is the group that gives a unit: the last in the order of the
// objective whose loss keeps the spread, else the largest.
func (f *fill) toShrink() *group {
	var best, largest *group
	_, high := f.extremes()
	for _, g := range f.all {
		if g.n <= g.fixed {
			continue
		}
		if largest == nil || g.n >= largest.n {
			largest = g
		}
		if g.n == 1 && f.used() <= f.least || g.n > 1 && f.skew < math.MaxInt && high-(g.n-1) > f.skew {
			continue
		}
		if best == nil || f.later(g, best) {
			best = g
		}
	}
	if best == nil {
		return largest
	}
	return best
}

func (f *fill) later(a, b *group) bool {
	_, x := f.d.ends(a)
	_, y := f.d.ends(b)
	c := cmp.Compare(x.soft, y.soft)
	switch f.d.plain.GetObjective() {
	case portolanv1.Objective_OBJECTIVE_COST:
		c = cmp.Or(c, cmp.Compare(x.price, y.price))
	case portolanv1.Objective_OBJECTIVE_PACK:
		c = cmp.Or(c, cmp.Compare(b.n, a.n))
	default: // evenly
	}
	return cmp.Or(c, cmp.Compare(a.n, b.n), cmp.Compare(x.price, y.price), cmp.Compare(a.name, b.name)) > 0
}

// extremes are the least and the greatest number of units in a used group.
func (f *fill) extremes() (low, high int) {
	low = math.MaxInt
	for _, g := range f.all {
		if g.n > 0 && g.live() {
			low, high = min(low, g.n), max(high, g.n)
		}
	}
	return low, high
}

// add places units one by one: first one in each group that the spread asks for.
func (f *fill) add() {
	for f.left > 0 && f.used() < f.least {
		if g := f.toGrow(func(g *group) bool { return g.n == 0 }); g == nil || !f.give(g) {
			break
		}
	}
	for f.left > 0 {
		low := math.MaxInt
		for _, g := range f.groups {
			if g.live() {
				low = min(low, g.n)
			}
		}
		g := f.toGrow(func(g *group) bool { return f.skew == math.MaxInt || g.n+1-low <= f.skew })
		if g == nil || !f.give(g) {
			return
		}
	}
}

func (f *fill) toGrow(ok func(*group) bool) *group {
	var best *group
	for _, g := range f.groups {
		if x, _ := f.d.ends(g); x != nil && ok(g) && (best == nil || f.next(g, best) < 0) {
			best = g
		}
	}
	return best
}

// balance moves units until enough groups are used and none is too far from
// another. What has nowhere to go under the bound stays unplaced.
func (f *fill) balance() {
	for f.used() < f.least {
		from, to := f.toShrink(), f.toGrow(func(g *group) bool { return g.n == 0 })
		if from == nil || to == nil || from.n < 2 || !f.strip(from) {
			break
		}
		f.give(to)
	}
	if f.skew == math.MaxInt {
		return
	}
	for {
		low, high := f.extremes()
		if high == 0 || high-low <= f.skew {
			return
		}
		var from *group
		for _, g := range f.all {
			if g.n == high && g.live() && g.n > g.fixed {
				from = g
			}
		}
		if from == nil || !f.strip(from) {
			return
		}
		to := f.toGrow(func(g *group) bool { return g != from && g.n > 0 && g.n+1-low <= f.skew && g.n+1 < high })
		if to == nil {
			to = f.toGrow(func(g *group) bool { return g.n == 0 })
		}
		if to != nil {
			f.give(to)
		}
	}
}

// failover places once more, elsewhere, what lost clusters hold, when the
// workload wants that and they have been silent long enough. What stands in ends
// when the cluster is back and its replicas are ready. Jobs are not run twice.
func (d *decision) failover() {
	rule := d.plain.GetFailover()
	if rule == nil || d.w.Spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		return
	}
	after := defaultFailoverAfter
	if a := rule.GetAfter(); a != nil {
		after = a.AsDuration()
	}
	want, awaited := 0, 0
	for _, x := range d.cells {
		if x.State == portolanv1.ClusterState_CLUSTER_STATE_READY && x.hadExtra == 0 {
			awaited += max(0, min(x.n, x.had)-x.Ready/d.perUnit)
		}
		if x.fixed == 0 {
			continue
		}
		if due := x.LastSeen.Add(after); due.After(d.now) {
			d.sooner(due)
			x.verdict = append(x.verdict, Reason{Code: Lost, Message: "failover is due at " + due.UTC().Format(time.RFC3339Nano)})
			continue
		}
		want += x.fixed
	}
	d.standIn(want, awaited)
}

func (d *decision) sooner(t time.Time) {
	if d.again.IsZero() || t.Before(d.again) {
		d.again = t
	}
}

// standIn gives extra units: first those that were there before stay, then more
// are added. Those that a returned cluster is still awaited for only stay.
func (d *decision) standIn(want, awaited int) {
	open := func(x *cell) bool {
		return x.State == portolanv1.ClusterState_CLUSTER_STATE_READY && x.n+x.extra < d.extraRoom(x)
	}
	for _, x := range d.cells {
		for want+awaited > 0 && x.extra < x.hadExtra && open(x) {
			x.extra++
			if want > 0 {
				want--
			} else {
				awaited--
			}
		}
	}
	for ; want > 0; want-- {
		var best *cell
		for _, x := range d.cells {
			if open(x) && (best == nil || cmp.Or(cmp.Compare(x.soft, best.soft), cmp.Compare(x.n+x.extra, best.n+best.extra), cmp.Compare(x.price, best.price)) < 0) {
				best = x
			}
		}
		if best == nil {
			break
		}
		best.extra++
	}
	d.extraMissing = want
	if want > 0 {
		d.reasons = append(d.reasons, Reason{Code: Failover, Message: "not every replica of the lost clusters found room elsewhere", Count: want * d.perUnit})
	}
}

// extraRoom is the room for declared and extra units together.
func (d *decision) extraRoom(x *cell) int {
	if x.barred || x.closed {
		return x.room
	}
	return max(x.room, d.fit(x.Free, 2*d.units), d.fit(x.Previous.Claim, min(x.had+x.hadExtra, 2*d.units)))
}

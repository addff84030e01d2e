package place

import (
	"cmp"
	"math"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// spread is one bound on how units lie over the domains of one kind.
type spread struct {
	over portolanv1.SpreadDomain
	// least domains to use, greatest difference between used ones, and most units
	// in one.
	least, skew, most int
	prefer            bool
	groups            []group
	used              int
	// settled spreads no longer wait for chosen groups.
	settled bool
}

// group is one domain of a spread: its clusters, and its units.
type group struct {
	name  domain
	cells []int32
	size  int
	n     int
	room  int // declared units that fit
	fixed int // units of lost clusters, which count but cannot move
	// chosen groups are to be used.
	chosen bool
	// full groups may not have one more now.
	full bool
}

// live groups can take units; one that is all lost does not bind the skew, for
// its loss must not keep replicas from running elsewhere.
func (g *group) live() bool { return g.room > g.fixed }

// bounds says whether the spread can keep a unit from a cluster.
func (s *spread) bounds() bool { return s.skew < math.MaxInt || s.most < math.MaxInt }

// extremes are the least and the greatest number of units in a used group.
func (s *spread) extremes() (low, high int) {
	low = math.MaxInt
	for i := range s.groups {
		if g := &s.groups[i]; g.n > 0 && g.live() {
			low, high = min(low, g.n), max(high, g.n)
		}
	}
	return low, high
}

// mark says of each group whether it may have one more. A chosen group that has
// none yet keeps the others low, for it is to be used.
func (s *spread) mark() {
	if !s.bounds() {
		return
	}
	low := math.MaxInt
	for i := range s.groups {
		if g := &s.groups[i]; g.live() && (g.chosen && !s.settled || g.n > 0) {
			low = min(low, g.n)
		}
	}
	_, high := s.extremes()
	for i := range s.groups {
		g := &s.groups[i]
		g.full = g.n >= s.most || !g.chosen && !s.settled && g.n == 0 && s.skew < math.MaxInt
		if s.skew < math.MaxInt {
			skew := s.skew
			if plant.ignoresSkew {
				skew++
			}
			g.full = g.full || g.n+1-low > skew || g.n == 0 && high-1 > skew
		}
	}
}

// holds is how many units some groups can take within the skew.
func (s *spread) holds(groups []*group, units int) int {
	least := math.MaxInt
	for _, g := range groups {
		if g.live() {
			least = min(least, g.room)
		}
	}
	sum := 0
	for _, g := range groups {
		room := min(g.room, s.most)
		if s.skew < math.MaxInt-least {
			room = min(room, least+s.skew)
		}
		sum += max(room, g.fixed)
	}
	return min(sum, units)
}

// choose picks the groups to use: the fewest that hold everything when packing or
// saving, else the most; never fewer than are in use or asked for. Where the
// order of the objective holds less than the largest groups would, these are used.
func (f *fill) choose(s *spread) {
	s.settled = false
	all := s.prefer || s.skew == math.MaxInt
	for i := range s.groups {
		s.groups[i].chosen = all && s.groups[i].room > 0
	}
	if all {
		return
	}
	var usable []*group
	inUse := 0
	for i := range s.groups {
		g := &s.groups[i]
		if g.room > 0 {
			usable = append(usable, g)
		}
		inUse += min(1, g.n)
	}
	slices.SortStableFunc(usable, f.rank)
	most := min(len(usable), max(f.d.want, inUse))
	least := min(max(s.least, inUse), most)
	few := f.d.order == byPrice || f.d.order == byFullest || f.d.order == byLatency
	best, set := s.prefix(usable, least, most, f.d.want, few)
	slices.SortStableFunc(usable, func(a, b *group) int { return cmp.Compare(b.room, a.room) })
	if h, other := s.prefix(usable, min(s.least, most), most, f.d.want, false); h > best {
		set = other
	}
	for _, g := range set {
		g.chosen = true
	}
}

// prefix is the best number of first groups: that which holds most, and among
// equals the fewest or the most.
func (s *spread) prefix(groups []*group, least, most, units int, few bool) (int, []*group) {
	best, n := -1, 0
	for k := least; k <= most; k++ {
		if h := s.holds(groups[:k], units); h > best || h == best && !few {
			best, n = h, k
		}
	}
	return best, slices.Clone(groups[:n])
}

// rank orders groups: those in use first, then by the objective.
func (f *fill) rank(a, b *group) int {
	inUse := func(g *group) int { return min(1, g.n) }
	x, y := f.first(a), f.first(b)
	c := cmp.Compare(inUse(b), inUse(a))
	if x == nil || y == nil {
		return c
	}
	if c == 0 {
		c = cmp.Compare(x.class, y.class)
	}
	switch f.d.order {
	case byFullest:
		c = cmp.Or(c, cmp.Compare(b.room, a.room))
	case byLatency:
		c = cmp.Or(c, cmp.Compare(x.latency, y.latency))
	default: // by price
	}
	return cmp.Or(c, cmp.Compare(x.price, y.price), cmp.Compare(a.name.a, b.name.a), cmp.Compare(a.name.b, b.name.b))
}

// first is the cluster of a group that comes first where nothing is yet.
func (f *fill) first(g *group) *cell {
	var best *cell
	for _, i := range g.cells {
		x := &f.d.cells[i]
		if x.room == 0 {
			continue
		}
		if best == nil || x.class < best.class || x.class == best.class && (f.d.order == byLatency && x.latency < best.latency || f.d.order != byLatency && x.price < best.price) {
			best = x
		}
	}
	return best
}

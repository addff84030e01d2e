package place

import (
	"cmp"
	"slices"
)

// Bounds of the search: clusters with room, and distributions looked at; and how
// many there may be in all to look for one that is better only by the objective.
const (
	searchCells  = 12
	searchBudget = 1 << 15
	searchPolish = 1 << 12
	weightScale  = 1 << 20
)

// search looks for a distribution that places more, or uses more of the domains
// that are asked for, where the greedy way is stuck although there is room: several
// spreads at once can stand in each other's way. Where something was moved to repair
// a spread it looks for one that moves less, and where there are few distributions
// for the best by the objective. Up to its bounds it is exact.
func (f *fill) search() {
	s := &searcher{f: f, budget: searchBudget}
	if !s.worth() {
		return
	}
	s.at = make([]int, len(s.cells))
	s.best = f.standing()
	before := s.best
	for _, i := range s.cells {
		x := &f.d.cells[i]
		s.at[len(s.lowest)] = x.n
		low := x.fixed
		if f.d.rooted {
			low = min(x.had, x.room, x.n)
		}
		s.lowest = append(s.lowest, low)
		s.room += x.room
		if x.lost() {
			s.room += x.n - x.room
		}
	}
	s.top = slices.Clone(s.at)
	for _, i := range s.cells {
		f.change(&f.d.cells[i], -f.d.cells[i].n)
	}
	s.try(0, s.room)
	at := s.top
	if s.best.compare(before) >= 0 {
		at = s.at
	}
	for k, i := range s.cells {
		f.change(&f.d.cells[i], at[k])
	}
}

// searcher is one search.
type searcher struct {
	f      *fill
	cells  []int32
	lowest []int
	room   int
	// at is what the greedy way made, top the best so far.
	at, top []int
	best    standing
	budget  int
}

// worth says whether there is something to gain, and the search can be done.
func (s *searcher) worth() bool {
	d := s.f.d
	if plant.searchesNever {
		return false
	}
	room, bound, all := 0, false, 1
	for i := range d.cells {
		if x := &d.cells[i]; x.room > 0 || x.n > 0 {
			s.cells = append(s.cells, int32(i))
			room += max(x.room, x.n)
			all = min(all, searchPolish) * (1 + min(x.room, d.want))
		}
	}
	for j := range d.spreads {
		if sp := &d.spreads[j]; !sp.prefer {
			bound = bound || sp.bounds() || sp.least > 1 || j > 0
		}
	}
	st := s.f.standing()
	return bound && len(s.cells) <= searchCells && (st.short > 0 || st.left > 0 && room > d.want-s.f.left || s.f.repaired || all <= searchPolish)
}

// standing is how good a distribution is: domains that are short of what spreads
// ask for, units without a place, units in later groups of the fallbacks, units
// that leave, what is to be avoided, and the objective.
type standing struct {
	short, left, back, moved, avoid int
	value                           int64
}

func (a standing) compare(b standing) int {
	return cmp.Or(cmp.Compare(a.short, b.short), cmp.Compare(a.left, b.left), cmp.Compare(a.back, b.back),
		cmp.Compare(a.moved, b.moved), cmp.Compare(a.avoid, b.avoid), cmp.Compare(a.value, b.value))
}

func (f *fill) standing() standing {
	st := standing{left: f.left}
	for j := range f.d.spreads {
		if s := &f.d.spreads[j]; !s.prefer {
			st.short += max(0, min(s.least, f.d.want)-s.used)
		}
	}
	for i := range f.d.cells {
		x := &f.d.cells[i]
		st.back += x.n * x.tier
		st.avoid += x.n * (x.soft<<11 + x.wish)
		if !f.d.afresh {
			st.moved += max(0, min(x.had, x.room)-x.n)
		}
		st.value += f.valueOf(x)
	}
	return st
}

// valueOf is what a cluster adds to the sum by the objective.
func (f *fill) valueOf(x *cell) int64 {
	n := int64(x.n)
	switch f.d.order {
	case byPrice, byLatency:
		var sum int64
		for k := 1; k <= x.n; k++ {
			sum += f.value(x, k)
		}
		return sum
	case byFullest:
		return min(1, n)
	case byWeight, byFree:
		return n * n * weightScale / max(1, x.weight)
	case byEven:
	}
	// Evenly over the first two spreads, then over clusters: the units of a domain, each
	// times all of them, add up to its square.
	sum := n * n
	if f.d.declared > 0 {
		sum += n * int64(f.d.of(x, 0).n) << 32
	}
	if f.d.declared > 1 {
		sum += n * int64(f.d.of(x, 1).n) << 16
	}
	return sum
}

// try distributes what is left over the cells from k on.
func (s *searcher) try(k, room int) {
	f := s.f
	s.budget--
	if s.budget < 0 || s.best.short == 0 && f.left-room > s.best.left {
		return
	}
	if k == len(s.cells) {
		if f.left < 0 || !f.lawful() {
			return
		}
		if st := f.standing(); st.compare(s.best) < 0 {
			s.best = st
			for i, c := range s.cells {
				s.top[i] = f.d.cells[c].n
			}
		}
		return
	}
	x := &f.d.cells[s.cells[k]]
	own := x.room
	if x.lost() {
		own = s.at[k]
	}
	low := s.lowest[k]
	if x.lost() {
		low = own
	}
	for n := min(own, f.left); n >= low; n-- {
		f.change(x, n)
		s.try(k+1, room-own)
		f.change(x, -n)
	}
}

// lawful says whether no must of a spread is broken.
func (f *fill) lawful() bool {
	for j := range f.d.spreads {
		s := &f.d.spreads[j]
		if s.prefer || !s.bounds() {
			continue
		}
		low, high := s.extremes()
		if high > 0 && high-low > s.skew || s.overfull() != nil {
			return false
		}
	}
	return true
}

package place

import (
	"cmp"
	"slices"
)

// Bounds of the search: clusters with room, and distributions looked at.
const (
	searchCells  = 12
	searchBudget = 1 << 15
)

// search looks for a distribution that places more, or uses more of the domains
// that are asked for, where the greedy way is stuck although there is room: several
// spreads at once can stand in each other's way. Up to its bounds it is exact.
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
	room, bound := 0, false
	for i := range d.cells {
		if x := &d.cells[i]; x.room > 0 || x.n > 0 {
			s.cells = append(s.cells, int32(i))
			room += max(x.room, x.n)
		}
	}
	for j := range d.spreads {
		if sp := &d.spreads[j]; !sp.prefer {
			bound = bound || sp.bounds() || sp.least > 1
		}
	}
	st := s.f.standing()
	return bound && len(s.cells) <= searchCells && (st.short > 0 || st.left > 0 && room > d.want-s.f.left)
}

// standing is how good a distribution is: domains that are short of what spreads
// ask for, units without a place, units that leave, and the objective.
type standing struct {
	short, left, moved int
	value              int64
}

func (a standing) compare(b standing) int {
	return cmp.Or(cmp.Compare(a.short, b.short), cmp.Compare(a.left, b.left), cmp.Compare(a.moved, b.moved), cmp.Compare(a.value, b.value))
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
		if !f.d.afresh {
			st.moved += max(0, min(x.had, x.room)-x.n)
		}
		switch {
		case f.d.order == byPrice || f.d.order == byLatency:
			for n := 1; n <= x.n; n++ {
				st.value += f.value(x, n)
			}
		case f.d.order == byFullest:
			st.value += int64(min(1, x.n))
		default:
			st.value += int64(x.n) * int64(x.n)
		}
	}
	return st
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

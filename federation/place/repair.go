package place

import "math"

// movable says whether a unit that was in the cluster may be moved; a new one
// always may.
func (f *fill) movable(x *cell) bool {
	return x.n > x.fixed && (!f.d.rooted || x.n > min(x.had, x.room))
}

// balance moves units until enough domains are used and none has too many more
// than another. What has nowhere to go under a bound stays unplaced. Wishes move
// nothing.
func (f *fill) balance() {
	for j := range f.d.spreads {
		if !f.d.spreads[j].prefer {
			f.widen(j)
		}
	}
	// One spread's repair can break another; at the end units are only taken away.
	for round := 0; !f.lawful() && round < 8; round++ {
		for j := range f.d.spreads {
			if !f.d.spreads[j].prefer {
				f.level(j, round < 4)
			}
		}
	}
	f.add()
}

// widen moves units into domains that are not used, while the spread asks for
// more.
func (f *fill) widen(j int) {
	s := &f.d.spreads[j]
	for s.used < s.least {
		from := f.toShrink(func(x *cell) bool { return f.d.of(x, j).n > 1 && f.movable(x) })
		if from == nil {
			return
		}
		f.change(from, -1)
		to := f.best(func(x *cell) bool { return f.d.of(x, j).n == 0 })
		if to == nil || !f.keepsUsed(from) {
			f.change(from, 1)
			return
		}
		f.change(to, 1)
		f.repaired = true
	}
}

// keepsUsed says that no other spread lost a domain that it needs when the
// cluster gave a unit.
func (f *fill) keepsUsed(from *cell) bool {
	for j := range f.d.spreads {
		s := &f.d.spreads[j]
		if f.d.of(from, j).n == 0 && s.used < s.least && !s.prefer {
			return false
		}
	}
	return true
}

// level moves units from the fullest domain to others until the bound holds, or
// only takes them away.
func (f *fill) level(j int, move bool) {
	s := &f.d.spreads[j]
	for s.bounds() {
		low, high := s.extremes()
		over := s.overfull()
		if over == nil && (high == 0 || s.skew == math.MaxInt || high-low <= s.skew) {
			return
		}
		if over == nil {
			over = s.highest(high)
		}
		if over == nil {
			return
		}
		from := f.toShrink(func(x *cell) bool { return f.d.of(x, j) == over && f.movable(x) })
		if from == nil {
			return
		}
		f.repaired = true
		if f.change(from, -1); !move {
			continue
		}
		to := f.best(func(x *cell) bool {
			g := f.d.of(x, j)
			return g != over && g.n > 0 && g.n+1 < high
		})
		if to == nil {
			to = f.best(func(x *cell) bool { return f.d.of(x, j) != over && f.d.of(x, j).n == 0 })
		}
		if to != nil {
			f.change(to, 1)
		}
	}
}

// overfull is a group with more units than one may have.
func (s *spread) overfull() *group {
	for i := range s.groups {
		if g := &s.groups[i]; g.n > s.most && g.n > g.fixed {
			return g
		}
	}
	return nil
}

// highest is the last group with so many units, of those that can give one.
func (s *spread) highest(n int) *group {
	var out *group
	for i := range s.groups {
		if g := &s.groups[i]; g.n == n && g.live() && g.n > g.fixed {
			out = g
		}
	}
	return out
}

// goBack moves units of later groups of the fallbacks to earlier ones that have
// room again, and what is to leave a cluster to any other.
func (f *fill) goBack() {
	if len(f.d.plain.GetFallbacks()) == 0 && len(f.d.near) == 0 || plant.returnsNever {
		return
	}
	for range f.d.want {
		var from, to *cell
		for i := range f.d.cells {
			x := &f.d.cells[i]
			if x.tier == 0 || x.n == 0 || !f.movable(x) || from != nil && x.tier <= from.tier {
				continue
			}
			f.change(x, -1)
			y := f.best(func(y *cell) bool { return y.tier < x.tier })
			if y != nil && f.keepsUsed(x) {
				from, to = x, y
			}
			f.change(x, 1)
		}
		if from == nil {
			return
		}
		f.change(from, -1)
		f.change(to, 1)
	}
}

// improve moves new units, one at a time, as long as that makes the sum better by
// the objective: a domain that had to be used first may have taken a unit that is
// dear.
func (f *fill) improve() {
	if f.d.order != byPrice && f.d.order != byLatency || len(f.d.spreads) == 0 {
		return
	}
	for j := range f.d.spreads {
		f.d.spreads[j].settle()
	}
	for range 2 * f.d.want {
		moved := false
		for i := range f.d.cells {
			x := &f.d.cells[i]
			if x.n <= x.fixed || x.n <= x.had && !f.d.afresh || f.spared(x) {
				continue
			}
			f.change(x, -1)
			y := f.best(func(y *cell) bool { return y.class <= x.class })
			if y != nil && y != x && f.value(y, y.n+1) < f.value(x, x.n+1) && f.keepsUsed(x) {
				f.change(y, 1)
				moved = true
				continue
			}
			f.change(x, 1)
		}
		if !moved {
			return
		}
	}
}

// settle opens every domain: those that were not chosen may be used as well, as far
// as the bound allows beside the used ones.
func (s *spread) settle() {
	for i := range s.groups {
		s.groups[i].chosen = s.groups[i].n > 0
	}
	s.settled = true
	s.mark()
}

// value of the n-th unit by the objective; less is better.
func (f *fill) value(x *cell, n int) int64 {
	if f.d.order == byLatency {
		return x.latency
	}
	return x.priceOf(n)
}

package place

import "math"

// fill is one distribution of the declared units over the clusters: what was
// there stays, as far as it is still allowed; then units are taken away or added
// one by one in the order of the objective; at last what is broken is repaired by
// moves.
type fill struct {
	d    *decision
	left int // units without a place
	// repaired says that units were moved to restore a spread.
	repaired bool
	// keys of the next unit in each cell, none where there is no room.
	keys []key
}

// none comes after every key.
var none = key{math.MaxUint64, math.MaxUint64}

// spread fills the declared units.
func (d *decision) spread() {
	f := &fill{d: d, left: d.want, keys: make([]key, len(d.cells))}
	f.start()
	f.take()
	f.add()
	f.balance()
	f.goBack()
	f.improve()
	f.search()
	d.missing = f.left
}

// start counts what is there.
func (f *fill) start() {
	d := f.d
	for j := range d.spreads {
		s := &d.spreads[j]
		s.used = 0
		for i := range s.groups {
			g := &s.groups[i]
			g.n, g.room, g.fixed = 0, 0, 0
		}
	}
	for i := range d.cells {
		x := &d.cells[i]
		switch {
		case x.lost(): // keepLost has set it
		case d.roomFromLower: // goes on from what is placed
		case d.afresh || plant.forgetsPrevious:
			x.n = 0
			if x.closed && !x.away {
				x.n = min(x.had, x.room)
			}
		default:
			x.n = min(x.had, x.room)
		}
		f.left -= x.n
		for j := range d.spreads {
			g := d.of(x, j)
			if g.n == 0 && x.n > 0 {
				d.spreads[j].used++
			}
			g.n += x.n
			if x.lost() {
				g.fixed += x.fixed
				g.room += x.fixed
			} else {
				g.room += x.room
			}
		}
	}
	for j := range d.spreads {
		f.choose(&d.spreads[j])
		d.spreads[j].mark()
	}
	for i := range d.cells {
		f.rekey(&d.cells[i])
	}
}

func (f *fill) rekey(x *cell) {
	if x.open() {
		f.keys[x.index] = f.d.key(x, x.n, 0)
	} else {
		f.keys[x.index] = none
	}
}

// change moves the count of a cell and its groups.
func (f *fill) change(x *cell, by int) {
	x.n += by
	f.left -= by
	for j := range f.d.spreads {
		s, g := &f.d.spreads[j], f.d.of(x, j)
		if g.n > 0 {
			s.used--
		}
		if g.n += by; g.n > 0 {
			s.used++
		}
		if s.bounds() {
			s.mark()
		}
	}
	f.rekey(x)
	if f.d.order == byWeight || f.d.order == byFree {
		return // their keys count no domains
	}
	for j := range min(2, f.d.declared) {
		if cells := f.d.of(x, j).cells; len(cells) > 1 {
			for _, i := range cells {
				f.rekey(&f.d.cells[i])
			}
		}
	}
}

// open clusters can take one more as far as room goes.
func (x *cell) open() bool { return x.n < x.room && !x.lost() }

// allowed says whether the spreads let a cluster have one more; wishes too when
// they count.
func (f *fill) allowed(x *cell, wishes bool) bool {
	for j := range f.d.spreads {
		if s := &f.d.spreads[j]; (wishes || !s.prefer) && s.bounds() && f.d.of(x, j).full {
			return false
		}
	}
	return true
}

// best is the cluster for the next unit, among those that ok lets through; nil
// when there is none. Spreads that are wishes count while that leaves any.
func (f *fill) best(ok func(*cell) bool) *cell {
	hard, soft := -1, -1
	for i, k := range f.keys {
		if k == none || hard >= 0 && !k.less(f.keys[hard]) && (!f.d.wishes || soft >= 0 && !k.less(f.keys[soft])) {
			continue
		}
		x := &f.d.cells[i]
		if ok != nil && !ok(x) || !f.allowed(x, false) {
			continue
		}
		if hard < 0 || k.less(f.keys[hard]) {
			hard = i
		}
		if f.d.wishes && (soft < 0 || k.less(f.keys[soft])) && f.allowed(x, true) {
			soft = i
		}
	}
	switch {
	case soft >= 0:
		return &f.d.cells[soft]
	case hard >= 0:
		return &f.d.cells[hard]
	}
	return nil
}

// take takes away what is too much: the last in the order of the objective whose
// loss keeps the spreads, else the last of the largest group.
func (f *fill) take() {
	for f.left < 0 {
		x := f.toShrink(nil)
		if x == nil {
			return
		}
		f.change(x, -1)
	}
}

// toShrink is the cluster that gives a unit, among those that ok lets through;
// nil when none has one to give.
func (f *fill) toShrink(ok func(*cell) bool) *cell {
	var best, rest *cell
	var bestKey, restKey key
	for i := range f.d.cells {
		x := &f.d.cells[i]
		if x.n <= x.fixed || ok != nil && !ok(x) {
			continue
		}
		k := f.d.key(x, x.n-1, 1)
		if f.spared(x) {
			if rest == nil || !k.less(restKey) {
				rest, restKey = x, k
			}
		} else if best == nil || !k.less(bestKey) {
			best, bestKey = x, k
		}
	}
	if best == nil {
		return rest
	}
	return best
}

// spared says that a spread would break when the cluster gave a unit.
func (f *fill) spared(x *cell) bool {
	for j := range f.d.spreads {
		s, g := &f.d.spreads[j], f.d.of(x, j)
		if g.n == 1 && s.used <= s.least {
			return true
		}
		if g.n > 1 && s.bounds() && g.live() {
			if _, high := s.extremes(); high-(g.n-1) > s.skew {
				return true
			}
		}
	}
	return false
}

// add places units one by one: first one in each domain that a spread asks for.
func (f *fill) add() {
	for j := range f.d.spreads {
		s := &f.d.spreads[j]
		for f.left > 0 && s.used < s.least {
			x := f.best(func(x *cell) bool { return f.d.of(x, j).n == 0 })
			if x == nil {
				break
			}
			f.change(x, 1)
		}
	}
	for f.left > 0 {
		x := f.best(nil)
		if x == nil && !f.giveUp() {
			return
		}
		if x != nil {
			f.change(x, 1)
		}
	}
}

// giveUp stops waiting for a chosen domain that cannot be used after all, because
// another spread keeps units out of it, and lets others grow; at last it lets in
// the domains that were not chosen, because those that were have no room after all.
func (f *fill) giveUp() bool {
	for j := range f.d.spreads {
		s := &f.d.spreads[j]
		if s.skew == math.MaxInt || s.prefer {
			continue
		}
		for i := range s.groups {
			if g := &s.groups[i]; g.chosen && g.n == 0 {
				g.chosen = false
				s.mark()
				return true
			}
		}
	}
	for j := range f.d.spreads {
		if s := &f.d.spreads[j]; s.bounds() && !s.settled && !s.prefer {
			s.settle()
			return true
		}
	}
	return false
}

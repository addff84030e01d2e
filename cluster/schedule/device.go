package schedule

import "slices"

// whole is all of a device, in thousandths.
const whole = 1000

// device of a node. free is less than 0 when a replica holds more than there is.
type device struct {
	kind, model string
	index       int32
	free        int32
	// kept counts nominations that may need it: others leave it alone.
	kept int32
}

func (a *deviceAsk) takes(d *device) bool {
	return a.kind == d.kind && (len(a.models) == 0 || slices.Contains(a.models, d.model))
}

// amount is what the ask takes of one device, and of how many.
func (a *deviceAsk) amount() (milli, count int32) {
	if a.milli > 0 {
		return a.milli, 1
	}
	return whole, a.count
}

// readDevices takes the devices of a node's facts over, all of them free.
func (t *Table) readDevices(i int32) {
	list := t.devices[i][:0]
	for _, d := range t.facts[i].GetDevices() {
		list = append(list, device{kind: d.GetKind(), model: d.GetModel(), index: d.GetIndex(), free: whole})
	}
	slices.SortStableFunc(list, func(a, b device) int { return int(a.index - b.index) })
	t.stock += int64(len(list)-len(t.devices[i])) * whole
	t.devices[i] = list
	t.readModel(i)
}

// hasDevices says whether a node has enough devices for an ask, free or not.
func (t *Table) hasDevices(i int32, a *deviceAsk) bool {
	_, need := a.amount()
	for k := range t.devices[i] {
		if need > 0 && a.takes(&t.devices[i][k]) {
			need--
		}
	}
	return need <= 0
}

func (t *Table) takeShares(i int32, shares []Share, sign int64) {
	for _, s := range shares {
		for k := range t.devices[i] {
			if d := &t.devices[i][k]; d.index == s.Index && d.kind == s.Kind {
				d.free += int32(sign) * s.Milli
			}
		}
	}
}

// fitsDevices says whether the asks find room on a node's devices together.
func (t *Table) fitsDevices(i int32, asks []deviceAsk) bool {
	if len(asks) != 1 {
		_, ok := t.assign(i, asks, nil)
		return ok
	}
	milli, need := asks[0].amount()
	for k := range t.devices[i] {
		if d := &t.devices[i][k]; d.free >= milli && d.kept == 0 && asks[0].takes(d) {
			if need--; need <= 0 {
				return true
			}
		}
	}
	return need <= 0
}

// maxAssign bounds the search for devices of several asks.
const maxAssign = 4096

// assign chooses devices for the asks and appends the shares to out. Whole ones
// take the lowest index, shares the device that is left with least.
func (t *Table) assign(i int32, asks []deviceAsk, out []Share) ([]Share, bool) {
	s := assignment{devices: t.devices[i], asks: asks, left: maxAssign, out: out, anyModel: t.faults.modelIgnored}
	ok := s.next(0, 0, -1)
	return s.out, ok
}

type assignment struct {
	devices []device
	asks    []deviceAsk
	left    int
	out     []Share

	anyModel bool // planted
}

// next chooses a device for the n-th unit of an ask; whole ones after the device
// last of the unit before, so that no set is tried twice.
func (s *assignment) next(ask int, n int32, last int) bool {
	if ask == len(s.asks) {
		return true
	}
	a := &s.asks[ask]
	milli, count := a.amount()
	if n == count {
		return s.next(ask+1, 0, -1)
	}
	for k := s.best(a, milli, last, -1); k >= 0 && s.left > 0; k = s.best(a, milli, last, k) {
		s.left--
		d := &s.devices[k]
		d.free -= milli
		s.out = append(s.out, Share{Kind: d.kind, Index: d.index, Milli: milli})
		after := -1
		if milli == whole {
			after = k
		}
		ok := s.next(ask, n+1, after)
		d.free += milli
		if ok {
			return true
		}
		s.out = s.out[:len(s.out)-1]
	}
	return false
}

// best gives the device that is left with least, after the one tried before and
// beyond last.
func (s *assignment) best(a *deviceAsk, milli int32, last, tried int) int {
	best := -1
	for k := last + 1; k < len(s.devices); k++ {
		d := &s.devices[k]
		suits := a.takes(d) || s.anyModel
		if d.free < milli || d.kept != 0 || !suits || (tried >= 0 && !s.less(tried, k)) {
			continue
		}
		if best < 0 || s.less(k, best) {
			best = k
		}
	}
	return best
}

func (s *assignment) less(a, b int) bool {
	if s.devices[a].free != s.devices[b].free {
		return s.devices[a].free < s.devices[b].free
	}
	return a < b
}

package schedule

import (
	"cmp"
	"math"
	"slices"
)

// Bounds of what is learned of demand.
const (
	maxRows    = 40 // shares of one size and number, together
	maxModels  = 32
	maxDevices = 16  // of a node; one with more is scored by its load
	maxShapes  = 512 // shapes that are counted; the rarest half goes
	firstLearn = 16  // requests before the first rebuild
	maxLearn   = 1 << 14
)

// Fixed point: one is 1 of a matchability; weightUnit is 1 of a probability.
const (
	one        = 1 << 12
	weightUnit = 1 << 16
)

// shape is a request for devices, as demand is learned by it.
type shape struct {
	milli, count, cpu, memory int32 // memory in MiB
	mask                      uint32
}

func (s shape) compare(o shape) int {
	return cmp.Or(cmp.Compare(s.milli, o.milli), cmp.Compare(s.count, o.count), cmp.Compare(s.cpu, o.cpu), cmp.Compare(s.memory, o.memory), cmp.Compare(s.mask, o.mask))
}

func (s shape) devices() float64 { return float64(s.milli) * float64(s.count) }

// weighted is a shape and how often it was asked for.
type weighted struct {
	shape
	n float64
}

// Observe says that n replicas of a class are asked for. The owner tells it once of
// every new request, placed or not; pools that keep fragmentation low learn from it
// what is usually asked for. Nothing else in a table depends on what was before.
func (t *Table) Observe(c *Class, n int) {
	f := &t.fragments
	if n <= 0 {
		return
	}
	f.seen += n
	if s, ok := f.shapeOf(&c.ask); ok {
		f.demand[s] += float64(n)
		if len(f.demand) > maxShapes {
			f.forgetRare()
		}
	}
	if !f.used {
		return
	}
	if f.seen >= f.next {
		f.relearn(t)
	}
	if f.seen >= f.nextPrice {
		f.reprice(t)
	}
}

// Observed is how many requests the table was told of.
func (t *Table) Observed() int { return t.fragments.seen }

// shapeOf reads an ask for devices of one kind.
func (f *fragments) shapeOf(a *ask) (shape, bool) {
	if len(a.devices) != 1 {
		return shape{}, false
	}
	milli, count := a.devices[0].amount()
	return shape{milli, count, int32(min(a.cpu, math.MaxInt32/2)), int32(min(a.memory>>20, math.MaxInt32/2)), f.maskOf(&a.devices[0])}, true
}

// maskOf is the set of models that an ask accepts; 0 is all.
func (f *fragments) maskOf(a *deviceAsk) uint32 {
	m := uint32(0)
	for _, name := range a.models {
		if k := f.model(name); k >= 0 {
			m |= 1 << uint(k)
		}
	}
	return m
}

func (f *fragments) forgetRare() {
	list := f.shapes()
	slices.SortStableFunc(list, func(a, b weighted) int { return cmp.Compare(b.n, a.n) })
	for _, s := range list[maxShapes/2:] {
		delete(f.demand, s.shape)
	}
}

// shapes gives the demand in order.
func (f *fragments) shapes() []weighted {
	var out []weighted
	for s, n := range f.demand {
		out = append(out, weighted{s, n})
	}
	slices.SortFunc(out, func(a, b weighted) int { return a.compare(b.shape) })
	return out
}

// relearn builds the tables from the demand so far. They are built again when that
// has grown fourfold, later in fixed steps, when older demand counts half.
func (f *fragments) relearn(t *Table) {
	if f.next >= maxLearn {
		for s := range f.demand {
			f.demand[s] /= 2
		}
		f.next += maxLearn
	} else {
		for f.next <= f.seen && f.next < maxLearn {
			f.next *= 4
		}
	}
	list := f.shapes()
	if len(list) == 0 {
		list = []weighted{{shape{milli: whole, count: 1, cpu: t.cpuPerDevice()}, 1}}
	}
	f.build(list)
	f.weighBlocks(t)
	f.epoch++
}

// cpuPerDevice is what a whole device has of its node's CPU, on average.
func (t *Table) cpuPerDevice() int32 {
	var cpu, n int64
	for i := range t.ids {
		if len(t.devices[i]) > 0 {
			cpu += t.capCPU[i]
			n += int64(len(t.devices[i]))
		}
	}
	return int32(min(cpu/max(n, 1), math.MaxInt32/2))
}

// build makes the integer tables of a demand.
func (f *fragments) build(list []weighted) {
	number, devices, multi := 0.0, 0.0, 0.0
	for _, s := range list {
		number += s.n
		devices += s.n * s.devices()
		if s.count > 1 {
			multi += s.n * s.devices()
		}
	}
	f.whole = int64(blockShare * multi / devices * one * whole / 14)
	f.block = int64(blockWeight * whole * 1000 * number / devices)
	f.readRows(list, number, devices)
	masked := slices.ContainsFunc(list, func(s weighted) bool { return s.mask != 0 })
	f.tables = f.tables[:0]
	for k := range f.models {
		if k == 0 || masked {
			f.tables = append(f.tables, f.tablesFor(uint(k), list, number))
		} else {
			f.tables = append(f.tables, f.tables[0])
		}
	}
	f.readDuals(list)
}

// readRows tells shares of different size and number apart. Where there are too
// many, a size counts with the next greater that has a row.
func (f *fragments) readRows(list []weighted, number, devices float64) {
	f.rows = f.rows[:0]
	for _, s := range list {
		if r := f.lastRow(); len(f.rows) == 0 || r.milli != s.milli || r.count != s.count {
			f.rows = append(f.rows, row{milli: s.milli, count: s.count})
		}
		r := f.lastRow()
		r.part += s.n * s.devices() / devices
		r.weight += int32(s.n / number * weightUnit)
	}
	for len(f.rows) > maxRows {
		k := 0
		for j := range f.rows[:len(f.rows)-1] {
			if f.rows[j].weight < f.rows[k].weight {
				k = j
			}
		}
		f.rows[k+1].part += f.rows[k].part
		f.rows[k+1].weight += f.rows[k].weight
		f.rows = slices.Delete(f.rows, k, k+1)
	}
	for g := range f.offers {
		f.rank[g] = 0
		for r := range f.rows {
			f.offers[g][r] = uint8(int32(g) / f.rows[r].milli)
			if f.rows[r].milli <= int32(g) {
				f.rank[g] = uint8(r + 1)
			}
		}
	}
}

func (f *fragments) lastRow() *row {
	if len(f.rows) == 0 {
		return &row{}
	}
	return &f.rows[len(f.rows)-1]
}

func (f *fragments) rowOf(s shape) int {
	k, _ := slices.BinarySearchFunc(f.rows, s, func(r row, s shape) int {
		return cmp.Or(cmp.Compare(r.milli, s.milli), cmp.Compare(r.count, s.count))
	})
	return min(k, len(f.rows)-1)
}

// tablesFor sums, for the demand that accepts a model, weights by what is asked of
// CPU and memory.
func (f *fragments) tablesFor(model uint, list []weighted, number float64) tables {
	out := tables{&table{}, &table{}}
	for _, s := range list {
		if s.mask != 0 && s.mask>>model&1 == 0 {
			continue
		}
		r, w := f.rowOf(s.shape), s.n/number*weightUnit
		out.cpu.add(r, s.cpu, cpuBits, w)
		out.memory.add(r, s.memory, memoryBits, w)
	}
	for r := range f.rows {
		out.cpu.sum(r)
		out.memory.sum(r)
	}
	return out
}

// readDuals values what is left of a device by the best that still goes into it.
func (f *fragments) readDuals(list []weighted) {
	bySize := map[int]float64{}
	for _, s := range list {
		bySize[int(s.milli)] += s.n * float64(s.count)
	}
	sizes := sortedKeys(bySize)
	count := make([]float64, len(sizes))
	for i, s := range sizes {
		count[i] = bySize[s]
	}
	duals := cuttingStock(sizes, count)
	y := make([]int32, len(sizes))
	f.dual = [whole + 1]int32{}
	for i, s := range sizes {
		y[i] = int32(math.Round(duals[i] * one))
		f.dual[s] = y[i]
	}
	for c := 1; c <= whole; c++ {
		f.value[c] = f.value[c-1]
		for i, s := range sizes {
			if s <= c {
				f.value[c] = max(f.value[c], f.value[c-s]+y[i])
			}
		}
	}
}

// reprice sets what using a model costs beside: the demand that names it over what
// is free of it. Every model may turn out to be named, so each begins with a little.
func (f *fragments) reprice(t *Table) {
	f.nextPrice = f.seen + max(4, min(f.seen/8, 128))
	f.weighBlocks(t)
	free := make([]float64, len(f.models))
	for i := range t.ids {
		if m := t.modelOf(int32(i)); m >= 0 {
			free[m] += float64(freeMilli(t.devices[i]))
		}
	}
	byMask, all, named := map[uint32]float64{}, 0.0, false
	for _, s := range f.shapes() {
		all += s.n * s.devices()
		if s.mask != 0 {
			byMask[s.mask] += s.n * s.devices()
			named = true
		}
	}
	if !named {
		return
	}
	mean := all / float64(max(f.seen, 1))
	for k := range f.models {
		byMask[1<<uint(k)] += namedPrior * mean
		all += namedPrior * mean
	}
	masks := sortedKeys(byMask)
	demand := make([]float64, len(masks))
	for i, m := range masks {
		demand[i] = byMask[m] / all
	}
	for k, rho := range pressure(free, masks, demand) {
		rho = min(rho, 1)
		f.prices[k] = int64(namedWeight * rho * rho * one)
	}
}

func freeMilli(devices []device) (sum int64) {
	for k := range devices {
		sum += int64(max(devices[k].free, 0))
	}
	return sum
}

// weighBlocks sets how much a block of several whole devices counts: by the demand
// for such while the free devices last, over the blocks that are free. It falls only
// when it falls to less than half, as nodes are scored anew with it.
func (f *fragments) weighBlocks(t *Table) {
	var blocks [maxRows]float64
	free := 0.0
	for i := range t.ids {
		m := t.modelOf(int32(i))
		if m < 0 {
			continue
		}
		free += float64(freeMilli(t.devices[i]))
		k := int32(0)
		for j := range t.devices[i] {
			if t.devices[i][j].free == whole {
				k++
			}
		}
		for r := range f.rows {
			if n := f.rows[r].count; n > 1 && k >= n && f.rows[r].weight > 0 {
				w := f.tables[m].part(r, clamp(t.freeCPU[i]), clamp(t.freeMemory[i]>>20), k/n, f.inverse[k/n])
				blocks[r] += float64(k/n*n) * whole * float64(w) / float64(f.rows[r].weight)
			}
		}
	}
	changed := false
	for r := range f.rows {
		if f.rows[r].count <= 1 {
			continue
		}
		x := 1.0
		if d := f.rows[r].part * free; d < blocks[r] {
			x = d / blocks[r]
		}
		if level := levelOf(x * x); level > f.rows[r].level || level < f.rows[r].level/2 {
			f.rows[r].level = level
			changed = true
		}
	}
	if changed {
		f.epoch++
	}
}

// levelOf rounds down to 0, 1, 2, 4, 8 or 16 sixteenths.
func levelOf(x float64) int64 {
	for q := int64(16); q >= 1; q /= 2 {
		if x*16 >= float64(q)*0.9 {
			return q
		}
	}
	return 0
}

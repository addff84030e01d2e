package schedule

import (
	"math"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Weights of the policy that keeps devices usable. It was tuned on seeds 1 to 10 of
// the openb experiment, which benchmark T7 runs on others.
const (
	concave     = 1.0 / 8 // power of the matchability of a device
	regret      = 4       // of a share that leaves what no good pattern completes
	namedWeight = 0.5     // greatest price of a model that is asked for by name
	namedPrior  = 2       // mean requests that are taken to name each model
	blockShare  = 0.3     // worth of whole devices beside each other
	blockWeight = 4       // worth of scarce blocks for requests of several
)

// fragments scores where a request leaves least that is useless for what is usually
// asked for. A node's potential is what its devices have free, each weighted by the
// part of the demand, by number, that could still use it there, given the node's CPU
// and memory; to a small power, because a device that something can use will be
// used. The cost of a place is the potential that it takes beyond its own size, what
// the rest of the device loses against the best ways to cut devices (regret), and a
// price of models that others ask for by name. (The measure of fragmentation that it
// goes beyond is FGD's: "Beware of Fragmentation", USENIX ATC 2023.)
//
// All sums are integers: the same demand gives the same keys everywhere.
type fragments struct {
	used, stale     bool // a pool scores by it; tables are to be built again
	demand          map[shape]float64
	seen            int
	next, nextPrice int
	// epoch counts changes of what all nodes' costs follow from; prices apart.
	epoch uint64

	models       []string
	rows         []row
	offers       [whole + 1][maxRows]uint8 // shares of a row that a device with so much free has
	rank         [whole + 1]uint8          // rows of at most so much
	tables       []tables                  // by model
	inverse      [1 << 9]int32             // 2^16 ÷ n
	power        [one + 1]int32
	value        [whole + 1]int32
	dual         [whole + 1]int32
	whole, block int64
	prices       [maxModels]int64
	nodes        []potential // by slot
	memos        [memos]memo
}

// row is demand for a number of shares of a size.
type row struct {
	milli, count int32
	part         float64 // of all that is asked of devices
	weight       int32   // of all requests
	level        int64   // sixteenths by which blocks count
}

// potential is a node's, as long as epoch and version are the table's.
type potential struct {
	slots [maxRows]int16
	u     int64
	epoch uint64
	valid bool
}

// fragmentCache is what an index keeps: the request as a shape.
type fragmentCache struct {
	use   bool
	shape shape
	ok    bool
}

const (
	buckets    = 1 << 9
	cpuBits    = 8  // a bucket is 256 millicores
	memoryBits = 11 // and 2 GiB
	partBits   = 18
)

// table holds, by row and bucket of a resource, the weight of the demand that asks
// for no more than that (w), and that weight over what it asks (v).
type table struct{ w, v [maxRows][buckets]int32 }

type tables struct{ cpu, memory *table }

func (t *table) add(r int, x int32, bits uint, w float64) {
	b := min(int(x+1<<bits-1)>>bits, buckets-1)
	t.w[r][b] += int32(w)
	t.v[r][b] += int32(w * (1 << partBits) / float64(max(x, 1<<bits)))
}

func (t *table) sum(r int) {
	for b := 1; b < buckets; b++ {
		t.w[r][b] += t.w[r][b-1]
		t.v[r][b] += t.v[r][b-1]
	}
}

// f is the weight of a row that k requests each find x ÷ k for; who asks for more
// than that, but not for more than x, counts in proportion.
func (t *table) f(r int, x, inverse int32, bits uint) int32 {
	per := int32(int64(x) * int64(inverse) >> 16)
	low, high := min(per>>bits, buckets-1), min(x>>bits, buckets-1)
	w := t.w[r][low]
	if low < high {
		w += int32(int64(t.v[r][high]-t.v[r][low]) * int64(per) >> partBits)
	}
	return w
}

func (t *tables) part(r int, cpu, memory, _, inverse int32) int32 {
	return min(t.cpu.f(r, cpu, inverse, cpuBits), t.memory.f(r, memory, inverse, memoryBits))
}

func clamp(n int64) int32 { return int32(min(max(n, 0), math.MaxInt32/2)) }

// prepare makes the scorer ready when a pool first uses it.
func (f *fragments) prepare(t *Table) {
	if f.used {
		return
	}
	f.used = true
	// Indexes that were made before do not tell models apart.
	for _, r := range t.known {
		r.x = nil
	}
	for i := 1; i <= one; i++ {
		f.power[i] = int32(math.Round(one * math.Pow(float64(i)/one, concave)))
	}
	for i := 1; i < len(f.inverse); i++ {
		f.inverse[i] = int32((1<<16 + i - 1) / i)
	}
	f.next = firstLearn
	f.relearn(t)
	f.reprice(t)
}

// model gives a device model's number; less than 0 when there are too many.
func (f *fragments) model(name string) int {
	k := slices.Index(f.models, name)
	if k >= 0 || len(f.models) == maxModels {
		return k
	}
	f.models = append(f.models, name)
	f.stale = true
	return len(f.models) - 1
}

// freshen builds the tables again if there are models that they do not know, or
// nodes before anything was asked for.
func (f *fragments) freshen(t *Table) {
	if f.used && f.stale {
		f.build(f.orDefault(t))
		f.weighBlocks(t)
		f.epoch++
	}
	f.stale = false
}

func (f *fragments) orDefault(t *Table) []weighted {
	if list := f.shapes(); len(list) > 0 {
		return list
	}
	return []weighted{{shape{milli: whole, count: 1, cpu: t.cpuPerDevice()}, 1}}
}

// modelOf is the model of a node's devices; less than 0 when it has none, several
// kinds, or more than are looked at.
func (t *Table) modelOf(i int32) int { return int(t.model[i]) }

// readModel notes a node's model when its devices were read.
func (t *Table) readModel(i int32) {
	t.model[i] = -1
	list := t.devices[i]
	if len(list) == 0 || len(list) > maxDevices {
		return
	}
	for k := range list {
		if list[k].kind != list[0].kind || list[k].model != list[0].model {
			return
		}
	}
	t.model[i] = int8(t.fragments.model(list[0].model))
	t.fragments.stale = t.fragments.stale || t.fragments.seen < firstLearn
}

// potential of a node, remembered while nothing on it changes.
func (t *Table) potential(i int32) *potential {
	f := &t.fragments
	for len(f.nodes) < len(t.ids) {
		f.nodes = append(f.nodes, potential{})
	}
	p := &f.nodes[i]
	if p.valid && p.epoch == f.epoch {
		return p
	}
	var free [maxDevices]int16
	n := readFree(t.devices[i], &free)
	for r := range f.rows {
		p.slots[r] = 0
	}
	for j := range n {
		q := &f.offers[free[j]]
		for r := range f.rows {
			p.slots[r] += int16(q[r])
		}
	}
	p.u = f.u(clamp(t.freeCPU[i]), clamp(t.freeMemory[i]>>20), t.modelOf(i), free[:n], &p.slots)
	p.epoch, p.valid = f.epoch, true
	return p
}

func readFree(list []device, free *[maxDevices]int16) int {
	for k := range list {
		free[k] = int16(min(max(list[k].free, 0), whole))
	}
	return len(list)
}

// u is the potential of devices with so much free, in thousandths times one.
func (f *fragments) u(cpu, memory int32, model int, free []int16, slots *[maxRows]int16) int64 {
	t := &f.tables[model]
	var upTo [maxRows + 1]int32
	x, blocks := int32(0), int64(0)
	for r := range f.rows {
		n := f.rows[r].count
		k := int32(slots[r])
		if n > 1 {
			k /= n
		}
		if k > 0 {
			w := t.part(r, cpu, memory, k, f.inverse[min(int(k), len(f.inverse)-1)])
			x += w
			if n > 1 {
				blocks += int64(w) * int64(n) * int64(n) * int64(k) * f.rows[r].level >> 4
			}
		}
		upTo[r+1] = x
	}
	u, k := int64(0), int64(0)
	for _, g := range free {
		if g <= 0 {
			continue
		}
		if g == whole {
			k++
		}
		u += int64(g) * int64(f.power[min(upTo[f.rank[g]]>>4, one)])
	}
	return u + f.whole*k*(k-1) + blocks*f.block>>4
}

// costScale brings costs into the range of a key's load: so many units of a
// thousandth of a device, times one, make one step.
const (
	costShift = 3
	costZero  = 1 << 22
)

func scaleCost(cost int64) float64 {
	return float64(min(max((cost+costZero)>>costShift, 0), loadOne)) / loadOne
}

// fragment is the cost of a place, and for a share the device that has it.
func (t *Table) fragment(i int32, x *index) (load float64, device int) {
	f := &t.fragments
	if !x.frag.use {
		x.frag.use = true
		x.frag.shape, x.frag.ok = f.shapeOf(x.ask)
	}
	if t.model[i] < 0 {
		return 1 - t.load(i, x.ask), -1
	}
	if !x.frag.ok {
		if len(x.ask.devices) > 0 {
			return 1 - t.load(i, x.ask), -1
		}
		p := t.potential(i)
		var free [maxDevices]int16
		n := readFree(t.devices[i], &free)
		u := f.u(clamp(t.freeCPU[i]-x.ask.cpu), clamp((t.freeMemory[i]-x.ask.memory)>>20), t.modelOf(i), free[:n], &p.slots)
		return scaleCost(p.u - u), -1
	}
	cost, d := t.remembered(i, x)
	return scaleCost(cost), d
}

// memo is the cost of a place on a node in some state. Many nodes are alike, above
// all empty ones.
type memo struct {
	x           *index
	epoch       uint64
	cpu, memory int64
	free        [maxDevices]int16
	model       int8
	device      int8
	cost        int64
}

const memos = 1 << 9

func (t *Table) remembered(i int32, x *index) (int64, int) {
	f := &t.fragments
	if len(t.keeps[i]) > 0 {
		return t.deviceCost(i, x.ask, &x.frag.shape)
	}
	now := memo{x: x, epoch: f.epoch, cpu: t.freeCPU[i], memory: t.freeMemory[i], model: t.model[i]}
	h := mix(uint64(now.cpu), uint64(now.memory))
	for k := range readFree(t.devices[i], &now.free) {
		h = h*31 + uint64(now.free[k])
	}
	m := &f.memos[mix(h, uint64(len(t.devices[i])))%memos]
	if m.x == x && m.epoch == now.epoch && m.cpu == now.cpu && m.memory == now.memory && m.model == now.model && m.free == now.free {
		return m.cost, int(m.device)
	}
	cost, d := t.deviceCost(i, x.ask, &x.frag.shape)
	now.cost, now.device = cost, int8(d)
	*m = now
	return cost, d
}

// deviceCost is what a place costs in potential beyond what the request uses.
func (t *Table) deviceCost(i int32, a *ask, s *shape) (int64, int) {
	f := &t.fragments
	p := t.potential(i)
	cpu, memory := clamp(t.freeCPU[i]-a.cpu), clamp((t.freeMemory[i]-a.memory)>>20)
	base := p.u - int64(s.milli)*int64(s.count)*one
	if s.milli < whole {
		return t.shareCost(i, p, s, cpu, memory, base)
	}
	var free [maxDevices]int16
	n := readFree(t.devices[i], &free)
	left := s.count
	for k := range n {
		if left > 0 && free[k] == whole {
			free[k] = 0
			left--
		}
	}
	var slots [maxRows]int16
	for r := range f.rows {
		slots[r] = p.slots[r] - int16(f.offers[whole][r])*int16(s.count)
	}
	return base - f.u(cpu, memory, t.modelOf(i), free[:n], &slots), -1
}

// shareCost finds the device of a node that a share costs least on.
func (t *Table) shareCost(i int32, p *potential, s *shape, cpu, memory int32, base int64) (cost int64, device int) {
	f := &t.fragments
	var free [maxDevices]int16
	n := readFree(t.devices[i], &free)
	cost, device = math.MaxInt64, -1
	least := int32(math.MaxInt32)
	for k := range n {
		g := free[k]
		if int32(g) < s.milli || t.devices[i][k].kept != 0 || (device >= 0 && k > 0 && g == free[k-1]) {
			continue
		}
		loss := max(f.value[g]-f.value[int32(g)-s.milli]-f.dual[s.milli], 0)
		if loss > least {
			continue
		}
		least = loss
		free[k] = g - int16(s.milli)
		var slots [maxRows]int16
		q0, q1 := &f.offers[g], &f.offers[free[k]]
		for r := range f.rows {
			slots[r] = p.slots[r] - int16(q0[r]) + int16(q1[r])
		}
		if c := base - f.u(cpu, memory, t.modelOf(i), free[:n], &slots) + regret*whole*int64(loss); c < cost {
			cost, device = c, k
		}
		free[k] = g
	}
	if device < 0 {
		return 0, -1
	}
	return cost, device
}

// fragmentDevice gives the device for a share in a pool that keeps fragmentation
// low; others take the one that is left with least.
func (t *Table) fragmentDevice(i int32, a *ask) (int, bool) {
	if !t.keepsDevices(i) || t.model[i] < 0 || len(a.devices) != 1 || a.devices[0].milli == 0 {
		return 0, false
	}
	s, _ := t.fragments.shapeOf(a)
	_, d := t.deviceCost(i, a, &s)
	return d, d >= 0
}

func (t *Table) keepsDevices(i int32) bool {
	return t.pools[t.pool[i]].scoring == portolanv1.Scoring_SCORING_LEAST_FRAGMENTATION && t.fragments.used
}

// priceOf is what a place costs beside, in steps of a key's load.
func (t *Table) priceOf(i int32, x *index) uint64 {
	if !x.frag.ok || t.model[i] < 0 || !t.keepsDevices(i) {
		return 0
	}
	s := &x.frag.shape
	return uint64(int64(s.milli)*int64(s.count)*t.fragments.prices[t.model[i]]) >> costShift
}

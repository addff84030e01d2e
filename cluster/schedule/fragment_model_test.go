package schedule

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// asked is what the world was asked for before, so many times.
type asked struct {
	q *wanted
	n int
}

// usual is demand of one shape; models is empty for all.
type usual struct {
	milli, count, cpu, memory int64
	models                    string
	n                         float64
}

// sizes are what rows of demand are told apart by.
type sizes struct{ milli, count int64 }

// deviceAsks are the requests that ask for something.
func (q *wanted) deviceAsks() (out []*portolanv1.DeviceRequest) {
	for _, a := range q.spec.GetScheduling().GetDevices() {
		if a.GetCount() > 0 || a.GetShareMilli() > 0 {
			out = append(out, a)
		}
	}
	return out
}

func (q *wanted) size() sizes {
	a := q.deviceAsks()[0]
	if a.GetCount() > 0 {
		return sizes{whole, int64(a.GetCount())}
	}
	return sizes{int64(a.GetShareMilli()), 1}
}

// usuals is the demand by shape.
func (w *world) usuals() (out []usual, number, devices, multi float64) {
	for _, x := range w.asked {
		if len(x.q.deviceAsks()) != 1 {
			continue
		}
		a, s := askOf(x.q.spec, x.q.overhead), x.q.size()
		u := usual{milli: s.milli, count: s.count, cpu: a.cpu, memory: a.memory >> 20}
		if m := x.q.deviceAsks()[0].GetModels(); len(m) > 0 {
			u.models = fmt.Sprint(m)
		}
		k := slices.IndexFunc(out, func(o usual) bool { o.n = 0; return o == u })
		if k < 0 {
			k = len(out)
			out = append(out, u)
		}
		out[k].n += float64(x.n)
		all := float64(x.n) * float64(s.milli*s.count)
		number, devices = number+float64(x.n), devices+all
		if s.count > 1 {
			multi += all
		}
	}
	return out, number, devices, multi
}

// modelOf is the model of all of a node's devices.
func modelOf(n Node) (string, bool) {
	list := n.Facts.GetDevices()
	for _, d := range list {
		if d.GetKind() != list[0].GetKind() || d.GetModel() != list[0].GetModel() {
			return "", false
		}
	}
	if len(list) == 0 {
		return "", false
	}
	return list[0].GetModel(), true
}

// suits is the weight of the demand of a size that k requests each find their part
// of cpu and memory for: of the two, that of which there is less.
func (w *world) suits(s sizes, model string, cpu, memory, k int64) int64 {
	list, number, _, _ := w.usuals()
	part := func(x int64, bits int, need func(usual) int64) (weight int64) {
		each := x * ((1<<16 + k - 1) / k) >> 16
		for _, u := range list {
			if (sizes{u.milli, u.count}) != s || u.models != "" && u.models != fmt.Sprint([]string{model}) {
				continue
			}
			bucket := min((need(u)+1<<bits-1)>>bits, buckets-1)
			if bucket <= min(each>>bits, buckets-1) {
				weight += int64(u.n / number * weightUnit)
			}
		}
		more := int64(0)
		for _, u := range list {
			if (sizes{u.milli, u.count}) != s || u.models != "" && u.models != fmt.Sprint([]string{model}) {
				continue
			}
			bucket := min((need(u)+1<<bits-1)>>bits, buckets-1)
			if bucket > min(each>>bits, buckets-1) && bucket <= min(x>>bits, buckets-1) {
				more += int64(u.n / number * weightUnit * (1 << partBits) / float64(max(need(u), 1<<bits)))
			}
		}
		return weight + more*each>>partBits
	}
	return min(part(cpu, cpuBits, func(u usual) int64 { return u.cpu }), part(memory, memoryBits, func(u usual) int64 { return u.memory }))
}

// potential is what devices with so much free are still good for.
func (w *world) potential(model string, cpu, memory int64, free []int64) int64 {
	cpu, memory = max(cpu, 0), max(memory, 0)>>20
	list, number, devices, multi := w.usuals()
	weights := map[sizes]int64{}
	blocks := int64(0)
	for _, u := range list {
		s := sizes{u.milli, u.count}
		if _, done := weights[s]; done {
			continue
		}
		k := int64(0)
		for _, g := range free {
			k += g / s.milli
		}
		if k /= s.count; k == 0 {
			continue
		}
		weights[s] = w.suits(s, model, cpu, memory, k)
		if s.count > 1 {
			blocks += weights[s] * s.count * s.count * k * w.level(s) >> 4
		}
	}
	sum, wholes := int64(0), int64(0)
	for _, g := range free {
		if g == whole {
			wholes++
		}
		match := int64(0)
		for s, x := range weights {
			if s.milli <= g {
				match += x
			}
		}
		sum += g * int64(math.Round(one*math.Pow(float64(min(match>>4, one))/one, concave)))
	}
	return sum + int64(blockShare*multi/devices*one*whole/14)*wholes*(wholes-1) + blocks*int64(blockWeight*whole*1000*number/devices)>>4
}

// level is how much blocks of a size count, as the table learned it.
func (w *world) level(s sizes) int64 {
	for _, r := range w.learned.rows {
		if int64(r.milli) == s.milli && int64(r.count) == s.count {
			return r.level
		}
	}
	return 0
}

// fragmentLoad is the cost of a place in potential. What was learned of blocks,
// prices and cutting is the table's; the cost from it is worked out from nothing.
func (w *world) fragmentLoad(q *wanted, n Node, free, a room, devices map[Share]int32, packed float64) float64 {
	model, ok := modelOf(n)
	asks := q.deviceAsks()
	if !ok || len(asks) > 1 {
		return packed
	}
	list := slices.Clone(n.Facts.GetDevices())
	slices.SortStableFunc(list, func(a, b *nodev1.Device) int { return cmp.Compare(a.GetIndex(), b.GetIndex()) })
	var left []int64
	for _, d := range list {
		left = append(left, int64(min(max(devices[Share{Kind: d.GetKind(), Index: d.GetIndex()}], 0), whole)))
	}
	before := w.potential(model, free.cpu, free.memory, left)
	after := func() int64 { return w.potential(model, free.cpu-a.cpu, free.memory-a.memory, left) }
	if len(asks) == 0 {
		return scaleCost(before - after())
	}
	s := q.size()
	cost := before - s.milli*s.count*one
	if s.milli == whole {
		for k, need := 0, s.count; k < len(left) && need > 0; k++ {
			if left[k] == whole {
				left[k] = 0
				need--
			}
		}
		return scaleCost(cost - after())
	}
	best, least := int64(math.MaxInt64), int64(math.MaxInt64)
	for k, g := range left {
		if g < s.milli {
			continue
		}
		// Of devices that lose as little against the best cut, the cheapest.
		loss := max(int64(w.learned.value[g])-int64(w.learned.value[g-s.milli])-int64(w.learned.dual[s.milli]), 0)
		if loss > least {
			continue
		}
		least = loss
		left[k] = g - s.milli
		best = min(best, cost-after()+regret*whole*loss)
		left[k] = g
	}
	return scaleCost(best)
}

// modelPrice is what a model costs beside, because others name it.
func (w *world) modelPrice(q *wanted, n Node) float64 {
	model, ok := modelOf(n)
	k := slices.Index(w.learned.models, model)
	if !ok || len(q.deviceAsks()) != 1 || k < 0 {
		return 0
	}
	s := q.size()
	return float64(s.milli*s.count*w.learned.prices[k]>>costShift) / loadOne
}

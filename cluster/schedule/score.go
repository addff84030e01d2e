package schedule

import (
	"math"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// A key is how a node compares for the next replica of a class; lower is better.
// From the highest bit: the weight of wishes that it does not meet, replicas of the
// group that it has (pools that spread), its load as the pool's scoring sees it, a
// coin of seed and ID.
const (
	tieBits   = 12
	loadBits  = 24
	countBits = 12
	loadShift = tieBits
	ownShift  = loadShift + loadBits
	wishShift = ownShift + countBits

	loadOne = 1<<loadBits - 1
	tieMask = 1<<tieBits - 1
	maxOwn  = 1<<countBits - 1
	maxWish = 1<<(64-wishShift) - 1
	rest    = 1<<wishShift - 1
)

// imageWeight is how much of the load's range the images count that a node lacks.
const imageWeight = 0.1

// fits says whether a node has room for one replica; volumes are bytes that it
// brings beside its ask.
func (t *Table) fits(i int32, a *ask, volumes int64) bool {
	if a.cpu > t.freeCPU[i] && a.cpu > 0 || a.memory > t.freeMemory[i] && a.memory > 0 {
		return false
	}
	if s := a.storage + volumes; s > 0 && s > t.freeStorage[i] {
		return false
	}
	if a.address && t.freeAddress[i] <= 0 {
		return false
	}
	if len(a.ports) > 0 && t.portTaken(i, a) {
		return false
	}
	return len(a.devices) == 0 || t.fitsDevices(i, a.devices)
}

func (t *Table) portTaken(i int32, a *ask) bool {
	for _, p := range a.ports {
		if slices.Contains(t.ports[i], p) {
			return !t.faults.portIgnored
		}
	}
	return false
}

// key of a node without what depends on the group.
func (t *Table) key(i int32, x *index) uint64 {
	p := &t.pools[t.pool[i]]
	var load float64
	switch p.scoring {
	case portolanv1.Scoring_SCORING_PACK:
		load = 1 - t.load(i, x.ask)
	case portolanv1.Scoring_SCORING_PRICE:
		load = priced(p.costs(x.ask), x.dearest, t.load(i, x.ask))
	case portolanv1.Scoring_SCORING_LEAST_FRAGMENTATION:
		load, _ = t.fragment(i, x)
		if t.faults.fragmentReversed {
			load = 1 - load
		}
	default:
		load = t.load(i, x.ask)
		if t.faults.spreadReversed {
			load = 1 - load
		}
	}
	if x.m.absent != nil {
		load = load*(1-imageWeight) + imageWeight*float64(x.m.absent[i])/255
	}
	return uint64(x.m.soft[i])<<wishShift | uint64(load*loadOne+0.5)<<loadShift | t.tie[i]>>(64-tieBits)
}

// load is how full a node would be with one more, in its fullest resource.
func (t *Table) load(i int32, a *ask) float64 {
	cpu := 1 - float64(t.freeCPU[i]-a.cpu)*t.perCPU[i]
	memory := 1 - float64(t.freeMemory[i]-a.memory)*t.perMemory[i]
	if t.capCPU[i] <= 0 {
		cpu = 0
	}
	if t.capMemory[i] <= 0 {
		memory = 0
	}
	return math.Min(math.Max(math.Max(cpu, memory), 0), 1)
}

// priced is the price in the first place, and then the fuller node.
func priced(price, dearest, load float64) float64 {
	if dearest <= 0 {
		return (1 - load) / 1024
	}
	return math.Floor(price/dearest*1022)/1024 + (1-load)/1024
}

// spreadsOut says whether a node's pool counts a group's own replicas.
func (t *Table) spreadsOut(i int32) bool {
	return t.pools[t.pool[i]].scoring == portolanv1.Scoring_SCORING_SPREAD
}

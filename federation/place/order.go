package place

import (
	"cmp"
	"maps"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// ordering is the rule by which clusters are compared for the next unit.
type ordering uint8

const (
	byEven ordering = iota
	byPrice
	byFullest
	byLatency
	byWeight
	byFree
)

func (d *decision) ordering() ordering {
	switch d.plain.GetDivision() {
	case portolanv1.Division_DIVISION_WEIGHTED:
		return byWeight
	case portolanv1.Division_DIVISION_FREE_CAPACITY:
		return byFree
	default: // the objective says
	}
	switch d.plain.GetObjective() {
	case portolanv1.Objective_OBJECTIVE_COST:
		return byPrice
	case portolanv1.Objective_OBJECTIVE_PACK:
		return byFullest
	case portolanv1.Objective_OBJECTIVE_LATENCY:
		return byLatency
	default:
		return byEven
	}
}

func (d *decision) because() string {
	if d.duplicated() {
		return "every cluster that may have them gets all replicas"
	}
	switch d.order {
	case byPrice:
		return "the cheapest clusters come first"
	case byFullest:
		return "as few clusters as possible are used"
	case byLatency:
		return "the clusters nearest to the callers come first"
	case byWeight:
		return "replicas are divided by weight"
	case byFree:
		return "replicas are divided by free capacity"
	default:
		return "replicas are spread evenly"
	}
}

func (d *decision) duplicated() bool { return duplicated(d.w.Spec) }

// duplicated says whether every cluster has all replicas.
func duplicated(spec *portolanv1.WorkloadSpec) bool {
	p := spec.GetPlacement()
	return p.GetDivision() == portolanv1.Division_DIVISION_DUPLICATED && !isJob(spec) && !p.GetExclusive()
}

// Fields of a key. Units number at most 100,000, so 20 bits hold a count.
const (
	countBits = 20
	countMax  = 1<<countBits - 1
	wideBits  = 42
	wideMax   = 1<<wideBits - 1
	classMax  = 1<<22 - 1
	rankMax   = 1<<16 - 1
)

// key orders clusters for the next unit; the smallest comes first.
type key struct{ hi, lo uint64 }

func (a key) less(b key) bool { return a.hi < b.hi || a.hi == b.hi && a.lo < b.lo }

func clip(n, most int64) uint64 { return uint64(max(0, min(n, most))) }

// rankCells gives each cell what does not change of its key: the class of its
// standing (order of fallbacks, taints to be avoided, wishes), and its rank by
// price and name.
func (d *decision) rankCells() {
	order := make([]int32, len(d.cells))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortFunc(order, func(a, b int32) int {
		x, y := &d.cells[a], &d.cells[b]
		c := 0
		if d.afresh { // between equals, stay
			c = cmp.Compare(min(1, y.had), min(1, x.had))
		}
		return cmp.Or(c, cmp.Compare(x.price, y.price), cmp.Compare(a, b))
	})
	var weights int64 = 1
	for i := range d.cells {
		weights = max(weights, d.cells[i].weight)
	}
	for r, i := range order {
		x := &d.cells[i]
		x.rank = clip(int64(r), rankMax)
		x.class = clip(int64(x.tier), 63)<<16 | clip(int64(x.soft), 31)<<11 | clip(int64(x.wish), 2047)
		if d.plain.GetDivision() == portolanv1.Division_DIVISION_DUPLICATED {
			x.class = 0
		}
	}
}

// key of the unit after the ones that the cell has, less some.
func (d *decision) key(x *cell, n, less int) key {
	g, h := n, n
	if d.declared > 0 {
		g = d.of(x, 0).n - less
	}
	if d.declared > 1 {
		h = d.of(x, 1).n - less
	}
	k := key{hi: x.class << wideBits, lo: x.rank}
	count := func(n int) uint64 { return clip(int64(n), countMax) }
	switch d.order {
	case byWeight, byFree:
		// Sainte-Laguë: the next unit goes where (2n+1)/weight is least. More units never
		// take one away from a cluster.
		r := (2*uint64(n) + 1) << 40 / clip(max(1, x.weight), 1<<40)
		k.hi |= r >> 16
		k.lo |= r & rankMax << 48
	case byPrice:
		k.hi |= clip(x.priceOf(n+1), wideMax)
		k.lo |= count(g)<<44 | count(n)<<24
	case byLatency:
		k.hi |= clip(x.latency, wideMax)
		k.lo |= count(g)<<44 | count(n)<<24
	case byFullest:
		k.hi |= (countMax-count(n))<<22 | (countMax - count(x.room))
		k.lo |= (countMax - count(g)) << 44
	default:
		k.hi |= count(g)<<countBits | count(h)
		k.lo |= count(n) << 44
	}
	return k
}

// weightOf is the sum of the weights that match a cluster.
func (d *decision) weightOf(c *Cluster) int64 {
	var sum int64
	for _, w := range d.plain.GetWeights() {
		if matches(w.GetMatch(), c.ID, c.Spec, c.Labels) {
			sum += int64(w.GetWeight())
		}
	}
	return sum
}

// nameMatch writes a match in a few words.
func nameMatch(m *portolanv1.WorkloadSpec_ClusterMatch) string {
	out := ""
	add := func(list []string) {
		for _, v := range list {
			if out != "" {
				out += ","
			}
			out += v
		}
	}
	add(m.GetClusters())
	add(m.GetRegions())
	add(m.GetProviders())
	for _, k := range slices.Sorted(maps.Keys(m.GetLabels())) {
		add([]string{k + ":" + m.GetLabels()[k]})
	}
	if out == "" {
		return "all"
	}
	return out
}

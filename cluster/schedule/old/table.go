package old

import (
	"fmt"
	"maps"
	"slices"
)

// table holds the nodes column by column, and what was worked out for earlier
// groups of the same constraints.
type table struct {
	nodes               []Node
	index               map[string]int32
	freeCPU, freeMemory []int64
	capCPU, capMemory   []int64
	freeAddresses       []int32
	tie                 []uint16
	verdicts            map[string][]verdict
	domains             map[string]*domains
	count               []int32 // replicas of the present group by node
	heap                []item  // scratch
	marked              []int32 // nodes of which count is not 0
}

// domains are the values of a spread key: of[i] is the domain of node i.
type domains struct {
	of []int32
	n  int
}

type item struct {
	key  uint64
	node int32
}

func newTable(nodes []Node, seed uint64) *table {
	n := len(nodes)
	wide := make([]int64, 4*n)
	t := &table{
		nodes: nodes, index: make(map[string]int32, n), freeCPU: wide[:n:n], freeMemory: wide[n : 2*n : 2*n], capCPU: wide[2*n : 3*n : 3*n], capMemory: wide[3*n:],
		freeAddresses: make([]int32, n), tie: make([]uint16, n), count: make([]int32, n), heap: make([]item, 0, n),
		verdicts: map[string][]verdict{}, domains: map[string]*domains{},
	}
	for i := range nodes {
		nd := &nodes[i]
		t.index[nd.ID] = int32(i)
		t.capCPU[i], t.capMemory[i] = nd.Capacity.CPUMilli, nd.Capacity.MemoryBytes
		t.freeCPU[i], t.freeMemory[i] = nd.Capacity.CPUMilli-nd.Used.CPUMilli, nd.Capacity.MemoryBytes-nd.Used.MemoryBytes
		t.freeAddresses[i] = int32(nd.Addresses)
		t.tie[i] = uint16(mix(seed, uint64(i)) >> 48)
	}
	return t
}

// mix is the finalizer of SplitMix64.
func mix(a, b uint64) uint64 {
	z := a + (b+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// judged gives the verdict on every node, once per set of constraints.
func (t *table) judged(g *Group) []verdict {
	sig := g.signature()
	v, ok := t.verdicts[sig]
	if !ok {
		v = make([]verdict, len(t.nodes))
		for i := range v {
			v[i] = t.judge(i, g)
		}
		t.verdicts[sig] = v
	}
	return v
}

// place finds nodes for all replicas of a group, as far as there are any.
func (t *table) place(g *Group) Placed {
	if g.Count <= 0 {
		return Placed{}
	}
	t.setCounts(g)
	v := t.judged(g)
	p := Placed{Nodes: make([]int32, 0, g.Count)}
	blocked := false
	switch {
	case g.Node != "":
		t.placeOn(g, v, &p)
	case g.SpreadKey == "":
		t.placeOver(g, v, &p)
	default:
		blocked = t.placeSpread(g, v, &p)
	}
	if p.Missing = g.Count - len(p.Nodes); p.Missing > 0 {
		p.Refusals = t.refusals(g, v, blocked)
	}
	return p
}

func (t *table) setCounts(g *Group) {
	for _, i := range t.marked {
		t.count[i] = 0
	}
	t.marked = t.marked[:0]
	for id, n := range g.Running {
		if i, ok := t.index[id]; ok {
			t.count[i] = int32(n)
			t.marked = append(t.marked, i)
		}
	}
}

// take binds one replica to a node.
func (t *table) take(i int32, g *Group, p *Placed) {
	t.freeCPU[i] -= g.Request.CPUMilli
	t.freeMemory[i] -= g.Request.MemoryBytes
	if g.Address {
		t.freeAddresses[i]--
	}
	if t.count[i] == 0 {
		t.marked = append(t.marked, i)
	}
	t.count[i]++
	p.Nodes = append(p.Nodes, i)
}

func (t *table) placeOn(g *Group, v []verdict, p *Placed) {
	i, ok := t.index[g.Node]
	for ok && v[i] <= prefersNot && len(p.Nodes) < g.Count && t.short(i, g) == fit {
		t.take(i, g, p)
	}
}

// placeOver takes the best node each time.
func (t *table) placeOver(g *Group, v []verdict, p *Placed) {
	h := t.heap[:0]
	for i := range v {
		if n := int32(i); v[i] <= prefersNot && t.short(n, g) == fit {
			h = append(h, item{t.score(n, g, v[i]), n})
		}
	}
	heapify(h)
	for len(p.Nodes) < g.Count && len(h) > 0 {
		h = t.takeTop(h, g, v, p)
	}
}

// takeTop binds one replica to the best node of a heap and puts the node where
// it now belongs, or out.
func (t *table) takeTop(h []item, g *Group, v []verdict, p *Placed) []item {
	i := h[0].node
	t.take(i, g, p)
	if t.short(i, g) == fit {
		h[0].key = t.score(i, g, v[i])
	} else {
		h[0] = h[len(h)-1]
		h = h[:len(h)-1]
	}
	siftDown(h, 0)
	return h
}

// placeSpread takes the best node of the domain that has the fewest replicas. It
// says whether max_skew held replicas back: the domains that may grow are full.
func (t *table) placeSpread(g *Group, v []verdict, p *Placed) (blocked bool) {
	d := t.domainsOf(g.SpreadKey)
	heaps, counts, present := t.heapsByDomain(g, v, d)
	// top orders the domains that can take more by replicas, then by their best.
	top := make([]item, 0, d.n)
	key := func(dom int32) uint64 { return uint64(counts[dom])<<40 | heaps[dom][0].key>>24 }
	lowest := newLowest(counts, present)
	for dom := range heaps {
		if len(heaps[dom]) > 0 {
			top = append(top, item{key(int32(dom)), int32(dom)})
		}
	}
	heapify(top)
	for len(p.Nodes) < g.Count && len(top) > 0 {
		dom := top[0].node
		if g.MaxSkew > 0 && int(counts[dom])+1-lowest.value() > g.MaxSkew {
			return true
		}
		heaps[dom] = t.takeTop(heaps[dom], g, v, p)
		lowest.raise(int(counts[dom]))
		counts[dom]++
		if len(heaps[dom]) > 0 {
			top[0].key = key(dom)
		} else {
			top[0] = top[len(top)-1]
			top = top[:len(top)-1]
		}
		siftDown(top, 0)
	}
	return false
}

func (t *table) domainsOf(spreadKey string) *domains {
	if d, ok := t.domains[spreadKey]; ok {
		return d
	}
	d := &domains{of: make([]int32, len(t.nodes))}
	values := map[string]int32{}
	for i := range t.nodes {
		value, ok := t.nodes[i].Labels[spreadKey]
		if !ok && spreadKey == NodeKey {
			value = t.nodes[i].ID
		}
		id, seen := values[value]
		if !seen {
			id = int32(len(values))
			values[value] = id
		}
		d.of[i] = id
	}
	d.n = len(values)
	t.domains[spreadKey] = d
	return d
}

// heapsByDomain gives each domain's candidates and replicas, and which domains
// have any node that the constraints allow.
func (t *table) heapsByDomain(g *Group, v []verdict, d *domains) (heaps [][]item, counts []int32, present []bool) {
	sizes := make([]int, d.n)
	counts, present = make([]int32, d.n), make([]bool, d.n)
	for i := range v {
		dom := d.of[i]
		counts[dom] += t.count[i]
		if v[i] <= prefersNot {
			present[dom] = true
			sizes[dom]++
		}
	}
	heaps = make([][]item, d.n)
	rest := t.heap[:cap(t.heap)]
	for dom, n := range sizes {
		heaps[dom], rest = rest[:0:n], rest[n:]
	}
	for i := range v {
		if n := int32(i); v[i] <= prefersNot && t.short(n, g) == fit {
			heaps[d.of[i]] = append(heaps[d.of[i]], item{t.score(n, g, v[i]), n})
		}
	}
	for _, h := range heaps {
		heapify(h)
	}
	return heaps, counts, present
}

// lowest follows the least count over domains whose counts only grow.
type lowest struct {
	at  []int // number of domains by count
	min int
}

func newLowest(counts []int32, present []bool) *lowest {
	l := &lowest{}
	for dom, c := range counts {
		if present[dom] {
			l.grow(int(c))
			l.at[c]++
		}
	}
	return l
}

func (l *lowest) grow(c int) {
	for len(l.at) <= c+1 {
		l.at = append(l.at, 0)
	}
}

// raise says that a domain went from count c to c+1.
func (l *lowest) raise(c int) {
	l.grow(c + 1)
	l.at[c]--
	l.at[c+1]++
}

func (l *lowest) value() int {
	for l.min < len(l.at)-1 && l.at[l.min] == 0 {
		l.min++
	}
	return l.min
}

func heapify(h []item) {
	for i := len(h)/2 - 1; i >= 0; i-- {
		siftDown(h, i)
	}
}

func less(a, b item) bool { return a.key < b.key || (a.key == b.key && a.node < b.node) }

func siftDown(h []item, i int) {
	for {
		c := 2*i + 1
		if c >= len(h) {
			return
		}
		if c+1 < len(h) && less(h[c+1], h[c]) {
			c++
		}
		if !less(h[c], h[i]) {
			return
		}
		h[i], h[c] = h[c], h[i]
		i = c
	}
}

// refusals counts why nodes take no more.
func (t *table) refusals(g *Group, v []verdict, blocked bool) []Refusal {
	var n [verdicts]int
	freest := [verdicts]int64{}
	for i := range v {
		if g.Node != "" && t.nodes[i].ID != g.Node {
			continue
		}
		why := v[i]
		if why <= prefersNot {
			why = t.short(int32(i), g)
		}
		if why == fit && blocked {
			why = skewed
		}
		n[why]++
		switch why {
		case shortCPU:
			freest[why] = max(freest[why], t.freeCPU[i])
		case shortMemory:
			freest[why] = max(freest[why], t.freeMemory[i])
		default:
		}
	}
	var out []Refusal
	for why, count := range n {
		if count > 0 && verdict(why) > prefersNot {
			out = append(out, Refusal{Code: codes[why], Message: message(verdict(why), count, g, freest[why]), Nodes: count})
		}
	}
	if len(out) == 0 {
		out = []Refusal{{Code: NodeNotReady, Message: "there is no node"}}
	}
	slices.SortStableFunc(out, func(a, b Refusal) int { return b.Nodes - a.Nodes })
	return out
}

func message(why verdict, n int, g *Group, freest int64) string {
	of := fmt.Sprintf("%d nodes", n)
	if n == 1 {
		of = "1 node"
	}
	switch why {
	case lost:
		return of + ": silent"
	case notReady:
		return of + ": not ready"
	case mismatch:
		return of + ": labels do not match the node selector"
	case tainted:
		return of + ": a taint that is not tolerated"
	case unlabelled:
		return of + ": no label " + g.SpreadKey + " to spread over"
	case shortCPU:
		return fmt.Sprintf("%s: %dm of CPU are asked for, at most %dm are free", of, g.Request.CPUMilli, max(freest, 0))
	case shortMemory:
		return fmt.Sprintf("%s: %d MiB of memory are asked for, at most %d MiB are free", of, g.Request.MemoryBytes>>20, max(freest, 0)>>20)
	case noAddress:
		return of + ": no free address for a replica"
	case skewed:
		return fmt.Sprintf("%s: more replicas there would exceed max_skew %d over %s", of, g.MaxSkew, g.SpreadKey)
	default:
		return of
	}
}

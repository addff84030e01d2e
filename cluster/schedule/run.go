package schedule

import "slices"

// run places the replicas of one group: it keeps the cells of the class's index in
// the order in which they take the next one. A node's place in the index holds for
// groups that have nothing on it; one that is special to the group (it has replicas
// of it, or of workloads that it has terms about) is taken out when it comes to the
// top, and compared by a key of its own. That is sound because being special only
// raises a key; where it may lower one, the nodes are taken out at the start.
type run struct {
	t *Table
	g *Group
	r *resolved
	x *index

	special []int32 // ids of the scopes that make a node special
	notOn   int32
	// near is the weight of wishes to be near that ordinary nodes do not meet.
	near uint32
	// only: just nodes with a workload that it must be on one node with.
	only bool
	// first: it must be near its own workload, of which there is none yet.
	first bool
	// nodeSpread: spreads over nodes, within nodeSkew unless that is 0.
	nodeSpread bool
	nodeSkew   int32
	levels     []int32 // allowed nodes by how many of the revision they have
	nodeMin    int

	mins     []minimum // by spread
	dynamic  []int     // columns whose counts the group's own replicas change
	order    []ranked  // heap of cells
	place    []int32   // of a cell in order; -1 when out
	blocked  []int32   // cells out for max_skew alone
	held     []int32   // nodes out for max_skew over nodes alone
	freed    []int32   // scratch: those that were
	aside    []int32   // nodes taken out of the index
	dirty    []int32   // cells with own
	seen     []uint32  // scratch, by value
	seenMark uint32
	values   []int32 // scratch
}

// waits is the place of a cell in blocked.
const waits = -2

// minimum follows the least count over the values of a spread's column that have
// an allowed node, and how many have it.
type minimum struct {
	least, atLeast int32
}

// ranked is a cell by its best node: what it asks in unmet wishes and replicas in
// its domains, then the node's key.
type ranked struct {
	hi, lo uint64
	node   int32
	cell   int32
}

func (t *Table) begin(u *run, g *Group, r *resolved) {
	u.t, u.g, u.r = t, g, r
	u.x = t.indexOf(r)
	u.notOn = -1
	if i, ok := t.index[g.NotOn]; ok && g.NotOn != "" {
		u.notOn = i
	}
	u.readTerms()
	u.findMins()
	u.pullNear()
	u.rankAll()
}

// readTerms looks up which terms work node by node, and which change as replicas
// are placed.
func (u *run) readTerms() {
	r := u.r
	u.special, u.dynamic = u.special[:0], u.dynamic[:0]
	u.near, u.only, u.first, u.nodeSpread, u.nodeSkew = 0, false, false, false, 0
	note := func(c *column) {
		if k := slices.Index(u.x.columns, c); !slices.Contains(u.dynamic, k) {
			u.dynamic = append(u.dynamic, k)
		}
	}
	u.special = append(u.special, r.rev.id)
	for k := range r.spreads {
		s := &r.spreads[k]
		if s.column != nil {
			note(s.column)
			continue
		}
		u.nodeSpread = true
		if s.must() && (u.nodeSkew == 0 || s.skew < u.nodeSkew) {
			u.nodeSkew = s.skew
		}
	}
	for k := range r.affinity {
		a := &r.affinity[k]
		if !a.anti && !a.prefer && a.scope == r.work && a.scope.total == 0 {
			u.first = true
		}
		if a.column != nil {
			if a.scope == r.work {
				note(a.column)
			}
			continue
		}
		u.special = append(u.special, a.scope.id)
		if !a.anti && a.prefer {
			u.near += a.weight
		}
	}
	for _, s := range r.work.against {
		if s.column == nil {
			u.special = append(u.special, s.id)
		} else if slices.Contains(r.avoids, s) && slices.Contains(u.x.columns, s.column) {
			note(s.column)
		}
	}
}

// findMins counts where replicas of the revision are fewest, by spread.
func (u *run) findMins() {
	u.mins = u.mins[:0]
	for k := range u.r.spreads {
		s := &u.r.spreads[k]
		m := minimum{}
		if s.column != nil && s.must() {
			m = u.findMin(s.column)
		}
		u.mins = append(u.mins, m)
	}
	if u.nodeSkew == 0 {
		return
	}
	u.levels = append(u.levels[:0], 0)
	for c := range u.x.cells {
		u.levels[0] += u.x.cells[c].nodes
	}
	for _, i := range u.r.rev.nodes {
		if u.x.m.ok.has(i) {
			u.levels[0]--
			u.level(u.t.countOn(i, u.r.rev), 1)
		}
	}
	u.nodeMin = 0
	u.raiseNodeMin()
}

func (u *run) level(n, by int32) {
	for int(n) >= len(u.levels) {
		u.levels = append(u.levels, 0)
	}
	u.levels[n] += by
}

func (u *run) raiseNodeMin() (raised bool) {
	for u.nodeMin < len(u.levels)-1 && u.levels[u.nodeMin] == 0 {
		u.nodeMin++
		raised = true
	}
	return raised
}

func (u *run) findMin(c *column) minimum {
	k := slices.Index(u.x.columns, c)
	u.seenMark++
	m := minimum{least: 1<<31 - 1}
	for j := range u.x.cells {
		cl := &u.x.cells[j]
		v := cl.values[k]
		if cl.nodes == 0 || u.saw(v) {
			continue
		}
		switch n := u.r.rev.in(c, v); {
		case n < m.least:
			m = minimum{n, 1}
		case n == m.least:
			m.atLeast++
		}
	}
	return m
}

func (u *run) saw(v int32) bool {
	for int(v) >= len(u.seen) {
		u.seen = append(u.seen, 0)
	}
	if u.seen[v] == u.seenMark {
		return true
	}
	u.seen[v] = u.seenMark
	return false
}

// pullNear takes the nodes out of the index at once whose key may be lower for the
// group, or that are the only ones that will do.
func (u *run) pullNear() {
	var smallest *scope
	for k := range u.r.affinity {
		a := &u.r.affinity[k]
		if a.column != nil || a.anti {
			continue
		}
		if !a.prefer {
			if a.scope == u.r.work && a.scope.total == 0 {
				continue
			}
			if smallest == nil || a.scope.total < smallest.total {
				smallest = a.scope
			}
			continue
		}
		for _, i := range a.scope.nodes {
			u.pull(i)
		}
	}
	if smallest == nil {
		return
	}
	u.only = true
	for _, i := range smallest.nodes {
		u.pull(i)
	}
}

// pull takes a node out of the index and gives it a key of its own, if the group
// may have it.
func (u *run) pull(i int32) {
	if u.x.at[i] < 0 {
		return
	}
	u.x.remove(i)
	u.aside = append(u.aside, i)
	u.keep(i)
}

// keep puts a node that is out of the index where the group finds it.
func (u *run) keep(i int32) {
	switch key, codes := u.nodeKey(i); codes {
	case 0:
		c := u.x.cellOf[i]
		own := &u.x.cells[c].own
		if len(*own) == 0 {
			u.dirty = append(u.dirty, c)
		}
		*own = append(*own, item{key, i})
		siftUp(u.t, *own, len(*own)-1)
	case SpreadSkew:
		u.held = append(u.held, i)
	default:
	}
}

// best is the node of a cell that the group would take.
func (u *run) best(c int32) (item, bool) {
	cl := &u.x.cells[c]
	top := item{node: -1}
	if !u.only {
		for len(cl.heap) > 0 && u.isSpecial(cl.heap[0]) {
			u.pull(cl.heap[0])
		}
		if len(cl.heap) > 0 {
			i := cl.heap[0]
			top = item{u.x.keys[i] + uint64(u.near)<<wishShift, i}
		}
	}
	if len(cl.own) > 0 && (top.node < 0 || lessItem(u.t, cl.own[0], top)) {
		top = cl.own[0]
	}
	return top, top.node >= 0
}

func (u *run) isSpecial(i int32) bool {
	if i == u.notOn {
		return true
	}
	for k := range u.t.scopes[i] {
		if slices.Contains(u.special, u.t.scopes[i][k].id) {
			return true
		}
	}
	return false
}

func (u *run) rankAll() {
	u.order, u.blocked = u.order[:0], u.blocked[:0]
	for len(u.place) < len(u.x.cells) {
		u.place = append(u.place, -1)
	}
	for c := range u.x.cells {
		u.place[c] = -1
	}
	for c := range u.x.cells {
		u.rank(int32(c))
	}
}

// rank puts a cell where it now belongs, or out.
func (u *run) rank(c int32) {
	cl := &u.x.cells[c]
	if len(cl.heap) == 0 && len(cl.own) == 0 {
		u.out(c)
		return
	}
	var wish uint32
	var count uint64
	if u.related() {
		var codes Code
		codes, wish, count = u.verdict(cl.values)
		if codes != 0 {
			u.out(c)
			if codes == SpreadSkew && u.place[c] != waits {
				u.place[c] = waits
				u.blocked = append(u.blocked, c)
			}
			return
		}
	}
	b, ok := u.best(c)
	if !ok {
		u.out(c)
		return
	}
	if u.x.frag.ok {
		b.key += min(u.t.priceOf(b.node, u.x)<<loadShift, (loadOne<<loadShift)-b.key&(loadOne<<loadShift))
	}
	rk := ranked{hi: (b.key>>wishShift+uint64(wish))<<40 | min(count, 1<<40-1), lo: b.key & rest, node: b.node, cell: c}
	k := u.place[c]
	if k < 0 {
		k = int32(len(u.order))
		u.order = append(u.order, rk)
		u.place[c] = k
	}
	u.order[k] = rk
	u.fix(int(k))
}

func (u *run) out(c int32) {
	k := int(u.place[c])
	if k < 0 {
		return
	}
	u.place[c] = -1
	last := len(u.order) - 1
	u.order[k] = u.order[last]
	u.order = u.order[:last]
	if k < last {
		u.place[u.order[k].cell] = int32(k)
		u.fix(k)
	}
}

func (u *run) lessRank(a, b *ranked) bool {
	if a.hi != b.hi {
		return a.hi < b.hi
	}
	if a.lo != b.lo {
		return a.lo < b.lo
	}
	return u.t.before(a.node, b.node)
}

func (u *run) fix(k int) {
	o := u.order
	swap := func(a, b int) {
		o[a], o[b] = o[b], o[a]
		u.place[o[a].cell], u.place[o[b].cell] = int32(a), int32(b)
	}
	for k > 0 && u.lessRank(&o[k], &o[(k-1)/2]) {
		swap(k, (k-1)/2)
		k = (k - 1) / 2
	}
	for {
		c := 2*k + 1
		if c >= len(o) {
			return
		}
		if c+1 < len(o) && u.lessRank(&o[c+1], &o[c]) {
			c++
		}
		if !u.lessRank(&o[c], &o[k]) {
			return
		}
		swap(k, c)
		k = c
	}
}

// next binds one replica to the best node; false when none will do.
func (u *run) next() bool {
	if len(u.order) == 0 {
		return false
	}
	top := u.order[0]
	u.bind(top.node, top.cell)
	return true
}

// bind places a replica on the best node of a cell.
func (u *run) bind(i, c int32) {
	x := u.x
	indexed := x.at[i] >= 0
	if !indexed {
		popItem(u.t, &x.cells[c].own)
	}
	raised := u.apply(i)
	if u.first {
		if indexed {
			x.update(i)
		}
		u.finish()
		u.t.begin(u, u.g, u.r)
		return
	}
	if indexed {
		if x.update(i); x.at[i] >= 0 && u.isSpecial(i) {
			u.pull(i)
		}
	} else if u.t.fits(i, x.ask, x.volumes) {
		x.keys[i] = u.t.key(i, x)
		u.keep(i)
	}
	u.rank(c)
	u.rerank(i, c, raised)
}

// rerank looks again at the cells that a replica on a node has changed.
func (u *run) rerank(i, c int32, raised bool) {
	if u.t.faults.cellsStale {
		return
	}
	for _, k := range u.dynamic {
		for _, other := range u.x.byVal[k][u.x.columns[k].of[i]] {
			if other != c {
				u.rank(other)
			}
		}
	}
	if !raised {
		return
	}
	u.freed = append(u.freed[:0], u.held...)
	u.held = u.held[:0]
	for _, h := range u.freed {
		u.keep(h)
		u.rank(u.x.cellOf[h])
	}
	n := len(u.blocked)
	for k := range n {
		if b := u.blocked[k]; u.place[b] == waits {
			u.place[b] = -1
			u.rank(b)
		}
	}
	u.blocked = append(u.blocked[:0], u.blocked[n:]...)
}

// apply counts a replica of the group on a node, and says whether some least count
// rose with it.
func (u *run) apply(i int32) (raised bool) {
	own := u.t.countOn(i, u.r.rev)
	var before [8]int32
	for k := range u.r.spreads {
		if s := &u.r.spreads[k]; s.column != nil && s.must() && k < len(before) {
			before[k] = u.r.rev.in(s.column, s.column.of[i])
		}
	}
	u.t.occupy(u.r, i, u.g)
	for k := range u.r.spreads {
		s := &u.r.spreads[k]
		if s.column == nil || !s.must() || before[k] != u.mins[k].least || !u.x.m.ok.has(i) {
			continue
		}
		if u.mins[k].atLeast--; u.mins[k].atLeast == 0 {
			u.mins[k] = u.findMin(s.column)
			raised = true
		}
	}
	if u.nodeSkew > 0 && u.x.m.ok.has(i) {
		u.level(own, -1)
		u.level(own+1, 1)
		raised = u.raiseNodeMin() || raised
	}
	return raised
}

// finish gives the index back what was taken out.
func (u *run) finish() {
	for _, c := range u.dirty {
		u.x.cells[c].own = u.x.cells[c].own[:0]
	}
	for _, i := range u.aside {
		u.x.update(i)
	}
	u.aside, u.dirty, u.held = u.aside[:0], u.dirty[:0], u.held[:0]
	u.x.seen = u.t.seq
}

func lessItem(t *Table, a, b item) bool {
	if a.key != b.key {
		return a.key < b.key
	}
	return t.before(a.node, b.node)
}

func siftUp(t *Table, h []item, k int) {
	for k > 0 && lessItem(t, h[k], h[(k-1)/2]) {
		h[k], h[(k-1)/2] = h[(k-1)/2], h[k]
		k = (k - 1) / 2
	}
}

func popItem(t *Table, h *[]item) {
	s := *h
	last := len(s) - 1
	s[0] = s[last]
	s = s[:last]
	*h = s
	for k := 0; ; {
		c := 2*k + 1
		if c >= len(s) {
			return
		}
		if c+1 < len(s) && lessItem(t, s[c+1], s[c]) {
			c++
		}
		if !lessItem(t, s[c], s[k]) {
			return
		}
		s[k], s[c] = s[c], s[k]
		k = c
	}
}

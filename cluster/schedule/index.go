package schedule

import (
	"slices"
	"strings"
)

// index holds the nodes that may take replicas of a class and have room, best
// first, for all classes with the same constraints, ask and topology keys. Nodes
// that agree in the values of those keys are a cell with a heap of its own. It
// catches up with the table's log when it is used.
type index struct {
	t       *Table
	name    string
	m       *mask
	ask     *ask
	volumes int64
	columns []*column

	keys   []uint64 // by slot
	at     []int32  // in the cell's heap; -1 when out
	cellOf []int32  // -1 when the mask refuses
	cells  []cell
	chain  map[uint64]int32
	byVal  []map[int32][]int32 // cells by column and value

	dearest float64
	epoch   uint64 // of pools
	mix     uint64 // of the demand that fragmentation follows from
	seen    uint64 // in the log
	used    uint64
	gone    bool
	frag    fragmentCache
}

type cell struct {
	values []int32 // of the columns
	heap   []int32
	nodes  int32  // that the mask allows
	own    []item // of the group at hand: nodes whose key is not the index's
}

// item is a node with a key of its own.
type item struct {
	key  uint64
	node int32
}

// Bounds of the indexes that are kept: so many at least, and so many slots in all.
const (
	minIndexes    = 16
	maxIndexSlots = 1 << 23
)

// indexOf gives the index for a class, up to date.
func (t *Table) indexOf(r *resolved) *index {
	t.fragments.freshen(t)
	m := t.masked(r)
	t.tick++
	if x := r.x; x != nil && !x.gone && x.m == m && r.xVersion == r.work.version {
		x.used = t.tick
		x.refresh()
		return x
	}
	columns := t.topology(r)
	if x := r.x; x != nil && !x.gone && x.m == m && slices.Equal(columns, x.columns) {
		x.used, r.xVersion = t.tick, r.work.version
		x.refresh()
		return x
	}
	columns = slices.Clone(columns)
	var b strings.Builder
	b.WriteString(r.c.static.signature)
	b.WriteString("\x00" + r.c.ask.signature)
	for _, c := range columns {
		b.WriteString("\x00" + c.key)
	}
	x := t.indexes[b.String()]
	if x == nil || x.m != m {
		if x != nil {
			t.dropIndex(x)
		}
		t.shrinkIndexes()
		x = &index{t: t, name: b.String(), m: m, ask: &r.c.ask, volumes: r.c.volumes, columns: columns}
		for _, c := range columns {
			c.refs++
		}
		x.build()
		t.indexes[x.name] = x
	}
	r.x, r.xVersion = x, r.work.version
	x.used = t.tick
	x.refresh()
	return x
}

// topology gives the columns whose values tell nodes apart for a class: its own
// terms', and those over which others keep away from it.
func (t *Table) topology(r *resolved) []*column {
	out := t.work.columns[:0]
	add := func(c *column) {
		if c != nil && !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	for k := range r.spreads {
		add(r.spreads[k].column)
	}
	for k := range r.affinity {
		add(r.affinity[k].column)
	}
	for _, s := range r.work.against {
		if s.total > 0 {
			add(s.column)
		}
	}
	if len(r.c.ask.devices) > 0 && t.fragments.used {
		// Models have prices that change more often than keys.
		add(t.column(modelKey))
	}
	slices.SortFunc(out, func(a, b *column) int { return strings.Compare(a.key, b.key) })
	t.work.columns = out
	return out
}

func (t *Table) shrinkIndexes() {
	for len(t.indexes) >= minIndexes && (len(t.indexes)+1)*len(t.ids) > maxIndexSlots {
		var oldest *index
		for _, x := range t.indexes {
			if oldest == nil || x.used < oldest.used {
				oldest = x
			}
		}
		t.dropIndex(oldest)
	}
}

func (t *Table) dropIndex(x *index) {
	x.gone = true
	delete(t.indexes, x.name)
	for _, c := range x.columns {
		t.dropColumn(c)
	}
}

func (x *index) grow() {
	x.keys, x.at, x.cellOf = append(x.keys, 0), append(x.at, -1), append(x.cellOf, -1)
}

// build works all nodes out.
func (x *index) build() {
	t := x.t
	n := len(t.ids)
	if len(x.keys) < n {
		x.keys, x.at, x.cellOf = make([]uint64, n), make([]int32, n), make([]int32, n)
	}
	x.resetCells()
	x.frag = fragmentCache{}
	x.dearest, x.epoch, x.mix = t.dearest(x.ask), t.poolEpoch, t.fragments.epoch
	for i := range int32(n) {
		x.at[i], x.cellOf[i] = -1, -1
		if !x.m.ok.has(i) {
			continue
		}
		c := x.cellFor(i)
		x.cellOf[i] = c
		x.cells[c].nodes++
		if t.fits(i, x.ask, x.volumes) {
			x.keys[i] = t.key(i, x)
			x.at[i] = int32(len(x.cells[c].heap))
			x.cells[c].heap = append(x.cells[c].heap, i)
		}
	}
	for c := range x.cells {
		x.heapify(x.cells[c].heap)
	}
	x.seen = t.seq
}

// resetCells empties the cells, and forgets them when most are of values that no
// node has any more.
func (x *index) resetCells() {
	if x.chain != nil && len(x.cells) <= 2*len(x.t.ids)+64 {
		for c := range x.cells {
			cl := &x.cells[c]
			cl.heap, cl.own, cl.nodes = cl.heap[:0], cl.own[:0], 0
		}
		return
	}
	x.cells, x.chain = x.cells[:0], map[uint64]int32{}
	x.byVal = make([]map[int32][]int32, len(x.columns))
	for k := range x.byVal {
		x.byVal[k] = map[int32][]int32{}
	}
	if len(x.columns) == 0 {
		x.cells = append(x.cells, cell{})
	}
}

// cellFor gives the cell of a node by the values of its columns.
func (x *index) cellFor(i int32) int32 {
	if len(x.columns) == 0 {
		return 0
	}
	id := x.columns[0].of[i]
	for k, c := range x.columns {
		step := uint64(k)<<58 | uint64(uint32(id))<<29 | uint64(uint32(c.of[i]))
		next, ok := x.chain[step]
		if !ok {
			next = int32(len(x.chain))
			if k == len(x.columns)-1 {
				next = x.newCell(i)
			}
			x.chain[step] = next
		}
		id = next
	}
	return id
}

func (x *index) newCell(i int32) int32 {
	id := int32(len(x.cells))
	values := make([]int32, len(x.columns))
	for k, c := range x.columns {
		values[k] = c.of[i]
		x.byVal[k][values[k]] = append(x.byVal[k][values[k]], id)
	}
	x.cells = append(x.cells, cell{values: values})
	return id
}

// refresh takes over what changed since it was last used.
func (x *index) refresh() {
	t := x.t
	behind := t.seq - x.seen
	if behind == 0 && x.epoch == t.poolEpoch && x.mix == t.fragments.epoch {
		return
	}
	if x.epoch != t.poolEpoch || behind > uint64(len(t.log)) || len(x.cells) > 2*len(t.ids)+64 {
		x.build()
		return
	}
	changed := x.changed()
	if len(changed) > len(t.ids)/2+64 {
		x.build()
		return
	}
	for _, i := range changed {
		x.update(i)
	}
	if x.mix != t.fragments.epoch && x.frag.use {
		x.rekey()
	}
	x.mix, x.seen = t.fragments.epoch, t.seq
}

// rekey is for what changes the keys of all nodes and nothing else.
func (x *index) rekey() {
	for c := range x.cells {
		h := x.cells[c].heap
		for _, i := range h {
			x.keys[i] = x.t.key(i, x)
		}
		x.heapify(h)
	}
}

func (x *index) heapify(h []int32) {
	for k := len(h)/2 - 1; k >= 0; k-- {
		x.down(h, k)
	}
}

// changed gives the slots that changed since the index was used, each once.
func (x *index) changed() []int32 {
	t := x.t
	t.mark++
	out := t.work.changed[:0]
	for s := t.seq; s > x.seen; s-- {
		if i := t.log[(s-1)&(uint64(len(t.log))-1)]; t.stamp[i] != t.mark {
			t.stamp[i] = t.mark
			out = append(out, i)
		}
	}
	t.work.changed = out
	return out
}

// update works one node out anew.
func (x *index) update(i int32) {
	t := x.t
	c := int32(-1)
	if x.m.ok.has(i) {
		c = x.cellFor(i)
	}
	if was := x.cellOf[i]; was != c {
		if was >= 0 {
			x.remove(i)
			x.cells[was].nodes--
		}
		if c >= 0 {
			x.cells[c].nodes++
		}
		x.cellOf[i] = c
	}
	if c < 0 {
		return
	}
	if !t.fits(i, x.ask, x.volumes) {
		x.remove(i)
		return
	}
	x.keys[i] = t.key(i, x)
	x.insert(i)
}

// insert puts a node where its key belongs.
func (x *index) insert(i int32) {
	h := &x.cells[x.cellOf[i]].heap
	if x.at[i] < 0 {
		x.at[i] = int32(len(*h))
		*h = append(*h, i)
	}
	if k := int(x.at[i]); !x.up(*h, k) {
		x.down(*h, k)
	}
}

func (x *index) remove(i int32) {
	k := int(x.at[i])
	if k < 0 {
		return
	}
	h := x.cells[x.cellOf[i]].heap
	last := len(h) - 1
	h[k] = h[last]
	x.at[h[k]] = int32(k)
	x.cells[x.cellOf[i]].heap = h[:last]
	x.at[i] = -1
	if k < last && !x.up(h[:last], k) {
		x.down(h[:last], k)
	}
}

func (x *index) less(a, b int32) bool {
	if x.keys[a] != x.keys[b] {
		return x.keys[a] < x.keys[b]
	}
	return x.t.before(a, b)
}

func (x *index) up(h []int32, k int) (moved bool) {
	for k > 0 {
		p := (k - 1) / 2
		if !x.less(h[k], h[p]) {
			break
		}
		h[k], h[p] = h[p], h[k]
		x.at[h[k]], x.at[h[p]] = int32(k), int32(p)
		k, moved = p, true
	}
	return moved
}

func (x *index) down(h []int32, k int) {
	for {
		c := 2*k + 1
		if c >= len(h) {
			return
		}
		if c+1 < len(h) && x.less(h[c+1], h[c]) {
			c++
		}
		if !x.less(h[c], h[k]) {
			return
		}
		h[k], h[c] = h[c], h[k]
		x.at[h[k]], x.at[h[c]] = int32(k), int32(c)
		k = c
	}
}

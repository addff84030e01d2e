package schedule

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// bitmap has a bit for each slot of a table.
type bitmap []uint64

func (b bitmap) has(i int32) bool { return b[i>>6]>>(uint(i)&63)&1 != 0 }

func (b bitmap) put(i int32, on bool) {
	if on {
		b[i>>6] |= 1 << (uint(i) & 63)
	} else {
		b[i>>6] &^= 1 << (uint(i) & 63)
	}
}

func (b *bitmap) grow(n int) {
	for len(*b) < (n+63)/64 {
		*b = append(*b, 0)
	}
}

// column is a label key: the value of each node, as a number. 0 is none.
type column struct {
	key   string
	of    []int32
	ids   map[string]int32
	names []string
	nodes []int32 // how many have the value
	free  []int32
	refs  int
}

// requirement is one condition on a label.
type requirement struct {
	key    string
	op     portolanv1.RequirementOperator
	values []string
}

// String tells requirements apart.
func (r requirement) String() string { return fmt.Sprintf("%q %d %q", r.key, r.op, r.values) }

// holds says whether a label with the value, or none, meets it.
func (r *requirement) holds(value string, present bool) bool {
	switch r.op {
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN:
		return present && slices.Contains(r.values, value)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_IN:
		return !present || !slices.Contains(r.values, value)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS:
		return present
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_EXISTS:
		return !present
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_GREATER, portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_LESS:
		return present && r.compares(value)
	default:
		return false
	}
}

func (r *requirement) compares(value string) bool {
	if len(r.values) != 1 {
		return false
	}
	got, err := strconv.ParseInt(value, 10, 64)
	bound, err2 := strconv.ParseInt(r.values[0], 10, 64)
	if err != nil || err2 != nil {
		return false
	}
	if r.op == portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_GREATER {
		return got > bound
	}
	return got < bound
}

func (r *requirement) holdsIn(labels map[string]string) bool {
	v, ok := labels[r.key]
	return r.holds(v, ok)
}

// interned is a requirement as the set of the nodes that meet it.
type interned struct {
	requirement
	column *column
	bits   bitmap
	refs   int
	sign   string
}

func (t *Table) column(key string) *column {
	if c, ok := t.columns[key]; ok {
		return c
	}
	c := &column{key: key, of: make([]int32, len(t.ids)), ids: map[string]int32{}, names: []string{""}, nodes: []int32{0}}
	t.columns[key] = c
	for i := range t.ids {
		t.fill(c, int32(i))
	}
	return c
}

// fill reads a node's label into a column and gives the value it had before.
func (t *Table) fill(c *column, i int32) (before int32) {
	before = c.of[i]
	value, ok := "", false
	if t.ids[i] != "" {
		value, ok = t.valueOf(i, c.key)
	}
	now := int32(0)
	if ok {
		now = c.id(value)
	}
	if now == before {
		return before
	}
	c.of[i] = now
	if now != 0 {
		c.nodes[now]++
	}
	if before != 0 {
		if c.nodes[before]--; c.nodes[before] == 0 {
			delete(c.ids, c.names[before])
			c.free = append(c.free, before)
		}
	}
	return before
}

// modelKey is the key of a column that no label has: the model of a node's devices.
const modelKey = "\x00model"

func (t *Table) valueOf(i int32, key string) (string, bool) {
	if key == modelKey {
		if m := t.model[i]; m >= 0 {
			return t.fragments.models[m], true
		}
		return "", false
	}
	v, ok := t.facts[i].GetLabels()[key]
	return v, ok
}

func (c *column) id(value string) int32 {
	if id, ok := c.ids[value]; ok {
		return id
	}
	var id int32
	if n := len(c.free); n > 0 {
		id, c.free = c.free[n-1], c.free[:n-1]
		c.names[id] = value
	} else {
		id = int32(len(c.names))
		c.names, c.nodes = append(c.names, value), append(c.nodes, 0)
	}
	c.ids[value] = id
	return id
}

func (t *Table) dropColumn(c *column) {
	if c.refs--; c.refs == 0 {
		delete(t.columns, c.key)
	}
}

func (t *Table) intern(r requirement) *interned {
	sign := r.String()
	if in, ok := t.requirements[sign]; ok {
		in.refs++
		return in
	}
	in := &interned{requirement: r, column: t.column(r.key), refs: 1, sign: sign}
	in.column.refs++
	in.bits.grow(len(t.ids))
	verdicts := make([]int8, len(in.column.names))
	for i := range t.ids {
		v := in.column.of[i]
		if verdicts[v] == 0 {
			verdicts[v] = -1
			if in.holds(in.column.names[v], v != 0) {
				verdicts[v] = 1
			}
		}
		in.bits.put(int32(i), verdicts[v] > 0)
	}
	t.requirements[sign] = in
	return in
}

func (t *Table) release(in *interned) {
	if in.refs--; in.refs == 0 {
		delete(t.requirements, in.sign)
		t.dropColumn(in.column)
	}
}

// taintVerdict is what tolerations make of a set of taints.
type taintVerdict struct {
	known, refused bool
	dislikes       uint32
}

// mask is the answer of all nodes to the static constraints of classes that have
// the same. It is kept as nodes change.
type mask struct {
	static   *static
	selector []*interned
	terms    [][]*interned
	prefer   [][]*interned
	topology []*interned
	taints   []taintVerdict // by taint set
	ok       bitmap
	// soft is the weight of the wishes that a node does not meet; absent adds for the
	// images that it lacks, 255 for all. nil when nobody wishes.
	soft   []uint16
	absent []uint8
	used   uint64
	gone   bool
}

// maxMasks bounds how many are kept: the least recently used go.
const maxMasks = 1024

func (t *Table) mask(s *static) *mask {
	t.tick++
	if m, ok := t.masks[s.signature]; ok {
		m.used = t.tick
		return m
	}
	if len(t.masks) >= maxMasks {
		t.dropMask()
	}
	m := &mask{static: s, used: t.tick}
	all := func(rs []requirement) []*interned {
		var out []*interned
		for _, r := range rs {
			out = append(out, t.intern(r))
		}
		return out
	}
	m.selector = all(s.selector)
	for _, term := range s.terms {
		m.terms = append(m.terms, all(term))
	}
	for _, p := range s.preferred {
		m.prefer = append(m.prefer, all(p.term))
	}
	for _, k := range s.topology {
		m.topology = append(m.topology, t.intern(requirement{key: k, op: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS}))
	}
	m.ok.grow(len(t.ids))
	m.soft = make([]uint16, len(t.ids))
	if len(s.images) > 0 {
		m.absent = make([]uint8, len(t.ids))
	}
	t.masks[s.signature] = m
	for i := range t.ids {
		t.judge(m, int32(i))
	}
	return m
}

func (t *Table) dropMask() {
	var oldest *mask
	for _, m := range t.masks {
		if oldest == nil || m.used < oldest.used {
			oldest = m
		}
	}
	oldest.gone = true
	delete(t.masks, oldest.static.signature)
	for _, list := range append(append(append(slices.Clone(oldest.terms), oldest.prefer...), oldest.selector), oldest.topology) {
		for _, in := range list {
			t.release(in)
		}
	}
}

// judge works a node's answer out anew.
func (t *Table) judge(m *mask, i int32) {
	codes, soft := t.static(m, i)
	m.ok.put(i, codes == 0)
	m.soft[i] = uint16(min(soft, maxSoft))
	if m.absent != nil && t.ids[i] != "" {
		lacks := 0
		for _, d := range m.static.images {
			if _, ok := t.images[i][d]; !ok {
				lacks++
			}
		}
		m.absent[i] = uint8(lacks * 255 / len(m.static.images))
	}
}

const (
	// dislike is the weight of a PREFER_NO_SCHEDULE taint, and of a node that is not
	// spot for who would rather have spot.
	dislike = 100
	maxSoft = 1<<14 - 1
)

// static gives every static reason against a node, and the weight of unmet wishes.
func (t *Table) static(m *mask, i int32) (codes Code, soft uint32) {
	if t.ids[i] == "" {
		return NoNode, 0
	}
	codes = t.down[i]
	if !m.static.anyMode {
		codes |= t.mode[i]
	}
	if !all(m.selector, i) {
		codes |= SelectorMismatch
	}
	if len(m.terms) > 0 && !slices.ContainsFunc(m.terms, func(term []*interned) bool { return all(term, i) }) {
		codes |= AffinityMismatch
	}
	if !all(m.topology, i) {
		codes |= NoTopologyLabel
	}
	v := t.taintVerdict(m, t.taintSet[i])
	if v.refused {
		codes |= TaintNotTolerated
	}
	soft = v.dislikes
	if !m.static.anyMode {
		wrong, dislikes := spotVerdict(m.static.capacity, t.pools[t.pool[i]].spot)
		if wrong {
			codes |= CapacityTypeMismatch
		}
		soft += dislikes
	}
	for k := range m.static.devices {
		if !t.hasDevices(i, &m.static.devices[k]) {
			codes |= DeviceModelMismatch
		}
	}
	for k, p := range m.prefer {
		if !all(p, i) {
			soft += m.static.preferred[k].weight
		}
	}
	return codes, soft
}

func all(list []*interned, i int32) bool {
	for _, in := range list {
		if !in.bits.has(i) {
			return false
		}
	}
	return true
}

func spotVerdict(want portolanv1.CapacityType, spot bool) (wrong bool, dislikes uint32) {
	switch want {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		return !spot, 0
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		if !spot {
			return false, dislike
		}
		return false, 0
	default:
		return spot, 0
	}
}

// taintVerdict remembers what the mask's tolerations make of a set of taints.
func (t *Table) taintVerdict(m *mask, set int32) taintVerdict {
	for int(set) >= len(m.taints) {
		m.taints = append(m.taints, taintVerdict{})
	}
	v := &m.taints[set]
	if v.known {
		return *v
	}
	*v = taintVerdict{known: true}
	for _, taint := range t.taintSets[set] {
		if _, ok := tolerated(taint, m.static.tolerations); ok {
			continue
		}
		if taint.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE {
			v.dislikes += dislike
		} else {
			v.refused = !t.faults.taintIgnored
		}
	}
	return *v
}

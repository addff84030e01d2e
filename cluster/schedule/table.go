package schedule

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Table holds the nodes column by column, one slot each, what is bound to them,
// and what was worked out for classes. Slots of deleted nodes are used again.
type Table struct {
	seed  uint64
	index map[string]int32
	free  []int32 // slots

	// Columns. ids is empty and down is NoNode in a free slot.
	ids        []string
	facts      []*nodev1.NodeFacts
	down, mode []Code
	addresses  []int32
	pool       []int32
	taintSet   []int32
	images     []map[string]struct{}
	tie        []uint64

	// Capacity that may be promised, and what is left of it: below 0 when a node
	// shrank.
	capCPU, capMemory, capStorage    []int64
	freeCPU, freeMemory, freeStorage []int64
	perCPU, perMemory                []float64 // 1 ÷ capacity
	freeAddress                      []int32
	ports                            [][]int32
	devices                          [][]device
	model                            []int8 // of all devices of the node; -1 when there is no one
	scopes                           [][]presence
	bound                            [][]*replica

	pools       []pool
	poolIndex   map[string]int32
	poolEpoch   uint64 // counts changes of what keys of all nodes follow from
	price       Pools
	taintSets   [][]*portolanv1.Taint
	taintIndex  map[string]int32
	replicas    map[string]*replica
	leaving     int                   // replicas that were told to stop
	homeless    map[string][]*replica // by the node that is not there
	volumes     map[string]volume
	volumesOn   map[string]int64 // bytes by node
	nominations map[string][]*nomination
	keeps       [][]*nomination // by slot
	priorities  map[int32]int   // replicas that could be displaced, by priority
	usage       map[string]*usage
	capacity    api.Resources
	stock       int64 // of devices, in milli
	scopeIndex  map[scopeKey]*scope
	scopeIDs    int32

	// What was worked out.
	columns      map[string]*column
	requirements map[string]*interned
	masks        map[string]*mask
	indexes      map[string]*index
	known        map[*Class]*resolved
	fragments    fragments

	// log holds the slots that changed, in a ring; seq counts them.
	log   []int32
	seq   uint64
	tick  uint64
	stamp []uint32 // scratch: marks slots
	mark  uint32
	work  scratch

	faults faults
}

// pool is a NodePool made ready.
type pool struct {
	name                   string
	scoring                portolanv1.Scoring
	cpuPercent, memPercent int64
	reserved               api.Resources
	reservedStorage        int64
	// Price of a millicore-hour and of a GiB-hour, in thousandths of a micro-unit.
	cpuPrice, memPrice float64
	spot               bool
}

type volume struct {
	node  string
	bytes int64
}

type usage struct {
	cpu, memory int64
	devices     int64 // milli
	replicas    int
}

// logSize is how many changes an index may be behind at least; with more nodes, it
// is as many as four for each.
const logSize = 1 << 14

// NewTable gives an empty one. The seed breaks ties.
func NewTable(seed uint64) *Table {
	t := &Table{
		seed: seed, index: map[string]int32{}, poolIndex: map[string]int32{}, taintIndex: map[string]int32{}, replicas: map[string]*replica{}, homeless: map[string][]*replica{},
		volumes: map[string]volume{}, volumesOn: map[string]int64{}, nominations: map[string][]*nomination{}, priorities: map[int32]int{}, usage: map[string]*usage{}, scopeIndex: map[scopeKey]*scope{},
		columns: map[string]*column{}, requirements: map[string]*interned{}, masks: map[string]*mask{}, indexes: map[string]*index{}, known: map[*Class]*resolved{},
		log: make([]int32, logSize), taintSets: [][]*portolanv1.Taint{nil},
	}
	t.taintIndex[""] = 0
	t.fragments.demand = map[shape]float64{}
	t.poolFor(DefaultPool)
	return t
}

// mix is the finalizer of SplitMix64.
func mix(a, b uint64) uint64 {
	z := a + (b+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// coin is the node's place among equals: of its ID, not of its slot.
func coin(seed uint64, id string) uint64 {
	h := seed
	for i := range len(id) {
		h = mix(h, uint64(id[i]))
	}
	return h
}

// before breaks a tie between two slots.
func (t *Table) before(a, b int32) bool {
	if t.tie[a] != t.tie[b] {
		return t.tie[a] < t.tie[b]
	}
	return t.ids[a] < t.ids[b]
}

// touch notes that a slot changed.
func (t *Table) touch(i int32) {
	t.log[t.seq&(uint64(len(t.log))-1)] = i
	t.seq++
	if int(i) < len(t.fragments.nodes) {
		t.fragments.nodes[i].valid = false
	}
}

// slot gives a free slot, growing every column if there is none.
func (t *Table) slot() int32 {
	if n := len(t.free); n > 0 {
		i := t.free[n-1]
		t.free = t.free[:n-1]
		return i
	}
	i := int32(len(t.ids))
	t.ids, t.facts, t.down, t.mode = append(t.ids, ""), append(t.facts, nil), append(t.down, NoNode), append(t.mode, 0)
	t.addresses, t.pool, t.taintSet, t.images, t.tie = append(t.addresses, 0), append(t.pool, 0), append(t.taintSet, 0), append(t.images, nil), append(t.tie, 0)
	t.capCPU, t.capMemory, t.capStorage = append(t.capCPU, 0), append(t.capMemory, 0), append(t.capStorage, 0)
	t.freeCPU, t.freeMemory, t.freeStorage = append(t.freeCPU, 0), append(t.freeMemory, 0), append(t.freeStorage, 0)
	t.perCPU, t.perMemory, t.freeAddress = append(t.perCPU, 0), append(t.perMemory, 0), append(t.freeAddress, 0)
	t.ports, t.devices, t.scopes, t.model = append(t.ports, nil), append(t.devices, nil), append(t.scopes, nil), append(t.model, -1)
	t.bound, t.keeps, t.stamp = append(t.bound, nil), append(t.keeps, nil), append(t.stamp, 0)
	for _, c := range t.columns {
		c.of = append(c.of, 0)
	}
	for _, in := range t.requirements {
		in.bits.grow(len(t.ids))
	}
	for _, m := range t.masks {
		m.ok.grow(len(t.ids))
		m.soft = append(m.soft, 0)
		if m.absent != nil {
			m.absent = append(m.absent, 0)
		}
	}
	for _, x := range t.indexes {
		x.grow()
	}
	for len(t.log) < 4*len(t.ids) {
		t.growLog()
	}
	return i
}

// growLog doubles the ring, keeping what is in it where seq finds it.
func (t *Table) growLog() {
	old := t.log
	t.log = make([]int32, 2*len(old))
	for k := range min(t.seq, uint64(len(old))) {
		s := t.seq - 1 - k
		t.log[s&(uint64(len(t.log))-1)] = old[s&(uint64(len(old))-1)]
	}
}

// PutNode adds a node or replaces what is known of it.
func (t *Table) PutNode(n Node) {
	i, ok := t.index[n.ID]
	if ok && t.facts[i] == n.Facts && t.addresses[i] == int32(n.Addresses) && t.mode[i] == modeCode(n.Mode) && t.down[i] == n.Down {
		return
	}
	if !ok {
		i = t.slot()
		t.index[n.ID] = i
		t.ids[i], t.tie[i] = n.ID, coin(t.seed, n.ID)
	}
	sameFacts := ok && t.facts[i] == n.Facts
	t.facts[i], t.down[i], t.mode[i], t.addresses[i] = n.Facts, n.Down, modeCode(n.Mode), int32(n.Addresses)
	if !sameFacts {
		t.readFacts(i)
	}
	t.recount(i)
	if !sameFacts {
		t.relabel(i)
	}
	t.rejudge(i)
	if !ok {
		t.settle(i)
	}
	t.touch(i)
}

// readFacts takes labels, taints and images of a node over.
func (t *Table) readFacts(i int32) {
	f := t.facts[i]
	name, ok := f.GetLabels()[PoolKey]
	if !ok {
		name = DefaultPool
	}
	t.pool[i] = t.poolFor(name)
	t.taintSet[i] = t.taintsFor(f.GetTaints())
	t.images[i] = nil
	if len(f.GetImages()) > 0 {
		t.images[i] = make(map[string]struct{}, len(f.GetImages()))
		for _, d := range f.GetImages() {
			t.images[i][d] = struct{}{}
		}
	}
}

// relabel brings the columns up to date, and what is counted by their values.
func (t *Table) relabel(i int32) {
	for _, c := range t.columns {
		before := t.fill(c, i)
		if now := c.of[i]; now != before {
			for k := range t.scopes[i] {
				t.scopes[i][k].scope.shift(c, before, now, t.scopes[i][k].count)
			}
		}
	}
	for _, in := range t.requirements {
		v := in.column.of[i]
		in.bits.put(i, t.ids[i] != "" && in.holds(in.column.names[v], v != 0))
	}
}

func (t *Table) rejudge(i int32) {
	for _, m := range t.masks {
		t.judge(m, i)
	}
}

func (t *Table) taintsFor(taints []*portolanv1.Taint) int32 {
	if len(taints) == 0 {
		return 0
	}
	var b strings.Builder
	for _, x := range taints {
		fmt.Fprintf(&b, "%q=%q:%d,", x.GetKey(), x.GetValue(), x.GetEffect())
	}
	id, ok := t.taintIndex[b.String()]
	if !ok {
		if len(t.taintSets) > 1024+2*len(t.ids) {
			t.forgetTaints()
		}
		id = int32(len(t.taintSets))
		t.taintIndex[b.String()] = id
		t.taintSets = append(t.taintSets, taints)
	}
	return id
}

// forgetTaints begins the sets anew from what nodes have.
func (t *Table) forgetTaints() {
	t.taintSets, t.taintIndex = t.taintSets[:1:1], map[string]int32{"": 0}
	for _, m := range t.masks {
		m.taints = nil
	}
	for i := range t.ids {
		if t.ids[i] != "" {
			t.taintSet[i] = t.taintsFor(t.facts[i].GetTaints())
		}
	}
}

// DeleteNode takes it out. Replicas that are on it count nowhere until it returns.
func (t *Table) DeleteNode(id string) {
	i, ok := t.index[id]
	if !ok {
		return
	}
	for _, r := range t.bound[i] {
		t.uncount(r)
		r.slot = -1
		t.homeless[id] = append(t.homeless[id], r)
	}
	t.bound[i] = t.bound[i][:0]
	for len(t.keeps[i]) > 0 {
		t.dropNomination(t.keeps[i][0])
	}
	delete(t.index, id)
	t.ids[i], t.facts[i], t.down[i] = "", nil, NoNode
	t.images[i], t.taintSet[i], t.model[i] = nil, 0, -1
	t.fragments.stale = t.fragments.stale || t.fragments.seen < firstLearn
	t.relabel(i)
	t.addCapacity(i, -1)
	t.stock -= int64(len(t.devices[i])) * whole
	t.capCPU[i], t.capMemory[i], t.capStorage[i], t.devices[i] = 0, 0, 0, nil
	t.rejudge(i)
	t.free = append(t.free, i)
	t.touch(i)
}

// settle counts what is on a node that came back.
func (t *Table) settle(i int32) {
	list := t.homeless[t.ids[i]]
	delete(t.homeless, t.ids[i])
	for _, r := range list {
		t.home(r, i)
	}
}

// recount sets a node's capacity, and what is free of it from all that is there.
func (t *Table) recount(i int32) {
	f, p := t.facts[i], t.pools[t.pool[i]]
	if t.faults.reservedIgnored {
		p.reserved = api.Resources{}
	}
	t.addCapacity(i, -1)
	t.capCPU[i] = max(f.GetCpuMilli()-p.reserved.CPUMilli, 0) * p.cpuPercent / 100
	t.capMemory[i] = promise(f.GetMemoryBytes()-p.reserved.MemoryBytes, p.memPercent)
	t.capStorage[i] = max(f.GetStorageBytes()-p.reservedStorage, 0)
	t.addCapacity(i, 1)
	t.perCPU[i], t.perMemory[i] = inverse(t.capCPU[i]), inverse(t.capMemory[i])
	t.freeCPU[i], t.freeMemory[i], t.freeStorage[i], t.freeAddress[i] = t.capCPU[i], t.capMemory[i], t.capStorage[i], t.addresses[i]
	t.ports[i] = t.ports[i][:0]
	t.readDevices(i)
	for _, r := range t.bound[i] {
		t.charge(i, r, -1)
	}
	for _, k := range t.keeps[i] {
		t.reserve(k, -1)
	}
	t.freeStorage[i] -= t.volumesOn[t.ids[i]]
}

func (t *Table) addCapacity(i int32, sign int64) {
	t.capacity.CPUMilli += sign * t.capCPU[i]
	t.capacity.MemoryBytes += sign * t.capMemory[i]
}

// promise is a percentage of bytes, which may be more than fits times a hundred.
func promise(bytes, percent int64) int64 {
	bytes = max(bytes, 0)
	return bytes/100*percent + bytes%100*percent/100
}

func inverse(n int64) float64 {
	if n <= 0 {
		return 0
	}
	return 1 / float64(n)
}

// PutVolume counts a volume on its node's disk.
func (t *Table) PutVolume(id, node string, bytes int64) {
	t.DeleteVolume(id)
	t.volumes[id] = volume{node, bytes}
	t.moveStorage(node, -bytes)
}

// DeleteVolume forgets it.
func (t *Table) DeleteVolume(id string) {
	if v, ok := t.volumes[id]; ok {
		delete(t.volumes, id)
		t.moveStorage(v.node, v.bytes)
	}
}

func (t *Table) moveStorage(node string, by int64) {
	if t.volumesOn[node] -= by; t.volumesOn[node] == 0 {
		delete(t.volumesOn, node)
	}
	if i, ok := t.index[node]; ok {
		t.freeStorage[i] += by
		t.touch(i)
	}
}

// SetPools replaces the pools.
func (t *Table) SetPools(p Pools) {
	t.price = p
	t.poolEpoch++
	for k := range t.pools {
		t.pools[k] = t.poolOf(t.pools[k].name)
	}
	if slices.ContainsFunc(p.Pools, func(p *portolanv1.NodePool) bool {
		return p.GetScoring() == portolanv1.Scoring_SCORING_LEAST_FRAGMENTATION
	}) {
		t.fragments.prepare(t)
	}
	for i := range t.ids {
		if t.ids[i] != "" {
			t.recount(int32(i))
			t.rejudge(int32(i))
			t.touch(int32(i))
		}
	}
}

func (t *Table) poolFor(name string) int32 {
	k, ok := t.poolIndex[name]
	if !ok {
		k = int32(len(t.pools))
		t.poolIndex[name] = k
		t.pools = append(t.pools, t.poolOf(name))
		t.poolEpoch++
	}
	return k
}

func (t *Table) poolOf(name string) pool {
	k := slices.IndexFunc(t.price.Pools, func(p *portolanv1.NodePool) bool { return p.GetName() == name })
	var p *portolanv1.NodePool
	if k >= 0 {
		p = t.price.Pools[k]
	}
	out := pool{
		name: name, scoring: p.GetScoring(), spot: p.GetSpot(),
		cpuPercent: cmp.Or(int64(p.GetCpuOvercommitPercent()), 100), memPercent: cmp.Or(int64(p.GetMemoryOvercommitPercent()), 100),
	}
	if out.scoring == portolanv1.Scoring_SCORING_UNSPECIFIED {
		out.scoring = portolanv1.Scoring_SCORING_SPREAD
	}
	// The federation has checked the amounts; what cannot be read reserves nothing.
	out.reserved.CPUMilli, _ = api.ParseCPU(p.GetReserved().GetCpu())
	out.reserved.MemoryBytes, _ = api.ParseBytes(p.GetReserved().GetMemory())
	out.reservedStorage, _ = api.ParseBytes(p.GetReserved().GetStorage())
	cpu, mem := p.GetCpuCoreHourMicros(), p.GetMemoryGibHourMicros()
	if cpu == 0 && mem == 0 {
		cpu, mem = t.price.CPUCoreHourMicros, t.price.MemGiBHourMicros
	}
	out.cpuPrice, out.memPrice = float64(cpu)/1000, float64(mem)/(1<<30)
	return out
}

// dearest is the price of the dearest pool for an ask, which prices compare to.
func (t *Table) dearest(a *ask) float64 {
	most := 0.0
	for k := range t.pools {
		most = math.Max(most, t.pools[k].costs(a))
	}
	return most
}

// costs is the price of an ask, in micro-units per hour.
func (p *pool) costs(a *ask) float64 {
	return float64(a.cpu)*p.cpuPrice + float64(a.memory)*p.memPrice
}

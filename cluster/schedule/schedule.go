package schedule

import "slices"

// scratch is what a call of Schedule works with, kept from call to call.
type scratch struct {
	stored  Batch
	batch   *Batch         // stored, while it is decided
	spent   map[string]int // of the allowances
	ops     []op
	shares  []Share
	run     run
	columns []*column
	changed []int32
	placed  []Placed
	seats   []Binding
	bounds  []int // seats and ops by group
	probe   run   // of questions asked on the side
	victims victimSearch
	group   Group
}

// op is a change of the table that is taken back when the batch is decided.
type op struct {
	kind    opKind
	node    int32
	r       *resolved
	lo, hi  int32 // in shares
	volumes int64
	victim  *replica
	kept    *nomination
}

type opKind uint8

const (
	occupied opKind = iota
	// promised is occupied, but by a replica that waits for its victims.
	promised
	displaced
	unkept
	withdrawn
	carried
)

// Schedule decides a batch, group by group in the order given.
func Schedule(t *Table, b Batch) Result {
	w := &t.work
	w.stored = b
	w.batch, w.ops, w.shares, w.seats, w.bounds = &w.stored, w.ops[:0], w.shares[:0], w.seats[:0], w.bounds[:0]
	clear(w.spent)
	for len(w.placed) < len(b.Groups) {
		w.placed = append(w.placed, Placed{})
	}
	w.placed = w.placed[:len(b.Groups)]
	for k := range w.stored.Groups {
		w.placed[k] = Placed{}
		w.bounds = append(w.bounds, len(w.seats))
		if g := &w.stored.Groups[k]; g.Count > 0 {
			t.serve(g, &w.placed[k])
		}
	}
	t.undo(0)
	// seats may have moved while it grew: they are handed out at the end.
	w.bounds = append(w.bounds, len(w.seats))
	for k := range w.placed {
		w.placed[k].Bindings = w.seats[w.bounds[k]:w.bounds[k+1]:w.bounds[k+1]]
	}
	w.batch, w.stored = nil, Batch{}
	return Result{Placed: w.placed}
}

// serve decides one group.
func (t *Table) serve(g *Group, p *Placed) {
	w, r := &t.work, t.resolve(g.Class)
	start := len(w.ops)
	waiting := t.useKept(g, r, p)
	u := &w.run
	t.begin(u, g, r)
	for t.placedSince(start)+waiting < g.Count && u.more() {
	}
	u.finish()
	missing := g.Count - waiting - t.placedSince(start)
	if missing > 0 && g.Class.gang && waiting == 0 && t.search(u, start) {
		missing = 0
	}
	var noms []Nomination
	if missing > 0 && g.Class.displaces && !w.batch.NoPreemption {
		noms = t.preempt(u, missing)
		missing -= len(noms)
	}
	switch {
	case missing > 0 && g.Class.gang && !t.faults.gangPartly:
		t.refuseGang(u, p, start, waiting)
		return
	case g.Class.gang && (len(noms) > 0 || waiting > 0):
		// All begin together: those that could now keep their room until the others can.
		noms = append(t.nominateAll(start), noms...)
	default:
		t.seat(start)
	}
	p.Nominations, p.Missing = noms, missing
	if missing > 0 || waiting > 0 || len(noms) > 0 {
		p.Refusal = t.explain(u, missing, waiting+len(noms))
	}
}

// more places one replica of a group.
func (u *run) more() bool {
	if u.g.Node == "" {
		return u.next()
	}
	i, ok := u.t.index[u.g.Node]
	if !ok || u.check(i) != 0 {
		return false
	}
	u.pinned(i)
	return true
}

// pinned places a replica on the node that its group names.
func (u *run) pinned(i int32) {
	u.apply(i)
	u.x.update(i)
	if u.first {
		u.first = false
	}
}

// occupy counts a replica on a node until the batch is decided.
func (t *Table) occupy(r *resolved, i int32, g *Group) {
	w := &t.work
	a := &r.c.ask
	o := op{kind: occupied, node: i, r: r, lo: int32(len(w.shares)), volumes: r.c.volumes}
	if g.VolumesThere {
		o.volumes = 0
	}
	if len(a.devices) > 0 {
		w.shares = t.choose(i, a, w.shares)
		t.takeShares(i, w.shares[o.lo:], -1)
	}
	o.hi = int32(len(w.shares))
	t.take(i, a, -1)
	t.freeStorage[i] -= o.volumes
	if a.address {
		t.freeAddress[i]--
	}
	t.joinAll(i, r, 1)
	w.ops = append(w.ops, o)
	t.touch(i)
}

// undo takes back what was done since.
func (t *Table) undo(since int) {
	w := &t.work
	for k := len(w.ops) - 1; k >= since; k-- {
		o := &w.ops[k]
		switch o.kind {
		case occupied, promised:
			t.takeShares(o.node, w.shares[o.lo:o.hi], 1)
			t.take(o.node, &o.r.c.ask, 1)
			t.freeStorage[o.node] += o.volumes
			if o.r.c.ask.address && !t.faults.undoForgets {
				t.freeAddress[o.node]++
			}
			t.joinAll(o.node, o.r, -1)
		case displaced:
			o.victim.Leaving = false
			t.attend(o.victim, 1)
			w.spent[o.victim.res.key]--
		case unkept:
			o.kept.gone = false
			t.reserve(o.kept, -1)
		case carried:
			t.unlift(o.victim)
		case withdrawn:
			o.kept.gone = false
			t.reserve(o.kept, -1)
		}
		t.touch(o.node)
	}
	w.ops = w.ops[:since]
}

func (o Owner) key() string { return o.Tenant + "/" + o.Workload }

// placedSince counts the replicas that were placed.
func (t *Table) placedSince(since int) int {
	n := 0
	for k := since; k < len(t.work.ops); k++ {
		if t.work.ops[k].kind == occupied {
			n++
		}
	}
	return n
}

// unusable are the codes of a node that no room on it helps against. One that is not
// heard for a moment is waited for: it comes back or is lost.
const unusable = (InsufficientCPU - 1) &^ NodeNotReady

// useKept places replicas of a group on the nodes that keep room for them, and says
// how many have to wait for their victims. Where the node itself is against it, or
// nobody leaves it any more, the room is given up, and the replica is placed as any
// other.
func (t *Table) useKept(g *Group, r *resolved, p *Placed) (waiting int) {
	w := &t.work
	kept := t.nominations[g.Key]
	kept = kept[:min(len(kept), g.Count)]
	for _, n := range kept {
		if !n.gone { // else a group before it in the batch took that room
			t.reserve(n, 1)
			t.touch(n.slot)
		}
	}
	for _, n := range kept {
		if n.gone {
			continue
		}
		u := &w.run
		t.begin(u, g, r)
		switch codes := u.check(n.slot); {
		case codes == 0:
			n.gone = true // it is used: nobody can have it given up as well
			w.ops = append(w.ops, op{kind: unkept, node: n.slot, kept: n})
			u.pinned(n.slot)
		case codes&unusable != 0, codes&NodeNotReady == 0 && !t.someLeave(n.slot, codes):
			n.gone = true
			w.ops = append(w.ops, op{kind: withdrawn, node: n.slot, kept: n})
			p.Unkept = append(p.Unkept, n.node)
		}
		u.finish()
	}
	for _, n := range kept {
		if !n.gone {
			t.reserve(n, -1)
			t.touch(n.slot)
			waiting++
		}
	}
	return waiting
}

// someLeave says that somebody is about to leave a node. Who has ended has left all
// but its address and its ports.
func (t *Table) someLeave(i int32, codes Code) bool {
	return slices.ContainsFunc(t.bound[i], func(r *replica) bool {
		return r.Leaving && !r.Ended || r.Ended && codes&(NoFreeAddress|PortTaken) != 0
	})
}

// seat binds what was placed since.
func (t *Table) seat(since int) {
	w := &t.work
	for k := since; k < len(w.ops); k++ {
		if o := &w.ops[k]; o.kind == occupied {
			kept := k > 0 && k > since && w.ops[k-1].kind == unkept
			b := Binding{Node: t.ids[o.node], Kept: kept}
			if o.hi > o.lo {
				b.Devices = w.shares[o.lo:o.hi:o.hi]
			}
			w.seats = append(w.seats, b)
		}
	}
}

// nominateAll keeps the room that was found for a gang.
func (t *Table) nominateAll(since int) []Nomination {
	var out []Nomination
	for k := since; k < len(t.work.ops); k++ {
		// What is kept already stays kept.
		if o := &t.work.ops[k]; o.kind == occupied && (k == since || t.work.ops[k-1].kind != unkept) {
			out = append(out, Nomination{Node: t.ids[o.node]})
		}
	}
	return out
}

// check gives everything that is against one more replica of the group on a node.
func (u *run) check(i int32) Code {
	t := u.t
	codes := Code(0)
	if !u.x.m.ok.has(i) {
		codes, _ = t.static(u.x.m, i)
		if codes == NoNode {
			return codes
		}
	}
	if u.g.Node != "" && t.ids[i] != u.g.Node {
		codes |= OtherNode
	}
	codes |= t.lacks(i, &u.r.c.ask, u.volumes())
	if codes&DeviceModelMismatch != 0 {
		codes &^= InsufficientDevices
	}
	_, node := u.nodeKey(i)
	codes |= node
	if u.related() {
		c, _, _ := u.verdict(u.valuesOf(i))
		codes |= c
	}
	return codes
}

// related says that the group has terms about other replicas, or others about it.
func (u *run) related() bool {
	return len(u.r.spreads)+len(u.r.affinity)+len(u.r.work.against) > 0
}

func (u *run) volumes() int64 {
	if u.g.VolumesThere {
		return 0
	}
	return u.r.c.volumes
}

func (u *run) valuesOf(i int32) []int32 {
	u.values = u.values[:0]
	for _, c := range u.x.columns {
		u.values = append(u.values, c.of[i])
	}
	return u.values
}

// lacks gives every resource of which a node has too little.
func (t *Table) lacks(i int32, a *ask, volumes int64) (codes Code) {
	if a.cpu > t.freeCPU[i] && a.cpu > 0 {
		codes |= InsufficientCPU
	}
	if a.memory > t.freeMemory[i] && a.memory > 0 {
		codes |= InsufficientMemory
	}
	if s := a.storage + volumes; s > 0 && s > t.freeStorage[i] {
		codes |= InsufficientStorage
	}
	if a.address && t.freeAddress[i] <= 0 {
		codes |= NoFreeAddress
	}
	if t.portTaken(i, a) {
		codes |= PortTaken
	}
	if len(a.devices) > 0 && !t.fitsDevices(i, a.devices) {
		codes |= InsufficientDevices
	}
	return codes
}

// choose gives the devices of a node for an ask that fits it.
func (t *Table) choose(i int32, a *ask, out []Share) []Share {
	if d, ok := t.fragmentDevice(i, a); ok {
		return append(out, Share{Kind: t.devices[i][d].kind, Index: t.devices[i][d].index, Milli: a.devices[0].milli})
	}
	out, _ = t.assign(i, a.devices, out)
	return out
}

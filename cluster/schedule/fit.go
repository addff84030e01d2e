package schedule

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// Misfits gives all bound replicas that no longer have their place, by node and ID:
// which of them may leave now, others decide, so none may hide another.
func Misfits(t *Table) []Misfit {
	var out []Misfit
	for _, id := range sortedKeys(t.index) {
		i := t.index[id]
		over := t.overfull(i)
		for _, r := range sortedByID(t.bound[i]) {
			if m, ok := t.misfit(r, over); ok {
				out = append(out, m)
			}
		}
	}
	return out
}

// Fits says whether a bound replica still has its place, and otherwise why not: its
// node's labels or taints changed, or the node shrank and it is among those of which
// the priority is lowest and that began last.
func Fits(t *Table, id string) (Misfit, bool) {
	r, ok := t.replicas[id]
	if !ok || r.slot < 0 {
		return Misfit{}, true
	}
	m, bad := t.misfit(r, t.overfull(r.slot))
	return m, !bad
}

func sortedByID(list []*replica) []*replica {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b *replica) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// staying are static reasons that drive a running replica out.
const staying = SelectorMismatch | AffinityMismatch | DeviceModelMismatch | CapacityTypeMismatch

func (t *Table) misfit(r *replica, over map[*replica]Code) (Misfit, bool) {
	if r.Leaving || r.Ended {
		return Misfit{}, false
	}
	codes, _ := t.static(t.masked(r.res), r.slot)
	codes &= staying
	if t.drivenOut(r) {
		codes |= TaintNotTolerated
	}
	codes |= over[r] | t.apart(r)
	if codes == 0 {
		return Misfit{}, false
	}
	c := codes.first()
	return Misfit{Replica: r.ID, Node: t.ids[r.slot], Code: c, Message: "node " + t.ids[r.slot] + ": " + misfitWords(c)}, true
}

func misfitWords(c Code) string {
	switch c {
	case SelectorMismatch:
		return "its labels no longer match the node selector"
	case AffinityMismatch:
		return "its labels no longer match a term of the node affinity"
	case TaintNotTolerated:
		return "a taint that drives the replica out"
	case CapacityTypeMismatch:
		return "its pool's capacity type is not the workload's"
	case DeviceModelMismatch:
		return "it no longer has the devices"
	case WorkloadAntiAffinity:
		return "the replica shares a domain with one that it must keep away from"
	default:
		return "it has less to give than is bound to it (" + c.String() + ")"
	}
}

// drivenOut says that a taint tolerates the replica not even for a while: for how
// long is Admit's answer.
func (t *Table) drivenOut(r *replica) bool {
	for _, taint := range t.taintSets[t.taintSet[r.slot]] {
		if taint.GetEffect() != noExecute {
			continue
		}
		if stay, ok := tolerated(taint, r.Class.static.tolerations); !ok && stay < 0 {
			return true
		}
	}
	return false
}

// apart says that a replica shares a domain with others that it must not: of two
// that must keep away from each other the later one goes, of two equal ones the one
// with the greater ID.
func (t *Table) apart(r *replica) Code {
	for k := range r.res.affinity {
		a := &r.res.affinity[k]
		if !a.anti || a.prefer {
			continue
		}
		for _, i := range a.scope.nodes {
			if i != r.slot && (a.column == nil || a.column.of[i] == 0 || a.column.of[i] != a.column.of[r.slot]) {
				continue
			}
			for _, o := range t.bound[i] {
				if o != r && o.res.work == a.scope && !o.Leaving && !o.Ended && (o.res != r.res || earlier(o, r)) {
					return WorkloadAntiAffinity
				}
			}
		}
	}
	return 0
}

func earlier(a, b *replica) bool {
	return a.Bound < b.Bound || (a.Bound == b.Bound && a.ID < b.ID)
}

// overfull chooses who leaves a node that has less than is bound to it.
func (t *Table) overfull(i int32) map[*replica]Code {
	short := Code(0)
	if t.freeCPU[i] < 0 {
		short |= InsufficientCPU
	}
	if t.freeMemory[i] < 0 {
		short |= InsufficientMemory
	}
	if t.freeStorage[i] < 0 {
		short |= InsufficientStorage
	}
	for k := range t.devices[i] {
		if t.devices[i][k].free < 0 {
			short |= InsufficientDevices
		}
	}
	// Room that is kept for others while they wait is no shortage of who is there.
	if short == 0 || len(t.keeps[i]) > 0 {
		return t.lostDevices(i, nil)
	}
	out := map[*replica]Code{}
	cpu, memory, storage := t.freeCPU[i], t.freeMemory[i], t.freeStorage[i]
	list := slices.Clone(t.bound[i])
	slices.SortFunc(list, func(a, b *replica) int {
		return cmp.Or(cmp.Compare(a.Class.priority, b.Class.priority), cmp.Compare(b.Bound, a.Bound), cmp.Compare(b.ID, a.ID))
	})
	for _, r := range list {
		if r.Ended {
			continue
		}
		a := &r.Class.ask
		helps := cpu < 0 && a.cpu > 0 || memory < 0 && a.memory > 0 || storage < 0 && a.storage > 0
		if !r.Leaving && !helps {
			continue
		}
		cpu, memory, storage = cpu+a.cpu, memory+a.memory, storage+a.storage
		if !r.Leaving {
			out[r] = short
		}
	}
	return t.lostDevices(i, out)
}

// lostDevices adds those that hold a device that is gone.
func (t *Table) lostDevices(i int32, out map[*replica]Code) map[*replica]Code {
	for _, r := range t.bound[i] {
		for _, s := range r.Devices {
			if !slices.ContainsFunc(t.devices[i], func(d device) bool { return d.kind == s.Kind && d.index == s.Index }) {
				if out == nil {
					out = map[*replica]Code{}
				}
				out[r] |= InsufficientDevices
			}
		}
	}
	return out
}

// Moves gives at most limit proposals to move replicas to better nodes, the greatest
// gain first. A place is better by the wishes that it meets, or by minGain points on
// the pool's scale of 0 to 100; each proposal counts on the ones before.
func Moves(t *Table, limit, minGain int) []Move {
	w := &t.work
	w.stored = Batch{NoPreemption: true}
	w.batch, w.ops, w.shares = &w.stored, w.ops[:0], w.shares[:0]
	var out []Move
	moved := map[string]bool{}
	for len(out) < limit {
		m, ok := t.bestMove(moved, minGain)
		if !ok {
			break
		}
		moved[m.Replica] = true
		out = append(out, m)
	}
	t.undo(0)
	w.batch = nil
	return out
}

// maxMoveTries bounds the replicas that are looked at for one proposal, on the
// nodes that look worst.
const maxMoveTries = 256

func (t *Table) bestMove(moved map[string]bool, minGain int) (Move, bool) {
	best := Move{GainPercent: -1}
	var from *replica
	tries := maxMoveTries
	for _, i := range t.worstFirst() {
		for _, r := range sortedByID(t.bound[i]) {
			if r.Leaving || r.Ended || moved[r.ID] || r.Class.volumes > 0 || len(r.Devices) > 0 {
				continue
			}
			if tries--; tries < 0 {
				break
			}
			if m, ok := t.tryMove(r, minGain); ok && m.GainPercent > best.GainPercent {
				best, from = m, r
			}
		}
	}
	if from == nil {
		return best, false
	}
	t.carry(from, best)
	return best, true
}

// worstFirst orders nodes by how badly their pools like them as they are.
func (t *Table) worstFirst() []int32 {
	var out []int32
	for _, id := range sortedKeys(t.index) {
		if i := t.index[id]; len(t.bound[i]) > 0 && t.down[i] == 0 {
			out = append(out, i)
		}
	}
	nothing := ask{}
	slices.SortStableFunc(out, func(a, b int32) int {
		la, lb := t.load(a, &nothing), t.load(b, &nothing)
		if !t.spreadsOut(a) {
			la = 1 - la
		}
		if !t.spreadsOut(b) {
			lb = 1 - lb
		}
		return cmp.Compare(lb, la)
	})
	return out
}

// tryMove compares a replica's place with the best other one, as if it were just
// being placed.
func (t *Table) tryMove(r *replica, minGain int) (Move, bool) {
	w, u := &t.work, &t.work.probe
	from := r.slot
	t.lift(r)
	t.touch(from)
	w.group = Group{Class: r.Class, Count: 1, NotOn: t.ids[from]}
	t.begin(u, &w.group, r.res)
	var m Move
	found := len(u.order) > 0
	if found {
		to := u.order[0]
		here := u.keyAt(from)
		gain := pointsOf(here.lo) - pointsOf(to.lo)
		better := here.hi > to.hi || (here.hi == to.hi && gain >= float64(minGain))
		m = Move{Replica: r.ID, From: t.ids[from], To: t.ids[to.node], GainPercent: int(math.Round(min(max(gain, 0), 100)))}
		if here.hi > to.hi {
			m.GainPercent = 100
			m.Message = fmt.Sprintf("node %s meets wishes and spreading that %s does not", m.To, m.From)
		} else {
			m.Message = fmt.Sprintf("node %s is better than %s by %d of 100 points", m.To, m.From, m.GainPercent)
		}
		found = better
	}
	u.finish()
	t.unlift(r)
	t.touch(from)
	return m, found
}

// keyAt ranks the node that the replica of a run has left.
func (u *run) keyAt(i int32) ranked {
	u.notOn = -1
	// The index may have the node out, as full or as refused.
	u.x.keys[i] = u.t.key(i, u.x)
	key, _ := u.nodeKey(i)
	var wish uint32
	var count uint64
	if len(u.x.columns) > 0 {
		_, wish, count = u.verdict(u.valuesOf(i))
	}
	return ranked{hi: (key>>wishShift+uint64(wish))<<40 | count, lo: key & rest, node: i}
}

// pointsOf is a key's place on a scale of 0 to 100: own replicas on the node count
// as full.
func pointsOf(lo uint64) float64 {
	own, load := lo>>ownShift, lo>>loadShift&loadOne
	return 100 * (float64(own) + float64(load)/loadOne)
}

// carry counts a replica at its new place for the proposals that follow.
func (t *Table) carry(r *replica, m Move) {
	w := &t.work
	from := r.slot
	t.lift(r)
	t.touch(from)
	w.ops = append(w.ops, op{kind: carried, node: from, victim: r})
	w.group = Group{Class: r.Class, Count: 1, Node: m.To}
	t.begin(&w.probe, &w.group, r.res)
	w.probe.pinned(t.index[m.To])
	w.probe.finish()
}

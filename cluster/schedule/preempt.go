package schedule

import (
	"cmp"
	"slices"
)

// victimSearch finds, node by node, the replicas to displace for one more of a
// group: as few as possible, then those of which the highest priority is lowest,
// then the lowest sum of priorities, then the ones that began last.
type victimSearch struct {
	candidates []*replica
	chosen     []*replica
	best       []*replica
	coming     []*replica    // leave already
	kept       []*nomination // of lower priority
	left       int
}

// toll is what a node asks for a place.
type toll struct {
	victims int
	highest int32
	sum     int64
	began   int64 // the earliest; later is better
	node    int32
}

func (t *Table) compareTolls(a, b toll) int {
	if c := cmp.Or(cmp.Compare(a.victims, b.victims), cmp.Compare(a.highest, b.highest), cmp.Compare(a.sum, b.sum), cmp.Compare(b.began, a.began)); c != 0 {
		return c
	}
	if a.node == b.node {
		return 0
	}
	if t.before(a.node, b.node) {
		return -1
	}
	return 1
}

// maxVictimChecks bounds the sets that are tried on one node before the first one
// that will do is taken, made minimal.
const maxVictimChecks = 4000

// preempt nominates nodes for at most n replicas of a group by displacing others.
func (t *Table) preempt(u *run, n int) []Nomination {
	p := u.r.c.priority
	if t.noneBelow(p) || !t.mayMakeRoom() {
		return nil
	}
	var queue []toll
	for i := range int32(len(t.ids)) {
		if c, ok := t.tollOf(u, i); ok {
			queue = append(queue, c)
		}
	}
	slices.SortFunc(queue, t.compareTolls)
	var out []Nomination
	for len(queue) > 0 && len(out) < n {
		now, ok := t.tollOf(u, queue[0].node)
		if !ok {
			queue = queue[1:]
			continue
		}
		if len(queue) > 1 && t.compareTolls(now, queue[1]) > 0 {
			// What was taken since made it dearer: it goes back where it belongs.
			queue = queue[1:]
			k, _ := slices.BinarySearchFunc(queue, now, t.compareTolls)
			queue = slices.Insert(queue, k, now)
			continue
		}
		out = append(out, t.displace(u, now.node))
		if u.related() && !t.faults.tollsOnce {
			queue = t.tollsAgain(u, queue)
		}
	}
	return out
}

// tollsAgain is for groups whose own replicas, or whose victims, change what other
// nodes ask.
func (t *Table) tollsAgain(u *run, queue []toll) []toll {
	queue = queue[:0]
	for i := range int32(len(t.ids)) {
		if c, ok := t.tollOf(u, i); ok {
			queue = append(queue, c)
		}
	}
	slices.SortFunc(queue, t.compareTolls)
	return queue
}

// mayMakeRoom says whether anybody may be displaced, or leaves already.
func (t *Table) mayMakeRoom() bool {
	if t.leaving > 0 || len(t.nominations) > 0 {
		return true
	}
	for _, n := range t.work.batch.Allowance {
		if n > 0 { // or spent, and then somebody leaves by this batch
			return true
		}
	}
	return false
}

// noneBelow says that nobody of lower priority is bound, and no room kept for such.
func (t *Table) noneBelow(p int32) bool {
	for q := range t.priorities {
		if q < p {
			return false
		}
	}
	for _, kept := range t.nominations {
		if kept[0].res.c.priority < p {
			return false
		}
	}
	return true
}

// removable are the codes that displacing replicas of the node may lift.
const removable = InsufficientCPU | InsufficientMemory | InsufficientStorage | InsufficientDevices | NoFreeAddress | PortTaken | WorkloadAntiAffinity

// tollOf finds the victims on a node, in t.work.victims.best, and what they are
// worth; false when none would help.
func (t *Table) tollOf(u *run, i int32) (toll, bool) {
	v := &t.work.victims
	codes := u.check(i)
	if codes&^removable != 0 || t.ids[i] == "" {
		return toll{}, false
	}
	t.readVictims(i, u.r.c.priority)
	if len(v.candidates)+len(v.coming)+len(v.kept) == 0 && codes != 0 {
		return toll{}, false
	}
	t.credit(i, 1)
	for _, r := range v.candidates {
		t.lift(r)
	}
	// Without all of them what it must be near to may be gone, too.
	possible := u.check(i)&^WorkloadAffinity == 0
	for _, r := range v.candidates {
		t.unlift(r)
	}
	possible = possible && t.chooseVictims(u, i)
	t.credit(i, -1)
	if !possible {
		return toll{}, false
	}
	return worth(v.best, i), true
}

// credit counts what will be free without a victim: the room of those that leave,
// and what is kept for groups of lower priority.
func (t *Table) credit(i int32, sign int64) {
	v := &t.work.victims
	for _, r := range v.coming {
		t.charge(i, r, sign)
	}
	for _, n := range v.kept {
		t.reserve(n, sign)
	}
}

// readVictims lists a node's replicas that may be displaced, the least valuable
// first, and those that leave already.
func (t *Table) readVictims(i, priority int32) {
	v := &t.work.victims
	v.candidates, v.coming, v.kept = v.candidates[:0], v.coming[:0], v.kept[:0]
	for _, n := range t.keeps[i] {
		if n.res.c.priority < priority && !n.gone {
			v.kept = append(v.kept, n)
		}
	}
	for _, r := range t.bound[i] {
		switch {
		case r.Ended:
		case r.Leaving:
			v.coming = append(v.coming, r)
		case r.Class.priority < priority || t.faults.equalsDisplaced && r.Class.priority == priority:
			k := r.res.key
			if t.work.batch.Allowance[k]-t.work.spent[k] > 0 || t.faults.budgetIgnored {
				v.candidates = append(v.candidates, r)
			}
		}
	}
	slices.SortFunc(v.candidates, func(a, b *replica) int {
		return cmp.Or(cmp.Compare(a.Class.priority, b.Class.priority), cmp.Compare(b.Bound, a.Bound), cmp.Compare(a.ID, b.ID))
	})
}

// lift takes a replica off its node for a question, and unlift puts it back.
func (t *Table) lift(r *replica) {
	t.charge(r.slot, r, 1)
	t.joinAll(r.slot, r.res, -1)
}

func (t *Table) unlift(r *replica) {
	t.joinAll(r.slot, r.res, 1)
	t.charge(r.slot, r, -1)
}

// chooseVictims leaves the best set in v.best; false when the allowances bear none.
func (t *Table) chooseVictims(u *run, i int32) bool {
	v := &t.work.victims
	v.best, v.chosen, v.left = v.best[:0], v.chosen[:0], maxVictimChecks
	if u.check(i) == 0 {
		return true
	}
	found := false
	for size := 1; size <= len(v.candidates) && !found && v.left > 0; size++ {
		found = t.trySets(u, i, 0, size)
	}
	return found || t.peel(u, i)
}

// trySets tries all sets of a size that respect the allowances, and keeps the best.
func (t *Table) trySets(u *run, i int32, from, size int) (found bool) {
	v := &t.work.victims
	if size == 0 {
		v.left--
		if u.check(i) != 0 {
			return false
		}
		if len(v.best) == 0 || (t.compareTolls(worth(v.chosen, i), worth(v.best, i)) < 0) != t.faults.dearVictims {
			v.best = append(v.best[:0], v.chosen...)
		}
		return true
	}
	for k := from; k+size <= len(v.candidates) && v.left > 0; k++ {
		r := v.candidates[k]
		if !t.mayDisplace(r) {
			continue
		}
		v.chosen = append(v.chosen, r)
		t.lift(r)
		found = t.trySets(u, i, k+1, size-1) || found
		t.unlift(r)
		v.chosen = v.chosen[:len(v.chosen)-1]
	}
	return found
}

// mayDisplace says whether the allowance of its workload bears one more beside the
// chosen ones.
func (t *Table) mayDisplace(r *replica) bool {
	k := r.res.key
	n := t.work.spent[k] + 1
	for _, c := range t.work.victims.chosen {
		if c.res.work == r.res.work {
			n++
		}
	}
	return n <= t.work.batch.Allowance[k] || t.faults.budgetIgnored
}

// peel takes all that may go and gives back, the most valuable first, whoever is
// not needed.
func (t *Table) peel(u *run, i int32) bool {
	v := &t.work.victims
	v.chosen = v.chosen[:0]
	for _, r := range v.candidates {
		if t.mayDisplace(r) {
			v.chosen = append(v.chosen, r)
			t.lift(r)
		}
	}
	v.best = v.best[:0]
	fits := u.check(i) == 0
	for _, r := range slices.Backward(v.chosen) {
		t.unlift(r)
		if fits && u.check(i) != 0 {
			v.best = append(v.best, r)
			t.lift(r)
		}
	}
	for _, r := range v.best {
		t.unlift(r)
	}
	return fits
}

func worth(victims []*replica, i int32) toll {
	c := toll{victims: len(victims), highest: -1 << 31, node: i, began: 1<<63 - 1}
	for _, r := range victims {
		c.highest, c.sum, c.began = max(c.highest, r.Class.priority), c.sum+int64(r.Class.priority), min(c.began, r.Bound)
	}
	return c
}

// displace gives a node to a replica of the group: its victims count as leaving,
// and their room stays taken until they are gone.
func (t *Table) displace(u *run, i int32) Nomination {
	w := &t.work
	n := Nomination{Node: t.ids[i]}
	t.plantVictims(&n)
	if w.spent == nil {
		w.spent = map[string]int{}
	}
	for _, r := range w.victims.best {
		n.Victims = append(n.Victims, r.ID)
		w.spent[r.res.key]++
		t.uncount(r)
		r.Leaving = true
		w.ops = append(w.ops, op{kind: displaced, node: i, victim: r})
	}
	slices.Sort(n.Victims)
	for _, k := range w.victims.kept {
		n.Withdrawn = append(n.Withdrawn, k.group)
		k.gone = true
		w.ops = append(w.ops, op{kind: withdrawn, node: i, kept: k})
		t.reserve(k, 1)
	}
	at := len(w.ops)
	// The room of those that leave is there for the choice of devices alone.
	w.victims.coming = append(w.victims.coming, w.victims.best...)
	for _, r := range w.victims.coming {
		t.charge(i, r, 1)
	}
	u.apply(i)
	for _, r := range w.victims.coming {
		t.charge(i, r, -1)
	}
	w.ops[at].kind = promised
	return n
}

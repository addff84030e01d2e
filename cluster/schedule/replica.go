package schedule

import (
	"fmt"
	"slices"
)

// replica is a Replica in its slot; slot is -1 while its node is not there.
type replica struct {
	Replica
	res  *resolved
	slot int32
	at   int32 // in bound[slot]
}

// resolved is a class in a table.
type resolved struct {
	c         *Class
	key       string // "tenant/workload"
	work, rev *scope
	avoids    []*scope // what it counts in, as one that must keep away
	spreads   []spreadIn
	affinity  []affinityIn
	m         *mask
	x         *index
	xVersion  uint64
	refs      int
	used      uint64
}

// spreadIn and affinityIn are terms in a table; the column is nil over nodes.
type spreadIn struct {
	spread
	column *column
}

type affinityIn struct {
	affinity
	scope  *scope
	column *column
}

// maxIdle bounds the classes that are kept without a replica.
const maxIdle = 4096

// resolve gives a class's place in the table.
func (t *Table) resolve(c *Class) *resolved {
	t.tick++
	r, ok := t.known[c]
	if ok {
		r.used = t.tick
		return r
	}
	if len(t.known) > maxIdle+2*len(t.replicas) {
		t.forgetIdle()
	}
	o := c.owner
	r = &resolved{
		c: c, key: o.key(), used: t.tick, work: t.scope(scopeKey{kind: ofWorkload, tenant: o.Tenant, workload: o.Workload}),
		rev: t.scope(scopeKey{kind: ofRevision, tenant: o.Tenant, workload: o.Workload, revision: o.Revision}),
	}
	columnOf := func(key string, s *scope) *column {
		if key == NodeKey {
			return nil
		}
		col := t.column(key)
		col.refs++
		t.count(s, col)
		return col
	}
	for _, s := range c.spreads {
		if t.faults.skewOffByOne && s.must() {
			s.skew++
		}
		r.spreads = append(r.spreads, spreadIn{s, columnOf(s.key, r.rev)})
	}
	for _, a := range c.affinity {
		s := t.scope(scopeKey{kind: ofWorkload, tenant: o.Tenant, workload: a.workload})
		r.affinity = append(r.affinity, affinityIn{a, s, columnOf(a.key, s)})
		if a.anti && !a.prefer {
			r.avoids = append(r.avoids, t.scope(scopeKey{kind: avoiding, tenant: o.Tenant, workload: a.workload, key: a.key}))
		}
	}
	t.known[c] = r
	return r
}

// forgetIdle lets the classes go that no replica has, but for the newer half.
func (t *Table) forgetIdle() {
	var used []uint64
	for _, r := range t.known {
		if r.refs == 0 {
			used = append(used, r.used)
		}
	}
	if len(used) == 0 {
		return
	}
	slices.Sort(used)
	limit := used[len(used)/2]
	for c, r := range t.known {
		if r.refs == 0 && r.used <= limit {
			t.forget(c, r)
		}
	}
}

func (t *Table) forget(c *Class, r *resolved) {
	delete(t.known, c)
	drop := func(s *scope, col *column) {
		if col != nil {
			t.uncountBy(s, col)
			t.dropColumn(col)
		}
	}
	for _, s := range r.spreads {
		drop(r.rev, s.column)
	}
	for _, a := range r.affinity {
		drop(a.scope, a.column)
		t.dropScope(a.scope)
	}
	for _, s := range r.avoids {
		t.dropScope(s)
	}
	t.dropScope(r.rev)
	t.dropScope(r.work)
}

// masked gives the class's mask, made anew if it was forgotten.
func (t *Table) masked(r *resolved) *mask {
	if r.m == nil || r.m.gone {
		r.m = t.mask(&r.c.static)
	}
	t.tick++
	r.m.used = t.tick
	return r.m
}

// PutReplica counts a bound replica; putting it again replaces it.
func (t *Table) PutReplica(r Replica) {
	if old, ok := t.replicas[r.ID]; ok {
		if old.Class == r.Class && old.Node == r.Node && old.Leaving == r.Leaving && old.Ended == r.Ended && old.Bound == r.Bound && slices.Equal(old.Devices, r.Devices) {
			return
		}
		t.DeleteReplica(r.ID)
	}
	n := &replica{Replica: r, res: t.resolve(r.Class), slot: -1}
	n.res.refs++
	t.replicas[r.ID] = n
	t.owe(n, 1)
	if r.Leaving {
		t.leaving++
	}
	if i, ok := t.index[r.Node]; ok {
		t.home(n, i)
	} else {
		t.homeless[r.Node] = append(t.homeless[r.Node], n)
	}
}

// home puts a replica on its node.
func (t *Table) home(r *replica, i int32) {
	r.slot, r.at = i, int32(len(t.bound[i]))
	t.bound[i] = append(t.bound[i], r)
	t.charge(i, r, -1)
	t.attend(r, 1)
	t.touch(i)
}

// DeleteReplica forgets it.
func (t *Table) DeleteReplica(id string) {
	r, ok := t.replicas[id]
	if !ok {
		return
	}
	delete(t.replicas, id)
	t.owe(r, -1)
	if r.Leaving {
		t.leaving--
	}
	if r.slot < 0 {
		list := t.homeless[r.Node]
		k := slices.Index(list, r)
		if list = slices.Delete(list, k, k+1); len(list) == 0 {
			delete(t.homeless, r.Node)
		} else {
			t.homeless[r.Node] = list
		}
	} else {
		t.charge(r.slot, r, 1)
		t.uncount(r)
		list := t.bound[r.slot]
		last := list[len(list)-1]
		list[r.at], last.at = last, r.at
		list[len(list)-1] = nil
		t.bound[r.slot] = list[:len(list)-1]
		t.touch(r.slot)
	}
	r.res.refs--
}

// uncount takes a replica out of what is counted of its node, its room apart.
func (t *Table) uncount(r *replica) { t.attend(r, -1) }

// attend counts a replica, unless it leaves, for affinity, spreading and
// displacement.
func (t *Table) attend(r *replica, n int32) {
	if r.Leaving || r.Ended {
		return
	}
	t.joinAll(r.slot, r.res, n)
	p := r.Class.priority
	if t.priorities[p] += int(n); t.priorities[p] == 0 {
		delete(t.priorities, p)
	}
}

func (t *Table) joinAll(i int32, res *resolved, n int32) {
	t.join(i, res.work, n)
	t.join(i, res.rev, n)
	for _, s := range res.avoids {
		t.join(i, s, n)
	}
}

// charge takes a bound replica's room (-1) or gives it back (1).
func (t *Table) charge(i int32, r *replica, sign int64) {
	a := &r.Class.ask
	if a.address {
		t.freeAddress[i] += int32(sign)
	}
	if r.Ended {
		return
	}
	t.take(i, a, sign)
	t.takeShares(i, r.Devices, sign)
}

// take moves the countable part of an ask.
func (t *Table) take(i int32, a *ask, sign int64) {
	t.freeCPU[i] += sign * a.cpu
	t.freeMemory[i] += sign * a.memory
	t.freeStorage[i] += sign * a.storage
	for _, p := range a.ports {
		if sign < 0 {
			t.ports[i] = append(t.ports[i], p)
		} else if k := slices.Index(t.ports[i], p); k >= 0 {
			t.ports[i] = slices.Delete(t.ports[i], k, k+1)
		}
	}
}

// owe counts what a tenant has, for fair queues.
func (t *Table) owe(r *replica, n int64) {
	if r.Ended {
		return
	}
	tenant := r.Class.owner.Tenant
	u := t.usage[tenant]
	if u == nil {
		u = &usage{}
		t.usage[tenant] = u
	}
	u.add(r.Class, n)
	if u.replicas += int(n); u.replicas == 0 {
		delete(t.usage, tenant)
	}
}

// add counts n replicas of a class.
func (u *usage) add(c *Class, n int64) {
	u.cpu += n * c.ask.cpu
	u.memory += n * c.ask.memory
	for k := range c.ask.devices {
		milli, count := c.ask.devices[k].amount()
		u.devices += n * int64(milli) * int64(count)
	}
}

// share is the greatest part that a tenant has of a resource, in millionths, with
// more beside what it has.
func (t *Table) share(tenant string, more usage) int64 {
	if u := t.usage[tenant]; u != nil {
		more.cpu, more.memory, more.devices = more.cpu+u.cpu, more.memory+u.memory, more.devices+u.devices
	}
	return max(part(more.cpu, t.capacity.CPUMilli), part(more.memory, t.capacity.MemoryBytes), part(more.devices, t.stock))
}

func part(n, of int64) int64 {
	if of <= 0 {
		return 0
	}
	return int64(float64(n) / float64(of) * 1e6)
}

func (r *replica) String() string { return fmt.Sprintf("%s on %s", r.ID, r.Node) }

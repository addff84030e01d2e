package schedule

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// Event is what happened to a table, as far as it may help who waits.
type Event uint8

// The events.
const (
	// NodeBetter: a node is new, or its labels, taints, mode, readiness or capacity
	// changed.
	NodeBetter Event = iota
	// RoomFreed on a node: a replica, a volume or a nomination is gone.
	RoomFreed
	// ReplicaBound may help affinity and spreading.
	ReplicaBound
	// PoolsChanged may help anybody.
	PoolsChanged
	// BudgetFreed: more may be displaced.
	BudgetFreed
)

const resources = InsufficientCPU | InsufficientMemory | InsufficientStorage | InsufficientDevices | NoFreeAddress | PortTaken

// helps are the codes that an event can lift. What a gang lacks beside room shows in
// its other codes.
var helps = [...]Codes{
	NodeBetter:   codesEnd - 1,
	RoomFreed:    resources | WorkloadAntiAffinity | SpreadSkew | Nominated,
	ReplicaBound: WorkloadAffinity | SpreadSkew,
	PoolsChanged: codesEnd - 1,
	BudgetFreed:  resources | WorkloadAntiAffinity,
}

// Waiting is a group in a Queue.
type Waiting struct {
	Key   string
	Class *Class
	Count int
	// Since orders groups of one tenant and priority, and a gang's deadline counts
	// from it.
	Since time.Time
}

// waiting is a group and what is known of it. ready: it is to be served; else it
// sleeps until an event helps one of the codes.
type waiting struct {
	Waiting
	ready bool
	codes Codes
}

// Queue holds the groups that wait for nodes.
type Queue struct {
	limit  int
	groups map[string]*waiting
}

// NewQueue gives an empty queue for at most limit groups.
func NewQueue(limit int) *Queue {
	return &Queue{limit: limit, groups: map[string]*waiting{}}
}

// Len is how many groups wait.
func (q *Queue) Len() int { return len(q.groups) }

// Put adds a group, or replaces what is known of it; what is new or was changed is
// ready at once. A full queue drops the group of the lowest priority that came last
// and gives its key, which may be the new one.
func (q *Queue) Put(w Waiting) (dropped string) {
	old, ok := q.groups[w.Key]
	if ok && old.Class == w.Class && old.Count == w.Count {
		return ""
	}
	if ok {
		w.Since = old.Since
	}
	q.groups[w.Key] = &waiting{Waiting: w, ready: true}
	if len(q.groups) <= q.limit {
		return ""
	}
	var last *waiting
	for _, g := range q.groups {
		if last == nil || compareWaiting(g, last) > 0 {
			last = g
		}
	}
	delete(q.groups, last.Key)
	return last.Key
}

// compareWaiting orders by priority, then age.
func compareWaiting(a, b *waiting) int {
	return cmp.Or(cmp.Compare(b.Class.priority, a.Class.priority), a.Since.Compare(b.Since), strings.Compare(a.Key, b.Key))
}

// Delete takes a group out.
func (q *Queue) Delete(key string) { delete(q.groups, key) }

// Refuse puts a group that was served to sleep until something happens that helps
// one of the codes.
func (q *Queue) Refuse(key string, codes Codes) {
	if g, ok := q.groups[key]; ok {
		g.ready, g.codes = false, codes
	}
}

// Ready wakes one group.
func (q *Queue) Ready(key string) {
	if g, ok := q.groups[key]; ok {
		g.ready = true
	}
}

// Wake makes those ready that an event can help. node is where it happened, empty
// when it concerns no single one: one whose labels and taints refuse a group helps
// it only by the room of others, of which there is none.
func (q *Queue) Wake(t *Table, e Event, node string) {
	i, known := t.index[node]
	for _, g := range q.groups {
		if g.ready || g.codes&helps[e] == 0 {
			continue
		}
		g.ready = !known || e == ReplicaBound || t.could(g.Class, i, e)
	}
}

// could says whether an event on one node may help a class: the node is none that
// refuses it whatever room there is, or it is in the domain of one.
func (t *Table) could(c *Class, i int32, e Event) bool {
	r := t.resolve(c)
	if len(r.affinity) > 0 || len(r.spreads) > 0 || len(r.work.against) > 0 {
		return true
	}
	if !t.masked(r).ok.has(i) {
		return false
	}
	// Who may displace others needs no room, and a gang looks at all nodes.
	return e == BudgetFreed || c.gang || !t.noneBelow(c.priority) || len(t.keeps[i]) > 0 || t.fits(i, &c.ask, 0)
}

// Take gives the keys of at most limit ready groups in the order in which they are
// to be served: by priority, then by the dominant share of the tenant over its
// weight (1 when absent), then the oldest. What is taken counts for its tenant
// before the next is chosen.
func (q *Queue) Take(t *Table, weights map[string]int32, limit int) []string {
	var ready []*waiting
	for _, g := range q.groups {
		if g.ready {
			ready = append(ready, g)
		}
	}
	slices.SortFunc(ready, compareWaiting)
	var out []string
	extra := map[string]*usage{}
	for len(ready) > 0 && len(out) < limit {
		n := 1
		for n < len(ready) && ready[n].Class.priority == ready[0].Class.priority {
			n++
		}
		out = append(out, fair(t, ready[:n], weights, extra, limit-len(out))...)
		ready = ready[n:]
	}
	return out
}

// fair orders groups of one priority.
func fair(t *Table, groups []*waiting, weights map[string]int32, extra map[string]*usage, limit int) []string {
	byTenant := map[string][]*waiting{}
	for _, g := range groups {
		k := g.Class.owner.Tenant
		byTenant[k] = append(byTenant[k], g)
	}
	h := tenants{}
	for _, name := range sortedKeys(byTenant) {
		h = append(h, tenant{name, t.weighted(name, weights, extra), byTenant[name][0].Since})
	}
	slices.SortFunc(h, tenant.compare)
	var out []string
	for len(h) > 0 && len(out) < limit {
		name := h[0].name
		g := byTenant[name][0]
		out = append(out, g.Key)
		if extra[name] == nil {
			extra[name] = &usage{}
		}
		extra[name].add(g.Class, int64(g.Count))
		h = h[1:]
		if byTenant[name] = byTenant[name][1:]; len(byTenant[name]) > 0 {
			x := tenant{name, t.weighted(name, weights, extra), byTenant[name][0].Since}
			k, _ := slices.BinarySearchFunc(h, x, tenant.compare)
			h = slices.Insert(h, k, x)
		}
	}
	return out
}

type tenant struct {
	name   string
	share  int64
	oldest time.Time
}

type tenants []tenant

func (a tenant) compare(b tenant) int {
	return cmp.Or(cmp.Compare(a.share, b.share), a.oldest.Compare(b.oldest), strings.Compare(a.name, b.name))
}

func (t *Table) weighted(name string, weights map[string]int32, extra map[string]*usage) int64 {
	var more usage
	if e := extra[name]; e != nil {
		more = *e
	}
	return t.share(name, more) / int64(max(weights[name], 1))
}

// Expired gives the gangs whose deadline is over, oldest first, and when the next
// one will be; zero for never.
func (q *Queue) Expired(now time.Time) (keys []string, next time.Time) {
	var over []*waiting
	for _, g := range q.groups {
		if !g.Class.gang || g.Class.deadline <= 0 {
			continue
		}
		switch at := g.Since.Add(g.Class.deadline); {
		case !at.After(now):
			over = append(over, g)
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	slices.SortFunc(over, func(a, b *waiting) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.Key, b.Key)) })
	for _, g := range over {
		keys = append(keys, g.Key)
	}
	return keys, next
}

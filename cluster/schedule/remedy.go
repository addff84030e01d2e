package schedule

import (
	"fmt"
	"maps"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// remedies gives the smallest single changes of every kind, each of which makes one
// more replica fit. What concerns one node follows from the look at it; what changes
// the spec is tried, as it may change more than the reason that it removes.
func (s *survey) remedies(t *Table, n int) []Remedy {
	return append(s.nodeRemedies(t), s.classRemedies(t, n)...)
}

func (s *survey) nodeRemedies(t *Table) []Remedy {
	var out []Remedy
	u, a := s.u, &s.u.r.c.ask
	at := func(c Code) (int32, string, bool) {
		n := s.near[c]
		if n == nil {
			return 0, "", false
		}
		return n.node, t.ids[n.node], true
	}
	add := func(r Remedy, format string, args ...any) {
		r.Message = fmt.Sprintf(format, args...)
		out = append(out, r)
	}
	if i, id, ok := at(InsufficientCPU); ok {
		d := a.cpu - t.freeCPU[i]
		add(Remedy{Kind: FreeCPU, Node: id, Amount: d}, "free %dm of CPU on node %s", d, id)
	}
	if i, id, ok := at(InsufficientMemory); ok {
		d := a.memory - t.freeMemory[i]
		add(Remedy{Kind: FreeMemory, Node: id, Amount: d}, "free %s of memory on node %s", mib(d+1<<20-1), id)
	}
	if i, id, ok := at(InsufficientStorage); ok {
		d := a.storage + u.volumes() - t.freeStorage[i]
		add(Remedy{Kind: FreeStorage, Node: id, Amount: d}, "free %s of storage on node %s", mib(d+1<<20-1), id)
	}
	if i, id, ok := at(NoFreeAddress); ok {
		d := 1 - t.freeAddress[i]
		add(Remedy{Kind: FreeAddress, Node: id, Amount: int64(d)}, "free %s on node %s", several(int(d), "address", "addresses"), id)
	}
	if i, id, ok := at(PortTaken); ok && s.tooMany(PortTaken, i) == 0 {
		p := t.ports[i][slices.IndexFunc(t.ports[i], func(p int32) bool { return slices.Contains(a.ports, p) })]
		add(Remedy{Kind: FreePort, Node: id, Amount: int64(p)}, "free port %d on node %s", p, id)
	}
	for _, c := range []Code{NodeCordoned, NodeDraining} {
		if _, id, ok := at(c); ok {
			add(Remedy{Kind: Uncordon, Node: id}, "uncordon node %s", id)
		}
	}
	for _, c := range []Code{NodeNotReady, NodeLost} {
		if _, id, ok := at(c); ok {
			add(Remedy{Kind: WaitForNode, Node: id}, "wait for node %s, which is %s", id, s.words(c))
		}
	}
	if i, id, ok := at(SelectorMismatch); ok && s.tooMany(SelectorMismatch, i) == 0 {
		r := u.unmet(i)[0]
		if u.relabels(i, r) {
			add(Remedy{Kind: LabelNode, Node: id, Key: r.key, Value: r.values[0]}, "label node %s %s=%s", id, r.key, r.values[0])
		}
	}
	if s.emptied >= 0 {
		id, name := t.ids[s.emptied], t.pools[t.pool[s.emptied]].name
		add(Remedy{Kind: AddNode, Node: id, Value: name}, "add a node to pool %s, like %s", name, id)
	}
	return out
}

// relabels says that a label would change nothing on a node but the selector's
// answer.
func (u *run) relabels(i int32, r requirement) bool {
	if r.key == PoolKey || slices.ContainsFunc(u.x.columns, func(c *column) bool { return c.key == r.key }) {
		return false
	}
	labels := map[string]string{}
	maps.Copy(labels, u.t.facts[i].GetLabels())
	labels[r.key] = r.values[0]
	terms := u.r.c.static.terms
	return len(terms) == 0 || slices.ContainsFunc(terms, func(term []requirement) bool {
		return !slices.ContainsFunc(term, func(q requirement) bool { return !q.holdsIn(labels) })
	})
}

// variant is a change of the spec that may help.
type variant struct {
	remedy Remedy
	change func(c *Class)
}

// classRemedies tries the variants of the spec for n replicas.
func (s *survey) classRemedies(t *Table, n int) []Remedy {
	var out []Remedy
	var list []variant
	list = append(list, s.askLess(t)...)
	list = append(list, s.loosen()...)
	list = append(list, s.relate()...)
	for _, v := range list {
		c := s.u.r.c.clone(v.change)
		if t.wouldFit(s.u.g, c, n) {
			out = append(out, v.remedy)
		}
	}
	if n == 1 {
		if r, ok := s.raisePriority(t); ok {
			out = append(out, r)
		}
	}
	return out
}

// clone copies a class for a change.
func (c *Class) clone(change func(*Class)) *Class {
	n := *c
	n.spreads, n.affinity, n.ask.devices = slices.Clone(c.spreads), slices.Clone(c.affinity), slices.Clone(c.ask.devices)
	n.static.selector, n.static.tolerations = slices.Clone(c.static.selector), slices.Clone(c.static.tolerations)
	change(&n)
	n.static.devices = n.ask.devices
	n.static.topology = n.topologyKeys()
	n.static.signature = n.static.sign()
	n.ask.sign(n.volumes)
	return &n
}

// wouldFit says whether n replicas would find nodes if their class were another.
func (t *Table) wouldFit(g *Group, c *Class, n int) bool {
	w, u := &t.work, &t.work.probe
	w.group = *g
	w.group.Class, w.group.Count = c, n
	start := len(w.ops)
	r := t.resolve(c)
	t.begin(u, &w.group, r)
	for t.placedSince(start) < n && u.more() {
	}
	u.finish()
	ok := t.placedSince(start) >= n
	t.undo(start)
	t.forget(c, r)
	return ok
}

// askLess are variants with a smaller ask: what the nearest node has.
func (s *survey) askLess(t *Table) []variant {
	var out []variant
	c := s.u.r.c
	add := func(kind RemedyKind, amount, overhead int64, text string, change func(c *Class)) {
		if amount -= overhead; amount > 0 {
			out = append(out, variant{Remedy{Kind: kind, Amount: amount, Message: text}, change})
		}
	}
	if n := s.near[InsufficientCPU]; n != nil {
		free := t.freeCPU[n.node]
		add(AskLessCPU, free, c.overhead.CPUMilli, fmt.Sprintf("ask for at most %dm of CPU", free-c.overhead.CPUMilli), func(c *Class) { c.ask.cpu = free })
	}
	if n := s.near[InsufficientMemory]; n != nil {
		free := t.freeMemory[n.node]
		add(AskLessMemory, free, c.overhead.MemoryBytes, fmt.Sprintf("ask for at most %s of memory", mib(free-c.overhead.MemoryBytes)), func(c *Class) { c.ask.memory = free })
	}
	if n := s.near[InsufficientStorage]; n != nil {
		free := t.freeStorage[n.node]
		add(AskLessStorage, free, s.u.volumes(), fmt.Sprintf("ask for at most %s of storage", mib(free-s.u.volumes())), func(c *Class) { c.ask.storage = free - s.u.volumes() })
	}
	return append(out, s.otherDevices(t)...)
}

func (s *survey) otherDevices(t *Table) []variant {
	var out []variant
	asks := s.u.r.c.ask.devices
	if len(asks) != 1 {
		return nil
	}
	a := &asks[0]
	if n := s.near[InsufficientDevices]; n != nil {
		_, free := a.lack(t.devices[n.node])
		switch {
		case free <= 0:
		case a.milli > 0:
			out = append(out, variant{
				Remedy{Kind: AskSmallerShare, Key: a.kind, Amount: int64(free), Message: fmt.Sprintf("ask for at most %d thousandths of a %s", free, a.kind)},
				func(c *Class) { c.ask.devices[0].milli = free },
			})
		default:
			out = append(out, variant{
				Remedy{Kind: AskFewerDevices, Key: a.kind, Amount: int64(free), Message: fmt.Sprintf("ask for at most %d of kind %s", free, a.kind)},
				func(c *Class) { c.ask.devices[0].count = free },
			})
		}
	}
	if n := s.near[DeviceModelMismatch]; n != nil && len(a.models) > 0 {
		for _, model := range t.modelsOn(n.all, a) {
			out = append(out, variant{
				Remedy{Kind: AllowModel, Key: a.kind, Value: model, Message: fmt.Sprintf("accept %s of model %s too", a.kind, model)},
				func(c *Class) {
					c.ask.devices[0].models = append(slices.Clone(c.ask.devices[0].models), model)
					slices.Sort(c.ask.devices[0].models)
				},
			})
		}
	}
	return out
}

// modelsOn gives the models of a kind on some nodes that an ask does not accept.
func (t *Table) modelsOn(list []int32, a *deviceAsk) []string {
	var out []string
	for _, i := range list {
		for k := range t.devices[i] {
			if d := &t.devices[i][k]; d.kind == a.kind && d.model != "" && !a.takes(d) {
				out = append(out, d.model)
			}
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	return out[:min(len(out), maxNear)]
}

// loosen are variants that accept more nodes.
func (s *survey) loosen() []variant {
	var out []variant
	u := s.u
	if n := s.near[TaintNotTolerated]; n != nil && s.tooMany(TaintNotTolerated, n.node) == 0 {
		taint := u.untolerated(n.node)[0]
		out = append(out, variant{
			Remedy{Kind: Tolerate, Taint: taint, Message: fmt.Sprintf("tolerate taint %s=%s", taint.GetKey(), taint.GetValue())},
			func(c *Class) {
				c.static.tolerations = append(c.static.tolerations, &portolanv1.Toleration{Key: taint.GetKey(), Value: taint.GetValue(), Effect: taint.GetEffect()})
			},
		})
	}
	if n := s.near[SelectorMismatch]; n != nil && s.tooMany(SelectorMismatch, n.node) == 0 {
		key := u.unmet(n.node)[0].key
		out = append(out, variant{
			Remedy{Kind: DropSelector, Key: key, Message: "drop " + key + " from the node selector"},
			func(c *Class) {
				c.static.selector = slices.DeleteFunc(c.static.selector, func(r requirement) bool { return r.key == key })
			},
		})
	}
	if s.near[AffinityMismatch] != nil {
		out = append(out, variant{Remedy{Kind: DropNodeAffinity, Message: "require no node affinity"}, func(c *Class) { c.static.terms = nil }})
	}
	if s.near[CapacityTypeMismatch] != nil {
		out = append(out, variant{
			Remedy{Kind: AllowSpot, Message: "allow spot and on-demand pools"},
			func(c *Class) { c.static.capacity = portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED },
		})
	}
	if n := s.near[NoTopologyLabel]; n != nil && s.tooMany(NoTopologyLabel, n.node) == 0 {
		out = append(out, s.wishFor(u.unlabelled(n.node)[0])...)
	}
	return out
}

// relate are variants with weaker terms about other replicas.
func (s *survey) relate() []variant {
	var out []variant
	u := s.u
	if n := s.near[SpreadSkew]; n != nil {
		for k := range u.r.spreads {
			sp := &u.r.spreads[k]
			if need := u.skew(k, n.node); need > sp.skew && sp.must() {
				out = append(out, variant{
					Remedy{Kind: RaiseSkew, Key: sp.key, Amount: int64(need), Message: fmt.Sprintf("raise max_skew over %s to %d", sp.key, need)},
					func(c *Class) { c.spreads[k].skew = need },
				})
			}
		}
	}
	for k := range u.r.affinity {
		a := &u.r.affinity[k]
		c, kind, text := WorkloadAffinity, PreferAffinity, "only prefer to be near "
		if a.anti {
			c, kind, text = WorkloadAntiAffinity, PreferAntiAffinity, "only prefer to keep away from "
		}
		if n := s.near[c]; n != nil && !a.prefer {
			out = append(out, variant{
				Remedy{Kind: kind, Key: a.key, Value: a.workload, Message: text + a.workload + " over " + a.key},
				func(c *Class) { c.affinity[k].prefer = true },
			})
		}
	}
	return out
}

// wishFor are variants in which a topology key is no must.
func (s *survey) wishFor(key string) []variant {
	var out []variant
	for k := range s.u.r.spreads {
		if sp := &s.u.r.spreads[k]; sp.must() && sp.key == key {
			out = append(out, variant{
				Remedy{Kind: PreferSpread, Key: key, Message: "only prefer to spread over " + key},
				func(c *Class) { c.spreads[k].prefer = true },
			})
		}
	}
	for k := range s.u.r.affinity {
		if a := &s.u.r.affinity[k]; !a.anti && !a.prefer && a.key == key {
			out = append(out, variant{
				Remedy{Kind: PreferAffinity, Key: key, Value: a.workload, Message: "only prefer to be near " + a.workload + " over " + key},
				func(c *Class) { c.affinity[k].prefer = true },
			})
		}
	}
	return out
}

const (
	maxPriority = 1000
	// maxPriorities bounds how many are tried.
	maxPriorities = 4
)

// raisePriority looks for the lowest priority with which others may be displaced.
func (s *survey) raisePriority(t *Table) (Remedy, bool) {
	w, c := &t.work, s.u.r.c
	if !c.displaces || w.batch.NoPreemption {
		return Remedy{}, false
	}
	tried := 0
	for _, q := range sortedKeys(t.priorities) {
		if q < c.priority || q >= maxPriority || tried == maxPriorities {
			continue
		}
		tried++
		if t.wouldDisplace(s.u.g, c.clone(func(c *Class) { c.priority = q + 1 })) {
			return Remedy{Kind: RaisePriority, Amount: int64(q + 1), Message: fmt.Sprintf("raise the priority to %d", q+1)}, true
		}
	}
	return Remedy{}, false
}

func (t *Table) wouldDisplace(g *Group, c *Class) bool {
	w, u := &t.work, &t.work.probe
	w.group = *g
	w.group.Class, w.group.Count = c, 1
	start := len(w.ops)
	r := t.resolve(c)
	t.begin(u, &w.group, r)
	u.finish()
	ok := len(t.preempt(u, 1)) > 0
	t.undo(start)
	t.forget(c, r)
	return ok
}

// unmet gives the parts of the selector that a node does not meet.
func (u *run) unmet(i int32) []requirement {
	var out []requirement
	for k, in := range u.x.m.selector {
		if !in.bits.has(i) {
			out = append(out, u.r.c.static.selector[k])
		}
	}
	return out
}

func (u *run) unlabelled(i int32) []string {
	var out []string
	for k, in := range u.x.m.topology {
		if !in.bits.has(i) && !slices.Contains(out, u.r.c.static.topology[k]) {
			out = append(out, u.r.c.static.topology[k])
		}
	}
	return out
}

func (u *run) untolerated(i int32) []*portolanv1.Taint {
	var out []*portolanv1.Taint
	for _, taint := range u.t.taintSets[u.t.taintSet[i]] {
		if _, ok := tolerated(taint, u.r.c.static.tolerations); !ok && taint.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE {
			out = append(out, taint)
		}
	}
	return out
}

// skew is what max_skew would have to be for one more on a node; 0 when the term is
// no must.
func (u *run) skew(k int, i int32) int32 {
	s := &u.r.spreads[k]
	if !s.must() {
		return 0
	}
	if s.column == nil {
		return u.t.countOn(i, u.r.rev) + 1 - int32(u.nodeMin)
	}
	return u.r.rev.in(s.column, s.column.of[i]) + 1 - u.mins[k].least
}

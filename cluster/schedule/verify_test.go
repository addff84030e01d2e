package schedule

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// failer is told of what is wrong, and does not return.
type failer interface {
	Fatalf(format string, args ...any)
}

// verifyAll follows the decisions on a batch in the world.
func (sc *scene) verifyAll(t failer, out []Placed) {
	left := maps.Clone(sc.batch.Allowance)
	for i, p := range out {
		sc.verify(t, &sc.groups[i], sc.wanted[i], p, left)
	}
}

// verify follows the decision on one group in the world, and leaves the world as it
// is for the next.
func (sc *scene) verify(t failer, g *Group, q *wanted, p Placed, left map[string]int) {
	w := sc.w
	if g.Count == 0 {
		return
	}
	if got := len(p.Bindings) + len(p.Nominations) + p.Missing; got != g.Count {
		t.Fatalf("%s: %d of %d replicas are accounted for: %s", g.Key, got, g.Count, show([]Placed{p}))
	}
	if q.spec.GetScheduling().GetGang() != nil {
		sc.verifyGang(t, g, q, p, left)
		return
	}
	for k, bd := range p.Bindings {
		sc.verifyBinding(t, q, bd)
		w.add(fmt.Sprintf("%s#%d", g.Key, k), q, bd)
	}
	if len(p.Bindings) < g.Count {
		if more := w.takers(q); len(more) > 0 {
			t.Fatalf("%s: node %s takes one more: %+v", g.Key, more[0].ID, p)
		}
	}
	sc.verifyNominations(t, g, q, p, left)
	if p.Missing > 0 {
		sc.verifyReasons(t, q, p)
	}
}

func (sc *scene) verifyBinding(t failer, q *wanted, bd Binding) {
	w := sc.w
	n := w.nodes[bd.Node]
	codes, c := w.against(q, n, nil)
	if codes != 0 {
		t.Fatalf("%v is bound to %s in spite of %v", q.owner, bd.Node, codes)
	}
	if !w.mayHold(q, bd) {
		t.Fatalf("%v may not have the devices %v of %s", q.owner, bd.Devices, bd.Node)
	}
	if q.node != "" {
		return
	}
	for _, o := range w.takers(q) {
		// The price of a model is no part of a key: it counts between nodes of pools
		// that have it. Which devices a promised replica holds is not known yet.
		_, better := w.against(q, o, nil)
		here, there := w.pool(n).GetName() == "frag", w.pool(o).GetName() == "frag"
		if here != there || here && (w.learned == nil || w.promisedOn(n.ID) || w.promisedOn(o.ID)) {
			better.load, c.load = 0, 0
		}
		if better.compare(c) < 0 {
			t.Fatalf("%v is bound to %s at %+v, and %s has %+v", q.owner, bd.Node, c, o.ID, better)
		}
	}
}

func (w *world) promisedOn(node string) bool {
	for _, g := range w.replicas {
		if g.Node == node && g.promised {
			return true
		}
	}
	return false
}

// verifyGang: all or none; all only where they can come one by one in some order,
// and none only if there is no way.
func (sc *scene) verifyGang(t failer, g *Group, q *wanted, p Placed, left map[string]int) {
	w := sc.w
	if n := len(p.Bindings); n > 0 {
		if n < g.Count {
			t.Fatalf("%d of %d of a gang are bound", n, g.Count)
		}
		if !w.inSomeOrder(g.Key, q, p.Bindings) {
			t.Fatalf("the gang %s may not be in these places: %s", g.Key, show([]Placed{p}))
		}
		return
	}
	// Of a replica with several requests for devices, which device serves which is
	// chosen for it alone: that may leave the next one short.
	if len(q.spec.GetScheduling().GetDevices()) < 2 && w.most(q, g.Count, map[string]bool{}) {
		t.Fatalf("the gang %s of %d has room: %s", g.Key, g.Count, show([]Placed{p}))
	}
	if n := len(p.Nominations); n > 0 && n < g.Count {
		t.Fatalf("%d of %d of a gang are nominated", n, g.Count)
	}
	if p.Missing > 0 && p.Refusal.Codes&GangIncomplete == 0 {
		t.Fatalf("the gang %s is refused for other reasons than that: %s", g.Key, show([]Placed{p}))
	}
	sc.verifyNominations(t, g, q, p, left)
}

// inSomeOrder binds replicas one by one, each where nothing is against it, in the
// first order in which that can be done.
func (w *world) inSomeOrder(key string, q *wanted, list []Binding) bool {
	if len(list) == 0 {
		return true
	}
	for k, bd := range list {
		n, there := w.nodes[bd.Node]
		if !there {
			return false
		}
		if codes, _ := w.against(q, n, nil); codes != 0 || !w.mayHold(q, bd) {
			continue
		}
		id := fmt.Sprintf("%s#%d", key, len(list))
		w.add(id, q, bd)
		if w.inSomeOrder(key, q, slices.Delete(slices.Clone(list), k, k+1)) {
			return true
		}
		w.drop(id)
	}
	return false
}

// verifyNominations: each has room when its victims are gone, and is the cheapest
// there is; without a gang, there is none more.
func (sc *scene) verifyNominations(t failer, g *Group, q *wanted, p Placed, left map[string]int) {
	if sc.batch.NoPreemption || q.spec.GetNeverPreempt() {
		if len(p.Nominations) > 0 {
			t.Fatalf("%s: nobody may be displaced", g.Key)
		}
		return
	}
	for k, n := range p.Nominations {
		sc.verifyNomination(t, g, q, n)
		best, ok := sc.w.cheapest(q, left)
		if !ok {
			t.Fatalf("%s: nothing helps, but %+v", g.Key, n)
		}
		if got := sc.tollOf(n); compareWorth(got, best) != 0 {
			t.Fatalf("%s: displaced at %+v, and %+v would do: %s", g.Key, got, best, show([]Placed{p}))
		}
		sc.follow(t, g, q, n, k, left)
	}
	if p.Missing == 0 || q.spec.GetScheduling().GetGang() != nil || !sc.someLower(q) {
		return
	}
	if best, ok := sc.w.cheapest(q, left); ok {
		t.Fatalf("%s: %+v would help: %s", g.Key, best, show([]Placed{p}))
	}
}

// verifyNomination: the victims are on the node, may go, and are all needed.
func (sc *scene) verifyNomination(t failer, g *Group, q *wanted, n Nomination) {
	w := sc.w
	node, there := w.nodes[n.Node]
	if !there {
		t.Fatalf("%s: there is no node %s", g.Key, n.Node)
	}
	gone := w.leavingOn(n.Node)
	for _, id := range n.Victims {
		v := w.replicas[id]
		switch {
		case v == nil || v.Node != n.Node:
			t.Fatalf("%s: %s is not on %s", g.Key, id, n.Node)
		case v.spec.GetPriority() >= q.spec.GetPriority() || v.Leaving || v.Ended || gone[id]:
			t.Fatalf("%s is no victim for %s", id, g.Key)
		}
		gone[id] = true
	}
	if codes, _ := w.against(q, node, gone); codes != 0 {
		t.Fatalf("%s: without %v, %s still has %v", g.Key, n.Victims, n.Node, codes)
	}
	for _, id := range n.Victims {
		delete(gone, id)
		if codes, _ := w.against(q, node, gone); codes == 0 {
			t.Fatalf("%s: %s leaves %s for nothing", g.Key, id, n.Node)
		}
		gone[id] = true
	}
}

// tollOf is what a nomination's victims are worth.
func (sc *scene) tollOf(n Nomination) toll {
	got := toll{victims: len(n.Victims), highest: -1 << 31, began: 1<<63 - 1}
	for _, id := range n.Victims {
		v := sc.w.replicas[id]
		got.highest, got.sum, got.began = max(got.highest, v.spec.GetPriority()), got.sum+int64(v.spec.GetPriority()), min(got.began, v.Bound)
	}
	return got
}

// someLower says that somebody could be displaced: who only waits for room that
// others leave anyway is not nominated without.
func (sc *scene) someLower(q *wanted) bool {
	for _, o := range sc.w.replicas {
		if _, there := sc.w.nodes[o.Node]; there && !o.Leaving && !o.Ended && strings.HasPrefix(o.ID, "b") && o.spec.GetPriority() < q.spec.GetPriority() {
			return true
		}
	}
	return false
}

// follow lets the victims of a nomination leave and puts its replica there.
func (sc *scene) follow(t failer, g *Group, q *wanted, n Nomination, k int, left map[string]int) {
	w := sc.w
	for _, id := range n.Victims {
		v := w.replicas[id]
		if left[v.owner.key()]--; left[v.owner.key()] < 0 {
			t.Fatalf("%s: the budget of %s is overdrawn", g.Key, v.owner.key())
		}
		v.Leaving = true
	}
	// It holds the devices that it will have, beside those of who leaves.
	kept := map[string]*guest{}
	for id := range w.leavingOn(n.Node) {
		kept[id] = w.replicas[id]
		delete(w.replicas, id)
	}
	devices := w.give(q, w.nodes[n.Node])
	maps.Copy(w.replicas, kept)
	w.add(fmt.Sprintf("%s!%d", g.Key, k), q, Binding{Node: n.Node, Devices: devices}).promised = true
}

// verifyReasons: the counts by code are what one finds by asking every node. Which
// devices a nominated replica will hold is the scheduler's to choose, by what it
// learned: what its node still has for others is then known only up to that.
func (sc *scene) verifyReasons(t failer, q *wanted, p Placed) {
	counts, unknown := map[Code]int{}, 0
	for _, n := range sc.w.nodes {
		if q.node != "" && n.ID != q.node {
			continue
		}
		if sc.w.learned != nil && len(n.Facts.GetDevices()) > 0 && sc.w.promisedOn(n.ID) {
			unknown++
			continue
		}
		if codes, _ := sc.w.against(q, n, nil); codes != 0 {
			counts[codes.first()]++
		}
	}
	got := map[Code]int{}
	for _, r := range p.Refusal.Reasons {
		if r.Nodes > 0 {
			got[r.Code] = r.Nodes
		}
	}
	for code, n := range got {
		unknown -= n - counts[code]
	}
	missing := slices.ContainsFunc(slices.Collect(maps.Keys(counts)), func(c Code) bool { return got[c] < counts[c] })
	if unknown < 0 || missing {
		t.Fatalf("%v: reasons %v, want %v", q.owner, p.Refusal.Reasons, counts)
	}
}

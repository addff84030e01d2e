package schedule

import (
	"testing"

	"pgregory.net/rapid"
)

// Every proposal of the rebalancer is a place that takes the replica, in the world
// that the ones before it made, and is better; the table stays as it was.
func TestMovesAreAllowedAndBetter(t *testing.T) {
	check(t, func(t *rapid.T) {
		sc := drawScene(t)
		tab := sc.table(t, "order")
		before := show(copyResult(Schedule(tab, sc.batchFor(t))))
		moves := Moves(tab, 3, 10)
		if after := show(copyResult(Schedule(tab, sc.batchFor(t)))); after != before {
			t.Fatalf("the table is another after the question:\n%s\n%s", before, after)
		}
		t.Log(sc.dump())
		moved := map[string]bool{}
		for _, m := range moves {
			g := sc.w.replicas[m.Replica]
			if g == nil || g.Node != m.From || moved[m.Replica] || g.Leaving || g.Ended {
				t.Fatalf("%+v moves nobody that may move", m)
			}
			moved[m.Replica] = true
			delete(sc.w.replicas, m.Replica)
			q := &wanted{spec: g.spec, owner: g.owner, overhead: g.overhead, ports: g.ports}
			codes, there := sc.w.against(q, sc.w.nodes[m.To], nil)
			if codes != 0 {
				t.Fatalf("%+v: %v", m, codes)
			}
			// Where it is may refuse it by now; how it is liked still compares.
			_, here := sc.w.against(q, sc.w.nodes[m.From], nil)
			known := sc.w.pool(sc.w.nodes[m.From]).GetName() != "frag" && sc.w.pool(sc.w.nodes[m.To]).GetName() != "frag"
			if known && there.compare(here) >= 0 {
				t.Fatalf("%+v: from %+v to %+v", m, here, there)
			}
			g.Node = m.To
			sc.w.replicas[m.Replica] = g
		}
	})
}

// A queue gives every ready group once, higher priorities first, and among equals
// never to a tenant that has more while another with less waits.
func TestQueueIsFair(t *testing.T) {
	check(t, func(t *rapid.T) {
		tab := w1Table(2)
		q := NewQueue(100)
		waits := map[string]*Class{}
		weights := map[string]int32{"a": int32(rapid.IntRange(0, 3).Draw(t, "weight"))}
		for i := range rapid.IntRange(0, 12).Draw(t, "groups") {
			spec := w1Spec(nil)
			spec.Priority = int32(rapid.IntRange(0, 1).Draw(t, "priority"))
			c, err := Compile(spec, Options{Owner: Owner{pick(t, "tenant", "a", "b", "c"), "w", "r"}})
			if err != nil {
				t.Fatal(err)
			}
			key := string(rune('A' + i))
			q.Put(Waiting{Key: key, Class: c, Count: rapid.IntRange(1, 3).Draw(t, "count")})
			waits[key] = c
		}
		order := q.Take(tab, weights, 100)
		if len(order) != len(waits) {
			t.Fatalf("%d of %d are served", len(order), len(waits))
		}
		has, left := map[string]int{}, map[int32]map[string]int{0: {}, 1: {}}
		for _, c := range waits {
			left[c.Priority()][c.Owner().Tenant]++
		}
		last := int32(1)
		for _, key := range order {
			c := waits[key]
			if c.Priority() > last {
				t.Fatalf("%s of priority %d comes late", key, c.Priority())
			}
			last = c.Priority()
			mine := has[c.Owner().Tenant] / int(max(weights[c.Owner().Tenant], 1))
			for other, n := range left[last] {
				if n > 0 && has[other]/int(max(weights[other], 1)) < mine {
					t.Fatalf("%s of %s is served before %s, which has less: %v", key, c.Owner().Tenant, other, has)
				}
			}
			left[last][c.Owner().Tenant]--
			has[c.Owner().Tenant] += int(part(q.groups[key].Class.Request().CPUMilli*int64(q.groups[key].Count), tab.capacity.CPUMilli))
		}
	})
}

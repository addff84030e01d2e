package schedule

import "slices"

// This file finds places for a gang where taking the best node for each replica
// does not.

// search tries other ways to place a gang than one after the other on the best
// node. That finds one whenever there is one if at most one term binds the choice,
// and that does not bind all to where the first is; else a node that is best now may
// cost a place later. Bounded.
func (t *Table) search(u *run, start int) bool {
	near := slices.ContainsFunc(u.r.affinity, u.nearItself)
	if u.g.Node != "" || !near && u.musts() < 2 || t.faults.gangGreedy {
		return false
	}
	greedy := slices.Clone(t.work.ops[start:])
	found := near && t.searchDomains(u, start) || u.musts() > 1 && t.searchFrom(u, start)
	if !found {
		t.undo(start)
		for _, o := range greedy {
			if o.kind == occupied {
				t.begin(u, u.g, u.r)
				u.pinned(o.node)
				u.finish()
			}
		}
	}
	return found
}

// musts counts the terms that bind where replicas of one group may be together.
func (u *run) musts() int {
	n := 0
	for k := range u.r.spreads {
		if u.r.spreads[k].must() {
			n++
		}
	}
	for k := range u.r.affinity {
		if a := &u.r.affinity[k]; !a.prefer && a.scope == u.r.work {
			n++
		}
	}
	return n
}

// nearItself says that a term binds all replicas to the domain of the first.
func (u *run) nearItself(a affinityIn) bool { return !a.prefer && !a.anti && a.scope == u.r.work }

// searchDomains begins in each domain of such terms, the best first, and goes on
// from there.
func (t *Table) searchDomains(u *run, start int) bool {
	t.undo(start)
	t.begin(u, u.g, u.r)
	nodes := u.candidates(len(t.ids))
	u.finish()
	steps := maxSearch
	seen := map[string]bool{}
	for _, i := range nodes {
		domain := u.domainOf(i)
		if seen[domain] {
			continue
		}
		seen[domain] = true
		t.begin(u, u.g, u.r)
		u.pinned(i)
		u.finish()
		t.begin(u, u.g, u.r)
		placed := 1
		for placed < u.g.Count && u.more() {
			placed++
			steps--
		}
		u.finish()
		if placed == u.g.Count {
			return true
		}
		t.undo(start)
		if steps--; steps < 0 {
			return false
		}
	}
	return false
}

// domainOf names where the terms that bind all to one domain put a node.
func (u *run) domainOf(i int32) string {
	var b []byte
	for _, a := range u.r.affinity {
		if !u.nearItself(a) {
			continue
		}
		v := i
		if a.column != nil {
			v = a.column.of[i]
		}
		b = append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
	}
	return string(b)
}

// maxSearch bounds the steps of a search, and searchWidth the nodes that are tried
// at each.
const (
	maxSearch   = 2000
	searchWidth = 64
)

// searchFrom goes through the ways to place all of a gang, leaving out states that
// were seen.
func (t *Table) searchFrom(u *run, start int) bool {
	t.undo(start)
	steps := maxSearch
	seen := map[string]bool{}
	counts := map[int32]int{}
	var try func(left int) bool
	try = func(left int) bool {
		if left == 0 {
			return true
		}
		t.begin(u, u.g, u.r)
		nodes := u.candidates(searchWidth)
		u.finish()
		for _, i := range nodes {
			if steps--; steps < 0 {
				return false
			}
			counts[i]++
			if state := stateOf(counts); !seen[state] {
				seen[state] = true
				at := len(t.work.ops)
				t.begin(u, u.g, u.r)
				u.pinned(i)
				u.finish()
				if try(left - 1) {
					return true
				}
				t.undo(at)
			}
			counts[i]--
		}
		return false
	}
	if try(u.g.Count) {
		return true
	}
	t.begin(u, u.g, u.r)
	u.finish()
	return false
}

// candidates gives nodes that would take one more, best cells first, at most n.
func (u *run) candidates(n int) []int32 {
	var out []int32
	cells := slices.Clone(u.order)
	slices.SortFunc(cells, func(a, b ranked) int {
		if u.lessRank(&a, &b) {
			return -1
		}
		return 1
	})
	for _, rk := range cells {
		cl := &u.x.cells[rk.cell]
		for _, o := range cl.own {
			out = append(out, o.node)
		}
		if !u.only {
			for _, i := range cl.heap {
				if u.check(i) == 0 {
					out = append(out, i)
				}
				if len(out) >= 4*n {
					break
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b int32) int {
		if u.t.before(a, b) {
			return -1
		}
		return 1
	})
	return out[:min(len(out), n)]
}

func stateOf(counts map[int32]int) string {
	var b []byte
	for _, i := range sortedKeys(counts) {
		if n := counts[i]; n > 0 {
			b = append(b, byte(i), byte(i>>8), byte(i>>16), byte(i>>24), byte(n), byte(n>>8))
		}
	}
	return string(b)
}

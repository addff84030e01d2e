package schedule

import "slices"

// faults are bugs that tests plant, to see that the properties catch them. Always
// zero outside of tests.
type faults struct {
	taintIgnored     bool // taints keep nobody away
	skewOffByOne     bool // one more than the skew allows
	reservedIgnored  bool // what a pool reserves is promised as well
	modelIgnored     bool // a replica gets devices of any model
	portIgnored      bool // two replicas have one port of a node
	avoidersIgnored  bool // one that others keep away from comes near them
	spreadReversed   bool // pools that spread pack, and the other way round
	cellsStale       bool // what a replica changes for other domains is not looked at
	gangPartly       bool // those of a gang that have room are bound
	gangGreedy       bool // a gang is placed one after the other, or not at all
	undoForgets      bool // what was placed keeps its address when the batch is decided
	budgetIgnored    bool // victims know no budget
	equalsDisplaced  bool // victims may be of the same priority
	victimElsewhere  bool // room is made on one node, and kept on another
	victimSpared     bool // one victim too few
	victimTooMany    bool // one victim too many
	dearVictims      bool // of sets of victims the most valuable is taken
	tollsOnce        bool // what a victim changes for other nodes is not looked at
	fragmentReversed bool // the node that loses most is taken
}

// plantVictims spoils the victims that were chosen for a nomination.
func (t *Table) plantVictims(n *Nomination) {
	v := &t.work.victims
	switch f := &t.faults; {
	case f.victimElsewhere:
		n.Node = t.ids[(int(t.index[n.Node])+1)%len(t.ids)]
	case f.victimSpared && len(v.best) > 0:
		v.best = v.best[1:]
	case f.victimTooMany:
		for _, r := range v.candidates {
			if !slices.Contains(v.best, r) {
				v.best = append(v.best, r)
				return
			}
		}
	}
}

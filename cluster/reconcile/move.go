package reconcile

import (
	"slices"
)

// moveBudget is how many replicas the rebalancer may still move: its rate, less
// all that was disrupted within the hour and what it has begun. A cluster that was
// shaken by drains is not shaken more for a gain.
func (in Input) moveBudget() int {
	n := int(in.Rebalance.GetMaxMovesPerHour())
	if in.faults.movesUnlimited {
		return len(in.Moves)
	}
	for _, st := range in.States {
		n -= len(recentDisruptions(st, in.Now))
	}
	for _, a := range in.Allocations {
		if a.GetDisrupted() && !a.GetStop() && in.Allocations[a.GetReplacedBy()] != nil {
			n--
		}
	}
	return n
}

// proposeLeaving marks the replicas that no longer fit their nodes.
func (p *planner) proposeLeaving(rs []*replica) {
	for _, r := range rs {
		if m, ok := p.proposed[r.GetAllocation()]; ok && m.Code != Rebalance && r.active() && r.leave == nil {
			r.leave = &leaving{code: m.Code, reason: "it no longer fits its node: " + m.Reason, budgeted: true, node: m.Node}
		}
	}
}

// acceptMove lets a replica leave for a better node when the workload is otherwise
// settled, its budget allows it and the rebalancer's rate does. One at a time: the
// next one when this one is done.
func (p *planner) acceptMove(k Key, d desired, b *budget, keep map[string][]*replica, leave *[]*replica) {
	if len(p.proposed) == 0 || p.moves <= 0 || len(*leave) > 0 || d.frozen || b.left <= 0 || len(p.in.Pending[k]) > 0 {
		return
	}
	for _, want := range d.revisions {
		have := keep[want.GetRevision()]
		if len(have) < int(want.GetReplicas()) || slices.ContainsFunc(have, func(r *replica) bool { return !r.available }) {
			return
		}
	}
	for _, want := range d.revisions {
		have := keep[want.GetRevision()]
		i := slices.IndexFunc(have, func(r *replica) bool { return p.proposed[r.GetAllocation()].Code == Rebalance })
		if i < 0 {
			continue
		}
		r := have[i]
		m := p.proposed[r.GetAllocation()]
		r.leave = &leaving{code: Rebalance, reason: m.Reason, budgeted: true, node: m.Node}
		keep[want.GetRevision()] = slices.Delete(have, i, i+1)
		*leave = append(*leave, r)
		p.moves--
		return
	}
}

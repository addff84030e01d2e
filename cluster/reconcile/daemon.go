package reconcile

import (
	"fmt"
	"maps"
	"slices"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// daemon keeps one replica of the current revision on every node that admits it.
// An old one is stopped before the new one begins: two of them, gateways above
// all, cannot share a node. From a node that is drained it leaves last: the others
// there may need it.
func (p *planner) daemon(k Key, w Workload, d desired, rs []*replica) {
	byNode := map[string][]*replica{}
	for _, r := range rs {
		byNode[r.GetNode()] = append(byNode[r.GetNode()], r)
	}
	spare := max(1, d.down)
	admission := map[string]Admission{}
	total := 0
	for id, n := range p.in.Nodes {
		if n.lost() {
			continue
		}
		admission[id] = p.in.admission(n.Record, d.current.GetSpec())
		if admission[id] != Admitted {
			continue
		}
		total++
		if !slices.ContainsFunc(byNode[id], d.holds) {
			spare--
		}
	}
	b := p.budget(k, d, total, rs)
	at := daemonPass{k: k, w: w, d: d, b: b, spare: spare}
	for _, id := range slices.Sorted(maps.Keys(admission)) {
		p.daemonOn(&at, p.in.Nodes[id].Record, admission[id], byNode[id])
	}
	p.plan.Allowances[k] = max(0, b.left)
	if _, halted := p.plan.Halted[k]; !halted && (at.old > 0 || at.missing > 0) && !d.frozen {
		p.overdue(k, w, d, rs, fmt.Sprintf("%d replicas are available, %d are to go", at.available, at.old))
	}
}

// daemonPass is what one pass over the nodes knows and counts.
type daemonPass struct {
	k     Key
	w     Workload
	d     desired
	b     *budget
	spare int // ready ones that may still be taken
	// old replicas that are to go, right ones that are available, and nodes where a
	// right one never got ready.
	old, available, missing int
}

// holds says that its node counts as served: by a new daemon once it is available,
// by an old one while it is ready.
func (d desired) holds(r *replica) bool {
	return r.active() && r.ready && (r.available || !r.of(d.current))
}

// vacates says that a daemon is to leave a node that is drained: when nothing else
// is on it, or its deadline is over.
func (p *planner) vacates(n *clusterv1.Node) bool {
	if n.GetMode() != portolanv1.NodeMode_NODE_MODE_DRAINING {
		return false
	}
	if end := n.GetDrainDeadline(); end != nil {
		if !p.in.Now.Before(end.AsTime()) {
			return true
		}
		p.wakeAt(end.AsTime())
	}
	return p.occupied[n.GetNode()] == 0
}

// daemonOn brings one node to the desired state.
func (p *planner) daemonOn(at *daemonPass, n *clusterv1.Node, admission Admission, on []*replica) {
	var right []*replica
	live, vacates := 0, p.vacates(n)
	until, _ := endured(n, at.d.current.GetSpec())
	p.wakeAt(until)
	for _, r := range on {
		if r.live() {
			live++
		}
		switch {
		case !r.active():
		case vacates:
			p.drainNote(at.k, Note{Leaving, fmt.Sprintf("%s: its node is drained", r.GetAllocation())})
			p.stop(at.k, r, NodeDraining, "its node is drained, and nothing else is left on it")
		case p.unfit(at, r) && admission != Refused:
		case r.of(at.d.current) && admission != Refused:
			right = append(right, r)
		case admission != Refused && at.d.frozen && r.mine:
		default:
			at.old++
			p.daemonOld(at, admission, r)
		}
	}
	slices.SortFunc(right, better)
	for i, r := range right {
		switch {
		case i > 0:
			p.stop(at.k, r, Surplus, right[0].GetAllocation()+" runs on the node already")
		case r.available:
			at.available++
		case !r.mute && r.status.GetTimeline().GetReady() == nil:
			at.missing++ // one that was ready before fails for another reason than the update
		}
	}
	if live == 0 && admission == Admitted && len(p.in.Pending[at.k]) > 0 {
		at.missing++ // where it found room it is only about to begin
	}
	if live == 0 && admission == Admitted {
		p.step(Step{Kind: Create, Key: at.k, Workload: at.w, Revision: at.d.current, Node: n.GetNode(), Code: NodeEligible, Reason: "one replica runs on every node that admits it"})
	}
}

// unfit takes a replica off a node that it no longer fits, as far as its budget
// goes, and says whether it did.
func (p *planner) unfit(at *daemonPass, r *replica) bool {
	m, ok := p.proposed[r.GetAllocation()]
	if !ok || m.Code == Rebalance {
		return false
	}
	r.leave = &leaving{code: m.Code, reason: "it no longer fits its node: " + m.Reason, budgeted: true}
	return p.leaveNode(at.k, desired{}, at.b, r)
}

// daemonOld stops a replica that is not the right one, or may not be there.
func (p *planner) daemonOld(at *daemonPass, admission Admission, r *replica) {
	if (r.ready || r.mute) && admission != Refused {
		if at.spare <= 0 {
			return
		}
		at.spare--
	}
	code, reason := p.whyLeave(at.d, r)
	if admission == Refused {
		code, reason = NodeRefuses, "its node does not admit it"
	}
	p.stop(at.k, r, code, reason)
}

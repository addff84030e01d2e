package reconcile

import (
	"fmt"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// keepers splits the active replicas into those that fill the desired numbers,
// by revision, and those that leave, worst first.
func keepers(d desired, rs []*replica) (keep map[string][]*replica, leave []*replica) {
	keep = map[string][]*replica{}
	byRevision := map[string][]*replica{}
	for _, r := range rs {
		if r.active() {
			rev := r.GetRevision()
			if !r.mine || r.outdated {
				rev = ""
			}
			byRevision[rev] = append(byRevision[rev], r)
		}
	}
	for _, want := range d.revisions {
		have := byRevision[want.GetRevision()]
		delete(byRevision, want.GetRevision())
		slices.SortFunc(have, better)
		for i, r := range have {
			// What has a successor is there once too often because of that, and not
			// because fewer are wanted.
			r.surplus = i >= int(want.GetReplicas()) && !r.moved
			if !r.surplus && r.leave == nil {
				keep[want.GetRevision()] = append(keep[want.GetRevision()], r)
			} else {
				leave = append(leave, r)
			}
		}
	}
	for _, have := range byRevision {
		for _, r := range have {
			r.surplus = true
			leave = append(leave, r)
		}
	}
	slices.SortFunc(leave, func(a, b *replica) int { return better(b, a) })
	return keep, leave
}

// service rolls a workload of interchangeable replicas towards what is desired.
func (p *planner) service(k Key, w Workload, d desired, rs []*replica) {
	p.proposeLeaving(rs)
	p.in.setCrowds(d.current.GetSpec(), rs)
	keep, leave := keepers(d, rs)
	b := p.budget(k, d, d.total, rs)
	p.acceptMove(k, d, b, keep, &leave)
	p.createMissing(k, w, d, b, rs, keep, leave)
	p.stopLeaving(k, d, b, keep, leave)
	p.plan.Allowances[k] = max(0, b.left)
	p.progress(k, w, d, rs, keep, leave)
}

// budget is the disruption budget of a workload of which so many should be there.
func (p *planner) budget(k Key, d desired, total int, rs []*replica) *budget {
	available := 0
	for _, r := range rs {
		if r.active() && r.available {
			available++
		}
	}
	return p.in.budgetOf(k, d.uid, d.current.GetSpec().GetDisruption(), total, available)
}

// createMissing creates what lacks, as far as live replicas stay within desired
// plus surge: first what nobody had, then for replicas that are to leave, last for
// lost ones, whose rate holds up nothing else.
func (p *planner) createMissing(k Key, w Workload, d desired, b *budget, rs []*replica, keep map[string][]*replica, leave []*replica) {
	replaceable := p.in.mayReplace(d.current.GetSpec())
	room := d.total + d.surge + off(p.in.faults.surgeOffByOne)
	for _, r := range rs {
		if r.live() || (r.lost && r.Final == nil && !replaceable) {
			room--
		}
	}
	for _, want := range d.revisions {
		need := int(want.GetReplicas()) - len(keep[want.GetRevision()])
		lost := lostOf(want, rs)
		if !replaceable && len(lost) > 0 {
			p.plan.Waiting[k] = Note{ReplicaNodeLost, fmt.Sprintf("%s is on a node that is lost, and may live on: at most one may run", lost[0].GetAllocation())}
		}
		leavers := leaversOf(want, leave)
		p.plan.Steps = slices.Grow(p.plan.Steps, max(0, min(need, room)))
		for i := 0; i < need && room > 0; i++ {
			s := Step{Kind: Create, Key: k, Workload: w, Revision: want, Index: int32(i), Code: ScaleUp, Reason: fmt.Sprintf("%d of %d replicas are there", int(want.GetReplicas())-need+i, want.GetReplicas())}
			if want == d.current && !d.frozen && hasOther(rs, want) {
				s.Code = NewRevision
			}
			switch left := need - i; {
			case left <= len(lost):
				if !p.replace(k, &s, lost[len(lost)-left]) {
					continue // its place stays empty, and the next may be in another zone
				}
			case left <= len(lost)+len(leavers):
				r := leavers[len(lost)+len(leavers)-left]
				if r.leave.budgeted && !r.leave.force && b.barred {
					continue // it may not go now, so nothing has to take its place
				}
				s.Allocation, s.Disrupt, s.Node = r.GetAllocation(), true, r.leave.node
				s.Code, s.Reason = r.leave.code, r.leave.reason
			}
			p.step(s)
			room--
		}
	}
}

// lostOf are the replicas of a revision on lost nodes that nobody replaced.
func lostOf(want *linkv1.RevisionIntent, rs []*replica) []*replica {
	var out []*replica
	for _, r := range rs {
		if r.lost && r.of(want) && !r.Stop && r.Final == nil && !r.replaced {
			out = append(out, r)
		}
	}
	return out
}

// leaversOf are the replicas of a revision that leave their nodes and nobody
// replaced, the worst last: the first ones are replaced first.
func leaversOf(want *linkv1.RevisionIntent, leave []*replica) []*replica {
	var out []*replica
	for _, r := range leave {
		if r.leave != nil && !r.surplus && !r.replaced && r.of(want) {
			out = append(out, r)
		}
	}
	slices.Reverse(out)
	return out
}

// stopLeaving stops what is too much, and what leaves its node: freely what is
// known not to be ready, the rest as far as enough replicas stay ready.
func (p *planner) stopLeaving(k Key, d desired, b *budget, keep map[string][]*replica, leave []*replica) {
	spare := d.down - d.total + off(p.in.faults.spareOffByOne)
	for _, rs := range keep {
		for _, r := range rs {
			if r.available {
				spare++
			}
		}
	}
	for _, r := range leave {
		if r.ready {
			spare++
		}
	}
	for _, r := range leave {
		serves := r.ready || r.mute
		if r.leave != nil && r.leave.budgeted && (!r.surplus || (serves && spare <= 0)) {
			if p.leaveNode(k, d, b, r) && r.ready {
				spare--
			}
			continue
		}
		if serves {
			if spare <= 0 {
				continue
			}
			if r.ready {
				spare--
			}
			b.left--
		}
		code, reason := p.whyLeave(d, r)
		p.stop(k, r, code, reason)
	}
}

// leaveNode takes a replica off its node when its budget allows it, and says
// whether it did. Its replacement comes first, where one can be had.
func (p *planner) leaveNode(k Key, d desired, b *budget, r *replica) bool {
	serves := r.ready || r.mute
	first := (r.replaced || (d.surge > 0 && len(p.in.Pending[k]) == 0)) && !p.in.faults.replacementLast
	switch {
	case r.leave.force || !serves:
	case b.barred:
		p.drainNote(k, Note{b.note.Code, fmt.Sprintf("%s: %s; %s", r.GetAllocation(), r.leave.reason, b.note.Message)})
		p.wakeAt(b.change)
		return false
	case first && !p.successorAvailable(r, d):
		p.drainNote(k, Note{ReplacementFirst, fmt.Sprintf("%s: %s; it goes when its replacement is available", r.GetAllocation(), r.leave.reason)})
		return false
	case b.left <= 0:
		p.drainNote(k, Note{b.note.Code, fmt.Sprintf("%s: %s; %s", r.GetAllocation(), r.leave.reason, b.note.Message)})
		return false
	}
	p.drainNote(k, Note{Leaving, fmt.Sprintf("%s: %s", r.GetAllocation(), r.leave.reason)})
	p.disrupt(k, r, b, r.leave.code, r.leave.reason)
	return true
}

// drainNote keeps the first note of a workload.
func (p *planner) drainNote(k Key, n Note) {
	if _, ok := p.plan.Draining[k]; !ok {
		p.plan.Draining[k] = n
	}
}

// successorAvailable says that what took a replica's place is available.
func (p *planner) successorAvailable(r *replica, d desired) bool {
	by := p.in.Allocations[r.GetReplacedBy()]
	n := p.in.Nodes[by.GetNode()]
	if by == nil || by.GetStop() || n.lost() || !n.Observed {
		return false
	}
	st := n.Allocations[by.GetAllocation()]
	next := &replica{Allocation: by, status: st}
	if !st.GetReady() {
		return false
	}
	at := availableAt(next, d.minReady)
	p.wakeAt(at)
	return !p.in.Now.Before(at)
}

func (p *planner) whyLeave(d desired, r *replica) (code, reason string) {
	listed := slices.ContainsFunc(d.revisions, func(x *linkv1.RevisionIntent) bool { return x.GetRevision() == r.GetRevision() })
	switch {
	case !r.mine:
		return RevisionReplaced, "it belongs to an earlier workload of the same name"
	case !listed:
		return RevisionReplaced, fmt.Sprintf("revision %s makes way for %s", r.GetRevision(), d.current.GetRevision())
	case r.outdated:
		return RevisionReplaced, fmt.Sprintf("the template of revision %s is another one here now", r.GetRevision())
	case r.leave != nil:
		return r.leave.code, r.leave.reason
	case r.replaced:
		return Surplus, fmt.Sprintf("%s took its place while its node was lost", r.GetReplacedBy())
	}
	if id := p.replacedFor[r.GetAllocation()]; id != "" {
		return Surplus, fmt.Sprintf("%s, which it replaced, is back", id)
	}
	return ScaleDown, "fewer replicas are wanted"
}

// progress notes an update that gets nowhere. What leaves its node for another
// reason is not part of it.
func (p *planner) progress(k Key, w Workload, d desired, rs []*replica, keep map[string][]*replica, leave []*replica) {
	available, through, going := 0, 0, 0
	count := func(r *replica) {
		if r.available {
			available++
		}
		if r.through() {
			through++
		}
	}
	for _, have := range keep {
		for _, r := range have {
			count(r)
		}
	}
	for _, r := range leave {
		if r.surplus {
			going++
		} else {
			count(r)
		}
	}
	_, halted := p.plan.Halted[k]
	_, waiting := p.plan.Waiting[k]
	if halted || waiting || d.frozen || (through >= d.total && going == 0) {
		return
	}
	p.overdue(k, w, d, rs, fmt.Sprintf("%d of %d replicas are available, %d are to go", available, d.total, going))
}

// through says that a replica is no matter of an update any more: it got ready once,
// and what befalls it later is told as such; or its node is not heard yet by this
// process, and it is believed to be as it was.
func (r *replica) through() bool {
	return r.available || r.mute || r.status.GetTimeline().GetReady() != nil
}

// overdue notes that nothing got on for the progress deadline.
func (p *planner) overdue(k Key, w Workload, d desired, rs []*replica, what string) {
	until := lastProgress(w, rs).Add(d.deadline)
	if p.in.Now.Before(until) {
		p.wakeAt(until)
		return
	}
	p.plan.Halted[k] = Note{NoProgress, fmt.Sprintf("revision %s: no progress for %v: %s", d.current.GetRevision(), d.deadline, what)}
}

// lastProgress is the newest trace of something getting on: the intent came, a
// replica was bound or became ready, one was told to stop.
func lastProgress(w Workload, rs []*replica) time.Time {
	last := w.Committed
	for _, r := range rs {
		last = later(last, r.GetBound().AsTime())
		if r.GetStopTime() != nil {
			last = later(last, r.GetStopTime().AsTime())
		}
		if at := r.status.GetTimeline().GetReady(); at != nil {
			last = later(last, at.AsTime())
		}
	}
	return last
}

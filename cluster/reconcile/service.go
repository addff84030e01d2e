package reconcile

import (
	"fmt"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const defaultProgressDeadline = 10 * time.Minute

// desired is an intent, with its defaults.
type desired struct {
	kind portolanv1.WorkloadKind
	// current is the revision whose spec says how; nil when nothing is wanted.
	current   *linkv1.RevisionIntent
	revisions []*linkv1.RevisionIntent // the current one first
	total     int
	surge     int
	down      int // max_unavailable
	minReady  time.Duration
	deadline  time.Duration
}

func desiredOf(w Workload) desired {
	var d desired
	for _, r := range w.Intent.GetRevisions() {
		d.total += int(r.GetReplicas())
		if r.GetRevision() == w.Intent.GetCurrentRevision() {
			d.current = r
			d.revisions = slices.Insert(d.revisions, 0, r)
		} else {
			d.revisions = append(d.revisions, r)
		}
	}
	if d.current == nil && len(d.revisions) > 0 {
		d.current = d.revisions[0]
	}
	spec := d.current.GetSpec()
	d.kind = spec.GetKind()
	u := spec.GetUpdate()
	d.surge, d.down = int(u.GetMaxSurge()), int(u.GetMaxUnavailable())
	if d.surge == 0 && d.down == 0 {
		d.surge = 1 // with neither, no replica could ever be replaced
	}
	d.minReady = u.GetMinReady().AsDuration()
	d.deadline = defaultProgressDeadline
	if u.GetProgressDeadline() != nil {
		d.deadline = u.GetProgressDeadline().AsDuration()
	}
	return d
}

// keepers splits the active replicas into those that fill the desired numbers,
// by revision, and those that leave, worst first.
func keepers(d desired, rs []*replica) (keep map[string][]*replica, leave []*replica) {
	keep = map[string][]*replica{}
	byRevision := map[string][]*replica{}
	for _, r := range rs {
		if r.active() {
			rev := r.GetRevision()
			if !r.mine {
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
			if i < int(want.GetReplicas()) && !r.refused {
				keep[want.GetRevision()] = append(keep[want.GetRevision()], r)
			} else {
				leave = append(leave, r)
			}
		}
	}
	for _, have := range byRevision {
		leave = append(leave, have...)
	}
	slices.SortFunc(leave, func(a, b *replica) int { return better(b, a) })
	return keep, leave
}

// service rolls a workload of interchangeable replicas towards what is desired.
func (p *planner) service(k Key, w Workload, d desired, rs []*replica) {
	keep, leave := keepers(d, rs)
	p.createMissing(k, w, d, rs, keep)
	p.stopLeaving(k, d, keep, leave)
	p.progress(k, w, d, rs, keep, leave)
}

// createMissing creates what lacks, as far as live replicas stay within desired
// plus surge.
func (p *planner) createMissing(k Key, w Workload, d desired, rs []*replica, keep map[string][]*replica) {
	room := d.total + d.surge
	for _, r := range rs {
		if r.live() {
			room--
		}
	}
	for _, want := range d.revisions {
		need := int(want.GetReplicas()) - len(keep[want.GetRevision()])
		lost := lostOf(want.GetRevision(), rs)
		for i := 0; i < need && room > 0; i++ {
			s := Step{Kind: Create, Key: k, Workload: w, Revision: want, Index: int32(i), Code: ScaleUp, Reason: fmt.Sprintf("%d of %d replicas are there", int(want.GetReplicas())-need+i, want.GetReplicas())}
			if want == d.current && hasOther(rs, want.GetRevision()) {
				s.Code = NewRevision
			}
			// Replacements come last: their rate holds up nothing else.
			if left := need - i; left <= len(lost) && !p.replace(&s, lost[len(lost)-left]) {
				break
			}
			p.step(s)
			room--
		}
	}
}

// replace makes a step the replacement of a lost replica; false when the rate
// does not allow it now.
func (p *planner) replace(s *Step, lost *replica) bool {
	if p.replaceable <= 0 {
		p.wakeAt(p.in.Now.Add(replaceWindow / 10))
		return false
	}
	p.replaceable--
	s.Code, s.Allocation = NodeLost, lost.GetAllocation()
	s.Reason = fmt.Sprintf("the node of %s is lost", lost.GetAllocation())
	return true
}

func hasOther(rs []*replica, revision string) bool {
	return slices.ContainsFunc(rs, func(r *replica) bool { return r.active() && (!r.mine || r.GetRevision() != revision) })
}

// lostOf are the replicas of a revision on lost nodes that nobody replaced.
func lostOf(revision string, rs []*replica) []*replica {
	var out []*replica
	for _, r := range rs {
		if r.lost && r.mine && !r.Stop && r.Final == nil && !r.replaced && r.GetRevision() == revision {
			out = append(out, r)
		}
	}
	return out
}

// stopLeaving stops what is too much: freely what is known not to be ready, the
// rest as far as enough replicas stay ready.
func (p *planner) stopLeaving(k Key, d desired, keep map[string][]*replica, leave []*replica) {
	spare := d.down - d.total
	for _, rs := range keep {
		for _, r := range rs {
			if r.available {
				spare++
			} else if r.ready {
				p.wakeAt(availableAt(r, d.minReady))
			}
		}
	}
	for _, r := range leave {
		if r.ready {
			spare++
		}
	}
	for _, r := range leave {
		if r.ready || r.mute {
			if spare <= 0 {
				continue
			}
			if r.ready {
				spare--
			}
		}
		code, reason := p.whyLeave(d, r)
		p.stop(k, r, code, reason)
	}
}

func (p *planner) whyLeave(d desired, r *replica) (code, reason string) {
	listed := slices.ContainsFunc(d.revisions, func(x *linkv1.RevisionIntent) bool { return x.GetRevision() == r.GetRevision() })
	switch {
	case !r.mine:
		return RevisionReplaced, "it belongs to an earlier workload of the same name"
	case !listed:
		return RevisionReplaced, fmt.Sprintf("revision %s makes way for %s", r.GetRevision(), d.current.GetRevision())
	case r.refused:
		return NodeRefuses, "its node has a taint that it does not tolerate"
	case r.replaced:
		return Surplus, fmt.Sprintf("%s took its place while its node was lost", r.GetReplacedBy())
	}
	for id, other := range p.in.Allocations {
		if other.GetReplacedBy() == r.GetAllocation() {
			return Surplus, fmt.Sprintf("%s, which it replaced, is back", id)
		}
	}
	return ScaleDown, "fewer replicas are wanted"
}

// progress notes an update that gets nowhere.
func (p *planner) progress(k Key, w Workload, d desired, rs []*replica, keep map[string][]*replica, leave []*replica) {
	available := 0
	for _, have := range keep {
		for _, r := range have {
			if r.available {
				available++
			}
		}
	}
	if available >= d.total && len(leave) == 0 {
		return
	}
	until := lastProgress(w, rs).Add(d.deadline)
	if p.in.Now.Before(until) {
		p.wakeAt(until)
		return
	}
	p.plan.Halted[k] = fmt.Sprintf("no progress for %v: %d of %d replicas are available, %d are to go", d.deadline, available, d.total, len(leave))
}

// lastProgress is the newest trace of something getting on: the intent came, a
// replica was bound or became ready, one was told to stop.
func lastProgress(w Workload, rs []*replica) time.Time {
	last := w.Committed
	later := func(t time.Time) {
		if t.After(last) {
			last = t
		}
	}
	for _, r := range rs {
		later(r.GetBound().AsTime())
		if r.GetStopTime() != nil {
			later(r.GetStopTime().AsTime())
		}
		if at := r.status.GetTimeline().GetReady(); at != nil {
			later(at.AsTime())
		}
	}
	return last
}

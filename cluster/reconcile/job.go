package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const defaultRetries = 6

// jobState is how far a job is.
type jobState struct {
	completions, parallelism int
	retries                  int
	deadline                 time.Duration
	succeeded                map[int32]bool
	failures                 map[int32]int
	lastFailure              map[int32]time.Time
	failed                   int
	live                     int
	start                    time.Time
}

// jobOf counts what the replicas of the current revision have come to. The
// completions of this cluster are the revision's replicas where it says so, else
// the job's own.
func jobOf(d desired, rs []*replica) jobState {
	spec := d.current.GetSpec().GetJob()
	j := jobState{
		completions: max(1, int(spec.GetCompletions())), parallelism: max(1, int(spec.GetParallelism())), retries: defaultRetries,
		deadline: spec.GetDeadline().AsDuration(), succeeded: map[int32]bool{}, failures: map[int32]int{}, lastFailure: map[int32]time.Time{},
	}
	if n := int(d.current.GetReplicas()); n > 0 {
		j.completions = n
	}
	if spec != nil && spec.MaxRetries != nil {
		j.retries = int(spec.GetMaxRetries())
	}
	for _, r := range rs {
		if r.live() {
			j.live++
		}
		if !r.mine || r.GetRevision() != d.current.GetRevision() {
			continue
		}
		if at := r.GetBound().AsTime(); j.start.IsZero() || at.Before(j.start) {
			j.start = at
		}
		switch r.Final.GetState() {
		case portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED:
			j.succeeded[r.GetIndex()] = true
		case portolanv1.ReplicaState_REPLICA_STATE_FAILED:
			j.failed++
			j.failures[r.GetIndex()]++
			if at := r.GetEndTime().AsTime(); at.After(j.lastFailure[r.GetIndex()]) {
				j.lastFailure[r.GetIndex()] = at
			}
		default: // not final
		}
	}
	return j
}

func (j jobState) complete() bool { return len(j.succeeded) >= j.completions }

// over says that the job failed, and why.
func (j jobState) over(now time.Time) (string, bool) {
	switch {
	case j.complete():
		return "", false
	case j.failed > j.retries:
		return fmt.Sprintf("%d replicas failed, %d retries are allowed", j.failed, j.retries), true
	case j.deadline > 0 && !j.start.IsZero() && !now.Before(j.start.Add(j.deadline)):
		return fmt.Sprintf("it is not done %v after its first replica began", j.deadline), true
	}
	return "", false
}

// job runs replicas until enough of them succeeded.
func (p *planner) job(k Key, w Workload, d desired, rs []*replica) {
	for _, r := range rs {
		if !r.Stop && (!r.mine || r.GetRevision() != d.current.GetRevision()) {
			p.stop(k, r, RevisionReplaced, fmt.Sprintf("revision %s makes way for %s", r.GetRevision(), d.current.GetRevision()))
		}
	}
	p.finish(k, rs)
	p.trimHistory(k, rs)
	j := jobOf(d, rs)
	why, failed := j.over(p.in.Now)
	if j.complete() || failed {
		code, reason := JobComplete, "the job is complete"
		if failed {
			code, reason = JobFailed, "the job failed: "+why
		}
		for _, r := range rs {
			if r.Final == nil && !r.Stop {
				p.stop(k, r, code, reason)
			}
		}
		return
	}
	if j.deadline > 0 && !j.start.IsZero() {
		p.wakeAt(j.start.Add(j.deadline))
	}
	p.runIndexes(k, w, d, j, rs)
}

// finish keeps the end of replicas that came to one by themselves.
func (p *planner) finish(k Key, rs []*replica) {
	for _, r := range rs {
		if r.Final != nil || r.Stop || r.status == nil || r.lost {
			continue
		}
		st := r.status.GetState()
		if st != portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED && st != portolanv1.ReplicaState_REPLICA_STATE_FAILED {
			continue
		}
		p.step(Step{Kind: Finish, Key: k, Code: ReplicaFinished, Reason: "the replica came to its end", Allocation: r.GetAllocation(), Final: r.status})
		done := stopped(r.Allocation)
		done.Stop, done.Final, done.EndTime = false, r.status, timestamp(p.in.Now)
		r.Allocation = done
	}
}

// trimHistory takes all but the newest finished replicas off their nodes; their
// records stay.
func (p *planner) trimHistory(k Key, rs []*replica) {
	var done []*replica
	for _, r := range rs {
		if r.Final != nil && !r.Stop {
			done = append(done, r)
		}
	}
	slices.SortFunc(done, func(a, b *replica) int {
		return cmp.Or(b.GetEndTime().AsTime().Compare(a.GetEndTime().AsTime()), cmp.Compare(a.GetAllocation(), b.GetAllocation()))
	})
	for _, r := range done[min(keepFinished, len(done)):] {
		p.stop(k, r, HistoryLimit, fmt.Sprintf("%d newer replicas of the job have finished", keepFinished))
	}
}

// runIndexes keeps one replica running for each of the lowest unfinished
// indexes, as many as may run at a time.
func (p *planner) runIndexes(k Key, w Workload, d desired, j jobState, rs []*replica) {
	running, lost := map[int32][]*replica{}, map[int32]*replica{}
	for _, r := range rs {
		switch {
		case r.active():
			running[r.GetIndex()] = append(running[r.GetIndex()], r)
		case r.lost && !r.Stop && r.Final == nil:
			if !r.replaced {
				lost[r.GetIndex()] = r
			}
		}
	}
	for _, same := range running {
		slices.SortFunc(same, better)
	}
	room := j.parallelism - j.live
	for i := range int32(j.completions) {
		same := running[i]
		if j.succeeded[i] {
			for _, r := range same {
				p.stop(k, r, JobComplete, fmt.Sprintf("another replica of index %d succeeded", i))
			}
			continue
		}
		if len(same) > 0 {
			for _, r := range same[1:] {
				p.stop(k, r, Surplus, fmt.Sprintf("%s runs index %d already", same[0].GetAllocation(), i))
			}
			continue
		}
		if room <= 0 {
			continue
		}
		if p.runIndex(k, w, d, j, i, lost[i]) {
			room--
		}
	}
}

func (p *planner) runIndex(k Key, w Workload, d desired, j jobState, i int32, lost *replica) bool {
	s := Step{Kind: Create, Key: k, Workload: w, Revision: d.current, Index: i, Code: JobReplica, Reason: fmt.Sprintf("index %d of %d is to be done", i, j.completions)}
	if n := j.failures[i]; n > 0 {
		at := j.lastFailure[i].Add(backoff(n))
		if p.in.Now.Before(at) {
			p.wakeAt(at)
			return false
		}
		s.Code, s.Reason = JobRetry, fmt.Sprintf("index %d failed %d times", i, n)
	}
	if lost != nil && !p.replace(&s, lost) {
		return false
	}
	p.step(s)
	return true
}

// backoff is the wait after the n-th failure.
func backoff(n int) time.Duration {
	d := retryBase
	for ; n > 1 && d < retryMax; n-- {
		d *= 2
	}
	return min(d, retryMax)
}

// daemon keeps one replica of the current revision on every node that admits it.
// An old one is stopped before the new one begins: two of them, gateways above
// all, cannot share a node.
func (p *planner) daemon(k Key, w Workload, d desired, rs []*replica) {
	byNode := map[string][]*replica{}
	for _, r := range rs {
		byNode[r.GetNode()] = append(byNode[r.GetNode()], r)
	}
	spare := max(1, d.down)
	admission := map[string]Admission{}
	for id, n := range p.in.Nodes {
		if n.lost() {
			continue
		}
		admission[id] = Admitted
		if p.in.Admit != nil {
			admission[id] = p.in.Admit(n.Record, d.current.GetSpec())
		}
		up := slices.ContainsFunc(byNode[id], func(r *replica) bool { return r.active() && r.ready })
		if !up && admission[id] == Admitted {
			spare--
		}
	}
	old, ready := 0, 0
	for _, id := range slices.Sorted(maps.Keys(admission)) {
		o, up := p.daemonOn(k, w, d, p.in.Nodes[id].Record, admission[id], byNode[id], &spare)
		old += o
		ready += up
	}
	if old > 0 {
		p.daemonProgress(k, w, d, rs, ready, old)
	}
}

// daemonOn brings one node to the desired state. It gives the number of old
// replicas, and 1 when the right one is available.
func (p *planner) daemonOn(k Key, w Workload, d desired, n *clusterv1.Node, admission Admission, on []*replica, spare *int) (old, ready int) {
	var right []*replica
	live := 0
	for _, r := range on {
		if r.live() {
			live++
		}
		if !r.active() {
			continue
		}
		if r.mine && r.GetRevision() == d.current.GetRevision() && admission != Refused {
			right = append(right, r)
			continue
		}
		old++
		if (r.ready || r.mute) && admission != Refused {
			if *spare <= 0 {
				continue
			}
			*spare--
		}
		code, reason := p.whyLeave(d, r)
		if admission == Refused {
			code, reason = NodeRefuses, "its node does not admit it"
		}
		p.stop(k, r, code, reason)
	}
	slices.SortFunc(right, better)
	for i, r := range right {
		if i > 0 {
			p.stop(k, r, Surplus, right[0].GetAllocation()+" runs on the node already")
		} else if r.available {
			ready = 1
		}
	}
	if live == 0 && admission == Admitted {
		p.step(Step{Kind: Create, Key: k, Workload: w, Revision: d.current, Node: n.GetNode(), Code: NodeEligible, Reason: "one replica runs on every node that admits it"})
	}
	return old, ready
}

func (p *planner) daemonProgress(k Key, w Workload, d desired, rs []*replica, ready, old int) {
	until := lastProgress(w, rs).Add(d.deadline)
	if p.in.Now.Before(until) {
		p.wakeAt(until)
		return
	}
	p.plan.Halted[k] = fmt.Sprintf("no progress for %v: %d replicas are available, %d are to go", d.deadline, ready, old)
}

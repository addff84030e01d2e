package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const defaultRetries = 6

// Codes of the end of a job.
const (
	retriesExhausted = "RetriesExhausted"
	deadlineExceeded = "DeadlineExceeded"
)

// jobState is how far a job, or one run of a cron workload, is.
type jobState struct {
	run                      int64
	completions, parallelism int
	retries                  int
	deadline                 time.Duration
	succeeded                map[int32]bool
	failures                 map[int32]int
	lastFailure              map[int32]time.Time
	failed                   int
	live                     int
	// start is when its first replica was bound, end when its last one ended.
	start, end time.Time
}

// jobOf counts what the replicas have come to. The completions of this cluster are
// the revision's replicas where it says so, else the job's own.
func (in Input) jobOf(d desired, run int64, rs []*replica) jobState {
	spec := d.current.GetSpec().GetJob()
	j := jobState{
		run: run, completions: max(1, int(spec.GetCompletions())), parallelism: max(1, int(spec.GetParallelism())), retries: defaultRetries,
		deadline: spec.GetDeadline().AsDuration(), succeeded: map[int32]bool{}, failures: map[int32]int{}, lastFailure: map[int32]time.Time{},
	}
	if n := int(d.current.GetReplicas()); n > 0 {
		j.completions = n
	}
	if spec != nil && spec.MaxRetries != nil {
		j.retries = int(spec.GetMaxRetries())
	}
	j.retries += off(in.faults.retriesOffByOne)
	if in.faults.parallelIgnored {
		j.parallelism = j.completions
	}
	for _, r := range rs {
		if r.live() {
			j.live++
		}
		if !d.ofJob(r) {
			continue
		}
		if at := r.GetBound().AsTime(); j.start.IsZero() || at.Before(j.start) {
			j.start = at
		}
		if r.Final != nil {
			j.end = later(j.end, r.GetEndTime().AsTime())
		}
		switch r.Final.GetState() {
		case portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED:
			j.succeeded[r.GetIndex()] = true
		case portolanv1.ReplicaState_REPLICA_STATE_FAILED:
			j.failed++
			j.failures[r.GetIndex()]++
			j.lastFailure[r.GetIndex()] = later(j.lastFailure[r.GetIndex()], r.GetEndTime().AsTime())
		default: // not final
		}
	}
	return j
}

// ofJob says that a replica counts for the job: one of another revision is of
// another job, but a run of a cron workload goes on over revisions.
func (d desired) ofJob(r *replica) bool {
	return r.mine && (d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON || r.GetRevision() == d.current.GetRevision())
}

func (j jobState) complete() bool { return len(j.succeeded) >= j.completions }

// over says that the job failed, and why.
func (j jobState) over(now time.Time) (Note, bool) {
	switch {
	case j.complete():
		return Note{}, false
	case j.failed > j.retries:
		return Note{retriesExhausted, fmt.Sprintf("%d replicas failed, %d retries are allowed", j.failed, j.retries)}, true
	case j.deadline > 0 && !j.start.IsZero() && !now.Before(j.start.Add(j.deadline)):
		return Note{deadlineExceeded, fmt.Sprintf("it is not done %v after its first replica began", j.deadline)}, true
	}
	return Note{}, false
}

// ended is when the job came to its end; false while it has not.
func (j jobState) ended(now time.Time) (time.Time, bool) {
	why, failed := j.over(now)
	switch {
	case failed && why.Code == deadlineExceeded:
		return later(j.end, j.start.Add(j.deadline)), true
	case failed, j.complete():
		return j.end, true
	}
	return time.Time{}, false
}

// job runs replicas until enough of them succeeded.
func (p *planner) job(k Key, w Workload, d desired, rs []*replica) {
	for _, r := range rs {
		if !r.Stop && !d.ofJob(r) {
			p.stop(k, r, RevisionReplaced, fmt.Sprintf("revision %s makes way for %s", r.GetRevision(), d.current.GetRevision()))
		}
	}
	p.finish(k, rs)
	p.trimHistory(k, rs)
	b := p.jobBudget(k, d, rs)
	j := p.in.jobOf(d, 0, rs)
	p.runJob(k, w, d, b, j, rs)
	p.plan.Allowances[k] = max(0, b.left)
	if end, over := j.ended(p.in.Now); over && d.current.GetSpec().GetJob().GetTtl() != nil {
		p.expire(k, end.Add(d.current.GetSpec().GetJob().GetTtl().AsDuration()), rs)
	}
}

// jobBudget counts what runs: that is all that a job should have.
func (p *planner) jobBudget(k Key, d desired, rs []*replica) *budget {
	running := 0
	for _, r := range rs {
		if r.active() {
			running++
		}
	}
	return p.budget(k, d, running, rs)
}

// expire takes what is left of a job off its nodes when its time to live is over.
func (p *planner) expire(k Key, at time.Time, rs []*replica) {
	if p.in.Now.Before(at) {
		p.wakeAt(at)
		return
	}
	for _, r := range rs {
		if r.Final != nil && !r.Stop {
			p.stop(k, r, Expired, "the job's time to live after its end is over")
		}
	}
}

// runJob brings one job, or one run, nearer to its end.
func (p *planner) runJob(k Key, w Workload, d desired, b *budget, j jobState, rs []*replica) {
	why, failed := j.over(p.in.Now)
	if j.complete() || failed {
		code, reason := JobComplete, "the job is complete"
		if failed {
			code, reason = JobFailed, "the job failed: "+why.Message
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
	p.proposeLeaving(rs)
	for _, r := range rs {
		if r.active() && r.leave != nil {
			// What it did is lost: it goes when it must, as far as the budget allows.
			p.leaveNode(k, desired{}, b, r)
		}
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
		done := standIn(r.Allocation)
		done.Final, done.EndTime = r.status, timestamp(p.in.Now)
		r.Allocation = done
		r.ready, r.available = false, false
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
	// An earlier revision may have had more indexes: what they did counts.
	room := min(j.parallelism-j.live, j.completions-len(j.succeeded)-len(running))
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
	s := Step{Kind: Create, Key: k, Workload: w, Revision: d.current, Index: i, Run: j.run, Code: JobReplica, Reason: fmt.Sprintf("index %d of %d is to be done", i, j.completions)}
	if n := j.failures[i]; n > 0 {
		at := j.lastFailure[i].Add(backoff(n))
		if p.in.Now.Before(at) {
			p.wakeAt(at)
			return false
		}
		s.Code, s.Reason = JobRetry, fmt.Sprintf("index %d failed %d times", i, n)
	}
	if lost != nil {
		if !p.in.mayReplace(d.current.GetSpec()) {
			p.plan.Waiting[k] = Note{ReplicaNodeLost, fmt.Sprintf("%s is on a node that is lost, and may live on: at most one may run", lost.GetAllocation())}
			return false
		}
		if !p.replace(k, &s, lost) {
			return false
		}
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

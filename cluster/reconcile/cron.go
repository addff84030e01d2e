package reconcile

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

const (
	defaultStartingDeadline = 10 * time.Minute
	defaultKeepSucceeded    = 3
	defaultKeepFailed       = 1
	// maxOpenRuns bounds how many runs of one workload are not over.
	maxOpenRuns = 100
)

// cronRun is one run: a job of its own, which goes on as it began. A newer template
// concerns the runs after it, and opens none that ended.
type cronRun struct {
	at       int64 // nominal time, seconds since 1970
	replicas []*replica
	d        desired // by the template that it began with
	job      jobState
	end      time.Time
	over     bool
	failed   Note // why, when it failed
}

// runsOf groups the replicas by run, oldest first.
func (in Input) runsOf(d desired, rs []*replica) []*cronRun {
	byTime, replacements := map[int64]*cronRun{}, map[string]bool{}
	for _, r := range rs {
		replacements[r.GetReplacedBy()] = true
	}
	for _, r := range rs {
		if !r.mine {
			continue
		}
		if byTime[r.GetRun()] == nil {
			byTime[r.GetRun()] = &cronRun{at: r.GetRun()}
		}
		r.replacement = replacements[r.GetAllocation()]
		byTime[r.GetRun()].replicas = append(byTime[r.GetRun()].replicas, r)
	}
	var out []*cronRun
	for _, at := range slices.Sorted(maps.Keys(byTime)) {
		run := byTime[at]
		run.d = d
		run.d.current = run.template()
		run.job = in.jobOf(run.d, at, run.replicas)
		run.end, run.over = run.job.ended(in.Now)
		run.failed, _ = run.job.over(in.Now)
		out = append(out, run)
	}
	return out
}

// template is what the run's first replica was made from. All that came after it
// have the same.
func (r *cronRun) template() *linkv1.RevisionIntent {
	first := slices.MinFunc(r.replicas, func(a, b *replica) int {
		return cmp.Or(a.GetBound().AsTime().Compare(b.GetBound().AsTime()), cmp.Compare(a.GetAllocation(), b.GetAllocation()))
	})
	return &linkv1.RevisionIntent{Revision: first.GetRevision(), Spec: first.GetSpec()}
}

// begun is the revision as a new run has it: what this cluster's share of its
// completions is stands in the template, and so in the record of each replica.
func (d desired) begun() *linkv1.RevisionIntent {
	n := d.current.GetReplicas()
	if n == 0 || n == d.current.GetSpec().GetJob().GetCompletions() {
		return d.current
	}
	spec := proto.CloneOf(d.current.GetSpec())
	if spec.Job == nil {
		spec.Job = &portolanv1.WorkloadSpec_JobSpec{}
	}
	spec.Job.Completions = n
	return &linkv1.RevisionIntent{Revision: d.current.GetRevision(), Spec: spec}
}

// alive says that a process of it may run.
func (r *cronRun) alive() bool {
	return slices.ContainsFunc(r.replicas, func(x *replica) bool { return x.live() })
}

// dropped says that the run was taken down whole, and is not to go on. Where some
// of it was disrupted, which alone would have it go on, another stop tells: one of
// a finished replica, or of a running one that is no double of another.
func (r *cronRun) dropped() bool {
	disrupted, marked := false, false
	for _, x := range r.replicas {
		if !x.Stop {
			return false
		}
		disrupted = disrupted || x.GetDisrupted()
		marked = marked || x.Final != nil || (!x.GetDisrupted() && x.GetReplacedBy() == "" && !x.replacement)
	}
	return marked || !disrupted
}

// cron begins runs when they are due, and brings those that have begun to their
// end. A run has begun when a replica of it was bound; the state remembers the
// newest that was dealt with.
func (p *planner) cron(k Key, w Workload, d desired, rs []*replica) {
	for _, r := range rs {
		if !r.mine && !r.Stop {
			p.stop(k, r, RevisionReplaced, "it belongs to an earlier workload of the same name")
		}
	}
	p.finish(k, rs)
	spec := d.current.GetSpec().GetCron()
	runs := p.in.runsOf(d, rs)
	b := p.jobBudget(k, d, rs)
	begin := p.dueRun(k, w, d, runs)
	for i, run := range runs {
		drop := run.dropped() || (begin.replaces && !run.over && (begin.at != 0 || i < len(runs)-1))
		p.removeGone(k, run, run.over || drop)
		if drop {
			p.dropRun(k, run)
		} else {
			p.runJob(k, w, run.d, b, run.job, run.replicas)
		}
	}
	if begin.now {
		d.current = d.begun()
		p.runIndexes(k, w, d, p.in.jobOf(d, begin.at, nil), nil)
	}
	p.forgetRuns(k, spec, runs)
	p.plan.Allowances[k] = max(0, b.left)
}

// removeGone removes the records of replicas that were stopped. The last one of a
// run that has not ended stays until another one is there: nothing else says that
// the run has begun. Finished ones go last: nothing else says that it is over.
func (p *planner) removeGone(k Key, run *cronRun, ended bool) {
	remove := func(r *replica) {
		p.step(Step{Kind: Remove, Key: k, Code: StopConfirmed, Reason: "its node has stopped it", Allocation: r.GetAllocation()})
	}
	last := slices.ContainsFunc(run.replicas, func(r *replica) bool { return !r.gone })
	unfinished := false
	for _, r := range slices.Backward(run.replicas) {
		if r.Final != nil {
			continue
		}
		if r.gone && (last || ended) {
			remove(r)
		} else {
			unfinished = true
		}
		last = last || r.gone
	}
	for _, r := range run.replicas {
		if r.Final != nil && r.gone && !unfinished {
			remove(r)
		}
	}
}

func (p *planner) dropRun(k Key, run *cronRun) {
	for _, r := range run.replicas {
		if !r.Stop {
			p.stop(k, r, RunReplaced, "a later run takes its place")
		}
	}
}

func stamp(run int64) string { return time.Unix(run, 0).UTC().Format(time.RFC3339) }

// jitterOf is by how much the runs of a workload are later: always as much, and
// other workloads have another.
func jitterOf(k Key, spec *portolanv1.WorkloadSpec_CronSpec) time.Duration {
	most := spec.GetJitter().AsDuration()
	if most <= 0 {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(k.String()))
	return time.Duration(h.Sum64()%uint64(most/time.Second+1)) * time.Second
}

// beginning is what is to be done about the run that is due.
type beginning struct {
	at  int64 // 0 when none is due
	now bool
	// replaces: only the newest one may run.
	replaces bool
}

// dueRun finds the newest run that is due and was not dealt with, and judges it.
func (p *planner) dueRun(k Key, w Workload, d desired, runs []*cronRun) beginning {
	spec := d.current.GetSpec().GetCron()
	table, err := timetable.Parse(spec.GetSchedule(), spec.GetTimeZone())
	if err != nil {
		p.plan.Halted[k] = Note{InvalidSchedule, err.Error()}
		return beginning{}
	}
	out := beginning{replaces: spec.GetConcurrency() == portolanv1.CronConcurrency_CRON_CONCURRENCY_REPLACE}
	last := p.lastRun(k, w, d, runs)
	if spec.GetSuspended() {
		return out
	}
	jitter := jitterOf(k, spec)
	due := table.Last(p.in.Now.Add(-jitter).Add(1))
	p.wakeAt(table.Next(p.in.Now.Add(-jitter)).Add(jitter))
	if due.IsZero() || due.Unix() <= last {
		return out
	}
	limit := defaultStartingDeadline
	if spec.GetStartingDeadline() != nil {
		limit = spec.GetStartingDeadline().AsDuration()
	}
	until := due.Add(jitter).Add(limit)
	open, alive := 0, false
	for _, run := range runs {
		alive = alive || run.alive()
		open += off(!run.over && !run.dropped())
	}
	forbid := spec.GetConcurrency() == portolanv1.CronConcurrency_CRON_CONCURRENCY_FORBID && !p.in.faults.forbidIgnored
	switch {
	case p.in.Now.After(until) && !p.in.faults.missedRun:
		p.dealtWith(k, d, due.Unix(), RunMissed, fmt.Sprintf("the run of %s could not begin within %v", stamp(due.Unix()), limit))
		return out
	case forbid && (alive || open > 0):
		p.dealtWith(k, d, due.Unix(), RunSkipped, fmt.Sprintf("the run of %s is skipped: another one runs", stamp(due.Unix())))
		return out
	case !out.replaces && open >= maxOpenRuns:
		p.dealtWith(k, d, due.Unix(), RunSkipped, fmt.Sprintf("the run of %s is skipped: %d run already", stamp(due.Unix()), open))
		return out
	}
	p.wakeAt(until.Add(1))
	out.at, out.now = due.Unix(), !out.replaces || !alive
	return out
}

// lastRun is the newest run that was dealt with. A run that has begun is; and a
// workload begins with those after it came.
func (p *planner) lastRun(k Key, w Workload, d desired, runs []*cronRun) int64 {
	var last int64
	if st := p.in.stateOf(k, d.uid); st.GetLastRun() != 0 {
		last = st.GetLastRun()
	} else {
		came := w.Committed
		if came.IsZero() {
			came = p.in.Now
		}
		last = came.Unix()
		p.dealtWith(k, d, last, FirstSeen, "runs count from when it came")
	}
	if len(runs) > 0 {
		if newest := runs[len(runs)-1].at; newest > last {
			last = newest
			p.dealtWith(k, d, last, RunBegan, fmt.Sprintf("the run of %s has begun", stamp(last)))
		}
	}
	return last
}

func (p *planner) dealtWith(k Key, d desired, run int64, code, reason string) {
	ch := p.change(k, d.uid)
	ch.state.LastRun, ch.code, ch.reason = run, code, reason
}

// forgetRuns takes the oldest runs that are over away whole, beyond the numbers
// that are kept, and those whose time to live is over.
func (p *planner) forgetRuns(k Key, spec *portolanv1.WorkloadSpec_CronSpec, runs []*cronRun) {
	keep := map[bool]int{true: defaultKeepSucceeded, false: defaultKeepFailed}
	if spec != nil && spec.KeepSucceeded != nil {
		keep[true] = int(spec.GetKeepSucceeded())
	}
	if spec != nil && spec.KeepFailed != nil {
		keep[false] = int(spec.GetKeepFailed())
	}
	for _, run := range slices.Backward(runs) {
		if !run.over {
			continue
		}
		// Its ends say that it is over, so they go last: one on a lost node may be left.
		if slices.ContainsFunc(run.replicas, func(r *replica) bool { return r.Final == nil }) {
			keep[run.job.complete()]--
			continue
		}
		good := run.job.complete()
		if keep[good]--; keep[good] < 0 {
			p.forget(k, run, HistoryLimit, "newer runs have ended, and no more are kept")
		} else if ttl := run.d.current.GetSpec().GetJob().GetTtl(); ttl != nil {
			p.expire(k, run.end.Add(ttl.AsDuration()), run.replicas)
		}
	}
}

func (p *planner) forget(k Key, run *cronRun, code, reason string) {
	for _, r := range run.replicas {
		if r.Final != nil && !r.Stop {
			p.stop(k, r, code, reason)
		}
	}
}

// newestRun is the run that ended last.
func newestRun(runs []*cronRun) *cronRun {
	for _, run := range slices.Backward(runs) {
		if run.over {
			return run
		}
	}
	return nil
}

func lastRunOf(st *clusterv1.WorkloadState) string {
	if st.GetLastRun() == 0 {
		return "none"
	}
	return stamp(st.GetLastRun())
}

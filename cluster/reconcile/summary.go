package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Condition types of a workload in one cluster.
const (
	Available   = "Available"
	Progressing = "Progressing"
	Halted      = "Halted"
	Scheduled   = "Scheduled"
	Complete    = "Complete"
	Failed      = "Failed"
	Scaled      = "Scaled"
	Draining    = "Draining"
)

func timestamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

// Summarize says of every workload, wanted or going, what the federation is
// told: replicas by revision, and conditions. Sorted by tenant and workload. Two
// calls on inputs that differ in time alone give the same until something is due.
func Summarize(in Input) []*linkv1.WorkloadStatusReport {
	plan := Reconcile(in)
	byKey := group(in.Allocations)
	keys := in.keys(byKey)
	out := make([]*linkv1.WorkloadStatusReport, 0, len(keys))
	for _, k := range keys {
		w, wanted := in.Workloads[k]
		d := in.desiredOf(k, w)
		rs := in.replicas(w, d, byKey[k])
		rep := &linkv1.WorkloadStatusReport{Tenant: k.Tenant, Workload: k.Workload, Epoch: w.Intent.GetEpoch(), Revisions: revisions(d, rs)}
		if !wanted {
			for _, r := range rs {
				rep.Epoch = max(rep.Epoch, r.GetEpoch())
			}
		} else if d.current != nil {
			rep.Conditions = in.conditions(k, d, rs, plan)
		}
		out = append(out, rep)
	}
	return out
}

// revisions counts replicas: those meant to run, and those still stopping of
// revisions that are no longer wanted, so that "gone" means gone.
func revisions(d desired, rs []*replica) []*portolanv1.RevisionReplicas {
	count := map[string]*portolanv1.RevisionReplicas{}
	none := func(revision string) *portolanv1.RevisionReplicas {
		return &portolanv1.RevisionReplicas{Revision: revision, AvailableReplicas: new(int32(0))}
	}
	for _, want := range d.revisions {
		count[want.GetRevision()] = none(want.GetRevision())
	}
	listed := maps.Clone(count)
	for _, r := range rs {
		wanted := listed[r.GetRevision()] != nil
		if r.gone || d.history(r) || (wanted && (r.Final != nil || r.Stop || (r.lost && r.replaced))) {
			continue
		}
		if count[r.GetRevision()] == nil {
			count[r.GetRevision()] = none(r.GetRevision())
		}
		c := count[r.GetRevision()]
		c.Replicas++
		if r.ready {
			c.ReadyReplicas++
		}
		if r.available {
			*c.AvailableReplicas++
		}
	}
	out := make([]*portolanv1.RevisionReplicas, 0, len(count))
	for _, rev := range slices.Sorted(maps.Keys(count)) {
		out = append(out, count[rev])
	}
	return out
}

// conditionList gathers conditions.
type conditionList []*portolanv1.Condition

func (l *conditionList) add(typ string, yes bool, reason, message string) {
	st := portolanv1.ConditionState_CONDITION_STATE_FALSE
	if yes {
		st = portolanv1.ConditionState_CONDITION_STATE_TRUE
	}
	*l = append(*l, &portolanv1.Condition{Type: typ, State: st, Reason: reason, Message: message})
}

// conditions are what is to be told of a workload. A condition that speaks of
// trouble is there only while there is some.
func (in Input) conditions(k Key, d desired, rs []*replica, plan Plan) []*portolanv1.Condition {
	var l conditionList
	switch d.kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		in.jobConditions(d, rs, &l)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		in.cronConditions(k, d, rs, &l)
	default:
		in.serviceConditions(k, d, rs, plan, &l)
	}
	if n, ok := plan.Halted[k]; ok {
		l.add(Halted, true, n.Code, n.Message)
	}
	if n, ok := plan.Waiting[k]; ok {
		l.add(Scheduled, false, n.Code, n.Message)
	} else if why := in.Pending[k]; len(why) > 0 {
		l.add(Scheduled, false, why[0].GetCode(), why[0].GetMessage())
	}
	if n, ok := plan.Draining[k]; ok {
		l.add(Draining, true, n.Code, n.Message)
	}
	if scale := in.stateOf(k, d.uid).GetScale(); scale != nil && d.current.GetMaxReplicas() > 0 {
		l.add(Scaled, true, scale.GetReason().GetCode(), fmt.Sprintf("%d replicas, within %d and %d: %s", d.current.GetReplicas(), d.current.GetMinReplicas(), d.current.GetMaxReplicas(), scale.GetReason().GetMessage()))
	}
	return l
}

func (in Input) jobConditions(d desired, rs []*replica, l *conditionList) {
	j := in.jobOf(d, 0, rs)
	why, failed := j.over(in.Now)
	l.add(Complete, j.complete(), pick(j.complete(), "Completed", "Running"), fmt.Sprintf("%d of %d replicas succeeded, %d failed", len(j.succeeded), j.completions, j.failed))
	if failed {
		l.add(Failed, true, why.Code, why.Message)
	}
}

// cronConditions tell of the runs: what is under way, and how the last one ended.
func (in Input) cronConditions(k Key, d desired, rs []*replica, l *conditionList) {
	runs := in.runsOf(d, rs)
	open := 0
	for _, run := range runs {
		open += off(!run.over && !run.dropped())
	}
	l.add(Progressing, open > 0, pick(open > 0, "Running", "Idle"), fmt.Sprintf("%d runs are under way, the newest time that was dealt with is %s", open, lastRunOf(in.stateOf(k, d.uid))))
	if last := newestRun(runs); last != nil {
		good := last.job.complete()
		l.add(Complete, good, pick(good, "Completed", "RunFailed"), fmt.Sprintf("run %s: %d of %d replicas succeeded, %d failed", stamp(last.at), len(last.job.succeeded), last.job.completions, last.job.failed))
		if !good {
			l.add(Failed, true, last.failed.Code, fmt.Sprintf("run %s: %s", stamp(last.at), last.failed.Message))
		}
	}
}

func (in Input) serviceConditions(k Key, d desired, rs []*replica, plan Plan, l *conditionList) {
	total := d.total
	if d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		total = in.daemonNodes(d)
	}
	ready, updated, old := 0, 0, 0
	for _, r := range rs {
		if r.ready {
			ready++
		}
		switch {
		case !r.active():
		case slices.ContainsFunc(d.revisions, r.of):
			if r.available {
				updated++
			}
		default:
			old++
		}
	}
	enough, wanted := ready >= total-d.slack, total
	if active := in.Workloads[k].Intent.GetActiveRevision(); active != "" {
		ready, wanted = activeReady(d, rs, active)
		enough = ready >= wanted-d.slack
	}
	l.add(Available, enough, pick(enough, "EnoughReady", "TooFewReady"), fmt.Sprintf("%d replicas are ready, %d are wanted", ready, wanted))
	moving := old > 0 || updated < total
	reason := pick(moving, "Updating", "UpToDate")
	if _, halted := plan.Halted[k]; moving && !halted && d.current.GetSpec().GetUpdate().GetPaused() {
		reason = "Paused"
	}
	l.add(Progressing, moving, reason, fmt.Sprintf("%d of %d replicas are up to date and available, %d are to go", updated, total, old))
}

// activeReady counts the revision that serves.
func activeReady(d desired, rs []*replica, active string) (ready, wanted int) {
	for _, want := range d.revisions {
		if want.GetRevision() != active {
			continue
		}
		wanted = int(want.GetReplicas())
		for _, r := range rs {
			if r.ready && r.of(want) {
				ready++
			}
		}
	}
	return ready, wanted
}

func (in Input) daemonNodes(d desired) int {
	n := 0
	for _, node := range in.Nodes {
		if !node.lost() && in.admission(node.Record, d.current.GetSpec()) == Admitted {
			n++
		}
	}
	return n
}

func pick(yes bool, a, b string) string {
	if yes {
		return a
	}
	return b
}

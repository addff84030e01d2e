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
)

func timestamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

// Summarize says of every workload, wanted or going, what the federation is
// told: replicas by revision, and conditions. Sorted by tenant and workload. Two
// calls on inputs that differ in time alone give the same until something is due.
func Summarize(in Input) []*linkv1.WorkloadStatusReport {
	plan := Reconcile(in)
	byKey := group(in.Allocations)
	keys := slices.Collect(maps.Keys(in.Workloads))
	for k := range byKey {
		if _, ok := in.Workloads[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compareKeys)
	out := make([]*linkv1.WorkloadStatusReport, 0, len(keys))
	for _, k := range keys {
		w, wanted := in.Workloads[k]
		d := desiredOf(w)
		rs := in.replicas(w, d, byKey[k])
		rep := &linkv1.WorkloadStatusReport{Tenant: k.Tenant, Workload: k.Workload, Epoch: w.Intent.GetEpoch(), Revisions: revisions(d, rs)}
		if !wanted {
			for _, r := range rs {
				rep.Epoch = max(rep.Epoch, r.GetEpoch())
			}
		} else if d.current != nil {
			rep.Conditions = in.conditions(k, d, rs, plan.Halted[k])
		}
		out = append(out, rep)
	}
	return out
}

// revisions counts replicas: those meant to run, and those still stopping of
// revisions that are no longer wanted, so that "gone" means gone.
func revisions(d desired, rs []*replica) []*portolanv1.RevisionReplicas {
	count := map[string]*portolanv1.RevisionReplicas{}
	for _, want := range d.revisions {
		count[want.GetRevision()] = &portolanv1.RevisionReplicas{Revision: want.GetRevision()}
	}
	listed := maps.Clone(count)
	for _, r := range rs {
		wanted := listed[r.GetRevision()] != nil
		if r.gone || (wanted && (r.Final != nil || r.Stop || (r.lost && r.replaced))) {
			continue
		}
		if count[r.GetRevision()] == nil {
			count[r.GetRevision()] = &portolanv1.RevisionReplicas{Revision: r.GetRevision()}
		}
		c := count[r.GetRevision()]
		c.Replicas++
		if r.ready {
			c.ReadyReplicas++
		}
	}
	out := make([]*portolanv1.RevisionReplicas, 0, len(count))
	for _, rev := range slices.Sorted(maps.Keys(count)) {
		out = append(out, count[rev])
	}
	return out
}

func (in Input) conditions(k Key, d desired, rs []*replica, halted string) []*portolanv1.Condition {
	var out []*portolanv1.Condition
	add := func(typ string, yes bool, reason, message string) {
		st := portolanv1.ConditionState_CONDITION_STATE_FALSE
		if yes {
			st = portolanv1.ConditionState_CONDITION_STATE_TRUE
		}
		out = append(out, &portolanv1.Condition{Type: typ, State: st, Reason: reason, Message: message})
	}
	if d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		j := jobOf(d, rs)
		why, failed := j.over(in.Now)
		message := fmt.Sprintf("%d of %d replicas succeeded, %d failed", len(j.succeeded), j.completions, j.failed)
		add(Complete, j.complete(), pick(j.complete(), "Completed", "Running"), message)
		if failed {
			add(Failed, true, "JobFailed", why)
		}
	} else {
		in.serviceConditions(d, rs, add)
	}
	if halted != "" {
		add(Halted, true, "NoProgress", halted)
	}
	if why := in.Pending[k]; len(why) > 0 {
		message := why[0].GetMessage()
		add(Scheduled, false, why[0].GetCode(), message)
	}
	return out
}

func (in Input) serviceConditions(d desired, rs []*replica, add func(string, bool, string, string)) {
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
		case r.mine && slices.ContainsFunc(d.revisions, func(x *linkv1.RevisionIntent) bool { return x.GetRevision() == r.GetRevision() }):
			if r.available {
				updated++
			}
		default:
			old++
		}
	}
	enough := ready >= total-d.down
	add(Available, enough, pick(enough, "EnoughReady", "TooFewReady"), fmt.Sprintf("%d replicas are ready, %d are wanted", ready, total))
	moving := old > 0 || updated < total
	add(Progressing, moving, pick(moving, "Updating", "UpToDate"), fmt.Sprintf("%d of %d replicas are up to date and available, %d are to go", updated, total, old))
}

func (in Input) daemonNodes(d desired) int {
	n := 0
	for _, node := range in.Nodes {
		if !node.lost() && (in.Admit == nil || in.Admit(node.Record, d.current.GetSpec()) == Admitted) {
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

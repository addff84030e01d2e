package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const (
	defaultProgressDeadline = 10 * time.Minute
	defaultMaxFailures      = 3
)

// desired is an intent, with its defaults.
type desired struct {
	kind portolanv1.WorkloadKind
	uid  string
	// current is the revision whose spec says how; nil when nothing is wanted.
	current   *linkv1.RevisionIntent
	revisions []*linkv1.RevisionIntent // the current one first
	total     int
	surge     int
	down      int // max_unavailable, and what an update needs at least
	slack     int // max_unavailable as it is given
	minReady  time.Duration
	deadline  time.Duration
	// frozen: the update goes no further. halted says why, when it did not stop at
	// someone's wish.
	frozen bool
	halted Note
}

// desiredOf reads an intent. The numbers of a workload that scales by itself are
// those of its state.
func (in Input) desiredOf(k Key, w Workload) desired {
	d := desired{uid: w.Intent.GetUid()}
	for _, r := range w.Intent.GetRevisions() {
		r = in.scaled(k, d.uid, r)
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
	d.slack = d.down
	if d.surge == 0 && d.down == 0 {
		d.surge = 1 // with neither, no replica could ever be replaced
	}
	if spec.GetPlacement().GetExclusive() || d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL {
		// Two of one name, or two in the world, are what there never may be.
		d.surge, d.down = 0, max(1, d.down)
	}
	d.minReady = u.GetMinReady().AsDuration()
	d.deadline = defaultProgressDeadline
	if u.GetProgressDeadline() != nil {
		d.deadline = u.GetProgressDeadline().AsDuration()
	}
	return d
}

// scaled is a revision with the number that the cluster decided, inside its
// bounds.
func (in Input) scaled(k Key, uid string, r *linkv1.RevisionIntent) *linkv1.RevisionIntent {
	scale := in.stateOf(k, uid).GetScale()
	if r.GetMaxReplicas() == 0 || scale == nil {
		return r
	}
	return withReplicas(r, min(max(scale.GetReplicas(), r.GetMinReplicas()), r.GetMaxReplicas()))
}

func withReplicas(r *linkv1.RevisionIntent, n int32) *linkv1.RevisionIntent {
	if r.GetReplicas() == n {
		return r
	}
	return &linkv1.RevisionIntent{Revision: r.GetRevision(), Replicas: n, Spec: r.GetSpec(), MinReplicas: r.GetMinReplicas(), MaxReplicas: r.GetMaxReplicas()}
}

// freeze stops an update where it is when it is paused or its new replicas fail:
// those of the new revision that are there stay, and older ones keep the other
// places, also those that are created anew.
func (d *desired) freeze(rs []*replica, f faults) {
	if d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
		return
	}
	d.revisions = slices.DeleteFunc(d.revisions, func(r *linkv1.RevisionIntent) bool { return r != d.current && r.GetReplicas() == 0 })
	old := d.older(rs)
	listed := slices.ContainsFunc(d.revisions, func(r *linkv1.RevisionIntent) bool { return r != d.current })
	existing, available := int32(0), int32(0)
	for _, r := range rs {
		if r.active() && r.of(d.current) {
			existing++
			if r.available {
				available++
			}
		}
	}
	updating := len(old) > 0 || listed || hasOther(rs, d.current)
	// Where all that are wanted are available the revision is good.
	done := d.kind != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON && available >= d.current.GetReplicas()
	if crashes := d.crashes(rs); (updating || available == 0) && !done && !f.failingIgnored {
		limit := defaultMaxFailures
		if u := d.current.GetSpec().GetUpdate(); u != nil && u.MaxFailures != nil {
			limit = int(u.GetMaxFailures())
		}
		if crashes > limit {
			d.halted = Note{FailingChecks, fmt.Sprintf("revision %s: its replicas crashed or failed liveness %d times before they were available, %d times are allowed", d.current.GetRevision(), crashes, limit)}
		}
	}
	d.frozen = updating && (d.halted.Code != "" || d.current.GetSpec().GetUpdate().GetPaused())
	if !d.frozen {
		return
	}
	if rest := d.current.GetReplicas() - available; len(old) > 0 && rest > 0 {
		for i, r := range old {
			n := min(r.GetReplicas(), rest)
			if i == len(old)-1 {
				n = rest
			}
			d.revisions = append(d.revisions, withReplicas(r, n))
			rest -= n
		}
	}
	was := d.current
	d.current = withReplicas(was, min(existing, was.GetReplicas()))
	d.revisions[slices.Index(d.revisions, was)] = d.current
}

// older are the revisions of this workload that run and are not listed, with how
// many of each there are; most first last, which takes what is lacking.
func (d *desired) older(rs []*replica) []*linkv1.RevisionIntent {
	byName := map[string]*linkv1.RevisionIntent{}
	for _, r := range rs {
		if !r.mine || r.Stop || r.gone || r.Final != nil || r.replaced || r.outdated ||
			slices.ContainsFunc(d.revisions, func(x *linkv1.RevisionIntent) bool { return x.GetRevision() == r.GetRevision() }) {
			continue
		}
		if byName[r.GetRevision()] == nil {
			byName[r.GetRevision()] = &linkv1.RevisionIntent{Revision: r.GetRevision(), Spec: r.GetSpec()}
		}
		byName[r.GetRevision()].Replicas++
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b *linkv1.RevisionIntent) int {
		return cmp.Or(cmp.Compare(a.GetReplicas(), b.GetReplicas()), cmp.Compare(a.GetRevision(), b.GetRevision()))
	})
}

// crashes counts how often replicas of the current revision crashed or failed
// liveness before they were available, those included that are available by now:
// an update that halted does not go on because a bad replica holds for a moment.
// Each time counts, and not each replica: with a surge of one a bad revision never
// has more than one.
func (d *desired) crashes(rs []*replica) int {
	n := 0
	for _, r := range rs {
		if !r.active() || !r.of(d.current) || r.status == nil {
			continue
		}
		own := 0
		for _, c := range r.status.GetContainers() {
			if ready := r.status.GetTimeline().GetReady(); ready != nil && !c.GetLastExitTime().AsTime().Before(ready.AsTime().Add(d.minReady)) {
				continue // it was available before that
			}
			own += int(c.GetRestarts())
		}
		if st := r.status.GetState(); own == 0 && (st == portolanv1.ReplicaState_REPLICA_STATE_BACKOFF || st == portolanv1.ReplicaState_REPLICA_STATE_FAILED) && r.status.GetTimeline().GetReady() == nil {
			own = 1
		}
		n += own
	}
	return n
}

// Package reconcile compares what should run in a cluster with what does, and
// says what to do about it: Reconcile gives steps with reasons, Summarize what
// the federation is told. It owns the rules of rolling updates, jobs, daemons and
// the loss of nodes; it never chooses a node, an address or a name.
//
// Concurrency: pure functions. The input is only read; messages in the output
// are the input's.
package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Key names a workload.
type Key struct{ Tenant, Workload string }

func (k Key) String() string { return k.Tenant + "/" + k.Workload }

// Input is everything that a decision follows from.
type Input struct {
	Now       time.Time
	Workloads map[Key]Workload
	// Nodes by ID, and allocations by ID.
	Nodes       map[string]Node
	Allocations map[string]*clusterv1.Allocation
	// Modified is the generation at which each allocation changed last.
	Modified map[string]int64
	// Admit says whether replicas may begin or stay on a node, capacity apart.
	Admit func(*clusterv1.Node, *portolanv1.WorkloadSpec) Admission
	// Pending holds the scheduler's refusals, by workload. Only Summarize reads it.
	Pending map[Key][]*portolanv1.Reason
}

// Workload is what the federation wants of one.
type Workload struct {
	Intent *linkv1.WorkloadIntent
	// Revision is the federation's, Committed when it came to this cluster.
	Revision  int64
	Committed time.Time
}

// Node is one machine and what it reported.
type Node struct {
	Record *clusterv1.Node
	// Observed says that Allocations is complete, as of a session of this process.
	Observed bool
	// Applied is the generation that the node has taken over.
	Applied     int64
	Allocations map[string]*nodev1.AllocationStatus
}

func (n Node) lost() bool { return n.Record.GetLostTime() != nil }

// Admission is what a node allows.
type Admission int

// The admissions, from least to most.
const (
	Refused  Admission = iota // replicas must leave
	Stay                      // replicas may stay, not begin
	Admitted                  // replicas may begin
)

// Kind of a step.
type Kind int

// The kinds of steps.
const (
	// Create one replica of a revision; the scheduler finds the node.
	Create Kind = iota
	// Stop marks an allocation for an orderly stop.
	Stop
	// Remove deletes the record of an allocation that is gone.
	Remove
	// Finish keeps the end of a job's replica in its record.
	Finish
	// Renew writes the placement's newer epoch to an allocation.
	Renew
)

var kindNames = [...]string{"create", "stop", "remove", "finish", "renew"}

func (k Kind) String() string { return kindNames[k] }

// Reason codes of steps.
const (
	ScaleUp          = "ScaleUp"
	NewRevision      = "NewRevision"
	NodeLost         = "NodeLost"
	NodeEligible     = "NodeEligible"
	JobReplica       = "JobReplica"
	JobRetry         = "JobRetry"
	ScaleDown        = "ScaleDown"
	RevisionReplaced = "RevisionReplaced"
	WorkloadRemoved  = "WorkloadRemoved"
	Surplus          = "SurplusAfterNodeReturned"
	NodeRefuses      = "NodeRefuses"
	JobComplete      = "JobComplete"
	JobFailed        = "JobFailed"
	HistoryLimit     = "HistoryLimit"
	StopConfirmed    = "StopConfirmed"
	NodeGone         = "NodeGone"
	ReplicaFinished  = "ReplicaFinished"
	NewerEpoch       = "NewerEpoch"
)

// Step is one thing to do, and why.
type Step struct {
	Kind   Kind
	Key    Key
	Code   string
	Reason string
	// Allocation that it concerns; for Create the one that is replaced, if any.
	Allocation string
	// Of Create: what to create. Node is set when only that one will do.
	Workload Workload
	Revision *linkv1.RevisionIntent
	Index    int32
	Node     string
	// Of Finish.
	Final *nodev1.AllocationStatus
}

// Plan is what to do now.
type Plan struct {
	Steps []Step
	// Next is when time alone changes the answer; zero when it does not.
	Next time.Time
	// Halted workloads do not progress, and why.
	Halted map[Key]string
	// Held says why nothing is done at all; empty when something may be.
	Held string
}

// Bounds on automation.
const (
	// replaceWindow, replaceShare and replaceMin bound how many replicas of lost
	// nodes are replaced per window: a quarter of all, and at least 20.
	replaceWindow = 10 * time.Second
	replaceShare  = 4
	replaceMin    = 20
	// confirmAfter is after how long a stopped allocation that its node does not
	// know is believed to be gone without the node's word for it.
	confirmAfter = 10 * time.Second
	// keepFinished is how many finished replicas of a job stay on their nodes, for
	// their logs.
	keepFinished = 3
	// retryBase is the wait before a failed replica of a job is tried again; it
	// doubles up to retryMax.
	retryBase = 2 * time.Second
	retryMax  = 5 * time.Minute
)

// replica is one allocation and all that is known of it.
type replica struct {
	*clusterv1.Allocation
	status *nodev1.AllocationStatus
	// lost: its node is silent. gone: stopped, and the node knows it no more.
	lost, gone bool
	// replaced: another one took its place while its node was lost, and is there.
	replaced bool
	// mine: of the present workload, not of an earlier one of the same name.
	mine      bool
	mute      bool // its node has said nothing yet to this process
	ready     bool
	available bool // ready for the workload's min_ready
	refused   bool // its node wants it off
}

// live says that a process of it may run, as far as a reachable node can say.
func (r *replica) live() bool { return !r.lost && !r.gone && r.Final == nil }

// active says that it is live and meant to stay so.
func (r *replica) active() bool { return r.live() && !r.Stop }

// planner gathers a plan.
type planner struct {
	in   Input
	plan Plan
	// replaceable is how many replicas of lost nodes may still be replaced.
	replaceable int
}

// Reconcile says what to do now.
func Reconcile(in Input) Plan {
	p := &planner{in: in, plan: Plan{Halted: map[Key]string{}}}
	if allLost(in.Nodes) {
		p.plan.Held = "every node is silent: the fault is likelier here than there"
		return p.plan
	}
	byKey := group(in.Allocations)
	p.replaceable = in.replaceBudget()
	keys := slices.Collect(maps.Keys(in.Workloads))
	for k := range byKey {
		if _, ok := in.Workloads[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compareKeys)
	for _, k := range keys {
		p.workload(k, byKey[k])
	}
	return p.plan
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Workload, b.Workload))
}

func allLost(nodes map[string]Node) bool {
	for _, n := range nodes {
		if !n.lost() {
			return false
		}
	}
	return len(nodes) > 0
}

func group(all map[string]*clusterv1.Allocation) map[Key][]*clusterv1.Allocation {
	out := map[Key][]*clusterv1.Allocation{}
	for _, a := range all {
		k := Key{a.GetTenant(), a.GetWorkload()}
		out[k] = append(out[k], a)
	}
	for _, as := range out {
		slices.SortFunc(as, func(a, b *clusterv1.Allocation) int { return cmp.Compare(a.GetAllocation(), b.GetAllocation()) })
	}
	return out
}

// replaceBudget is how many replicas of lost nodes may be replaced now: the
// bound, less those replaced within the window. When most nodes are lost the
// bound is a tenth.
func (in Input) replaceBudget() int {
	live, recent, lost := 0, 0, 0
	for _, a := range in.Allocations {
		if a.GetReplacedBy() == "" {
			live++
		} else if b := in.Allocations[a.GetReplacedBy()]; b != nil && b.GetBound().AsTime().Add(replaceWindow).After(in.Now) {
			recent++
		}
	}
	for _, n := range in.Nodes {
		if n.lost() {
			lost++
		}
	}
	limit := max(replaceMin, live/replaceShare)
	if lost*2 > len(in.Nodes) {
		limit /= 10
	}
	return limit - recent
}

func (p *planner) step(s Step) { p.plan.Steps = append(p.plan.Steps, s) }

// wakeAt notes a time at which the answer may change.
func (p *planner) wakeAt(t time.Time) {
	if t.After(p.in.Now) && (p.plan.Next.IsZero() || t.Before(p.plan.Next)) {
		p.plan.Next = t
	}
}

func (p *planner) stop(k Key, r *replica, code, reason string) {
	p.step(Step{Kind: Stop, Key: k, Code: code, Reason: reason, Allocation: r.GetAllocation()})
	r.Allocation = stopped(r.Allocation)
}

// stopped is a stand-in for the record after the step: later decisions of the
// same plan see it as stopping.
func stopped(a *clusterv1.Allocation) *clusterv1.Allocation {
	return &clusterv1.Allocation{
		Allocation: a.GetAllocation(), Revision: a.GetRevision(), Node: a.GetNode(), Index: a.GetIndex(), Epoch: a.GetEpoch(),
		Uid: a.GetUid(), Final: a.GetFinal(), Bound: a.GetBound(), Stop: true,
	}
}

// workload reconciles one of them.
func (p *planner) workload(k Key, as []*clusterv1.Allocation) {
	w, wanted := p.in.Workloads[k]
	d := desiredOf(w)
	rs := p.in.replicas(w, d, as)
	if wanted && stale(w, rs) {
		p.plan.Halted[k] = "its intent is older than what follows from a newer epoch already"
		return
	}
	rs = p.confirm(k, rs, wanted && d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, d)
	if !wanted || d.current == nil {
		for _, r := range rs {
			if !r.Stop {
				p.stop(k, r, WorkloadRemoved, "the workload is no longer wanted here")
			}
		}
		return
	}
	switch d.kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		p.job(k, w, d, rs)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		p.daemon(k, w, d, rs)
	default:
		p.service(k, w, d, rs)
	}
	p.renew(k, w, rs)
}

// stale says that allocations follow from a newer epoch than the intent has.
func stale(w Workload, rs []*replica) bool {
	for _, r := range rs {
		if r.mine && r.GetEpoch() > w.Intent.GetEpoch() {
			return true
		}
	}
	return false
}

// renew carries the intent's epoch over to the replicas that stay.
func (p *planner) renew(k Key, w Workload, rs []*replica) {
	for _, r := range rs {
		if r.mine && !r.Stop && r.Final == nil && r.GetEpoch() < w.Intent.GetEpoch() {
			p.step(Step{Kind: Renew, Key: k, Code: NewerEpoch, Reason: "the placement was decided anew", Allocation: r.GetAllocation(), Workload: w})
		}
	}
}

// confirm removes the records of replicas that are gone and gives the others.
func (p *planner) confirm(k Key, rs []*replica, keepFinal bool, d desired) []*replica {
	var rest []*replica
	for _, r := range rs {
		history := keepFinal && r.mine && r.Final != nil && r.GetRevision() == d.current.GetRevision()
		_, known := p.in.Nodes[r.GetNode()]
		switch {
		case history:
			rest = append(rest, r)
		case !known:
			p.step(Step{Kind: Remove, Key: k, Code: NodeGone, Reason: "its node is no longer part of the cluster", Allocation: r.GetAllocation()})
		case r.gone:
			p.step(Step{Kind: Remove, Key: k, Code: StopConfirmed, Reason: "its node has stopped it", Allocation: r.GetAllocation()})
		default:
			rest = append(rest, r)
			if r.Stop && !r.lost && r.status == nil {
				p.wakeAt(r.GetStopTime().AsTime().Add(confirmAfter))
			}
		}
	}
	return rest
}

// replicas joins allocations with what is observed of them.
func (in Input) replicas(w Workload, d desired, as []*clusterv1.Allocation) []*replica {
	out := make([]*replica, 0, len(as))
	for _, a := range as {
		n := in.Nodes[a.GetNode()]
		r := &replica{Allocation: a, lost: n.lost(), mine: w.Intent != nil && a.GetUid() == w.Intent.GetUid()}
		r.mute = !n.Observed
		if by := in.Allocations[a.GetReplacedBy()]; by != nil && !by.GetStop() {
			r.replaced = true
		}
		if n.Observed {
			r.status = n.Allocations[a.GetAllocation()]
		}
		r.gone = in.isGone(n, r)
		if st := r.status; st != nil && !r.lost && !a.GetStop() && a.GetFinal() == nil {
			r.ready = st.GetReady()
			r.available = r.ready && !in.Now.Before(availableAt(r, d.minReady))
		}
		if n.Record != nil && !r.lost && !a.GetStop() && in.Admit != nil {
			r.refused = in.Admit(n.Record, a.GetSpec()) == Refused
		}
		out = append(out, r)
	}
	return out
}

func (in Input) isGone(n Node, r *replica) bool {
	if !r.Stop || r.lost || !n.Observed || r.status != nil {
		return false
	}
	return n.Applied >= in.Modified[r.GetAllocation()] || !in.Now.Before(r.GetStopTime().AsTime().Add(confirmAfter))
}

// availableAt is when a replica that is ready counts.
func availableAt(r *replica, minReady time.Duration) time.Time {
	since := r.status.GetTimeline().GetReady()
	if since == nil {
		since = r.GetBound()
	}
	return since.AsTime().Add(minReady)
}

// better orders replicas by which is kept first: one that its node does not want
// off, that is available, ready, not replaced while its node was lost, old.
func better(a, b *replica) int {
	return cmp.Or(
		compareBool(!a.refused, !b.refused), compareBool(a.available, b.available), compareBool(a.ready, b.ready),
		compareBool(!a.replaced, !b.replaced),
		a.GetBound().AsTime().Compare(b.GetBound().AsTime()), cmp.Compare(a.GetAllocation(), b.GetAllocation()),
	)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

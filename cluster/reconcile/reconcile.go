// Package reconcile compares what should run in a cluster with what does, and
// says what to do about it: Reconcile gives steps with reasons, Summarize what
// the federation is told. It owns the rules of updates, of every kind of workload,
// of disruption budgets and drains, and of the loss of nodes; it never chooses a
// node, an address or a random name.
//
// Concurrency: pure functions. The input is only read; messages in the output
// are the input's.
package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Bounds on automation.
const (
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

// planner gathers a plan.
type planner struct {
	in   Input
	plan Plan
	// evictions is how many replicas of lost nodes may still be replaced.
	// Nil before the first was asked for.
	evictions *evictions
	// moves is how many replicas the rebalancer may still move within the hour.
	moves int
	// states are the changed ones.
	states map[Key]*stateChange
	// occupied counts the replicas on each node that are no daemons.
	occupied map[string]int
	volumes  map[Key][]*clusterv1.Volume
	// proposed are the moves by allocation, replacedFor what an allocation replaced.
	proposed    map[string]Move
	replacedFor map[string]string
}

type stateChange struct {
	state        *clusterv1.WorkloadState
	code, reason string
	disrupted    int
}

// Reconcile says what to do now.
func Reconcile(in Input) Plan {
	p := &planner{
		in: in, states: map[Key]*stateChange{}, occupied: map[string]int{}, volumes: map[Key][]*clusterv1.Volume{},
		proposed: make(map[string]Move, len(in.Moves)), replacedFor: map[string]string{},
		plan: Plan{Halted: map[Key]Note{}, Waiting: map[Key]Note{}, Draining: map[Key]Note{}, Allowances: map[Key]int{}},
	}
	if allLost(in.Nodes) {
		p.plan.Held = "every node is silent: the fault is likelier here than there"
		return p.plan
	}
	byKey := group(in.Allocations)
	p.moves = in.moveBudget()
	p.count()
	for _, k := range in.keys(byKey) {
		p.workload(k, byKey[k])
		p.putState(k)
	}
	p.leftovers(byKey)
	return p.plan
}

// keys are all workloads, wanted or going, sorted.
func (in Input) keys(byKey map[Key][]*clusterv1.Allocation) []Key {
	keys := slices.Collect(maps.Keys(in.Workloads))
	for k := range byKey {
		if _, ok := in.Workloads[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compareKeys)
	return keys
}

func sortedKeys[V any](m map[Key]V) []Key { return slices.SortedFunc(maps.Keys(m), compareKeys) }

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

// count notes where replicas are, for daemons that leave a node last, where
// volumes are, and what replaced and may move.
func (p *planner) count() {
	for _, m := range p.in.Moves {
		p.proposed[m.Allocation] = m
	}
	for id, a := range p.in.Allocations {
		if by := a.GetReplacedBy(); by != "" {
			p.replacedFor[by] = id
		}
		if a.GetFinal() == nil && a.GetSpec().GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
			p.occupied[a.GetNode()]++
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.in.Volumes)) {
		v := p.in.Volumes[id]
		k := Key{v.GetTenant(), v.GetWorkload()}
		p.volumes[k] = append(p.volumes[k], v)
	}
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

// disrupt is a stop on purpose. Only one that takes a replica which serves is
// noted in the state, and so counts against budgets.
func (p *planner) disrupt(k Key, r *replica, b *budget, code, reason string) {
	serves := r.ready || r.mute
	p.step(Step{Kind: Stop, Key: k, Code: code, Reason: reason, Allocation: r.GetAllocation(), Disrupt: true})
	if serves {
		b.left--
		ch := p.change(k, p.in.Workloads[k].Intent.GetUid())
		ch.disrupted++
		ch.code, ch.reason = Disrupted, fmt.Sprintf("%d replicas are disrupted on purpose", ch.disrupted)
		addDisruptions(ch.state, 1, p.in.Now)
	}
	r.Allocation = stopped(r.Allocation)
}

// stopped is a stand-in for the record after the step: later decisions of the
// same plan see it as stopping.
func stopped(a *clusterv1.Allocation) *clusterv1.Allocation {
	out := standIn(a)
	out.Stop = true
	return out
}

func standIn(a *clusterv1.Allocation) *clusterv1.Allocation {
	return &clusterv1.Allocation{
		Allocation: a.GetAllocation(), Revision: a.GetRevision(), Node: a.GetNode(), Index: a.GetIndex(), Epoch: a.GetEpoch(), Run: a.GetRun(),
		Uid: a.GetUid(), Final: a.GetFinal(), Bound: a.GetBound(), Spec: a.GetSpec(), Stop: a.GetStop(), EndTime: a.GetEndTime(),
		ReplacedBy: a.GetReplacedBy(), Disrupted: a.GetDisrupted(), Volumes: a.GetVolumes(),
	}
}

// change gives the state of a workload for changing.
func (p *planner) change(k Key, uid string) *stateChange {
	ch := p.states[k]
	if ch == nil {
		ch = &stateChange{state: p.in.newState(k, uid)}
		p.states[k] = ch
	}
	return ch
}

func (p *planner) putState(k Key) {
	if ch := p.states[k]; ch != nil {
		p.step(Step{Kind: PutState, Key: k, Code: ch.code, Reason: ch.reason, State: ch.state})
	}
}

// workload reconciles one of them.
func (p *planner) workload(k Key, as []*clusterv1.Allocation) {
	w, wanted := p.in.Workloads[k]
	d := p.in.desiredOf(k, w)
	rs := p.in.replicas(w, d, as)
	if wanted && stale(w, rs) {
		p.plan.Halted[k] = Note{StaleIntent, "its intent is older than what follows from a newer epoch already"}
		return
	}
	rs = p.confirm(k, rs, d, wanted)
	if !wanted || d.current == nil {
		for _, r := range rs {
			if !r.Stop {
				p.stop(k, r, WorkloadRemoved, "the workload is no longer wanted here")
			}
		}
		return
	}
	for _, r := range rs {
		p.wakeAt(r.until)
		if r.ready && !r.available {
			p.wakeAt(availableAt(r, d.minReady))
		}
	}
	p.clearFinished(k, d, rs)
	d.freeze(rs, p.in.faults)
	if d.halted.Code != "" {
		p.plan.Halted[k] = d.halted
	}
	p.takeOver(k, w, d, rs)
	switch d.kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		p.job(k, w, d, rs)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		p.cron(k, w, d, rs)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		p.daemon(k, w, d, rs)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		p.stateful(k, w, d, rs)
	default:
		p.service(k, w, d, rs)
	}
	p.renew(k, w, rs)
}

// clearFinished takes the ends of an earlier job's replicas off their nodes where
// the workload of the name is no job any more: nothing else speaks of them.
func (p *planner) clearFinished(k Key, d desired, rs []*replica) {
	if d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
		return
	}
	for _, r := range rs {
		if r.Final != nil && !r.Stop {
			p.stop(k, r, RevisionReplaced, "it is of an earlier job of the same name")
		}
	}
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
func (p *planner) confirm(k Key, rs []*replica, d desired, wanted bool) []*replica {
	var rest []*replica
	for _, r := range rs {
		_, known := p.in.Nodes[r.GetNode()]
		switch {
		case wanted && d.history(r):
			rest = append(rest, r)
		case wanted && d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON && r.mine && (r.gone || (!known && r.Final == nil)):
			r.gone = true // its run decides
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

// history says that the record of a finished replica is what says how far its job
// is, and stays when nothing else of it is left.
func (d desired) history(r *replica) bool {
	if r.Final == nil || !r.mine {
		return false
	}
	switch d.kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		return r.GetRevision() == d.current.GetRevision()
	case portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		return !r.Stop // a run is forgotten whole
	default:
		return false
	}
}

// leftovers clears away what belongs to workloads that are gone: volumes when
// their replicas are gone too, and states at the end.
func (p *planner) leftovers(byKey map[Key][]*clusterv1.Allocation) {
	for _, k := range sortedKeys(p.volumes) {
		if p.plan.Halted[k].Code == StaleIntent {
			continue
		}
		for _, v := range p.volumes[k] {
			p.leftVolume(k, v, byKey[k])
		}
	}
	for _, k := range sortedKeys(p.in.States) {
		if _, wanted := p.in.Workloads[k]; !wanted && len(byKey[k]) == 0 {
			p.step(Step{Kind: DeleteState, Key: k, Code: WorkloadRemoved, Reason: "the workload is gone"})
		}
	}
}

func (p *planner) leftVolume(k Key, v *clusterv1.Volume, as []*clusterv1.Allocation) {
	w, wanted := p.in.Workloads[k]
	if wanted && w.Intent.GetUid() == v.GetUid() && !p.in.faults.volumeDropped {
		return
	}
	for _, a := range as {
		if a.GetUid() == v.GetUid() && a.GetIndex() == v.GetIndex() {
			return // its replica may still write
		}
	}
	if _, known := p.in.Nodes[v.GetNode()]; !known {
		p.step(Step{Kind: DeleteVolume, Key: k, Code: NodeGone, Reason: "its workload and its node are gone", Volume: v})
	} else if !v.GetDelete() {
		gone := &clusterv1.Volume{
			Volume: v.GetVolume(), Tenant: v.GetTenant(), Workload: v.GetWorkload(), Uid: v.GetUid(), Index: v.GetIndex(), Name: v.GetName(),
			Node: v.GetNode(), SizeBytes: v.GetSizeBytes(), CreateTime: v.GetCreateTime(), Delete: true,
		}
		p.step(Step{Kind: PutVolume, Key: k, Code: WorkloadRemoved, Reason: "its workload is gone", Volume: gone})
	}
}

// hasOther says that replicas run that are not of a revision as it is now.
func hasOther(rs []*replica, want *linkv1.RevisionIntent) bool {
	return slices.ContainsFunc(rs, func(r *replica) bool { return r.active() && !r.of(want) })
}

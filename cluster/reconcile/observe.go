package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// replica is one allocation and all that is known of it.
type replica struct {
	*clusterv1.Allocation
	status *nodev1.AllocationStatus
	// lost: its node is silent. gone: stopped, and the node knows it no more.
	lost, gone bool
	// replaced: another one took its place, and is there. replacement: it took the
	// place of another one.
	replaced, replacement bool
	// moved: that one was made because it is to leave.
	moved bool
	// mine: of the present workload, not of an earlier one of the same name.
	mine      bool
	mute      bool // its node has said nothing yet to this process
	ready     bool
	available bool // ready for the workload's min_ready
	// leave is why it is to leave its node; nil when it may stay. until is when that
	// may change by itself.
	leave *leaving
	until time.Time
	// outdated: of a listed revision, whose template is now another one.
	outdated bool
	// surplus: it would go even if its node were the best of all.
	surplus bool
	// crowd counts the replicas beside it that are kept before it in its domain.
	crowd int
}

// leaving is why a replica is to leave its node.
type leaving struct {
	code, reason string
	// budgeted: only as far as the disruption budget allows. force: whatever else
	// holds.
	budgeted, force bool
	// node that it should go to, if any.
	node string
}

// live says that a process of it may run, as far as a reachable node can say.
func (r *replica) live() bool { return !r.lost && !r.gone && r.Final == nil }

// active says that it is live and meant to stay so.
func (r *replica) active() bool { return r.live() && !r.Stop }

// of says that it is of a revision, as that is now.
func (r *replica) of(want *linkv1.RevisionIntent) bool {
	return r.mine && !r.outdated && r.GetRevision() == want.GetRevision()
}

// replicas joins allocations with what is observed of them.
func (in Input) replicas(w Workload, d desired, as []*clusterv1.Allocation) []*replica {
	out := make([]*replica, 0, len(as))
	for _, a := range as {
		n := in.Nodes[a.GetNode()]
		r := &replica{Allocation: a, lost: n.lost(), mine: w.Intent != nil && a.GetUid() == w.Intent.GetUid()}
		r.mute = !n.Observed
		by := in.Allocations[a.GetReplacedBy()]
		if _, there := in.Nodes[by.GetNode()]; by != nil && there && !by.GetStop() {
			r.replaced = true
			r.moved = a.GetDisrupted() && !evictedFor(a, by)
		}
		if n.Observed {
			r.status = n.Allocations[a.GetAllocation()]
		}
		r.gone = in.isGone(n, r)
		if st := r.status; st != nil && !r.lost && !a.GetStop() && a.GetFinal() == nil {
			r.ready = st.GetReady()
			r.available = r.ready && !in.Now.Before(availableAt(r, d.minReady))
		}
		r.outdated = r.mine && d.changed(r.Allocation)
		if n.Record != nil && r.active() {
			in.setLeaving(n.Record, r)
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

// setLeaving finds why a replica is to leave its node. Daemons leave by rules of
// their own.
func (in Input) setLeaving(n *clusterv1.Node, r *replica) {
	if in.Admit != nil && in.Admit(n, r.GetSpec()) == Refused {
		r.leave = &leaving{code: NodeRefuses, reason: "its node has a taint that it does not tolerate"}
		return
	}
	until, taint := endured(n, r.GetSpec())
	drain := n.GetDrainDeadline()
	draining := n.GetMode() == portolanv1.NodeMode_NODE_MODE_DRAINING
	switch {
	case draining && drain != nil && !in.Now.Before(drain.AsTime()):
		r.leave = &leaving{code: DrainDeadline, force: true, budgeted: true, reason: "its node is drained, and the deadline of that is over"}
	case draining:
		r.leave = &leaving{code: NodeDraining, budgeted: true, reason: "its node is drained"}
		if drain != nil {
			r.until = drain.AsTime()
		}
	case !until.IsZero() && !in.Now.Before(until):
		r.leave = &leaving{code: StayOver, budgeted: true, reason: fmt.Sprintf("its node has taint %s, which it tolerates only for a time", taint)}
	case r.moved:
		r.leave = &leaving{code: Moved, budgeted: true, reason: fmt.Sprintf("%s was made to take its place", r.GetReplacedBy())}
	default:
		r.until = until
	}
}

// endured is when a replica has tolerated one of its node's taints for as long as
// it does; zero when it tolerates them for ever.
func endured(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) (until time.Time, taint string) {
	for _, t := range n.GetFacts().GetTaints() {
		came := n.GetTaintTimes()[t.GetKey()+"="+t.GetValue()]
		if t.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE || came == nil {
			continue
		}
		stay, limited := time.Duration(-1), false
		for _, o := range spec.GetScheduling().GetTolerations() {
			effect := o.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED || o.GetEffect() == t.GetEffect()
			if o.GetKey() != t.GetKey() || !effect || (o.GetValue() != "" && o.GetValue() != t.GetValue()) {
				continue
			}
			if o.GetStay() == nil {
				limited = false
				break
			}
			stay, limited = max(stay, o.GetStay().AsDuration()), true
		}
		if end := came.AsTime().Add(stay); limited && (until.IsZero() || end.Before(until)) {
			until, taint = end, strings.TrimSuffix(t.GetKey()+"="+t.GetValue(), "=")
		}
	}
	return until, taint
}

// admission is what a node allows a workload, its mode and the time of its taints
// included.
func (in Input) admission(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) Admission {
	a := Admitted
	if in.Admit != nil {
		a = in.Admit(n, spec)
	}
	if until, _ := endured(n, spec); !until.IsZero() && !in.Now.Before(until) {
		return Refused
	}
	if n.GetMode() != portolanv1.NodeMode_NODE_MODE_UNSPECIFIED {
		return min(a, Stay)
	}
	return a
}

// setCrowds counts for each replica those that are kept before it in its domain
// of the spread: what is beside many others goes first.
func (in Input) setCrowds(spec *portolanv1.WorkloadSpec, rs []*replica) {
	key := spec.GetScheduling().GetSpreadKey()
	if key == "" && len(spec.GetScheduling().GetSpreads()) > 0 {
		key = spec.GetScheduling().GetSpreads()[0].GetTopologyKey()
	}
	sorted := slices.SortedFunc(slices.Values(rs), better)
	seen := map[string]int{}
	for _, r := range sorted {
		if !r.active() || r.leave != nil {
			continue
		}
		domain := r.GetNode()
		if value, ok := in.Nodes[r.GetNode()].Record.GetFacts().GetLabels()[key]; ok {
			domain = value
		}
		r.crowd = seen[domain]
		seen[domain]++
	}
}

// better orders replicas by which is kept first: one that need not leave its node,
// that is available, ready, not replaced while its node was lost, less crowded,
// old.
func better(a, b *replica) int {
	return cmp.Or(
		compareBool(a.leave == nil, b.leave == nil), compareBool(a.available, b.available), compareBool(a.ready, b.ready),
		compareBool(!a.replaced, !b.replaced), cmp.Compare(a.crowd, b.crowd),
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

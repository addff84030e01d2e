package reconcile

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// maxName is the length of an ID.
const maxName = 40

// VolumeID is the ID of the volume of a stateful replica.
func VolumeID(k Key, index int32, name string) string {
	return fmt.Sprintf("%s.%s-%d.%s", k.Tenant, k.Workload, index, name)
}

// statefulName is the ID of a stateful replica: "<workload>-<index>-<mark>". IDs
// are unique in a cluster and workloads in a tenant, so the mark is of the tenant
// and of the workload's uid: always the same, and another one for a workload of
// the same name elsewhere or later. A name that is too long is cut before it.
func statefulName(k Key, uid string, index int32) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(k.Tenant + "/" + uid))
	tail := fmt.Sprintf("-%d-%s", index, mark(h.Sum32()))
	return strings.TrimRight(k.Workload[:min(len(k.Workload), maxName-len(tail))], "-") + tail
}

// mark is a number as four digits and letters.
func mark(n uint32) string {
	s := strconv.FormatUint(uint64(n)%(36*36*36*36), 36)
	return strings.Repeat("0", 4-len(s)) + s
}

// places says which revision each index should have: the current one from the
// highest index down, so that an update begins there.
func (d desired) places() []*linkv1.RevisionIntent {
	out := make([]*linkv1.RevisionIntent, 0, d.total)
	for _, r := range slices.Backward(d.revisions) {
		for range r.GetReplicas() {
			out = append(out, r)
		}
	}
	// A frozen update lists more than the total: what it keeps of the new revision
	// stands above.
	return out[max(0, len(out)-d.total):]
}

// stateful keeps one replica for every index. At most one record of an index is
// there at any time, whatever becomes of its node: a lost one may live on, with
// its data.
func (p *planner) stateful(k Key, w Workload, d desired, rs []*replica) {
	p.proposeLeaving(rs)
	want := d.places()
	at := make([]*replica, len(want))
	var rest []*replica
	for _, r := range rs {
		if i := int(r.GetIndex()); r.mine && i < len(at) && at[i] == nil {
			at[i] = r
		} else {
			r.surplus = true
			rest = append(rest, r)
		}
	}
	b := p.budget(k, d, d.total, rs)
	p.stopHighest(k, d, rest)
	p.startLowest(k, w, want, at, rest)
	p.updateHighest(k, d, b, want, at)
	p.plan.Allowances[k] = max(0, b.left)
	p.statefulProgress(k, w, d, want, at, rest)
}

// stopHighest stops what has no place any more, from the highest index down, each
// when the one above is gone. What its node keeps silent about is told, and not
// waited for.
func (p *planner) stopHighest(k Key, d desired, rest []*replica) {
	slices.SortFunc(rest, func(a, b *replica) int { return int(b.GetIndex()) - int(a.GetIndex()) })
	for _, r := range rest {
		if !r.Stop {
			code, reason := p.whyLeave(d, r)
			if r.mine && int(r.GetIndex()) >= d.total {
				code, reason = ScaleDown, "fewer replicas are wanted" // whatever its revision
			}
			p.stop(k, r, code, reason)
		}
		if r.mine && !r.lost {
			return
		}
	}
}

// startLowest creates the lowest index that is missing, when all below it are
// available.
func (p *planner) startLowest(k Key, w Workload, want []*linkv1.RevisionIntent, at, rest []*replica) {
	order := make([]int, len(want))
	for i := range order {
		order[i] = i
	}
	if p.in.faults.orderSwapped {
		slices.Reverse(order)
	}
	for _, i := range order {
		r := at[i]
		switch {
		case r == nil:
			p.start(k, w, want[i], int32(i), rest)
			return
		case r.lost:
			if p.in.faults.volumeDoubled {
				p.startAgain(k, w, want[i], int32(i))
			}
			p.plan.Waiting[k] = Note{ReplicaNodeLost, fmt.Sprintf("%s is on a node that is lost; there is never a second one", r.GetAllocation())}
			return
		case !r.available:
			return
		}
	}
}

func (p *planner) startAgain(k Key, w Workload, want *linkv1.RevisionIntent, index int32) {
	p.step(Step{Kind: Create, Key: k, Workload: w, Revision: want, Index: index, Name: fmt.Sprintf("%s-%d-again", k.Workload, index), Code: NodeLost, Reason: "a planted fault"})
}

func (p *planner) start(k Key, w Workload, want *linkv1.RevisionIntent, index int32, rest []*replica) {
	s := Step{
		Kind: Create, Key: k, Workload: w, Revision: want, Index: index, Name: statefulName(k, w.Intent.GetUid(), index),
		Code: StartInOrder, Reason: fmt.Sprintf("index %d is the lowest that is missing", index),
	}
	for _, r := range rest {
		// Where at most one may be in the world that holds for the name.
		same := r.GetIndex() == index && r.GetSpec().GetKind() == want.GetSpec().GetKind()
		if same || (!r.mine && want.GetSpec().GetPlacement().GetExclusive()) {
			p.plan.Waiting[k] = Note{EarlierLeaving, fmt.Sprintf("%s waits: %s of an earlier workload of the name is not gone yet", s.Name, r.GetAllocation())}
			return
		}
	}
	if a := p.in.Allocations[s.Name]; a != nil {
		if a.GetTenant() != k.Tenant || a.GetWorkload() != k.Workload { // its own is gone with this plan
			p.plan.Waiting[k] = Note{EarlierLeaving, fmt.Sprintf("%s waits: another workload's replica has its ID", s.Name)}
		}
		return
	}
	for _, v := range p.volumes[k] {
		if v.GetIndex() != index {
			continue
		}
		if note, ok := p.volumeReady(w, s.Name, v); !ok {
			p.plan.Waiting[k] = note
			return
		}
		s.Node = v.GetNode()
	}
	p.step(s)
}

// volumeReady says that a volume can be used, and why not.
func (p *planner) volumeReady(w Workload, name string, v *clusterv1.Volume) (Note, bool) {
	n, known := p.in.Nodes[v.GetNode()]
	switch {
	case v.GetUid() != w.Intent.GetUid():
		return Note{VolumeLeaving, fmt.Sprintf("%s waits: volume %s of an earlier workload of the name is still there", name, v.GetVolume())}, false
	case !known:
		return Note{VolumeNodeGone, fmt.Sprintf("%s waits: its volume %s is on a node that is no longer part of the cluster", name, v.GetVolume())}, false
	case n.lost():
		return Note{VolumeNodeLost, fmt.Sprintf("%s waits for its volume %s: the node of that is lost", name, v.GetVolume())}, false
	}
	return Note{}, true
}

// updateHighest takes replicas down that are of an older revision or are to leave
// their nodes, from the highest index on; the place is filled when they are gone.
func (p *planner) updateHighest(k Key, d desired, b *budget, want []*linkv1.RevisionIntent, at []*replica) {
	spare := d.down - d.total + off(p.in.faults.spareOffByOne)
	for _, r := range at {
		if r != nil && r.active() && r.available {
			spare++
		}
	}
	for i, r := range slices.Backward(at) {
		if r == nil || !r.active() {
			continue
		}
		serves := r.ready || r.mute
		if r.leave != nil && (r.leave.budgeted || !serves || spare > 0) {
			if p.leaveNode(k, d, b, r) && serves {
				spare--
			}
			continue
		}
		if r.of(want[i]) || (d.frozen && !r.outdated) || (serves && spare <= 0) {
			continue
		}
		if serves {
			spare--
			b.left--
		}
		p.stop(k, r, RevisionReplaced, fmt.Sprintf("revision %s makes way for %s", r.GetRevision(), want[i].GetRevision()))
	}
}

func (p *planner) statefulProgress(k Key, w Workload, d desired, want []*linkv1.RevisionIntent, at, rest []*replica) {
	available, through, old, lost, there := 0, 0, len(rest), false, 0
	for i, r := range at {
		if r == nil {
			continue
		}
		lost = lost || r.lost
		there++
		if r.active() && !r.of(want[i]) {
			old++
			continue
		}
		if r.available {
			available++
		}
		if r.through() {
			through++
		}
	}
	_, halted := p.plan.Halted[k]
	_, waiting := p.plan.Waiting[k]
	// One that is not there waits for its node or its volume: Scheduled tells of it.
	if halted || waiting || lost || d.frozen || (through >= there && old == 0) {
		return
	}
	all := append(slices.Clone(rest), slices.DeleteFunc(slices.Clone(at), func(r *replica) bool { return r == nil })...)
	p.overdue(k, w, d, all, fmt.Sprintf("%d of %d replicas are available, %d are to go", available, d.total, old))
}

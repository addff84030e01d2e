package manager

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
)

// This file finds nodes: the steps that create replicas become groups, groups wait
// in the queue until something can help them, and what is refused says why.

// waiting is a group of identical replicas that need nodes. It lives from the pass
// that first asks for them to the one that does not.
type waiting struct {
	steps []*reconcile.Step
	group schedule.Group
	since time.Time
	// bad is what is wrong with the spec.
	bad error
	// dropped: the queue was full.
	dropped bool
	// refused is what kept the group, the last time that nodes were looked for.
	refused []state.PendingReason
	// gang: told that it waits. expired: told that its deadline is over.
	gang, expired bool
}

func (w *waiting) owner() schedule.Owner {
	st := w.steps[0]
	return schedule.Owner{Tenant: st.Key.Tenant, Workload: st.Key.Workload, Revision: st.Revision.GetRevision()}
}

// create finds nodes for new replicas. Groups that wait for what has not come stay
// as they are.
func (d *decider) create(steps []*reconcile.Step, allowances map[reconcile.Key]int) {
	d.gather(steps)
	d.wakeForBudgets(allowances)
	b := schedule.Batch{Allowance: make(map[string]int, len(allowances))}
	for k, n := range allowances {
		b.Allowance[k.String()] = n
	}
	x := d.m.mirror
	var served []*waiting
	for _, key := range x.queue.Take(x.table, d.weights(), maxWaiting) {
		if w := d.m.waiting[key]; w != nil {
			b.Groups = append(b.Groups, w.group)
			served = append(served, w)
		}
	}
	if len(served) > 0 {
		result := schedule.Schedule(x.table, b)
		for i, w := range served {
			d.served(w, result.Placed[i])
		}
	}
	d.gangs()
}

// gather brings the waiting groups to what is asked for now.
func (d *decider) gather(steps []*reconcile.Step) {
	m := d.m
	now := map[string]*waiting{}
	var order []string
	var w *waiting
	for i, st := range steps {
		if i > 0 && w.alike(steps[i-1], st) {
			w.steps = append(w.steps, st)
			w.group.Count++
			continue
		}
		key, g := d.group(st)
		if w = now[key]; w == nil {
			w = &waiting{since: d.now}
			if was := m.waiting[key]; was != nil {
				*w = *was
			}
			w.steps, w.group, w.bad = nil, g, nil
			w.group.Class, w.bad = m.mirror.class(schedule.Owner{Tenant: st.Key.Tenant, Workload: st.Key.Workload, Revision: st.Revision.GetRevision()}, st.Revision.GetSpec())
			now[key] = w
			order = append(order, key)
		}
		w.steps = append(w.steps, st)
		w.group.Count++
	}
	for key := range m.waiting {
		if now[key] == nil {
			m.mirror.queue.Delete(key)
			m.mirror.table.Withdraw(key, "")
		}
	}
	was := m.waiting
	m.waiting = now
	for _, key := range order {
		w := now[key]
		if w.bad != nil {
			m.mirror.queue.Delete(key)
			w.refused = []state.PendingReason{{Code: "InvalidResources", Message: w.bad.Error()}}
			continue
		}
		more := w.group.Count
		if before := was[key]; before != nil {
			more -= before.group.Count
		}
		m.mirror.table.Observe(w.group.Class, more)
		dropped := m.mirror.queue.Put(schedule.Waiting{Key: key, Class: w.group.Class, Count: w.group.Count, Since: w.since})
		w.dropped = false
		if v := now[dropped]; v != nil {
			v.dropped = true
			v.refused = []state.PendingReason{{Code: "QueueFull", Message: fmt.Sprintf("more than %d groups wait for nodes", maxWaiting)}}
		}
	}
}

// alike says that the step after one of this group is of the same group, as nothing
// but the workload's revision decides about it.
func (w *waiting) alike(was, st *reconcile.Step) bool {
	return st.Revision == was.Revision && st.Key == was.Key && w.group.Node == "" && w.group.NotOn == "" &&
		st.Node == "" && st.Allocation == "" && len(st.Revision.GetSpec().GetVolumes()) == 0
}

// group is what a step's replica belongs to.
func (d *decider) group(st *reconcile.Step) (string, schedule.Group) {
	g := schedule.Group{Node: st.Node}
	if ids, here := d.volumesOf(st); here {
		// Its volumes bind it, whoever asks for it.
		g.VolumesThere = true
		g.Node = cmp.Or(g.Node, d.s.Volumes[ids[0]].GetNode())
	}
	if st.Allocation != "" && st.Disrupt {
		g.NotOn = d.s.Allocations[st.Allocation].GetNode()
	}
	key := st.Key.String() + "/" + st.Revision.GetRevision()
	if g.Node != "" || g.NotOn != "" || g.VolumesThere {
		key = fmt.Sprintf("%s@%s!%s/%t", key, g.Node, g.NotOn, g.VolumesThere)
	}
	g.Key = key
	return key, g
}

// wakeForBudgets wakes who may displace more than before.
func (d *decider) wakeForBudgets(now map[reconcile.Key]int) {
	for k, n := range now {
		if n > d.m.allowances[k] {
			d.m.mirror.queue.Wake(d.m.mirror.table, schedule.BudgetFreed, "")
			break
		}
	}
	d.m.allowances = now
}

// weights are the tenants' shares.
func (d *decider) weights() map[string]int32 {
	out := map[string]int32{}
	for _, w := range d.m.waiting {
		t := w.steps[0].Key.Tenant
		if spec := d.s.Intents["tenant/"+t].GetTenant().GetSpec(); spec.GetWeight() > 0 {
			out[t] = spec.GetWeight()
		}
	}
	return out
}

// served carries out what the scheduler decided about a group.
func (d *decider) served(w *waiting, p schedule.Placed) {
	x := d.m.mirror
	key := w.group.Key
	for i, b := range p.Bindings {
		d.bind(w.steps[i], schedule.Binding{Node: b.Node, Devices: slices.Clone(b.Devices)})
		if b.Kept {
			d.out.committed = append(d.out.committed, func() { x.table.Withdraw(key, b.Node) })
		}
	}
	for _, node := range p.Unkept {
		d.out.committed = append(d.out.committed, func() { x.table.Withdraw(key, node) })
	}
	for _, n := range p.Nominations {
		d.displace(w, n)
	}
	w.refused = nil
	if p.Refusal == nil {
		return
	}
	x.queue.Refuse(key, p.Refusal.Codes)
	for _, r := range p.Refusal.Reasons {
		w.refused = append(w.refused, state.PendingReason{Code: r.Code.String(), Message: r.Message, Count: r.Nodes})
	}
	if len(w.refused) == 0 {
		w.refused = []state.PendingReason{{Code: p.Refusal.Codes.String(), Message: p.Refusal.NearestReason}}
	}
	first := &w.refused[0]
	first.Nearest, first.NearestReason = p.Refusal.Nearest, p.Refusal.NearestReason
	for _, r := range p.Refusal.Remedies {
		first.Remedies = append(first.Remedies, state.Remedy{Code: remedyCode(r.Kind), Message: r.Message})
	}
	if p.Refusal.Codes&schedule.GangIncomplete != 0 && !w.gang {
		w.gang = true
		d.out.events = append(d.out.events, d.m.workloadEvent(w.steps[0].Key, "GangWaiting", "all replicas are to begin at once: "+first.Message, d.now))
	}
}

// displace stops the victims of a nomination and keeps their room. Tenants are not
// told of each other.
func (d *decider) displace(w *waiting, n schedule.Nomination) {
	const why = "a workload of higher priority needs its room"
	for _, id := range n.Victims {
		a := d.s.Allocations[id]
		if d.put[id].GetStop() {
			continue // the plan stops it already
		}
		k := reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}
		d.stop(reconcile.Step{Kind: reconcile.Stop, Key: k, Allocation: id, Code: reconcile.Displaced, Reason: why, Disrupt: true})
		d.disrupted(k, a.GetUid(), 1)
	}
	x, key, class, node := d.m.mirror, w.group.Key, w.group.Class, n.Node
	d.out.committed = append(d.out.committed, func() {
		for _, k := range n.Withdrawn {
			x.table.Withdraw(k, node)
			x.queue.Ready(k) // it waits for room that it will not have
		}
		x.table.Nominate(key, class, node)
	})
	d.out.events = append(d.out.events, d.m.workloadEvent(w.steps[0].Key, "Nominated", fmt.Sprintf("room is made on a node: %d replicas of lower priority leave it", len(n.Victims)), d.now))
}

// gangs tells of those whose deadline is over.
func (d *decider) gangs() {
	expired, next := d.m.mirror.queue.Expired(d.now)
	d.out.next = next
	for _, key := range expired {
		w := d.m.waiting[key]
		if w == nil {
			continue
		}
		late := state.PendingReason{Code: "GangDeadline", Message: "not all replicas found room before the deadline"}
		if !slices.ContainsFunc(w.refused, late.Equal) { // it is said again after each time that it was served
			w.refused = append(w.refused, late)
		}
		if !w.expired {
			w.expired = true
			d.out.events = append(d.out.events, d.m.workloadEvent(w.steps[0].Key, "GangExpired", "not all replicas found room before the deadline", d.now))
		}
	}
}

// pendingNow gathers why replicas wait, by workload.
func (m *Manager) pendingNow() map[string][]state.PendingReason {
	out := map[string][]state.PendingReason{}
	for _, key := range slices.Sorted(maps.Keys(m.waiting)) {
		w := m.waiting[key]
		k, rev := w.steps[0].Key.String(), w.steps[0].Revision.GetRevision()
		for _, r := range w.refused {
			r.Replica = rev
			i := slices.IndexFunc(out[k], func(p state.PendingReason) bool { return p.Replica == rev && p.Code == r.Code })
			if i >= 0 {
				out[k][i].Count += r.Count
				continue
			}
			out[k] = append(out[k], r)
		}
	}
	return out
}

// remedyCodes are stable words for what to change.
var remedyCodes = map[schedule.RemedyKind]string{
	schedule.AskLessCPU: "AskLessCPU", schedule.AskLessMemory: "AskLessMemory", schedule.AskLessStorage: "AskLessStorage",
	schedule.AskSmallerShare: "AskSmallerShare", schedule.AskFewerDevices: "AskFewerDevices", schedule.AllowModel: "AllowModel",
	schedule.FreeCPU: "FreeCPU", schedule.FreeMemory: "FreeMemory", schedule.FreeStorage: "FreeStorage", schedule.FreeAddress: "FreeAddress",
	schedule.FreePort: "FreePort", schedule.Uncordon: "Uncordon", schedule.Tolerate: "Tolerate", schedule.LabelNode: "LabelNode",
	schedule.DropSelector: "DropSelector", schedule.DropNodeAffinity: "DropNodeAffinity", schedule.PreferAffinity: "PreferAffinity",
	schedule.PreferAntiAffinity: "PreferAntiAffinity", schedule.RaiseSkew: "RaiseSkew", schedule.PreferSpread: "PreferSpread",
	schedule.AllowSpot: "AllowSpot", schedule.RaisePriority: "RaisePriority", schedule.FewerReplicas: "FewerReplicas",
	schedule.AddNode: "AddNode", schedule.WaitForNode: "WaitForNode",
}

func remedyCode(k schedule.RemedyKind) string { return cmp.Or(remedyCodes[k], "Change") }

package manager

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/autoscale"
	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// This file learns from what replicas use what they should request. It only
// advises: nothing is changed by it.

const (
	// learnEvery is how often what replicas use is added to the profiles.
	learnEvery = time.Minute
	// adviseEvery is how often advice follows from them.
	adviseEvery = 5 * time.Minute
	// saveEvery is how often a profile is written, and maxSaves how many are at a
	// time.
	saveEvery = time.Hour
	maxSaves  = 64
)

// oomKilled is the reason that node agents give an exit for want of memory.
const oomKilled = "OOMKilled"

// learnt is what is known of how much replicas use.
type learnt struct {
	next, nextAdvice time.Time
	profiles         map[reconcile.Key]*profile
	advice           map[string]*portolanv1.RequestAdvice
}

// profile is what is known of one workload.
type profile struct {
	autoscale.Profile
	uid   string
	saved time.Time
	// read are the times of the readings of its replicas that were added last, and
	// killed those of their last exits for want of memory.
	read, killed map[string]time.Time
	requested    api.Resources
}

// learn adds what replicas use to the profiles of their workloads, when it is time,
// and puts the profiles that are to be written into the input and the change.
func (m *Manager) learn(s *state.Snapshot, in *reconcile.Input, now time.Time, c *scaleChange) {
	l := &m.learnt
	if now.Before(l.next) {
		return
	}
	l.next = now.Add(learnEvery)
	// One that has no replicas for now is not forgotten.
	maps.DeleteFunc(l.profiles, func(k reconcile.Key, p *profile) bool { return in.Workloads[k].Intent.GetUid() != p.uid })
	for id, a := range s.Allocations {
		k := reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}
		w, known := in.Workloads[k]
		if !known || a.GetUid() != w.Intent.GetUid() || a.GetFinal() != nil {
			continue
		}
		p := l.profiles[k]
		if p == nil {
			p = newProfile(a.GetUid(), in.States[k], now)
			l.profiles[k] = p
		}
		p.add(id, a, a.GetRevision() == w.Intent.GetCurrentRevision(), s.NodeStatus[a.GetNode()])
	}
	for _, p := range l.profiles {
		maps.DeleteFunc(p.read, func(id string, _ time.Time) bool { return s.Allocations[id] == nil })
		maps.DeleteFunc(p.killed, func(id string, _ time.Time) bool { return s.Allocations[id] == nil })
	}
	if !now.Before(l.nextAdvice) {
		l.nextAdvice = now.Add(adviseEvery)
		m.advise()
	}
	l.save(in, now, c)
}

// newProfile goes on with the one that was written, if that is of the same workload.
func newProfile(uid string, st *clusterv1.WorkloadState, now time.Time) *profile {
	p := &profile{uid: uid, saved: now, read: map[string]time.Time{}, killed: map[string]time.Time{}}
	if st.GetUid() == uid && len(st.GetProfile()) > 0 {
		if err := p.UnmarshalBinary(st.GetProfile()); err != nil {
			p.Profile = autoscale.Profile{} // of another version: it learns anew
		}
	}
	return p
}

// add takes in what is new of one replica; current says that it is of the revision
// that should run.
func (p *profile) add(id string, a *clusterv1.Allocation, current bool, st *state.NodeStatus) {
	r, err := api.RequestsOf(a.GetSpec())
	if err != nil {
		return
	}
	if current || p.requested == (api.Resources{}) {
		p.requested = r
	}
	if st == nil {
		return
	}
	o := st.Allocations[id]
	if at := o.GetUsage().GetTime().AsTime(); o.GetUsage() != nil && at.After(p.read[id]) {
		p.read[id] = at
		p.Observe(o.GetUsage(), r)
	}
	for _, ctr := range o.GetContainers() {
		at := ctr.GetLastExitTime().AsTime()
		if ctr.GetLastExitReason() == oomKilled && at.After(p.killed[id]) {
			p.killed[id] = at
			p.ObserveOOM(at, max(ctr.GetMemoryBytes(), o.GetUsage().GetMemoryBytes()))
		}
	}
}

// advise works out what the replicas of each workload should request.
func (m *Manager) advise() {
	l := &m.learnt
	l.advice = make(map[string]*portolanv1.RequestAdvice, len(l.profiles))
	for k, p := range l.profiles {
		r := autoscale.Recommend(&p.Profile)
		if r.Reason.GetCode() != autoscale.Recommended {
			continue
		}
		l.advice[k.String()] = &portolanv1.RequestAdvice{
			Cluster: m.cfg.Cluster, Requested: resources(p.requested), Lower: resources(r.Lower), Target: resources(r.Target), Upper: resources(r.Upper), Reason: r.Reason,
		}
	}
}

func resources(r api.Resources) *portolanv1.ReplicaResources {
	return &portolanv1.ReplicaResources{CpuMilli: r.CPUMilli, MemoryBytes: r.MemoryBytes}
}

// save puts the profiles that were not written for longest into their workloads'
// states.
func (l *learnt) save(in *reconcile.Input, now time.Time, c *scaleChange) {
	var due []reconcile.Key
	for k, p := range l.profiles {
		if now.Sub(p.saved) >= saveEvery {
			due = append(due, k)
		}
	}
	if len(due) == 0 {
		return
	}
	slices.SortFunc(due, func(a, b reconcile.Key) int {
		return cmp.Or(l.profiles[a].saved.Compare(l.profiles[b].saved), compareKeys(a, b))
	})
	in.States = maps.Clone(in.States)
	if in.States == nil {
		in.States = map[reconcile.Key]*clusterv1.WorkloadState{}
	}
	for _, k := range due[:min(len(due), maxSaves)] {
		p := l.profiles[k]
		b, err := p.MarshalBinary()
		if err != nil {
			continue
		}
		st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: p.uid}
		if was := in.States[k]; was.GetUid() == p.uid {
			st = proto.CloneOf(was)
		}
		st.Profile = b
		in.States[k], c.states[k] = st, st
		c.saved = append(c.saved, p)
	}
}

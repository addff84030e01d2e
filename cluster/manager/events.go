package manager

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// mergeWithin is how many of the newest events are looked at for one that says
// the same: it is counted instead of said again.
const mergeWithin = 64

// ring holds the newest events, bounded.
type ring struct {
	mu     sync.Mutex
	max    int
	events []*portolanv1.Event // oldest first; never changed in place
}

func newRing(limit int) *ring { return &ring{max: limit} }

func (r *ring) add(e *portolanv1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := len(r.events) - 1; i >= max(0, len(r.events)-mergeWithin); i-- {
		o := r.events[i]
		if o.GetObject() == e.GetObject() && o.GetType() == e.GetType() && o.GetMessage() == e.GetMessage() {
			e = proto.CloneOf(e)
			e.Count = max(1, e.GetCount()) + o.GetCount()
			r.events = slices.Delete(r.events, i, i+1)
			break
		}
	}
	r.events = append(r.events, e)
	if len(r.events) > r.max {
		r.events = slices.Delete(r.events, 0, len(r.events)-r.max)
	}
}

// Events gives the newest events, oldest first. They may not be changed.
func (m *Manager) Events() []*portolanv1.Event {
	m.events.mu.Lock()
	defer m.events.mu.Unlock()
	return slices.Clone(m.events.events)
}

// AddEvents takes events, the nodes' among them. An event that says what a recent
// one said raises that one's count.
func (m *Manager) AddEvents(events ...*portolanv1.Event) {
	for _, e := range events {
		if e.GetCluster() == "" || e.GetCount() == 0 {
			e = proto.CloneOf(e)
			e.Cluster, e.Count = m.cfg.Cluster, max(1, e.GetCount())
		}
		m.events.add(e)
	}
}

func (m *Manager) clusterEvent(typ, message string, now time.Time) *portolanv1.Event {
	return &portolanv1.Event{Time: timestamppb.New(now), Object: api.ClusterName(m.cfg.Cluster), Type: typ, Message: message, Cluster: m.cfg.Cluster, Count: 1}
}

func (m *Manager) nodeEvent(node, typ, message string, now time.Time) *portolanv1.Event {
	e := m.clusterEvent(typ, message, now)
	e.Object += "/nodes/" + node
	return e
}

func (m *Manager) workloadEvent(k reconcile.Key, typ, message string, now time.Time) *portolanv1.Event {
	e := m.clusterEvent(typ, message, now)
	e.Object = api.WorkloadName(k.Tenant, k.Workload)
	return e
}

// noteHalted tells of workloads that halt or go on.
func (m *Manager) noteHalted(halted map[reconcile.Key]reconcile.Note, now time.Time) {
	for k, why := range halted {
		if _, was := m.halted[k]; !was {
			m.AddEvents(m.workloadEvent(k, "Halted", why.Code+": "+why.Message, now))
			m.cfg.Log.Warn("workload halted", "workload", k.String(), "code", why.Code, "why", why.Message)
		}
	}
	for k := range m.halted {
		if _, is := halted[k]; !is {
			m.AddEvents(m.workloadEvent(k, "Resumed", "it progresses again", now))
		}
	}
	m.halted = halted
}

// notePending tells of workloads whose replicas find no node.
func (m *Manager) notePending(pending map[string][]state.PendingReason, now time.Time) {
	is := make(map[string]bool, len(pending))
	for _, key := range slices.Sorted(maps.Keys(pending)) {
		is[key] = true
		if m.pending[key] || len(pending[key]) == 0 {
			continue
		}
		if pending[key][0].Code == schedule.Nominated.String() {
			delete(is, key) // room is being made, which was told of
			continue
		}
		e := m.clusterEvent("Unschedulable", fmt.Sprintf("%s: %s", pending[key][0].Code, pending[key][0].Message), now)
		e.Object = workloadOf(key)
		m.AddEvents(e)
	}
	m.pending = is
}

// workloadOf makes a name of a "tenant/workload" key.
func workloadOf(key string) string {
	tenant, workload, _ := strings.Cut(key, "/")
	return api.WorkloadName(tenant, workload)
}

// waitingNotes says of workloads that nothing is done about why, by their keys.
func waitingNotes(waiting map[reconcile.Key]reconcile.Note) map[string]state.Blocked {
	out := make(map[string]state.Blocked, len(waiting))
	for k, n := range waiting {
		out[k.String()] = state.Blocked{Code: n.Code, Message: n.Message}
	}
	return out
}

package manager

import (
	"fmt"
	"hash/maphash"
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
	mu  sync.Mutex
	max int
	// events, oldest first; never changed in place. There may be up to twice max: the
	// old half goes at once. sums are the hashes of what they say.
	events []*portolanv1.Event
	sums   []uint64
	seed   maphash.Seed
}

func newRing(limit int) *ring { return &ring{max: limit, seed: maphash.MakeSeed()} }

// sum hashes what an event says.
func (r *ring) sum(e *portolanv1.Event) uint64 {
	return maphash.Comparable(r.seed, [3]string{e.GetObject(), e.GetType(), e.GetMessage()})
}

func (r *ring) add(e *portolanv1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	sum := r.sum(e)
	for i := len(r.events) - 1; i >= max(0, len(r.events)-mergeWithin); i-- {
		o := r.events[i]
		if r.sums[i] == sum && o.GetObject() == e.GetObject() && o.GetType() == e.GetType() && o.GetMessage() == e.GetMessage() {
			e = proto.CloneOf(e)
			e.Count = max(1, e.GetCount()) + o.GetCount()
			r.events, r.sums = slices.Delete(r.events, i, i+1), slices.Delete(r.sums, i, i+1)
			break
		}
	}
	r.events, r.sums = append(r.events, e), append(r.sums, sum)
	if old := len(r.events) - r.max; old >= r.max {
		r.events, r.sums = slices.Delete(r.events, 0, old), slices.Delete(r.sums, 0, old)
	}
}

// newest gives the newest max events, oldest first.
func (r *ring) newest() []*portolanv1.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events[max(0, len(r.events)-r.max):])
}

// Events gives the newest events, oldest first. They may not be changed.
func (m *Manager) Events() []*portolanv1.Event {
	return m.events.newest()
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

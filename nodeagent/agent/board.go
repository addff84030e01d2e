package agent

import (
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const (
	maxEvents    = 2000 // kept for ListEvents
	maxUnacked   = 1000 // kept for the report stream
	maxPerReport = 200  // events in one report
)

// record is what the board knows of an allocation.
type record struct {
	assignment *nodev1.Assignment
	status     *nodev1.AllocationStatus
}

type sentEvent struct {
	event *portolanv1.Event
	// sequence of the report that carries it; 0 while none does.
	sequence int64
}

// board is what others may read of the agent's state, and what changed since the
// last report.
type board struct {
	mu      sync.Mutex
	records map[string]record
	dirty   map[string]bool // allocations whose status changed
	removed map[string]bool
	events  []*portolanv1.Event
	unacked []sentEvent
	own     *nodev1.Watermark
	proxies map[string]*nodev1.ProxyStatus
	dirtyPx map[string]bool
	facts   *nodev1.NodeFacts
	dirtyFx bool
	// gone are volumes that were to go and are; true until they were reported.
	gone   map[string]bool
	notify chan struct{} // closed and replaced at each change
}

func newBoard(facts *nodev1.NodeFacts) *board {
	return &board{
		records: map[string]record{}, dirty: map[string]bool{}, removed: map[string]bool{},
		proxies: map[string]*nodev1.ProxyStatus{}, dirtyPx: map[string]bool{}, facts: facts, gone: map[string]bool{}, notify: make(chan struct{}),
	}
}

// changed wakes the reporter; the lock is held.
func (b *board) changed() {
	close(b.notify)
	b.notify = make(chan struct{})
}

func (b *board) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.notify
}

// publish takes a status. What differs in memory figures alone is kept, but is
// no reason for a report; what the replica uses stays as it was measured.
func (b *board) publish(a *nodev1.Assignment, s *nodev1.AllocationStatus) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old, ok := b.records[s.GetAllocation()]
	if s.GetState() == portolanv1.ReplicaState_REPLICA_STATE_RUNNING {
		s.Usage = old.status.GetUsage()
	}
	b.records[s.GetAllocation()] = record{a, s}
	delete(b.removed, s.GetAllocation())
	if ok && proto.Equal(withoutMemory(old.status), withoutMemory(s)) {
		return
	}
	b.dirty[s.GetAllocation()] = true
	b.changed()
}

func withoutMemory(s *nodev1.AllocationStatus) *nodev1.AllocationStatus {
	c := proto.CloneOf(s)
	c.Usage = nil
	for _, ct := range c.GetContainers() {
		ct.MemoryBytes = 0
	}
	return c
}

// setUsage takes what replicas use. What hardly differs is not taken over: a status
// that is sent for another reason carries what was reported last.
func (b *board) setUsage(all map[string]*nodev1.Usage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := false
	for id, u := range all {
		r, ok := b.records[id]
		if !ok || r.status.GetState() != portolanv1.ReplicaState_REPLICA_STATE_RUNNING || !noticeable(r.status.GetUsage(), u) {
			continue
		}
		// The message may be on its way in a report: change a copy.
		r.status = proto.CloneOf(r.status)
		r.status.Usage = u
		b.records[id] = r
		b.dirty[id], changed = true, true
	}
	if changed {
		b.changed()
	}
}

// setImages notes which images are here.
func (b *board) setImages(images []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slices.Equal(b.facts.GetImages(), images) {
		return
	}
	b.facts = proto.CloneOf(b.facts)
	b.facts.Images, b.dirtyFx = images, true
	b.changed()
}

// volumeGone notes that a volume which was to go is gone.
func (b *board) volumeGone(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.gone[id]; !known {
		b.gone[id] = true
		b.changed()
	}
}

// keepRemovals forgets the volumes that nobody asks for any more.
func (b *board) keepRemovals(asked map[string]bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.gone, func(id string, _ bool) bool { return !asked[id] })
}

func (b *board) forget(allocation string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.records, allocation)
	delete(b.dirty, allocation)
	b.removed[allocation] = true
	b.changed()
}

func (b *board) event(object, typ, message string, at time.Time) {
	e := &portolanv1.Event{Time: timestamppb.New(at), Object: object, Type: typ, Message: message, Count: 1}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, e)
	if over := len(b.events) - maxEvents; over > 0 {
		b.events = slices.Delete(b.events, 0, over)
	}
	b.unacked = append(b.unacked, sentEvent{event: e})
	if over := len(b.unacked) - maxUnacked; over > 0 {
		b.unacked = slices.Delete(b.unacked, 0, over) // the oldest go first
	}
	b.changed()
}

func (b *board) setOwn(w *nodev1.Watermark) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.own = w
	b.changed()
}

func (b *board) setProxies(all []*nodev1.ProxyStatus) {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := map[string]bool{}
	for _, p := range all {
		seen[p.GetAllocation()] = true
		if !proto.Equal(b.proxies[p.GetAllocation()], p) {
			b.proxies[p.GetAllocation()] = p
			b.dirtyPx[p.GetAllocation()] = true
		}
	}
	for id := range b.proxies {
		if !seen[id] {
			delete(b.proxies, id)
			b.dirtyPx[id] = true
		}
	}
	if len(b.dirtyPx) > 0 {
		b.changed()
	}
}

// appliedNow is min(own, proxies); the lock is held.
func (b *board) appliedNow() *nodev1.Watermark {
	if b.own == nil {
		return nil
	}
	w := &nodev1.Watermark{Revision: b.own.GetRevision(), Generation: b.own.GetGeneration()}
	for _, p := range b.proxies {
		w.Revision = min(w.Revision, p.GetApplied().GetRevision())
		w.Generation = min(w.Generation, p.GetApplied().GetGeneration())
	}
	return w
}

// report makes the next report of a stream, full or what changed.
func (b *board) report(session, sequence int64, full bool) *nodev1.NodeReport {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &nodev1.NodeReport{Session: session, Sequence: sequence, Full: full, Applied: b.appliedNow()}
	if full {
		r.Facts = b.facts
		for _, id := range slices.Sorted(maps.Keys(b.records)) {
			r.Allocations = append(r.Allocations, b.records[id].status)
		}
		for _, id := range slices.Sorted(maps.Keys(b.proxies)) {
			r.Proxies = append(r.Proxies, b.proxies[id])
		}
	} else {
		for _, id := range slices.Sorted(maps.Keys(b.dirty)) {
			r.Allocations = append(r.Allocations, b.records[id].status)
		}
		for _, id := range slices.Sorted(maps.Keys(b.dirtyPx)) {
			if p := b.proxies[id]; p != nil {
				r.Proxies = append(r.Proxies, p)
			} else {
				r.RemovedProxies = append(r.RemovedProxies, id)
			}
		}
	}
	if b.dirtyFx {
		r.Facts = b.facts
	}
	for _, id := range slices.Sorted(maps.Keys(b.gone)) {
		if full || b.gone[id] {
			r.RemovedVolumes = append(r.RemovedVolumes, id)
			b.gone[id] = false
		}
	}
	b.dirtyFx = false
	r.Removed = slices.Sorted(maps.Keys(b.removed))
	clear(b.dirty)
	clear(b.dirtyPx)
	clear(b.removed)
	for i := range b.unacked {
		if len(r.Events) == maxPerReport {
			break
		}
		if e := &b.unacked[i]; e.sequence == 0 || full {
			e.sequence = sequence
			r.Events = append(r.Events, e.event)
		}
	}
	return r
}

// acked lets go of the events that the cluster has.
func (b *board) acked(sequence int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unacked = slices.DeleteFunc(b.unacked, func(e sentEvent) bool { return e.sequence > 0 && e.sequence <= sequence })
}

// reopened makes what was sent on an ended stream unsent again.
func (b *board) reopened() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.unacked {
		b.unacked[i].sequence = 0
	}
}

func (b *board) get(allocation string) (record, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r, ok := b.records[allocation]
	return r, ok
}

func (b *board) all() []record {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []record
	for _, id := range slices.Sorted(maps.Keys(b.records)) {
		out = append(out, b.records[id])
	}
	return out
}

func (b *board) proxyApplied(allocation string) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.proxies[allocation].GetApplied().GetRevision()
}

func (b *board) eventsOf(match func(object string) bool, limit int) []*portolanv1.Event {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []*portolanv1.Event
	for i := len(b.events) - 1; i >= 0 && len(out) < limit; i-- {
		if match(b.events[i].GetObject()) {
			out = append(out, b.events[i])
		}
	}
	slices.Reverse(out)
	return out
}

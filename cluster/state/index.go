package state

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// maxTombstones bounds how many deleted keys are remembered for the check of a
// change's base; a change whose base is older than all of them is refused.
const maxTombstones = 8192

// Index is the memory that the implementations of Store share: the newest state,
// handed out as snapshots that share what did not change. A map is copied once,
// when it is written for the first time after it was handed out, and never
// deeply.
//
// Concurrency: safe for concurrent use. Its owner lets one writer at a time
// check, persist and apply; Observe and SetPending may run beside that.
type Index struct {
	mu sync.Mutex
	// now is the working state; the maps named in shared belong to snapshots too.
	now    Snapshot
	shared map[section]bool
	handed *Snapshot // of the present state; nil when it changed since

	nodeGen    map[string]int64
	volumeGen  map[string]int64
	stateGen   map[string]int64
	tombstones []tombstone // oldest first
	dead       map[recordKey]int64
	// forgotten is the generation of the newest deletion that is remembered no
	// more.
	forgotten int64

	wake   chan struct{} // closed at the next change
	closed bool
}

type tombstone struct {
	key recordKey
	gen int64
}

type section int

const (
	secIntents section = iota
	secTimes
	secNodes
	secAllocations
	secModified
	secVolumes
	secStates
	secStatus
)

// Loaded is what an implementation found when it was opened.
type Loaded struct {
	// Generation to begin with; greater than any handed out before.
	Generation     int64
	IntentRevision int64
	Intents        map[string]*linkv1.Intent
	IntentTimes    map[string]time.Time
	Degraded       string
	Nodes          map[string]*clusterv1.Node
	Allocations    map[string]*clusterv1.Allocation
	Volumes        map[string]*clusterv1.Volume
	States         map[string]*clusterv1.WorkloadState
	Settled        int64
}

// NewIndex makes the memory out of what was loaded; it takes over its maps.
func NewIndex(l Loaded) *Index {
	x := &Index{
		now: Snapshot{
			Generation: max(l.Generation, 1), IntentRevision: l.IntentRevision, Intents: orEmpty(l.Intents), IntentTimes: orEmpty(l.IntentTimes),
			Degraded: l.Degraded, Nodes: orEmpty(l.Nodes), Allocations: orEmpty(l.Allocations),
			Volumes: orEmpty(l.Volumes), States: orEmpty(l.States),
			Settled: min(l.Settled, l.IntentRevision), Modified: make(map[string]int64, len(l.Allocations)),
			NodeStatus: map[string]*NodeStatus{}, Pending: map[string][]PendingReason{},
		},
		shared: map[section]bool{}, nodeGen: make(map[string]int64, len(l.Nodes)),
		volumeGen: make(map[string]int64, len(l.Volumes)), stateGen: make(map[string]int64, len(l.States)), dead: map[recordKey]int64{}, wake: make(chan struct{}),
	}
	for id := range x.now.Allocations {
		x.now.Modified[id] = x.now.Generation
	}
	for id := range x.now.Nodes {
		x.nodeGen[id] = x.now.Generation
	}
	for id := range x.now.Volumes {
		x.volumeGen[id] = x.now.Generation
	}
	for key := range x.now.States {
		x.stateGen[key] = x.now.Generation
	}
	return x
}

func orEmpty[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return m
}

// Snapshot gives the present state.
func (x *Index) Snapshot() *Snapshot {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.handed == nil {
		s := x.now
		x.handed = &s
		for sec := secIntents; sec <= secStatus; sec++ {
			x.shared[sec] = true
		}
	}
	return x.handed
}

// own makes a map writable: a snapshot that holds it keeps the old one.
func own[V any](x *Index, sec section, m *map[string]V) map[string]V {
	if x.shared[sec] {
		*m = maps.Clone(*m)
		x.shared[sec] = false
	}
	return *m
}

// Wait blocks until the generation is greater than after.
func (x *Index) Wait(ctx context.Context, after int64) error {
	for {
		x.mu.Lock()
		gen, wake, closed := x.now.Generation, x.wake, x.closed
		x.mu.Unlock()
		if closed {
			return Closed("wait for a change")
		}
		if gen > after {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ContextError("wait for a change", ctx.Err())
		}
	}
}

// changed raises the generation and wakes the waiters; with mu held.
func (x *Index) changed() {
	x.now.Generation++
	x.handed = nil
	if !x.closed {
		close(x.wake)
		x.wake = make(chan struct{})
	}
}

// Close ends all waits.
func (x *Index) Close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.closed {
		x.closed = true
		close(x.wake)
	}
}

// IsClosed says whether Close was called.
func (x *Index) IsClosed() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.closed
}

// IntentChange is how a set of intents differs from the newest.
type IntentChange struct {
	Revision int64
	Time     time.Time
	// Put holds the changed ones, Removed the names that went.
	Put     map[string]*linkv1.Intent
	Removed []string
}

// DiffIntents gives what CommitIntents has to persist; api.Conflict for an older
// revision than the newest.
func (x *Index) DiffIntents(revision int64, intents map[string]*linkv1.Intent, now time.Time) (IntentChange, error) {
	s := x.Snapshot()
	if revision < s.IntentRevision {
		return IntentChange{}, api.E(api.Conflict, "commit intents", "revision %d is older than %d, which is committed", revision, s.IntentRevision)
	}
	c := IntentChange{Revision: revision, Time: now, Put: map[string]*linkv1.Intent{}}
	for name, in := range intents {
		if was, ok := s.Intents[name]; !ok || (was != in && !proto.Equal(was, in)) {
			c.Put[name] = in
		}
	}
	for name := range s.Intents {
		if _, ok := intents[name]; !ok {
			c.Removed = append(c.Removed, name)
		}
	}
	return c, nil
}

// ApplyIntents makes a change of intents visible.
func (x *Index) ApplyIntents(c IntentChange) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(c.Put)+len(c.Removed) > 0 {
		intents, times := own(x, secIntents, &x.now.Intents), own(x, secTimes, &x.now.IntentTimes)
		for name, in := range c.Put {
			intents[name], times[name] = in, c.Time
		}
		for _, name := range c.Removed {
			delete(intents, name)
			delete(times, name)
		}
	}
	x.now.IntentRevision, x.now.Degraded = c.Revision, ""
	x.changed()
}

// Check says whether a change may be written: none of what it touches changed
// after its base.
func (x *Index) Check(c Change) error {
	const doing = "commit a change"
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return Closed(doing)
	}
	if c.Settled > x.now.IntentRevision {
		return api.E(api.Invalid, doing, "settled %d is beyond the intents' revision %d", c.Settled, x.now.IntentRevision)
	}
	for k := range c.touched() {
		if g := x.lastTouched(k); g > c.Base {
			return api.E(api.Conflict, doing, "%s %s changed at generation %d, after %d", k.kind, k.id, g, c.Base)
		}
	}
	return nil
}

// lastTouched is the generation of a record's last change, deletions included; an
// absent one may have been deleted as late as the newest forgotten deletion.
func (x *Index) lastTouched(k recordKey) int64 {
	if gen := x.generations(k.kind)[k.id]; gen > 0 {
		return gen
	}
	return max(x.dead[k], x.forgotten)
}

// generations says at which one each record of a kind changed last.
func (x *Index) generations(kind recordKind) map[string]int64 {
	switch kind {
	case kindAllocation:
		return x.now.Modified
	case kindNode:
		return x.nodeGen
	case kindVolume:
		return x.volumeGen
	default:
		return x.stateGen
	}
}

// Apply makes a checked change visible. A change that says nothing new leaves
// the generation alone.
func (x *Index) Apply(c Change) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if c.Empty() && c.Settled <= x.now.Settled {
		return
	}
	x.checkChange(c)
	gen := x.now.Generation + 1
	x.applyAllocations(c, gen)
	x.applyNodes(c, gen)
	x.applyVolumes(c, gen)
	x.applyStates(c, gen)
	x.now.Settled = max(x.now.Settled, c.Settled)
	x.changed()
}

func (x *Index) applyAllocations(c Change, gen int64) {
	if len(c.PutAllocations)+len(c.DeleteAllocations) == 0 {
		return
	}
	allocs, mod := own(x, secAllocations, &x.now.Allocations), own(x, secModified, &x.now.Modified)
	for _, a := range c.PutAllocations {
		allocs[a.GetAllocation()], mod[a.GetAllocation()] = a, gen
		delete(x.dead, recordKey{kindAllocation, a.GetAllocation()})
	}
	for _, id := range c.DeleteAllocations {
		delete(allocs, id)
		delete(mod, id)
		x.bury(recordKey{kindAllocation, id}, gen)
	}
}

func (x *Index) applyNodes(c Change, gen int64) {
	if len(c.PutNodes)+len(c.DeleteNodes) == 0 {
		return
	}
	nodes := own(x, secNodes, &x.now.Nodes)
	for _, n := range c.PutNodes {
		nodes[n.GetNode()], x.nodeGen[n.GetNode()] = n, gen
		delete(x.dead, recordKey{kindNode, n.GetNode()})
	}
	for _, id := range c.DeleteNodes {
		delete(nodes, id)
		delete(x.nodeGen, id)
		x.bury(recordKey{kindNode, id}, gen)
		if _, ok := x.now.NodeStatus[id]; ok {
			delete(own(x, secStatus, &x.now.NodeStatus), id)
		}
	}
}

func (x *Index) applyVolumes(c Change, gen int64) {
	if len(c.PutVolumes)+len(c.DeleteVolumes) == 0 {
		return
	}
	volumes := own(x, secVolumes, &x.now.Volumes)
	for _, v := range c.PutVolumes {
		volumes[v.GetVolume()], x.volumeGen[v.GetVolume()] = v, gen
		delete(x.dead, recordKey{kindVolume, v.GetVolume()})
	}
	for _, id := range c.DeleteVolumes {
		delete(volumes, id)
		delete(x.volumeGen, id)
		x.bury(recordKey{kindVolume, id}, gen)
	}
}

func (x *Index) applyStates(c Change, gen int64) {
	if len(c.PutStates)+len(c.DeleteStates) == 0 {
		return
	}
	states := own(x, secStates, &x.now.States)
	for _, w := range c.PutStates {
		key := StateKey(w)
		states[key], x.stateGen[key] = w, gen
		delete(x.dead, recordKey{kindState, key})
	}
	for _, key := range c.DeleteStates {
		delete(states, key)
		delete(x.stateGen, key)
		x.bury(recordKey{kindState, key}, gen)
	}
}

func (x *Index) bury(k recordKey, gen int64) {
	x.dead[k] = gen
	x.tombstones = append(x.tombstones, tombstone{k, gen})
	for len(x.tombstones) > maxTombstones {
		t := x.tombstones[0]
		x.tombstones = x.tombstones[1:]
		if x.dead[t.key] == t.gen {
			delete(x.dead, t.key)
			x.forgotten = max(x.forgotten, t.gen)
		}
	}
}

// Observe implements Store.
func (x *Index) Observe(node string, s *NodeStatus) error {
	doing := "observe node " + node
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return Closed(doing)
	}
	n, ok := x.now.Nodes[node]
	if !ok {
		return api.E(api.NotFound, doing, "it is not registered")
	}
	was := x.now.NodeStatus[node]
	if was != nil && s.Session < was.Session {
		return api.E(api.Conflict, doing, "session %d is older than %d", s.Session, was.Session)
	}
	own(x, secStatus, &x.now.NodeStatus)[node] = s
	x.handed = nil
	if was == nil || n.GetLostTime() != nil || !sameStatus(was, s) {
		x.changed()
	}
	return nil
}

// sameStatus says that two observations differ in LastSeen and in what replicas
// use at most.
func sameStatus(a, b *NodeStatus) bool {
	return a.Connected == b.Connected && a.Session == b.Session &&
		(a.Facts == b.Facts || proto.Equal(a.Facts, b.Facts)) && (a.Applied == b.Applied || proto.Equal(a.Applied, b.Applied)) &&
		maps.EqualFunc(a.Allocations, b.Allocations, sameAllocation) && maps.EqualFunc(a.Proxies, b.Proxies, sameMessage) &&
		maps.Equal(a.RemovedVolumes, b.RemovedVolumes)
}

// sameAllocation says that two observations of a replica differ in its usage at
// most.
func sameAllocation(a, b *nodev1.AllocationStatus) bool {
	return a == b || proto.Equal(withoutUsage(a), withoutUsage(b))
}

// withoutUsage shares the messages of what it copies.
func withoutUsage(s *nodev1.AllocationStatus) *nodev1.AllocationStatus {
	if s.GetUsage() == nil {
		return s
	}
	return &nodev1.AllocationStatus{
		Allocation: s.GetAllocation(), Epoch: s.GetEpoch(), State: s.GetState(), Ready: s.GetReady(), Reason: s.GetReason(),
		Containers: s.GetContainers(), Timeline: s.GetTimeline(), Address: s.GetAddress(),
	}
}

func sameMessage[M interface {
	comparable
	proto.Message
}](a, b M) bool {
	return a == b || proto.Equal(a, b)
}

// SetPending implements Store. Equal reasons leave the generation alone.
func (x *Index) SetPending(p map[string][]PendingReason) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if maps.EqualFunc(x.now.Pending, p, equalReasons) {
		return
	}
	x.now.Pending = maps.Clone(orEmpty(p))
	x.changed()
}

// SetNotes implements Store. Equal notes leave the generation alone; so does what
// scaling came to, which changes with what replicas use.
func (x *Index) SetNotes(n Notes) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if maps.EqualFunc(x.now.Notes.Wishes, n.Wishes, PoolWish.Equal) && maps.EqualFunc(x.now.Notes.Blocked, n.Blocked, slices.Equal[[]Blocked]) &&
		maps.Equal(x.now.Notes.Waiting, n.Waiting) && maps.EqualFunc(x.now.Notes.Requests, n.Requests, sameMessage) {
		if !maps.EqualFunc(x.now.Notes.Scaling, n.Scaling, sameMessage) {
			x.now.Notes.Scaling, x.handed = maps.Clone(n.Scaling), nil
		}
		return
	}
	x.now.Notes = Notes{
		Wishes: maps.Clone(n.Wishes), Blocked: maps.Clone(n.Blocked), Waiting: maps.Clone(n.Waiting),
		Requests: maps.Clone(n.Requests), Scaling: maps.Clone(n.Scaling),
	}
	x.changed()
}

func equalReasons(a, b []PendingReason) bool {
	return slices.EqualFunc(a, b, PendingReason.Equal)
}

// Closed is the error of a store that was closed.
func Closed(doing string) error { return api.E(api.Unavailable, doing, "the store is closed") }

// ContextError gives the kind that fits the end of a context.
func ContextError(doing string, err error) error {
	kind := api.Canceled
	if err == context.DeadlineExceeded { //nolint:errorlint // a context's own error is never wrapped
		kind = api.Timeout
	}
	return api.E(kind, doing, "%w", err)
}

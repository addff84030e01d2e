package dispatch

import (
	"context"
	"errors"
	"io"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Bounds of what one node may report at once.
const (
	maxEvents  = 256
	maxAlarms  = 100
	maxNacks   = 64
	maxFacts   = 1024 // labels, taints and other lists of facts
	maxImages  = 1000
	maxDevices = 256
	maxGauges  = 8 // as many as a spec can name metrics
)

// session is one node's report stream. The goroutine of the stream changes it;
// signs of life come from others too.
type session struct {
	d      *Dispatch
	node   string
	number int64
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	sequence int64
	// st is what is known of the node, complete since the session's full report;
	// nil before. Never changed after Observe got it.
	st      *state.NodeStatus
	noted   time.Time // when LastSeen was stored last
	alarmed map[string]bool
}

// Report implements nodev1.NodeServiceServer.
func (d *Dispatch) Report(stream grpc.BidiStreamingServer[nodev1.NodeReport, linkv1.ReportAck]) error {
	node, life, release, err := d.bind(stream.Context())
	if err != nil {
		return err
	}
	defer release()
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s, ctx, err := d.enter(life, node, first.GetSession())
	if err != nil {
		d.log.Warn("report refused", "node", node, "session", first.GetSession(), "error", err)
		return err
	}
	defer d.leave(s)
	return s.receive(ctx, stream, first)
}

// enter makes the session the node's newest, or refuses it because a newer one
// was seen.
func (d *Dispatch) enter(ctx context.Context, node string, number int64) (*session, context.Context, error) {
	doing := "take reports of node " + node
	if number <= 0 {
		return nil, nil, api.E(api.Invalid, doing, "the session number is missing")
	}
	newest := int64(0)
	if st := d.cfg.State.Snapshot().NodeStatus[node]; st != nil {
		newest = st.Session
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.sessions[node]
	if old != nil {
		newest = max(newest, old.number)
	}
	if number < newest {
		return nil, nil, api.E(api.Conflict, doing, "session %d is older than session %d, which has reported", number, newest)
	}
	if old != nil {
		old.cancel(api.E(api.Conflict, doing, "a newer stream took this one's place"))
	}
	s := &session{d: d, node: node, number: number, alarmed: map[string]bool{}}
	ctx, s.cancel = context.WithCancelCause(ctx)
	d.sessions[node] = s
	d.log.Info("node reports", "node", node, "session", number)
	return s, ctx, nil
}

// leave notes that the node is gone, unless a newer stream has taken over.
func (d *Dispatch) leave(s *session) {
	s.cancel(nil)
	d.mu.Lock()
	newest := d.sessions[s.node] == s
	if newest {
		delete(d.sessions, s.node)
	}
	d.mu.Unlock()
	if !newest {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.st != nil {
		next := *s.st
		next.Connected = false
		if err := d.cfg.State.Observe(s.node, &next); err != nil {
			d.log.Debug("end of a session not noted", "node", s.node, "error", err)
		}
	}
	d.log.Info("node is disconnected", "node", s.node, "session", s.number)
}

// receive takes reports until the stream ends.
func (s *session) receive(ctx context.Context, stream grpc.BidiStreamingServer[nodev1.NodeReport, linkv1.ReportAck], m *nodev1.NodeReport) error {
	next, failed := make(chan *nodev1.NodeReport), make(chan error, 1)
	// Recv ends with the stream, which ends when the handler returned.
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case next <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		ack, err := s.take(m)
		if err != nil {
			return err
		}
		if err := stream.Send(ack); err != nil {
			return err
		}
		select {
		case m = <-next:
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// take brings one report in; on a gap it asks for everything.
func (s *session) take(m *nodev1.NodeReport) (*linkv1.ReportAck, error) {
	if m.GetSession() != s.number {
		return nil, api.E(api.Invalid, "take report of node "+s.node, "the session number changed within the stream")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	gap := m.GetSequence() != s.sequence+1
	s.sequence = m.GetSequence()
	ack := &linkv1.ReportAck{Sequence: m.GetSequence()}
	if !m.GetFull() && (gap || s.st == nil) {
		ack.Resync = true
		s.touch(time.Now())
		return ack, nil
	}
	now := time.Now()
	s.record(m.GetEvents())
	if !m.GetFull() && !says(m) {
		s.touch(now)
		return ack, nil
	}
	next := s.merge(m, now)
	if err := s.d.cfg.State.Observe(s.node, next); err != nil {
		return nil, err
	}
	s.st, s.noted = next, now
	return ack, nil
}

// says tells whether a delta says anything but that the node lives.
func says(m *nodev1.NodeReport) bool {
	return len(m.GetAllocations())+len(m.GetRemoved())+len(m.GetProxies())+len(m.GetRemovedProxies())+len(m.GetRemovedVolumes()) > 0 || m.GetFacts() != nil || m.GetApplied() != nil
}

// touch notes a sign of life that says nothing else; with mu held.
func (s *session) touch(now time.Time) {
	if s.st == nil || now.Sub(s.noted) < touchEvery {
		return
	}
	next := *s.st
	next.LastSeen = now
	if err := s.d.cfg.State.Observe(s.node, &next); err != nil {
		s.d.log.Warn("sign of life not noted", "node", s.node, "error", err)
		return
	}
	s.st, s.noted = &next, now
}

// acknowledged notes an acknowledgement on the discovery stream as a sign of life.
func (d *Dispatch) acknowledged(view string) {
	st, ok := d.cache.Status(view)
	if !ok || !st.Connected {
		return
	}
	d.mu.Lock()
	s := d.sessions[view]
	d.mu.Unlock()
	// An older stream's last words must not wait for, or revive, anything.
	if s != nil && s.mu.TryLock() {
		s.touch(time.Now())
		s.mu.Unlock()
	}
}

// merge makes what is known after a report, and drops with an alarm what is not
// the node's own; with mu held.
func (s *session) merge(m *nodev1.NodeReport, now time.Time) *state.NodeStatus {
	next := &state.NodeStatus{
		Connected: true, LastSeen: now, Session: s.number,
		Allocations: map[string]*nodev1.AllocationStatus{}, Proxies: map[string]*nodev1.ProxyStatus{}, RemovedVolumes: map[string]bool{},
	}
	if !m.GetFull() {
		next.Facts, next.Applied = s.st.Facts, s.st.Applied
		next.Allocations, next.Proxies, next.RemovedVolumes = maps.Clone(s.st.Allocations), maps.Clone(s.st.Proxies), maps.Clone(s.st.RemovedVolumes)
	}
	if m.GetFacts() != nil {
		api.Bound(m.GetFacts(), api.MaxTextBytes, maxFacts)
		next.Facts = boundedFacts(m.GetFacts())
	}
	if m.GetApplied() != nil {
		next.Applied = m.GetApplied()
	}
	snapshot := s.d.cfg.State.Snapshot()
	for _, a := range m.GetAllocations() {
		switch own := snapshot.Allocations[a.GetAllocation()]; {
		case own.GetNode() != s.node:
			s.alarm("allocation "+a.GetAllocation(), "it is not assigned to the node")
		case a.GetAddress() != "" && a.GetAddress() != own.GetAddress():
			s.alarm("address "+a.GetAddress(), "it is not the allocation's")
		case len(a.GetUsage().GetCustom()) > maxGauges:
			a.Usage = nil
			s.alarm("usage of "+a.GetAllocation(), "it has too many gauges")
			next.Allocations[a.GetAllocation()] = a
		default:
			api.Bound(a, api.MaxTextBytes, api.MaxListItems)
			next.Allocations[a.GetAllocation()] = a
		}
	}
	for _, id := range m.GetRemoved() {
		delete(next.Allocations, id)
	}
	for _, p := range m.GetProxies() {
		if owner(snapshot, p.GetAllocation()) != s.node {
			s.alarm("proxy "+p.GetAllocation(), "its allocation is not assigned to the node")
			continue
		}
		api.Bound(p, api.MaxTextBytes, maxNacks)
		next.Proxies[p.GetAllocation()] = p
	}
	for _, id := range m.GetRemovedProxies() {
		delete(next.Proxies, id)
	}
	s.mergeRemovals(next, m.GetRemovedVolumes(), snapshot)
	return next
}

// mergeRemovals believes a node about volumes of its own that it was told to
// delete, and forgets those whose record is gone.
func (s *session) mergeRemovals(next *state.NodeStatus, removed []string, snapshot *state.Snapshot) {
	for id := range next.RemovedVolumes {
		if snapshot.Volumes[id] == nil {
			delete(next.RemovedVolumes, id)
		}
	}
	for _, id := range removed {
		if v := snapshot.Volumes[id]; v.GetNode() == s.node && v.GetDelete() {
			next.RemovedVolumes[id] = true
		} else if v != nil {
			s.alarm("volume "+id, "it is not one that the node was to delete")
		}
	}
}

// boundedFacts cuts what a node tells of itself to what is kept.
func boundedFacts(f *nodev1.NodeFacts) *nodev1.NodeFacts {
	f.Images = f.GetImages()[:min(len(f.GetImages()), maxImages)]
	f.Devices = f.GetDevices()[:min(len(f.GetDevices()), maxDevices)]
	return f
}

// alarm tells of a foreign thing once per session.
func (s *session) alarm(what, why string) {
	what = api.Clip(what, api.MaxTextBytes)
	if s.alarmed[what] || len(s.alarmed) >= maxAlarms {
		return
	}
	s.alarmed[what] = true
	s.d.log.Error("report dropped", "alarm", true, "node", s.node, "what", what, "why", why)
}

// record keeps the events that speak of the node or of what is assigned to it.
func (s *session) record(events []*portolanv1.Event) {
	if len(events) == 0 {
		return
	}
	snapshot := s.d.cfg.State.Snapshot()
	self := api.ClusterName(s.d.cfg.Facts.Cluster) + "/nodes/" + s.node
	for _, e := range events[:min(len(events), maxEvents)] {
		if e.GetObject() != self && !s.owns(snapshot, e.GetObject()) {
			s.alarm("event of "+e.GetObject(), "it is not the node's")
			continue
		}
		e = proto.CloneOf(e)
		api.Bound(e, api.MaxTextBytes, api.MaxListItems)
		e.Cluster, e.Node = s.d.cfg.Facts.Cluster, s.node
		s.d.cfg.Manager.AddEvents(e)
	}
}

// owns says whether the object is a replica on the node, or a workload that has
// one there.
func (s *session) owns(snapshot *state.Snapshot, object string) bool {
	if a, err := replicaName(snapshot, object); err == nil {
		return a.GetNode() == s.node
	}
	for _, a := range snapshot.Allocations {
		if a.GetNode() == s.node && api.WorkloadName(a.GetTenant(), a.GetWorkload()) == object {
			return true
		}
	}
	return false
}

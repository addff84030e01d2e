package fleet

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// Pace of writing what is reported.
const (
	writeEvery   = 20 * time.Millisecond
	renewEvery   = 500 * time.Millisecond // of the lease, while nothing moves
	storeTimeout = 2 * time.Second
	writeBatch   = 500
	// Between two tries while the store does not answer.
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
)

// LeaseOf is the name of a cluster's lease row. It is renewed with each report;
// its Progress is the revision that the cluster has applied. Neither makes a
// revision.
func LeaseOf(cluster string) string { return "cluster/" + cluster }

// session is one report stream. The stream's goroutine receives; two others carry
// what was received to the store.
type session struct {
	f       *Fleet
	cluster string
	uid     string
	number  int64
	cancel  context.CancelCauseFunc
	release func() bool // of the wait for the membership's end

	lease chan struct{} // wakes renew
	write chan struct{} // wakes commit

	mu     sync.Mutex
	got    *reported
	full   bool // since then got is the whole
	seen   time.Time
	due    bool             // a comparison was left out because the stream was silent
	goneAt map[string]int64 // workload → store revision at which it was seen not to be placed any more

	wrote int64 // revision of the last write; owned by commit
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// wakeSessions lets every session compare again, because records changed.
func (f *Fleet) wakeSessions() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sessions {
		poke(s.write)
	}
}

// Report implements linkv1.LinkServiceServer.
func (f *Fleet) Report(stream grpc.BidiStreamingServer[linkv1.StatusReport, linkv1.ReportAck]) error {
	m, err := f.member(stream.Context())
	if err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s, ctx, err := f.enter(stream.Context(), m, first.GetSession())
	if err != nil {
		f.log.Warn("report refused", "cluster", m.id, "session", first.GetSession(), "error", err)
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.renew(ctx) })
	wg.Go(func() { s.commit(ctx) })
	err = s.receive(ctx, stream, first)
	s.cancel(err)
	wg.Wait()
	f.leave(s)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// enter makes the session the cluster's newest, or refuses it because a newer one
// was seen.
func (f *Fleet) enter(ctx context.Context, m *member, number int64) (*session, context.Context, error) {
	cluster, doing := m.id, "take reports of cluster "+m.id
	if number <= 0 {
		return nil, nil, api.E(api.Invalid, doing, "the session number is missing")
	}
	newest := int64(0)
	if stored, _ := store.One[*storev1.ClusterStatusRecord](f.mirror.Snapshot(), store.ClusterStatus, api.ClusterName(cluster)); speaksOf(stored, m.uid) {
		newest = stored.GetStatus().GetSession()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.sessions[cluster]
	if old != nil {
		newest = max(newest, old.number)
	}
	if number < newest {
		return nil, nil, api.E(api.Conflict, doing, "session %d is older than session %d, which has reported", number, newest)
	}
	if old != nil {
		old.cancel(api.E(api.Conflict, doing, "a newer stream took this one's place"))
	}
	s := &session{
		f: f, cluster: cluster, uid: m.uid, number: number, lease: make(chan struct{}, 1), write: make(chan struct{}, 1),
		got: newReported(), goneAt: map[string]int64{},
	}
	ctx, s.cancel = context.WithCancelCause(ctx)
	s.release = context.AfterFunc(m.in, func() { s.cancel(context.Cause(m.in)) })
	f.sessions[cluster] = s
	return s, ctx, nil
}

func (f *Fleet) leave(s *session) {
	s.release()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sessions[s.cluster] == s {
		delete(f.sessions, s.cluster)
	}
}

// receive takes reports until the stream ends.
func (s *session) receive(ctx context.Context, stream grpc.BidiStreamingServer[linkv1.StatusReport, linkv1.ReportAck], m *linkv1.StatusReport) error {
	type received struct {
		m   *linkv1.StatusReport
		err error
	}
	// Recv does not end with ctx, only with the stream, which ends when the handler
	// returned: so it has a goroutine of its own, for at most one message.
	next := make(chan received)
	go func() {
		for {
			m, err := stream.Recv()
			select {
			case next <- received{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	sequence := int64(0)
	for {
		ack, err := s.take(m, &sequence)
		if err != nil {
			return err
		}
		if err := stream.Send(ack); err != nil {
			return err
		}
		select {
		case r := <-next:
			if errors.Is(r.err, io.EOF) {
				return nil
			}
			if r.err != nil {
				return r.err
			}
			m = r.m
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// take brings one report in. On a gap it asks for everything; such a report still
// is a sign of life.
func (s *session) take(m *linkv1.StatusReport, sequence *int64) (*linkv1.ReportAck, error) {
	doing := "take report of cluster " + s.cluster
	if m.GetSession() != s.number {
		return nil, api.E(api.Invalid, doing, "the session number changed within the stream")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	gap := m.GetSequence() != *sequence+1
	*sequence = m.GetSequence()
	s.seen = time.Now()
	ack := &linkv1.ReportAck{Sequence: m.GetSequence()}
	applied := s.got.summary.GetAppliedRevision()
	switch {
	case m.GetFull():
		s.got = newReported()
		s.full = true
	case gap || !s.full:
		s.full = false
		ack.Resync = true
		poke(s.lease)
		return ack, nil
	default:
		s.got = s.got.clone()
	}
	if err := s.got.apply(m); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	poke(s.lease)
	if m.GetFull() || changes(m) || s.due || applied != s.got.summary.GetAppliedRevision() {
		s.due = false
		poke(s.write)
	}
	return ack, nil
}

// changes says whether a delta says anything but that the cluster lives.
func changes(m *linkv1.StatusReport) bool {
	return m.GetCluster() != nil || len(m.GetWorkloads())+len(m.GetRemovedWorkloads())+len(m.GetExports())+len(m.GetRemovedExports())+len(m.GetNacks()) > 0
}

// renew carries signs of life and what is applied to the cluster's lease. Only
// reports wake it: a stream that hangs renews nothing.
func (s *session) renew(ctx context.Context) {
	var last time.Time
	var out outage
	progress := int64(-1)
	for {
		select {
		case <-s.lease:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		applied, full := s.got.summary.GetAppliedRevision(), s.full
		s.mu.Unlock()
		if !full {
			applied = 0 // the store keeps the greater one
		}
		if applied == progress && time.Since(last) < min(renewEvery, s.f.cfg.LivenessTimeout/4) {
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, storeTimeout)
		_, err := s.f.cfg.Store.Acquire(tctx, LeaseOf(s.cluster), s.cluster, s.f.cfg.LivenessTimeout, applied)
		cancel()
		if err != nil {
			if first, _ := out.failed(); first && ctx.Err() == nil {
				s.f.log.Warn("sign of life not stored", "cluster", s.cluster, "error", err)
			}
			continue // the next report tries again
		}
		if out.worked() {
			s.f.log.Info("signs of life are stored again", "cluster", s.cluster)
		}
		last, progress = time.Now(), applied
	}
}

// outage follows a run of failures of the store: it says when to try again, and
// what is worth a line in the log, which is its beginning and its end.
type outage struct{ failures int }

// failed notes a failure. first is whether it is the run's first, wait a full
// jitter, so that replicas and clusters do not come back in step.
func (o *outage) failed() (first bool, wait time.Duration) {
	o.failures++
	return o.failures == 1, rand.N(min(retryMin<<min(o.failures-1, 10), retryMax)) + 1
}

// worked notes a success, and says whether it ends a run of failures.
func (o *outage) worked() bool {
	over := o.failures > 0
	o.failures = 0
	return over
}

// commit writes what differs between what was reported and the records.
func (s *session) commit(ctx context.Context) {
	alarmed := map[string]bool{}
	var out outage
	for {
		select {
		case <-s.write:
		case <-ctx.Done():
			return
		}
		wait := writeEvery
		switch err := s.once(ctx, alarmed); {
		case err == nil:
			if out.worked() {
				s.f.log.Info("status is stored again", "cluster", s.cluster)
			}
		case ctx.Err() != nil:
			return
		case api.KindOf(err) == api.Conflict || api.KindOf(err) == api.Denied:
			s.f.log.Warn("status not stored", "cluster", s.cluster, "error", err)
			s.cancel(err)
			return
		default:
			first, pause := out.failed()
			if first {
				s.f.log.Warn("status not stored", "cluster", s.cluster, "error", err)
			}
			wait = max(wait, pause)
			poke(s.write)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// current gives what was reported, if it may be written: it is the whole, and the
// stream is not silent. One that is knows nothing any more: its cluster may be
// lost, or report to another replica, and neither may be overwritten.
func (s *session) current() (*reported, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.seen) > s.f.cfg.LivenessTimeout/3 {
		s.due = true
		return nil, false
	}
	return s.got, s.full
}

// once makes one comparison and writes the difference.
func (s *session) once(ctx context.Context, alarmed map[string]bool) error {
	got, ok := s.current()
	if !ok {
		return nil
	}
	m := s.f.model.Load()
	if m.view.Revision < s.wrote {
		return nil // the next pass wakes this again
	}
	writes, alarms := statusWrites(m, s.cluster, s.number, got, s.confirmed(m.view.Revision, got.summary.GetAppliedRevision()), time.Now())
	for _, a := range alarms {
		if !alarmed[a] && len(alarmed) < maxNacks {
			alarmed[a] = true
			s.f.log.Error("report dropped", "alarm", true, "cluster", s.cluster, "what", a)
		}
	}
	for batch := range slices.Chunk(writes, writeBatch) {
		tctx, cancel := context.WithTimeout(ctx, storeTimeout)
		rev, err := commitWrites(tctx, s.f.cfg.Store, s.cluster, s.uid, s.number, batch)
		cancel()
		if err != nil {
			return err
		}
		s.wrote = rev
	}
	return nil
}

// confirmed judges ends: the cluster must have applied a revision at which the
// workload was already gone.
func (s *session) confirmed(revision, applied int64) func(string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return func(workload string) bool {
		at, ok := s.goneAt[workload]
		if !ok {
			s.goneAt[workload] = revision
			return false
		}
		if applied >= at {
			delete(s.goneAt, workload)
			return true
		}
		return false
	}
}

// commitWrites commits a batch under two fences: the cluster must be in the fleet,
// in the life in which the session began, and a newer session's records stay as
// they are. What is already so is not written again.
func commitWrites(ctx context.Context, st store.Store, cluster, uid string, number int64, batch []write) (int64, error) {
	doing := "store status of cluster " + cluster
	return st.Update(ctx, func(tx store.Tx) error {
		rec, err := tx.Get(store.Cluster, api.ClusterName(cluster))
		if err != nil && api.KindOf(err) != api.NotFound {
			return err
		}
		if c, ok := rec.Message.(*portolanv1.Cluster); err != nil || !ok || c.GetUid() != uid {
			return api.E(api.Denied, doing, "it was taken out of the fleet")
		}
		if rec, err := tx.Get(store.ClusterStatus, api.ClusterName(cluster)); err == nil {
			if newest := rec.Message.(*storev1.ClusterStatusRecord).GetStatus().GetSession(); newest > number {
				return api.E(api.Conflict, doing, "session %d is older than session %d, which has reported", number, newest)
			}
		}
		for _, w := range batch {
			if err := applyWrite(tx, w); err != nil {
				return err
			}
		}
		return nil
	})
}

func applyWrite(tx store.Tx, w write) error {
	rec, err := tx.Get(w.kind, w.name)
	missing := api.KindOf(err) == api.NotFound
	switch {
	case err != nil && !missing:
		return err
	case w.message == nil && missing:
		return nil
	case w.message == nil:
		return tx.Delete(w.kind, w.name)
	case !missing && proto.Equal(rec.Message, w.message):
		return nil
	}
	return tx.Put(w.kind, w.name, w.message)
}

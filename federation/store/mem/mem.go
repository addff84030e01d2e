// Package mem is the federation's store in memory: for tests, and for a whole
// system in one process. It owns its records and their change log; it never
// touches a disk or a network, and forgets everything when it is dropped.
//
// Concurrency: every method is safe for concurrent use. Updates run one after
// the other; views and watches never wait for them. It works inside a
// testing/synctest bubble, where time is the bubble's.
package mem

import (
	"context"
	"sort"
	"sync"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// maxBatch bounds the changes of one Batch, but for a transaction that alone is
// bigger.
const maxBatch = 4096

// Config of a Store.
type Config struct {
	// Retain is how many changes the log keeps before it compacts; 65,536 when 0.
	Retain int
	// RunTwice runs each Update's closure twice and keeps the second run, which
	// finds closures with outside effects.
	RunTwice bool
}

// Store implements store.Store.
type Store struct {
	cfg Config
	// writer is held by the one transaction, and by a change of a lease's holder.
	writer chan struct{}

	mu     sync.Mutex
	state  state
	log    []store.Change // in order of revision, all above floor
	floor  int64
	leases map[string]store.Lease
	wake   chan struct{} // closed at the next commit or compaction
	closed bool
}

// state is a snapshot; its Set is never written again.
type state struct {
	revision int64
	set      *store.Set
}

var _ store.Store = (*Store)(nil)

// New makes an empty store at revision 0.
func New(cfg Config) *Store {
	if cfg.Retain <= 0 {
		cfg.Retain = 65536
	}
	return &Store{
		cfg: cfg, writer: make(chan struct{}, 1), state: state{set: store.NewSet()},
		leases: map[string]store.Lease{}, wake: make(chan struct{}),
	}
}

func gone(doing string) error { return api.E(api.Unavailable, doing, "the store is closed") }

// Ping fails once the store is closed.
func (s *Store) Ping(ctx context.Context) error {
	_, err := s.now(ctx, "ping the store")
	return err
}

// Close ends watches and refuses everything after it.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.wake)
	}
	return nil
}

func (s *Store) now(ctx context.Context, doing string) (state, error) {
	if err := ctx.Err(); err != nil {
		return state{}, store.ContextError(doing, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return state{}, gone(doing)
	}
	return s.state, nil
}

// lock takes the writer's place, or gives up with the context.
func (s *Store) lock(ctx context.Context, doing string) error {
	select {
	case s.writer <- struct{}{}:
		return nil
	case <-ctx.Done():
		return store.ContextError(doing, ctx.Err())
	}
}

func (s *Store) unlock() { <-s.writer }

// View implements store.Store.
func (s *Store) View(ctx context.Context, fn func(store.Reader) error) (int64, error) {
	st, err := s.now(ctx, "read the store")
	if err != nil {
		return 0, err
	}
	return st.revision, fn(reader{st})
}

// Update implements store.Store.
func (s *Store) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	if err := s.lock(ctx, "update the store"); err != nil {
		return 0, err
	}
	defer s.unlock()
	st, err := s.now(ctx, "update the store")
	if err != nil {
		return 0, err
	}
	t := s.begin(st)
	if err := fn(t); err != nil {
		return 0, err
	}
	if s.cfg.RunTwice {
		t = s.begin(st)
		if err := fn(t); err != nil {
			return 0, err
		}
	}
	changes := t.pending.Changes()
	if len(changes) == 0 {
		return st.revision, nil
	}
	s.commit(t.state, changes)
	return t.state.revision, nil
}

func (s *Store) begin(st state) *tx {
	return &tx{reader: reader{state{revision: st.revision + 1, set: st.set.Fork()}}, store: s, base: st}
}

func (s *Store) commit(st state, changes []store.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range changes {
		// A tombstone carries the last message at the revision of the deletion.
		changes[i].Record.Revision = st.revision
	}
	st.set.Freeze()
	s.state = st
	s.log = append(s.log, changes...)
	if extra := len(s.log) - s.cfg.Retain; extra > 0 {
		s.compactLocked(s.log[extra-1].Record.Revision)
	}
	s.wakeLocked()
}

func (s *Store) wakeLocked() {
	if !s.closed {
		close(s.wake)
		s.wake = make(chan struct{})
	}
}

func (s *Store) compactLocked(floor int64) {
	if floor <= s.floor {
		return
	}
	s.floor = floor
	i := sort.Search(len(s.log), func(i int) bool { return s.log[i].Record.Revision > floor })
	s.log = append([]store.Change(nil), s.log[i:]...)
}

// Compact forgets the log up to and including a revision: a watch from below it
// is told so.
func (s *Store) Compact(ctx context.Context, floor int64) error {
	if _, err := s.now(ctx, "compact the store"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compactLocked(min(floor, s.state.revision))
	s.wakeLocked()
	return nil
}

// Acquire implements store.Store.
func (s *Store) Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	doing := "acquire lease " + name
	if holder == "" || ttl <= 0 {
		return store.Lease{}, api.E(api.Internal, doing, "a lease needs a holder and a time to live")
	}
	// A change of holder orders itself among the transactions, so that none that
	// checked the old epoch commits after it.
	if err := s.lock(ctx, doing); err != nil {
		return store.Lease{}, err
	}
	defer s.unlock()
	if _, err := s.now(ctx, doing); err != nil {
		return store.Lease{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l, now := s.leases[name], time.Now()
	if l.Holder != holder {
		if l.Holder != "" && now.Before(l.Expires) {
			return l, nil
		}
		l = store.Lease{Name: name, Holder: holder, Epoch: l.Epoch + 1, Progress: l.Progress}
	}
	l.Expires, l.Progress = now.Add(ttl), max(l.Progress, progress)
	s.leases[name] = l
	l.Held = true
	return l, nil
}

// Release implements store.Store.
func (s *Store) Release(ctx context.Context, name, holder string) error {
	doing := "release lease " + name
	if err := s.lock(ctx, doing); err != nil {
		return err
	}
	defer s.unlock()
	if _, err := s.now(ctx, doing); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.leases[name]; l.Holder == holder {
		l.Holder, l.Expires = "", time.Now()
		s.leases[name] = l
	}
	return nil
}

// Leases implements store.Store.
func (s *Store) Leases(ctx context.Context) ([]store.Lease, error) {
	if _, err := s.now(ctx, "list leases"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]store.Lease, 0, len(s.leases))
	for _, l := range s.leases {
		out = append(out, l)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

package cockroach

import (
	"context"
	"errors"
	"math/rand/v2"
	"sort"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// Bounds of the feed: changes kept in memory for watchers, changes read at a
// time (a transaction that is bigger comes whole), and the poller's backoff
// while the database does not answer.
const (
	feedKeep       = 65536
	logPage        = 4096
	pollBackoffMax = time.Second
)

// feed is the tail of the change log in memory, filled by the one poller and
// read by all watchers of the process.
type feed struct {
	nudged chan struct{} // a commit of our own: poll at once

	mu sync.Mutex
	// changes are all those in (from, revision], in order.
	changes        []store.Change
	from, revision int64
	wake           chan struct{} // closed when revision advances, and at the end
	closed         bool
}

func newFeed(revision int64) *feed {
	return &feed{nudged: make(chan struct{}, 1), from: revision, revision: revision, wake: make(chan struct{})}
}

func (f *feed) nudge() {
	select {
	case f.nudged <- struct{}{}:
	default:
	}
}

func (f *feed) at() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revision
}

// advance appends changes up to a revision; with a gap it begins anew there.
func (f *feed) advance(revision int64, changes []store.Change, gap bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if gap {
		f.changes, f.from = nil, revision
	}
	f.changes = append(f.changes, changes...)
	if extra := len(f.changes) - feedKeep; extra > 0 {
		extra = min(len(f.changes), extra+feedKeep/4)
		f.from = f.changes[extra-1].Record.Revision
		cut := sort.Search(len(f.changes), func(i int) bool { return f.changes[i].Record.Revision > f.from })
		f.changes = append([]store.Change(nil), f.changes[cut:]...)
	}
	f.revision = revision
	close(f.wake)
	f.wake = make(chan struct{})
}

func (f *feed) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	close(f.wake)
}

// pollLoop follows the counter row for every watcher of the process.
func (s *Store) pollLoop() {
	defer s.feed.end()
	tick := time.NewTicker(s.cfg.PollInterval)
	defer tick.Stop()
	backoff := s.cfg.PollInterval
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		case <-s.feed.nudged:
		}
		err := s.poll(s.ctx)
		if err == nil {
			backoff = s.cfg.PollInterval
			continue
		}
		if s.ctx.Err() != nil {
			return
		}
		if backoff == s.cfg.PollInterval {
			s.cfg.Log.Warn("watch stands still: database does not answer", "error", err)
		}
		backoff = min(2*backoff, pollBackoffMax)
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(rand.N(backoff) + 1):
		}
	}
}

func (s *Store) poll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		revision, _, err := s.counter(ctx)
		if err != nil {
			return err
		}
		at := s.feed.at()
		if revision <= at {
			return nil
		}
		changes, to, err := s.readLog(ctx, at, revision, store.WatchFilter{})
		switch {
		case api.KindOf(err) == api.Compacted:
			s.feed.advance(revision, nil, true)
		case err != nil:
			return err
		default:
			s.feed.advance(to, changes, false)
		}
	}
}

func (s *Store) counter(ctx context.Context) (revision, floor int64, err error) {
	err = s.pool.QueryRow(ctx, "SELECT revision, floor FROM counter WHERE id = 1").Scan(&revision, &floor)
	return revision, floor, err
}

// readLog reads changes after from, at most a page and at most up to revision to,
// which was committed when it was read; it returns the revision up to which they
// are complete.
func (s *Store) readLog(ctx context.Context, from, to int64, filter store.WatchFilter) ([]store.Change, int64, error) {
	var end, count int64
	err := s.pool.QueryRow(ctx, `SELECT COALESCE(MAX(revision), 0), COUNT(*) FROM
		(SELECT revision FROM changes WHERE revision > $1 AND revision <= $2 ORDER BY revision, seq LIMIT $3) AS page`,
		from, to, int64(logPage)).Scan(&end, &count)
	if err != nil {
		return nil, 0, err
	}
	if count < logPage {
		end = to
	}
	changes, err := s.readRange(ctx, from, end, filter)
	if err != nil {
		return nil, 0, err
	}
	// The floor is raised before rows are deleted, so looking at it after the
	// read tells whether some were missing.
	_, floor, err := s.counter(ctx)
	if err != nil {
		return nil, 0, err
	}
	if from < floor {
		return nil, 0, compacted(from, floor)
	}
	return changes, end, nil
}

func compacted(at, floor int64) error {
	return api.E(api.Compacted, doingWatch, "revision %d is below the floor %d", at, floor)
}

func (s *Store) readRange(ctx context.Context, from, to int64, filter store.WatchFilter) ([]store.Change, error) {
	sql := "SELECT revision, kind, name, tenant, deleted, data FROM changes WHERE revision > $1 AND revision <= $2"
	args := []any{from, to}
	if filter.Kinds != nil {
		args = append(args, kindTexts(filter.Kinds))
		sql += " AND kind = ANY($3::TEXT[])"
	}
	if filter.Tenants != nil {
		args = append(args, filter.Tenants)
		sql += map[bool]string{false: " AND tenant = ANY($3::TEXT[])", true: " AND tenant = ANY($4::TEXT[])"}[filter.Kinds != nil]
	}
	rows, err := s.pool.Query(ctx, sql+" ORDER BY revision, seq", args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, scanChange)
}

func kindTexts(kinds []store.Kind) []string {
	out := make([]string, len(kinds))
	for i, k := range kinds {
		out[i] = string(k)
	}
	return out
}

func scanChange(row pgx.CollectableRow) (store.Change, error) {
	var c store.Change
	var kind string
	var name, data []byte
	if err := row.Scan(&c.Record.Revision, &kind, &name, &c.Record.Tenant, &c.Deleted, &data); err != nil {
		return c, err
	}
	c.Record.Kind, c.Record.Name = store.Kind(kind), string(name)
	var err error
	c.Record.Message, err = decode(c.Record.Kind, c.Record.Name, data)
	return c, err
}

const doingWatch = "watch the store"

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, from int64, filter store.WatchFilter) (store.Watcher, error) {
	if s.ctx.Err() != nil {
		return nil, gone(doingWatch)
	}
	revision, _, err := s.counter(ctx)
	if err != nil {
		return nil, failure(doingWatch, err)
	}
	w := &watcher{store: s, at: from, filter: filter, done: make(chan struct{})}
	if from > revision {
		w.refused = api.E(api.Compacted, doingWatch, "revision %d is ahead of the store, which is at %d", from, revision)
	}
	return w, nil
}

type watcher struct {
	store   *Store
	at      int64
	filter  store.WatchFilter
	refused error
	done    chan struct{}
	once    sync.Once
}

func (w *watcher) Close() { w.once.Do(func() { close(w.done) }) }

func (w *watcher) Next(ctx context.Context) (store.Batch, error) {
	if w.refused != nil {
		return store.Batch{}, w.refused
	}
	for {
		b, wake, err := w.take()
		switch {
		case errors.Is(err, errBehind):
			return w.catchUp(ctx)
		case err != nil || wake == nil:
			return b, err
		}
		select {
		case <-wake:
		case <-w.done:
			return store.Batch{}, api.E(api.Canceled, doingWatch, "the watcher is closed")
		case <-ctx.Done():
			return store.Batch{}, store.ContextError(doingWatch, ctx.Err())
		}
	}
}

var errBehind = errors.New("older than the feed")

// take gives what the feed has for the watcher, or the channel to wait on, or
// errBehind when the feed no longer reaches back so far.
func (w *watcher) take() (store.Batch, <-chan struct{}, error) {
	f := w.store.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return store.Batch{}, nil, gone(doingWatch)
	case w.at >= f.revision:
		return store.Batch{}, f.wake, nil
	case w.at < f.from:
		return store.Batch{}, nil, errBehind
	}
	b := store.Batch{Revision: f.revision}
	first := sort.Search(len(f.changes), func(i int) bool { return f.changes[i].Record.Revision > w.at })
	for _, c := range f.changes[first:] {
		if w.filter.Matches(c.Record) {
			b.Changes = append(b.Changes, c)
		}
	}
	w.at = b.Revision
	return b, nil, nil
}

// catchUp reads a page of the log itself.
func (w *watcher) catchUp(ctx context.Context) (store.Batch, error) {
	changes, to, err := w.store.readLog(ctx, w.at, w.store.feed.at(), w.filter)
	if err != nil {
		return store.Batch{}, failure(doingWatch, err)
	}
	w.at = to
	return store.Batch{Revision: to, Changes: changes}, nil
}

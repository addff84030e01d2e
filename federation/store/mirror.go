package store

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"sort"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
)

// Bounds of a Mirror: how many changes it remembers for Since, and its backoff
// while the store does not answer.
const (
	mirrorHistory    = 65536
	mirrorBackoffMin = 50 * time.Millisecond
	mirrorBackoffMax = 2 * time.Second
)

// Mirror keeps chosen kinds of a store in memory: a snapshot, then the watch
// that begins exactly after it, and again from a snapshot when the log was
// compacted. While the store is gone it keeps what it has and tries again.
//
// Concurrency: Run is called once; everything else from anywhere.
type Mirror struct {
	store Store
	kinds []Kind

	mu      sync.Mutex
	view    *View
	changed chan struct{} // closed when view is replaced
	history []Change      // changes after historyFrom up to view.Revision
	from    int64
	err     error
}

// View is one immutable snapshot of a Mirror.
type View struct {
	// Revision that it reflects; -1 before the first snapshot is there.
	Revision int64
	set      *Set
}

// NewMirror makes a mirror of the kinds; Run fills it.
func NewMirror(s Store, kinds []Kind) *Mirror {
	return &Mirror{store: s, kinds: kinds, view: &View{Revision: -1, set: NewSet()}, changed: make(chan struct{})}
}

// Run follows the store until ctx ends, and then returns nil.
func (m *Mirror) Run(ctx context.Context) error {
	backoff := mirrorBackoffMin
	for {
		moved, err := m.follow(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // Run ends with nil when its context does
		}
		m.mu.Lock()
		m.err = err
		m.mu.Unlock()
		if moved {
			backoff = mirrorBackoffMin
		}
		if api.KindOf(err) == api.Compacted && moved {
			continue
		}
		// Full jitter, so that replicas do not come back in step.
		select {
		case <-time.After(rand.N(backoff) + 1):
		case <-ctx.Done():
			return nil
		}
		backoff = min(2*backoff, mirrorBackoffMax)
	}
}

// follow takes a snapshot and its watch, until an error. moved says whether it
// got as far as a snapshot.
func (m *Mirror) follow(ctx context.Context) (moved bool, err error) {
	rev, err := m.load(ctx)
	if err != nil {
		return false, err
	}
	w, err := m.store.Watch(ctx, rev, WatchFilter{Kinds: m.kinds})
	if err != nil {
		return true, err
	}
	defer w.Close()
	for {
		b, err := w.Next(ctx)
		if err != nil {
			return true, err
		}
		m.apply(b)
	}
}

func (m *Mirror) load(ctx context.Context) (int64, error) {
	var set *Set
	rev, err := m.store.View(ctx, func(r Reader) error {
		set = NewSet()
		for _, k := range m.kinds {
			for rec, err := range r.List(k, ListOptions{}) {
				if err != nil {
					return err
				}
				set.Put(rec)
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if rev < m.view.Revision {
		// The store was put back: what it says now counts, but no reader may see
		// a revision go back.
		return 0, errors.New("the store went back behind what was read from it")
	}
	m.history, m.from = nil, rev
	m.publish(&View{Revision: rev, set: set})
	return rev, nil
}

func (m *Mirror) apply(b Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	set := m.view.set
	if len(b.Changes) > 0 {
		set = set.Fork()
	}
	for _, c := range b.Changes {
		if c.Deleted {
			set.Delete(c.Record.Kind, c.Record.Name)
		} else {
			set.Put(c.Record)
		}
	}
	m.history = append(m.history, b.Changes...)
	if extra := len(m.history) - mirrorHistory; extra > 0 {
		extra = min(len(m.history), extra+mirrorHistory/4)
		m.from = m.history[extra-1].Record.Revision
		m.history = append([]Change(nil), m.history[extra:]...)
	}
	m.publish(&View{Revision: b.Revision, set: set})
}

func (m *Mirror) publish(v *View) {
	v.set.Freeze()
	m.view, m.err = v, nil
	close(m.changed)
	m.changed = make(chan struct{})
}

// Snapshot gives the newest view.
func (m *Mirror) Snapshot() *View {
	v, _ := m.Next()
	return v
}

// Next gives the newest view, and a channel that is closed when there is a newer
// one.
func (m *Mirror) Next() (*View, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view, m.changed
}

// Wait returns the first view at or after a revision; Wait(ctx, 0) waits for the
// first snapshot.
func (m *Mirror) Wait(ctx context.Context, revision int64) (*View, error) {
	for {
		v, changed := m.Next()
		if v.Revision >= revision {
			return v, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ContextError("wait for a revision", ctx.Err())
		}
	}
}

// Since gives the changes in (from, to]; false when they are no longer all
// remembered, and everything may have changed.
func (m *Mirror) Since(from, to int64) ([]Change, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if from < m.from {
		return nil, false
	}
	after := func(revision int64) int {
		return sort.Search(len(m.history), func(i int) bool { return m.history[i].Record.Revision > revision })
	}
	first, end := after(from), after(to)
	return append([]Change(nil), m.history[first:max(first, end)]...), true
}

// Err is why the mirror stands still; nil while it follows.
func (m *Mirror) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Get gives one record.
func (v *View) Get(kind Kind, name string) (Record, bool) { return v.set.Get(kind, name) }

// List gives records in order of name.
func (v *View) List(kind Kind, opts ListOptions) iter.Seq[Record] { return v.set.List(kind, opts) }

// Len counts the records of a kind.
func (v *View) Len(kind Kind) int { return v.set.Len(kind) }

// One gives the message of one record; T must be the kind's message.
func One[T proto.Message](v *View, kind Kind, name string) (T, bool) {
	r, ok := v.Get(kind, name)
	m, typed := r.Message.(T)
	return m, ok && typed
}

// All gives the messages of a kind by name, in order; T must be the kind's
// message.
func All[T proto.Message](v *View, kind Kind) iter.Seq2[string, T] { return Under[T](v, kind, "") }

// Under gives the messages of a kind whose names begin with prefix.
func Under[T proto.Message](v *View, kind Kind, prefix string) iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		for r := range v.List(kind, ListOptions{Prefix: prefix}) {
			if m, ok := r.Message.(T); ok && !yield(r.Name, m) {
				return
			}
		}
	}
}

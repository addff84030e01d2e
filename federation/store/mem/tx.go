package mem

import (
	"context"
	"iter"
	"sort"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

type reader struct{ state state }

func (r reader) Revision() int64 { return r.state.revision }

func (r reader) Get(kind store.Kind, name string) (store.Record, error) {
	rec, ok := r.state.set.Get(kind, name)
	if !ok {
		return store.Record{}, api.E(api.NotFound, "get "+name, "no such %s", kind)
	}
	return rec, nil
}

func (r reader) GetAll(kind store.Kind, names []string) (map[string]store.Record, error) {
	out := make(map[string]store.Record, len(names))
	for _, name := range names {
		if rec, ok := r.state.set.Get(kind, name); ok {
			out[name] = rec
		}
	}
	return out, nil
}

func (r reader) List(kind store.Kind, opts store.ListOptions) iter.Seq2[store.Record, error] {
	return func(yield func(store.Record, error) bool) {
		for rec := range r.state.set.List(kind, opts) {
			if !yield(rec, nil) {
				return
			}
		}
	}
}

type tx struct {
	reader
	store   *Store
	base    state // what the transaction found
	pending store.Pending
}

// List walks a fork, so that the caller may write while it walks.
func (t *tx) List(kind store.Kind, opts store.ListOptions) iter.Seq2[store.Record, error] {
	return reader{state{t.state.revision, t.state.set.Fork()}}.List(kind, opts)
}

func (t *tx) Put(kind store.Kind, name string, m proto.Message) error {
	r, err := store.NewRecord(kind, name, m, t.state.revision)
	if err != nil {
		return err
	}
	t.state.set.Put(r)
	t.pending.Put(r)
	return nil
}

func (t *tx) Delete(kind store.Kind, name string) error {
	r, ok := t.state.set.Get(kind, name)
	if !ok {
		return api.E(api.NotFound, "delete "+name, "no such %s", kind)
	}
	_, before := t.base.set.Get(kind, name)
	t.state.set.Delete(kind, name)
	t.pending.Delete(r, before)
	return nil
}

func (t *tx) CheckLease(name string, epoch int64) error {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	if l := t.store.leases[name]; l.Holder == "" || l.Epoch != epoch {
		return api.E(api.Conflict, "check lease "+name, "epoch %d is over; it stands at %d", epoch, l.Epoch)
	}
	return nil
}

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, from int64, filter store.WatchFilter) (store.Watcher, error) {
	if _, err := s.now(ctx, "watch the store"); err != nil {
		return nil, err
	}
	return &watcher{store: s, at: from, filter: filter, done: make(chan struct{})}, nil
}

type watcher struct {
	store  *Store
	at     int64
	filter store.WatchFilter
	done   chan struct{}
	once   sync.Once
}

func (w *watcher) Close() { w.once.Do(func() { close(w.done) }) }

func (w *watcher) Next(ctx context.Context) (store.Batch, error) {
	const doing = "watch the store"
	for {
		if err := ctx.Err(); err != nil {
			return store.Batch{}, store.ContextError(doing, err)
		}
		b, wake, err := w.take(doing)
		if err != nil || wake == nil {
			return b, err
		}
		select {
		case <-wake:
		case <-w.done:
			return store.Batch{}, api.E(api.Canceled, doing, "the watcher is closed")
		case <-ctx.Done():
		}
	}
}

// take gives a batch, or the channel to wait on.
func (w *watcher) take(doing string) (store.Batch, <-chan struct{}, error) {
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return store.Batch{}, nil, gone(doing)
	case w.at < s.floor:
		return store.Batch{}, nil, api.E(api.Compacted, doing, "revision %d is below the floor %d", w.at, s.floor)
	case w.at > s.state.revision:
		return store.Batch{}, nil, api.E(api.Compacted, doing, "revision %d is ahead of the store, which is at %d", w.at, s.state.revision)
	case w.at == s.state.revision:
		return store.Batch{}, s.wake, nil
	}
	first := sort.Search(len(s.log), func(i int) bool { return s.log[i].Record.Revision > w.at })
	end, to := len(s.log), s.state.revision
	if end-first > maxBatch {
		to = s.log[first+maxBatch].Record.Revision
		end = first + sort.Search(end-first, func(i int) bool { return s.log[first+i].Record.Revision > to })
	}
	b := store.Batch{Revision: to}
	for _, c := range s.log[first:end] {
		if w.filter.Matches(c.Record) {
			b.Changes = append(b.Changes, c)
		}
	}
	w.at = to
	return b, nil, nil
}

package store_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
)

// flaky is a store whose reads fail while it is down; its watchers end then.
type flaky struct {
	store.Store
	down atomic.Bool
}

func (f *flaky) err() error {
	if f.down.Load() {
		return api.E(api.Unavailable, "test", "down")
	}
	return nil
}

func (f *flaky) View(ctx context.Context, fn func(store.Reader) error) (int64, error) {
	if err := f.err(); err != nil {
		return 0, err
	}
	return f.Store.View(ctx, fn)
}

func (f *flaky) Watch(ctx context.Context, from int64, filter store.WatchFilter) (store.Watcher, error) {
	w, err := f.Store.Watch(ctx, from, filter)
	return &flakyWatcher{w, f}, err
}

type flakyWatcher struct {
	store.Watcher
	f *flaky
}

func (w *flakyWatcher) Next(ctx context.Context) (store.Batch, error) {
	b, err := w.Watcher.Next(ctx)
	if down := w.f.err(); down != nil {
		return store.Batch{}, down
	}
	return b, err
}

// TestMirrorOutlivesItsStore: while the store is gone the mirror keeps what it
// has and says why; when it is back, what was missed is there, also when the log
// was shortened meanwhile.
func TestMirrorOutlivesItsStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := mem.New(mem.Config{})
		f := &flaky{Store: base}
		m := store.NewMirror(f, []store.Kind{store.Tenant})
		if v := m.Snapshot(); v.Revision != -1 || v.Len(store.Tenant) != 0 {
			t.Errorf("before Run: revision %d", v.Revision)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		put := func(id string) int64 {
			rev, err := base.Update(t.Context(), func(tx store.Tx) error {
				return tx.Put(store.Tenant, api.TenantName(id), &portolanv1.Tenant{})
			})
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			return rev
		}
		first := put("a")
		if v := m.Snapshot(); v.Revision != first || v.Len(store.Tenant) != 1 || m.Err() != nil {
			t.Errorf("following: revision %d, %v", v.Revision, m.Err())
		}
		f.down.Store(true)
		put("b")
		time.Sleep(time.Minute)
		if v := m.Snapshot(); v.Revision != first || m.Err() == nil {
			t.Errorf("while the store is gone: revision %d, error %v", v.Revision, m.Err())
		}
		last := put("c")
		if err := base.Compact(t.Context(), last); err != nil {
			t.Fatal(err)
		}
		f.down.Store(false)
		v, err := m.Wait(t.Context(), last)
		if err != nil || v.Len(store.Tenant) != 3 || m.Err() != nil {
			t.Fatalf("after: %v, %v", err, m.Err())
		}
		if _, ok := m.Since(first, last); ok {
			t.Error("Since claims to know what the snapshot jumped over")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestMirrorSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mem.New(mem.Config{})
		m := store.NewMirror(s, []store.Kind{store.Tenant})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = m.Run(ctx) }()
		synctest.Wait()
		for i := range 5 {
			if _, err := s.Update(ctx, func(tx store.Tx) error {
				return tx.Put(store.Tenant, fmt.Sprintf("tenants/t%d", i), &portolanv1.Tenant{})
			}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		changes, ok := m.Since(1, 4)
		if !ok || len(changes) != 3 || changes[0].Record.Name != "tenants/t1" || changes[2].Record.Name != "tenants/t3" {
			t.Errorf("got %v, %v", changes, ok)
		}
		short, stop := context.WithTimeout(ctx, time.Second)
		defer stop()
		if _, err := m.Wait(short, 6); api.KindOf(err) != api.Timeout {
			t.Errorf("waiting for what never comes ended with %v", err)
		}
	})
}

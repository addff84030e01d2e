package mem_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/federation/store/storetest"
)

func TestConformance(t *testing.T) {
	for _, twice := range []bool{false, true} {
		t.Run(fmt.Sprintf("RunTwice=%v", twice), func(t *testing.T) {
			storetest.Run(t, func(testing.TB) storetest.Replicas {
				s := mem.New(mem.Config{RunTwice: twice})
				t.Cleanup(func() { _ = s.Close() })
				return func() store.Store { return s }
			})
		})
	}
}

func TestRunTwiceFindsOutsideEffects(t *testing.T) {
	s := mem.New(mem.Config{RunTwice: true})
	runs := 0
	if _, err := s.Update(t.Context(), func(store.Tx) error { runs++; return nil }); err != nil || runs != 2 {
		t.Errorf("ran %d times, %v", runs, err)
	}
}

// TestVirtualTime: leases expire on the bubble's clock, and everything that waits
// does so durably.
func TestVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mem.New(mem.Config{})
		if l, err := s.Acquire(t.Context(), "l", "a", time.Hour, 0); err != nil || !l.Held {
			t.Fatalf("%+v, %v", l, err)
		}
		time.Sleep(time.Hour - 1)
		if l, err := s.Acquire(t.Context(), "l", "b", time.Hour, 0); err != nil || l.Held {
			t.Errorf("a nanosecond early: %+v, %v", l, err)
		}
		time.Sleep(time.Nanosecond)
		if l, err := s.Acquire(t.Context(), "l", "b", time.Hour, 0); err != nil || !l.Held || l.Epoch != 2 {
			t.Errorf("after expiry: %+v, %v", l, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		w, err := s.Watch(ctx, 0, store.WatchFilter{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Next(ctx); api.KindOf(err) != api.Timeout {
			t.Errorf("a watch of nothing ended with %v", err)
		}
	})
}

// TestRetain: the log is bounded.
func TestRetain(t *testing.T) {
	s := mem.New(mem.Config{Retain: 10})
	for range 25 {
		if _, err := s.Update(t.Context(), func(tx store.Tx) error {
			return tx.Put(store.Tenant, "tenants/a", &portolanv1.Tenant{})
		}); err != nil {
			t.Fatal(err)
		}
	}
	for from, ok := range map[int64]bool{14: false, 15: true, 24: true} {
		w, err := s.Watch(t.Context(), from, store.WatchFilter{})
		if err != nil {
			t.Fatal(err)
		}
		b, err := w.Next(t.Context())
		if ok && (err != nil || len(b.Changes) != int(25-from)) || !ok && api.KindOf(err) != api.Compacted {
			t.Errorf("from %d: %d changes, %v", from, len(b.Changes), err)
		}
	}
}

func TestClosedWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mem.New(mem.Config{})
		inside := make(chan struct{})
		go func() {
			_, _ = s.Update(context.Background(), func(store.Tx) error { <-inside; return nil })
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.Update(ctx, func(store.Tx) error { return errors.New("never runs") })
		if api.KindOf(err) != api.Timeout {
			t.Errorf("an update behind a stuck one ended with %v", err)
		}
		close(inside)
		synctest.Wait()
	})
}

package storetest

import (
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// long is a time to live that does not pass during a test, short one that does.
const (
	long  = time.Hour
	short = 50 * time.Millisecond
)

func (k *kit) acquire(s store.Store, holder string, ttl time.Duration, progress int64) store.Lease {
	k.t.Helper()
	l, err := s.Acquire(k.ctx, "loop", holder, ttl, progress)
	if err != nil {
		k.t.Fatalf("acquire for %s: %v", holder, err)
	}
	return l
}

// seize asks until the lease is the holder's.
func (k *kit) seize(s store.Store, holder string, ttl time.Duration) store.Lease {
	k.t.Helper()
	for {
		if l := k.acquire(s, holder, ttl, 0); l.Held {
			return l
		}
		if k.ctx.Err() != nil {
			k.t.Fatalf("%s never got the lease", holder)
		}
	}
}

func testLeases(t *testing.T, k *kit) {
	other := k.open()
	before := k.view(func(store.Reader) error { return nil })
	l := k.acquire(k.s, "a", long, 5)
	if !l.Held || l.Holder != "a" || l.Epoch != 1 || l.Progress != 5 || time.Until(l.Expires) <= 0 {
		t.Errorf("first: %+v", l)
	}
	if l := k.acquire(other, "b", long, 9); l.Held || l.Holder != "a" || l.Epoch != 1 || l.Progress != 5 || time.Until(l.Expires) <= 0 {
		t.Errorf("while another holds it: %+v", l)
	}
	if l := k.acquire(k.s, "a", long, 8); !l.Held || l.Epoch != 1 || l.Progress != 8 {
		t.Errorf("renewal: %+v", l)
	}
	if l := k.acquire(k.s, "a", long, 2); l.Progress != 8 {
		t.Errorf("progress went back: %+v", l)
	}
	if err := other.Release(k.ctx, "loop", "b"); err != nil {
		t.Errorf("release by another: %v", err)
	}
	if l := k.acquire(other, "b", long, 0); l.Held {
		t.Errorf("released by who does not hold it: %+v", l)
	}
	if err := k.s.Release(k.ctx, "loop", "a"); err != nil {
		t.Fatal(err)
	}
	if l := k.acquire(other, "b", short, 9); !l.Held || l.Epoch != 2 || l.Progress != 9 {
		t.Errorf("after release: %+v", l)
	}
	if l := k.seize(k.s, "a", long); l.Epoch != 3 || l.Progress != 9 {
		t.Errorf("after expiry: %+v", l)
	}
	if l := k.acquire(other, "b", long, 0); l.Held {
		t.Errorf("the expired holder came back in: %+v", l)
	}
	all, err := k.s.Leases(k.ctx)
	if err != nil || len(all) != 1 || all[0].Name != "loop" || all[0].Holder != "a" || all[0].Epoch != 3 || all[0].Progress != 9 {
		t.Errorf("leases: %+v, %v", all, err)
	}
	if after := k.view(func(store.Reader) error { return nil }); after != before {
		t.Errorf("leases moved the revision from %d to %d", before, after)
	}
	_, err = k.s.Acquire(k.ctx, "loop", "", long, 0)
	wantKind(t, "no holder", err, api.Internal)
}

func testLeaseFences(t *testing.T, k *kit) {
	write := func(epoch int64) error {
		_, err := k.s.Update(k.ctx, func(tx store.Tx) error {
			if err := tx.CheckLease("loop", epoch); err != nil {
				return err
			}
			return put(tx, "a", strconv.FormatInt(epoch, 10))
		})
		return err
	}
	wantKind(t, "a lease that never was", write(1), api.Conflict)
	l := k.acquire(k.s, "a", long, 0)
	if err := write(l.Epoch); err != nil {
		t.Errorf("the holder: %v", err)
	}
	wantKind(t, "a later epoch", write(l.Epoch+1), api.Conflict)
	if err := k.s.Release(k.ctx, "loop", "a"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "after release", write(l.Epoch), api.Conflict)
	k.acquire(k.s, "b", long, 0)
	wantKind(t, "after a change of holder", write(l.Epoch), api.Conflict)
	if got := k.text("a"); got != "1" {
		t.Errorf("stored %q, want only the holder's write", got)
	}
}

// testLeaseHolders: holders take the lease from each other and write under their
// epochs all the time. No write of an older epoch follows one of a newer.
func testLeaseHolders(t *testing.T, k *kit) {
	var mu sync.Mutex
	epochs := map[int64]int64{} // revision → epoch that wrote it
	k.crowd(func(s store.Store, i int) error {
		holder := fmt.Sprintf("h%d", i)
		for range rounds {
			l, err := s.Acquire(k.ctx, "loop", holder, time.Millisecond, 0)
			if err != nil {
				return err
			}
			if !l.Held {
				continue
			}
			rev, err := s.Update(k.ctx, func(tx store.Tx) error {
				if err := tx.CheckLease("loop", l.Epoch); err != nil {
					return err
				}
				return put(tx, "a", holder)
			})
			if api.KindOf(err) == api.Conflict {
				continue
			}
			if err != nil {
				return err
			}
			mu.Lock()
			epochs[rev] = l.Epoch
			mu.Unlock()
		}
		return nil
	})
	end := k.view(func(store.Reader) error { return nil })
	last := int64(0)
	for rev := int64(1); rev <= end; rev++ {
		if e, ok := epochs[rev]; ok {
			if e < last {
				t.Errorf("revision %d was written under epoch %d, after one of %d", rev, e, last)
			}
			last = e
		}
	}
	if len(epochs) == 0 {
		t.Error("nobody ever wrote under the lease: nothing was tested")
	}
}

func testClose(t *testing.T, k *kit) {
	w, err := k.s.Watch(k.ctx, 0, store.WatchFilter{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ended := make(chan error)
	go func() {
		_, err := w.Next(k.ctx)
		ended <- err
	}()
	if err := k.s.Close(); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "a watch of a closed store", <-ended, api.Unavailable)
	_, err = k.s.View(k.ctx, func(store.Reader) error { return nil })
	wantKind(t, "view", err, api.Unavailable)
	_, err = k.s.Update(k.ctx, func(store.Tx) error { return nil })
	wantKind(t, "update", err, api.Unavailable)
	_, err = k.s.Acquire(k.ctx, "loop", "a", long, 0)
	wantKind(t, "acquire", err, api.Unavailable)
}

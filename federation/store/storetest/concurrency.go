package storetest

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// Sizes of the concurrent tests.
const (
	writers = 8
	rounds  = 25
)

// crowd runs fn in many goroutines, spread over two replicas.
func (k *kit) crowd(fn func(s store.Store, i int) error) {
	k.t.Helper()
	replicas := []store.Store{k.s, k.open()}
	var g errgroup.Group
	for i := range writers {
		g.Go(func() error { return fn(replicas[i%len(replicas)], i) })
	}
	if err := g.Wait(); err != nil {
		k.t.Fatal(err)
	}
}

func add(tx store.Tx, id string, n int) error {
	have, err := number(tx, id)
	if err != nil {
		return err
	}
	return put(tx, id, strconv.Itoa(have+n))
}

// testSnapshots: money moves between two records; every view sees all of it.
func testSnapshots(t *testing.T, k *kit) {
	k.update(func(tx store.Tx) error { return errors.Join(put(tx, "a", "1000"), put(tx, "b", "0")) })
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			last := int64(0)
			for {
				select {
				case <-done:
					return
				default:
				}
				var sum int
				rev, err := k.s.View(k.ctx, func(r store.Reader) error {
					a, err := number(r, "a")
					if err != nil {
						return err
					}
					b, err := number(r, "b")
					sum = a + b
					return err
				})
				if err != nil || sum != 1000 || rev < last {
					t.Errorf("a view saw %d of 1000 at revision %d after %d, error %v", sum, rev, last, err)
					return
				}
				last = rev
			}
		})
	}
	k.crowd(func(s store.Store, i int) error {
		for range rounds {
			if _, err := s.Update(k.ctx, func(tx store.Tx) error {
				return errors.Join(add(tx, "a", -i), add(tx, "b", i))
			}); err != nil {
				return err
			}
		}
		return nil
	})
	close(done)
	readers.Wait()
}

// testLostUpdates: every acknowledged increment is there, and each has a revision
// of its own.
func testLostUpdates(t *testing.T, k *kit) {
	var seen sync.Map
	k.crowd(func(s store.Store, i int) error {
		for range rounds {
			rev, err := s.Update(k.ctx, func(tx store.Tx) error { return add(tx, "n", 1) })
			if err != nil {
				return err
			}
			if other, dup := seen.LoadOrStore(rev, i); dup {
				return fmt.Errorf("writers %v and %d share revision %d", other, i, rev)
			}
		}
		return nil
	})
	if got, want := k.text("n"), strconv.Itoa(writers*rounds); got != want {
		t.Errorf("%s of %s acknowledged increments are stored", got, want)
	}
}

// testWriteSkew: each takes itself off duty only while another is on; snapshot
// isolation alone would let two go at once.
func testWriteSkew(t *testing.T, k *kit) {
	for round := range rounds {
		ids := make([]string, writers)
		k.update(func(tx store.Tx) error {
			for i := range ids {
				ids[i] = fmt.Sprintf("r%d-%d", round, i)
				if err := put(tx, ids[i], "1"); err != nil {
					return err
				}
			}
			return nil
		})
		k.crowd(func(s store.Store, i int) error {
			_, err := s.Update(k.ctx, func(tx store.Tx) error {
				on := 0
				for _, id := range ids {
					n, err := number(tx, id)
					if err != nil {
						return err
					}
					on += n
				}
				if on < 2 {
					return nil
				}
				return put(tx, ids[i], "0")
			})
			return err
		})
		on := 0
		k.view(func(r store.Reader) error {
			on = 0
			for _, id := range ids {
				n, err := number(r, id)
				if err != nil {
					return err
				}
				on += n
			}
			return nil
		})
		if on != 1 {
			t.Fatalf("round %d: %d left on duty, want 1", round, on)
		}
	}
}

// testErrorsInAGroup: of updates that run together, those that fail leave
// nothing and disturb nobody.
func testErrorsInAGroup(t *testing.T, k *kit) {
	var want atomic.Int64
	k.crowd(func(s store.Store, i int) error {
		for j := range rounds {
			rev, err := s.Update(k.ctx, func(tx store.Tx) error {
				if err := add(tx, "sum", 1); err != nil {
					return err
				}
				switch (i + j) % 4 {
				case 1:
					return fmt.Errorf("%d: %w", i, errMine)
				case 2:
					return tx.Delete(store.Tenant, "tenants/absent")
				}
				return nil
			})
			switch mode := (i + j) % 4; {
			case mode == 1 && !errors.Is(err, errMine), mode == 2 && api.KindOf(err) != api.NotFound:
				return fmt.Errorf("writer %d at %d: want its own error, got: %w", i, rev, err)
			case mode == 0 || mode == 3:
				if err != nil {
					return err
				}
				want.Add(1)
			}
		}
		return nil
	})
	if got := k.text("sum"); got != strconv.FormatInt(want.Load(), 10) {
		t.Errorf("stored %s, acknowledged %d", got, want.Load())
	}
}

// testIdempotentRequests: the same request sent many times has one effect and
// one result.
func testIdempotentRequests(t *testing.T, k *kit) {
	for j := range rounds {
		id := fmt.Sprintf("request-%d", j)
		k.crowd(func(s store.Store, i int) error {
			_, err := s.Update(k.ctx, func(tx store.Tx) error {
				_, err := tx.Get(store.RequestResult, id)
				if err == nil || api.KindOf(err) != api.NotFound {
					return err
				}
				return errors.Join(add(tx, "effects", 1), tx.Put(store.RequestResult, id, &storev1.RequestResult{Method: strconv.Itoa(i)}))
			})
			return err
		})
	}
	if got, want := k.text("effects"), strconv.Itoa(rounds); got != want {
		t.Errorf("%s effects of %s requests", got, want)
	}
}

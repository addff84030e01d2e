package fleet

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
)

// absent is a store that is gone at times, and counts who asks it then.
type absent struct {
	store.Store
	gone             atomic.Bool
	updates, acquire atomic.Int32
}

func (a *absent) away() error { return api.E(api.Unavailable, "reach the store", "it is gone") }

func (a *absent) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	if a.gone.Load() {
		a.updates.Add(1)
		return 0, a.away()
	}
	return a.Store.Update(ctx, fn)
}

func (a *absent) Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	if a.gone.Load() {
		a.acquire.Add(1)
		return store.Lease{}, a.away()
	}
	return a.Store.Acquire(ctx, name, holder, ttl, progress)
}

// lines is a log that may be read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(message string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), message)
}

// While the store is gone it is asked about once a second by each, not fifty
// times, and the log has two lines of it.
func TestAnAbsentStoreIsAskedWithBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, log := &absent{Store: mem.New(mem.Config{})}, &lines{}
		if _, err := st.Store.Update(t.Context(), func(tx store.Tx) error {
			return tx.Put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu", Uid: "eu"})
		}); err != nil {
			t.Fatal(err)
		}
		f, err := New(Config{
			Store: st, Replica: "r", Fleet: testFleet, FleetBundle: func() []byte { return nil },
			Peer: func(context.Context) (identity.ID, error) { return identity.ID{}, nil }, Log: slog.New(slog.NewTextHandler(log, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = f.Run(ctx) })
		defer func() { cancel(); wg.Wait() }()
		time.Sleep(time.Second)
		f.mu.Lock()
		m := f.members["eu"]
		f.mu.Unlock()
		s, sctx, err := f.enter(ctx, m, 1)
		if err != nil {
			t.Fatal(err)
		}
		defer f.leave(s)
		wg.Go(func() { s.commit(sctx) })
		wg.Go(func() {
			for sctx.Err() == nil {
				s.mu.Lock()
				s.seen, s.full = time.Now(), true
				s.mu.Unlock()
				time.Sleep(100 * time.Millisecond)
			}
		})
		synctest.Wait() // it has been heard
		st.gone.Store(true)
		poke(s.write)
		time.Sleep(time.Minute)
		for what, n := range map[string]int32{"writing status": st.updates.Load(), "reading signs of life": st.acquire.Load()} {
			if n < 20 || n > 150 {
				t.Errorf("%s: %d tries in a minute", what, n)
			}
		}
		st.gone.Store(false)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		for _, line := range []string{"status not stored", "status is stored again", "signs of life cannot be read", "signs of life are read again"} {
			if n := log.count(line); n != 1 {
				t.Errorf("the log says %d times: %s", n, line)
			}
		}
	})
}

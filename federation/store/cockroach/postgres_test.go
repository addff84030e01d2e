package cockroach

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/storetest/pgtest"
)

// TestPostgres runs what only the SQL store has, on one server.
func TestPostgres(t *testing.T) {
	server := pgtest.Postgres(t)
	for name, fn := range map[string]func(*testing.T, *pgtest.Server){
		"CommitFailuresAreRetried": testCommitFailures,
		"ErrorsHitTheirOwn":        testErrorsHitTheirOwn,
		"FrozenReplica":            testFrozenReplica,
		"LostConnections":          testLostConnections,
		"MigrateTogether":          testMigrateTogether,
		"Unmigrated":               testUnmigrated,
		"CompactionLoop":           testCompactionLoop,
		"LongLog":                  testLongLog,
		"WaitingAtClose":           testWaitingAtClose,
	} {
		t.Run(name, func(t *testing.T) { fn(t, server) })
	}
}

func put(id string) func(store.Tx) error {
	return func(tx store.Tx) error {
		return tx.Put(store.Tenant, api.TenantName(id), &portolanv1.Tenant{Name: api.TenantName(id)})
	}
}

func has(t *testing.T, s *Store, id string) bool {
	t.Helper()
	found := false
	if _, err := s.View(t.Context(), func(r store.Reader) error {
		_, err := r.Get(store.Tenant, api.TenantName(id))
		found = err == nil
		if api.KindOf(err) == api.NotFound {
			return nil
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// testCommitFailures is the trap of PostgreSQL: two transactions whose every
// statement succeeds, and of which one fails at COMMIT. The store's strategy must
// notice and run it again; the client library's for CockroachDB returns nil, and
// the write is lost.
func testCommitFailures(t *testing.T, server *pgtest.Server) {
	s := open(t, Config{URL: migrated(t, server)})
	for round := range 10 {
		rows := [2]string{fmt.Sprintf("x%d", round), fmt.Sprintf("y%d", round)}
		var attempts atomic.Int64
		var met sync.WaitGroup
		met.Add(2)
		var g errgroup.Group
		for i := range 2 {
			g.Go(func() error {
				first := true
				return s.runTx(t.Context(), writing, func(tx pgx.Tx) error {
					attempts.Add(1)
					var n int
					if err := tx.QueryRow(t.Context(), "SELECT COUNT(*) FROM leases WHERE name = $1", rows[1-i]).Scan(&n); err != nil {
						return err
					}
					_, err := tx.Exec(t.Context(), "INSERT INTO leases (name, holder, epoch, expires, progress) VALUES ($1, '', $2, now(), 0)", rows[i], int64(n))
					if first {
						// Both have read and written before either commits.
						first = false
						met.Done()
						met.Wait()
					}
					return err
				})
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		// In any serial order the second one saw the first.
		var stored, saw int
		if err := s.pool.QueryRow(t.Context(), "SELECT COUNT(*), SUM(epoch)::INT8 FROM leases WHERE name = ANY($1)", rows[:]).Scan(&stored, &saw); err != nil {
			t.Fatal(err)
		}
		if stored != 2 || saw != 1 || attempts.Load() < 3 {
			t.Fatalf("round %d: %d of 2 acknowledged writes are stored, %d saw the other, in %d attempts", round, stored, saw, attempts.Load())
		}
	}
}

// hold keeps the committing goroutine busy until release is called, so that what
// is sent meanwhile forms a group.
func hold(t *testing.T, s *Store) (release func()) {
	t.Helper()
	inside, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = s.Update(context.Background(), func(store.Tx) error {
			once.Do(func() { close(inside) })
			<-free
			return nil
		})
	}()
	<-inside
	return func() { close(free); <-done }
}

// testErrorsHitTheirOwn: an update that the database refuses takes nobody with
// it.
func testErrorsHitTheirOwn(t *testing.T, server *pgtest.Server) {
	s := open(t, Config{URL: migrated(t, server)})
	release := hold(t, s)
	var g errgroup.Group
	errs := make([]error, 9)
	for i := range errs {
		g.Go(func() error {
			fn := put(fmt.Sprintf("t%d", i))
			if i == 4 {
				fn = put("nul\x00") // TEXT holds no such thing
			}
			_, errs[i] = s.Update(t.Context(), fn)
			return nil
		})
	}
	for len(s.updates) < len(errs) {
		runtime.Gosched() // until all are queued: nothing signals that
	}
	release()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for i, err := range errs {
		if (err != nil) != (i == 4) || (i != 4) != has(t, s, fmt.Sprintf("t%d", i)) {
			t.Errorf("update %d: error %v, stored %v", i, err, has(t, s, fmt.Sprintf("t%d", i)))
		}
	}
	if api.KindOf(errs[4]) != api.Internal {
		t.Errorf("the refused one ended with %v", errs[4])
	}
}

// testFrozenReplica: a replica that stops inside a transaction holds the others
// up only for the idle timeout, and commits nothing when it wakes.
func testFrozenReplica(t *testing.T, server *pgtest.Server) {
	url := migrated(t, server)
	frozen, other := open(t, Config{URL: url, IdleTimeout: 200 * time.Millisecond}), open(t, Config{URL: url})
	inside, wake := make(chan struct{}), make(chan struct{})
	late := make(chan error, 1)
	var once sync.Once
	go func() {
		_, err := frozen.Update(context.Background(), func(tx store.Tx) error {
			once.Do(func() { close(inside) })
			<-wake
			return put("late")(tx)
		})
		late <- err
	}()
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := other.Update(ctx, put("meanwhile")); err != nil {
		t.Errorf("behind a frozen replica: %v", err)
	}
	close(wake)
	if err := <-late; api.KindOf(err) != api.Unavailable {
		t.Errorf("the frozen replica's update ended with %v", err)
	}
	if !has(t, other, "meanwhile") || has(t, other, "late") {
		t.Errorf("stored: meanwhile %v, late %v", has(t, other, "meanwhile"), has(t, other, "late"))
	}
	if _, err := frozen.Update(t.Context(), put("after")); err != nil {
		t.Errorf("after waking: %v", err)
	}
}

// testLostConnections: the database drops every connection; watches go on, and
// what was acknowledged is there.
func testLostConnections(t *testing.T, server *pgtest.Server) {
	s := open(t, Config{URL: migrated(t, server)})
	w, err := s.Watch(t.Context(), 0, store.WatchFilter{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	seen := map[string]bool{}
	for i := range 20 {
		id := fmt.Sprintf("t%d", i)
		if i%5 == 4 {
			if _, err := s.pool.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"); err != nil {
				t.Fatal(err)
			}
		}
		for {
			_, err := s.Update(t.Context(), put(id))
			if err == nil {
				break
			}
			if api.KindOf(err) != api.Unavailable {
				t.Fatalf("update: %v", err)
			}
		}
		for !seen[api.TenantName(id)] {
			b, err := w.Next(t.Context())
			if err != nil {
				t.Fatalf("watch: %v", err)
			}
			for _, c := range b.Changes {
				seen[c.Record.Name] = true
			}
		}
	}
}

func testMigrateTogether(t *testing.T, server *pgtest.Server) {
	url := server.Database(t)
	for range 2 {
		g, ctx := errgroup.WithContext(t.Context())
		for range 3 {
			g.Go(func() error { return Migrate(ctx, url) })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := open(t, Config{URL: url}).Update(t.Context(), put("a")); err != nil {
		t.Error(err)
	}
}

func testUnmigrated(t *testing.T, server *pgtest.Server) {
	_, err := Open(t.Context(), Config{URL: server.Database(t)})
	if api.KindOf(err) != api.Precondition || !strings.Contains(err.Error(), "migrate") {
		t.Errorf("an empty database: %v", err)
	}
	if _, err := Open(t.Context(), Config{URL: "::not a url"}); api.KindOf(err) != api.Invalid {
		t.Errorf("a bad url: %v", err)
	}
}

// testCompactionLoop: of two replicas with the loop the log stays short.
func testCompactionLoop(t *testing.T, server *pgtest.Server) {
	cfg := Config{URL: migrated(t, server), Holder: "a", Retain: 10, CompactInterval: 20 * time.Millisecond}
	s := open(t, cfg)
	cfg.Holder = "b"
	open(t, cfg)
	var last int64
	for range 50 {
		rev, err := s.Update(t.Context(), put("a"))
		if err != nil {
			t.Fatal(err)
		}
		last = rev
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		var n int64
		if err := s.pool.QueryRow(ctx, "SELECT COUNT(*) FROM changes").Scan(&n); err != nil {
			t.Fatalf("the log was never shortened: %v", err)
		}
		if n == 10 {
			break
		}
	}
	late := open(t, Config{URL: cfg.URL})
	for from, want := range map[int64]bool{last - 11: false, last - 10: true} {
		w, err := late.Watch(ctx, from, store.WatchFilter{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Next(ctx); (err == nil) != want || err != nil && api.KindOf(err) != api.Compacted {
			t.Errorf("watch from %d, the last is %d: %v", from, last, err)
		}
	}
}

// testLongLog: transactions that are bigger than a page, and a log of several
// pages, come whole to who comes late.
func testLongLog(t *testing.T, server *pgtest.Server) {
	url := migrated(t, server)
	s := open(t, Config{URL: url})
	sizes := []int{logPage + 500, 1, 3000, 3000, 2}
	total := 0
	for i, n := range sizes {
		total += n
		if _, err := s.Update(t.Context(), func(tx store.Tx) error {
			for j := range n {
				if err := put(fmt.Sprintf("t%d-%d", i, j))(tx); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for name, w := range map[string]*Store{"late": open(t, Config{URL: url}), "own": s} {
		got, at := 0, int64(0)
		watch, err := w.Watch(t.Context(), 0, store.WatchFilter{Kinds: []store.Kind{store.Tenant}})
		if err != nil {
			t.Fatal(err)
		}
		for at < int64(len(sizes)) {
			b, err := watch.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := 0
			for r := at; r < b.Revision; r++ {
				want += sizes[r]
			}
			if len(b.Changes) != want {
				t.Errorf("%s: batch (%d, %d] has %d changes, want %d", name, at, b.Revision, len(b.Changes), want)
			}
			got, at = got+len(b.Changes), b.Revision
		}
		if got != total {
			t.Errorf("%s: %d changes of %d", name, got, total)
		}
	}
}

// testWaitingAtClose: nobody waits for ever on a store that is closed.
func testWaitingAtClose(t *testing.T, server *pgtest.Server) {
	s := open(t, Config{URL: migrated(t, server)})
	release := hold(t, s)
	var g errgroup.Group
	for range 5 {
		g.Go(func() error {
			_, err := s.Update(context.Background(), put("a"))
			if err != nil && api.KindOf(err) != api.Unavailable {
				return err
			}
			return nil
		})
	}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	<-s.ctx.Done()
	release()
	if err := errors.Join(g.Wait(), <-closed); err != nil {
		t.Error(err)
	}
	for range 20 {
		if _, err := s.Update(context.Background(), put("a")); api.KindOf(err) != api.Unavailable {
			t.Fatalf("after the close: %v", err)
		}
	}
}

// BenchmarkGroupCommit: small updates by many callers through one replica, on a
// disk that syncs.
func BenchmarkGroupCommit(b *testing.B) {
	server := pgtest.Postgres(b, "fsync=on", "full_page_writes=on")
	for _, callers := range []int{1, 32, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			s := open(b, Config{URL: migrated(b, server)})
			var next atomic.Int64
			var g errgroup.Group
			b.ResetTimer()
			for range callers {
				g.Go(func() error {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						if _, err := s.Update(b.Context(), put(fmt.Sprintf("t%d", i%1000))); err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "updates/s")
		})
	}
}

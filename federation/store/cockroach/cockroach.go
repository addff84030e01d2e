// Package cockroach is the federation's store in SQL, on CockroachDB in
// production and on PostgreSQL on one machine. It owns the tables of its
// migrations and nothing else in the database; it never holds the only copy of
// anything. It is the only package that knows SQL.
//
// Every logical update is one closure; a replica commits many of them in one
// database transaction (group commit), one transaction in flight at a time. Each
// transaction first takes the counter row, so the revision follows commit order
// over all replicas on both databases. Watches are served from one poller of
// that row per process.
//
// Concurrency: every method is safe for concurrent use. Closures of updates run
// one at a time on one goroutine of the store, those of views on the caller's.
package cockroach

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// Config of a Store.
type Config struct {
	// URL of the database, "postgres://user@host:port/name?sslmode=…".
	URL string
	Log *slog.Logger
	// Holder names this process in the lease of the compaction loop; compaction
	// is left to others when empty.
	Holder string
	// PollInterval of the counter row; 10 ms when 0.
	PollInterval time.Duration
	// Retain is how many revisions the change log keeps; 100,000 when 0.
	Retain int64
	// CompactInterval between two compactions; 30 s when 0.
	CompactInterval time.Duration
	// IdleTimeout is how long the database waits for the next statement of a
	// transaction before it ends it, so that a frozen replica does not keep the
	// counter row; 5 s when 0.
	IdleTimeout time.Duration
	// MaxConns of the pool; 16 when 0.
	MaxConns int32
}

func (c *Config) setDefaults() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.PollInterval <= 0 {
		c.PollInterval = 10 * time.Millisecond
	}
	if c.Retain <= 0 {
		c.Retain = 100_000
	}
	if c.CompactInterval <= 0 {
		c.CompactInterval = 30 * time.Second
	}
	if c.IdleTimeout <= 0 {
		c.IdleTimeout = 5 * time.Second
	}
	if c.MaxConns <= 0 {
		c.MaxConns = 16
	}
}

// Store implements store.Store.
type Store struct {
	cfg       Config
	pool      *pgxpool.Pool
	cockroach bool
	updates   chan *update
	ended     chan struct{} // closed when nobody commits any more
	feed      *feed
	ctx       context.Context //nolint:containedctx // the life of the store's own goroutines
	cancel    context.CancelFunc
	running   sync.WaitGroup
}

var _ store.Store = (*Store)(nil)

// Open connects to a migrated database and starts the store's goroutines, which
// Close ends.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	const doing = "open the store"
	cfg.setDefaults()
	pc, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "database url: %w", err)
	}
	pc.MaxConns = cfg.MaxConns
	if pc.ConnConfig.ConnectTimeout == 0 {
		pc.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	pc.ConnConfig.RuntimeParams["application_name"] = "portolan"
	pc.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = milliseconds(cfg.IdleTimeout)
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, failure(doing, err)
	}
	s := &Store{cfg: cfg, pool: pool, updates: make(chan *update, 1024), ended: make(chan struct{})}
	revision, err := s.probe(ctx)
	if err != nil {
		pool.Close()
		return nil, failure(doing, err)
	}
	s.feed = newFeed(revision)
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.running.Go(s.commitLoop)
	s.running.Go(s.pollLoop)
	if cfg.Holder != "" {
		s.running.Go(s.compactLoop)
	}
	return s, nil
}

// probe asks which database it is, once, and where it stands.
func (s *Store) probe(ctx context.Context) (int64, error) {
	var version string
	if err := s.pool.QueryRow(ctx, "SELECT version()").Scan(&version); err != nil {
		return 0, err
	}
	s.cockroach = strings.Contains(version, "CockroachDB")
	var revision int64
	err := s.pool.QueryRow(ctx, "SELECT revision FROM counter WHERE id = 1").Scan(&revision)
	if c := code(err); c == "42P01" || err == pgx.ErrNoRows { //nolint:errorlint // pgx returns it bare
		return 0, api.E(api.Precondition, "open the store", "the database has no schema yet: migrate it first")
	}
	return revision, err
}

// Ping implements store.Store.
func (s *Store) Ping(ctx context.Context) error {
	_, err := s.pool.Exec(ctx, "SELECT 1")
	return failure("ping the store", err)
}

// Close ends the store's goroutines and connections. Updates that wait are
// refused, watches end.
func (s *Store) Close() error {
	s.cancel()
	s.running.Wait()
	s.pool.Close()
	return nil
}

func gone(doing string) error { return api.E(api.Unavailable, doing, "the store is closed") }

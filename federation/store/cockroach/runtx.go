package cockroach

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/cockroachdb/cockroach-go/v2/crdb"
	"github.com/cockroachdb/cockroach-go/v2/crdb/crdbpgxv5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// Bounds of the wait between two attempts of a transaction.
const (
	retryMin = time.Millisecond
	retryMax = 50 * time.Millisecond
)

var (
	writing = pgx.TxOptions{IsoLevel: pgx.Serializable, AccessMode: pgx.ReadWrite}
	// Writers are in a total order because each takes the counter row, so every
	// snapshot is a prefix of it: PostgreSQL's snapshot isolation is enough to
	// read, and spares the writers false conflicts with readers.
	readingPostgres  = pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	readingCockroach = pgx.TxOptions{IsoLevel: pgx.Serializable, AccessMode: pgx.ReadOnly}
)

func (s *Store) reading() pgx.TxOptions {
	if s.cockroach {
		return readingCockroach
	}
	return readingPostgres
}

// runTx runs fn in a transaction, again whenever the database asks for it; fn
// resets its results, has no outside effects and wraps errors with %w.
//
// There are two strategies, because each database breaks the other's. On
// CockroachDB the client library's savepoint protocol. On PostgreSQL the whole
// transaction again: there the library would ignore the error of COMMIT, which is
// where serialization failures come, and lose the write.
func (s *Store) runTx(ctx context.Context, opts pgx.TxOptions, fn func(pgx.Tx) error) error {
	if s.cockroach {
		err := crdbpgx.ExecuteTx(ctx, s.pool, opts, fn)
		var ambiguous *crdb.AmbiguousCommitError
		if errors.As(err, &ambiguous) || code(err) == "40003" {
			return unknownOutcome(err)
		}
		return err
	}
	for wait := retryMin; ; wait = min(2*wait, retryMax) {
		err := s.attempt(ctx, opts, fn)
		if !retryable(err) {
			return err
		}
		select {
		case <-time.After(rand.N(wait) + 1):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

func (s *Store) attempt(ctx context.Context, opts pgx.TxOptions, fn func(pgx.Tx) error) error {
	tx, err := s.pool.BeginTx(ctx, opts)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		rollback(ctx, tx)
		return err
	}
	err = tx.Commit(ctx)
	if err != nil && code(err) == "" && !errors.Is(err, pgx.ErrTxCommitRollback) && opts.AccessMode != pgx.ReadOnly {
		return unknownOutcome(err)
	}
	return err
}

// rollback ends a transaction also when its context is over, so that its locks
// are not left to a timeout.
func rollback(ctx context.Context, tx pgx.Tx) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = tx.Rollback(ctx) // a broken connection rolls back by itself
}

func unknownOutcome(err error) error {
	return errors.Join(store.ErrOutcomeUnknown, err)
}

// code is the SQLSTATE of an error; empty when the database did not give one.
func code(err error) string {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Code
	}
	return ""
}

// retryable: serialization failure, deadlock.
func retryable(err error) bool {
	c := code(err)
	return c == "40001" || c == "40P01"
}

// failure gives an error of SQL its kind. Errors that have one keep it.
func failure(doing string, err error) error {
	var e *api.Error
	switch c := code(err); {
	case err == nil:
		return nil
	case errors.As(err, &e):
		return err
	case errors.Is(err, store.ErrOutcomeUnknown):
		return api.E(api.Unavailable, doing, "%w", err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return store.ContextError(doing, err)
	case c == "" || c[:2] == "08" || c[:2] == "53" || c[:2] == "57" || c == "25P03" || retryable(err):
		return api.E(api.Unavailable, doing, "database: %w", err)
	}
	return api.E(api.Internal, doing, "database: %w", err)
}

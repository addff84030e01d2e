package cockroach

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// Leases are counted by the database's clock, so the replicas' clocks do not
// matter. Expires in an answer is the local time of that moment, on the safe
// side for the holder.
const (
	renewSQL = `UPDATE leases SET expires = clock_timestamp() + $3::INT8 * INTERVAL '1 microsecond', progress = GREATEST(progress, $4::INT8)
		WHERE name = $1 AND holder = $2 RETURNING epoch, progress`
	leaseSQL = `SELECT name, holder, epoch, progress, (EXTRACT(EPOCH FROM (expires - clock_timestamp())) * 1000000)::INT8 FROM leases`
	grabSQL  = `INSERT INTO leases (name, holder, epoch, expires, progress)
		VALUES ($1, $2, 1, clock_timestamp() + $3::INT8 * INTERVAL '1 microsecond', $4)
		ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, epoch = leases.epoch + 1, expires = excluded.expires,
		progress = GREATEST(leases.progress, excluded.progress) RETURNING epoch, progress`
)

func scanLease(row pgx.Row) (store.Lease, time.Duration, error) {
	var l store.Lease
	var left int64
	err := row.Scan(&l.Name, &l.Holder, &l.Epoch, &l.Progress, &left)
	d := time.Duration(left) * time.Microsecond
	l.Expires = time.Now().Add(d)
	return l, d, err
}

// Acquire implements store.Store.
func (s *Store) Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	doing := "acquire lease " + name
	if holder == "" || ttl <= 0 {
		return store.Lease{}, api.E(api.Internal, doing, "a lease needs a holder and a time to live")
	}
	if s.ctx.Err() != nil {
		return store.Lease{}, gone(doing)
	}
	mine := store.Lease{Name: name, Holder: holder, Expires: time.Now().Add(ttl), Held: true}
	err := s.pool.QueryRow(ctx, renewSQL, name, holder, ttl.Microseconds(), progress).Scan(&mine.Epoch, &mine.Progress)
	if err == nil {
		return mine, nil
	}
	if !errors.Is(err, pgx.ErrNoRows) && !retryable(err) {
		return store.Lease{}, failure(doing, err)
	}
	other, left, err := scanLease(s.pool.QueryRow(ctx, leaseSQL+" WHERE name = $1", name))
	if err == nil && other.Holder != "" && other.Holder != holder && left > 0 {
		return other, nil
	}
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return store.Lease{}, failure(doing, err)
	}
	l, err := s.takeOver(ctx, name, holder, ttl, progress)
	return l, failure(doing, err)
}

// takeOver changes the holder. It writes the counter row, without a revision, so
// that no transaction that checked the older epoch commits after it.
func (s *Store) takeOver(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	var l store.Lease
	err := s.runTx(ctx, writing, func(tx pgx.Tx) error {
		var id int64
		if err := tx.QueryRow(ctx, "SELECT id FROM counter WHERE id = 1 FOR UPDATE").Scan(&id); err != nil {
			return err
		}
		now, left, err := scanLease(tx.QueryRow(ctx, leaseSQL+" WHERE name = $1", name))
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		if err == nil && now.Holder != "" && now.Holder != holder && left > 0 {
			l = now
			return nil
		}
		l = store.Lease{Name: name, Holder: holder, Expires: time.Now().Add(ttl), Held: true}
		if err := tx.QueryRow(ctx, grabSQL, name, holder, ttl.Microseconds(), progress).Scan(&l.Epoch, &l.Progress); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "UPDATE counter SET revision = revision WHERE id = 1")
		return err
	})
	return l, err
}

// Release implements store.Store.
func (s *Store) Release(ctx context.Context, name, holder string) error {
	_, err := s.pool.Exec(ctx, "UPDATE leases SET holder = '', expires = clock_timestamp() WHERE name = $1 AND holder = $2", name, holder)
	return failure("release lease "+name, err)
}

// Leases implements store.Store.
func (s *Store) Leases(ctx context.Context) ([]store.Lease, error) {
	rows, err := s.pool.Query(ctx, leaseSQL+" ORDER BY name")
	if err != nil {
		return nil, failure("list leases", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (store.Lease, error) {
		l, _, err := scanLease(row)
		return l, err
	})
	return out, failure("list leases", err)
}

// compactLease is the lease of the one replica that shortens the log.
const compactLease = "store/compact"

// compactPage is how many revisions are deleted in one statement.
const compactPage = 1000

// compactLoop keeps the change log short, under a lease, because two would only
// get in each other's way.
func (s *Store) compactLoop() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(s.cfg.CompactInterval):
		}
		l, err := s.Acquire(s.ctx, compactLease, s.cfg.Holder, 2*s.cfg.CompactInterval, 0)
		if err == nil && l.Held {
			var revision int64
			if revision, _, err = s.counter(s.ctx); err == nil && revision > s.cfg.Retain {
				err = s.Compact(s.ctx, revision-s.cfg.Retain)
			}
		}
		if err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Warn("compaction of the change log failed", "error", err)
		}
	}
}

// Compact forgets the log up to and including a revision: a watch from below it
// is told so. The floor is raised first, then rows go.
func (s *Store) Compact(ctx context.Context, floor int64) error {
	const doing = "compact the store"
	err := s.runTx(ctx, writing, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE counter SET floor = GREATEST(floor, LEAST($1::INT8, revision)) WHERE id = 1", floor)
		return err
	})
	if err != nil {
		return failure(doing, err)
	}
	var first *int64
	if _, floor, err = s.counter(ctx); err != nil {
		return failure(doing, err)
	}
	if err := s.pool.QueryRow(ctx, "SELECT MIN(revision) FROM changes").Scan(&first); err != nil || first == nil {
		return failure(doing, err)
	}
	for at := *first; at <= floor; at += compactPage {
		if _, err := s.pool.Exec(ctx, "DELETE FROM changes WHERE revision < $1", min(at+compactPage, floor+1)); err != nil {
			return failure(doing, err)
		}
	}
	return nil
}

package cockroach

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// listPage is how many rows a List reads at a time; the connection is free
// between pages, so the caller may ask for more while it walks.
const listPage = 256

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// querier is a transaction's read side.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// View implements store.Store.
func (s *Store) View(ctx context.Context, fn func(store.Reader) error) (int64, error) {
	const doing = "read the store"
	if s.ctx.Err() != nil {
		return 0, gone(doing)
	}
	var revision int64
	var own error
	err := s.runTx(ctx, s.reading(), func(tx pgx.Tx) error {
		own = nil
		if err := tx.QueryRow(ctx, "SELECT revision FROM counter WHERE id = 1").Scan(&revision); err != nil {
			return err
		}
		r := &reader{ctx: ctx, q: tx, revision: revision}
		own = fn(r)
		return r.broken
	})
	switch {
	case err != nil:
		return 0, failure(doing, err)
	case own != nil:
		return revision, own
	}
	return revision, nil
}

// reader reads inside one transaction.
type reader struct {
	ctx      context.Context //nolint:containedctx // it lives as long as its transaction
	q        querier
	revision int64
	// broken is the first error of SQL: the transaction can only be run again,
	// whatever the closure makes of it.
	broken error
}

func (r *reader) Revision() int64 { return r.revision }

func (r *reader) fail(doing string, err error) error {
	if r.broken == nil {
		r.broken = err
	}
	return failure(doing, err)
}

func notFound(doing string, kind store.Kind) error {
	return api.E(api.NotFound, doing, "no such %s", kind)
}

func (r *reader) Get(kind store.Kind, name string) (store.Record, error) {
	doing := "get " + name
	row := r.q.QueryRow(r.ctx, "SELECT name, tenant, revision, data FROM records WHERE kind = $1 AND name = $2", string(kind), []byte(name))
	rec, err := scan(row, kind)
	if errors.Is(err, pgx.ErrNoRows) {
		return store.Record{}, notFound(doing, kind)
	}
	if err != nil {
		return store.Record{}, r.fail(doing, err)
	}
	return rec, nil
}

func (r *reader) GetAll(kind store.Kind, names []string) (map[string]store.Record, error) {
	if len(names) == 0 {
		return map[string]store.Record{}, nil
	}
	keys := make([][]byte, len(names))
	for i, name := range names {
		keys[i] = []byte(name)
	}
	doing := fmt.Sprintf("get %d records, %s the first", len(names), names[0])
	rows, err := r.q.Query(r.ctx, "SELECT name, tenant, revision, data FROM records WHERE kind = $1 AND name = ANY($2::BYTEA[])", string(kind), keys)
	if err != nil {
		return nil, r.fail(doing, err)
	}
	recs, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (store.Record, error) { return scan(row, kind) })
	if err != nil {
		return nil, r.fail(doing, err)
	}
	out := make(map[string]store.Record, len(recs))
	for _, rec := range recs {
		out[rec.Name] = rec
	}
	return out, nil
}

func scan(row pgx.Row, kind store.Kind) (store.Record, error) {
	rec := store.Record{Kind: kind}
	var name, data []byte
	if err := row.Scan(&name, &rec.Tenant, &rec.Revision, &data); err != nil {
		return rec, err
	}
	rec.Name = string(name)
	var err error
	rec.Message, err = decode(kind, rec.Name, data)
	return rec, err
}

func decode(kind store.Kind, name string, data []byte) (proto.Message, error) {
	info, ok := store.Info(kind)
	if !ok {
		return nil, api.E(api.Internal, "read "+name, "the database holds a record of unknown kind %q", kind)
	}
	m := info.New()
	if err := proto.Unmarshal(data, m); err != nil {
		return nil, api.E(api.Internal, "read "+name, "stored %s: %w", kind, err)
	}
	return m, nil
}

func (r *reader) List(kind store.Kind, opts store.ListOptions) iter.Seq2[store.Record, error] {
	size := listPage
	if opts.Limit > 0 {
		size = min(opts.Limit, listPage)
	}
	return r.list(kind, opts, size)
}

// list reads pages of a size until the limit of opts or the end.
func (r *reader) list(kind store.Kind, opts store.ListOptions, size int) iter.Seq2[store.Record, error] {
	return func(yield func(store.Record, error) bool) {
		n := 0
		for after := opts.After; ; {
			page, err := r.page(kind, opts, after, size)
			if err != nil {
				yield(store.Record{}, r.fail("list "+string(kind), err))
				return
			}
			for _, rec := range page {
				n++
				if !yield(rec, nil) || n == opts.Limit {
					return
				}
			}
			if len(page) < size {
				return
			}
			after = page[len(page)-1].Name
		}
	}
}

// page reads one page of a list; the tenant filter is part of the query.
func (r *reader) page(kind store.Kind, opts store.ListOptions, after string, limit int) ([]store.Record, error) {
	var sql strings.Builder
	args := []any{string(kind)}
	cond := func(text string, arg any) {
		args = append(args, arg)
		sql.WriteString(text + "$" + strconv.Itoa(len(args)))
	}
	sql.WriteString("SELECT name, tenant, revision, data FROM records WHERE kind = $1")
	if after != "" {
		cond(" AND name > ", []byte(after))
	}
	if opts.Prefix != "" {
		cond(" AND name >= ", []byte(opts.Prefix))
		if end := prefixEnd(opts.Prefix); end != nil {
			cond(" AND name < ", end)
		}
	}
	if opts.Tenant != "" {
		cond(" AND tenant = ", opts.Tenant)
	}
	if opts.Tenants != nil {
		cond(" AND tenant = ANY(", opts.Tenants)
		sql.WriteString("::TEXT[])")
	}
	cond(" ORDER BY name LIMIT ", int64(limit))
	rows, err := r.q.Query(r.ctx, sql.String(), args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (store.Record, error) { return scan(row, kind) })
}

// prefixEnd is the least name after all with the prefix; nil when there is none.
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return nil
}

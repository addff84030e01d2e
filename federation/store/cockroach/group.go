package cockroach

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// Bounds of a group: how many updates share a transaction, and how long it may
// take with all its retries.
const (
	maxGroup     = 256
	groupTimeout = 20 * time.Second
)

const doingUpdate = "update the store"

// update is one logical update that waits for its group.
type update struct {
	ctx  context.Context //nolint:containedctx // the request's, checked when its turn comes
	fn   func(store.Tx) error
	done chan struct{}

	// The result, valid after done.
	revision int64
	err      error
	panicked any
}

// Update implements store.Store. Once its turn has come it waits for the
// outcome, also beyond the end of ctx: fn is never running after the return.
func (s *Store) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	u := &update{ctx: ctx, fn: fn, done: make(chan struct{})}
	select {
	case s.updates <- u:
	case <-ctx.Done():
		return 0, store.ContextError(doingUpdate, ctx.Err())
	case <-s.ctx.Done():
		return 0, gone(doingUpdate)
	}
	select {
	case <-u.done:
	case <-s.ended:
		// Nobody commits any more; it was answered before, or never will be.
		select {
		case <-u.done:
		default:
			return 0, gone(doingUpdate)
		}
	}
	if u.panicked != nil {
		panic(u.panicked)
	}
	return u.revision, u.err
}

// commitLoop is the one goroutine that writes.
func (s *Store) commitLoop() {
	defer close(s.ended)
	for {
		select {
		case <-s.ctx.Done():
			return
		case u := <-s.updates:
			s.commitGroup(s.gather(u))
		}
	}
}

func (s *Store) gather(first *update) []*update {
	group := []*update{first}
	for len(group) < maxGroup {
		select {
		case u := <-s.updates:
			group = append(group, u)
		default:
			return group
		}
	}
	return group
}

// commitGroup commits the updates together; after an error of SQL that is none of
// theirs to handle, one by one, so that it hits only the one that causes it.
func (s *Store) commitGroup(all []*update) {
	group := all[:0:0]
	for _, u := range all {
		if err := u.ctx.Err(); err != nil {
			u.err = store.ContextError(doingUpdate, err)
		} else {
			group = append(group, u)
		}
	}
	if err := s.commitOnce(group); err != nil {
		var own *api.Error // a record that cannot be read or written
		alone := len(group) > 1 && (code(err) != "" || errors.As(err, &own)) && !errors.Is(err, store.ErrOutcomeUnknown)
		for _, u := range group {
			e := err
			if alone {
				e = s.commitOnce([]*update{u})
			}
			switch {
			case e != nil && s.ctx.Err() != nil && !errors.Is(e, store.ErrOutcomeUnknown):
				u.revision, u.err = 0, gone(doingUpdate)
			case e != nil:
				u.revision, u.err = 0, failure(doingUpdate, e)
			}
		}
	}
	for _, u := range all {
		close(u.done)
	}
	s.feed.nudge()
}

// commitOnce runs the group's closures in one transaction. The error is one of
// SQL and means that nothing was stored.
func (s *Store) commitOnce(group []*update) error {
	if len(group) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(s.ctx, groupTimeout)
	defer cancel()
	return s.runTx(ctx, writing, func(tx pgx.Tx) error {
		// The row lock only queues. What makes writers follow each other is that
		// all that store something write this row.
		var revision int64
		if err := tx.QueryRow(ctx, "SELECT revision FROM counter WHERE id = 1 FOR UPDATE").Scan(&revision); err != nil {
			return err
		}
		g := &groupTx{ctx: ctx, q: tx, base: revision, revision: revision, live: store.NewSet(), dead: store.NewSet(), cache: map[cacheKey]store.Record{}}
		for _, u := range group {
			if err := g.run(u); err != nil {
				return err
			}
		}
		return g.flush(tx)
	})
}

type cacheKey struct {
	kind store.Kind
	name string
}

// groupTx is the state of one attempt at a group: what its updates wrote so far,
// over what the transaction reads.
type groupTx struct {
	ctx      context.Context //nolint:containedctx // it lives as long as its transaction
	q        querier
	base     int64 // revision that the transaction found
	revision int64 // of the last update that wrote
	changes  []store.Change
	// live and dead are the records that were written and deleted.
	live, dead *store.Set
	// cache of rows read by Get; the zero record stands for none.
	cache map[cacheKey]store.Record
}

// run runs one closure. Its own error drops it out of the group; an error of SQL
// is returned and ends the attempt.
func (g *groupTx) run(u *update) error {
	u.revision, u.err, u.panicked = 0, nil, nil
	t := &tx{
		reader: reader{ctx: g.ctx, q: g.q, revision: g.revision + 1},
		group:  g, live: g.live.Fork(), dead: g.dead.Fork(),
	}
	u.err, u.panicked = call(u.fn, t)
	if t.broken != nil {
		return t.broken
	}
	if u.err != nil || u.panicked != nil {
		return nil //nolint:nilerr // its own error is the update's, not the group's
	}
	u.revision = g.revision
	if changes := t.pending.Changes(); len(changes) > 0 {
		g.revision++
		for i := range changes {
			changes[i].Record.Revision = g.revision
		}
		g.changes = append(g.changes, changes...)
		g.live, g.dead = t.live, t.dead
		u.revision = g.revision
	}
	return nil
}

// call hands a panic of a closure back to who brought it.
func call(fn func(store.Tx) error, t store.Tx) (err error, panicked any) { //nolint:revive,staticcheck // the panic comes last
	defer func() { panicked = recover() }()
	return fn(t), nil
}

// tx is the store.Tx of one update inside a group.
type tx struct {
	reader
	group      *groupTx
	live, dead *store.Set
	pending    store.Pending
}

func (t *tx) Get(kind store.Kind, name string) (store.Record, error) {
	return t.getOver(t.live, t.dead, kind, name)
}

// getOver reads what some writes leave of the database.
func (t *tx) getOver(live, dead *store.Set, kind store.Kind, name string) (store.Record, error) {
	if r, ok := live.Get(kind, name); ok {
		return r, nil
	}
	if _, ok := dead.Get(kind, name); ok {
		return store.Record{}, notFound("get "+name, kind)
	}
	k := cacheKey{kind, name}
	if r, ok := t.group.cache[k]; ok {
		if r.Message == nil {
			return r, notFound("get "+name, kind)
		}
		return r, nil
	}
	r, err := t.reader.Get(kind, name)
	if err == nil || t.broken == nil {
		t.group.cache[k] = r
	}
	return r, err
}

// GetAll asks the database only for what this transaction has neither written nor
// read.
func (t *tx) GetAll(kind store.Kind, names []string) (map[string]store.Record, error) {
	out := make(map[string]store.Record, len(names))
	var ask []string
	for _, name := range names {
		if r, ok := t.live.Get(kind, name); ok {
			out[name] = r
			continue
		}
		if _, ok := t.dead.Get(kind, name); ok {
			continue
		}
		if r, ok := t.group.cache[cacheKey{kind, name}]; !ok {
			ask = append(ask, name)
		} else if r.Message != nil {
			out[name] = r
		}
	}
	got, err := t.reader.GetAll(kind, ask)
	if err != nil {
		return nil, err
	}
	for _, name := range ask {
		r, ok := got[name]
		t.group.cache[cacheKey{kind, name}] = r
		if ok {
			out[name] = r
		}
	}
	return out, nil
}

// List merges the database's pages with what the group wrote. It shows the state
// at its beginning, whatever the caller writes while it walks.
func (t *tx) List(kind store.Kind, opts store.ListOptions) iter.Seq2[store.Record, error] {
	live, dead := t.live.Fork(), t.dead.Fork()
	written := opts
	written.Limit = 0
	size := listPage
	if opts.Limit > 0 {
		size = min(opts.Limit+dead.Len(kind), listPage)
	}
	return func(yield func(store.Record, error) bool) {
		mine, stop := iter.Pull(live.List(kind, written))
		defer stop()
		next, more := mine()
		n := 0
		give := func(r store.Record) bool {
			n++
			return yield(r, nil) && n != opts.Limit
		}
		under := opts
		under.Limit = 0
		for r, err := range t.list(kind, under, size) {
			if err != nil {
				yield(r, err)
				return
			}
			for ; more && next.Name < r.Name; next, more = mine() {
				if !give(next) {
					return
				}
			}
			_, over := live.Get(kind, r.Name)
			_, gone := dead.Get(kind, r.Name)
			if !over && !gone && !give(r) {
				return
			}
		}
		for ; more; next, more = mine() {
			if !give(next) {
				return
			}
		}
	}
}

func (t *tx) Put(kind store.Kind, name string, m proto.Message) error {
	r, err := store.NewRecord(kind, name, m, t.revision)
	if err != nil {
		return err
	}
	t.live.Put(r)
	t.dead.Delete(kind, name)
	t.pending.Put(r)
	return nil
}

func (t *tx) Delete(kind store.Kind, name string) error {
	r, err := t.Get(kind, name)
	if api.KindOf(err) == api.NotFound {
		return notFound("delete "+name, kind)
	}
	if err != nil {
		return err
	}
	before := true
	if r.Revision == t.revision {
		// Its own write: was there anything under it?
		_, err := t.getOver(t.group.live, t.group.dead, kind, name)
		if before = err == nil; !before && api.KindOf(err) != api.NotFound {
			return err
		}
	}
	t.live.Delete(kind, name)
	t.dead.Put(r)
	t.pending.Delete(r, before)
	return nil
}

func (t *tx) CheckLease(name string, epoch int64) error {
	doing := "check lease " + name
	var holder string
	var now int64
	err := t.q.QueryRow(t.ctx, "SELECT holder, epoch FROM leases WHERE name = $1", name).Scan(&holder, &now)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return t.fail(doing, err)
	}
	if err != nil || holder == "" || now != epoch {
		return api.E(api.Conflict, doing, "epoch %d is over; it stands at %d", epoch, now)
	}
	return nil
}

// flush writes everything in one round trip.
func (g *groupTx) flush(tx pgx.Tx) error {
	if len(g.changes) == 0 {
		return nil
	}
	var log, put, del columns
	last := map[cacheKey]int{}
	for i, c := range g.changes {
		last[cacheKey{c.Record.Kind, c.Record.Name}] = i
	}
	for i, c := range g.changes {
		data, err := proto.Marshal(c.Record.Message)
		if err != nil {
			return api.E(api.Internal, "put "+c.Record.Name, "%w", err)
		}
		log.add(c, int64(i), data)
		switch {
		case last[cacheKey{c.Record.Kind, c.Record.Name}] != i:
		case c.Deleted:
			del.add(c, 0, nil)
		default:
			put.add(c, 0, data)
		}
	}
	b := &pgx.Batch{}
	b.Queue(`INSERT INTO changes (revision, seq, kind, name, tenant, deleted, data)
		SELECT * FROM unnest($1::INT8[], $2::INT8[], $3::TEXT[], $4::BYTEA[], $5::TEXT[], $6::BOOL[], $7::BYTEA[])`,
		log.revision, log.seq, log.kind, log.name, log.tenant, log.deleted, log.data)
	if len(put.kind) > 0 {
		b.Queue(`INSERT INTO records (kind, name, tenant, revision, data)
			SELECT * FROM unnest($1::TEXT[], $2::BYTEA[], $3::TEXT[], $4::INT8[], $5::BYTEA[])
			ON CONFLICT (kind, name) DO UPDATE SET tenant = excluded.tenant, revision = excluded.revision, data = excluded.data`,
			put.kind, put.name, put.tenant, put.revision, put.data)
	}
	if len(del.kind) > 0 {
		b.Queue(`DELETE FROM records WHERE (kind, name) IN (SELECT * FROM unnest($1::TEXT[], $2::BYTEA[]))`, del.kind, del.name)
	}
	b.Queue("UPDATE counter SET revision = $1 WHERE id = 1", g.revision)
	return tx.SendBatch(g.ctx, b).Close()
}

// columns are the arrays that unnest turns into rows.
type columns struct {
	revision, seq []int64
	kind, tenant  []string
	name, data    [][]byte
	deleted       []bool
}

func (c *columns) add(ch store.Change, seq int64, data []byte) {
	c.revision = append(c.revision, ch.Record.Revision)
	c.seq = append(c.seq, seq)
	c.kind = append(c.kind, string(ch.Record.Kind))
	c.name = append(c.name, []byte(ch.Record.Name))
	c.tenant = append(c.tenant, ch.Record.Tenant)
	c.deleted = append(c.deleted, ch.Deleted)
	if data == nil {
		data = []byte{} // nil would be NULL
	}
	c.data = append(c.data, data)
}

// Package etcd keeps a cluster's state in etcd: an embedded member that listens
// on nothing, or external endpoints. It owns all keys under its prefix; it never
// interprets what it keeps.
//
// Layout, under the prefix: "owner" names the process that may write;
// "gen/<sequence>" are the generations of intents, whole or as the change to the
// one before; "node/<id>" is a Node; "alloc/<node>" packs the allocations of a
// node; "volume/<id>" is a Volume, "state/<tenant>/<workload>" a WorkloadState; "settled" is a number; "token/<hash>" and "blob/<key>" are what they say.
// A record that is too big for one request lies in "chunk/<key>/<version>/<i>".
//
// Concurrency: safe for concurrent use. Writes run one after the other; reads of
// snapshots never wait for them. Every write checks that this process still is
// the owner, so that of two processes on one etcd the older fails.
package etcd

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// Limits of one request to etcd, below its defaults of 128 operations and
// 1.5 MiB. The embedded member is told to take more operations.
const (
	maxOps       = 100
	maxMemberOps = 1000
	maxBatch     = 1 << 20
)

// compactEvery is after how many writes etcd forgets the history before them.
const compactEvery = 1000

// Config of a Store.
type Config struct {
	// Dir holds the embedded member's data. Created when absent, for root only.
	Dir string
	// Endpoints of an external etcd; no member is embedded when there are any.
	Endpoints []string
	// TLS for the endpoints; none when nil.
	TLS *tls.Config
	// Prefix of all keys; "/portolan/" when empty.
	Prefix string
	// QuotaBytes bounds the embedded member's database; 4 GiB when 0.
	QuotaBytes int64
	// Timeout of one request; 10 s when 0.
	Timeout time.Duration
	// Log takes the store's and the member's warnings; discarded when nil.
	Log *slog.Logger
}

// SetDefaults fills in what is absent.
func (c *Config) SetDefaults() {
	if c.Prefix == "" {
		c.Prefix = "/portolan/"
	}
	if c.QuotaBytes == 0 {
		c.QuotaBytes = 4 << 30
	}
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate says all that is wrong.
func (c *Config) Validate() error {
	var errs []error
	if c.Dir == "" && len(c.Endpoints) == 0 {
		errs = append(errs, errors.New("etcd needs a directory or endpoints"))
	}
	if c.QuotaBytes < 0 || c.Timeout < 0 {
		errs = append(errs, errors.New("etcd quota and timeout must not be negative"))
	}
	return errors.Join(errs...)
}

// Store implements state.Store.
type Store struct {
	*state.Index
	cfg    Config
	owner  string
	client *clientv3.Client
	member *member // nil with external endpoints
	// ops is the most operations of one transaction.
	ops int

	// writer is held by the one write in progress; all below belongs to it.
	writer chan struct{}
	// unfinished is a write of unknown outcome: it is done again before the next.
	unfinished func(context.Context) error
	byNode     map[string]map[string]*clusterv1.Allocation
	chunked    map[string]bool // record keys whose content lies in chunks
	gens       generations
	writes     int

	closeOnce sync.Once
	closeErr  error
}

var _ state.Store = (*Store)(nil)

// Open starts the member or connects, takes ownership, and loads everything. It
// returns when the state is complete.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, api.E(api.Invalid, "open the cluster's state", "%w", err)
	}
	s := &Store{
		cfg: cfg, owner: rand.Text(), ops: maxOps, writer: make(chan struct{}, 1),
		byNode: map[string]map[string]*clusterv1.Allocation{}, chunked: map[string]bool{},
	}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	loaded, err := s.load(ctx)
	if err != nil {
		s.disconnect()
		return nil, err
	}
	if loaded.Degraded != "" {
		cfg.Log.Error("boot fell back to an older generation of intents", "revision", loaded.IntentRevision, "why", loaded.Degraded)
	}
	s.Index = state.NewIndex(loaded)
	return s, nil
}

func (s *Store) connect(ctx context.Context) error {
	if len(s.cfg.Endpoints) == 0 {
		m, err := startMember(ctx, s.cfg)
		if err != nil {
			return api.E(api.Unavailable, "start etcd in "+s.cfg.Dir, "%w", err)
		}
		s.member, s.client, s.ops = m, m.client(), maxMemberOps
		return nil
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: s.cfg.Endpoints, TLS: s.cfg.TLS, DialTimeout: s.cfg.Timeout, Logger: zapLogger(s.cfg.Log)})
	if err != nil {
		return api.E(api.Unavailable, "connect to etcd", "%w", err)
	}
	s.client = c
	return nil
}

func (s *Store) disconnect() {
	if s.client != nil {
		s.closeErr = ignoreCanceled(s.client.Close())
	}
	if s.member != nil {
		s.member.stop()
	}
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Close stops the member. A write in progress is waited for.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.writer <- struct{}{}
		defer func() { <-s.writer }()
		s.Index.Close()
		s.disconnect()
	})
	return s.closeErr
}

func (s *Store) key(parts ...string) string {
	return s.cfg.Prefix + strings.Join(parts, "/")
}

// fault gives an error of etcd its kind.
func fault(doing string, err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return api.E(api.Canceled, doing, "%w", err)
	case errors.Is(err, context.DeadlineExceeded):
		return api.E(api.Timeout, doing, "%w", err)
	}
	return api.E(api.Unavailable, doing, "etcd: %w", err)
}

// lock takes the writer's place and finishes what an earlier write left undone.
func (s *Store) lock(ctx context.Context, doing string) error {
	select {
	case s.writer <- struct{}{}:
	case <-ctx.Done():
		return state.ContextError(doing, ctx.Err())
	}
	if s.IsClosed() {
		s.unlock()
		return state.Closed(doing)
	}
	if s.unfinished != nil {
		if err := s.unfinished(ctx); err != nil {
			s.unlock()
			return err
		}
		s.unfinished = nil
	}
	return nil
}

func (s *Store) unlock() { <-s.writer }

// do runs a write, and remembers it when its outcome is unknown. All steps of a
// write are idempotent.
func (s *Store) do(ctx context.Context, write func(context.Context) error) error {
	err := write(ctx)
	if err != nil && api.KindOf(err) != api.Conflict && api.KindOf(err) != api.Exists {
		s.unfinished = write
	}
	return err
}

// txn runs operations if this process still is the owner.
func (s *Store) txn(ctx context.Context, doing string, ops ...clientv3.Op) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	isOwner := clientv3.Compare(clientv3.Value(s.key("owner")), "=", s.owner)
	r, err := s.client.Txn(ctx).If(isOwner).Then(ops...).Else(clientv3.OpGet(s.key("owner"))).Commit()
	if err != nil {
		return fault(doing, err)
	}
	if !r.Succeeded {
		kvs := r.Responses[0].GetResponseRange().Kvs
		if len(kvs) == 0 || string(kvs[0].Value) != s.owner {
			return api.E(api.Conflict, doing, "another process opened this state")
		}
		return nil
	}
	s.writes++
	if s.writes%compactEvery == 0 {
		if _, err := s.client.Compact(ctx, r.Header.Revision); err != nil {
			s.cfg.Log.Warn("etcd history was not compacted", "error", err)
		}
	}
	return nil
}

// CommitIntents implements state.Store.
func (s *Store) CommitIntents(ctx context.Context, revision int64, intents map[string]*linkv1.Intent, now time.Time) error {
	if err := s.lock(ctx, "commit intents"); err != nil {
		return err
	}
	defer s.unlock()
	c, err := s.DiffIntents(revision, intents, now)
	if err != nil {
		return err
	}
	w, err := s.gens.next(c, intents)
	if err != nil {
		return api.E(api.Internal, "commit intents", "%w", err)
	}
	return s.do(ctx, func(ctx context.Context) error {
		if err := s.putRecords(ctx, "commit intents", []record{{key: s.genKey(w.sequence), data: w.data}}); err != nil {
			return err
		}
		s.gens.written(w)
		s.ApplyIntents(c)
		s.dropOldGenerations(ctx)
		return nil
	})
}

// Commit implements state.Store.
func (s *Store) Commit(ctx context.Context, c state.Change) error {
	if err := s.lock(ctx, "commit a change"); err != nil {
		return err
	}
	defer s.unlock()
	if err := s.Check(c); err != nil {
		return err
	}
	return s.do(ctx, func(ctx context.Context) error { return s.write(ctx, c) })
}

// write persists a change part by part, each visible once it is durable.
func (s *Store) write(ctx context.Context, c state.Change) error {
	for _, part := range s.parts(c) {
		recs := part.records
		for _, p := range part.packs {
			recs = append(recs, record{key: s.key("alloc", p.node), data: p.data})
		}
		if err := s.putRecords(ctx, "commit a change", recs); err != nil {
			return err
		}
		for _, p := range part.packs {
			s.byNode[p.node] = p.allocations
		}
		s.Apply(part.change)
	}
	if c.Settled > s.Snapshot().Settled {
		put := clientv3.OpPut(s.key("settled"), strconv.FormatInt(c.Settled, 10))
		if err := s.txn(ctx, "commit a change", put); err != nil {
			return err
		}
		s.Apply(state.Change{Settled: c.Settled})
	}
	return nil
}

func marshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("a message that was parsed does not marshal: %v", err)) // only required fields and bad UTF-8 can do that
	}
	return b
}

// PutToken implements state.Store. Tokens that ended a day ago go with it.
func (s *Store) PutToken(ctx context.Context, hash string, t *clusterv1.NodeToken) error {
	const doing = "put a token"
	if err := s.lock(ctx, doing); err != nil {
		return err
	}
	defer s.unlock()
	ops := []clientv3.Op{clientv3.OpPut(s.key("token", hash), string(marshal(t)))}
	kvs, err := s.list(ctx, s.key("token", ""))
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		old := &clusterv1.NodeToken{}
		over := proto.Unmarshal(kv.Value, old) == nil && old.GetExpireTime().AsTime().Add(24*time.Hour).Before(t.GetExpireTime().AsTime())
		if over && string(kv.Key) != s.key("token", hash) && len(ops) < s.ops {
			ops = append(ops, clientv3.OpDelete(string(kv.Key)))
		}
	}
	return s.do(ctx, func(ctx context.Context) error {
		err := s.txn(ctx, doing, ops...)
		return err
	})
}

// Token implements state.Store.
func (s *Store) Token(ctx context.Context, hash string) (*clusterv1.NodeToken, error) {
	const doing = "read a token"
	b, err := s.get(ctx, doing, s.key("token", hash))
	if err != nil {
		return nil, err
	}
	t := &clusterv1.NodeToken{}
	if err := proto.Unmarshal(b, t); err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	return t, nil
}

// get reads one key; api.NotFound when it is absent.
func (s *Store) get(ctx context.Context, doing, key string) ([]byte, error) {
	if s.IsClosed() {
		return nil, state.Closed(doing)
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	r, err := s.client.Get(ctx, key)
	if err != nil {
		return nil, fault(doing, err)
	}
	if len(r.Kvs) == 0 {
		return nil, api.E(api.NotFound, doing, "it is absent")
	}
	return r.Kvs[0].Value, nil
}

// LoadBlob implements state.Store.
func (s *Store) LoadBlob(ctx context.Context, key string) ([]byte, error) {
	return s.get(ctx, "load blob "+key, s.key("blob", key))
}

// SaveBlob implements state.Store. Blobs are small: more than 1 MiB is
// api.Exhausted.
func (s *Store) SaveBlob(ctx context.Context, key string, data []byte, create bool) error {
	doing := "save blob " + key
	if len(data) > maxBatch {
		return api.E(api.Exhausted, doing, "%d bytes are more than %d", len(data), maxBatch)
	}
	if err := s.lock(ctx, doing); err != nil {
		return err
	}
	defer s.unlock()
	k := s.key("blob", key)
	write := func(ctx context.Context) error {
		err := s.txn(ctx, doing, clientv3.OpPut(k, string(data)))
		return err
	}
	if !create {
		return s.do(ctx, write)
	}
	_, err := s.get(ctx, doing, k)
	switch {
	case err == nil:
		return api.E(api.Exists, doing, "it is there already")
	case api.KindOf(err) != api.NotFound:
		return err
	}
	return s.do(ctx, write)
}

// Ping reads from etcd.
func (s *Store) Ping(ctx context.Context) error {
	b, err := s.get(ctx, "ping etcd", s.key("owner"))
	if err != nil {
		return err
	}
	if string(b) != s.owner {
		return api.E(api.Conflict, "ping etcd", "another process opened this state")
	}
	return nil
}

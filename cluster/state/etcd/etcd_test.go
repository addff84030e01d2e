package etcd

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/statetest"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestConformance(t *testing.T) {
	statetest.Run(t, func(t *testing.T) statetest.Opened {
		dir := t.TempDir()
		last := open(t, dir)
		return statetest.Opened{Store: last, Restart: func() state.Store {
			if err := last.Close(); err != nil {
				t.Fatal(err)
			}
			last = open(t, dir)
			return last
		}}
	})
}

func intents(n int) map[string]*linkv1.Intent {
	out := map[string]*linkv1.Intent{}
	for i := range n {
		out[fmt.Sprintf("service/t/s%d", i)] = &linkv1.Intent{Revision: int64(i), Body: &linkv1.Intent_Service{Service: &linkv1.ServiceIntent{Tenant: "t", Service: fmt.Sprintf("s%d", i)}}}
	}
	return out
}

func commit(t *testing.T, s *Store, revision int64) {
	t.Helper()
	if err := s.CommitIntents(t.Context(), revision, intents(int(revision)), time.Unix(revision, 0)); err != nil {
		t.Fatal(err)
	}
}

// Boot falls back generation by generation, says so, and the next commit is
// whole again.
func TestFallback(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for r := int64(1); r <= 100; r++ {
		commit(t, s, r)
	}
	kvs, err := s.list(t.Context(), s.key("gen", ""))
	if err != nil {
		t.Fatal(err)
	}
	if len(kvs) < keepGenerations || len(kvs) > 3*(maxDeltas+1) {
		t.Fatalf("%d generations are kept", len(kvs))
	}
	wholes := s.gens.wholes
	if len(wholes) < 2 {
		t.Fatalf("wholes %v: too few to fall back", wholes)
	}
	spoil := func(s *Store, sequence int64) *Store {
		t.Helper()
		if _, err := s.client.Put(t.Context(), s.genKey(sequence), "rubbish, not a record"); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return open(t, dir)
	}
	expect := func(s *Store, revision int64) {
		t.Helper()
		got := s.Snapshot()
		if got.IntentRevision != revision || len(got.Intents) != int(revision) || !strings.Contains(got.Degraded, "generation") {
			t.Fatalf("loaded revision %d with %d intents, degraded %q; want %d", got.IntentRevision, len(got.Intents), got.Degraded, revision)
		}
	}
	s = spoil(s, 100)
	expect(s, 99)
	s = spoil(s, 99)
	expect(s, 98)
	newest := wholes[len(wholes)-1]
	s = spoil(s, newest)
	expect(s, newest-1)
	commit(t, s, 101)
	if d := s.Snapshot().Degraded; d != "" {
		t.Errorf("still degraded after a commit: %s", d)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := open(t, dir).Snapshot(); got.IntentRevision != 101 || got.Degraded != "" {
		t.Errorf("loaded revision %d, degraded %q", got.IntentRevision, got.Degraded)
	}
}

// Of two processes on one etcd, the older one's writes fail.
func TestOwner(t *testing.T) {
	s := open(t, t.TempDir())
	commit(t, s, 1)
	if _, err := s.client.Put(t.Context(), s.key("owner"), "another"); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"intents": s.CommitIntents(t.Context(), 2, intents(2), time.Unix(2, 0)),
		"commit":  s.Commit(t.Context(), state.Change{Base: s.Snapshot().Generation, Settled: 1}),
		"blob":    s.SaveBlob(t.Context(), "k", []byte("v"), false),
		"ping":    s.Ping(t.Context()),
	} {
		if api.KindOf(err) != api.Conflict {
			t.Errorf("%s by a fenced process: %v", name, err)
		}
	}
	if got := s.Snapshot(); got.IntentRevision != 1 || got.Settled != 0 {
		t.Errorf("memory moved on without the disk: %+v", got)
	}
}

// A write whose outcome is unknown is finished before the next one.
func TestUnknownOutcome(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	commit(t, s, 1)
	kv := s.client.KV
	s.client.KV = failing{kv}
	if err := s.CommitIntents(t.Context(), 2, intents(2), time.Unix(2, 0)); api.KindOf(err) != api.Unavailable {
		t.Fatalf("got %v", err)
	}
	s.client.KV = kv
	if err := s.SaveBlob(t.Context(), "k", []byte("v"), false); err != nil {
		t.Fatal(err)
	}
	if got := s.Snapshot(); got.IntentRevision != 2 {
		t.Errorf("the write was not finished: revision %d", got.IntentRevision)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := open(t, dir).Snapshot(); got.IntentRevision != 2 || len(got.Intents) != 2 {
		t.Errorf("on disk is revision %d", got.IntentRevision)
	}
}

type failing struct{ clientv3.KV }

func (f failing) Txn(ctx context.Context) clientv3.Txn { return failingTxn{f.KV.Txn(ctx)} }

type failingTxn struct{ clientv3.Txn }

func (f failingTxn) If(...clientv3.Cmp) clientv3.Txn  { return f }
func (f failingTxn) Then(...clientv3.Op) clientv3.Txn { return f }
func (f failingTxn) Else(...clientv3.Op) clientv3.Txn { return f }
func (f failingTxn) Commit() (*clientv3.TxnResponse, error) {
	return nil, fmt.Errorf("the line is dead")
}

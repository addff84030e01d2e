// Package mem is the cluster's state in memory: for tests, and for a whole
// cluster in one process. It owns its records; it never touches a disk or a
// network, and forgets everything when it is dropped.
//
// Concurrency: safe for concurrent use. It works inside a testing/synctest
// bubble.
package mem

import (
	"bytes"
	"context"
	"maps"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// Store implements state.Store.
type Store struct {
	*state.Index
	// writer lets one writer check and apply at a time.
	writer sync.Mutex

	mu     sync.Mutex
	tokens map[string]*clusterv1.NodeToken
	blobs  map[string][]byte
}

var _ state.Store = (*Store)(nil)

// New makes an empty store.
func New() *Store {
	return &Store{Index: state.NewIndex(state.Loaded{}), tokens: map[string]*clusterv1.NodeToken{}, blobs: map[string][]byte{}}
}

// Reopen gives a store as it is after a restart of its process: what is durable
// stays, what was observed is gone. The old one is closed.
func (s *Store) Reopen() *Store {
	s.writer.Lock()
	defer s.writer.Unlock()
	_ = s.Close()
	old := s.Snapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	l := state.Loaded{
		Generation: old.Generation + 1, IntentRevision: old.IntentRevision, Settled: old.Settled,
		Intents: map[string]*linkv1.Intent{}, IntentTimes: map[string]time.Time{},
		Nodes: map[string]*clusterv1.Node{}, Allocations: map[string]*clusterv1.Allocation{},
		Volumes: map[string]*clusterv1.Volume{}, States: map[string]*clusterv1.WorkloadState{},
	}
	copyInto(l.Intents, old.Intents)
	copyInto(l.IntentTimes, old.IntentTimes)
	copyInto(l.Nodes, old.Nodes)
	copyInto(l.Allocations, old.Allocations)
	copyInto(l.Volumes, old.Volumes)
	copyInto(l.States, old.States)
	return &Store{Index: state.NewIndex(l), tokens: s.tokens, blobs: s.blobs}
}

func copyInto[V any](to, from map[string]V) {
	maps.Copy(to, from)
}

func (s *Store) ready(ctx context.Context, doing string) error {
	if err := ctx.Err(); err != nil {
		return state.ContextError(doing, err)
	}
	if s.IsClosed() {
		return state.Closed(doing)
	}
	return nil
}

// CommitIntents implements state.Store. The generations before the newest are of
// no use to memory.
func (s *Store) CommitIntents(ctx context.Context, revision int64, intents map[string]*linkv1.Intent, now time.Time) error {
	if err := s.ready(ctx, "commit intents"); err != nil {
		return err
	}
	s.writer.Lock()
	defer s.writer.Unlock()
	c, err := s.DiffIntents(revision, intents, now)
	if err != nil {
		return err
	}
	s.ApplyIntents(c)
	return nil
}

// Commit implements state.Store.
func (s *Store) Commit(ctx context.Context, c state.Change) error {
	if err := s.ready(ctx, "commit a change"); err != nil {
		return err
	}
	s.writer.Lock()
	defer s.writer.Unlock()
	if err := s.Check(c); err != nil {
		return err
	}
	s.Apply(c)
	return nil
}

// PutToken implements state.Store.
func (s *Store) PutToken(ctx context.Context, hash string, t *clusterv1.NodeToken) error {
	if err := s.ready(ctx, "put a token"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[hash] = proto.CloneOf(t)
	return nil
}

// Token implements state.Store.
func (s *Store) Token(ctx context.Context, hash string) (*clusterv1.NodeToken, error) {
	if err := s.ready(ctx, "read a token"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.tokens[hash]
	if !ok {
		return nil, api.E(api.NotFound, "read a token", "there is none of this hash")
	}
	return proto.CloneOf(t), nil
}

// LoadBlob implements state.Store.
func (s *Store) LoadBlob(ctx context.Context, key string) ([]byte, error) {
	doing := "load blob " + key
	if err := s.ready(ctx, doing); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[key]
	if !ok {
		return nil, api.E(api.NotFound, doing, "it is absent")
	}
	return bytes.Clone(b), nil
}

// SaveBlob implements state.Store.
func (s *Store) SaveBlob(ctx context.Context, key string, data []byte, create bool) error {
	doing := "save blob " + key
	if err := s.ready(ctx, doing); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.blobs[key]; ok && create {
		return api.E(api.Exists, doing, "it is there already")
	}
	s.blobs[key] = append([]byte{}, data...)
	return nil
}

// Ping fails once the store is closed.
func (s *Store) Ping(ctx context.Context) error { return s.ready(ctx, "ping the store") }

// Close ends waits and refuses everything after it.
func (s *Store) Close() error {
	s.Index.Close()
	return nil
}

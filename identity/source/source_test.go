package source

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

var node = identity.ID{Kind: identity.Node, TrustDomain: "eu-west.portolan.internal", Name: "n1"}

// memory is a ca.Storage.
type memory map[string][]byte

func (m memory) LoadBlob(_ context.Context, key string) ([]byte, error) {
	if b, ok := m[key]; ok {
		return b, nil
	}
	return nil, api.E(api.NotFound, "load", "absent")
}

func (m memory) SaveBlob(_ context.Context, key string, data []byte, _ bool) error {
	m[key] = data
	return nil
}

// server signs, unless it is down.
type server struct {
	a     *ca.Authority
	down  atomic.Bool
	calls atomic.Int32
	ttl   time.Duration
}

func newServer(t testing.TB) *server {
	t.Helper()
	a, err := ca.Open(t.Context(), ca.Config{TrustDomain: node.TrustDomain, Storage: memory{}, SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	return &server{a: a}
}

func (s *server) fetch(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
	s.calls.Add(1)
	if s.down.Load() {
		return nil, nil, api.E(api.Unavailable, "fetch", "the cluster is gone")
	}
	chain, err := s.a.SignCSR(ctx, csr, ca.Request{ID: node, TTL: s.ttl})
	return chain, s.a.Bundle(), err
}

func newSource(t testing.TB, cfg Config) *Source {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func issue(t testing.TB, srv *server) *Identity {
	t.Helper()
	key, csr, err := NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, bundle, err := srv.fetch(t.Context(), csr)
	if err != nil {
		t.Fatal(err)
	}
	id, err := NewIdentity(key, chain, bundle)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRenewsAtHalfLifeAndOutlivesItsServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t)
		s := newSource(t, Config{Fetch: srv.fetch, Rand: func() float64 { return 0.5 }})
		if _, err := s.Certificate(); api.KindOf(err) != api.Unavailable {
			t.Errorf("a certificate out of nothing: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		first, err := s.Wait(t.Context())
		if err != nil || first.ID != node {
			t.Fatalf("%v %v", first, err)
		}
		// 48 h and a minute, renewed at 45 %.
		<-time.After(21 * time.Hour)
		if cur, _ := s.Current(); cur != first {
			t.Error("renewed too early")
		}
		<-time.After(time.Hour)
		synctest.Wait()
		second, _ := s.Current()
		if second == first || srv.calls.Load() != 2 || bytes.Equal(second.Chain[0].RawSubjectPublicKeyInfo, first.Chain[0].RawSubjectPublicKeyInfo) {
			t.Errorf("not renewed with a new key after %d calls", srv.calls.Load())
		}
		// The server is gone for a day: the identity is still good.
		srv.down.Store(true)
		<-time.After(24*time.Hour + 20*time.Hour)
		if c, err := s.Certificate(); err != nil || c != second.TLS() {
			t.Errorf("24 h without a server: %v", err)
		}
		// Backoff: at most a minute between two tries, and not a storm.
		if n := srv.calls.Load(); n < 20 || n > 6000 {
			t.Errorf("%d calls while it was gone", n)
		}
		<-time.After(24 * time.Hour)
		if _, err := s.Certificate(); api.KindOf(err) != api.Unavailable {
			t.Errorf("expired and yet presented: %v", err)
		}
		srv.down.Store(false)
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if _, err := s.Certificate(); err != nil {
			t.Errorf("not back: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSurvivesARestart(t *testing.T) {
	srv, dir := newServer(t), filepath.Join(t.TempDir(), "agent")
	first, err := newSource(t, Config{Dir: dir, Fetch: srv.fetch}).Ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	srv.down.Store(true)
	again, err := newSource(t, Config{Dir: dir, Fetch: srv.fetch}).Ensure(t.Context())
	if err != nil || !again.Chain[0].Equal(first.Chain[0]) || !bytes.Equal(again.Bundle, first.Bundle) {
		t.Fatalf("%v", err)
	}
	if srv.calls.Load() != 1 {
		t.Errorf("%d calls", srv.calls.Load())
	}
	for _, f := range []string{keyFile, chainFile, bundleFile} {
		if info, err := os.Stat(filepath.Join(dir, f)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, info, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// What expired on disk is fetched anew.
	late := newSource(t, Config{Dir: dir, Fetch: srv.fetch, Now: func() time.Time { return time.Now().Add(100 * time.Hour) }})
	if _, err := late.Ensure(t.Context()); api.KindOf(err) != api.Unavailable {
		t.Errorf("%v", err)
	}
}

// A crash between any two steps of a rotation leaves a usable identity.
func TestInterruptedRotation(t *testing.T) {
	srv := newServer(t)
	oldID, newID := issue(t, srv), issue(t, srv)
	dirOld, dirNew := t.TempDir(), t.TempDir()
	for dir, id := range map[string]*Identity{dirOld: oldID, dirNew: newID} {
		if err := WriteDir(dir, id); err != nil {
			t.Fatal(err)
		}
	}
	read := func(dir, f string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	crash := func(files map[string][]byte) string {
		dir := t.TempDir()
		for f, b := range files {
			if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	oldKey, newKey := read(dirOld, keyFile), read(dirNew, keyFile)
	oldChain, newChain := read(dirOld, chainFile), read(dirNew, chainFile)
	for name, c := range map[string]struct {
		files map[string][]byte
		want  *Identity
	}{
		"before the chain": {map[string][]byte{keyFile: oldKey, chainFile: oldChain, nextFile: newKey}, oldID},
		"after the chain":  {map[string][]byte{keyFile: oldKey, chainFile: newChain, nextFile: newKey}, newID},
		"the very first":   {map[string][]byte{chainFile: newChain, nextFile: newKey}, newID},
	} {
		dir := crash(c.files)
		got, err := ReadDir(dir)
		if err != nil || !got.Chain[0].Equal(c.want.Chain[0]) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// The next rotation begins from there, and may crash in the same place.
		third := issue(t, srv)
		if err := settle(dir); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadDir(dir); err != nil || !got.Chain[0].Equal(c.want.Chain[0]) {
			t.Errorf("%s: settled: %v", name, err)
		}
		if err := WriteDir(dir, third); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadDir(dir); err != nil || !got.Chain[0].Equal(third.Chain[0]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, files := range map[string]map[string][]byte{
		"another key": {keyFile: oldKey, chainFile: newChain}, "a torn key": {keyFile: newKey[:40], chainFile: newChain}, "an empty chain": {keyFile: newKey, chainFile: nil},
	} {
		if _, err := ReadDir(crash(files)); api.KindOf(err) != api.Precondition {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ReadDir(t.TempDir()); api.KindOf(err) != api.NotFound {
		t.Errorf("%v", err)
	}
}

func TestReaderFollowsTheWriter(t *testing.T) {
	srv, dir := newServer(t), t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := newSource(t, Config{Dir: dir, Poll: time.Millisecond})
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	for range 3 {
		id := issue(t, srv)
		changed := r.Changed()
		if err := WriteDir(dir, id); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("the reader does not notice")
		}
		if cur, ok := r.Current(); !ok || !cur.Chain[0].Equal(id.Chain[0]) {
			t.Error("the reader has another identity")
		}
	}
	if err := r.Renew(ctx); api.KindOf(err) != api.Precondition {
		t.Errorf("a reader renews: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBadAnswersAreRefused(t *testing.T) {
	srv := newServer(t)
	other := issue(t, srv)
	for name, fetch := range map[string]FetchFunc{
		"another key's certificate": func(context.Context, []byte) ([][]byte, []byte, error) { return other.RawChain(), other.Bundle, nil },
		"no certificate":            func(context.Context, []byte) ([][]byte, []byte, error) { return nil, other.Bundle, nil },
		"rubbish":                   func(context.Context, []byte) ([][]byte, []byte, error) { return [][]byte{{1}}, nil, nil },
		"a bad bundle": func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
			chain, _, err := srv.fetch(ctx, csr)
			return chain, []byte("x"), err
		},
		"an error": func(context.Context, []byte) ([][]byte, []byte, error) { return nil, nil, errors.New("no") },
	} {
		s := newSource(t, Config{Fetch: fetch})
		if _, err := s.Ensure(t.Context()); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, ok := s.Current(); ok {
			t.Errorf("%s: kept", name)
		}
	}
}

func TestConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"nothing to do": {}, "renewal after expiry": {Dir: "x", RenewAt: 1.5}, "jitter too wide": {Dir: "x", RenewAt: 0.1, Jitter: 0.2},
	} {
		if _, err := New(cfg); api.KindOf(err) != api.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

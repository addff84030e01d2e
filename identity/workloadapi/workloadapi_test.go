package workloadapi

import (
	"context"
	"crypto/x509"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

const (
	eu = "eu-west.portolan.internal"
	us = "us-east.portolan.internal"
)

var web = identity.ID{Kind: identity.Workload, TrustDomain: eu, Tenant: "shop", Workload: "web"}

// source is a Source that the test changes.
type source struct {
	mu      sync.Mutex
	cur     *Update
	changed chan struct{}
}

func newSource() *source { return &source{changed: make(chan struct{})} }

func (s *source) set(u *Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cur = u
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *source) Current() (Update, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur == nil {
		return Update{}, false
	}
	return *s.cur, true
}

func (s *source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

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

func authority(t *testing.T, domain string) *ca.Authority {
	t.Helper()
	a, err := ca.Open(t.Context(), ca.Config{TrustDomain: domain, Storage: memory{}, SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func update(t *testing.T, own *ca.Authority, others ...*ca.Authority) *Update {
	t.Helper()
	p, err := own.Issue(t.Context(), ca.Request{ID: web})
	if err != nil {
		t.Fatal(err)
	}
	u := &Update{SVIDs: []SVID{{ID: web.String(), Chain: p.Chain, Key: p.Key, Hint: "mesh"}}, TrustDomain: own.TrustDomain(), Bundles: map[string][]*x509.Certificate{}}
	for _, a := range append(others, own) {
		u.Bundles[a.TrustDomain()] = []*x509.Certificate{a.Root()}
	}
	return u
}

// serve gives the address of a server of the source on a Unix socket.
func serve(t *testing.T, src Source) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "w.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Source: src})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "unix://" + path
}

// watcher hands updates of go-spiffe's client to the test.
type watcher struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }
func (w *watcher) OnX509ContextWatchError(err error) {
	select {
	case w.errs <- err:
	default:
	}
}

func (w *watcher) next(t *testing.T) *workloadapi.X509Context {
	t.Helper()
	select {
	case c := <-w.updates:
		return c
	case <-time.After(30 * time.Second):
		t.Fatal("no update reached the client")
		return nil
	}
}

func TestGoSpiffeClientFollowsRotation(t *testing.T) {
	own, other := authority(t, eu), authority(t, us)
	src := newSource()
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(serve(t, src)))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// Before there is an identity the answer is PermissionDenied; the client waits.
	if _, err := client.FetchX509SVID(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w := &watcher{updates: make(chan *workloadapi.X509Context, 16), errs: make(chan error, 16)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = client.WatchX509Context(ctx, w)
	}()
	<-w.errs
	src.set(update(t, own))
	first := w.next(t)
	svid := first.DefaultSVID()
	if svid.ID.String() != web.String() || svid.Hint != "mesh" {
		t.Errorf("%s %s", svid.ID, svid.Hint)
	}
	// Rotation and a new foreign domain arrive on the open stream.
	src.set(update(t, own, other))
	second := w.next(t)
	if second.DefaultSVID().Certificates[0].Equal(svid.Certificates[0]) {
		t.Error("the certificate did not change")
	}
	b, err := second.Bundles.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(us))
	if err != nil || !b.X509Authorities()[0].Equal(other.Root()) {
		t.Errorf("%v", err)
	}
	cancel()
	<-done
}

func TestGoSpiffeSourceAndBundles(t *testing.T) {
	own, other := authority(t, eu), authority(t, us)
	src := newSource()
	src.set(update(t, own, other))
	addr := serve(t, src)
	x, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	svid, err := x.GetX509SVID()
	if err != nil || svid.ID.String() != web.String() {
		t.Errorf("%v %v", svid, err)
	}
	set, err := workloadapi.FetchX509Bundles(t.Context(), workloadapi.WithAddr(addr))
	if err != nil || set.Len() != 2 {
		t.Errorf("%v %v", set, err)
	}
	if _, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "a"}, workloadapi.WithAddr(addr)); status.Code(err) != codes.Unimplemented {
		t.Errorf("JWT: %v", err)
	}
	if _, err := workloadapi.FetchJWTBundles(t.Context(), workloadapi.WithAddr(addr)); status.Code(err) != codes.Unimplemented {
		t.Errorf("JWT bundles: %v", err)
	}
}

func TestSecurityHeaderIsRequired(t *testing.T) {
	src := newSource()
	src.set(update(t, authority(t, eu)))
	conn, err := grpc.NewClient(serve(t, src), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := workload.NewSpiffeWorkloadAPIClient(conn)
	for name, md := range map[string]metadata.MD{
		"absent": {}, "false": metadata.Pairs(header, "false"), "twice": metadata.Pairs(header, "true", header, "true"),
	} {
		ctx := metadata.NewOutgoingContext(t.Context(), md)
		s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s, JWT: %v", name, err)
		}
	}
}

func TestIdentityTakenAwayEndsTheStream(t *testing.T) {
	src := newSource()
	src.set(update(t, authority(t, eu)))
	conn, err := grpc.NewClient(serve(t, src), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(metadata.AppendToOutgoingContext(t.Context(), header, "true"), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	src.set(nil)
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v", err)
	}
}

func TestNewNeedsASource(t *testing.T) {
	if _, err := New(Config{}); api.KindOf(err) != api.Invalid {
		t.Errorf("%v", err)
	}
}

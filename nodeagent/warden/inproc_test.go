package warden

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/network/networktest"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"
)

// pipes are sockets in memory, by path.
type pipes struct {
	mu sync.Mutex
	l  map[string]*bufconn.Listener
}

func (p *pipes) listen(path string, _, _ int, _ os.FileMode) (net.Listener, error) {
	l := bufconn.Listen(1 << 20)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.l[path] = l
	return l, nil
}

func (p *pipes) dial(ctx context.Context, path string) (net.Conn, error) {
	p.mu.Lock()
	l := p.l[path]
	p.mu.Unlock()
	if l == nil {
		return nil, net.ErrClosed
	}
	return l.DialContext(ctx)
}

// small is a node in memory: a warden and proxies that open no port.
type small struct {
	t       *testing.T
	cfg     Config
	ca      *testCA
	disk    *disk
	pipes   *pipes
	proxies *proxytest.Fake
	mesh    *proxytest.Mesh
	network *networktest.Fake
	warden  *Warden
	stop    func()
}

func newSmall(t *testing.T) *small {
	t.Helper()
	base := t.TempDir()
	s := &small{t: t, ca: newCA(t, domain), pipes: &pipes{l: map[string]*bufconn.Listener{}}, mesh: proxytest.NewMesh(), network: networktest.NewFake("")}
	s.proxies = proxytest.NewFake(proxytest.FakeConfig{Dial: func(ctx context.Context, spec proxy.Spec) (net.Conn, error) {
		return s.pipes.dial(ctx, spec.XDSSocket)
	}})
	s.cfg = Config{
		Node: "n1", DataDir: filepath.Join(base, "data"), RunDir: filepath.Join(base, "run"), Compile: compileLines, Active: s.proxies.Active,
		Connections: s.network, Log: slog.New(slog.DiscardHandler),
		Listen: s.pipes.listen, PeerUID: func(net.Conn) (uint32, error) { return 0, nil },
	}
	s.disk = newDisk(t, s.cfg.DataDir, s.ca)
	s.start()
	return s
}

func (s *small) start() {
	w, err := New(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	s.warden = w
	s.stop = func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("warden: %v", err)
		}
	}
}

func (s *small) end() {
	s.proxies.Close()
	s.stop()
}

// replica assigns one and starts its proxy.
func (s *small) replica(allocation, workload, revision, addr string) {
	s.t.Helper()
	s.ca.issue(s.t, filepath.Join(s.cfg.RunDir, "identity", allocation), "spiffe://"+domain+"/tenant/shop/workload/"+workload)
	s.disk.assign(allocation, workload, revision, addr)
	err := s.proxies.Start(s.t.Context(), proxy.Spec{ID: allocation, XDSSocket: filepath.Join(s.cfg.RunDir, "proxies", allocation, proxy.XDSSocketFile)})
	if err != nil {
		s.t.Fatal(err)
	}
	s.mesh.Place(s.proxies, allocation, netip.MustParseAddr(addr))
}

// commit saves a generation, wakes the warden and lets everything settle.
func (s *small) commit() int64 {
	s.t.Helper()
	rev := s.disk.save()
	if err := s.warden.Wake(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(3 * time.Second) // virtual
	synctest.Wait()
	return rev
}

func (s *small) call(pick float64) proxytest.Response {
	ctx, cancel := context.WithTimeout(s.t.Context(), 5*time.Second)
	defer cancel()
	return s.mesh.Call(ctx, netip.MustParseAddr("10.200.1.2"), proxytest.Request{To: netip.MustParseAddrPort("10.68.0.1:80"), Path: "/", Pick: pick})
}

func (s *small) proxy(allocation string) *nodev1.WardenProxy {
	for _, p := range s.warden.Status().GetProxies() {
		if p.GetStatus().GetAllocation() == allocation {
			return p
		}
	}
	return &nodev1.WardenProxy{Status: &nodev1.ProxyStatus{}}
}

// smallShop is web and two revisions of api.
func smallShop(t *testing.T) *small {
	t.Helper()
	s := newSmall(t)
	s.replica("web-1", "web", "r1", "10.200.1.2")
	s.replica("api-1", "api", "r1", "10.200.1.3")
	s.replica("api-2", "api", "r2", "10.200.1.4")
	s.disk.service(
		"api", "api", "10.68.0.1", &portolanv1.ServicePort{Name: "http", Port: 80, TargetPort: 8080},
		&nodev1.Endpoint{Allocation: "api-1", Address: "10.200.1.3", Revision: "r1", Node: "n1", Zone: "a"},
		&nodev1.Endpoint{Allocation: "api-2", Address: "10.200.1.4", Revision: "r2", Node: "n1", Zone: "a"},
	)
	s.disk.policy("web api")
	return s
}

func inBubble(t *testing.T, f func(t *testing.T, s *small)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := smallShop(t)
		defer s.end()
		f(t, s)
	})
}

func TestCallsInMemory(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		rev := s.commit()
		for _, id := range []string{"web-1", "api-1", "api-2"} {
			if p := s.proxy(id); !p.GetReady() || p.GetStatus().GetApplied().GetRevision() != rev {
				t.Errorf("%s is %v", id, p)
			}
		}
		if r := s.call(0); !r.OK() || r.Caller != "spiffe://"+domain+"/tenant/shop/workload/web" {
			t.Errorf("call: %+v", r)
		}
		s.disk.policy("nobody nowhere")
		s.commit()
		if r := s.call(0); r.Status != 403 {
			t.Errorf("denied call: %+v", r)
		}
		s.disk.policy("web api")
		s.disk.route("api", &portolanv1.RouteBackend{Revision: "r1", Weight: 90}, &portolanv1.RouteBackend{Revision: "r2", Weight: 10})
		s.commit()
		got := map[string]int{}
		for i := range 100 {
			got[s.call(float64(i)/100).Callee]++
		}
		if got["api-1"] != 90 || got["api-2"] != 10 {
			t.Errorf("shares are %v", got)
		}
		s.stop()
		if r := s.call(0); r.Status != 403 {
			t.Errorf("without a warden: %+v", r)
		}
		s.start()
		time.Sleep(3 * time.Second) // virtual
		if r := s.call(0); !r.OK() {
			t.Errorf("after the warden's restart: %+v", r)
		}
	})
}

func TestWarmingIsNotApplied(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		first := s.commit()
		if err := s.proxies.Warm("web-1", true); err != nil {
			t.Fatal(err)
		}
		s.disk.service("more", "api", "10.68.0.7", &portolanv1.ServicePort{Name: "http", Port: 80, TargetPort: 8080})
		second := s.commit()
		if p := s.proxy("web-1"); p.GetStatus().GetApplied().GetRevision() != first || !strings.Contains(p.GetDetail(), "not active yet") {
			t.Errorf("while warming: %v", p)
		}
		if err := s.proxies.Warm("web-1", false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second) // virtual
		if p := s.proxy("web-1"); p.GetStatus().GetApplied().GetRevision() != second {
			t.Errorf("when warm: %v", p)
		}
	})
}

func TestRefusalIsStatus(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		first := s.commit()
		if err := s.proxies.Refuse("web-1", func(_, name string) string {
			if strings.HasPrefix(name, "outbound/shop/api/") {
				return "it does not please"
			}
			return ""
		}); err != nil {
			t.Fatal(err)
		}
		s.disk.route("api", &portolanv1.RouteBackend{Revision: "r2", Weight: 100})
		second := s.commit()
		p := s.proxy("web-1")
		if n := p.GetStatus().GetNacks(); len(n) == 0 || !strings.Contains(n[0].GetMessage(), "does not please") || n[0].GetConsumer() != "web-1" {
			t.Errorf("the refusal is not told: %v", p)
		} else {
			told := map[string]bool{}
			for _, x := range n {
				told[x.GetResource()] = true
			}
			if !told["route/shop/api"] || !told["service/shop/api"] || len(told) != 2 {
				t.Errorf("the refusals are told of %v, not of what users wrote", told)
			}
		}
		if p.GetStatus().GetApplied().GetRevision() != first {
			t.Errorf("what was refused is said to be applied: %v", p)
		}
		if p := s.proxy("api-1"); p.GetStatus().GetApplied().GetRevision() != second {
			t.Errorf("another proxy suffers: %v", p)
		}
		if r := s.call(0); !r.OK() {
			t.Errorf("the last good configuration does not serve: %+v", r)
		}
	})
}

func TestFrozenAndKilledProxies(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		first := s.commit()
		if err := s.proxies.Freeze("web-1", true); err != nil {
			t.Fatal(err)
		}
		s.disk.route("api", &portolanv1.RouteBackend{Revision: "r2", Weight: 100})
		second := s.commit()
		if got := s.proxy("web-1").GetStatus().GetApplied().GetRevision(); got != first {
			t.Errorf("the frozen proxy has applied %d, want %d", got, first)
		}
		if err := s.proxies.Freeze("web-1", false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second) // virtual
		if got := s.proxy("web-1").GetStatus().GetApplied().GetRevision(); got != second {
			t.Errorf("the thawed proxy has applied %d, want %d", got, second)
		}
		if err := s.proxies.Kill("web-1"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second) // virtual
		if p := s.proxy("web-1"); !p.GetReady() {
			t.Errorf("after its restart: %v", p)
		}
		if r := s.call(0); !r.OK() || r.Callee != "api-2" {
			t.Errorf("call: %+v", r)
		}
	})
}

func TestNothingBeforeIdentity(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		dir := filepath.Join(s.cfg.RunDir, "identity", "api-1")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		s.commit()
		if p := s.proxy("api-1"); !p.GetServing() || p.GetReady() || !strings.Contains(p.GetDetail(), "no identity") {
			t.Errorf("without an identity: %v", p)
		}
		s.ca.issue(t, dir, "spiffe://"+domain+"/tenant/shop/workload/somebody")
		time.Sleep(2 * time.Second) // virtual
		if s.proxy("api-1").GetReady() {
			t.Error("another workload's identity was taken")
		}
		s.ca.issue(t, dir, "spiffe://"+domain+"/tenant/shop/workload/api")
		time.Sleep(4 * time.Second) // virtual
		if p := s.proxy("api-1"); !p.GetReady() {
			t.Errorf("with its identity: %v", p)
		}
	})
}

func TestAgentWatches(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		conn, err := grpc.NewClient("passthrough:///warden", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return s.pipes.dial(ctx, filepath.Join(s.cfg.RunDir, "warden.sock"))
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		client := nodev1.NewWardenServiceClient(conn)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := client.WatchStatus(ctx, &nodev1.WatchStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		first, err := stream.Recv()
		if err != nil || first.GetLoaded() != nil {
			t.Fatalf("first status %v, error %v", first, err)
		}
		rev := s.disk.save()
		res, err := client.Wake(ctx, &nodev1.WakeRequest{})
		if err != nil || res.GetLoaded().GetRevision() != rev {
			t.Fatalf("wake: %v, %v", res, err)
		}
		for {
			st, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if p := st.GetProxies(); len(p) == 3 && p[0].GetReady() && p[1].GetReady() && p[2].GetReady() {
				break
			}
		}
		s.call(0)
		list, err := client.ListDecisions(ctx, &nodev1.ListDecisionsRequest{Limit: 1})
		if err != nil || len(list.GetDecisions()) != 1 || !list.GetDecisions()[0].GetAllowed() {
			t.Fatalf("decisions %v, error %v", list, err)
		}
	})
}

func TestBrokenGenerationFallsBack(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		first := s.commit()
		path := filepath.Join(s.cfg.DataDir, "lastgood", fmt.Sprintf("%020d.gen", 1))
		if err := os.WriteFile(path, []byte("rubbish"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.warden.Wake(t.Context()); err != nil {
			t.Fatal(err)
		}
		st := s.warden.Status()
		if st.GetDegraded() == "" || st.GetLoaded().GetRevision() != first {
			t.Errorf("status is %v", st)
		}
		if r := s.call(0); !r.OK() {
			t.Errorf("call: %+v", r)
		}
	})
}

// TestPingsAreWelcome: proxies ping their connection often, for hours.
func TestPingsAreWelcome(t *testing.T) {
	inBubble(t, func(t *testing.T, s *small) {
		s.commit()
		conn, err := grpc.NewClient(
			"passthrough:///warden", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 2 * time.Second, PermitWithoutStream: true}),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return s.pipes.dial(ctx, filepath.Join(s.cfg.RunDir, "proxies", "api-2", proxy.XDSSocketFile))
			}),
		)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the stream ended with %v", err)
		}
	})
}

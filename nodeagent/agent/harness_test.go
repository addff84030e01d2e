package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/network/networktest"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/xds/distribute"
)

// journal is the order in which the world was changed.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) take() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := j.lines
	j.lines = nil
	return out
}

// world is a node with everything around it but the agent.
type world struct {
	t       testing.TB
	dir     string
	journal journal
	engine  *enginetest.Fake
	network *networktest.Fake
	proxies *proxies
	warden  *warden
	cluster *cluster
	tune    func(*Config)
	kills   []func()
}

// inWorld runs a test in virtual time.
func inWorld(t *testing.T, test func(w *world)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, dir)
		defer func() {
			for _, kill := range w.kills {
				kill()
			}
			w.cluster.down()
			w.engine.Close()
			synctest.Wait()
		}()
		test(w)
	})
}

func newWorld(t testing.TB, dir string) *world {
	w := &world{t: t, dir: dir, engine: enginetest.NewFake(), network: networktest.NewFake(filepath.Join(dir, "net"))}
	w.warden = &warden{changed: make(chan struct{}), proxies: map[string]*nodev1.WardenProxy{}}
	w.proxies = &proxies{journal: &w.journal, warden: w.warden, running: map[string]bool{}}
	w.cluster = newCluster(t)
	return w
}

// recorded is the engine with its changes written down.
type recorded struct {
	engine.Engine
	j *journal
}

func (r recorded) Start(ctx context.Context, id string) (int, error) {
	r.j.add("start %s", id)
	return r.Engine.Start(ctx, id)
}

func (r recorded) Signal(ctx context.Context, id string, sig int, all bool) error {
	r.j.add("signal %d %s", sig, id)
	return r.Engine.Signal(ctx, id, sig, all)
}

func (r recorded) Delete(ctx context.Context, id string) error {
	r.j.add("delete %s", id)
	return r.Engine.Delete(ctx, id)
}

type recordedNet struct {
	network.Networker
	j *journal
}

func (r recordedNet) Remove(ctx context.Context, id string) error {
	r.j.add("network remove %s", id)
	return r.Networker.Remove(ctx, id)
}

// agent starts an agent; the returned function is its kill -9.
func (w *world) agent() (a *Agent, kill func()) {
	w.t.Helper()
	cfg := Config{
		Node: "n1", DataDir: filepath.Join(w.dir, "data"), RunDir: filepath.Join(w.dir, "run"),
		Facts: &nodev1.NodeFacts{Address: "10.0.0.1", CpuMilli: 4000}, Token: func() (string, error) { return "token", nil },
		Engine: recorded{w.engine, &w.journal}, Network: recordedNet{w.network, &w.journal}, Proxies: w.proxies, Warden: w.warden,
		Upstream: w.cluster, Dial: w.engine.Dial, Rand: func() float64 { return 0.5 }, Log: slog.New(slog.DiscardHandler),
	}
	if os.Getenv("AGENT_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if w.tune != nil {
		w.tune(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	kill = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Errorf("agent: %v", err)
			}
		})
	}
	w.kills = append(w.kills, kill)
	return a, kill
}

// proxies is a proxy.Proxies whose proxies are ready once they were started.
type proxies struct {
	journal *journal
	warden  *warden
	mu      sync.Mutex
	running map[string]bool
}

func (p *proxies) Start(_ context.Context, s proxy.Spec) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running[s.ID] {
		p.journal.add("proxy start %s %s", s.ID, s.Role)
	}
	p.running[s.ID] = true
	p.warden.started(s.ID)
	return nil
}

func (p *proxies) Status(_ context.Context, id string) (proxy.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return proxy.Status{Running: p.running[id], Live: p.running[id]}, nil
}

func (p *proxies) Active(context.Context, string) (map[string]map[string]string, error) {
	return nil, nil
}

func (p *proxies) Drain(_ context.Context, id string) error {
	p.journal.add("proxy drain %s", id)
	return nil
}

func (p *proxies) Stop(_ context.Context, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running[id] {
		p.journal.add("proxy stop %s", id)
	}
	delete(p.running, id)
	return nil
}

func (p *proxies) List(context.Context) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for id := range p.running {
		out = append(out, id)
	}
	slices.Sort(out)
	return out, nil
}

// warden serves every assignment, and its proxy is ready when it was started.
type warden struct {
	mu      sync.Mutex
	changed chan struct{}
	proxies map[string]*nodev1.WardenProxy
	wakes   int
	applied *nodev1.Watermark
}

func (w *warden) update(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *warden) serve(ids ...string) {
	w.update(func() {
		for _, id := range ids {
			if w.proxies[id] == nil {
				w.proxies[id] = &nodev1.WardenProxy{Status: &nodev1.ProxyStatus{Allocation: id}, Serving: true}
			}
		}
	})
}

func (w *warden) started(id string) {
	w.update(func() {
		w.proxies[id] = &nodev1.WardenProxy{
			Status: &nodev1.ProxyStatus{Allocation: id, Applied: w.applied}, Serving: true, Connected: true, Ready: true,
		}
	})
}

func (w *warden) Wake(context.Context) error {
	w.update(func() { w.wakes++ })
	return nil
}

func (w *warden) Watch(ctx context.Context, fn func(*nodev1.WardenStatus)) error {
	for {
		w.mu.Lock()
		s := &nodev1.WardenStatus{}
		for _, p := range w.proxies {
			s.Proxies = append(s.Proxies, proto.CloneOf(p))
		}
		changed := w.changed
		w.mu.Unlock()
		fn(s)
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cluster is what the agent dials: discovery, and the node service.
type cluster struct {
	t     testing.TB
	cache *distribute.Cache
	key   *ecdsa.PrivateKey
	root  *x509.Certificate

	mu       sync.Mutex
	server   *grpc.Server
	listener *bufconn.Listener
	stop     context.CancelFunc
	serial   int64
	signed   []string
	joins    int
	reports  []*nodev1.NodeReport
	state    map[string]*nodev1.AllocationStatus
	removed  []string
	events   []string
	resync   bool
	runtime  portolanv1.RuntimeServiceClient
	revision int64
	set      map[string]*nodev1.Assignment
	peers    []*nodev1.NodePeer
	life     time.Duration
}

func newCluster(t testing.TB) *cluster {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{
		t: t, key: key, root: root, serial: 1, set: map[string]*nodev1.Assignment{}, state: map[string]*nodev1.AllocationStatus{},
		life: 48 * time.Hour, cache: distribute.NewCache(distribute.CacheConfig{Log: slog.New(slog.DiscardHandler)}),
	}
	c.up()
	return c
}

func (c *cluster) up() {
	ctx, stop := context.WithCancel(c.t.Context())
	srv := grpc.NewServer()
	distribute.NewServer(ctx, distribute.ServerConfig{
		Cache: c.cache, Log: slog.New(slog.DiscardHandler),
		Identify: func(_ context.Context, n *corev3.Node) (string, error) { return n.GetId(), nil },
	}).Register(srv)
	nodev1.RegisterNodeServiceServer(srv, service{c: c})
	l := bufconn.Listen(1 << 20)
	go func() { _ = srv.Serve(l) }()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server, c.listener, c.stop = srv, l, stop
}

// down cuts the cluster off.
func (c *cluster) down() {
	c.mu.Lock()
	srv, stop := c.server, c.stop
	c.server, c.listener, c.runtime = nil, nil, nil
	c.mu.Unlock()
	if srv != nil {
		stop()
		srv.Stop()
	}
}

func (c *cluster) Join(context.Context, string) (distribute.Conn, error) { return c.dial() }
func (c *cluster) Dial(context.Context, Credentials) (distribute.Conn, error) {
	return c.dial()
}

func (c *cluster) dial() (distribute.Conn, error) {
	return grpc.NewClient("passthrough:///cluster", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c.mu.Lock()
			l := c.listener
			c.mu.Unlock()
			if l == nil {
				return nil, errors.New("the cluster is cut off")
			}
			return l.DialContext(ctx)
		}))
}

func (c *cluster) issue(csrDER []byte, path string) ([][]byte, error) {
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serial++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(c.serial), NotBefore: time.Now(), NotAfter: time.Now().Add(c.life), KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "eu.portolan.internal", Path: path}},
	}, c.root, csr.PublicKey, c.key)
	return [][]byte{der}, err
}

func (c *cluster) bundle() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.root.Raw})
}

// service is the cluster's NodeService; its methods' names clash with those of
// Upstream.
type service struct {
	nodev1.UnimplementedNodeServiceServer
	c *cluster
}

func (s service) Join(_ context.Context, r *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	chain, err := s.c.issue(r.GetCsr(), "/node/"+r.GetNode())
	s.c.mu.Lock()
	s.c.joins++
	s.c.mu.Unlock()
	return &nodev1.JoinResponse{Chain: chain, Bundle: s.c.bundle(), TrustDomain: "eu.portolan.internal"}, err
}

func (s service) Renew(_ context.Context, r *nodev1.RenewRequest) (*nodev1.RenewResponse, error) {
	chain, err := s.c.issue(r.GetCsr(), "/node/n1")
	return &nodev1.RenewResponse{Chain: chain, Bundle: s.c.bundle()}, err
}

func (s service) SignWorkload(_ context.Context, r *nodev1.SignWorkloadRequest) (*nodev1.SignWorkloadResponse, error) {
	chain, err := s.c.issue(r.GetCsr(), "/tenant/t/workload/"+r.GetAllocation())
	s.c.mu.Lock()
	s.c.signed = append(s.c.signed, r.GetAllocation())
	s.c.mu.Unlock()
	return &nodev1.SignWorkloadResponse{Chain: chain, Bundle: s.c.bundle()}, err
}

func (s service) Report(stream grpc.BidiStreamingServer[nodev1.NodeReport, linkv1.ReportAck]) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := stream.Send(&linkv1.ReportAck{Sequence: r.GetSequence(), Resync: s.c.take(r)}); err != nil {
			return err
		}
	}
}

func (c *cluster) take(r *nodev1.NodeReport) (resync bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, r)
	if r.GetFull() {
		c.state = map[string]*nodev1.AllocationStatus{}
	}
	for _, a := range r.GetAllocations() {
		c.state[a.GetAllocation()] = a
	}
	for _, id := range r.GetRemoved() {
		delete(c.state, id)
		c.removed = append(c.removed, id)
	}
	for _, e := range r.GetEvents() {
		c.events = append(c.events, e.GetType())
	}
	resync = c.resync
	c.resync = false
	return resync
}

func (s service) Tunnel(stream grpc.BidiStreamingServer[linkv1.Chunk, linkv1.Chunk]) error {
	cc, gone, err := tunnel.Client(stream)
	if err != nil {
		return err
	}
	defer cc.Close()
	s.c.mu.Lock()
	s.c.runtime = portolanv1.NewRuntimeServiceClient(cc)
	s.c.mu.Unlock()
	select {
	case <-gone:
	case <-stream.Context().Done():
	}
	return nil
}

// assign changes what the node is told, at the next watermark.
func (w *world) assign(as ...*nodev1.Assignment) {
	w.t.Helper()
	for _, a := range as {
		w.cluster.set[a.GetAllocation()] = a
		w.warden.serve(a.GetAllocation())
	}
	w.publish()
}

func (w *world) unassign(id string) {
	delete(w.cluster.set, id)
	w.publish()
}

func (w *world) publish() {
	w.t.Helper()
	c := w.cluster
	c.revision++
	mark := &nodev1.Watermark{Revision: c.revision, Generation: c.revision}
	w.warden.update(func() {
		w.warden.applied = mark
		for _, p := range w.warden.proxies {
			if p.GetStatus().GetApplied() != nil {
				p.Status = &nodev1.ProxyStatus{Allocation: p.GetStatus().GetAllocation(), Applied: mark}
			}
		}
	})
	rs := []*distribute.Resource{w.resource("config", &nodev1.Directive{Body: &nodev1.Directive_Config{Config: &nodev1.NodeConfig{
		Cluster: "eu", Region: "europe", Zone: "a", TrustDomain: "eu.portolan.internal", ReplicaCidr: "10.1.1.0/24",
	}}})}
	for id, a := range c.set {
		rs = append(rs, w.resource("assignment/"+id, &nodev1.Directive{Body: &nodev1.Directive_Assignment{Assignment: a}}))
	}
	for _, p := range c.peers {
		rs = append(rs, w.resource("peer/"+p.GetNode(), &nodev1.Directive{Body: &nodev1.Directive_Peer{Peer: p}}))
	}
	rs = append(rs, w.resource(api.WatermarkName, &nodev1.Directive{Body: &nodev1.Directive_Watermark{Watermark: mark}}))
	c.cache.Set("n1", api.DirectiveTypeURL, rs)
}

func (w *world) resource(name string, d *nodev1.Directive) *distribute.Resource {
	w.t.Helper()
	r, err := distribute.NewResource(api.DirectiveTypeURL, name, d)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

const digest = "@sha256:0123456789012345678901234567890123456789012345678901234567890123"

// assignment runs one container with the verb.
func assignment(id string, args ...string) *nodev1.Assignment {
	return &nodev1.Assignment{
		Allocation: id, Tenant: "t", Workload: "w", Revision: "r1", Epoch: 1, Address: "10.1.1.2",
		Spec: &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{
			Image: "registry.test/app:1", ResolvedImage: "registry.test/app" + digest, Args: args,
			Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "32Mi"},
		}}},
	}
}

func (w *world) status(id string) *nodev1.AllocationStatus {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	return w.cluster.state[id]
}

func (w *world) seen(event string) int {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	n := 0
	for _, e := range w.cluster.events {
		if e == event {
			n++
		}
	}
	return n
}

// until lets virtual time pass until the condition holds, and says how long.
func (w *world) until(what string, within time.Duration, ok func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for {
		synctest.Wait()
		if ok() {
			return time.Since(began)
		}
		if time.Since(began) > within {
			w.t.Fatalf("not within %s: %s\nstate: %v\njournal: %s", within, what, w.cluster.state, strings.Join(w.journal.lines, "; "))
		}
		<-time.After(10 * time.Millisecond) // virtual
	}
}

func (w *world) ready(id string) {
	w.t.Helper()
	w.until(id+" is ready", 30*time.Second, func() bool { return w.status(id).GetReady() })
}

func (w *world) gone(id string) bool {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	return slices.Contains(w.cluster.removed, id)
}

func (w *world) did(line string) bool {
	w.journal.mu.Lock()
	defer w.journal.mu.Unlock()
	return slices.Contains(w.journal.lines, line)
}

func (c *cluster) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.reports)
}

func (c *cluster) last() *nodev1.NodeReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reports[len(c.reports)-1]
}

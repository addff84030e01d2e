package inproc

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/nodeagent/agent"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
	"github.com/portolan-io/portolan/nodeagent/network/networktest"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"
	"github.com/portolan-io/portolan/nodeagent/warden"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
	"github.com/portolan-io/portolan/xds/distribute"
)

// node is a machine: its disk, and what runs on it and outlives agent and warden.
type node struct {
	name    string
	cluster *cluster
	address netip.Addr
	token   string
	data    string
	run     string
	engine  *enginetest.Fake
	network *networktest.Fake
	proxies *proxytest.Fake
}

func (n *node) agent() string  { return n.name + "/agent" }
func (n *node) warden() string { return n.name + "/warden" }

// ingress is the address at which the node's ingress is found. In the real world
// it is the node's, where it differs from the east-west gateway by its port.
func (n *node) ingress() netip.Addr {
	b := n.address.As4()
	b[0] = 203
	return netip.AddrFrom4(b)
}

func (f *Fleet) newNode(c *cluster, name string, address netip.Addr) *node {
	dir := filepath.Join(f.dir, name)
	n := &node{
		name: name, cluster: c, address: address, data: filepath.Join(dir, "data"), run: filepath.Join(dir, "run"),
		engine: enginetest.NewFake(), network: networktest.NewFake(filepath.Join(dir, "net")),
	}
	n.engine.Script(registry+"/shop/", f.application)
	n.proxies = proxytest.NewFake(proxytest.FakeConfig{Dial: func(ctx context.Context, s proxy.Spec) (net.Conn, error) {
		return f.wires.Dial(ctx, "proxy/"+s.ID, s.XDSSocket)
	}})
	return n
}

// application is what the shop's images do: answer probes on port 8080 until
// SIGTERM, use as much CPU as Load says, and note each start in a volume at /data.
func (f *Fleet) application(p *enginetest.Proc) int {
	for _, m := range p.Spec.Mounts {
		if m.Target == "/data" {
			note(p, filepath.Join(m.Source, "starts"))
		}
	}
	defer f.follow(p)()
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	l := p.Listen(8080)
	go func() { defer close(done); _ = srv.Serve(l) }()
	defer func() { _ = srv.Close(); <-done }()
	for {
		select {
		case s := <-p.Signals:
			if s == syscall.SIGTERM {
				return 0
			}
		case <-p.Killed:
			return 137
		}
	}
}

// note appends the replica's own name to a file.
func note(p *enginetest.Proc, path string) {
	w, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	_, _ = fmt.Fprintln(w, p.Spec.Hostname)
	_ = w.Close()
}

// follow makes a container use the CPU that Load says for its image, until the
// result is called.
func (f *Fleet) follow(p *enginetest.Proc) (stop func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.procs[p] = true
	p.SetCPU(f.loadOf(p))
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.procs, p)
	}
}

// loadOf is called under mu.
func (f *Fleet) loadOf(p *enginetest.Proc) int64 {
	for workload, milli := range f.load {
		if strings.HasPrefix(p.Spec.ID, workload+"-") {
			return milli
		}
	}
	return 0
}

// Load makes every replica of a workload use so many thousandths of a core, those
// that are to come too.
func (f *Fleet) Load(workload string, milli int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load[workload] = milli
	for p := range f.procs {
		p.SetCPU(f.loadOf(p))
	}
}

// placed puts proxies into the mesh at the addresses that the network gave.
type placed struct {
	*proxytest.Fake
	f *Fleet
	n *node
}

// Start implements proxy.Proxies.
func (p placed) Start(ctx context.Context, s proxy.Spec) error {
	if err := p.Fake.Start(ctx, s); err != nil {
		return err
	}
	switch r, ok := p.n.network.Replica(s.ID); {
	case s.Role == proxy.RoleEastWest:
		p.f.mesh.Place(p.Fake, s.ID, p.n.address)
	case s.Role == proxy.RoleIngress:
		p.f.mesh.Place(p.Fake, s.ID, p.n.ingress())
	case ok:
		p.f.mesh.Place(p.Fake, s.ID, r.Address)
	}
	return nil
}

// agentProcess wires an agent as portolan-node's agent does.
func (f *Fleet) agentProcess(n *node) (*process, error) {
	socket := filepath.Join(n.run, "warden.sock")
	w, err := agent.NewWardenClient(socket, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return f.wires.Dial(ctx, n.agent(), socket)
	}))
	if err != nil {
		return nil, err
	}
	a, err := agent.New(agent.Config{
		Node: n.name, DataDir: n.data, RunDir: n.run,
		Facts:  &nodev1.NodeFacts{Address: n.address.String(), CpuMilli: 8000, MemoryBytes: 8 << 30, StorageBytes: 64 << 30},
		Token:  func() (string, error) { return n.token, nil },
		Engine: n.engine, Network: n.network, Proxies: placed{n.proxies, f, n}, Warden: w,
		Upstream: upstream{f, n}, Dial: n.engine.Dial, Log: f.log.With("process", n.agent()),
	})
	if err != nil {
		return nil, err
	}
	return &process{runs: []func(context.Context) error{a.Run}, die: func() { _ = w.Close() }}, nil
}

// wardenProcess wires a warden as portolan-node's warden does.
func (f *Fleet) wardenProcess(n *node) (*process, error) {
	w, err := warden.New(warden.Config{
		Node: n.name, DataDir: n.data, RunDir: n.run, Active: n.proxies.Active, Connections: n.network, Log: f.log.With("process", n.warden()),
		Compile: func(_ context.Context, bundles []policy.Bundle) (policy.Authorizer, error) {
			return opa.Compile(bundles, opa.Limits{})
		},
		Listen: func(path string, _, _ int, _ os.FileMode) (net.Listener, error) {
			return f.wires.Listen(n.warden(), path), nil
		},
		PeerUID: func(net.Conn) (uint32, error) { return 0, nil },
	})
	if err != nil {
		return nil, err
	}
	return &process{runs: []func(context.Context) error{w.Run}}, nil
}

// upstream is a node's way to its cluster.
type upstream struct {
	f *Fleet
	n *node
}

func (u upstream) serverName() string {
	return "cluster." + identity.ClusterDomain(fleetDomain, u.n.cluster.name)
}

// Join implements agent.Upstream.
func (u upstream) Join(_ context.Context, token string) (distribute.Conn, error) {
	_, root, err := attest.ParseToken(token)
	if err != nil {
		return nil, err
	}
	return u.conn(trust.JoinTLS(root, u.serverName(), trust.Options{}))
}

// Dial implements agent.Upstream.
func (u upstream) Dial(_ context.Context, c agent.Credentials) (distribute.Conn, error) {
	set := trust.NewSet()
	if err := set.Put(c.TrustDomain, c.Bundle); err != nil {
		return nil, err
	}
	want := identity.ID{Kind: identity.Control, TrustDomain: c.TrustDomain}
	return u.conn(trust.ClientTLS(trust.Static(&c.Certificate), set, u.serverName(), want, trust.Options{}))
}

func (u upstream) conn(cfg *tls.Config) (distribute.Conn, error) {
	return grpc.NewClient("passthrough:///"+u.serverName(),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return u.f.wires.Dial(ctx, u.n.agent(), u.n.cluster.name, u.n.name)
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)),
	)
}

// blocked says whether a packet from one address of the mesh to another is lost.
func (f *Fleet) blocked(from, to netip.Addr) bool {
	a, b := f.nodeOf(from), f.nodeOf(to)
	switch {
	case a == nil || b == nil || a == b:
		return false
	case a.cluster == b.cluster:
		return !f.wires.passable(a.name, b.name)
	}
	return !f.wires.passable(a.name, b.name, a.cluster.name, b.cluster.name)
}

// nodeOf finds the machine that an address belongs to.
func (f *Fleet) nodeOf(a netip.Addr) *node {
	for _, n := range f.nodes() {
		if n.address == a || n.ingress() == a {
			return n
		}
		list, err := n.network.List(f.ctx)
		if err != nil {
			continue
		}
		for _, id := range list {
			if r, ok := n.network.Replica(id); ok && r.Address == a {
				return n
			}
		}
	}
	return nil
}

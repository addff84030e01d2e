// Package inproc is a whole fleet in one process and in virtual time: two
// federation replicas, two clusters of two nodes each, wired as the mains wire
// them, on the memory forms of both stores, with mTLS over a network in memory, a
// fake engine, a fake network and fake proxies that take their configuration for
// real and evaluate it. Tests say what happens to it and look at what follows.
//
// Concurrency: everything happens inside one testing/synctest bubble; a Fleet's
// methods are called by the test's own goroutine.
package inproc

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"

	clustermem "github.com/portolan-io/portolan/cluster/state/mem"
)

// process is what runs under a name; it can be killed and started again.
type process struct {
	runs []func(context.Context) error
	die  func()

	cancel context.CancelFunc
	done   chan struct{}
	killed atomic.Bool
}

// Fleet is the fleet under test.
type Fleet struct {
	t    testing.TB
	log  *slog.Logger
	dir  string
	ctx  context.Context //nolint:containedctx // the bubble's, for what outlives calls
	stop context.CancelFunc

	wires      *wires
	mesh       *proxytest.Mesh
	store      *mem.Store
	authority  *ca.Authority
	federation []string
	clusters   []*cluster
	makers     map[string]func() (*process, error)
	running    map[string]*process
	conn       *grpc.ClientConn

	mu    sync.Mutex // guards what follows, which callers and containers in the background read
	vips  map[string]netip.Addr
	procs map[*enginetest.Proc]bool
	load  map[string]int64 // thousandths of a core that replicas use, by workload
}

// Run makes a fleet in a bubble of virtual time, waits until it serves, and runs
// the test on it.
func Run(t *testing.T, test func(t *testing.T, f *Fleet)) {
	t.Helper()
	t.Parallel()
	dir := memoryDir(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, dir)
		defer f.close()
		f.up()
		test(t, f)
	})
}

// memoryDir is a folder that is really in memory, where there is one: what the
// planes make durable is not what these tests wait for.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "inproc")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

func newFleet(t *testing.T, dir string) *Fleet {
	f := &Fleet{
		t: t, dir: dir, log: slog.New(slog.DiscardHandler), wires: newWires(), mesh: proxytest.NewMesh(), store: mem.New(mem.Config{}),
		federation: []string{"fed-1", "fed-2"}, makers: map[string]func() (*process, error){}, running: map[string]*process{},
		vips: map[string]netip.Addr{}, procs: map[*enginetest.Proc]bool{}, load: map[string]int64{},
	}
	f.ctx, f.stop = context.WithCancel(context.Background())
	if os.Getenv("INPROC_LOG") != "" {
		f.log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	f.mesh.Block(f.blocked)
	for i, c := range []*cluster{{name: "eu-west", region: "eu-west"}, {name: "us-east", region: "us-east"}} {
		c.cidr, c.state = fmt.Sprintf("10.%d.0.0/16", 100+i), clustermem.New()
		f.clusters = append(f.clusters, c)
		f.makers[c.name] = func() (*process, error) { return f.clusterProcess(c) }
		for j := range 2 {
			n := f.newNode(c, fmt.Sprintf("%s-%d", c.name, j+1), netip.AddrFrom4([4]byte{172, 16, byte(i), byte(10 + j)}))
			c.nodes = append(c.nodes, n)
			f.makers[n.agent()] = func() (*process, error) { return f.agentProcess(n) }
			f.makers[n.warden()] = func() (*process, error) { return f.wardenProcess(n) }
		}
	}
	for _, name := range f.federation {
		f.makers[name] = func() (*process, error) { return f.federationReplica(name) }
	}
	return f
}

// up brings the fleet up as an operator does: bootstrap, clusters by token, nodes
// by token, gateways.
func (f *Fleet) up() {
	f.t.Helper()
	var err error
	f.authority, err = ca.Open(f.ctx, ca.Config{TrustDomain: fleetDomain, Storage: ca.DirStorage(f.dir), SealKey: make([]byte, 32)})
	f.must("open the fleet's authority", err)
	srv, err := newServer(f.store, f.authority, nil, nil, f.log)
	f.must("make a server", err)
	f.must("bootstrap", srv.Bootstrap(f.ctx, adminName))
	for _, name := range f.federation {
		f.Start(name)
	}
	f.connect()
	for _, c := range f.clusters {
		f.Apply(fmt.Sprintf("{kind: Cluster, name: %s, spec: {region: %s}}", c.name, c.region))
		token, err := portolanv1.NewClusterServiceClient(f.conn).CreateClusterJoinToken(f.call(), &portolanv1.CreateClusterJoinTokenRequest{Name: "clusters/" + c.name})
		f.must("mint a cluster's token", err)
		c.token = token.GetToken()
		f.Start(c.name)
	}
	for _, n := range f.nodes() {
		f.Within(10*time.Second, "a node's token", func() string {
			token, err := portolanv1.NewClusterServiceClient(f.conn).CreateNodeJoinToken(f.call(), &portolanv1.CreateNodeJoinTokenRequest{
				Cluster: "clusters/" + n.cluster.name, Node: n.name,
			})
			n.token = token.GetToken()
			return sentence(err)
		})
		f.Start(n.warden())
		f.Start(n.agent())
	}
	f.Apply(gateways)
	f.Within(20*time.Second, "gateways", func() string {
		for _, n := range f.nodes() {
			for _, a := range []netip.Addr{n.address, n.ingress()} {
				if r := f.mesh.Call(f.ctx, a, proxytest.Request{}); strings.Contains(r.Detail, "no proxy") {
					return fmt.Sprintf("no gateway at %s", a)
				}
			}
		}
		return ""
	})
	f.WaitConverged()
}

const gateways = `
{kind: Workload, tenant: system, name: ingress, spec: {kind: daemon, gateway: ingress}}
---
{kind: Workload, tenant: system, name: eastwest, spec: {kind: daemon, gateway: east_west}}
`

func (f *Fleet) close() {
	if f.conn != nil {
		_ = f.conn.Close()
	}
	for _, name := range slices.Sorted(maps.Keys(f.running)) {
		f.Kill(name)
	}
	for _, n := range f.nodes() {
		n.proxies.Close()
		n.engine.Close()
	}
	f.stop()
	synctest.Wait()
}

func (f *Fleet) must(what string, err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatalf("%s: %v", what, err)
	}
}

func (f *Fleet) nodes() []*node {
	var out []*node
	for _, c := range f.clusters {
		out = append(out, c.nodes...)
	}
	return out
}

// Start starts a process: "fed-1", "eu-west", "eu-west-1/agent", "eu-west-1/warden".
func (f *Fleet) Start(names ...string) {
	f.t.Helper()
	for _, name := range names {
		if f.running[name] != nil {
			f.t.Fatalf("%s runs already", name)
		}
		wire := f.makers[name]
		if wire == nil {
			f.t.Fatalf("there is no process %q", name)
		}
		p, err := wire()
		f.must("start "+name, err)
		ctx, cancel := context.WithCancel(f.ctx)
		p.cancel, p.done = cancel, make(chan struct{})
		f.launch(ctx, name, p)
		f.running[name] = p
	}
}

// launch runs the parts of a process. One that ends by itself is a fault.
func (f *Fleet) launch(ctx context.Context, name string, p *process) {
	var parts sync.WaitGroup
	for _, run := range p.runs {
		parts.Go(func() {
			if err := run(ctx); !p.killed.Load() {
				f.t.Errorf("a part of %s ended: %v", name, err)
			}
		})
	}
	go func() { parts.Wait(); close(p.done) }()
}

// Kill ends a process as kill -9 does: its connections go, and nothing that it
// still does reaches a store. Containers and proxies live on.
func (f *Fleet) Kill(names ...string) {
	f.t.Helper()
	for _, name := range names {
		p := f.running[name]
		if p == nil {
			f.t.Fatalf("%s does not run", name)
		}
		delete(f.running, name)
		p.killed.Store(true)
		if p.die != nil {
			p.die()
		}
		p.cancel()
		f.wires.Kill(name)
		<-p.done
	}
}

// Restart kills processes and starts them again at once.
func (f *Fleet) Restart(names ...string) {
	f.t.Helper()
	f.Kill(names...)
	f.Start(names...)
}

// Cut cuts a cluster's way to the world ("us-east"), or a node's or federation
// replica's link ("us-east-1", "fed-1"). Nobody is told: connections just hang.
func (f *Fleet) Cut(link string) { f.wires.Cut(link) }

// Heal joins a link that was cut; what was sent meanwhile arrives.
func (f *Fleet) Heal(link string) { f.wires.Heal(link) }

// Sleep lets virtual time pass.
func (f *Fleet) Sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// Within waits until ask says "", and fails the test with its last word when time
// is up. It returns how long it took.
func (f *Fleet) Within(most time.Duration, what string, ask func() string) time.Duration {
	f.t.Helper()
	began := time.Now()
	for {
		word := ask()
		if word == "" {
			return time.Since(began)
		}
		took := time.Since(began)
		if took >= most {
			f.t.Fatalf("%s: not within %v: %s", what, most, word)
		}
		// What takes long is asked for less often.
		time.Sleep(min(max(took/20, 10*time.Millisecond), 50*time.Millisecond))
	}
}

func sentence(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

package link_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/link"
	"github.com/portolan-io/portolan/cluster/state"
	statemem "github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/xds/distribute"
)

const fleetDomain = "portolan.internal"

// world is a store, federation replicas and clusters, wired over bufconn.
type world struct {
	t        *testing.T
	ctx      context.Context
	store    *mem.Store
	replicas map[string]*replica
	clusters map[string]*cluster
	wg       sync.WaitGroup
}

type replica struct {
	fleet    *fleet.Fleet
	server   *grpc.Server
	listener *bufconn.Listener
	stop     context.CancelFunc
}

type cluster struct {
	id    string
	state *statemem.Store
	stop  context.CancelFunc

	mu    sync.Mutex
	cut   bool
	cuts  int           // how often
	dark  string        // the one replica that is cut, when it is not all
	wires map[*wire]int // cuts at the time of each
}

func newWorld(t *testing.T, replicas int, clusters ...string) *world {
	ctx, cancel := context.WithCancel(context.Background())
	w := &world{t: t, ctx: ctx, store: mem.New(mem.Config{RunTwice: true}), replicas: map[string]*replica{}, clusters: map[string]*cluster{}}
	for _, c := range clusters {
		w.put(store.Cluster, api.ClusterName(c), &portolanv1.Cluster{Name: api.ClusterName(c), Spec: &portolanv1.ClusterSpec{Region: c + "-region"}})
	}
	for i := range replicas {
		w.addReplica(fmt.Sprintf("fed-%d", i))
	}
	t.Cleanup(func() {
		for _, r := range w.replicas {
			w.kill(r)
		}
		cancel()
		w.wg.Wait()
		// Farewells to dead peers end by themselves.
		<-time.After(10 * time.Second)
	})
	synctest.Wait()
	for _, c := range clusters {
		w.addCluster(c)
	}
	return w
}

// peer trusts what the test's dialer says; certificates are identity/trust's.
func peer(ctx context.Context) (identity.ID, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("peer"); len(v) == 1 {
		return identity.Parse(v[0])
	}
	return identity.ID{}, api.E(api.Unknown, "identify", "nobody")
}

func (w *world) addReplica(name string) {
	f, err := fleet.New(fleet.Config{
		Store: w.store, Replica: name, Fleet: fleetDomain, VirtualIPs: "10.68.0.0/16", Peer: peer,
		FleetBundle: func() []byte { return []byte("fleet roots") }, Log: slog.New(slog.NewTextHandler(w.t.Output(), nil)).With("replica", name),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	r := &replica{fleet: f, server: grpc.NewServer(), listener: bufconn.Listen(1 << 20), stop: cancel}
	f.Register(r.server)
	w.wg.Go(func() {
		if err := f.Run(ctx); err != nil {
			w.t.Error("fleet:", err)
		}
	})
	w.wg.Go(func() { _ = r.server.Serve(r.listener) })
	w.replicas[name] = r
}

// kill ends a replica without any farewell but broken connections.
func (w *world) kill(r *replica) {
	r.server.Stop()
	r.stop()
}

func (w *world) addCluster(id string) *cluster {
	c := &cluster{id: id, state: statemem.New(), wires: map[*wire]int{}}
	w.clusters[id] = c
	w.runLink(c, time.Now().UnixNano())
	w.wg.Go(func() { c.settle(w.ctx) })
	return c
}

// settle stands for the manager: it looks past every revision at once.
func (c *cluster) settle(ctx context.Context) {
	for gen := int64(-1); ; {
		if c.state.Wait(ctx, gen) != nil {
			return
		}
		s := c.state.Snapshot()
		gen = s.Generation
		if s.Settled < s.IntentRevision {
			_ = c.state.Commit(ctx, state.Change{Base: s.Generation, Settled: s.IntentRevision})
		}
	}
}

func (w *world) runLink(c *cluster, session int64) {
	var addresses []string
	for i := range len(w.replicas) {
		addresses = append(addresses, fmt.Sprintf("fed-%d", i))
	}
	served := grpc.NewServer()
	linkv1.RegisterClusterAdminServiceServer(served, admin{c: c})
	l, err := link.New(link.Config{
		State: c.state, Cluster: c.id, Fleet: fleetDomain, Session: session, Addresses: addresses, Serve: served,
		Dial: func(_ context.Context, a string) (distribute.Conn, error) { return w.dial(c, a) },
		Log:  slog.New(slog.NewTextHandler(w.t.Output(), nil)).With("cluster", c.id),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan struct{})
	w.wg.Go(func() {
		defer close(done)
		if err := l.Run(ctx); err != nil {
			w.t.Error("link:", err)
		}
		served.Stop()
	})
	c.stop = func() { cancel(); <-done }
}

type admin struct {
	linkv1.UnimplementedClusterAdminServiceServer
	c *cluster
}

func (a admin) ListLaggards(_ context.Context, req *linkv1.ListLaggardsRequest) (*linkv1.ListLaggardsResponse, error) {
	s := a.c.state.Snapshot()
	return &linkv1.ListLaggardsResponse{Laggards: s.Laggards(a.c.id, req.GetRevision()), AppliedRevision: s.Applied()}, nil
}

// wire is one connection of a cluster. A cut kills it without a word: what is
// written is lost, nothing is read, and neither end is told.
type wire struct {
	net.Conn
	c      *cluster
	to     string
	closed chan struct{}
	once   sync.Once
}

func (x *wire) dead() bool {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	return x.c.cuts != x.c.wires[x] || x.c.dark == x.to
}

func (x *wire) Read(p []byte) (int, error) {
	n, err := x.Conn.Read(p)
	if x.dead() {
		<-x.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (x *wire) Write(p []byte) (int, error) {
	if x.dead() {
		return len(p), nil
	}
	return x.Conn.Write(p)
}

func (x *wire) Close() error {
	x.once.Do(func() { close(x.closed) })
	if x.dead() {
		// The other end hears nothing of it.
		return x.SetReadDeadline(time.Now())
	}
	return x.Conn.Close()
}

func (c *cluster) setCut(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
	if cut {
		c.cuts++
	}
}

func (w *world) dial(c *cluster, address string) (*grpc.ClientConn, error) {
	id := identity.ID{Kind: identity.Control, TrustDomain: identity.ClusterDomain(fleetDomain, c.id)}.String()
	with := func(ctx context.Context) context.Context { return metadata.AppendToOutgoingContext(ctx, "peer", id) }
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c.mu.Lock()
			cut := c.cut || c.dark == address
			c.mu.Unlock()
			if cut {
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
				return nil, fmt.Errorf("no route to %s", address)
			}
			conn, err := w.replicas[address].listener.DialContext(ctx)
			if err != nil {
				return nil, err
			}
			x := &wire{Conn: conn, c: c, to: address, closed: make(chan struct{})}
			c.mu.Lock()
			c.wires[x] = c.cuts
			c.mu.Unlock()
			return x, nil
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, s grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			return s(with(ctx), d, cc, m, o...)
		}),
	)
}

func (w *world) update(fn func(store.Tx) error) int64 {
	w.t.Helper()
	rev, err := w.store.Update(w.ctx, fn)
	if err != nil {
		w.t.Fatal(err)
	}
	return rev
}

func (w *world) put(kind store.Kind, name string, m proto.Message) int64 {
	w.t.Helper()
	return w.update(func(tx store.Tx) error { return tx.Put(kind, name, m) })
}

// get reads a record; the zero message when there is none.
func get[M any](w *world, kind store.Kind, name string) (m M, ok bool) {
	w.t.Helper()
	_, err := w.store.View(w.ctx, func(r store.Reader) error {
		rec, err := r.Get(kind, name)
		if api.KindOf(err) == api.NotFound && err != nil {
			return nil //nolint:nilerr // absent is an answer
		}
		if err != nil {
			return err
		}
		m, ok = any(rec.Message).(M)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return m, ok
}

func (w *world) revision() int64 {
	rev, err := w.store.View(w.ctx, func(store.Reader) error { return nil })
	if err != nil {
		w.t.Fatal(err)
	}
	return rev
}

// eventually waits in virtual time, at most for the bound.
func (w *world) eventually(bound time.Duration, what string, ok func() bool) {
	w.t.Helper()
	began := time.Now()
	for {
		synctest.Wait()
		if ok() {
			w.t.Logf("%s: after %v", what, time.Since(began))
			return
		}
		if time.Since(began) > bound {
			w.t.Fatalf("%s: not within %v", what, bound)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (w *world) clusterState(c string) portolanv1.ClusterState {
	s, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, api.ClusterName(c))
	return s.GetStatus().GetState()
}

func (w *world) progress(c string) int64 {
	leases, err := w.store.Leases(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, l := range leases {
		if l.Name == fleet.LeaseOf(c) {
			return l.Progress
		}
	}
	return 0
}

const (
	ready = portolanv1.ClusterState_CLUSTER_STATE_READY
	lost  = portolanv1.ClusterState_CLUSTER_STATE_LOST
)

// shop places one workload with a service in the clusters.
func (w *world) shop(clusters ...string) int64 {
	return w.update(func(tx store.Tx) error {
		must := func(err error) {
			if err != nil {
				w.t.Fatal(err)
			}
		}
		must(tx.Put(store.Tenant, "tenants/shop", &portolanv1.Tenant{Name: "tenants/shop"}))
		must(tx.Put(store.Revision, api.RevisionName("shop", "web", "r1"), &portolanv1.WorkloadRevision{Spec: &portolanv1.WorkloadSpec{}}))
		must(tx.Put(store.Service, api.ServiceName("shop", "web"), &portolanv1.Service{Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 80}}}}))
		for _, c := range clusters {
			must(tx.Put(store.Placement, api.PlacementName("shop", "web", c), &portolanv1.Placement{
				Name: api.PlacementName("shop", "web", c), Generation: 1,
				Spec: &portolanv1.PlacementSpec{Epoch: 1, Revisions: []*portolanv1.RevisionReplicas{{Revision: "r1", Replicas: 1}}},
			}))
		}
		return nil
	})
}

// run gives a cluster a node with an east-west gateway and one ready replica of
// shop/web, which has applied everything.
func (c *cluster) run(t *testing.T) {
	t.Helper()
	s := c.state.Snapshot()
	err := c.state.Commit(t.Context(), state.Change{
		Base:     s.Generation,
		PutNodes: []*clusterv1.Node{{Node: "n1", ReplicaCidr: "10.1.1.0/24", Facts: &nodev1.NodeFacts{Address: "10.0.0.1", CpuMilli: 4000, MemoryBytes: 1 << 30}}},
		PutAllocations: []*clusterv1.Allocation{
			{Allocation: "web-aaaaa", Tenant: "shop", Workload: "web", Revision: "r1", Epoch: 1, Node: "n1", Address: "10.1.1.2", Spec: &portolanv1.WorkloadSpec{}},
			{Allocation: "east-bbbbb", Tenant: "system", Workload: "east", Revision: "r1", Epoch: 1, Node: "n1", Address: "10.0.0.1", Spec: &portolanv1.WorkloadSpec{Gateway: portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.observe(t, 1<<40, "web-aaaaa", "east-bbbbb")
}

func (c *cluster) observe(t *testing.T, applied int64, running ...string) {
	t.Helper()
	st := &state.NodeStatus{Connected: true, LastSeen: time.Now(), Session: 1, Applied: &nodev1.Watermark{Revision: applied}, Allocations: map[string]*nodev1.AllocationStatus{}, Proxies: map[string]*nodev1.ProxyStatus{}}
	for _, a := range running {
		st.Allocations[a] = &nodev1.AllocationStatus{Allocation: a, Epoch: 1, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true}
	}
	if err := c.state.Observe("n1", st); err != nil {
		t.Fatal(err)
	}
}

// stop takes an allocation away, as the manager does when its node confirmed.
func stop(base int64, allocation string) state.Change {
	return state.Change{Base: base, DeleteAllocations: []string{allocation}}
}

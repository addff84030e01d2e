package dispatch

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/xds/distribute"
)

// fakeManager registers nodes and remembers events.
type fakeManager struct {
	store  *mem.Store
	mu     sync.Mutex
	events []*portolanv1.Event
}

func (m *fakeManager) RegisterNode(ctx context.Context, node string, facts *nodev1.NodeFacts, key []byte) (*clusterv1.Node, error) {
	n := &clusterv1.Node{Node: node, Facts: facts, ReplicaCidr: "10.1.1.0/24", KeyHash: key}
	return n, m.store.Commit(ctx, state.Change{Base: m.store.Snapshot().Generation, PutNodes: []*clusterv1.Node{n}})
}

func (m *fakeManager) SetMode(ctx context.Context, node, pool string, mode portolanv1.NodeMode, deadline time.Time) error {
	s := m.store.Snapshot()
	c := state.Change{Base: s.Generation}
	for id, n := range s.Nodes {
		if id == node || node == "" && state.PoolOf(n) == pool {
			n = proto.CloneOf(n)
			n.Mode, n.DrainDeadline = mode, timestamppb.New(deadline)
			c.PutNodes = append(c.PutNodes, n)
		}
	}
	return m.store.Commit(ctx, c)
}

func (m *fakeManager) RenewNode(ctx context.Context, node string, key []byte, expire time.Time) error {
	n := proto.CloneOf(m.store.Snapshot().Nodes[node])
	n.RenewedKeys = append(n.RenewedKeys, &clusterv1.NodeKey{Hash: key, ExpireTime: timestamppb.New(expire)})
	return m.store.Commit(ctx, state.Change{Base: m.store.Snapshot().Generation, PutNodes: []*clusterv1.Node{n}})
}

func (m *fakeManager) DeleteNode(ctx context.Context, node string, _ bool) error {
	return m.store.Commit(ctx, state.Change{Base: m.store.Snapshot().Generation, DeleteNodes: []string{node}})
}

func (m *fakeManager) AddEvents(events ...*portolanv1.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events = append(m.events, events...)
}

func (m *fakeManager) Events() []*portolanv1.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.events
}

// rig is a cluster's dispatch behind bufconn, on a state in memory.
type rig struct {
	t        *testing.T
	ctx      context.Context
	store    *mem.Store
	manager  *fakeManager
	d        *Dispatch
	listener *bufconn.Listener
	wg       sync.WaitGroup
}

func newRig(t *testing.T, store *mem.Store) *rig {
	ctx, cancel := context.WithCancel(context.Background())
	r := &rig{t: t, ctx: ctx, store: store, manager: &fakeManager{store: store}, listener: bufconn.Listen(1 << 20)}
	authority, err := ca.Open(ctx, ca.Config{TrustDomain: "eu.portolan.internal", Storage: store, SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	r.d, err = New(Config{State: store, Facts: testFacts, CA: authority, Manager: r.manager, Peer: peerOf, Key: keyOf, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	r.d.Register(server)
	r.wg.Go(func() { _ = server.Serve(r.listener) })
	r.wg.Go(func() {
		if err := r.d.Run(ctx); err != nil {
			t.Error("run:", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		server.Stop()
		r.wg.Wait()
	})
	return r
}

func peerOf(ctx context.Context) (identity.ID, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("peer"); len(v) == 1 {
		return identity.Parse(v[0])
	}
	return identity.ID{}, api.E(api.Unknown, "identify", "nobody")
}

// keyOf reads what key a caller shows; the nodes of populate have none.
func keyOf(ctx context.Context) ([]byte, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("key-bin"); len(v) == 1 {
		return []byte(v[0]), nil
	}
	return nil, nil
}

// as dials as somebody; "" is nobody.
func (r *rig) as(id string) *grpc.ClientConn { return r.with(id, nil) }

// with dials as somebody with a key.
func (r *rig) with(id string, key []byte) *grpc.ClientConn {
	r.t.Helper()
	with := func(ctx context.Context) context.Context {
		if id == "" {
			return ctx
		}
		if key != nil {
			ctx = metadata.AppendToOutgoingContext(ctx, "key-bin", string(key))
		}
		return metadata.AppendToOutgoingContext(ctx, "peer", id)
	}
	cc, err := grpc.NewClient("passthrough:///cluster", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.listener.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(func(ctx context.Context, m string, a, b any, cc *grpc.ClientConn, i grpc.UnaryInvoker, o ...grpc.CallOption) error {
			return i(with(ctx), m, a, b, cc, o...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, s grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			return s(with(ctx), d, cc, m, o...)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func node(n string) string { return "spiffe://eu.portolan.internal/node/" + n }

// cluster writes two nodes with a replica each.
func (r *rig) cluster() {
	r.t.Helper()
	populate(r.t, r.store)
}

func populate(t *testing.T, store *mem.Store) {
	t.Helper()
	commit(t, store, state.Change{
		PutNodes: []*clusterv1.Node{
			{Node: "n1", Facts: &nodev1.NodeFacts{Address: "10.0.0.1"}, ReplicaCidr: "10.1.1.0/24"},
			{Node: "n2", Facts: &nodev1.NodeFacts{Address: "10.0.0.2"}, ReplicaCidr: "10.1.2.0/24"},
		},
		PutAllocations: []*clusterv1.Allocation{
			{Allocation: "web-aaaaa", Tenant: "shop", Workload: "web", Revision: "v1", Epoch: 1, Node: "n1", Address: "10.1.1.2", Spec: &portolanv1.WorkloadSpec{}},
			{Allocation: "web-bbbbb", Tenant: "shop", Workload: "web", Revision: "v1", Epoch: 1, Node: "n2", Address: "10.1.2.2", Spec: &portolanv1.WorkloadSpec{}},
		},
	})
	intents := map[string]*linkv1.Intent{
		"service/shop/web": {Revision: 1, Body: &linkv1.Intent_Service{Service: &linkv1.ServiceIntent{Tenant: "shop", Service: "web", Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 80}}}}}},
	}
	if err := store.CommitIntents(t.Context(), 1, intents, time.Now()); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) commit(c state.Change) {
	r.t.Helper()
	commit(r.t, r.store, c)
}

func commit(t *testing.T, store *mem.Store, c state.Change) {
	t.Helper()
	c.Base = store.Snapshot().Generation
	if err := store.Commit(t.Context(), c); err != nil {
		t.Fatal(err)
	}
}

func running(allocation string) *nodev1.AllocationStatus {
	return &nodev1.AllocationStatus{Allocation: allocation, Epoch: 1, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true}
}

type reports = nodev1.NodeService_ReportClient

func (r *rig) report(n string) reports {
	r.t.Helper()
	s, err := nodev1.NewNodeServiceClient(r.as(node(n))).Report(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func say(t *testing.T, s reports, m *nodev1.NodeReport) *linkv1.ReportAck {
	t.Helper()
	if err := s.Send(m); err != nil {
		t.Fatal(err)
	}
	a, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// consumer follows a node's directives and remembers every generation.
type consumer struct {
	mu          sync.Mutex
	generations []map[string]*nodev1.Directive
	marks       []*nodev1.Watermark
}

func (r *rig) consume(n string) *consumer {
	r.t.Helper()
	c := &consumer{}
	cc := r.as(node(n))
	dc, err := distribute.NewConsumer(distribute.ConsumerConfig{
		NodeID: n, TypeURL: api.DirectiveTypeURL, Dial: func(context.Context) (distribute.Conn, error) { return cc, nil },
		Commit: func(_ context.Context, g distribute.Generation) error {
			all := map[string]*nodev1.Directive{}
			for name, res := range g.Resources {
				m := &nodev1.Directive{}
				if err := proto.Unmarshal(res.Body.GetValue(), m); err != nil {
					return err
				}
				all[name] = m
			}
			w := &nodev1.Directive{}
			if err := proto.Unmarshal(g.Watermark.Body.GetValue(), w); err != nil {
				return err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.generations, c.marks = append(c.generations, all), append(c.marks, w.GetWatermark())
			return nil
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.wg.Go(func() { _ = dc.Run(r.ctx) })
	return c
}

func (c *consumer) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.generations)
}

func (c *consumer) last() (map[string]*nodev1.Directive, *nodev1.Watermark) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.generations) == 0 {
		return nil, nil
	}
	return c.generations[len(c.generations)-1], c.marks[len(c.marks)-1]
}

func (c *consumer) endpoints() (out []string) {
	all, _ := c.last()
	for _, e := range all["endpoints/shop/web"].GetEndpoints().GetEndpoints() {
		out = append(out, e.GetAllocation())
	}
	return out
}

func pause(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestChangesReachNodesWithinMillisecondsAndQuietMeansQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		s1, s2 := r.report("n1"), r.report("n2")
		say(t, s1, &nodev1.NodeReport{Session: 1, Sequence: 1, Full: true, Allocations: []*nodev1.AllocationStatus{running("web-aaaaa")}})
		say(t, s2, &nodev1.NodeReport{Session: 1, Sequence: 1, Full: true})
		c := r.consume("n1")
		pause(20 * time.Millisecond)
		if got := c.endpoints(); len(got) != 1 || got[0] != "web-aaaaa" {
			t.Fatalf("endpoints %v", got)
		}
		say(t, s2, &nodev1.NodeReport{Session: 1, Sequence: 2, Allocations: []*nodev1.AllocationStatus{running("web-bbbbb")}})
		pause(2 * coalesce)
		if got := c.endpoints(); len(got) != 2 {
			t.Fatalf("10 ms later: endpoints %v", got)
		}
		quiet := c.count()
		_, mark := c.last()
		for i := range 60 {
			say(t, s1, &nodev1.NodeReport{Session: 1, Sequence: int64(i + 2), Applied: mark})
			say(t, s2, &nodev1.NodeReport{Session: 1, Sequence: int64(i + 3)})
			pause(time.Second)
		}
		if n := c.count() - quiet; n != 0 {
			t.Errorf("a quiet minute with signs of life sent %d generations", n)
		}
		if st := r.store.Snapshot().NodeStatus["n2"]; time.Since(st.LastSeen) > 2*time.Second {
			t.Errorf("last seen %v ago", time.Since(st.LastSeen))
		}
		// The manager settles on a new revision: a watermark, and nothing else.
		if err := r.store.CommitIntents(r.ctx, 7, r.store.Snapshot().Intents, time.Now()); err != nil {
			t.Fatal(err)
		}
		r.commit(state.Change{Settled: 7})
		pause(2 * coalesce)
		if _, w := c.last(); w.GetRevision() != 7 || w.GetGeneration() != mark.GetGeneration() {
			t.Errorf("watermark %v after %v", w, mark)
		}
	})
}

func TestNothingIsServedBeforeTheNodesSpoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := mem.New()
		populate(t, before)
		r := newRig(t, before.Reopen())
		c := r.consume("n1")
		say(t, r.report("n1"), &nodev1.NodeReport{Session: 1, Sequence: 1, Full: true})
		pause(time.Second)
		if c.count() != 0 {
			t.Fatal("endpoints were served while n2 has not spoken")
		}
		say(t, r.report("n2"), &nodev1.NodeReport{Session: 1, Sequence: 1, Full: true, Allocations: []*nodev1.AllocationStatus{running("web-bbbbb")}})
		pause(2 * coalesce)
		if got := c.endpoints(); len(got) != 1 {
			t.Fatalf("endpoints %v", got)
		}
	})
}

func TestSilentNodesAreNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := mem.New()
		populate(t, before)
		r := newRig(t, before.Reopen())
		c := r.consume("n1")
		pause(DefaultNodeTimeout + 10*time.Millisecond)
		if c.count() == 0 {
			t.Fatal("nothing is served")
		}
	})
}

func TestForeignAllocationsAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		say(t, r.report("n1"), &nodev1.NodeReport{
			Session: 1, Sequence: 1, Full: true,
			Allocations: []*nodev1.AllocationStatus{running("web-aaaaa"), running("web-bbbbb"), running("made-up")},
			Proxies:     []*nodev1.ProxyStatus{{Allocation: "web-aaaaa"}, {Allocation: "web-bbbbb"}},
			Events: []*portolanv1.Event{
				{Object: "tenants/shop/workloads/web/replicas/web-aaaaa", Type: "Started"},
				{Object: "tenants/shop/workloads/web/replicas/web-bbbbb", Type: "Forged"},
				{Object: "clusters/eu/nodes/n2", Type: "Forged"},
				{Object: "clusters/eu/nodes/n1", Type: "Booted"},
			},
		})
		st := r.store.Snapshot().NodeStatus["n1"]
		if len(st.Allocations) != 1 || st.Allocations["web-aaaaa"] == nil || len(st.Proxies) != 1 {
			t.Errorf("kept %v and %v", st.Allocations, st.Proxies)
		}
		if ev := r.manager.Events(); len(ev) != 2 || ev[0].GetType() != "Started" || ev[0].GetCluster() != "eu" || ev[0].GetNode() != "n1" || ev[1].GetType() != "Booted" {
			t.Errorf("events %v", ev)
		}
		// What it says of its own is bounded too.
		loud := running("web-aaaaa")
		loud.Reason = &portolanv1.Reason{Code: "Error", Message: strings.Repeat("x", 1<<20)}
		for range 1000 {
			loud.Containers = append(loud.Containers, &portolanv1.ContainerState{Name: "main"})
		}
		say(t, r.report("n1"), &nodev1.NodeReport{
			Session: 2, Sequence: 1, Full: true, Allocations: []*nodev1.AllocationStatus{loud},
			Facts:  &nodev1.NodeFacts{Address: "10.0.0.1", Labels: map[string]string{"a": strings.Repeat("x", 1<<20)}},
			Events: []*portolanv1.Event{{Object: "clusters/eu/nodes/n1", Type: "Loud", Message: strings.Repeat("x", 1<<20)}},
		})
		st = r.store.Snapshot().NodeStatus["n1"]
		if kept := st.Allocations["web-aaaaa"]; len(kept.GetReason().GetMessage()) > 4096 || len(kept.GetContainers()) > api.MaxListItems || proto.Size(st.Facts) > 4096 {
			t.Error("a megabyte of it is kept")
		}
		if ev := r.manager.Events(); len(ev) != 3 || len(ev[2].GetMessage()) > 4096 {
			t.Error("an event of a megabyte is kept")
		}
		// With an address that is not its own, even an own allocation.
		forged := running("web-aaaaa")
		forged.Address, forged.Ready = "10.1.2.2", false
		s := r.report("n1")
		say(t, s, &nodev1.NodeReport{Session: 3, Sequence: 1, Full: true, Allocations: []*nodev1.AllocationStatus{forged}})
		if st := r.store.Snapshot().NodeStatus["n1"]; len(st.Allocations) != 0 {
			t.Errorf("kept %v", st.Allocations)
		}
	})
}

// A node is believed about the volumes that it was told to delete, and no others;
// usage alone is kept and wakes nobody.
func TestRemovedVolumesAndUsage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		r.commit(state.Change{PutVolumes: []*clusterv1.Volume{
			{Volume: "shop.web-0.a", Node: "n1", Delete: true}, {Volume: "shop.web-1.a", Node: "n1"}, {Volume: "shop.web-2.a", Node: "n2", Delete: true},
		}})
		s := r.report("n1")
		say(t, s, &nodev1.NodeReport{
			Session: 1, Sequence: 1, Full: true, Allocations: []*nodev1.AllocationStatus{running("web-aaaaa")},
			RemovedVolumes: []string{"shop.web-0.a", "shop.web-1.a", "shop.web-2.a", "made.up-0.a"},
		})
		if got := r.store.Snapshot().NodeStatus["n1"].RemovedVolumes; len(got) != 1 || !got["shop.web-0.a"] {
			t.Errorf("believed %v", got)
		}
		before := r.store.Snapshot().Generation
		used := running("web-aaaaa")
		used.Usage = &nodev1.Usage{CpuMilli: 70}
		say(t, s, &nodev1.NodeReport{Session: 1, Sequence: 2, Allocations: []*nodev1.AllocationStatus{used}})
		got := r.store.Snapshot()
		if got.Generation != before || got.NodeStatus["n1"].Allocations["web-aaaaa"].GetUsage().GetCpuMilli() != 70 || !got.NodeStatus["n1"].RemovedVolumes["shop.web-0.a"] {
			t.Errorf("generation %d after %d, %v", got.Generation, before, got.NodeStatus["n1"])
		}
		r.commit(state.Change{DeleteVolumes: []string{"shop.web-0.a"}})
		many := running("web-aaaaa")
		many.Usage = &nodev1.Usage{Custom: map[string]float64{}}
		for i := range 100 {
			many.Usage.Custom[string(rune('a'+i))] = 1
		}
		say(t, s, &nodev1.NodeReport{Session: 1, Sequence: 3, Allocations: []*nodev1.AllocationStatus{many}})
		st := r.store.Snapshot().NodeStatus["n1"]
		if len(st.RemovedVolumes) != 0 || st.Allocations["web-aaaaa"].GetUsage() != nil {
			t.Errorf("kept %v and %v", st.RemovedVolumes, st.Allocations["web-aaaaa"].GetUsage())
		}
	})
}

func TestGapsAndOlderSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		old := r.report("n1")
		if !say(t, old, &nodev1.NodeReport{Session: 5, Sequence: 1}).GetResync() {
			t.Error("a delta without a base was taken")
		}
		if r.store.Snapshot().NodeStatus["n1"] != nil {
			t.Error("something was observed before the full report")
		}
		say(t, old, &nodev1.NodeReport{Session: 5, Sequence: 2, Full: true, Allocations: []*nodev1.AllocationStatus{running("web-aaaaa")}})
		if !say(t, old, &nodev1.NodeReport{Session: 5, Sequence: 9, Removed: []string{"web-aaaaa"}}).GetResync() {
			t.Error("a gap was not noticed")
		}
		if len(r.store.Snapshot().NodeStatus["n1"].Allocations) != 1 {
			t.Error("what came after a gap was taken")
		}
		fresh := r.report("n1")
		say(t, fresh, &nodev1.NodeReport{Session: 6, Sequence: 1, Full: true})
		if _, err := old.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older stream ended with %v", err)
		}
		synctest.Wait()
		if st := r.store.Snapshot().NodeStatus["n1"]; !st.Connected || st.Session != 6 {
			t.Errorf("the end of the older stream touched the newer one: %+v", st)
		}
		_ = fresh.CloseSend()
		_, _ = fresh.Recv()
		synctest.Wait()
		if r.store.Snapshot().NodeStatus["n1"].Connected {
			t.Error("the node is gone and said to be connected")
		}
		late := r.report("n1")
		_ = late.Send(&nodev1.NodeReport{Session: 5, Sequence: 1, Full: true})
		if _, err := late.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older session was answered with %v", err)
		}
	})
}

func csr(t *testing.T) []byte {
	t.Helper()
	_, der, err := source.NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestTokensAreForOneNodeOneKeyAndTenMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		a := &adminServer{d: r.d}
		mint := func() string {
			resp, err := a.CreateNodeJoinToken(r.ctx, &linkv1.CreateNodeJoinTokenRequest{Node: "n1"})
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetToken()
		}
		c := nodev1.NewNodeServiceClient(r.as(""))
		join := func(token, node string, csr []byte) (*nodev1.JoinResponse, error) {
			return c.Join(r.ctx, &nodev1.JoinRequest{Token: token, Node: node, Csr: csr, Facts: &nodev1.NodeFacts{Address: "10.0.0.1"}})
		}
		refused := func(what string, err error) {
			t.Helper()
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s: %v", what, err)
			}
		}
		token, key := mint(), csr(t)
		_, err := join(token, "n2", key)
		refused("another node", err)
		resp, err := join(token, "n1", key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(resp.GetChain()[0])
		if err != nil || len(leaf.URIs) != 1 || leaf.URIs[0].String() != node("n1") {
			t.Errorf("certificate for %v (%v)", leaf.URIs, err)
		}
		if resp.GetReplicaCidr() == "" || resp.GetTrustDomain() != "eu.portolan.internal" || len(resp.GetBundle()) == 0 {
			t.Errorf("answer %v", resp)
		}
		if _, err := join(token, "n1", key); err != nil {
			t.Errorf("the same again: %v", err)
		}
		_, err = join(token, "n1", csr(t))
		refused("another key", err)
		unknown, _ := attest.NewToken([]byte("root"))
		_, err = join(unknown, "n1", key)
		refused("an unknown token", err)
		late := mint()
		pause(DefaultTokenTTL)
		_, err = join(late, "n1", key)
		refused("an expired token", err)
	})
}

// Anybody may call Join; who tries tokens is bounded.
func TestStrangersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		got := map[codes.Code]int{}
		key := csr(t)
		for range 200 {
			token, _ := attest.NewToken([]byte("root"))
			got[status.Code(r.join(token, key))]++
		}
		if got[codes.PermissionDenied] > 30 || got[codes.PermissionDenied]+got[codes.ResourceExhausted] != 200 {
			t.Errorf("answers %v", got)
		}
	})
}

// keyIn is the key that a certificate request stands for.
func keyIn(t *testing.T, der []byte) []byte {
	t.Helper()
	c, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return sum[:]
}

// TestNodesAreWhoJoinedLast: a node that joined anew, or was deleted, leaves its
// former key worth nothing, on streams that are open too.
func TestNodesAreWhoJoinedLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		a := &adminServer{d: r.d}
		join := func(csr []byte) (token string) {
			t.Helper()
			resp, err := a.CreateNodeJoinToken(r.ctx, &linkv1.CreateNodeJoinTokenRequest{Node: "n1"})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.join(resp.GetToken(), csr); err != nil {
				t.Fatal(err)
			}
			return resp.GetToken()
		}
		renew := func(key, csr []byte) error {
			_, err := nodev1.NewNodeServiceClient(r.with(node("n1"), key)).Renew(r.ctx, &nodev1.RenewRequest{Csr: csr})
			return err
		}
		// opened has a node's three streams, and gives how each ended.
		opened := func(key []byte) func() []codes.Code {
			t.Helper()
			cc := r.with(node("n1"), key)
			rep, err := nodev1.NewNodeServiceClient(cc).Report(r.ctx)
			if err != nil {
				t.Fatal(err)
			}
			say(t, rep, &nodev1.NodeReport{Session: time.Now().UnixNano(), Sequence: 1, Full: true})
			tun, err := nodev1.NewNodeServiceClient(cc).Tunnel(r.ctx)
			if err != nil {
				t.Fatal(err)
			}
			ads, err := discovery.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(r.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := ads.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: api.DirectiveTypeURL}); err != nil {
				t.Fatal(err)
			}
			return func() []codes.Code {
				var out []codes.Code
				for _, recv := range []func() error{
					func() error { _, err := rep.Recv(); return err },
					func() error { _, err := tun.Recv(); return err },
					func() error { _, err := ads.Recv(); return err },
				} {
					err := recv()
					for err == nil {
						err = recv()
					}
					out = append(out, status.Code(err))
				}
				return out
			}
		}
		denied := func(what string, got []codes.Code) {
			t.Helper()
			for i, c := range got {
				if c != codes.PermissionDenied {
					t.Errorf("%s: stream %d ended with %v", what, i, c)
				}
			}
		}
		first, second, third := csr(t), csr(t), csr(t)
		token := join(first)
		ended := opened(keyIn(t, first))
		pause(time.Second)
		join(second)
		denied("after another joined", ended())
		if err := renew(keyIn(t, first), csr(t)); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the former key is renewed: %v", err)
		}
		// A renewal counts beside what is in use: its answer may be lost.
		if err := renew(keyIn(t, second), third); err != nil {
			t.Fatal(err)
		}
		for _, key := range [][]byte{keyIn(t, second), keyIn(t, third)} {
			if err := renew(key, csr(t)); err != nil {
				t.Errorf("a key that counts: %v", err)
			}
		}
		ended = opened(keyIn(t, third))
		pause(time.Second)
		if _, err := a.DeleteNode(r.ctx, &linkv1.DeleteNodeRequest{Node: "n1", Force: true}); err != nil {
			t.Fatal(err)
		}
		denied("after the node was deleted", ended())
		for _, key := range [][]byte{keyIn(t, first), keyIn(t, second), keyIn(t, third), nil} {
			if err := renew(key, csr(t)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("a deleted node: %v", err)
			}
		}
		pause(DefaultTokenTTL)
		if err := r.join(token, first); status.Code(err) != codes.PermissionDenied {
			t.Errorf("a deleted node came back with its old token: %v", err)
		}
	})
}

func (r *rig) join(token string, csr []byte) error {
	r.t.Helper()
	_, err := nodev1.NewNodeServiceClient(r.as("")).Join(r.ctx, &nodev1.JoinRequest{Token: token, Node: "n1", Csr: csr, Facts: &nodev1.NodeFacts{Address: "10.0.0.1"}})
	return err
}

func TestSignsOnlyForTheCallersOwnLiveAllocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		gateway := &clusterv1.Allocation{Allocation: "east-ccccc", Tenant: "system", Workload: "east", Node: "n1", Spec: &portolanv1.WorkloadSpec{Gateway: portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST}}
		r.commit(state.Change{PutAllocations: []*clusterv1.Allocation{gateway}})
		sign := func(as, allocation string) (*nodev1.SignWorkloadResponse, error) {
			return nodev1.NewNodeServiceClient(r.as(as)).SignWorkload(r.ctx, &nodev1.SignWorkloadRequest{Allocation: allocation, Csr: csr(t)})
		}
		for allocation, want := range map[string]string{
			"web-aaaaa":  "spiffe://eu.portolan.internal/tenant/shop/workload/web",
			"east-ccccc": "spiffe://eu.portolan.internal/gateway/east",
		} {
			resp, err := sign(node("n1"), allocation)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(resp.GetChain()[0])
			if err != nil || leaf.URIs[0].String() != want {
				t.Errorf("%s got %v (%v)", allocation, leaf.URIs, err)
			}
		}
		for _, c := range []struct {
			as, allocation string
			code           codes.Code
		}{
			{node("n1"), "web-bbbbb", codes.PermissionDenied},
			{node("n1"), "made-up", codes.PermissionDenied},
			{node("n9"), "web-aaaaa", codes.PermissionDenied},
			{"spiffe://us.portolan.internal/node/n1", "web-aaaaa", codes.PermissionDenied},
			{"spiffe://eu.portolan.internal/tenant/shop/workload/web", "web-aaaaa", codes.PermissionDenied},
			{"", "web-aaaaa", codes.Unauthenticated},
		} {
			if _, err := sign(c.as, c.allocation); status.Code(err) != c.code {
				t.Errorf("%q for %s: %v, want %v", c.as, c.allocation, err, c.code)
			}
		}
		stopped := proto.CloneOf(r.store.Snapshot().Allocations["web-aaaaa"])
		stopped.Stop, stopped.StopTime = true, timestamppb.Now()
		r.commit(state.Change{PutAllocations: []*clusterv1.Allocation{stopped}})
		if _, err := sign(node("n1"), "web-aaaaa"); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a stopped allocation: %v", err)
		}
	})
}

// nodeRuntime is the node's end of a tunnel.
type nodeRuntime struct {
	portolanv1.UnimplementedRuntimeServiceServer
}

func (nodeRuntime) Logs(req *portolanv1.LogsRequest, s grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	for _, l := range []string{"one\n", "two\n"} {
		if err := s.Send(&portolanv1.LogsResponse{Data: []byte(req.GetContainer() + ": " + l)}); err != nil {
			return err
		}
	}
	return nil
}

func (nodeRuntime) Exec(s grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_ExitCode{ExitCode: 3}})
		}
		if err != nil {
			return err
		}
		if in := m.GetStdin(); in != nil {
			if err := s.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_Stdout{Stdout: in}}); err != nil {
				return err
			}
		}
	}
}

func TestLogsAndExecReadThroughTheNodesTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mem.New())
		r.cluster()
		up := grpc.NewServer()
		r.d.RegisterUpward(up)
		l := bufconn.Listen(1 << 16)
		r.wg.Go(func() { _ = up.Serve(l) })
		t.Cleanup(up.Stop)
		cc, err := grpc.NewClient("passthrough:///up", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cc.Close() })
		c := portolanv1.NewRuntimeServiceClient(cc)
		const replica = "tenants/shop/workloads/web/replicas/web-aaaaa"
		logs := func(name string) (string, error) {
			s, err := c.Logs(r.ctx, &portolanv1.LogsRequest{Replica: name, Container: "main"})
			if err != nil {
				return "", err
			}
			text := ""
			for {
				m, err := s.Recv()
				if errors.Is(err, io.EOF) {
					return text, nil
				}
				if err != nil {
					return text, err
				}
				text += string(m.GetData())
			}
		}
		if _, err := logs(replica); status.Code(err) != codes.Unavailable {
			t.Errorf("without a tunnel: %v", err)
		}
		if _, err := logs("tenants/bank/workloads/web/replicas/web-aaaaa"); status.Code(err) != codes.NotFound {
			t.Errorf("under another tenant's name: %v", err)
		}
		served := grpc.NewServer()
		portolanv1.RegisterRuntimeServiceServer(served, nodeRuntime{})
		t.Cleanup(served.Stop)
		stream, err := nodev1.NewNodeServiceClient(r.as(node("n1"))).Tunnel(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		r.wg.Go(func() { _ = tunnel.Serve(r.ctx, stream, served) })
		pause(time.Second)
		if got, err := logs(replica); err != nil || got != "main: one\nmain: two\n" {
			t.Errorf("logs %q, %v", got, err)
		}
		x, err := c.Exec(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []*portolanv1.ExecRequest{
			{Message: &portolanv1.ExecRequest_Start_{Start: &portolanv1.ExecRequest_Start{Replica: replica, Command: []string{"cat"}}}},
			{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("hello")}},
		} {
			if err := x.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		if m, err := x.Recv(); err != nil || string(m.GetStdout()) != "hello" {
			t.Errorf("exec answered %v, %v", m, err)
		}
		_ = x.CloseSend()
		if m, err := x.Recv(); err != nil || m.GetExitCode() != 3 {
			t.Errorf("exec ended with %v, %v", m, err)
		}
		got, err := c.ListReplicas(r.ctx, &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-"})
		if err != nil || len(got.GetReplicas()) != 2 || got.GetReplicas()[0].GetName() != replica || got.GetNextPageToken() != "" {
			t.Errorf("replicas %v, %v", got, err)
		}
		token := ""
		for _, want := range got.GetReplicas() {
			page, err := c.ListReplicas(r.ctx, &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-", PageSize: 1, PageToken: token})
			if err != nil || len(page.GetReplicas()) != 1 || page.GetReplicas()[0].GetName() != want.GetName() {
				t.Errorf("page after %q: %v, %v", token, page, err)
			}
			token = page.GetNextPageToken()
		}
		if token != "" {
			t.Errorf("there is no more after the last, but a token %q", token)
		}
		got, err = c.ListReplicas(r.ctx, &portolanv1.ListReplicasRequest{Parent: replica})
		if err != nil || len(got.GetReplicas()) != 1 || got.GetReplicas()[0].GetName() != replica {
			t.Errorf("one by its name: %v, %v", got, err)
		}
	})
}

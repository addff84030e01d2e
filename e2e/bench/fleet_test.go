// Package bench holds the benchmarks that need more than one plane, on the real
// clock and real connections. Those of one part are beside that part.
package bench

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"github.com/portolan-io/portolan/cluster/dispatch"
	"github.com/portolan-io/portolan/cluster/link"
	"github.com/portolan-io/portolan/cluster/manager"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/control"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
	"github.com/portolan-io/portolan/xds/distribute"
)

const (
	fleetDomain    = "portolan.internal"
	federationName = "federation." + fleetDomain
	registry       = "registry.test"
	virtualIPs     = "10.68.0.0/16"
	adminName      = "admin"
	clusterID      = "eu-west"
	nodes          = 16 // each has 253 addresses
)

// world is two federation replicas and one cluster with nodes that only report,
// wired as the mains wire them, over mTLS on loopback.
type world struct {
	b         *testing.B
	ctx       context.Context
	wg        sync.WaitGroup
	log       *slog.Logger
	authority *ca.Authority
	addresses []string // of the replicas
	admin     *grpc.ClientConn
	state     state.Store
}

// newWorld makes the federation, one replica on each store, and a cluster on st.
// The caller speaks to the first replica, the cluster to the last.
func newWorld(b *testing.B, st state.Store, stores ...store.Store) *world {
	ctx, cancel := context.WithCancel(context.Background())
	w := &world{b: b, ctx: ctx, log: slog.New(slog.DiscardHandler), state: st}
	b.Cleanup(func() {
		cancel()
		w.wg.Wait()
	})
	var err error
	w.authority, err = ca.Open(ctx, ca.Config{TrustDomain: fleetDomain, Storage: ca.DirStorage(b.TempDir()), SealKey: make([]byte, 32)})
	w.must("open the fleet's authority", err)
	srv, err := w.server(stores[0], nil, nil)
	w.must("make a server", err)
	w.must("bootstrap", srv.Bootstrap(ctx, adminName))
	for i, s := range stores {
		w.addReplica(fmt.Sprintf("fed-%d", i+1), s)
	}
	w.connect()
	clusters := portolanv1.NewClusterServiceClient(w.admin)
	_, err = clusters.CreateCluster(ctx, &portolanv1.CreateClusterRequest{Cluster: &portolanv1.Cluster{
		Name: api.ClusterName(clusterID), Spec: &portolanv1.ClusterSpec{Region: clusterID},
	}})
	w.must("create the cluster", err)
	token, err := clusters.CreateClusterJoinToken(ctx, &portolanv1.CreateClusterJoinTokenRequest{Name: api.ClusterName(clusterID)})
	w.must("mint the cluster's token", err)
	w.addCluster(token.GetToken())
	w.addNodes()
	w.within("the cluster is ready with its nodes", func() bool {
		c, err := clusters.GetCluster(ctx, &portolanv1.GetClusterRequest{Name: api.ClusterName(clusterID)})
		w.must("get the cluster", err)
		return c.GetStatus().GetState() == portolanv1.ClusterState_CLUSTER_STATE_READY && c.GetStatus().GetNodesReady() == nodes
	})
	return w
}

func (w *world) must(what string, err error) {
	w.b.Helper()
	if err != nil {
		w.b.Fatalf("%s: %v", what, err)
	}
}

func (w *world) within(what string, ok func() bool) {
	w.b.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.b.Fatalf("%s: not within 20s", what)
		}
	}
}

// run runs parts until the end of the benchmark.
func (w *world) run(parts ...func(context.Context) error) {
	for _, part := range parts {
		w.wg.Go(func() {
			if err := part(w.ctx); w.ctx.Err() == nil {
				w.b.Errorf("a part ended: %v", err)
			}
		})
	}
}

// serve listens on loopback and gives the address.
func (w *world) serve(s *grpc.Server) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must("listen", err)
	w.run(func(ctx context.Context) error {
		defer context.AfterFunc(ctx, s.Stop)()
		return s.Serve(l)
	})
	return l.Addr().String()
}

// rego is the policy engine as the federation's main adapts it.
type rego struct{}

func (rego) CompileAdmission(_ context.Context, bundles []policy.Bundle) (policy.Admitter, error) {
	set, faults := opa.Update(nil, bundles, opa.Limits{})
	if len(faults) > 0 {
		return nil, faults[0]
	}
	return set, nil
}

func (rego) Check(ctx context.Context, b policy.Bundle) []api.Violation { return opa.Check(ctx, b) }

type minter struct{ authority *ca.Authority }

func (m minter) MintJoinToken() (string, error) {
	token, _ := m.authority.NewToken()
	return token, nil
}

// images is a registry without a network, in which every image exists.
type images struct{}

func (images) Resolve(_ context.Context, image string) (string, error) {
	repository, _, _ := strings.Cut(strings.TrimPrefix(image, registry+"/"), ":")
	sum := sha256.Sum256([]byte(image))
	return registry + "/" + repository + "@sha256:" + hex.EncodeToString(sum[:]), nil
}

func (w *world) server(st store.Store, clusters server.Clusters, explain server.Explainer) (*server.Server, error) {
	return server.New(server.Config{
		Store: st, Fleet: fleetDomain, Log: w.log, Identify: trust.PeerID, Admission: rego{}, Policies: rego{},
		Resolver: images{}, Registries: []string{registry}, VirtualIPs: netip.MustParsePrefix(virtualIPs),
		Clusters: clusters, Explainer: explain, Tokens: minter{w.authority},
		ControlLoops: []string{control.PlaceLease}, ClusterLease: fleet.LeaseOf,
	})
}

// certificate is a control plane's own, from its authority.
func (w *world) certificate(authority *ca.Authority, dnsName string) *source.Source {
	own, err := source.New(source.Config{Log: w.log, Fetch: func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
		chain, err := authority.SignCSR(ctx, csr, ca.Request{
			ID:       identity.ID{Kind: identity.Control, TrustDomain: authority.TrustDomain()},
			DNSNames: []string{dnsName}, IncludeRoot: true,
		})
		return chain, authority.Bundle(), err
	}})
	w.must("make a source of certificates", err)
	_, err = own.Ensure(w.ctx)
	w.must("get a certificate", err)
	return own
}

func (w *world) addReplica(name string, st store.Store) {
	set := trust.NewSet()
	w.must("trust the fleet", set.Put(fleetDomain, w.authority.Bundle()))
	own := w.certificate(w.authority, federationName)
	links, err := fleet.New(fleet.Config{
		Store: st, Replica: name, Fleet: fleetDomain, VirtualIPs: virtualIPs, FleetBundle: w.authority.Bundle, Peer: trust.PeerID,
		OnBundles: func(bundles map[string][]byte) {
			if err := set.Replace(bundles); err != nil {
				w.b.Errorf("a trust bundle is broken: %v", err)
			}
		}, Log: w.log,
	})
	w.must("make the links", err)
	loops, err := control.New(control.Config{Store: st, Holder: name, Log: w.log})
	w.must("make the loops", err)
	srv, err := w.server(st, links, loops)
	w.must("make a server", err)
	tls := trust.ServerTLS(own.Certificate, set, trust.Options{OptionalClientCert: true})
	s := grpc.NewServer(append(srv.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)))...)
	srv.Register(s)
	links.Register(s)
	w.run(own.Run, links.Run, loops.Run, srv.Run)
	w.addresses = append(w.addresses, w.serve(s))
}

// connect dials the first replica as the admin.
func (w *world) connect() {
	pair, err := w.authority.Issue(w.ctx, ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: fleetDomain, Name: adminName}, TTL: 24 * time.Hour})
	w.must("issue the admin's certificate", err)
	set := trust.NewSet()
	w.must("trust the fleet", set.Put(fleetDomain, w.authority.Bundle()))
	tls := trust.ClientTLS(trust.Static(pair.TLS()), set, federationName, identity.ID{Kind: identity.Control, TrustDomain: fleetDomain}, trust.Options{})
	w.admin, err = grpc.NewClient("passthrough:///"+w.addresses[0], grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(tls)), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	w.must("dial the federation", err)
	w.b.Cleanup(func() { _ = w.admin.Close() })
}

// join redeems the token and gives the fleet's roots.
func (w *world) join(address, token string, authority *ca.Authority) []byte {
	_, root, err := attest.ParseToken(token)
	w.must("read the token", err)
	proof, err := authority.Prove(token)
	w.must("prove the token", err)
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(trust.JoinTLS(root, federationName, trust.Options{}))))
	w.must("dial to join", err)
	defer func() { _ = cc.Close() }()
	resp, err := linkv1.NewLinkServiceClient(cc).Join(w.ctx, &linkv1.JoinRequest{Token: token, Cluster: clusterID, Bundle: authority.Bundle(), Proof: proof})
	w.must("join", err)
	return resp.GetFleetBundle()
}

func (w *world) addCluster(token string) {
	authority, err := ca.Open(w.ctx, ca.Config{TrustDomain: identity.ClusterDomain(fleetDomain, clusterID), Storage: w.state, SealKey: make([]byte, 32)})
	w.must("open the cluster's authority", err)
	own := w.certificate(authority, "cluster."+authority.TrustDomain())
	above, below := trust.NewSet(), trust.NewSet()
	w.must("trust", errors.Join(above.Put(fleetDomain, w.join(w.addresses[0], token, authority)), below.Put(authority.TrustDomain(), authority.Bundle())))
	session := time.Now().UnixNano()
	mgr, err := manager.New(manager.Config{Store: w.state, Cluster: clusterID, CIDR: "10.100.0.0/16", Seed: uint64(session), Log: w.log})
	w.must("make the manager", err)
	d, err := dispatch.New(dispatch.Config{
		State: w.state, Facts: dispatch.Facts{Cluster: clusterID, Fleet: fleetDomain, VirtualIPs: virtualIPs},
		CA: authority, Manager: mgr, Peer: trust.PeerID, Log: w.log,
	})
	w.must("make the dispatch", err)
	upward := grpc.NewServer()
	d.RegisterUpward(upward)
	federation := identity.ID{Kind: identity.Control, TrustDomain: fleetDomain}
	l, err := link.New(link.Config{
		State: w.state, Cluster: clusterID, Fleet: fleetDomain, Session: session, Addresses: w.addresses[len(w.addresses)-1:],
		Dial: func(_ context.Context, address string) (distribute.Conn, error) {
			tls := trust.ClientTLS(own.Certificate, above, federationName, federation, trust.Options{})
			return grpc.NewClient("passthrough:///"+address, append(distribute.DialOptions(), grpc.WithNoProxy(),
				grpc.WithTransportCredentials(credentials.NewTLS(tls)),
				grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: 2 * time.Second}))...)
		},
		Serve: upward, Nacks: d.Nacks, Log: w.log,
	})
	w.must("make the link", err)
	w.run(own.Run, mgr.Run, d.Run, l.Run, func(ctx context.Context) error { <-ctx.Done(); upward.Stop(); return nil })
}

// addNodes puts nodes into the state, and says for them that they live: what the
// agents' sessions do.
func (w *world) addNodes() {
	facts := func(i int) *nodev1.NodeFacts {
		return &nodev1.NodeFacts{Address: fmt.Sprintf("172.16.0.%d", i+1), CpuMilli: 64000, MemoryBytes: 256 << 30}
	}
	name := func(i int) string { return fmt.Sprintf("n%d", i) }
	c := state.Change{}
	for i := range nodes {
		c.PutNodes = append(c.PutNodes, &clusterv1.Node{Node: name(i), ReplicaCidr: fmt.Sprintf("10.100.%d.0/24", i+1), Facts: facts(i)})
	}
	w.within("the nodes are known", func() bool {
		c.Base = w.state.Snapshot().Generation
		return w.state.Commit(w.ctx, c) == nil
	})
	report := func() error {
		for i := range nodes {
			err := w.state.Observe(name(i), &state.NodeStatus{
				Connected: true, LastSeen: time.Now(), Session: 1, Facts: facts(i), Applied: &nodev1.Watermark{},
				Allocations: map[string]*nodev1.AllocationStatus{}, Proxies: map[string]*nodev1.ProxyStatus{},
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	w.must("report", report())
	w.run(func(ctx context.Context) error {
		for t := time.NewTicker(500 * time.Millisecond); ; {
			select {
			case <-t.C:
				if err := report(); err != nil {
					return err
				}
			case <-ctx.Done():
				t.Stop()
				return nil
			}
		}
	})
}

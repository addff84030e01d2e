package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
)

// federation is a real one over TLS, on a store in memory.
type federation struct {
	store   *mem.Store
	fleet   *fleet.Fleet
	address string
	token   string
	stop    func()
}

func startFederation(t *testing.T) *federation {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	authority, err := ca.Open(ctx, ca.Config{TrustDomain: "portolan.internal", Storage: ca.DirStorage(t.TempDir()), SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.IssueServer(ctx, time.Hour, "federation.portolan.internal")
	if err != nil {
		t.Fatal(err)
	}
	set := trust.NewSet()
	f := &federation{store: mem.New(mem.Config{})}
	f.fleet, err = fleet.New(fleet.Config{
		Store: f.store, Replica: "fed-0", Fleet: "portolan.internal", VirtualIPs: "10.68.0.0/16", FleetBundle: authority.Bundle, Peer: trust.PeerID,
		OnBundles: func(b map[string][]byte) {
			if err := set.Replace(b); err != nil {
				t.Error(err)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(trust.ServerTLS(trust.Static(pair.TLS()), set, trust.Options{OptionalClientCert: true}))))
	f.fleet.Register(server)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.address = l.Addr().String()
	var hash string
	f.token, hash = authority.NewToken()
	if _, err := f.store.Update(ctx, func(tx store.Tx) error {
		if err := tx.Put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu", Spec: &portolanv1.ClusterSpec{Region: "eu-west"}}); err != nil {
			return err
		}
		return tx.Put(store.JoinToken, hash, &storev1.JoinToken{Cluster: "eu", ExpireTime: timestamppb.New(time.Now().Add(time.Minute))})
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.fleet.Run(ctx) }()
	go func() { _ = server.Serve(l) }()
	stopped := false
	f.stop = func() {
		if stopped {
			return
		}
		stopped = true
		server.Stop()
		cancel()
		if err := <-done; err != nil {
			t.Error("fleet:", err)
		}
	}
	t.Cleanup(f.stop)
	return f
}

// start runs the process until the returned function is called.
func start(t *testing.T, c *Config) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error("serve:", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func (f *federation) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatal("not within 30 s: " + what)
		}
	}
}

func adminConn(t *testing.T, c *Config) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+c.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func healthy(c *grpc.ClientConn) func() bool {
	return func() bool {
		r, err := grpc_health_v1.NewHealthClient(c).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{})
		return err == nil && r.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING
	}
}

// TestJoinServeAndLiveWithoutTheFederation runs the whole process on real parts: a
// federation over TLS, embedded etcd, a node that joins.
func TestJoinServeAndLiveWithoutTheFederation(t *testing.T) {
	f := startFederation(t)
	// Sockets have short names.
	dir, err := os.MkdirTemp("", "pc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := l.Addr().String()
	_ = l.Close()
	c := &Config{
		Cluster: "eu", DataDir: dir, Listen: []string{listen}, CIDR: "10.1.0.0/16", LogLevel: "error",
		Federation: Federation{ServerName: "federation.portolan.internal", Addresses: []string{f.address}, TokenFile: filepath.Join(dir, "token")},
	}
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	stop := start(t, c)
	// The token comes later than the process.
	if err := os.WriteFile(c.Federation.TokenFile, []byte(f.token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.eventually(t, "the cluster reports", func() bool {
		v, err := f.store.Leases(context.Background())
		for _, l := range v {
			if l.Name == fleet.LeaseOf("eu") && l.Progress > 0 {
				return true
			}
		}
		return err != nil
	})
	f.eventually(t, "the tunnel is open", func() bool { _, ok := f.fleet.Conn("eu"); return ok })
	cc, _ := f.fleet.Conn("eu")
	minted, err := linkv1.NewClusterAdminServiceClient(cc).CreateNodeJoinToken(t.Context(), &linkv1.CreateNodeJoinTokenRequest{Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	joinNode(t, listen, minted.GetToken())
	stop()
	f.stop()
	if err := os.Remove(c.Federation.TokenFile); err != nil {
		t.Fatal(err)
	}
	// Neither federation nor token: it starts all the same, with what it had.
	start(t, c)
	admin := adminConn(t, c)
	f.eventually(t, "it serves without the federation", healthy(admin))
	nodes, err := linkv1.NewClusterAdminServiceClient(admin).ListNodes(t.Context(), &linkv1.ListNodesRequest{})
	if err != nil || len(nodes.GetNodes()) != 1 || nodes.GetNodes()[0].GetName() != "clusters/eu/nodes/n1" {
		t.Errorf("nodes %v, %v", nodes, err)
	}
	if info, err := os.Stat(c.AdminSocket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the admin socket has mode %v (%v)", info.Mode(), err)
	}
}

// joinNode joins as a node does: knowing nothing but the token.
func joinNode(t *testing.T, address, token string) {
	t.Helper()
	_, root, err := attest.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	const name = "cluster.eu.portolan.internal"
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(trust.JoinTLS(root, name, trust.Options{}))))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cc.Close() }()
	key, csr, err := source.NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := nodev1.NewNodeServiceClient(cc).Join(t.Context(), &nodev1.JoinRequest{Token: token, Node: "n1", Csr: csr, Facts: &nodev1.NodeFacts{Address: "10.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetFleet() != "portolan.internal" || resp.GetReplicaCidr() != "10.1.1.0/24" {
		t.Errorf("answer %v", resp)
	}
	id, err := source.NewIdentity(key, resp.GetChain(), resp.GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	set := trust.NewSet()
	if err := set.Put(resp.GetTrustDomain(), resp.GetBundle()); err != nil {
		t.Fatal(err)
	}
	// With the certificate it may renew; without one, nobody may.
	mutual := credentials.NewTLS(trust.ClientTLS(trust.Static(id.TLS()), set, name, identity.ID{Kind: identity.Control, TrustDomain: resp.GetTrustDomain()}, trust.Options{}))
	known, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(mutual))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = known.Close() }()
	if _, err := nodev1.NewNodeServiceClient(known).Renew(t.Context(), &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Error("renew:", err)
	}
	if _, err := nodev1.NewNodeServiceClient(cc).Renew(t.Context(), &nodev1.RenewRequest{Csr: csr}); api.KindOf(err) != api.Unknown {
		t.Error("renew without a certificate:", err)
	}
}

func TestConfigNamesEveryFault(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cluster.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("cluster: Eu\nfederation: {serverName: fed, addresses: [a]}\nlisten: []\ncidr: 10.0.0.0/24\nnodeTimeout: 1ms\nlogLevel: loud\n")
	_, err := LoadConfig(file)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, field := range []string{"cluster", "dataDir", "federation.serverName", "federation.addresses[0]", "listen", "cidr", "nodeTimeout", "logLevel"} {
		if !strings.Contains(err.Error(), field+": ") {
			t.Errorf("%s is not named in %v", field, err)
		}
	}
	write("cluster: eu\nclutser: eu\n")
	if _, err := LoadConfig(file); err == nil || !strings.Contains(err.Error(), "clutser") {
		t.Errorf("an unknown field: %v", err)
	}
	write("cluster: eu\ndataDir: /d\nfederation: {serverName: federation.portolan.internal, addresses: ['10.0.0.1:7443']}\nlisten: [':7444']\ncidr: 10.1.0.0/16\n")
	c, err := LoadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Fleet() != "portolan.internal" || c.AdminSocket != "/d/admin.sock" || time.Duration(c.NodeTimeout) != 3*time.Second {
		t.Errorf("defaults %+v", c)
	}
}

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/process"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

const minimal = `
replica: one
dataDir: /var/lib/portolan
listen: ["127.0.0.1:8443"]
database: {url: "postgres://portolan@127.0.0.1/portolan"}
`

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "federation.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestConfigDefaults(t *testing.T) {
	c, err := LoadConfig(writeConfig(t, minimal))
	if err != nil {
		t.Fatal(err)
	}
	if c.Fleet != "portolan.internal" || c.VirtualIPs != "10.68.0.0/16" || c.Identity.Dir != "/var/lib/portolan/identity" ||
		c.Identity.SealKeyFile != "/var/lib/portolan/seal.key" || c.AdminSocket != "/var/lib/portolan/admin.sock" || time.Duration(c.LivenessTimeout) != 3*time.Second {
		t.Fatalf("%+v", c)
	}
}

func TestConfigNamesEveryFault(t *testing.T) {
	_, err := LoadConfig(writeConfig(t, "replica: One\nlisten: [nowhere]\nvirtualIPs: fd00::/8\nlogLevel: loud\nlivenessTimeout: 1ms\nregistries: {hosts: {x: {}}}\n"))
	for _, want := range []string{"replica", "dataDir", "listen[0]", "database.url", "virtualIPs", "logLevel", "livenessTimeout", "registries.hosts"} {
		if err == nil || !strings.Contains(err.Error(), want+":") {
			t.Errorf("no word of %s: %v", want, err)
		}
	}
	if _, err := LoadConfig(writeConfig(t, minimal+"colour: blue\n")); err == nil || !strings.Contains(err.Error(), "colour") {
		t.Errorf("an unknown field passes: %v", err)
	}
	if _, err := LoadConfig(writeConfig(t, minimal+"livenessTimeout: 3\n")); err == nil {
		t.Error("a duration without a unit passes")
	}
}

func TestServerCertificateIsNobodysIdentity(t *testing.T) {
	dir := t.TempDir()
	c := &Config{DataDir: dir}
	c.SetDefaults()
	for _, name := range []string{"federation.portolan.internal", "cluster.eu-west.portolan.internal", "portolan.internal", "registry.example.org"} {
		if err := issueServerCert(t.Context(), c, name, filepath.Join(dir, "out"), time.Hour); err == nil {
			t.Errorf("%s was issued", name)
		}
	}
	if err := issueServerCert(t.Context(), c, "registry.portolan.internal", filepath.Join(dir, "out"), time.Hour); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "out", "cert.pem"), filepath.Join(dir, "out", "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.Parse(pair.Leaf.URIs[0].String()); err != nil || id.Kind != identity.User {
		t.Fatal(id, err)
	}
}

// TestProcess runs the whole replica on the store in memory, over real TLS.
func TestProcess(t *testing.T) {
	dir := t.TempDir()
	c := &Config{Replica: "one", DataDir: dir}
	c.SetDefaults()
	log := slog.New(slog.DiscardHandler)
	authority, err := openAuthority(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	st := mem.New(mem.Config{})
	srv, err := newServer(c, st, authority, server.NewRegistryResolver(server.ResolverConfig{}), nil, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Bootstrap(t.Context(), "root"); err != nil {
		t.Fatal(err)
	}
	p, err := wire(c, st, authority, log)
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := process.Listen([]string{"127.0.0.1:0", "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	admin, err := process.ListenAdmin(c.AdminSocket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, listeners, admin) }()

	call, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	dial := func(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
		cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cc.Close() })
		return cc
	}
	state, err := grpc_health_v1.NewHealthClient(dial("unix://"+c.AdminSocket, insecure.NewCredentials())).Watch(call, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := state.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING {
			break
		}
	}
	pair, err := authority.Issue(t.Context(), ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: c.Fleet, Name: "root"}})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.Root())
	conf := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: "federation." + c.Fleet}
	anonymous := dial(listeners[0].Addr().String(), credentials.NewTLS(conf.Clone()))
	conf.Certificates = []tls.Certificate{*pair.TLS()}
	root := dial(listeners[1].Addr().String(), credentials.NewTLS(conf))
	got, err := portolanv1.NewTenantServiceClient(root).GetTenant(call, &portolanv1.GetTenantRequest{Name: "tenants/" + api.SystemTenant}, grpc.WaitForReady(true))
	if err != nil || got.GetUid() == "" {
		t.Fatal(got, err)
	}
	if _, err := portolanv1.NewTenantServiceClient(anonymous).GetTenant(call, &portolanv1.GetTenantRequest{Name: "tenants/system"}); status.Code(err) != codes.Unauthenticated {
		t.Fatal(err)
	}
	// The placing loop has the lease and looks at every revision.
	wait, err := portolanv1.NewConvergenceServiceClient(root).WaitConverged(call, &portolanv1.WaitConvergedRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := wait.Recv(); err != nil || !m.GetConverged() || !m.GetFinal() {
		t.Fatal(m, err)
	}
	// Join is for those who have no certificate yet, and is refused by the link itself.
	if _, err := linkv1.NewLinkServiceClient(anonymous).Join(call, &linkv1.JoinRequest{Token: "ptj1_none"}); err == nil || status.Code(err) == codes.Unauthenticated && strings.Contains(err.Error(), "certificate") {
		t.Fatalf("join was stopped before the link saw it: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

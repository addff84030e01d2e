package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/process"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store/cockroach"
	"github.com/portolan-io/portolan/federation/store/storetest/pgtest"
)

// replica runs one replica on a database until the test ends, and gives a
// connection as the admin whose files are in out.
func replica(t *testing.T, c *Config, out string) *grpc.ClientConn {
	t.Helper()
	authority, err := openAuthority(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	st, err := cockroach.Open(t.Context(), cockroach.Config{URL: c.Database.URL, Log: log, Holder: c.Replica})
	if err != nil {
		t.Fatal(err)
	}
	p, err := wire(c, st, authority, log)
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := process.Listen([]string{"127.0.0.1:0"})
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
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, st.Close()); err != nil {
			t.Error(err)
		}
	})
	pair, err := tls.LoadX509KeyPair(filepath.Join(out, "cert.pem"), filepath.Join(out, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.Root())
	cc, err := grpc.NewClient(listeners[0].Addr().String(), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: "federation." + c.Fleet, Certificates: []tls.Certificate{pair},
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// TestTwoReplicasOnPostgres: both write at once, and what they leave is one
// history, with one audit log that is whole.
func TestTwoReplicasOnPostgres(t *testing.T) {
	const tenants = 16
	dir := t.TempDir()
	url := pgtest.Postgres(t).Database(t)
	out := filepath.Join(dir, "out")
	config := func(name string) *Config {
		c := &Config{Replica: name, DataDir: filepath.Join(dir, name), Database: Database{URL: url}, Identity: Identity{Dir: filepath.Join(dir, "pki"), SealKeyFile: filepath.Join(dir, "seal.key")}}
		c.SetDefaults()
		return c
	}
	for range 2 {
		if err := bootstrap(t.Context(), config("one"), "root", out); err != nil {
			t.Fatal(err)
		}
	}
	conns := []*grpc.ClientConn{replica(t, config("one"), out), replica(t, config("two"), out)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 2 * tenants {
		wg.Go(func() {
			// Each tenant is asked for at both replicas; one of them makes it.
			_, err := portolanv1.NewTenantServiceClient(conns[i%2]).CreateTenant(ctx, &portolanv1.CreateTenantRequest{Tenant: &portolanv1.Tenant{Name: fmt.Sprintf("tenants/t%d", i/2)}})
			if err != nil && status.Code(err) != codes.AlreadyExists {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	list, err := portolanv1.NewTenantServiceClient(conns[1]).ListTenants(ctx, &portolanv1.ListTenantsRequest{})
	if err != nil || len(list.GetTenants()) != tenants+1 {
		t.Fatal(len(list.GetTenants()), err)
	}
	log, err := portolanv1.NewAuditServiceClient(conns[0]).ListAuditEntries(ctx, &portolanv1.ListAuditEntriesRequest{PageSize: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if err := server.VerifyAudit(log.GetAuditEntries()); err != nil {
		t.Fatal(err)
	}
	// Bootstrap, the changes, and some of the refusals.
	if n := len(log.GetAuditEntries()); n < 3+tenants+1 {
		t.Fatalf("%d audit entries", n)
	}
	wait, err := portolanv1.NewConvergenceServiceClient(conns[1]).WaitConverged(ctx, &portolanv1.WaitConvergedRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := wait.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetFinal() {
			if !m.GetConverged() {
				t.Fatal(m)
			}
			break
		}
	}
}

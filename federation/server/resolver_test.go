package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
)

// authority is a throw-away root.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	cert := must[*x509.Certificate](t)(x509.ParseCertificate(must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key))))
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

func (a *authority) issue(t *testing.T, uri string, dns ...string) tls.Certificate {
	t.Helper()
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), DNSNames: dns,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if uri != "" {
		tmpl.URIs = []*url.URL{must[*url.URL](t)(url.Parse(uri))}
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestResolverOnARealRegistry(t *testing.T) {
	a := newAuthority(t)
	var asked, redirect atomic.Int64
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if redirect.Load() > 0 {
			http.Redirect(w, r, "https://elsewhere.example"+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{a.issue(t, "", "registry.portolan.internal")}, MinVersion: tls.VersionTLS12}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	addr := srv.Listener.Addr().String()
	cfg := ResolverConfig{Allow: []string{testRegistry}, Hosts: map[string]RegistryHost{testRegistry: {Address: addr, Roots: a.pool}}, CacheFor: time.Minute}
	r := NewRegistryResolver(cfg)

	pushed, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref := must[name.Reference](t)(name.ParseReference(testImage))
	if err := remote.Write(ref, pushed, remote.WithTransport(r.trip)); err != nil {
		t.Fatal(err)
	}
	digest, err := pushed.Digest()
	if err != nil {
		t.Fatal(err)
	}
	want := testRegistry + "/app@" + digest.String()
	if got := must[string](t)(r.Resolve(t.Context(), testImage)); got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
	before := asked.Load()
	must[string](t)(r.Resolve(t.Context(), testImage))
	if asked.Load() != before {
		t.Fatal("a tag that was just resolved was asked again")
	}
	if _, err := r.Resolve(t.Context(), testRegistry+"/app:9"); api.KindOf(err) != api.NotFound {
		t.Fatal(err)
	}
	if got := must[string](t)(r.Resolve(t.Context(), want)); got != want {
		t.Fatal(got)
	}
	if _, err := r.Resolve(t.Context(), "evil.example/app:1"); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "list of registries") {
		t.Fatal(err)
	}
	redirect.Store(1)
	if _, err := r.Resolve(t.Context(), testRegistry+"/app:2"); api.KindOf(err) != api.Unavailable || !strings.Contains(err.Error(), "elsewhere.example is not on") {
		t.Fatal(err)
	}
	cfg.Hosts = map[string]RegistryHost{testRegistry: {Address: addr, Roots: newAuthority(t).pool}}
	if _, err := NewRegistryResolver(cfg).Resolve(t.Context(), testImage); api.KindOf(err) != api.Unavailable {
		t.Fatalf("a registry with foreign roots was believed: %v", err)
	}
}

// TestCallersByCertificate runs the interceptors over real TLS.
func TestCallersByCertificate(t *testing.T) {
	a := newAuthority(t)
	e := newEnv(t, func(c *Config) { c.Identify = nil })
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	creds := credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{a.issue(t, "", "federation."+testFleet)}, ClientCAs: a.pool, ClientAuth: tls.VerifyClientCertIfGiven,
	})
	g := grpc.NewServer(append(e.server.ServerOptions(), grpc.Creds(creds))...)
	e.server.Register(g)
	grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	dial := func(certs ...tls.Certificate) *grpc.ClientConn {
		cc := must[*grpc.ClientConn](t)(grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: a.pool, ServerName: "federation." + testFleet, Certificates: certs,
		}))))
		t.Cleanup(func() { _ = cc.Close() })
		return cc
	}
	list := func(cc *grpc.ClientConn) error {
		_, err := portolanv1.NewTenantServiceClient(cc).ListTenants(t.Context(), &portolanv1.ListTenantsRequest{})
		return err
	}
	nobody := dial()
	wantCode(t, list(nobody), codes.Unauthenticated)
	if _, err := grpc_health_v1.NewHealthClient(nobody).Check(context.Background(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatalf("health: %v", err)
	}
	for uri, want := range map[string]codes.Code{
		"spiffe://" + testFleet + "/user/root":              codes.OK,
		"spiffe://" + testFleet + "/user/eve":               codes.PermissionDenied,
		"spiffe://" + testFleet + "/control":                codes.PermissionDenied,
		"spiffe://eu-west." + testFleet + "/user/root":      codes.PermissionDenied,
		"spiffe://" + testFleet + "/tenant/a/workload/root": codes.PermissionDenied,
		"https://" + testFleet + "/user/root":               codes.Unauthenticated,
		"":                                                  codes.Unauthenticated,
		(identity.ID{Kind: identity.Node, TrustDomain: "eu-west." + testFleet, Name: "root"}).String(): codes.PermissionDenied,
	} {
		wantCode(t, list(dial(a.issue(t, uri, "client.example"))), want)
	}
}

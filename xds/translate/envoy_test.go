package translate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// envoyPath finds Envoy in $ENVOY or on PATH.
var envoyPath = sync.OnceValue(func() string {
	if p := os.Getenv("ENVOY"); p != "" {
		return p
	}
	p, err := exec.LookPath("envoy")
	if err != nil {
		return ""
	}
	return p
})

// authority is a throw-away CA of one trust domain.
type authority struct {
	domain string
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	root   string // PEM
}

func newAuthority(domain string) *authority {
	a := &authority{domain: domain}
	a.key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{must(url.Parse("spiffe://" + domain))},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key))
	a.cert = must(x509.ParseCertificate(der))
	a.root = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// issue makes the identity secret of a path in the domain.
func (a *authority) issue(id string) *tlsv3.Secret {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{must(url.Parse(id))}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key))
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
	return &tlsv3.Secret{Name: SecretIdentity, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chain), PrivateKey: inline(private),
	}}}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var (
	testAuthority = newAuthority("eu-west.portolan.internal")
	testRoot      = testAuthority.root
)

// acceptedByEnvoy puts a proxy's resources into a static bootstrap, so that Envoy
// reads every byte of them, and lets Envoy validate it.
func acceptedByEnvoy(t *testing.T, where string, res Resources) {
	t.Helper()
	if envoyPath() == "" {
		return // TestEnvoyRefuses is skipped then, and says so
	}
	if err := envoyValidates(t, res); err != nil {
		t.Errorf("%s: Envoy does not accept the configuration: %v", where, err)
	}
}

func envoyValidates(t *testing.T, res Resources) error {
	t.Helper()
	b := &bootstrapv3.Bootstrap{Node: &corev3.Node{Id: "test", Cluster: "test"}, StaticResources: &bootstrapv3.Bootstrap_StaticResources{}}
	s := b.GetStaticResources()
	endpoints, routes := map[string]*endpointv3.ClusterLoadAssignment{}, map[string]*routev3.RouteConfiguration{}
	for _, r := range res[EndpointType] {
		endpoints[r.Name] = r.Message.(*endpointv3.ClusterLoadAssignment)
	}
	for _, r := range res[RouteType] {
		routes[r.Name] = r.Message.(*routev3.RouteConfiguration)
	}
	for _, r := range res[SecretType] {
		s.Secrets = append(s.Secrets, r.Message.(*tlsv3.Secret))
	}
	s.Secrets = append(s.Secrets, testAuthority.issue("spiffe://eu-west.portolan.internal/tenant/shop/workload/web"))
	for _, r := range res[ClusterType] {
		s.Clusters = append(s.Clusters, staticCluster(t, r, endpoints))
	}
	for _, r := range res[ListenerType] {
		s.Listeners = append(s.Listeners, staticListener(t, r, routes))
	}
	file := filepath.Join(t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(file, must(protojson.Marshal(b)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, envoyPath(), "--mode", "validate", "-c", file, "--log-level", "error", "--disable-hot-restart", "--concurrency", "1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "OK") {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

func staticCluster(t *testing.T, r *Resource, endpoints map[string]*endpointv3.ClusterLoadAssignment) *clusterv3.Cluster {
	t.Helper()
	c := proto.Clone(r.Message).(*clusterv3.Cluster)
	if c.GetEdsClusterConfig() != nil {
		c.EdsClusterConfig, c.ClusterDiscoveryType = nil, &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		if c.LoadAssignment = endpoints[c.GetName()]; c.GetLoadAssignment() == nil {
			t.Errorf("cluster %s has no endpoint set", c.GetName())
		}
	}
	staticTLS(c.GetTransportSocket())
	return c
}

func staticListener(t *testing.T, r *Resource, routes map[string]*routev3.RouteConfiguration) *listenerv3.Listener {
	t.Helper()
	l := proto.Clone(r.Message).(*listenerv3.Listener)
	for _, chain := range l.GetFilterChains() {
		staticTLS(chain.GetTransportSocket())
		for _, f := range chain.GetFilters() {
			hcm := &hcmv3.HttpConnectionManager{}
			if f.GetTypedConfig().UnmarshalTo(hcm) != nil {
				continue
			}
			config := routes[hcm.GetRds().GetRouteConfigName()]
			if config == nil {
				t.Errorf("listener %s needs route configuration %s, which is missing", r.Name, hcm.GetRds().GetRouteConfigName())
			}
			hcm.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: config}
			f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(hcm)}
		}
	}
	return l
}

// staticTLS makes references to secrets static ones.
func staticTLS(s *corev3.TransportSocket) {
	if s == nil {
		return
	}
	m := must(s.GetTypedConfig().UnmarshalNew())
	var common *tlsv3.CommonTlsContext
	switch m := m.(type) {
	case *tlsv3.UpstreamTlsContext:
		common = m.GetCommonTlsContext()
	case *tlsv3.DownstreamTlsContext:
		common = m.GetCommonTlsContext()
	}
	for _, c := range common.GetTlsCertificateSdsSecretConfigs() {
		c.SdsConfig = nil
	}
	if c := common.GetValidationContextSdsSecretConfig(); c != nil {
		c.SdsConfig = nil
	}
	if c := common.GetCombinedValidationContext().GetValidationContextSdsSecretConfig(); c != nil {
		c.SdsConfig = nil
	}
	s.ConfigType = &corev3.TransportSocket_TypedConfig{TypedConfig: must(anypb.New(m))}
}

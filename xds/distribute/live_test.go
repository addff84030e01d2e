package distribute_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/xds/distribute"
	"github.com/portolan-io/portolan/xds/model"
	"github.com/portolan-io/portolan/xds/translate"
)

// Live tests run real Envoys on loopback addresses: 127.68.0.0/16 are the
// virtual IPs, 127.1.0.x the replicas, 127.11.0.x their applications. Capture by
// nftables is replaced by listeners on the very addresses, which is all that
// "local" below changes in the translated resources.
const (
	vip      = "127.68.0.2"
	vipPort  = 28080
	tcpPort  = 28081
	appPort  = 29000
	echoPort = 29001
	domain   = "eu-west.portolan.internal"
)

type mesh struct {
	t      *testing.T
	envoy  string
	dir    string
	key    *ecdsa.PrivateKey
	ca     *x509.Certificate
	root   []byte
	cache  *distribute.Cache
	deny   atomic.Bool
	checks sync.Map // what the authorizer was told, by protocol
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	path := os.Getenv("ENVOY")
	if path == "" {
		p, err := exec.LookPath("envoy")
		if err != nil {
			t.Skip("missing: envoy (set ENVOY or put it on PATH)")
		}
		path = p
	}
	dir, err := os.MkdirTemp("", "plx") // short: it holds Unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &mesh{t: t, envoy: path, dir: dir, cache: distribute.NewCache(distribute.CacheConfig{Rules: distribute.EnvoyRules()})}
	m.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	m.ok(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: domain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, m.key.Public(), m.key)
	m.ok(err)
	m.ca, err = x509.ParseCertificate(der)
	m.ok(err)
	m.root = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return m
}

func (m *mesh) ok(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// identity is the secret "default" of a workload.
func (m *mesh) identity(workload string) *distribute.Resource {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	m.ok(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/tenant/shop/workload/" + workload}}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, m.ca, key.Public(), m.key)
	m.ok(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	m.ok(err)
	data := func(kind string, b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})}}
	}
	r, err := distribute.NewResource(distribute.SecretType, translate.SecretIdentity, &tlsv3.Secret{
		Name: translate.SecretIdentity, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: data("CERTIFICATE", der), PrivateKey: data("PRIVATE KEY", private),
		}},
	})
	m.ok(err)
	return r
}

// Check is the authorizer of every proxy.
func (m *mesh) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	p := strings.Join(md.Get(translate.MetaPrefix+translate.ExtProtocol), ",")
	m.checks.Store(p, fmt.Sprintf("%s -> %s:%s http=%v", req.GetAttributes().GetSource().GetPrincipal(),
		strings.Join(md.Get(translate.MetaPrefix+translate.ExtService), ","), strings.Join(md.Get(translate.MetaPrefix+translate.ExtPort), ","),
		req.GetAttributes().GetContextExtensions()))
	code := codes.OK
	if m.deny.Load() {
		code = codes.PermissionDenied
	}
	return &authv3.CheckResponse{Status: &rpcstatus.Status{Code: int32(code)}}, nil
}

// serve gives a proxy its socket.
func (m *mesh) serve(id string) string {
	m.t.Helper()
	path := filepath.Join(m.dir, id+".sock")
	lis, err := net.Listen("unix", path)
	m.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	g := grpc.NewServer()
	distribute.NewServer(ctx, distribute.ServerConfig{Cache: m.cache, Identify: func(context.Context, *corev3.Node) (string, error) { return id, nil }}).Register(g)
	authv3.RegisterAuthorizationServer(g, m)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(lis) }()
	m.t.Cleanup(func() { cancel(); g.Stop(); <-done })
	return path
}

// start runs an Envoy until the test ends.
func (m *mesh) start(id string) string {
	m.t.Helper()
	path := m.serve(id)
	bootstrap := fmt.Sprintf(`{
 "node": {"id": %q, "cluster": "test"},
 "admin": {"address": {"pipe": {"path": %q}}},
 "dynamic_resources": {
  "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
  "cds_config": {"ads": {}, "resource_api_version": "V3"}, "lds_config": {"ads": {}, "resource_api_version": "V3"}},
 "static_resources": {"clusters": [{"name": "xds", "connect_timeout": "1s",
  "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}},
  "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": %q}}}}]}]}}]}
}`, id, filepath.Join(m.dir, id+".admin"), path)
	file := filepath.Join(m.dir, id+".json")
	m.ok(os.WriteFile(file, []byte(bootstrap), 0o600))
	logs, err := os.Create(filepath.Join(m.dir, id+".log"))
	m.ok(err)
	cmd := exec.Command(m.envoy, "-c", file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
	cmd.Stdout, cmd.Stderr = logs, logs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also when the test is killed
	m.ok(cmd.Start())
	m.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = logs.Close()
		if m.t.Failed() {
			b, _ := os.ReadFile(logs.Name())
			m.t.Logf("log of %s:\n%s", id, b)
		}
	})
	return path
}

// app is an HTTP application that says its version and who called.
func (m *mesh) app(version, address string) {
	m.t.Helper()
	lis, err := net.Listen("tcp", address)
	m.ok(err)
	srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s %s", version, r.Header.Get("X-Forwarded-Client-Cert"), r.URL.Path)
	})}
	go func() { _ = srv.Serve(lis) }()
	m.t.Cleanup(func() { _ = srv.Close() })
}

func (m *mesh) echo(address string) {
	m.t.Helper()
	lis, err := net.Listen("tcp", address)
	m.ok(err)
	go func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	m.t.Cleanup(func() { _ = lis.Close() })
}

// input is the mesh: catalog in two revisions with a weight, over HTTP and TCP.
func (m *mesh) input(weight int32, remoteOnly bool) model.Input {
	in := model.Input{
		Config:  &nodev1.NodeConfig{Cluster: "eu-west", Region: "eu", Zone: "a", Fleet: "portolan.internal", TrustDomain: domain},
		Bundles: []*linkv1.TrustBundle{{TrustDomain: domain, X509Roots: m.root}},
		Services: []*nodev1.MeshService{
			{Tenant: "shop", Service: "catalog", Workload: "catalog", VirtualIp: vip, Clusters: []string{"eu-west"}, Ports: []*portolanv1.ServicePort{
				{Name: "http", Port: vipPort, TargetPort: appPort}, {Name: "echo", Port: tcpPort, TargetPort: echoPort, Protocol: portolanv1.PortProtocol_PORT_PROTOCOL_TCP},
			}},
		},
		Endpoints: []*nodev1.MeshEndpoints{{Tenant: "shop", Service: "catalog", Endpoints: []*nodev1.Endpoint{
			{Allocation: "v1", Address: "127.1.0.1", Revision: "v1"}, {Allocation: "v2", Address: "127.1.0.2", Revision: "v2"},
		}}},
		Routes: []*nodev1.MeshRoute{{Tenant: "shop", Route: "catalog", Spec: &portolanv1.RouteSpec{Service: "catalog", Rules: []*portolanv1.RouteRule{{
			Backends: []*portolanv1.RouteBackend{{Revision: "v1", Weight: weight}, {Revision: "v2", Weight: 100 - weight}},
		}}}}},
	}
	if remoteOnly {
		var ports []*linkv1.ExportedPort
		for _, rev := range []string{"", "v1", "v2"} {
			ports = append(ports, &linkv1.ExportedPort{Port: "http", Revision: rev, ReadyReplicas: 1})
		}
		in.Endpoints = []*nodev1.MeshEndpoints{{Tenant: "shop", Service: "catalog", Remote: []*linkv1.ServiceExport{{
			Cluster: "us-east", Tenant: "shop", Service: "catalog", Healthy: true, Gateways: []string{"127.2.0.1:15443"}, Ports: ports,
		}}}}
	}
	return in
}

// push translates for a proxy and hands it to the cache in one step.
func (m *mesh) push(in model.Input, p translate.Proxy, identity *distribute.Resource, extra ...*distribute.Resource) {
	m.t.Helper()
	g, problems := model.Build(in)
	if len(problems) > 0 {
		m.t.Fatal(problems)
	}
	res, problems := translate.Translate(g, p)
	if len(problems) > 0 {
		m.t.Fatal(problems)
	}
	sets := map[string][]*distribute.Resource{}
	for typeURL, list := range res {
		sets[typeURL] = nil
		for _, r := range list {
			out, err := distribute.NewResource(typeURL, r.Name, local(p, r.Message))
			m.ok(err)
			sets[typeURL] = append(sets[typeURL], out)
		}
	}
	for _, r := range append(extra, identity) {
		if r != nil {
			sets[r.Type] = append(sets[r.Type], r)
		}
	}
	m.cache.SetAll(p.ID, sets)
}

// local puts listeners on the addresses that capture would have hidden.
func local(p translate.Proxy, msg proto.Message) proto.Message {
	at := func(address string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	msg = proto.Clone(msg)
	switch x := msg.(type) {
	case *listenerv3.Listener:
		ports := map[string][2]uint32{"outbound": {vipPort, tcpPort}, "inbound": {appPort, echoPort}}[x.GetName()]
		address := p.Address.String()
		if x.GetName() == "outbound" && p.ID == "web" {
			address = vip // nobody else calls
		}
		if ports[0] == 0 {
			break
		}
		x.Address = at(address, ports[0])
		x.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: at(address, ports[1])}}
		x.ListenerFilters = x.GetListenerFilters()[1:] // without original_dst
	case *clusterv3.Cluster:
		if strings.HasPrefix(x.GetName(), "inbound/") {
			a := x.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints()[0].GetEndpoint().GetAddress().GetSocketAddress()
			a.Address = "127.1" + strings.TrimPrefix(p.Address.String(), "127.") // 127.1.0.x → 127.11.0.x
		}
	}
	return msg
}

// call makes one request; its own connection each time unless client keeps one.
func call(client *http.Client) (int, string, error) {
	resp, err := client.Get(fmt.Sprintf("http://%s:%d/x", vip, vipPort))
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func (m *mesh) eventually(what string, f func() bool) {
	m.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			m.t.Fatalf("did not come about: %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func TestLiveEnvoys(t *testing.T) {
	m := newMesh(t)
	proxy := func(id, workload, address string) translate.Proxy {
		p := translate.Proxy{ID: id, Tenant: "shop", Workload: workload, Role: translate.Sidecar, Address: netip.MustParseAddr(address)}
		p.AuthzSocket = m.start(id)
		return p
	}
	web, v1, v2 := proxy("web", "web", "127.1.0.9"), proxy("v1", "catalog", "127.1.0.1"), proxy("v2", "catalog", "127.1.0.2")
	gw := translate.Proxy{ID: "gw", Role: translate.EastWest, Address: netip.MustParseAddr("127.2.0.1")}
	m.start("gw")
	ids := map[string]*distribute.Resource{"web": m.identity("web"), "catalog": m.identity("catalog")}
	m.app("v1", "127.11.0.1:29000")
	m.app("v2", "127.11.0.2:29000")
	m.echo("127.11.0.1:29001")
	m.push(m.input(90, false), v1, ids["catalog"])
	m.push(m.input(90, false), v2, ids["catalog"])
	m.push(m.input(90, false), gw, nil)
	m.push(m.input(90, false), web, ids["web"])
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	defer client.CloseIdleConnections()
	var last string
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("first answers ended with", last)
		}
	})
	m.eventually("the first answer", func() bool {
		code, answer, err := call(client)
		last = fmt.Sprintf("%d %q %v", code, answer, err)
		return err == nil && code == 200
	})
	m.eventually("everything is acknowledged", func() bool {
		for _, id := range []string{"web", "v1", "v2", "gw"} {
			if st, ok := m.cache.Status(id); !ok || !st.Connected || st.Pending != 0 || len(st.Nacks) > 0 {
				return false
			}
		}
		return true
	})

	t.Run("identity", func(t *testing.T) {
		_, answer, err := call(client)
		if want := "URI=spiffe://" + domain + "/tenant/shop/workload/web"; err != nil || !strings.Contains(answer, want) {
			t.Errorf("answer %q, want %s: %v", answer, want, err)
		}
		told, _ := m.checks.Load("http")
		if s := fmt.Sprint(told); !strings.Contains(s, "/workload/web -> catalog:29000") || !strings.Contains(s, "protocol:http") {
			t.Errorf("the authorizer was told %q", s)
		}
	})
	t.Run("plaintext is refused", func(t *testing.T) {
		for _, address := range []string{"127.1.0.1:29000", "127.1.0.1:29001"} {
			resp, err := (&http.Client{Timeout: 5 * time.Second}).Get("http://" + address)
			if err == nil {
				_ = resp.Body.Close()
				t.Errorf("plaintext to %s was answered with %d", address, resp.StatusCode)
			}
		}
	})
	t.Run("canary", func(t *testing.T) { testCanary(t, m, client, web, ids["web"]) })
	t.Run("tcp", func(t *testing.T) { testTCP(t, m) })
	t.Run("denial", func(t *testing.T) {
		m.deny.Store(true)
		if code, _, err := call(client); code != 403 || err != nil {
			t.Errorf("a denied request got %d %v", code, err)
		}
		m.deny.Store(false)
		if code, _, err := call(client); code != 200 || err != nil {
			t.Errorf("an allowed request got %d %v", code, err)
		}
	})
	t.Run("a bad resource is quarantined alone", func(*testing.T) { testBadResource(m, client, web, ids["web"]) })
	t.Run("across the east-west gateway", func(t *testing.T) {
		m.push(m.input(100, true), web, ids["web"])
		m.eventually("the change is taken", func() bool { st, _ := m.cache.Status("web"); return st.Pending == 0 })
		_, answer, err := call(client)
		if err != nil || !strings.HasPrefix(answer, "v1") || !strings.Contains(answer, "/tenant/shop/workload/web") {
			t.Errorf("answer %q: %v", answer, err)
		}
	})
}

// testBadResource: what a proxy refuses is known by name, and all else is served.
func testBadResource(m *mesh, client *http.Client, web translate.Proxy, id *distribute.Resource) {
	m.t.Helper()
	bad, err := distribute.NewResource(distribute.ClusterType, "bad", &clusterv3.Cluster{
		Name: "bad", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}, ConnectTimeout: durationpb.New(time.Second),
	})
	m.ok(err)
	worse, err := distribute.NewResource(distribute.ClusterType, "worse", &clusterv3.Cluster{Name: "worse", ConnectTimeout: durationpb.New(-time.Second)})
	m.ok(err)
	m.push(m.input(100, false), web, id, bad, worse)
	m.eventually("both are refused by name", func() bool {
		st, _ := m.cache.Status("web")
		return len(st.Nacks) == 2 && st.Nacks[0].Name == "bad" && st.Nacks[1].Name == "worse" && st.Pending == 2
	})
	m.eventually("the others are served", func() bool {
		_, answer, _ := call(client)
		return strings.HasPrefix(answer, "v1")
	})
	m.push(m.input(0, false), web, id)
	m.eventually("nothing is refused", func() bool {
		st, _ := m.cache.Status("web")
		return len(st.Nacks) == 0 && st.Pending == 0
	})
}

// testCanary changes weights under load: no request fails, and the shares are
// those asked for.
func testCanary(t *testing.T, m *mesh, client *http.Client, web translate.Proxy, id *distribute.Resource) {
	// The bounds of the shares are more than three and a half standard deviations
	// of as many requests away.
	const workers, requests = 8, 2000
	counts := func() (v1, v2 int) {
		var a, b, failed atomic.Int64
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for range requests / workers {
					code, answer, err := call(client)
					switch {
					case err != nil || code != 200:
						failed.Add(1)
						t.Logf("failed: %d %q %v", code, answer, err)
					case strings.HasPrefix(answer, "v1"):
						a.Add(1)
					default:
						b.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if failed.Load() > 0 {
			t.Errorf("%d requests failed", failed.Load())
		}
		return int(a.Load()), int(b.Load())
	}
	a, b := counts()
	t.Logf("90/10: %d/%d", a, b)
	if share := float64(b) / float64(a+b); share < 0.075 || share > 0.125 {
		t.Errorf("v2 has %.3f of the traffic, want 0.10", share)
	}
	took := make(chan time.Duration, 1)
	go func() { // in the middle of the load
		<-time.After(200 * time.Millisecond)
		start := time.Now()
		m.push(m.input(50, false), web, id)
		for {
			if st, _ := m.cache.Status("web"); st.Pending == 0 {
				took <- time.Since(start)
				return
			}
			<-time.After(time.Millisecond)
		}
	}()
	counts()
	t.Logf("change acknowledged in %s", <-took)
	a, b = counts()
	t.Logf("50/50: %d/%d", a, b)
	if share := float64(b) / float64(a+b); share < 0.46 || share > 0.54 {
		t.Errorf("v2 has %.3f of the traffic, want 0.50", share)
	}
}

func testTCP(t *testing.T, m *mesh) {
	// v2 has no echo application: connections to it end at once.
	for i := 0; ; i++ {
		c, err := net.Dial("tcp", net.JoinHostPort(vip, fmt.Sprint(tcpPort)))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 5)
		_, err = io.WriteString(c, "hello")
		if err == nil {
			_, err = io.ReadFull(c, buf)
		}
		_ = c.Close()
		if err == nil && string(buf) == "hello" {
			break
		}
		if i > 50 {
			t.Fatalf("no echo: %v", err)
		}
	}
	told, _ := m.checks.Load("tcp")
	if s := fmt.Sprint(told); !strings.Contains(s, "/workload/web -> catalog:29001") {
		t.Errorf("the authorizer was told %q", s)
	}
}

package warden

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/e2e/ownns"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/envoy"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/xds/distribute"
)

func TestMain(m *testing.M) { ownns.Main(m) }

func envoyBinary(t *testing.T) string {
	t.Helper()
	if p := os.Getenv("ENVOY"); p != "" {
		return p
	}
	p, err := exec.LookPath("envoy")
	if err != nil {
		t.Skip("needs envoy: set ENVOY to the binary, or put it into PATH")
	}
	return p
}

const (
	fleet  = "portolan.internal"
	domain = "eu-west." + fleet
)

// testCA is a CA of one trust domain.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newCA(t *testing.T, trustDomain string) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: trustDomain}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue writes key.pem and chain.pem of an identity into dir.
func (a *testCA) issue(t *testing.T, dir, spiffeID string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := url.Parse(spiffeID)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"key.pem": {Type: "PRIVATE KEY", Bytes: pkcs8}, "chain.pem": {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// lines is a toy policy: each file holds "source destination" pairs of
// workloads that may call; "broken" does not compile.
type lines map[string]bool

func compileLines(_ context.Context, bundles []policy.Bundle) (policy.Authorizer, error) {
	out := lines{}
	for _, b := range bundles {
		for _, content := range b.Files {
			if strings.Contains(content, "broken") {
				return nil, fmt.Errorf("%s does not parse", b.Name)
			}
			for line := range strings.Lines(content) {
				out[strings.TrimSpace(line)] = true
			}
		}
	}
	return out, nil
}

func (l lines) Authorize(_ context.Context, in policy.Network) policy.Decision {
	if l[in.Source.Workload+" "+in.Destination.Workload] {
		return policy.Decision{Allowed: true}
	}
	return policy.Decision{Denials: []policy.Denial{{Rule: "lines", Message: "no line allows it"}}}
}

// disk writes generations like the agent does.
type disk struct {
	t          *testing.T
	lg         *distribute.LastGood
	directives map[string]*nodev1.Directive
	generation int64
}

func newDisk(t *testing.T, dataDir string, ca *testCA) *disk {
	t.Helper()
	lg, err := distribute.OpenLastGood(filepath.Join(dataDir, "lastgood"), 0)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, lg: lg, directives: map[string]*nodev1.Directive{}}
	d.directives["config"] = &nodev1.Directive{Body: &nodev1.Directive_Config{Config: &nodev1.NodeConfig{
		Cluster: "eu-west", Region: "eu", Zone: "a", Fleet: fleet, TrustDomain: domain, ReplicaCidr: "10.200.1.0/24", VirtualIpCidr: "10.68.0.0/16",
	}}}
	d.bundle(domain, "eu-west", ca)
	return d
}

func (d *disk) bundle(trustDomain, cluster string, ca *testCA) {
	d.directives["bundle/"+trustDomain] = &nodev1.Directive{Body: &nodev1.Directive_Bundle{Bundle: &linkv1.TrustBundle{
		TrustDomain: trustDomain, Cluster: cluster, X509Roots: ca.pem,
	}}}
}

func (d *disk) assign(allocation, workload, revision, addr string) {
	d.directives["assignment/"+allocation] = &nodev1.Directive{Body: &nodev1.Directive_Assignment{Assignment: &nodev1.Assignment{
		Allocation: allocation, Tenant: "shop", Workload: workload, Revision: revision, Address: addr, Spec: &portolanv1.WorkloadSpec{},
	}}}
}

func (d *disk) service(name, workload, vip string, port *portolanv1.ServicePort, endpoints ...*nodev1.Endpoint) {
	d.directives["service/shop/"+name] = &nodev1.Directive{Body: &nodev1.Directive_Service{Service: &nodev1.MeshService{
		Tenant: "shop", Service: name, Workload: workload, VirtualIp: vip, Clusters: []string{"eu-west"}, Ports: []*portolanv1.ServicePort{port},
	}}}
	d.directives["endpoints/shop/"+name] = &nodev1.Directive{Body: &nodev1.Directive_Endpoints{Endpoints: &nodev1.MeshEndpoints{
		Tenant: "shop", Service: name, Endpoints: endpoints,
	}}}
}

func (d *disk) policy(content string) {
	d.policyBundle("policyBundles/guardrail", content)
}

func (d *disk) policyBundle(name, content string) {
	d.directives["policy/"+name] = &nodev1.Directive{Body: &nodev1.Directive_Policy{Policy: &linkv1.PolicyIntent{
		Name: name, Digest: content,
		Spec: &portolanv1.PolicyBundleSpec{Kind: portolanv1.PolicyKind_POLICY_KIND_NETWORK, Files: map[string]string{"a.rego": content}},
	}}}
}

func (d *disk) route(service string, backends ...*portolanv1.RouteBackend) {
	d.directives["route/shop/"+service] = &nodev1.Directive{Body: &nodev1.Directive_Route{Route: &nodev1.MeshRoute{
		Tenant: "shop", Route: service,
		Spec: &portolanv1.RouteSpec{Service: service, Rules: []*portolanv1.RouteRule{{Backends: backends}}},
	}}}
}

// save commits a generation and returns its revision.
func (d *disk) save() int64 {
	d.t.Helper()
	d.generation++
	g := distribute.Generation{Resources: map[string]*distribute.Resource{}}
	for name, x := range d.directives {
		r, err := distribute.NewResource(api.DirectiveTypeURL, name, x)
		if err != nil {
			d.t.Fatal(err)
		}
		g.Resources[name] = r
	}
	wm, err := distribute.NewResource(api.DirectiveTypeURL, api.WatermarkName, &nodev1.Directive{Body: &nodev1.Directive_Watermark{
		Watermark: &nodev1.Watermark{Revision: 100 + d.generation, Generation: d.generation},
	}})
	if err != nil {
		d.t.Fatal(err)
	}
	g.Watermark = wm
	if err := d.lg.Save(g, nil); err != nil {
		d.t.Fatal(err)
	}
	return 100 + d.generation
}

// node is a whole node in one process: network, Envoys, warden.
type node struct {
	t       *testing.T
	run     string
	data    string
	ca      *testCA
	disk    *disk
	network *network.Linux
	proxies *envoy.Envoy
	cfg     Config
	warden  *Warden
	stop    func()
	ns      map[string]string
}

func newNode(t *testing.T) *node {
	t.Helper()
	if !ownns.Inside() {
		t.Skip("needs root and the right to make network namespaces")
	}
	binary := envoyBinary(t)
	base, err := os.MkdirTemp("", "warden")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	n := &node{t: t, run: filepath.Join(base, "run"), data: filepath.Join(base, "data"), ns: map[string]string{}, stop: func() {}}
	for _, dir := range []string{n.run, n.data} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	n.ca = newCA(t, domain)
	n.disk = newDisk(t, n.data, n.ca)
	if n.network, err = network.New(network.Config{RunDir: n.run, DataDir: n.data, Log: log}); err != nil {
		t.Fatal(err)
	}
	if n.proxies, err = envoy.New(envoy.Config{Binary: binary, Root: filepath.Join(n.run, "proxies"), Log: log}); err != nil {
		t.Fatal(err)
	}
	n.cfg = Config{
		Node: "n1", DataDir: n.data, RunDir: n.run, Compile: compileLines, Active: n.proxies.Active, Connections: n.network,
		DNSAddress: network.LinkAddress + ":53", Log: log,
	}
	t.Cleanup(n.close)
	return n
}

func (n *node) close() {
	n.stop()
	ctx := context.Background()
	ids, err := n.proxies.List(ctx)
	if err != nil {
		n.t.Error(err)
	}
	for _, id := range ids {
		if n.t.Failed() {
			if b, err := os.ReadFile(filepath.Join(n.run, "proxies", id, "envoy.log")); err == nil && len(b) > 0 {
				n.t.Logf("log of %s:\n%s", id, b)
			}
		}
		if err := n.proxies.Stop(ctx, id); err != nil {
			n.t.Error(err)
		}
	}
	n.proxies.Close()
	for a := range n.ns {
		if err := n.network.Remove(ctx, a); err != nil {
			n.t.Error(err)
		}
	}
}

// startWarden runs a warden; stopWarden ends it like a kill would.
func (n *node) startWarden() {
	n.t.Helper()
	w, err := New(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	n.warden = w
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("warden: %v", err)
		}
	})
}

// commit saves a generation and wakes the warden.
func (n *node) commit() int64 {
	n.t.Helper()
	rev := n.disk.save()
	ctx, cancel := context.WithTimeout(n.t.Context(), 5*time.Second)
	defer cancel()
	if err := n.warden.Wake(ctx); err != nil {
		n.t.Fatal(err)
	}
	return rev
}

// replica makes network and identity of an allocation.
func (n *node) replica(allocation, workload, revision, addr string) {
	n.t.Helper()
	a, err := n.network.Ensure(n.t.Context(), network.Replica{Allocation: allocation, Tenant: "shop", Address: netip.MustParseAddr(addr), Capture: true})
	if err != nil {
		n.t.Fatal(err)
	}
	n.ns[allocation] = a.NetNS
	n.ca.issue(n.t, filepath.Join(n.run, "identity", allocation), "spiffe://"+domain+"/tenant/shop/workload/"+workload)
	n.disk.assign(allocation, workload, revision, addr)
}

func (n *node) startProxy(allocation, workload, revision string) {
	n.t.Helper()
	dir := filepath.Join(n.run, "proxies", allocation)
	err := n.proxies.Start(n.t.Context(), proxy.Spec{
		ID: allocation, NetNS: n.ns[allocation], XDSSocket: filepath.Join(dir, proxy.XDSSocketFile), Dir: dir, Role: proxy.RoleSidecar,
		Cluster: "eu-west", Region: "eu", Zone: "a", Tenant: "shop", Workload: workload, Revision: revision, Node: "n1",
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// applied waits until all proxies have applied the revision.
func (n *node) applied(rev int64) {
	n.t.Helper()
	if !within(10*time.Second, func() bool {
		st := n.warden.Status()
		for _, p := range st.GetProxies() {
			if !p.GetReady() || p.GetStatus().GetApplied().GetRevision() < rev {
				return false
			}
		}
		return len(st.GetProxies()) > 0
	}) {
		n.t.Fatalf("revision %d is not applied: %v", rev, n.warden.Status())
	}
}

// within asks often until the answer is yes or time is up.
func within(d time.Duration, ok func() bool) bool {
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-deadline.C:
			return ok()
		case <-tick.C:
		}
	}
}

// listen opens a listener inside a replica's namespace.
func (n *node) listen(allocation, address string) net.Listener {
	n.t.Helper()
	type result struct {
		l   net.Listener
		err error
	}
	out := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with its namespace
		f, err := os.Open(n.ns[allocation])
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			_ = f.Close()
		}
		if err != nil {
			out <- result{err: err}
			return
		}
		l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", address)
		out <- result{l, err}
	}()
	r := <-out
	if r.err != nil {
		n.t.Fatal(r.err)
	}
	n.t.Cleanup(func() { _ = r.l.Close() })
	return r.l
}

// serveHTTP is an application that says which revision it is and who called.
func (n *node) serveHTTP(allocation, revision string) {
	n.t.Helper()
	l := n.listen(allocation, "0.0.0.0:8080")
	s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, revision+" "+r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	n.t.Cleanup(func() { _ = s.Close(); <-done })
}

// serveEcho is a TCP application.
func (n *node) serveEcho(allocation, address string) {
	n.t.Helper()
	l := n.listen(allocation, address)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	n.t.Cleanup(func() { _ = l.Close(); wg.Wait() })
}

// client calls from inside a replica like its application would.
func (n *node) client(allocation string) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return network.Dial(ctx, n.ns[allocation], "tcp", address)
	}}
	n.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func get(t *testing.T, c *http.Client, target string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	return res.StatusCode, string(b)
}

// say writes a line and reads it back.
func say(c net.Conn, word string) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, word+"\n"); err != nil {
		return err
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if got != word+"\n" {
		return fmt.Errorf("echo is %q", got)
	}
	return nil
}

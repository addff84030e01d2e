package live

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/localfleet"
	"github.com/portolan-io/portolan/nodeagent/network"
)

// nodeNS is the network namespace of a node, by its place in e2e/fleet.yaml.
func nodeNS(t *testing.T, node string) string {
	t.Helper()
	d, err := localfleet.NewDirs(fleet.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	place, ok := map[string]string{"eu-west-1": "c0n0", "eu-west-2": "c0n1", "us-east-1": "c1n0", "us-east-2": "c1n1"}[node]
	if !ok {
		t.Fatalf("no node %s", node)
	}
	return "/run/netns/ptl-" + d.ID + "-" + place
}

func runDir(t *testing.T, elem ...string) string {
	t.Helper()
	d, err := localfleet.NewDirs(fleet.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(append([]string{d.Run}, elem...)...)
}

func adminClient(t *testing.T, node, replica string) *http.Client {
	t.Helper()
	sock := runDir(t, node, "proxies", replica, "admin.sock")
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}}
}

// admin asks an Envoy's admin socket.
func admin(t *testing.T, node, replica, path string) string {
	t.Helper()
	resp, err := adminClient(t, node, replica).Get("http://envoy" + path)
	if err != nil {
		t.Fatalf("admin of %s: %v", replica, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// withCallers is the shop's policy with more lines in its table of callers.
func withCallers(t *testing.T, lines ...string) string {
	t.Helper()
	b, err := os.ReadFile("../storefront/manifests/00-tenant.yaml")
	if err != nil {
		t.Fatal(err)
	}
	docs := strings.Split(string(b), "\n---\n")
	policy := docs[len(docs)-1]
	for _, l := range lines {
		policy = strings.Replace(policy, "callers := {\n", "callers := {\n        "+l+"\n", 1)
	}
	return policy
}

// without takes a pair out of the table of callers.
func without(t *testing.T, policy, caller, callee string) string {
	t.Helper()
	var out []string
	changed := false
	for line := range strings.Lines(policy) {
		if strings.Contains(line, `"`+callee+`": {`) {
			line = strings.Replace(strings.Replace(line, `"`+caller+`", `, "", 1), `"`+caller+`"`, "", 1)
			line = strings.Replace(line, "{}", "set()", 1)
			changed = true
		}
		// The bundle's own tests speak of the pairs as they were.
		if strings.Contains(line, "_test.rego") {
			break
		}
		out = append(out, line)
	}
	if !changed {
		t.Fatalf("%s is not in the policy", callee)
	}
	return strings.Join(out, "")
}

// 3. TLS 1.3 only between replicas, the right identity at both ends, end to end
// across clusters, plaintext refused, and a gateway without keys.
func Test03MTLS(t *testing.T) {
	settle(t)
	t.Run("capture", captureIsTLS13)
	t.Run("identities", func(t *testing.T) {
		a, err := call(always(t), hop(ingressOf["eu-west"][0], false), http.MethodGet, "/api/items")
		if err != nil || a.code != http.StatusOK {
			t.Fatalf("%v %+v", err, a)
		}
		got := a.header.Get("X-Upstream-Caller")
		if got != "spiffe://eu-west.portolan.internal/tenant/shop/workload/web" {
			t.Errorf("catalog saw caller %q", got)
		}
		t.Logf("catalog saw %s", got)
		r := ready(in(replicas(t, "catalog"), "eu-west"))[0]
		callee, err := presented(t, r)
		if callee != "spiffe://eu-west.portolan.internal/tenant/shop/workload/catalog" {
			t.Errorf("catalog shows itself as %q", callee)
		}
		if err == nil {
			t.Error("a caller without a certificate was served")
		}
		t.Logf("catalog shows %s; without a certificate: %v", callee, err)
	})
	t.Run("plaintext", func(t *testing.T) {
		r := ready(in(replicas(t, "payments"), "eu-west"))[0]
		// That the port is open is half of the proof: nothing else refuses.
		c := dialReplica(t, r)
		defer c.Close()
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatalf("plaintext could not be sent: %v", err)
		}
		b, err := io.ReadAll(c)
		if len(b) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("plaintext: %q, %v; want the connection closed without an answer", b, err)
		}
		t.Logf("plaintext to %s: connected, then %d bytes and %v", r.GetAddress(), len(b), err)
	})
	t.Run("across clusters", acrossClusters)
}

// dialReplica connects to a replica's port from its node's own namespace, where
// nothing is captured on the way out.
func dialReplica(t *testing.T, r *portolanv1.Replica) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(always(t), 5*time.Second)
	defer cancel()
	c, err := network.Dial(ctx, nodeNS(t, r.GetNode()), "tcp", r.GetAddress()+":8080")
	if err != nil {
		t.Fatalf("dial %s: %v", r.GetName(), err)
	}
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// presented gives the SPIFFE ID in the certificate that a replica shows, and how
// it answers a caller who has none.
func presented(t *testing.T, r *portolanv1.Replica) (string, error) {
	t.Helper()
	id := ""
	c := tls.Client(dialReplica(t, r), &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // whose it is is what is asked
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) > 0 && len(cs.PeerCertificates[0].URIs) == 1 {
				id = cs.PeerCertificates[0].URIs[0].String()
			}
			return nil
		},
	})
	defer c.Close()
	// In TLS 1.3 the caller learns of a refusal with the first byte that it reads.
	_, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n")
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	return id, err
}

// captureIsTLS13 restarts a proxy, so that new connections are made, and reads
// every server hello on the callee's link.
func captureIsTLS13(t *testing.T) {
	cat := ready(in(replicas(t, "catalog"), "eu-west"))[0]
	file := filepath.Join(t.TempDir(), "capture.pcap")
	ctx, cancel := context.WithTimeout(always(t), 30*time.Second)
	defer cancel()
	dump := exec.CommandContext(ctx, "nsenter", "--net="+nodeNS(t, cat.GetNode()), "--", "tcpdump", "-i", "any", "-U", "-s", "0", "-w", file, "tcp and host "+cat.GetAddress())
	dump.Cancel = func() error { return dump.Process.Signal(syscall.SIGTERM) }
	stderr, err := dump.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := dump.Start(); err != nil {
		t.Fatalf("missing: tcpdump: %v", err)
	}
	if _, err := bufio.NewReader(stderr).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for _, w := range ready(in(replicas(t, "web"), "eu-west")) {
		local(t, "kill", w.GetNode()+"/envoy/"+last(w.GetName()))
	}
	hc := hop(ingressOf["eu-west"][0], false)
	good := 0
	eventually(t, 25*time.Second, "calls through the restarted proxy", func() error {
		a, err := call(always(t), hc, http.MethodGet, "/api/items")
		if err != nil || a.code != http.StatusOK {
			return fmt.Errorf("%v %d", err, a.code)
		}
		if good++; good < 40 {
			return errors.New("not enough calls yet")
		}
		return nil
	})
	_ = dump.Process.Signal(syscall.SIGTERM)
	_ = dump.Wait()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	hellos, plain := tlsVersions(b)
	t.Logf("server hellos by version: %v; plaintext HTTP segments: %d; %d bytes captured", hellos, plain, len(b))
	if len(hellos) != 1 || hellos[0x0304] == 0 || plain > 0 {
		t.Errorf("server hellos by version %v, plaintext segments %d; want TLS 1.3 alone", hellos, plain)
	}
}

// tlsVersions counts the versions that server hellos in a capture choose (RFC
// 8446, 4.1.3 and 4.2.1), and segments that begin like HTTP.
func tlsVersions(pcap []byte) (map[uint16]int, int) {
	hellos, plain := map[uint16]int{}, 0
	for i := 0; i+11 < len(pcap); i++ {
		if bytes.HasPrefix(pcap[i:], []byte("GET /")) || bytes.HasPrefix(pcap[i:], []byte("HTTP/1.1 ")) {
			plain++
		}
		// Record: handshake, legacy version 3.3; message: server hello, legacy 3.3.
		if pcap[i] != 0x16 || pcap[i+1] != 3 || pcap[i+2] != 3 || pcap[i+5] != 2 || pcap[i+9] != 3 || pcap[i+10] != 3 {
			continue
		}
		if v, ok := serverHello(pcap[i+9:]); ok {
			hellos[v]++
		}
	}
	return hellos, plain
}

func serverHello(b []byte) (uint16, bool) {
	if len(b) < 2+32+1 {
		return 0, false
	}
	version := binary.BigEndian.Uint16(b)
	p := 2 + 32
	p += 1 + int(b[p]) // session
	p += 2 + 1         // cipher, compression
	if p+2 > len(b) {
		return 0, false
	}
	end := p + 2 + int(binary.BigEndian.Uint16(b[p:]))
	for p += 2; p+4 <= end && end <= len(b); {
		kind, n := binary.BigEndian.Uint16(b[p:]), int(binary.BigEndian.Uint16(b[p+2:]))
		if kind == 43 && n == 2 && p+6 <= len(b) {
			version = binary.BigEndian.Uint16(b[p+4:])
		}
		p += 4 + n
	}
	return version, true
}

const faraway = `
kind: Workload
tenant: shop
name: near
spec:
  containers:
  - image: registry.portolan.internal:7500/shop/web:v1
    env: {CATALOG: far}
    requests: {cpu: 50m}
    limits: {cpu: 200m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 500ms}
  placement: {allowed_regions: [eu-west]}
---
{kind: Service, tenant: shop, name: near, spec: {ports: [{port: 80, target_port: 8080}]}}
---
kind: Workload
tenant: shop
name: far
spec:
  containers:
  - image: registry.portolan.internal:7500/shop/catalog:v2
    requests: {cpu: 50m}
    limits: {cpu: 200m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 500ms}
  placement: {allowed_regions: [us-east]}
---
{kind: Service, tenant: shop, name: far, spec: {ports: [{port: 80, target_port: 8080}]}}
---
{kind: Route, tenant: shop, name: near, spec: {ingress_hosts: [near.shop.localhost], rules: [{backends: [{service: near}]}]}}
`

func acrossClusters(t *testing.T) {
	apply(t, withCallers(t, `"near": {"ingress"},`, `"far": {"near"},`))
	apply(t, faraway)
	t.Cleanup(func() {
		if out, errOut, err := run(t, faraway, "delete", "-f", "-"); err != nil {
			t.Errorf("delete: %v %s%s", err, out, errOut)
		}
		apply(t, withCallers(t))
	})
	cli(t, "wait", "workload", "near", "far", "-t", "shop")
	var a answer
	eventually(t, 15*time.Second, "a call from eu-west to us-east", func() error {
		req, err := http.NewRequestWithContext(always(t), http.MethodGet, "http://near.shop.localhost/api/items", nil)
		if err != nil {
			return err
		}
		resp, err := hop(ingressOf["eu-west"][0], false).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		a = answer{resp.StatusCode, "", resp.Header}
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	if got := a.header.Get("X-Upstream-Caller"); got != "spiffe://eu-west.portolan.internal/tenant/shop/workload/near" {
		t.Errorf("far saw caller %q", got)
	}
	if got := a.header.Get("X-Upstream-Cluster"); got != "us-east" {
		t.Errorf("answered by %q", got)
	}
	t.Logf("far in %s saw %s", a.header.Get("X-Upstream-Cluster"), a.header.Get("X-Upstream-Caller"))
	r, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListReplicas(always(t), &portolanv1.ListReplicasRequest{Parent: "tenants/system/workloads/eastwest", Cluster: "us-east"})
	if err != nil || len(r.GetReplicas()) == 0 {
		t.Fatalf("gateways: %v %v", r, err)
	}
	for _, g := range r.GetReplicas() {
		dump := admin(t, g.GetNode(), last(g.GetName()), "/config_dump")
		if strings.Contains(dump, "private_key") || strings.Contains(dump, `"tls_certificate`) {
			t.Errorf("gateway %s holds a key or ends TLS", g.GetName())
		}
	}
}

// 5. Default deny; a change allows, then denies, within a second of its commit, on
// kept-alive and open connections too; who decides may die.
func Test05Policy(t *testing.T) {
	settle(t)
	open := withCallers(t)
	t.Cleanup(func() { apply(t, open); settle(t) })
	hc := hop(ingressOf["eu-west"][0], true)
	status := func(path string) int {
		a, err := call(always(t), hc, http.MethodGet, path)
		if err != nil {
			return 0
		}
		return a.code
	}
	change := func(what, policy, path string, want int) {
		t.Helper()
		apply(t, policy)
		committed := time.Now()
		took := eventually(t, 5*time.Second, what, func() error {
			if c := status(path); c != want {
				return fmt.Errorf("%d", c)
			}
			return nil
		})
		t.Logf("%s: %s after commit", what, took.Round(time.Millisecond))
		if took > time.Second {
			t.Errorf("%s took %s after commit, want at most 1s", what, time.Since(committed))
		}
	}
	if c := status("/api/items"); c != http.StatusOK {
		t.Fatalf("before: %d", c)
	}
	closed := without(t, open, "web", "catalog")
	change("denied", closed, "/api/items", http.StatusForbidden)
	change("allowed", open, "/api/items", http.StatusOK)
	change("denied again", closed, "/api/items", http.StatusForbidden)
	apply(t, open)
	t.Run("open TCP", func(t *testing.T) { openTCPIsClosed(t, hc, open) })
	t.Run("deciders die", func(t *testing.T) { decidersDie(t, hc, without(t, open, "web", "cart")) })
}

// openTCPIsClosed watches the cart's connection to Redis in Redis's own list of
// clients.
func openTCPIsClosed(t *testing.T, hc *http.Client, open string) {
	cartOK := func() error {
		a, err := call(always(t), hc, http.MethodGet, "/api/cart?user=t")
		if err != nil || a.code != http.StatusOK {
			return fmt.Errorf("%v %d %s", err, a.code, firstLine(a.body))
		}
		return nil
	}
	eventually(t, 10*time.Second, "the cart reads Redis", cartOK)
	clients := func() int {
		out := cli(t, "exec", "redis", "-t", "shop", "--", "/usr/bin/redis-cli", "client", "list")
		// The list's own connection is in it too, as cmd=client.
		n := 0
		for l := range strings.Lines(out) {
			if strings.Contains(l, "addr=") && !strings.Contains(l, "cmd=client") {
				n++
			}
		}
		return n
	}
	if n := clients(); n == 0 {
		t.Fatal("no open connection to Redis")
	}
	apply(t, without(t, open, "cart", "redis"))
	took := eventually(t, 5*time.Second, "open connections end", func() error {
		if n := clients(); n > 0 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
	t.Logf("open TCP connections closed %s after commit (each look takes an exec)", took.Round(time.Millisecond))
	if took > time.Second {
		t.Errorf("open connections were closed %s after commit, want at most 1s", took)
	}
	if err := cartOK(); err == nil {
		t.Error("the cart still reads Redis")
	}
	apply(t, open)
	eventually(t, 10*time.Second, "the cart reads Redis again", cartOK)
}

// decidersDie: a dead warden means no; with a dead agent or cluster the last good
// policy holds, what it denies and what it allows.
func decidersDie(t *testing.T, hc *http.Client, policy string) {
	apply(t, policy)
	expect := func(path string, want int) error {
		a, err := call(always(t), hc, http.MethodGet, path)
		if err != nil || a.code != want {
			return fmt.Errorf("%s: %v %d, want %d", path, err, a.code, want)
		}
		return nil
	}
	const allowed, denied = "/api/items", "/api/cart?user=t"
	asDecided := func() error { return errors.Join(expect(allowed, http.StatusOK), expect(denied, http.StatusForbidden)) }
	eventually(t, 10*time.Second, "the policy is live", asDecided)
	for _, w := range []string{"eu-west-1/warden", "eu-west-2/warden"} {
		local(t, "kill", "--hold", w)
	}
	for range 3 {
		if err := errors.Join(expect(allowed, http.StatusForbidden), expect(denied, http.StatusForbidden)); err != nil {
			t.Errorf("with dead wardens: %v", err)
		}
	}
	for _, w := range []string{"eu-west-1/warden", "eu-west-2/warden"} {
		local(t, "start", w)
	}
	eventually(t, 15*time.Second, "wardens are back", asDecided)
	for _, p := range []string{"eu-west", "eu-west-1/agent", "eu-west-2/agent"} {
		local(t, "kill", "--hold", p)
		defer local(t, "start", p)
		for range 20 {
			if err := asDecided(); err != nil {
				t.Errorf("with %s dead: %v", p, err)
			}
		}
	}
}

package warden

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/network"
)

// shop is web calling api (two revisions) over HTTP, and redis over TCP.
func shop(t *testing.T) *node {
	t.Helper()
	n := newNode(t)
	n.startWarden()
	n.replica("web-1", "web", "r1", "10.200.1.2")
	n.replica("api-1", "api", "r1", "10.200.1.3")
	n.replica("api-2", "api", "r2", "10.200.1.4")
	n.replica("redis-1", "redis", "r1", "10.200.1.5")
	n.disk.service(
		"api", "api", "10.68.0.1", &portolanv1.ServicePort{Name: "http", Port: 80, TargetPort: 8080},
		&nodev1.Endpoint{Allocation: "api-1", Address: "10.200.1.3", Revision: "r1", Node: "n1", Zone: "a"},
		&nodev1.Endpoint{Allocation: "api-2", Address: "10.200.1.4", Revision: "r2", Node: "n1", Zone: "a"},
	)
	n.disk.service(
		"redis", "redis", "10.68.0.2", &portolanv1.ServicePort{Name: "redis", Port: 6379, Protocol: portolanv1.PortProtocol_PORT_PROTOCOL_TCP},
		&nodev1.Endpoint{Allocation: "redis-1", Address: "10.200.1.5", Revision: "r1", Node: "n1", Zone: "a"},
	)
	n.disk.policy("web api\nweb redis\n")
	rev := n.commit()
	n.startProxy("web-1", "web", "r1")
	n.startProxy("api-1", "api", "r1")
	n.startProxy("api-2", "api", "r2")
	n.startProxy("redis-1", "redis", "r1")
	n.serveHTTP("api-1", "r1")
	n.serveHTTP("api-2", "r2")
	n.serveEcho("redis-1", "0.0.0.0:6379")
	n.applied(rev)
	return n
}

// TestNode is the whole of a node's data plane with real Envoys. Its parts share
// one node, because Envoys are slow to start; each leaves it as it found it.
func TestNode(t *testing.T) {
	n := shop(t)
	t.Run("a call is allowed and carries the caller's identity", func(t *testing.T) {
		code, body := get(t, n.client("web-1"), "http://10.68.0.1/")
		if code != 200 || !strings.Contains(body, "URI=spiffe://"+domain+"/tenant/shop/workload/web") {
			t.Fatalf("%d %s", code, body)
		}
	})
	t.Run("plaintext from outside the mesh is refused", func(t *testing.T) {
		c, err := network.Dial(t.Context(), "", "tcp", "10.200.1.3:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); len(b) > 0 {
			t.Fatalf("answered %q, %v", b, err)
		}
	})
	t.Run("weights follow the route", func(t *testing.T) { testWeights(t, n) })
	t.Run("a denial bites on a kept-alive connection", func(t *testing.T) { testDenial(t, n) })
	t.Run("a denial closes TCP connections", func(t *testing.T) { testTCPDenial(t, n, false) })
	t.Run("a denial closes TCP connections of before a restart", func(t *testing.T) { testTCPDenial(t, n, true) })
	t.Run("a bundle that does not compile changes nothing", func(t *testing.T) { testBrokenBundle(t, n) })
	t.Run("no warden, no", func(t *testing.T) { testWardenGone(t, n) })
	t.Run("names", func(t *testing.T) { testNames(t, n) })
	t.Run("identities rotate without a failed call", func(t *testing.T) { testRotation(t, n) })
	t.Run("a frozen proxy is the laggard", func(t *testing.T) { testFrozen(t, n) })
	t.Run("the ingress calls as itself", func(t *testing.T) { testIngress(t, n) })
	t.Run("a killed proxy comes back from disk", func(t *testing.T) { testProxyKilled(t, n) })
}

func testWeights(t *testing.T, n *node) {
	share := func(want int) int {
		n.disk.route(
			"api", &portolanv1.RouteBackend{Revision: "r1", Weight: int32(want)}, &portolanv1.RouteBackend{Revision: "r2", Weight: int32(100 - want)},
		)
		n.applied(n.commit())
		client, got := n.client("web-1"), 0
		for range 1000 {
			code, body := get(t, client, "http://10.68.0.1/")
			if code != 200 {
				t.Fatalf("%d %s", code, body)
			}
			if strings.HasPrefix(body, "r1 ") {
				got++
			}
		}
		return got
	}
	if got := share(90); got < 860 || got > 940 {
		t.Errorf("r1 got %d of 1000, want about 900", got)
	}
	if got := share(100); got != 1000 {
		t.Errorf("r1 got %d of 1000, want all", got)
	}
	delete(n.disk.directives, "route/shop/api")
	n.applied(n.commit())
}

func testDenial(t *testing.T, n *node) {
	client := n.client("web-1")
	if code, body := get(t, client, "http://10.68.0.1/"); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	for _, step := range []struct {
		content string
		want    int
	}{{"web redis\n", 403}, {"web api\nweb redis\n", 200}} {
		began := time.Now()
		n.disk.policy(step.content)
		n.commit()
		if code, body := get(t, client, "http://10.68.0.1/"); code != step.want {
			t.Errorf("after %q: %d %s, want %d", step.content, code, body, step.want)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %v", took)
		}
	}
	denied := false
	for _, d := range n.warden.decisions.newest(100, "") {
		denied = denied || (!d.GetAllowed() && d.GetProtocol() == "http" && strings.HasSuffix(d.GetSource(), "/workload/web") && strings.Contains(d.GetReason(), "no line"))
	}
	if !denied {
		t.Error("the log of decisions does not show the denial")
	}
}

func testTCPDenial(t *testing.T, n *node, restart bool) {
	c, err := network.Dial(t.Context(), n.ns["web-1"], "tcp", "10.68.0.2:6379")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := say(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if restart {
		n.stop()
		n.startWarden()
	}
	if err := say(c, "again"); err != nil {
		t.Fatal(err)
	}
	if n.warden.conns.count("redis-1") == 0 && !restart {
		t.Fatal("the connection is not remembered")
	}
	began := time.Now()
	n.disk.policy("web api\n")
	n.commit()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		t.Fatalf("the connection is still open: %v", err)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("closing took %v", took)
	}
	if again, err := network.Dial(t.Context(), n.ns["web-1"], "tcp", "10.68.0.2:6379"); err == nil {
		if err := say(again, "let me in"); err == nil {
			t.Error("a new connection was let in")
		}
		_ = again.Close()
	}
	n.disk.policy("web api\nweb redis\n")
	n.commit()
}

func testBrokenBundle(t *testing.T, n *node) {
	n.disk.policy("broken")
	n.applied(n.commit())
	if st := n.warden.Status(); len(st.GetPolicyFaults()) != 1 || st.GetPolicyFaults()[0].GetBundle() != "policyBundles/guardrail" {
		t.Errorf("faults are %v", st.GetPolicyFaults())
	}
	if code, body := get(t, n.client("web-1"), "http://10.68.0.1/"); code != 200 {
		t.Errorf("the last good policy does not hold: %d %s", code, body)
	}
	n.disk.policy("web api\nweb redis\n")
	n.commit()
	if st := n.warden.Status(); len(st.GetPolicyFaults()) != 0 {
		t.Errorf("faults are still %v", st.GetPolicyFaults())
	}
}

func testWardenGone(t *testing.T, n *node) {
	client := n.client("web-1")
	n.stop()
	if code, body := get(t, client, "http://10.68.0.1/"); code != 403 {
		t.Errorf("without a warden: %d %s, want 403", code, body)
	}
	began := time.Now()
	n.startWarden()
	if !within(3*time.Second, func() bool { code, _ := get(t, client, "http://10.68.0.1/"); return code == 200 }) {
		t.Fatal("not allowed again after the warden's restart")
	}
	t.Logf("allowed again %v after the warden's start", time.Since(began))
	n.applied(n.disk.generation + 100)
}

func testNames(t *testing.T, n *node) {
	ask := func(name string, qtype uint16) *dns.Msg {
		c, err := network.Dial(t.Context(), n.ns["web-1"], "udp", network.LinkAddress+":53")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		client := &dns.Client{Timeout: 2 * time.Second}
		m, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion(name, qtype), &dns.Conn{Conn: c})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := ask("API.shop.Mesh.", dns.TypeA); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "10.68.0.1" {
		t.Errorf("A of api.shop.mesh: %v", m)
	}
	if m := ask("nothing.shop.mesh.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("unknown name: %v", m)
	}
}

func testRotation(t *testing.T, n *node) {
	client := n.client("web-1")
	n.ca.issue(t, filepath.Join(n.run, "identity", "api-1"), "spiffe://"+domain+"/tenant/shop/workload/api")
	n.ca.issue(t, filepath.Join(n.run, "identity", "web-1"), "spiffe://"+domain+"/tenant/shop/workload/web")
	before := n.warden.replicas["web-1"].target.digest
	if err := n.warden.Wake(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n.warden.replicas["web-1"].target.digest == before {
		t.Fatal("the new identity was not taken")
	}
	n.applied(n.disk.generation + 100)
	for range 20 {
		if code, body := get(t, client, "http://10.68.0.1/"); code != 200 {
			t.Fatalf("%d %s", code, body)
		}
	}
	n.client("web-1").CloseIdleConnections()
}

func testFrozen(t *testing.T, n *node) {
	st, err := n.proxies.Status(t.Context(), "web-1")
	if err != nil || !st.Live {
		t.Fatalf("status %+v, %v", st, err)
	}
	if err := syscall.Kill(st.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			_ = syscall.Kill(st.Pid, syscall.SIGCONT)
		}
	}
	defer resume()
	n.disk.route("api", &portolanv1.RouteBackend{Revision: "r2", Weight: 100})
	rev := n.commit()
	caught := func(allocation string) bool {
		for _, p := range n.warden.Status().GetProxies() {
			if p.GetStatus().GetAllocation() == allocation {
				return p.GetStatus().GetApplied().GetRevision() >= rev
			}
		}
		return false
	}
	if !within(5*time.Second, func() bool { return caught("api-1") && caught("redis-1") }) {
		t.Errorf("the others did not apply: %v", n.warden.Status())
	}
	if caught("web-1") {
		t.Error("the frozen proxy is said to have applied")
	}
	resume()
	n.applied(rev)
	delete(n.disk.directives, "route/shop/api")
	n.applied(n.commit())
}

func testProxyKilled(t *testing.T, n *node) {
	st, err := n.proxies.Status(t.Context(), "api-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(st.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !within(5*time.Second, func() bool {
		now, err := n.proxies.Status(t.Context(), "api-1")
		return err == nil && now.Live && now.Pid != st.Pid && now.Restarts == 1
	}) {
		t.Fatal("it did not come back")
	}
	n.applied(n.disk.generation + 100)
}

func testIngress(t *testing.T, n *node) {
	n.ca.issue(t, filepath.Join(n.run, "identity", "ingress-1"), "spiffe://"+domain+"/gateway/ingress")
	n.disk.directives["assignment/ingress-1"] = &nodev1.Directive{Body: &nodev1.Directive_Assignment{Assignment: &nodev1.Assignment{
		Allocation: "ingress-1", Tenant: "system", Workload: "ingress", Revision: "r1", Address: network.LinkAddress,
		Spec: &portolanv1.WorkloadSpec{Gateway: portolanv1.GatewayKind_GATEWAY_KIND_INGRESS},
	}}}
	n.disk.directives["route/shop/front"] = &nodev1.Directive{Body: &nodev1.Directive_Route{Route: &nodev1.MeshRoute{
		Tenant: "shop", Route: "front", Spec: &portolanv1.RouteSpec{
			IngressHosts: []string{"shop.localhost"}, Rules: []*portolanv1.RouteRule{{Backends: []*portolanv1.RouteBackend{{Service: "api"}}}},
		},
	}}}
	n.disk.policy("web api\nweb redis\ningress api\n")
	rev := n.commit()
	n.startProxy("ingress-1", "ingress", "r1")
	n.applied(rev)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+network.LinkAddress+":8080/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "shop.localhost"
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 || !strings.Contains(string(body), "URI=spiffe://"+domain+"/gateway/ingress") {
		t.Errorf("%d %s, error %v", res.StatusCode, body, err)
	}
	for _, p := range n.warden.Status().GetProblems() {
		t.Errorf("problem: %v", p)
	}
	if err := n.proxies.Stop(t.Context(), "ingress-1"); err != nil {
		t.Fatal(err)
	}
	delete(n.disk.directives, "assignment/ingress-1")
	delete(n.disk.directives, "route/shop/front")
	n.disk.policy("web api\nweb redis\n")
	n.applied(n.commit())
	if _, err := os.Stat(filepath.Join(n.run, "proxies", "ingress-1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the gateway's directory is left: %v", err)
	}
}

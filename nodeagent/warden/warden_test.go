package warden

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/miekg/dns"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/network/networktest"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/policy"
)

// TestReservedNumbersAgree holds the constants together that layers repeat.
func TestReservedNumbersAgree(t *testing.T) {
	if proxy.UID != network.ProxyUID || proxy.GID != network.ProxyGID {
		t.Error("the proxies' user differs between proxy and network")
	}
}

// A replica's Workload API hands its key to whoever connects: another user of the
// machine must not get as far as the socket, the container's user must.
func TestWorkloadSocketIsOutOfReach(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("missing: root, to look as another user")
	}
	dir := t.TempDir()
	for d := dir; d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// As an earlier version left it.
	if err := os.MkdirAll(filepath.Join(dir, "run", "workload"), 0o711); err != nil {
		t.Fatal(err)
	}
	w, err := New(Config{
		Node: "n1", DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Compile: compileLines,
		Active: func(context.Context, string) (map[string]map[string]string, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &replica{allocation: "api-1", assignment: &nodev1.Assignment{Allocation: "api-1"}}
	if err := w.ensureWorkloadAPI(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	defer r.workload.end()
	sees := func(path string) bool {
		return exec.CommandContext(t.Context(), "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "test", "-w", path).Run() == nil
	}
	if path := filepath.Join(dir, "run", "workload", "api-1", "workload.sock"); sees(path) {
		t.Errorf("another user can write to %s", path)
	}
	// What a bind mount shows of it, the way above left out.
	bound := filepath.Join(dir, "bound")
	if err := os.Rename(filepath.Join(dir, "run", "workload", "api-1"), bound); err != nil {
		t.Fatal(err)
	}
	if !sees(filepath.Join(bound, "workload.sock")) {
		t.Error("the container's user cannot write to its own socket")
	}
}

// testWorld is one replica "api-1" of tenant shop that web may call.
func testWorld(t *testing.T, lines ...string) *world {
	t.Helper()
	d := &disk{t: t, directives: map[string]*nodev1.Directive{}}
	d.directives["config"] = &nodev1.Directive{Body: &nodev1.Directive_Config{Config: &nodev1.NodeConfig{
		Cluster: "eu-west", Fleet: fleet, TrustDomain: domain,
	}}}
	for _, cluster := range []string{"eu-west", "us-east"} {
		d.directives["bundle/"+cluster] = &nodev1.Directive{Body: &nodev1.Directive_Bundle{Bundle: &linkv1.TrustBundle{TrustDomain: cluster + "." + fleet}}}
	}
	d.directives["permit/shop/web/us-east"] = &nodev1.Directive{Body: &nodev1.Directive_Permit{Permit: &linkv1.PeerPermit{Tenant: "shop", Workload: "web", Cluster: "us-east"}}}
	d.assign("api-1", "api", "r1", "10.200.1.3")
	d.service("api", "api", "10.68.0.1", &portolanv1.ServicePort{Name: "http", Port: 80, TargetPort: 8080})
	d.service("fake", "api", "", &portolanv1.ServicePort{Name: "http", Port: 81})
	known := map[string]parsed{}
	for name, x := range d.directives {
		known[name] = parsed{version: "1", directive: x}
	}
	w := newWorld(known, &nodev1.Watermark{Revision: 1})
	auth, err := compileLines(t.Context(), []policy.Bundle{{Files: map[string]string{"a": strings.Join(lines, "\n")}}})
	if err != nil {
		t.Fatal(err)
	}
	w.authorizer = auth
	return w
}

func TestDecide(t *testing.T) {
	w := testWorld(t, "web api", "ingress api")
	id := func(cluster, path string) string { return "spiffe://" + cluster + "." + fleet + path }
	for _, c := range []struct {
		name, allocation, principal, want string
	}{
		{"same cluster", "api-1", id("eu-west", "/tenant/shop/workload/web"), ""},
		{"gateway of the same cluster", "api-1", id("eu-west", "/gateway/ingress"), ""},
		{"other cluster with permit", "api-1", id("us-east", "/tenant/shop/workload/web"), ""},
		{"other cluster without permit", "api-1", id("us-east", "/tenant/shop/workload/cart"), "no permit"},
		{"gateway of another cluster without permit", "api-1", id("us-east", "/gateway/ingress"), "no permit"},
		{"policy says no", "api-1", id("eu-west", "/tenant/shop/workload/cart"), "no line"},
		{"unknown domain", "api-1", id("mars", "/tenant/shop/workload/web"), "not known"},
		{"a node", "api-1", id("eu-west", "/node/n1"), "only workloads"},
		{"a control plane", "api-1", id("eu-west", "/control"), "only workloads"},
		{"nobody", "api-1", "", "no identity"},
		{"no replica of ours", "api-9", id("eu-west", "/tenant/shop/workload/web"), "not assigned"},
	} {
		d := w.decide(t.Context(), call{allocation: c.allocation, principal: c.principal, port: 8080})
		if d.Allowed != (c.want == "") || (c.want != "" && !strings.Contains(reasonOf(d), c.want)) {
			t.Errorf("%s: allowed %v because of %q, want %q", c.name, d.Allowed, reasonOf(d), c.want)
		}
	}
	w.authorizer = nil
	if w.decide(t.Context(), call{allocation: "api-1", principal: id("eu-west", "/tenant/shop/workload/web")}).Allowed {
		t.Error("allowed without any policy")
	}
}

// recorder keeps what it was asked, and says yes.
type recorder struct{ in policy.Network }

func (r *recorder) Authorize(_ context.Context, in policy.Network) policy.Decision {
	r.in = in
	return policy.Decision{Allowed: true}
}

func TestInputHasTheDocumentedShape(t *testing.T) {
	w, r := testWorld(t), &recorder{}
	w.authorizer = r
	c := callOf("api-1", &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Principal: "spiffe://" + domain + "/tenant/shop/workload/web"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Path: "/a/b%20c?q=1&q=2", Headers: map[string]string{"x-user": "me"}, Host: "api.shop.mesh",
		}},
	})
	c.port = 8080
	if !w.decide(t.Context(), c).Allowed {
		t.Fatal("not allowed")
	}
	in := r.in
	if in.Service != "api" || in.Port != 80 || in.Protocol != "http" || !slices.Equal(in.ParsedPath, []string{"a", "b c"}) || !slices.Equal(in.ParsedQuery["q"], []string{"1", "2"}) {
		t.Errorf("input is %+v", in)
	}
	if in.Source.Workload != "web" || in.Source.Cluster != "eu-west" || in.Destination.Workload != "api" || in.Destination.SPIFFEID != "spiffe://"+domain+"/tenant/shop/workload/api" {
		t.Errorf("peers are %+v and %+v", in.Source, in.Destination)
	}
	http := in.Attributes["request"].(map[string]any)["http"].(map[string]any)
	if http["method"] != "GET" || http["headers"].(map[string]any)["x-user"] != "me" {
		t.Errorf("request attributes are %v", http)
	}
}

func TestNames(t *testing.T) {
	var p atomic.Pointer[world]
	r := &resolver{world: &p, log: slog.New(slog.DiscardHandler)}
	replica, stranger := netip.MustParseAddr("10.200.1.3"), netip.MustParseAddr("192.0.2.1")
	ask := func(src netip.Addr, name string, qtype uint16) *dns.Msg {
		return r.answer(new(dns.Msg).SetQuestion(name, qtype), src)
	}
	if m := ask(replica, "api.shop.mesh.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("answered before a generation is loaded: %v", m)
	}
	w := testWorld(t)
	w.services[serviceKey{"bank", "vault"}] = &nodev1.MeshService{Tenant: "bank", Service: "vault", VirtualIp: "10.68.0.9"}
	p.Store(w)
	for _, c := range []struct {
		src    netip.Addr
		name   string
		qtype  uint16
		rcode  int
		answer string
	}{
		{replica, "api.shop.mesh.", dns.TypeA, dns.RcodeSuccess, "10.68.0.1"},
		{replica, "aPi.SHOP.mesh.", dns.TypeA, dns.RcodeSuccess, "10.68.0.1"},
		{replica, "api.shop.mesh.", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{replica, "fake.shop.mesh.", dns.TypeA, dns.RcodeSuccess, ""},
		{replica, "shop.mesh.", dns.TypeA, dns.RcodeSuccess, ""},
		{replica, "nothing.shop.mesh.", dns.TypeA, dns.RcodeNameError, ""},
		{replica, "vault.bank.mesh.", dns.TypeA, dns.RcodeNameError, ""},
		{replica, "bank.mesh.", dns.TypeA, dns.RcodeNameError, ""},
		{replica, "a.b.shop.mesh.", dns.TypeA, dns.RcodeNameError, ""},
		{replica, "example.com.", dns.TypeA, dns.RcodeRefused, ""},
		{replica, "notmesh.", dns.TypeA, dns.RcodeRefused, ""},
		{stranger, "api.shop.mesh.", dns.TypeA, dns.RcodeRefused, ""},
	} {
		m := ask(c.src, c.name, c.qtype)
		got := ""
		if len(m.Answer) == 1 {
			got = m.Answer[0].(*dns.A).A.String()
		}
		if m.Rcode != c.rcode || got != c.answer || m.Question[0].Name != c.name {
			t.Errorf("%s %s from %s: %s %q, want %s %q", dns.TypeToString[c.qtype], c.name, c.src, dns.RcodeToString[m.Rcode], got, dns.RcodeToString[c.rcode], c.answer)
		}
	}
}

func TestPolicyWithoutAnyGoodVersionDeniesItsTenant(t *testing.T) {
	var s policyState
	intents := []*linkv1.PolicyIntent{
		{Name: "policyBundles/guardrail", Digest: "1", Spec: &portolanv1.PolicyBundleSpec{Files: map[string]string{"a": "web api"}}},
		{Name: "tenants/shop/policyBundles/own", Digest: "1", Spec: &portolanv1.PolicyBundleSpec{Files: map[string]string{"a": "broken"}}},
	}
	in := func(tenant string) policy.Network {
		return policy.Network{Source: policy.Peer{Workload: "web"}, Destination: policy.Peer{Tenant: tenant, Workload: "api"}}
	}
	auth, faults := s.compile(t.Context(), compileLines, intents)
	if faults["tenants/shop/policyBundles/own"] == "" || len(faults) != 1 {
		t.Errorf("faults are %v", faults)
	}
	if auth.Authorize(t.Context(), in("shop")).Allowed {
		t.Error("the tenant of the broken bundle is allowed")
	}
	if !auth.Authorize(t.Context(), in("other")).Allowed {
		t.Error("another tenant suffers")
	}
	own := func(digest, content string) {
		intents[1] = &linkv1.PolicyIntent{Name: intents[1].GetName(), Digest: digest, Spec: &portolanv1.PolicyBundleSpec{Files: map[string]string{"a": content}}}
	}
	own("2", "web api")
	if auth, _ = s.compile(t.Context(), compileLines, intents); !auth.Authorize(t.Context(), in("shop")).Allowed {
		t.Error("the mended bundle is not used")
	}
	own("3", "broken")
	if auth, _ = s.compile(t.Context(), compileLines, intents); !auth.Authorize(t.Context(), in("shop")).Allowed {
		t.Error("the last good version does not hold")
	}
}

func TestConnectionsAreRememberedReviewedAndForgotten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "conns")
	log := slog.New(slog.DiscardHandler)
	table := newConnTable(dir, log)
	if err := table.restore(); err != nil {
		t.Fatal(err)
	}
	web, cart := "spiffe://"+domain+"/tenant/shop/workload/web", "spiffe://"+domain+"/tenant/shop/workload/cart"
	remote := func(n uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("10.200.1.2"), n) }
	table.add(call{allocation: "api-1", principal: web, source: remote(1), port: 8080})
	table.add(call{allocation: "api-1", principal: cart, source: remote(2), port: 8080})
	table.close()

	table = newConnTable(dir, log)
	if err := table.restore(); err != nil {
		t.Fatal(err)
	}
	defer table.close()
	if n := table.count("api-1"); n != 2 {
		t.Fatalf("%d connections are remembered after a restart, want 2", n)
	}
	net := networktest.NewFake("")
	net.Connect("api-1", remote(1), 8080)
	net.Connect("api-1", remote(2), 8080)
	if n := table.review(t.Context(), testWorld(t, "web api")); n != 1 {
		t.Fatalf("%d are denied, want 1", n)
	}
	net.Fail(context.DeadlineExceeded)
	if err := table.sweep(t.Context(), net); err == nil {
		t.Fatal("a failed closing is not told")
	}
	net.Fail(nil)
	if err := table.sweep(t.Context(), net); err != nil {
		t.Fatal(err)
	}
	open, err := net.Remotes(t.Context(), "api-1")
	if err != nil || !slices.Equal(open, []netip.AddrPort{remote(1)}) || table.count("api-1") != 1 {
		t.Fatalf("open are %v, error %v, remembered %d", open, err, table.count("api-1"))
	}
	for n := range uint16(maxConns) {
		table.add(call{allocation: "api-1", principal: web, source: remote(100 + n), port: 8080})
	}
	if table.add(call{allocation: "api-1", principal: web, source: remote(99), port: 8080}) {
		t.Error("there is no bound")
	}
	table.forget(func(string) bool { return false })
	if table.count("api-1") != 0 {
		t.Error("a replica that is gone is remembered")
	}
	if files, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(files) != 0 {
		t.Errorf("files are left: %q, %v", files, err)
	}
}

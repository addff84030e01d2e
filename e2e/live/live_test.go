package live

import (
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func wl(t *testing.T, name string) *portolanv1.Workload {
	t.Helper()
	w, err := portolanv1.NewWorkloadServiceClient(fleet.conn).GetWorkload(always(t), &portolanv1.GetWorkloadRequest{Name: "tenants/shop/workloads/" + name})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// 1. The shop is applied; every replica is ready; get and describe show where and
// why, explain says why not the others; and the path of a fresh workload in time.
func Test01ApplyToRunning(t *testing.T) {
	settle(t)
	if out := cli(t, "get", "workloads", "-t", "shop", "-o", "wide"); !strings.Contains(out, "catalog") || !strings.Contains(out, "4/4") {
		t.Errorf("get workloads:\n%s", out)
	}
	if out := cli(t, "capacity"); strings.Count(out, "default") != 2 || strings.Count(out, "2/2") != 4 {
		t.Errorf("capacity does not show the pool of each cluster with its two nodes:\n%s", out)
	}
	out := cli(t, "describe", "workload", "redis", "-t", "shop")
	for _, want := range []string{"Placements:", "eu-west", "Replicas:", "resolved to", "sha256:"} {
		if !strings.Contains(out, want) {
			t.Errorf("describe lacks %q:\n%s", want, out)
		}
	}
	out = cli(t, "explain", "workload", "redis", "-t", "shop")
	if !strings.Contains(out, "us-east") || !strings.Contains(strings.ToLower(out), "region") {
		t.Errorf("explain does not say why not us-east:\n%s", out)
	}
	const probe = `
kind: Workload
tenant: shop
name: probe
spec:
  replicas: 2
  containers:
  - image: registry.portolan.internal:7500/shop/payments:v1
    requests: {cpu: 50m}
    limits: {cpu: 200m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 100ms}
---
{kind: Service, tenant: shop, name: probe, spec: {ports: [{port: 80, target_port: 8080}]}}
---
{kind: Route, tenant: shop, name: probe, spec: {ingress_hosts: [probe.shop.localhost], rules: [{backends: [{service: probe}]}]}}
`
	t.Cleanup(func() {
		if out, errOut, err := run(t, probe, "delete", "-f", "-"); err != nil {
			t.Errorf("delete probe: %v %s%s", err, out, errOut)
		}
	})
	sent := time.Now()
	apply(t, probe)
	accepted := time.Now()
	first := time.Duration(0)
	eventually(t, 30*time.Second, "first request", func() error {
		req, err := http.NewRequestWithContext(always(t), http.MethodGet, "http://probe.shop.localhost/healthz", nil)
		if err != nil {
			return err
		}
		resp, err := hop(ingressOf["eu-west"][0], false).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		// The shop's policy knows no caller of probe: 403 is its Envoy's answer.
		if resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		first = time.Since(sent)
		return nil
	})
	cli(t, "wait", "workload", "probe", "-t", "shop")
	w := wl(t, "probe")
	ps, err := portolanv1.NewWorkloadServiceClient(fleet.conn).ListPlacements(always(t), &portolanv1.ListPlacementsRequest{Parent: w.GetName()})
	if err != nil || len(ps.GetPlacements()) == 0 {
		t.Fatalf("placements: %v %v", ps, err)
	}
	base := w.GetCreateTime().AsTime()
	t.Logf("CLI sent → accepted %s", accepted.Sub(sent).Round(time.Millisecond))
	for _, r := range replicas(t, "probe") {
		tl := r.GetTimeline()
		var decided *timestamppb.Timestamp
		for _, p := range ps.GetPlacements() {
			if last(p.GetName()) == r.GetCluster() {
				decided = p.GetCreateTime()
			}
		}
		var steps []string
		prev := base
		for _, s := range []struct {
			name string
			at   *timestamppb.Timestamp
		}{{"decided", decided}, {"at cluster", tl.GetAtCluster()}, {"bound", tl.GetBound()}, {"started", tl.GetStarted()}, {"ready", tl.GetReady()}} {
			if s.at == nil {
				t.Errorf("%s has no time for %q", r.GetName(), s.name)
				continue
			}
			steps = append(steps, fmt.Sprintf("%s +%s", s.name, s.at.AsTime().Sub(prev).Round(time.Millisecond)))
			prev = s.at.AsTime()
		}
		t.Logf("%s in %s: accept → %s", last(r.GetName()), r.GetCluster(), strings.Join(steps, " → "))
	}
	t.Logf("sent → first request answered %s", first.Round(time.Millisecond))
}

// 2. Admission refuses with rule, file and line; a mutable tag becomes a digest and
// stays visible; nothing refused is stored, and the audit says so.
func Test02Admission(t *testing.T) {
	refused := func(name, yaml string, want ...string) {
		t.Helper()
		out, errOut, err := run(t, yaml, "apply", "-f", "-")
		if err == nil {
			t.Fatalf("%s was accepted: %s", name, out)
		}
		for _, w := range want {
			if !strings.Contains(errOut, w) {
				t.Errorf("%s: error lacks %q:\n%s", name, w, errOut)
			}
		}
		if _, errOut, err := run(t, "", "get", "workload", name, "-t", "shop"); err == nil || !strings.Contains(errOut, "not found") && !strings.Contains(errOut, "no ") {
			t.Errorf("%s may be stored: %v %s", name, err, errOut)
		}
		audit := cli(t, "get", "auditentries", "-t", "shop", "-o", "json")
		if !strings.Contains(audit, "workloads/"+name) || !strings.Contains(audit, "AUDIT_DECISION_REFUSED") {
			t.Errorf("%s: the audit does not tell of it", name)
		}
		t.Logf("%s: %s", name, strings.ReplaceAll(strings.TrimSpace(errOut), "\n", " | "))
	}
	refused("nolimits", "{kind: Workload, tenant: shop, name: nolimits, spec: {containers: [{image: 'registry.portolan.internal:7500/shop/web:v1'}]}}", "limits", ".rego:")
	refused("elsewhere", "{kind: Workload, tenant: shop, name: elsewhere, spec: {containers: [{image: 'docker.io/library/nginx:1', limits: {cpu: 100m, memory: 32Mi}}]}}", "docker.io", "image")
	w := wl(t, "web")
	c := w.GetSpec().GetContainers()[0]
	if !strings.HasSuffix(c.GetImage(), "shop/web:v1") || !strings.Contains(c.GetResolvedImage(), "shop/web@sha256:") {
		t.Errorf("tag %q, resolved %q", c.GetImage(), c.GetResolvedImage())
	}
	t.Logf("tag %s → %s", c.GetImage(), c.GetResolvedImage())
}

// canary makes a route for catalog with weights over v1 and v2.
func canary(v1, v2 int) string {
	return fmt.Sprintf(`
kind: Route
tenant: shop
name: catalog
spec:
  service: catalog
  rules: [{backends: [{revision: v1, weight: %d}, {revision: v2, weight: %d}]}]
`, v1, v2)
}

const catalogV2 = `
kind: Workload
tenant: shop
name: catalog
spec:
  replicas: 4
  revision: v2
  containers:
  - image: registry.portolan.internal:7500/shop/catalog:v2
    requests: {cpu: 50m}
    limits: {cpu: 500m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
    liveness: {http: {path: /livez, port: 8080}, period: 1s}
  placement: {failover: {after: 3s}}
`

// 4. A canary by weights: within a point at 10,000 requests; no failed request
// while they change; wait names a frozen proxy.
func Test04Canary(t *testing.T) {
	settle(t)
	apply(t, canary(100, 0)[0:strings.Index(canary(100, 0), "rules")]+"rules: [{backends: [{revision: v1}]}]\n")
	cli(t, "wait")
	t.Cleanup(func() {
		apply(t, canary(0, 100)[0:strings.Index(canary(0, 100), "rules")]+"rules: [{backends: [{}]}]\n")
		back, err := exec.Command(fleet.cli, "apply", "-f", "../storefront/manifests/30-catalog.yaml", "--config", fleet.config).CombinedOutput()
		if err != nil {
			t.Errorf("back to v1: %v %s", err, back)
		}
		cli(t, "delete", "route", "catalog", "-t", "shop")
		settle(t)
	})
	apply(t, catalogV2)
	cli(t, "wait", "workload", "catalog", "-t", "shop", "--timeout", "90s")
	apply(t, canary(90, 10))
	cli(t, "wait")
	share := func(n int) (float64, int) {
		var mu sync.Mutex
		v2, bad := 0, 0
		hc := hop(ingressOf["eu-west"][0], true)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range n / 16 {
					a, err := call(always(t), hc, http.MethodGet, "/api/items")
					mu.Lock()
					if err != nil || a.code != http.StatusOK {
						bad++
					} else if a.header.Get("X-Upstream-Version") == "v2" {
						v2++
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		return 100 * float64(v2) / float64(n), bad
	}
	got, bad := share(10000)
	t.Logf("10,000 requests at 90/10: %.2f %% reached v2, %d failed", got, bad)
	if got < 9 || got > 11 || bad > 0 {
		t.Errorf("share of v2 is %.2f %%, %d failed; want 10 ± 1, 0", got, bad)
	}
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 200)
	// The load must run before the change does.
	eventually(t, 10*time.Second, "load", func() error {
		if n, _ := l.sample(); n < 200 {
			return fmt.Errorf("%d requests so far", n)
		}
		return nil
	})
	changed := time.Now()
	apply(t, canary(50, 50))
	cli(t, "wait", "--revision", routeRevision(t))
	t.Logf("50/50 live everywhere after %s", time.Since(changed).Round(time.Millisecond))
	proxiesServe(t, []int{90, 10}, 50)
	got, bad = share(2000)
	total, failed := l.Stop()
	t.Logf("at 50/50: %.2f %% reached v2; during the change %d requests, %d failed", got, total, failed)
	if got < 45 || got > 55 || bad+failed > 0 {
		t.Errorf("share %.2f %%, failed %d and %d (%s)", got, bad, failed, l.first)
	}
	frozenProxyIsNamed(t)
}

// routeRevision is the revision at which the canary's route was last written.
func routeRevision(t *testing.T) string {
	t.Helper()
	r, err := portolanv1.NewMeshServiceClient(fleet.conn).GetRoute(always(t), &portolanv1.GetRouteRequest{Name: "tenants/shop/routes/catalog"})
	if err != nil {
		t.Fatal(err)
	}
	return strconv.FormatInt(r.GetRevision(), 10)
}

// occupy makes sure that a node of eu-west has replicas to lose: one that was lost
// by an earlier test came back empty, and nothing moves what runs well. New
// replicas go to the emptier node, so a revision of catalog goes round.
func occupy(t *testing.T, node string) {
	t.Helper()
	if len(onNode(ready(replicas(t, "-")), node)) > 0 {
		return
	}
	t.Cleanup(func() {
		if out, err := exec.Command(fleet.cli, "apply", "-f", "../storefront/manifests/30-catalog.yaml", "--config", fleet.config).CombinedOutput(); err != nil {
			t.Errorf("back to v1: %v %s", err, out)
		}
		settle(t)
	})
	apply(t, catalogV2)
	cli(t, "wait", "workload", "catalog", "-t", "shop", "--timeout", "90s")
	settle(t)
	if len(onNode(ready(replicas(t, "catalog")), node)) == 0 {
		t.Fatalf("no replica of the shop on %s: there is nothing to lose", node)
	}
}

// proxiesServe asks every proxy of the fleet itself which weights it serves: each
// replica's Envoy and each gateway. All that have the route have the new weights
// alone, and every caller has it.
func proxiesServe(t *testing.T, was []int, weight int) {
	t.Helper()
	all := replicas(t, "-")
	sys, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListReplicas(always(t), &portolanv1.ListReplicasRequest{Parent: "tenants/system/workloads/-"})
	if err != nil {
		t.Fatal(err)
	}
	holders, asked := map[string]int{}, 0
	for _, r := range append(all, sys.GetReplicas()...) {
		if workloadOf(r) == "restock" {
			continue // a job that has ended has no proxy
		}
		asked++
		dump := admin(t, r.GetNode(), last(r.GetName()), "/config_dump?resource=dynamic_route_configs")
		flat := strings.Join(strings.Fields(dump), "")
		fresh := strings.Count(flat, fmt.Sprintf(`"weight":%d,`, weight)) + strings.Count(flat, fmt.Sprintf(`"weight":%d}`, weight))
		for _, w := range was {
			if strings.Contains(flat, fmt.Sprintf(`"weight":%d,`, w)) || strings.Contains(flat, fmt.Sprintf(`"weight":%d}`, w)) {
				t.Errorf("wait returned, but %s still serves weight %d", r.GetName(), w)
			}
		}
		if fresh >= 2 {
			holders[workloadOf(r)]++
		} else if workloadOf(r) == "web" {
			t.Errorf("wait returned, but %s serves %d back ends of weight %d", r.GetName(), fresh, weight)
		}
	}
	if holders["web"] != len(ready(replicas(t, "web"))) {
		t.Errorf("web's proxies with the new weights: %d", holders["web"])
	}
	t.Logf("%d proxies asked; with the route: %v", asked, holders)
}

func frozenProxyIsNamed(t *testing.T) {
	web := ready(replicas(t, "web"))[0]
	name := web.GetNode() + "/envoy/" + last(web.GetName())
	local(t, "freeze", name)
	defer local(t, "thaw", name)
	apply(t, canary(60, 40))
	out, errOut, err := run(t, "", "wait", "--timeout", "4s")
	if err == nil || !strings.Contains(errOut, last(web.GetName())) {
		t.Errorf("wait with a frozen proxy: %v\n%s%s; want it to name %s", err, out, errOut, last(web.GetName()))
	}
	t.Logf("frozen: %s", strings.ReplaceAll(strings.TrimSpace(errOut), "\n", " | "))
	local(t, "thaw", name)
	cli(t, "wait", "--timeout", "30s")
}

// 7. A node is cut off: its replicas run elsewhere in the region, the others never
// stop; it returns: no doubles remain.
func Test07NodeLost(t *testing.T) {
	settle(t)
	occupy(t, "eu-west-2")
	before := replicas(t, "-")
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 50)
	cut := time.Now()
	local(t, "cut", "eu-west-2")
	t.Cleanup(func() { local(t, "heal", "eu-west-2") })
	moved := eventually(t, 60*time.Second, "replicas of the lost node run elsewhere", func() error {
		for _, b := range before {
			w := strings.Split(b.GetName(), "/")[3]
			if b.GetNode() != "eu-west-2" || w == "restock" {
				continue
			}
			rs, err := listReplicas(always(t), w)
			if err != nil {
				return err
			}
			n := 0
			for _, r := range ready(in(rs, "eu-west")) {
				if r.GetNode() == "eu-west-1" {
					n++
				}
			}
			var had int
			for _, o := range before {
				if strings.Split(o.GetName(), "/")[3] == w && o.GetCluster() == "eu-west" {
					had++
				}
			}
			if n < had {
				return fmt.Errorf("%s: %d of %d ready on eu-west-1", w, n, had)
			}
		}
		return nil
	})
	t.Logf("node cut → its %d replicas ready elsewhere: %s", len(onNode(before, "eu-west-2")), moved.Round(time.Millisecond))
	// What begins after the loss was handled fails no more; what was in flight then may.
	handled := time.Now()
	total0, failed0 := l.sample()
	eventually(t, 30*time.Second, "enough requests after the loss", func() error {
		if n, _ := l.sample(); n < total0+200 {
			return fmt.Errorf("%d", n-total0)
		}
		return nil
	})
	total, failed := l.Stop()
	t.Logf("requests %d, failed %d, of these after the move %d%s", total, failed, failed-failed0, l.lastFailure(cut))
	if l.failedSince(handled) {
		t.Errorf("requests that began after the loss was handled failed: %s", l.first)
	}
	pids := map[string]int32{}
	for _, r := range replicas(t, "-") {
		if r.GetNode() == "eu-west-1" && len(r.GetContainers()) > 0 {
			pids[r.GetName()] = r.GetContainers()[0].GetPid()
		}
	}
	for _, b := range before {
		if b.GetNode() == "eu-west-1" && len(b.GetContainers()) > 0 && b.GetReady() && pids[b.GetName()] != b.GetContainers()[0].GetPid() {
			t.Errorf("%s on the healthy node has pid %d, had %d", b.GetName(), pids[b.GetName()], b.GetContainers()[0].GetPid())
		}
	}
	local(t, "heal", "eu-west-2")
	settle(t)
}

// 8. A cluster is cut off: replicas with a failover rule run in the other one,
// callers there go on; it heals: as declared, no doubles.
func Test08ClusterLost(t *testing.T) {
	settle(t)
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 50)
	cut := time.Now()
	local(t, "cut", "us-east")
	t.Cleanup(func() { local(t, "heal", "us-east") })
	noticed := eventually(t, 20*time.Second, "the loss is noticed", func() error {
		if out := cli(t, "get", "cluster", "us-east"); !strings.Contains(out, "lost") {
			return errors.New(out)
		}
		return nil
	})
	failedOver := eventually(t, 60*time.Second, "catalog runs in eu-west alone", func() error {
		rs, err := listReplicas(always(t), "catalog")
		if err != nil {
			return err
		}
		if n := len(ready(in(rs, "eu-west"))); n < 4 {
			return fmt.Errorf("%d of 4 ready", n)
		}
		return nil
	})
	t.Logf("cut → noticed %s → failed over %s", noticed.Round(time.Millisecond), (noticed + failedOver).Round(time.Millisecond))
	if out := cli(t, "explain", "workload", "catalog", "-t", "shop"); !strings.Contains(strings.ToLower(out), "lost") {
		t.Errorf("explain does not tell of the loss:\n%s", out)
	}
	total0, failed0 := l.sample()
	eventually(t, 30*time.Second, "enough requests after the loss", func() error {
		if n, _ := l.sample(); n < total0+200 {
			return fmt.Errorf("%d", n-total0)
		}
		return nil
	})
	total, failed := l.Stop()
	t.Logf("requests %d, failed %d, of these after the failover %d%s", total, failed, failed-failed0, l.lastFailure(cut))
	if failed > 0 && l.lastAt.After(cut.Add(noticed)) {
		t.Errorf("callers in eu-west failed after the cut was noticed: %d, %s", failed, l.first)
	}
	local(t, "heal", "us-east")
	settle(t)
	if n := len(in(replicas(t, "catalog"), "us-east")); n != 2 {
		t.Errorf("after heal us-east runs %d of catalog, want 2", n)
	}
}

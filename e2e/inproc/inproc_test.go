package inproc

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const tenant = `
{kind: Tenant, name: shop, spec: {display_name: Shop, ingress_suffixes: [shop.localhost]}}
---
kind: PolicyBundle
name: guardrail
spec:
  kind: network
  files:
    guardrail.rego: |
      package portolan.network

      default allow := false

      allow if input.source.tenant == input.destination.tenant

      allow if input.source.workload == "ingress"
---
`

// calls is the tenant's policy: who may call whom.
func calls(callers string) string {
	return `
kind: PolicyBundle
tenant: shop
name: calls
spec:
  kind: network
  files:
    calls.rego: |
      package portolan.network

      default allow := false

      callers := ` + callers + `

      allow if input.source.workload in callers[input.destination.workload]
---
`
}

// workload is one of n replicas with its mesh name.
func workload(name string, n int, revision string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: %s
spec:
  replicas: %d
  revision: %s
  containers:
  - image: %s/shop/%s:%s
    limits: {cpu: 500m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
  placement: {failover: {after: 3s}}
---
{kind: Service, tenant: shop, name: %s, spec: {ports: [{port: 80, target_port: 8080}]}}
---
`, name, n, revision, registry, name, revision, name)
}

// route sends requests to catalog to back ends, "{revision: v1, weight: 90}, …".
func route(backends string) string {
	return `{kind: Route, tenant: shop, name: catalog, spec: {service: catalog, rules: [{backends: [` + backends + "]}]}}\n"
}

func weights(v1, v2 int) string {
	return route(fmt.Sprintf("{revision: v1, weight: %d}, {revision: v2, weight: %d}", v1, v2))
}

var shop = tenant + calls(`{"catalog": {"web"}, "web": {"ingress"}}`) + workload("web", 2, "v1") + workload("catalog", 4, "v1")

// inShop is a test on the shop, running and converged.
func inShop(t *testing.T, test func(t *testing.T, f *Fleet)) {
	t.Helper()
	Run(t, func(t *testing.T, f *Fleet) {
		f.Apply(shop)
		f.Settled(10*time.Second, "web", 2)
		f.Settled(10*time.Second, "catalog", 4)
		f.WaitConverged()
		test(t, f)
	})
}

func TestApplyToRunning(t *testing.T) {
	Run(t, func(t *testing.T, f *Fleet) {
		applied := time.Now()
		f.Apply(shop)
		f.Settled(10*time.Second, "web", 2)
		f.Settled(10*time.Second, "catalog", 4)
		running := time.Since(applied)
		converged := f.WaitConverged()
		r := f.Replicas("catalog")
		for _, x := range r {
			tl := x.GetTimeline()
			t.Logf("%s: at the cluster %v, bound %v, at the node %v, pulled %v, network %v, started %v, ready %v", x.GetName(),
				tl.GetAtCluster().AsTime().Sub(applied), tl.GetBound().AsTime().Sub(applied), tl.GetAtNode().AsTime().Sub(applied), tl.GetPulled().AsTime().Sub(applied),
				tl.GetNetworkReady().AsTime().Sub(applied), tl.GetStarted().AsTime().Sub(applied), tl.GetReady().AsTime().Sub(applied))
		}
		t.Logf("all ready after %v, converged %v later", running, converged)
		perNode := map[string]int{}
		for _, i := range f.Running("catalog") {
			perNode[i.Node]++
		}
		if len(perNode) != 4 {
			t.Errorf("catalog is not spread over clusters and nodes: %v", perNode)
		}
		for _, from := range f.Running("web") {
			if r := f.Call(from, "catalog", 0); !r.OK() || !strings.HasPrefix(r.Caller, "spiffe://"+f.node(from.Node).cluster.name) {
				t.Errorf("%s calls catalog: %+v", from.Replica, r)
			}
		}
	})
}

func TestCanary(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		f.Apply(route("{revision: v1, weight: 100}"))
		f.Apply(workload("catalog", 4, "v2"))
		f.Settled(10*time.Second, "catalog", 8)
		shares := func() int {
			byRevision := map[string]string{}
			for _, r := range f.Replicas("catalog") {
				byRevision[r.GetName()[strings.LastIndex(r.GetName(), "/")+1:]] = r.GetRevision()
			}
			from, v2 := f.Caller("web"), 0
			for i := range 100 {
				r := f.Call(from, "catalog", float64(i)/100)
				if !r.OK() {
					t.Fatalf("a call failed: %+v", r)
				}
				if byRevision[r.Callee] == "v2" {
					v2++
				}
			}
			return v2
		}
		for _, w := range []int{0, 10, 50, 100} {
			f.Apply(weights(100-w, w))
			f.WaitConverged()
			if got := shares(); got != w {
				t.Errorf("%d of 100 requests go to v2, want %d", got, w)
			}
		}
		frozen := f.Caller("web", "us-east")
		f.must("freeze", f.node(frozen.Node).proxies.Freeze(frozen.Replica, true))
		f.Apply(weights(50, 50))
		ok, laggards := f.Converged(5 * time.Second)
		var names []string
		for _, l := range laggards {
			names = append(names, l.GetName())
		}
		if want := []string{"clusters/us-east", "clusters/us-east/nodes/" + frozen.Node + "/proxies/" + frozen.Replica}; ok || !slices.Equal(names, want) {
			t.Errorf("a frozen proxy: converged %v, laggards %q, want %q", ok, names, want)
		}
		f.must("thaw", f.node(frozen.Node).proxies.Freeze(frozen.Replica, false))
		t.Logf("after the thaw converged within %v", f.WaitConverged())
	})
}

func TestPolicy(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		expect := func(callers string, status int) {
			t.Helper()
			f.Apply(calls(callers))
			took := f.Within(time.Second, "the policy's effect", func() string {
				for _, from := range f.Running("web") {
					if r := f.Call(from, "catalog", 0); r.Status != status {
						return fmt.Sprintf("%+v", r)
					}
				}
				return ""
			})
			t.Logf("%s: %d after %v", callers, status, took)
		}
		expect(`{"catalog": {"nobody"}}`, 403)
		expect(`{"catalog": {"web"}}`, 200)
		expect(`{}`, 403)
		if err := f.TryApply(calls(`{"catalog": `)); err == nil || !strings.Contains(err.Error(), "calls.rego:") {
			t.Errorf("a policy that does not compile: %v", err)
		}
		expect(`{"catalog": {"web"}}`, 200)
		from := f.Caller("web")
		for _, n := range f.nodes() {
			f.Kill(n.warden())
		}
		if r := f.Call(from, "catalog", 0); r.Status != 403 {
			t.Errorf("without wardens: %+v", r)
		}
		for _, n := range f.nodes() {
			f.Start(n.warden())
		}
		f.Within(5*time.Second, "the wardens' return", func() string {
			if r := f.Call(from, "catalog", 0); !r.OK() {
				return fmt.Sprintf("%+v", r)
			}
			return ""
		})
	})
}

func TestNodeLoss(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		away := f.Running("catalog", "us-east-2")
		before := f.Snapshot("catalog", "web")
		for id, i := range before {
			if i.Node == "us-east-2" {
				delete(before, id)
			}
		}
		f.Cut("us-east-2")
		took := f.Within(15*time.Second, "catalog beside the lost node", func() string {
			if n := len(f.Running("catalog", "us-east-1")); n != 2 {
				return fmt.Sprintf("%d run on us-east-1", n)
			}
			return ready(f, "catalog", 4)
		})
		t.Logf("replaced after %v", took)
		f.WaitConverged()
		for i := range 20 {
			if r := f.Call(f.Caller("web", "eu-west", "us-east-1"), "catalog", float64(i)/20); !r.OK() {
				t.Errorf("call without the lost node: %+v", r)
			}
		}
		for id, b := range before {
			if a := f.Snapshot("catalog", "web")[id]; a != b {
				t.Errorf("%s was touched: %+v, before %+v", id, a, b)
			}
		}
		f.Heal("us-east-2")
		t.Logf("no doubles after %v", f.Settled(20*time.Second, "catalog", 4))
		f.Settled(20*time.Second, "web", 2)
		f.WaitConverged()
		for _, a := range f.Running("catalog", "us-east-2") {
			if a == away[0] {
				t.Errorf("%s still runs beside its substitute", a.Replica)
			}
		}
	})
}

func ready(f *Fleet, workload string, n int32) string {
	w := Get(f, &portolanv1.Workload{}, "tenants/shop/workloads/"+workload)
	if got := w.GetStatus().GetReadyReplicas(); got != n {
		return fmt.Sprintf("%d replicas of %s are ready, want %d: %v", got, workload, n, w.GetStatus())
	}
	return ""
}

func TestClusterLoss(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("catalog", "web")
		f.Cut("us-east")
		took := f.Within(20*time.Second, "failover to eu-west", func() string {
			if n := len(f.Running("catalog", "eu-west")); n != 4 {
				return fmt.Sprintf("%d of catalog run in eu-west", n)
			}
			if n := len(f.Running("web", "eu-west")); n != 2 {
				return fmt.Sprintf("%d of web run in eu-west", n)
			}
			return ready(f, "catalog", 4)
		})
		t.Logf("failed over after %v", took)
		f.WaitConverged()
		for i := range 20 {
			for _, from := range append(f.Running("web", "eu-west"), f.Caller("web", "us-east")) {
				if r := f.Call(from, "catalog", float64(i)/20); !r.OK() || f.node(from.Node).cluster != f.owner(r.Callee).cluster {
					t.Errorf("call from %s: %+v", from.Node, r)
				}
			}
		}
		f.Heal("us-east")
		t.Logf("as declared after %v", f.Settled(30*time.Second, "catalog", 4))
		f.Settled(30*time.Second, "web", 2)
		f.WaitConverged()
		f.Untouched(before)
	})
}

func TestRestarts(t *testing.T) {
	for _, c := range []struct {
		name  string
		kill  []string
		pause time.Duration
	}{
		{"federation replica", []string{"fed-1"}, 0},
		{"both federation replicas", []string{"fed-1", "fed-2"}, 8 * time.Second},
		{"cluster", []string{"eu-west"}, 0},
		{"cluster, later", []string{"eu-west"}, 8 * time.Second},
		{"agent", []string{"eu-west-1/agent"}, 0},
		{"agent, later", []string{"eu-west-1/agent"}, 2 * time.Second},
		{"warden", []string{"eu-west-1/warden"}, 2 * time.Second},
		{"everything", []string{"fed-1", "fed-2", "eu-west", "us-east", "eu-west-1/agent", "eu-west-1/warden", "us-east-1/agent", "us-east-1/warden"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			inShop(t, func(t *testing.T, f *Fleet) {
				before := f.Snapshot("catalog", "web")
				f.Kill(c.kill...)
				f.Sleep(c.pause)
				f.Start(c.kill...)
				f.Apply(route("{revision: v1, weight: 100}")) // what is new gets through
				t.Logf("converged after %v", f.WaitConverged())
				f.Sleep(5 * time.Second)
				f.Untouched(before)
				f.Settled(time.Second, "catalog", 4)
				for _, from := range f.Running("web") {
					if r := f.Call(from, "catalog", 0.5); !r.OK() {
						t.Errorf("call from %s: %+v", from.Replica, r)
					}
				}
			})
		})
	}
}

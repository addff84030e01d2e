package inproc

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
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
		stop := always(f)
		for _, w := range []int{0, 10, 50, 100} {
			f.Apply(weights(100-w, w))
			f.WaitConverged()
			if got := shares(); got != w {
				t.Errorf("%d of 100 requests go to v2, want %d", got, w)
			}
		}
		stop()
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

// answered fails the test unless every replica of web gets an answer from catalog.
func answered(f *Fleet, places ...string) {
	f.t.Helper()
	for _, from := range f.Running("web", places...) {
		for i := range 10 {
			if r := f.Call(from, "catalog", float64(i)/10); !r.OK() {
				f.t.Errorf("%s on %s calls catalog: %+v", from.Replica, from.Node, r)
			}
		}
	}
}

func ready(f *Fleet, workload string, n int32) string {
	w := Get(f, &portolanv1.Workload{}, "tenants/shop/workloads/"+workload)
	if got := w.GetStatus().GetReadyReplicas(); got != n {
		return fmt.Sprintf("%d replicas of %s are ready, want %d: %v", got, workload, n, w.GetStatus())
	}
	return ""
}

// running waits for replicas of catalog at places, in truth and in status.
func running(f *Fleet, most time.Duration, all int32, n int, places ...string) time.Duration {
	f.t.Helper()
	return f.Within(most, fmt.Sprintf("%d of catalog in %v", n, places), func() string {
		if got := len(f.Running("catalog", places...)); got != n {
			return fmt.Sprintf("%d run", got)
		}
		return ready(f, "catalog", all)
	})
}

// elsewhere is a snapshot without what is in a place.
func elsewhere(f *Fleet, place string) map[string]instance {
	before := f.Snapshot("catalog", "web")
	for id, i := range before {
		if i.Node == place || f.node(i.Node).cluster.name == place {
			delete(before, id)
		}
	}
	return before
}

func TestNodeLoss(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		f.Sleep(6 * time.Second) // a young cluster waits for its nodes' return
		away, others := f.Running("catalog", "us-east-2"), elsewhere(f, "us-east-2")
		f.Cut("us-east-2")
		t.Logf("replaced after %v", running(f, 10*time.Second, 4, 2, "us-east-1"))
		f.WaitConverged()
		answered(f, "eu-west", "us-east-1")
		f.Kept(others)
		f.Heal("us-east-2")
		t.Logf("no doubles after %v", f.Settled(20*time.Second, "catalog", 4))
		f.Settled(20*time.Second, "web", 2)
		f.WaitConverged()
		f.Sleep(3 * time.Second)
		f.Settled(0, "catalog", 4)
		for _, a := range f.Running("catalog", "us-east-2") {
			if slices.Contains(away, a) {
				t.Errorf("%s still runs beside its substitute", a.Replica)
			}
		}
		f.Kept(others)
		answered(f)
	})
}

func TestClusterLoss(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("catalog", "web")
		f.Cut("us-east")
		t.Logf("failed over after %v", running(f, 10*time.Second, 4, 4, "eu-west"))
		f.WaitConverged()
		for range 5 {
			f.Sleep(time.Second)
			answered(f) // on both sides of the cut
			if s := Get(f, &portolanv1.Cluster{}, "clusters/us-east").GetStatus().GetState(); s != portolanv1.ClusterState_CLUSTER_STATE_LOST {
				t.Errorf("us-east is %v", s)
			}
		}
		f.Kept(before)
		f.Heal("us-east")
		t.Logf("as declared after %v", f.Settled(30*time.Second, "catalog", 4))
		f.Settled(30*time.Second, "web", 2)
		f.WaitConverged()
		f.Sleep(3 * time.Second)
		f.Untouched(before)
		f.Settled(0, "catalog", 4)
		answered(f)
	})
}

func TestRestarts(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("catalog", "web")
		for i, c := range []struct {
			kill  []string
			pause time.Duration
		}{
			{[]string{"fed-1"}, 0},
			{[]string{"fed-1", "fed-2"}, 5 * time.Second},
			{[]string{"eu-west"}, 0},
			{[]string{"eu-west"}, 8 * time.Second},
			{[]string{"eu-west-1/agent"}, 0},
			{[]string{"eu-west-1/agent"}, 2 * time.Second},
			{[]string{"eu-west-1/warden"}, 2 * time.Second},
			{[]string{"fed-1", "fed-2", "eu-west", "us-east", "eu-west-1/agent", "eu-west-1/warden", "us-east-1/agent", "us-east-1/warden"}, 0},
		} {
			f.Kill(c.kill...)
			f.Sleep(c.pause)
			if !strings.Contains(strings.Join(c.kill, " "), "warden") {
				answered(f)
			}
			f.Start(c.kill...)
			f.Apply(route(fmt.Sprintf("{revision: v1, weight: %d}, {service: catalog, weight: %d}", 90-i, 10+i))) // what is new gets through
			t.Logf("%v away for %v: converged %v after the return", c.kill, c.pause, f.WaitConverged())
			// Nodes come back to a cluster that was away within 5 s. What stood in for it
			// longer than the workload's failover allows goes then.
			f.Sleep(2*time.Second + c.pause/2)
			f.Settled(10*time.Second, "catalog", 4)
			f.Settled(10*time.Second, "web", 2)
			f.Untouched(before)
			answered(f)
		}
	})
}

// TestStaticStability: each plane does its whole job without the one above.
func TestStaticStability(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		f.Sleep(6 * time.Second)
		others := elsewhere(f, "us-east-2")
		f.Kill("fed-1", "fed-2")
		f.Cut("us-east-2")
		f.Within(10*time.Second, "replacement without a federation", func() string {
			if n := len(f.Running("catalog", "us-east-1")); n != 2 {
				return fmt.Sprintf("%d run on us-east-1", n)
			}
			return ""
		})
		f.Sleep(2 * time.Second)
		answered(f, "eu-west", "us-east-1")
		f.Kept(others)

		f.Kill("eu-west")
		victim := f.Caller("catalog", "eu-west-1")
		f.must("kill a container", f.node(victim.Node).engine.Kill(victim.container))
		f.Within(15*time.Second, "restart without a cluster", func() string {
			if r := f.Running("catalog", "eu-west-1"); len(r) != 1 || r[0].PID == victim.PID {
				return fmt.Sprintf("%+v", r)
			}
			return ""
		})
		f.Sleep(2 * time.Second)
		answered(f, "eu-west", "us-east-1")

		delete(others, victim.Replica)
		f.Heal("us-east-2")
		f.Start("fed-1", "fed-2", "eu-west")
		f.Settled(20*time.Second, "catalog", 4)
		t.Logf("all back: converged after %v", f.WaitConverged())
		f.Sleep(8 * time.Second) // nodes come back to a cluster that was long away within 5 s
		f.Settled(0, "catalog", 4)
		f.Kept(others)
		answered(f)
	})
}

// accepted is the condition of an object that a consumer may refuse.
func accepted(list []*portolanv1.Condition) *portolanv1.Condition {
	for _, c := range list {
		if c.GetType() == "Accepted" {
			return c
		}
	}
	return nil
}

// TestRefusals: what a consumer cannot take is status, and disturbs nobody.
func TestRefusals(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		refused := func(what string, conditions func() []*portolanv1.Condition, words ...string) {
			t.Helper()
			f.Within(5*time.Second, what, func() string {
				c := accepted(conditions())
				for _, w := range words {
					if !strings.Contains(c.GetMessage(), w) {
						return fmt.Sprintf("%q does not say %q", c.GetMessage(), w)
					}
				}
				if c.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE != (len(words) == 0) {
					return c.String()
				}
				return ""
			})
		}
		routeStatus := func() []*portolanv1.Condition {
			return Get(f, &portolanv1.Route{}, "tenants/shop/routes/catalog").GetStatus().GetConditions()
		}
		odd := f.Caller("web", "us-east")
		proxies := f.node(odd.Node).proxies
		f.must("refuse", proxies.Refuse(odd.Replica, func(_, name string) string {
			if strings.Contains(name, "catalog") {
				return "it does not please"
			}
			return ""
		}))
		f.Apply(route("{revision: v1, weight: 100}"))
		refused("a proxy's refusal", routeStatus, "it does not please", odd.Replica)
		answered(f)
		f.must("heal", proxies.Refuse(odd.Replica, nil))
		f.must("kill", proxies.Kill(odd.Replica)) // the same bytes are not offered twice to one process
		f.WaitConverged()
		refused("the refusal's end", routeStatus)

		// A record that no server of this version would write.
		f.Write(store.Service, "tenants/shop/services/odd", &portolanv1.Service{Name: "tenants/shop/services/odd", Spec: &portolanv1.ServiceSpec{}})
		refused("a cluster's refusal", func() []*portolanv1.Condition {
			return Get(f, &portolanv1.Service{}, "tenants/shop/services/odd").GetStatus().GetConditions()
		}, "ports", "clusters/")
		answered(f)
	})
}

// always asks continuously until the returned function is called, which fails the
// test when any request failed.
func always(f *Fleet, places ...string) (stop func()) {
	end, done, faults, asked := make(chan struct{}), make(chan struct{}), map[string]int{}, 0
	callers := f.Running("web", places...)
	go func() {
		defer close(done)
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			for _, from := range callers {
				asked++
				if r := f.Call(from, "catalog", float64(asked%97)/97); !r.OK() {
					faults[fmt.Sprintf("%s: status %d from %s of %s: %s", from.Replica, r.Status, r.Callee, r.Cluster, r.Detail)]++
				}
			}
		}
	}()
	return func() {
		f.t.Helper()
		close(end)
		<-done
		for fault, n := range faults {
			f.t.Errorf("%d of %d requests: %s", n, asked, fault)
		}
	}
}

func TestRollingUpdateLosesNoRequest(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("web")
		stop := always(f)
		f.Apply(workload("catalog", 4, "v2"))
		took := f.Within(30*time.Second, "the update", func() string {
			revisions := map[string]int{}
			for _, r := range f.Replicas("catalog") {
				revisions[r.GetRevision()]++
			}
			if revisions["v2"] != 4 || len(revisions) != 1 {
				return fmt.Sprint(revisions)
			}
			return ""
		})
		f.WaitConverged()
		f.Apply(workload("catalog", 2, "v2"))
		f.Settled(10*time.Second, "catalog", 2)
		f.Sleep(time.Second)
		stop()
		f.Untouched(before)
		t.Logf("updated after %v", took)
	})
}

func TestAcrossClusters(t *testing.T) {
	Run(t, func(t *testing.T, f *Fleet) {
		europe := strings.Replace(workload("catalog", 2, "v1"), "placement: {", "placement: {allowed_regions: [eu-west], ", 1)
		front := "{kind: Route, tenant: shop, name: front, spec: {ingress_hosts: [shop.localhost], rules: [{backends: [{service: web}]}]}}\n"
		f.Apply(tenant + calls(`{"catalog": {"web"}, "web": {"ingress"}}`) + workload("web", 2, "v1") + europe)
		f.Apply(front)
		f.Settled(10*time.Second, "catalog", 2)
		f.Settled(10*time.Second, "web", 2)
		f.WaitConverged()
		far := f.Caller("web", "us-east")
		r := f.Call(far, "catalog", 0)
		if !r.OK() || !r.Via.IsValid() || r.Caller != "spiffe://us-east."+fleetDomain+"/tenant/shop/workload/web" {
			t.Errorf("a call to the other cluster: %+v", r)
		}
		for _, n := range f.nodes() {
			if r := f.Visit(n.name, "shop.localhost"); !r.OK() || f.owner(r.Callee).cluster != n.cluster {
				t.Errorf("a visit at %s: %+v", n.name, r)
			}
			if r := f.Visit(n.name, "other.localhost"); r.Status != 404 {
				t.Errorf("a visit at %s to a host that nobody has: %+v", n.name, r)
			}
		}
		// What is far is called no more than its policy allows.
		f.Apply(calls(`{"web": {"ingress"}}`))
		f.Within(time.Second, "the denial", func() string {
			if r := f.Call(far, "catalog", 0); r.Status != 403 {
				return fmt.Sprintf("%+v", r)
			}
			return ""
		})
		f.Cut("eu-west")
		if r := f.Call(far, "catalog", 0); r.OK() {
			t.Errorf("a call over a cut link: %+v", r)
		}
	})
}

func TestFrozenFederationReplica(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("catalog", "web")
		// Nothing breaks: fed-2, where us-east is at home, just says no more.
		f.Cut("fed-2")
		f.Sleep(2 * time.Second)
		f.Apply(workload("catalog", 6, "v1"))
		t.Logf("scaled without the replica after %v", f.Settled(10*time.Second, "catalog", 6))
		f.WaitConverged()
		for range 10 {
			f.Sleep(500 * time.Millisecond)
			for _, c := range f.clusters {
				if s := Get(f, &portolanv1.Cluster{}, "clusters/"+c.name).GetStatus().GetState(); s != portolanv1.ClusterState_CLUSTER_STATE_READY {
					t.Errorf("%s is %v", c.name, s)
				}
			}
		}
		f.Heal("fed-2")
		f.Sleep(2 * time.Second)
		f.WaitConverged()
		f.Kept(before)
	})
}

func TestDeletionLeavesNothing(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		f.Delete("Service", "tenants/shop/services/catalog")
		f.Delete("Workload", "tenants/shop/workloads/catalog")
		f.Delete("Service", "tenants/shop/services/web")
		f.Delete("Workload", "tenants/shop/workloads/web")
		took := f.Within(20*time.Second, "the end of everything", func() string { return f.leftovers() })
		t.Logf("nothing is left after %v", took)
		f.WaitConverged()
		f.Apply(shop)
		f.Settled(10*time.Second, "catalog", 4)
		f.Settled(10*time.Second, "web", 2)
		f.WaitConverged()
		answered(f)
	})
}

// TestCrashesDuringAnUpdate: whatever dies in the middle, the update ends, nothing
// runs twice, and no request is lost.
func TestCrashesDuringAnUpdate(t *testing.T) {
	inShop(t, func(t *testing.T, f *Fleet) {
		before := f.Snapshot("web")
		stop := always(f)
		for i, victim := range []string{"fed-1", "eu-west", "us-east-1/agent", "us-east"} {
			revision := fmt.Sprintf("w%d", i)
			f.Apply(workload("catalog", 4, revision))
			f.Sleep(time.Duration(40+130*i) * time.Millisecond)
			f.Restart(victim)
			took := f.Within(40*time.Second, "the update in spite of "+victim, func() string {
				n := 0
				for _, r := range f.Replicas("catalog") {
					if r.GetRevision() == revision && r.GetReady() {
						n++
					}
				}
				if all := len(f.Running("catalog")); n != 4 || all != 4 {
					return fmt.Sprintf("%d of %s are ready, %d run", n, revision, all)
				}
				return ""
			})
			t.Logf("%s killed: updated after %v", victim, took)
		}
		f.WaitConverged()
		stop()
		f.Untouched(before)
	})
}

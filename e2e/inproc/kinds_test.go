package inproc

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// inTenant is a test on the tenant alone.
func inTenant(t *testing.T, test func(t *testing.T, f *Fleet)) {
	t.Helper()
	Run(t, func(t *testing.T, f *Fleet) {
		f.Apply(tenant + calls(`{"web": {"ingress"}}`))
		test(t, f)
	})
}

const database = `
kind: Workload
tenant: shop
name: db
spec:
  kind: stateful
  replicas: 2
  revision: %s
  volumes: [{name: data, size: 1Gi}]
  containers:
  - image: ` + registry + `/shop/db:%s
    limits: {cpu: 500m, memory: 64Mi}
    readiness: {tcp: {port: 8080}, period: 1s}
    mounts: [{volume: data, path: /data}]
  placement: {allowed_clusters: [eu-west]}
`

// hostOf finds the replica with a host name: its ID has characters of its owner
// after it.
func hostOf(all map[string]instance, host string) (instance, bool) {
	for id, i := range all {
		if strings.HasPrefix(id, host+"-") {
			return i, true
		}
	}
	return instance{}, false
}

// starts reads what each start of a replica noted in its volume.
func (f *Fleet) starts(node, replica string) []string {
	b, err := os.ReadFile(filepath.Join(f.node(node).data, "volumes", "shop."+replica+".data", "starts"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

// A stateful workload keeps names, nodes and data over a crash of the agent, a
// restart of the container, an update, and a restart of the cluster.
func TestStatefulKeepsNameAndVolume(t *testing.T) {
	inTenant(t, func(t *testing.T, f *Fleet) {
		f.Apply(fmt.Sprintf(database, "v1", "v1"))
		up := f.Settled(20*time.Second, "db", 2)
		before := f.Snapshot("db")
		on := map[string]string{}
		for _, name := range []string{"db-0", "db-1"} {
			i, ok := hostOf(before, name)
			if !ok {
				t.Fatalf("there is no replica %s: %v", name, before)
			}
			on[name] = i.Node
			if got := f.starts(i.Node, name); !slices.Equal(got, []string{name}) {
				t.Errorf("volume of %s on %s says %q", name, i.Node, got)
			}
		}
		t.Logf("up after %v on %v", up, on)

		f.Restart(on["db-0"] + "/agent")
		f.Settled(10*time.Second, "db", 2)
		f.Untouched(before) // a crash of the agent disturbs nothing

		victim, _ := hostOf(before, "db-1")
		f.must("kill the container", f.node(victim.Node).engine.Kill(victim.container))
		back := f.Within(30*time.Second, "db-1 is back", func() string {
			if got := f.starts(victim.Node, "db-1"); !slices.Equal(got, []string{"db-1", "db-1"}) {
				return fmt.Sprintf("its volume says %q", got)
			}
			return ""
		})
		f.Settled(10*time.Second, "db", 2)
		t.Logf("container killed: back on its volume after %v", back)

		f.Restart("eu-west")
		f.Apply(fmt.Sprintf(database, "v2", "v2"))
		took := f.Within(60*time.Second, "all of v2", func() string {
			if n := len(f.Replicas("db")); n != 2 {
				return fmt.Sprintf("%d replicas", n)
			}
			for _, r := range f.Replicas("db") {
				if r.GetRevision() != "v2" || !r.GetReady() {
					return r.String()
				}
			}
			return ""
		})
		f.Settled(10*time.Second, "db", 2)
		for name, node := range on {
			i, _ := hostOf(f.Snapshot("db"), name)
			if i.Node != node || !slices.Contains(f.starts(node, name), name) || len(f.starts(node, name)) < 2 {
				t.Errorf("%s is on %s (was %s); its volume says %q", name, i.Node, node, f.starts(node, name))
			}
		}
		t.Logf("updated in %v", took)

		f.Delete("Workload", "tenants/shop/workloads/db")
		gone := f.Within(60*time.Second, "the volumes are gone", func() string {
			for name, node := range on {
				if _, err := os.Stat(filepath.Join(f.node(node).data, "volumes", "shop."+name+".data")); !os.IsNotExist(err) {
					return fmt.Sprintf("volume of %s on %s: %v", name, node, err)
				}
			}
			return ""
		})
		f.Within(10*time.Second, "the records are gone", func() string {
			if n := len(f.clusters[0].state.Snapshot().Volumes); n > 0 {
				return fmt.Sprintf("%d volumes", n)
			}
			return ""
		})
		t.Logf("deleted with its workload after %v", gone)
	})
}

// batch is a job of three, or a cron workload that runs every minute.
const batch = `
kind: Workload
tenant: shop
name: %s
spec:
  kind: %s
  containers:
  - image: ` + registry + `/batch/work:v1
    args: [exit, "%d", 2s]
    limits: {cpu: 100m, memory: 32Mi}
  job: {completions: %d}
  %s
  placement: {allowed_clusters: [us-east]}
`

func TestJobAndCronFinish(t *testing.T) {
	inTenant(t, func(t *testing.T, f *Fleet) {
		f.Apply(fmt.Sprintf(batch, "once", "job", 0, 3, ""))
		job := f.Within(60*time.Second, "the job is complete", func() string {
			if c := f.Condition("once", "Complete"); c.GetState() != portolanv1.ConditionState_CONDITION_STATE_TRUE {
				return fmt.Sprintf("condition %v, events %q", c, f.Events("once", "Finished"))
			}
			return ""
		})
		if got := f.Events("once", "Finished"); len(got) != 3 || slices.Contains(got, "failed") {
			t.Errorf("replicas ended: %q", got)
		}
		f.Apply(fmt.Sprintf(batch, "tick", "cron", 0, 1, `cron: {schedule: "* * * * *"}`))
		f.Sleep(3*time.Minute + 20*time.Second)
		if got := f.Events("tick", "Finished"); len(got) != 3 || slices.Contains(got, "failed") {
			t.Errorf("runs of three minutes: %q", got)
		}
		if got := f.Events("tick", "RunBegan"); len(got) != 3 {
			t.Errorf("runs that began: %q", got)
		}
		t.Logf("the job was complete after %v", job)
	})
}

// plain is a service in one cluster.
func plain(name string, replicas int, cpu, more string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: %s
spec:
  replicas: %d
  containers:
  - image: %s/shop/%s:v1
    limits: {cpu: %s, memory: 64Mi}
    readiness: {tcp: {port: 8080}, period: 1s}
  placement: {allowed_clusters: [eu-west]}
%s
---
`, name, replicas, registry, name, cpu, more)
}

func TestDrainUnderABudget(t *testing.T) {
	inTenant(t, func(t *testing.T, f *Fleet) {
		f.Apply(plain("web", 6, "500m", "  disruption: {max_unavailable: 1}"))
		f.Settled(20*time.Second, "web", 6)
		if n := len(f.Running("web", "eu-west-1")); n == 0 {
			t.Fatal("nothing runs on eu-west-1")
		}
		f.SetMode("eu-west-1", portolanv1.NodeMode_NODE_MODE_DRAINING)
		least, blocked := 6, 0
		took := f.Within(2*time.Minute, "eu-west-1 is empty", func() string {
			ready := 0
			for _, r := range f.Replicas("web") {
				if r.GetReady() {
					ready++
				}
			}
			least = min(least, ready)
			n := f.Node("eu-west-1")
			blocked = max(blocked, len(n.GetBlocked()))
			if n.GetMode() != portolanv1.NodeMode_NODE_MODE_DRAINING {
				t.Fatalf("mode %v", n.GetMode())
			}
			if left := len(f.Running("web", "eu-west-1")); left > 0 {
				return fmt.Sprintf("%d of web are left: %v", left, n.GetBlocked())
			}
			return ""
		})
		f.Settled(20*time.Second, "web", 6)
		if least < 5 {
			t.Errorf("only %d of 6 were ready at a time; the budget lets 1 be missing", least)
		}
		if blocked == 0 {
			t.Error("the node never said what still ran there")
		}
		if got := f.Events("web", "Drained"); len(got) == 0 {
			t.Error("no event Drained")
		}
		t.Logf("drained in %v, at least %d of 6 ready, events %d", took, least, len(f.Events("web", "Drained")))
		f.SetMode("eu-west-1", portolanv1.NodeMode_NODE_MODE_UNSPECIFIED)
		f.Apply(plain("more", 4, "500m", ""))
		f.Settled(20*time.Second, "more", 4)
		if len(f.Running("more", "eu-west-1")) == 0 {
			t.Error("the freed node takes nothing")
		}
	})
}

// There is room in the cluster, but on no node: the replica of lower priority
// leaves, and its tenant sees why in its events.
func TestPreemptionShowsInEvents(t *testing.T) {
	inTenant(t, func(t *testing.T, f *Fleet) {
		f.Apply(plain("low", 3, "2500m", "  update: {max_surge: 0, max_unavailable: 1}\n  disruption: {max_unavailable: 1}"))
		f.Settled(20*time.Second, "low", 3)
		t.Logf("low: %d on eu-west-1, %d on eu-west-2", len(f.Running("low", "eu-west-1")), len(f.Running("low", "eu-west-2")))
		f.Apply(plain("high", 1, "6", "  update: {max_surge: 0, max_unavailable: 1}\n  priority: 50")) // no surge to reserve: the federation has room
		took := f.Settled(30*time.Second, "high", 1)
		got := f.Events("low", "Preempted")
		if len(got) == 0 || !strings.Contains(got[0], "a workload of higher priority") {
			t.Errorf("events of the displaced: %q", got)
		}
		for _, m := range got {
			if strings.Contains(m, "high/") || strings.Contains(m, "shop") {
				t.Errorf("an event tells who displaced it: %q", m)
			}
		}
		if len(f.Events("high", "Nominated")) == 0 {
			t.Error("no event Nominated")
		}
		t.Logf("high was ready after %v; %d displaced", took, len(got))
	})
}

func TestAutoscaleUpAndDown(t *testing.T) {
	inTenant(t, func(t *testing.T, f *Fleet) {
		f.Load("web", 100)
		least, replicas := int32(2), int32(5)
		f.Put(&portolanv1.Workload{Name: "tenants/shop/workloads/web", Spec: &portolanv1.WorkloadSpec{
			Replicas: &replicas, Containers: []*portolanv1.Container{{
				Image: registry + "/shop/web:v1", Limits: &portolanv1.ResourceList{Cpu: "200m", Memory: "64Mi"},
				Readiness: &portolanv1.Probe{Check: &portolanv1.Probe_Tcp{Tcp: &portolanv1.Probe_TcpCheck{Port: 8080}}, Period: durationpb.New(time.Second)},
			}},
			Placement: &portolanv1.WorkloadSpec_Placement{AllowedClusters: []string{"eu-west"}},
			Autoscale: &portolanv1.Autoscale{
				Min: &least, Max: 10, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU, Target: 50}},
				Down: &portolanv1.ScaleRule{Stabilization: durationpb.New(30 * time.Second)},
			},
		}})
		f.Settled(20*time.Second, "web", 5)
		f.Sleep(40 * time.Second)
		f.Settled(time.Second, "web", 5) // at the target nothing changes
		f.Load("web", 160)
		up := f.Settled(time.Minute, "web", 8) // ceil(5 × 80 ÷ 50)
		f.Load("web", 20)
		down := f.Settled(3*time.Minute, "web", 2)
		if down < 30*time.Second {
			t.Errorf("scaled down after %v, before the window was over", down)
		}
		got := f.Events("web", "Scaled")
		if !slices.ContainsFunc(got, func(m string) bool { return strings.Contains(m, "to 8 replicas: ScaledUp") }) || !strings.Contains(got[len(got)-1], "to 2 replicas: ScaledDown") {
			t.Errorf("events %q", got)
		}
		t.Logf("up after %v, down after %v: %q", up, down, got)
	})
}

package manager

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const (
	stateful = portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL
	cron     = portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
)

// placed gives "name@node" of a workload's live replicas, sorted.
func (r *rig) placed(name string) []string {
	var out []string
	for id, a := range r.store.Snapshot().Allocations {
		if a.GetWorkload() == name && !a.GetStop() {
			out = append(out, id+"@"+a.GetNode())
		}
	}
	slices.Sort(out)
	return out
}

// nodeOf is the node in "replica@node".
func nodeOf(place string) string {
	_, node, _ := strings.Cut(place, "@")
	return node
}

// messages gives the messages of events of a type on objects with the prefix.
func (r *rig) messages(typ, object string) []string {
	var out []string
	for _, e := range r.m.Events() {
		if e.GetType() == typ && strings.HasPrefix(e.GetObject(), object) {
			out = append(out, e.GetMessage())
		}
	}
	return out
}

// within lets virtual time pass until the condition holds, and says how long.
func (r *rig) within(most time.Duration, what string, ok func() bool) time.Duration {
	r.t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > most {
			for _, e := range r.m.Events() {
				r.t.Logf("%v %s %s: %s", e.GetTime().AsTime().Sub(began).Round(time.Millisecond), e.GetObject(), e.GetType(), e.GetMessage())
			}
			r.t.Fatalf("not within %v: %s", most, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(began)
}

// changeWorkload changes the intent of a workload; it is a new revision of the
// federation, and a new epoch.
func (r *rig) changeWorkload(name string, change func(*linkv1.WorkloadIntent)) {
	r.t.Helper()
	w := cloneIntent(r.all["workload/t/"+name])
	w.Revision = r.rev + 1
	w.GetWorkload().Epoch = r.rev + 1
	change(w.GetWorkload())
	r.all["workload/t/"+name] = w
	r.commit()
}

func (r *rig) cluster(spec *portolanv1.ClusterSpec) {
	r.t.Helper()
	r.all["cluster"] = &linkv1.Intent{Revision: r.rev + 1, Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{Cluster: "eu", Spec: spec}}}
	r.commit()
}

func TestStatefulKeepsNameNodeAndVolume(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		r.addNode("n2")
		sp := spec(stateful, "500m")
		sp.Volumes = []*portolanv1.Volume{{Name: "data", Size: "1Gi"}}
		r.want("db", "r1", 3, sp)
		r.within(20*time.Second, "three replicas", func() bool { return len(r.placed("db")) == 3 })
		before := r.placed("db")
		for i := range 3 {
			if !strings.HasPrefix(before[i], fmt.Sprintf("db-%d-", i)) {
				t.Fatalf("names %v", before)
			}
			v := r.store.Snapshot().Volumes[fmt.Sprintf("t.db-%d.data", i)]
			if v.GetNode() != nodeOf(before[i]) || v.GetSizeBytes() != 1<<30 {
				t.Errorf("volume of %s: %v", before[i], v)
			}
		}
		id, _, _ := strings.Cut(before[1], "@")
		a := r.store.Snapshot().Allocations[id]
		if !slices.Equal(a.GetVolumes(), []string{"t.db-1.data"}) || a.GetIndex() != 1 {
			t.Errorf("allocation %v", a)
		}
		// A new revision: one after the other, and each comes back to its volume.
		next := spec(stateful, "400m")
		next.Volumes = sp.Volumes
		r.want("db", "r2", 3, next)
		r.within(60*time.Second, "all of r2", func() bool {
			return slices.Equal(r.on("db"), []string{nodeOf(before[0]) + " r2 ready", nodeOf(before[1]) + " r2 ready", nodeOf(before[2]) + " r2 ready"}) || r2on(r, before)
		})
		if after := r.placed("db"); !slices.Equal(before, after) {
			t.Errorf("places %v, before %v", after, before)
		}
		// The workload goes: the nodes are told to delete, then the records go.
		r.unwant("db")
		r.within(30*time.Second, "volumes are gone", func() bool { return len(r.store.Snapshot().Volumes) == 0 })
		if n := len(r.messages("VolumeDeleted", "tenants/t/workloads/db")); n != 3 {
			t.Errorf("%d volumes were reported as deleted", n)
		}
	})
}

// r2on says that all replicas are of r2 and ready.
func r2on(r *rig, places []string) bool {
	on := r.on("db")
	return len(on) == len(places) && !slices.ContainsFunc(on, func(s string) bool { return !strings.HasSuffix(s, " r2 ready") })
}

func TestDrainUnderABudget(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		for _, n := range []string{"n1", "n2", "n3"} {
			r.addNode(n)
		}
		sp := spec(service, "500m")
		sp.Disruption = &portolanv1.DisruptionBudget{MaxUnavailable: new(int32(1))}
		r.want("web", "r1", 6, sp)
		r.within(10*time.Second, "six are ready", func() bool { return r.ready("web") == 6 })
		if err := r.m.SetMode(t.Context(), "n1", "", portolanv1.NodeMode_NODE_MODE_DRAINING, time.Time{}); err != nil {
			t.Fatal(err)
		}
		least, blocked := 6, false
		took := r.within(60*time.Second, "n1 is empty and six are ready", func() bool {
			least = min(least, r.ready("web"))
			blocked = blocked || len(r.store.Snapshot().Notes.Blocked["n1"]) > 0
			left := slices.ContainsFunc(slices.Collect(maps.Values(r.store.Snapshot().Allocations)), func(a allocation) bool { return a.GetNode() == "n1" })
			return !left && r.ready("web") == 6
		})
		if least < 5 {
			t.Errorf("only %d were ready at a time, the budget allows 1 to be missing", least)
		}
		if !blocked {
			t.Error("nothing said what still ran on n1")
		}
		if got := r.messages("Drained", "tenants/t/workloads/web"); len(got) == 0 {
			t.Error("no event Drained")
		}
		t.Logf("drained in %v, at least %d of 6 were ready", took, least)
	})
}

func TestPreemption(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1") // 4 cores
		low := spec(service, "1500m")
		low.Disruption = &portolanv1.DisruptionBudget{MaxUnavailable: new(int32(1))}
		r.want("low", "r1", 2, low)
		r.within(10*time.Second, "low runs", func() bool { return r.ready("low") == 2 })
		high := spec(service, "2000m")
		high.Priority = 50
		r.want("high", "r1", 1, high)
		took := r.within(20*time.Second, "high runs", func() bool { return r.ready("high") == 1 })
		got := r.messages("Preempted", "tenants/t/workloads/low")
		if len(got) != 1 || !strings.Contains(got[0], "higher priority") || strings.Contains(got[0], "high/") {
			t.Errorf("events of the victim %q", got)
		}
		if n := r.messages("Nominated", "tenants/t/workloads/high"); len(n) != 1 {
			t.Errorf("events of who displaced it %q", n)
		}
		s := r.store.Snapshot()
		if n := len(s.States["t/low"].GetDisruptions()); n != 1 {
			t.Errorf("%d disruptions are remembered", n)
		}
		if p := s.Pending["t/low"]; len(p) == 0 || p[0].Code != "InsufficientCPU" {
			t.Errorf("the other replica of low is pending for %v", p)
		}
		t.Logf("high was ready %v after it came", took)
	})
}

func TestAutoscaleUpAndDown(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		r.addNode("n2")
		sp := spec(service, "100m")
		sp.Autoscale = &portolanv1.Autoscale{
			Min: new(int32(2)), Max: 10, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU, Target: 50}},
			Down: &portolanv1.ScaleRule{Stabilization: durationpb.New(30 * time.Second)},
		}
		r.want("web", "r1", 5, sp)
		r.changeWorkload("web", func(w *linkv1.WorkloadIntent) { w.Revisions[0].MinReplicas, w.Revisions[0].MaxReplicas = 2, 10 })
		usage := func(milli int64) {
			for _, n := range r.nodes {
				n.set(func(n *fakeNode) { n.usage = &nodev1.Usage{CpuMilli: milli} })
			}
		}
		usage(50)
		r.within(10*time.Second, "five are ready", func() bool { return r.ready("web") == 5 })
		_ = n1
		time.Sleep(30 * time.Second)
		if n := r.ready("web"); n != 5 {
			t.Fatalf("%d are ready at the target", n)
		}
		usage(80) // 80 % of what is requested, 50 are wanted: 5 become 8
		up := r.within(40*time.Second, "eight are ready", func() bool { return r.ready("web") == 8 })
		usage(400)
		r.within(time.Minute, "its most are ready", func() bool { return r.ready("web") == 10 })
		time.Sleep(10 * time.Second)
		if got := codesOf(r.store.Snapshot().Notes.Scaling["t/web"]); !slices.Contains(got, "AtMax") {
			t.Errorf("with its most it stays for %v", got)
		}
		for _, n := range r.nodes {
			n.set(func(n *fakeNode) { n.usage = nil })
		}
		time.Sleep(10 * time.Second)
		if got := codesOf(r.store.Snapshot().Notes.Scaling["t/web"]); !slices.Equal(got, []string{"MetricMissing", "MetricsHold"}) {
			t.Errorf("without a metric it stays for %v", got)
		}
		usage(10)
		down := r.within(3*time.Minute, "two are left", func() bool { return r.ready("web") == 2 && len(r.placed("web")) == 2 })
		if down < 30*time.Second {
			t.Errorf("scaled down after %v, before the stabilisation was over", down)
		}
		if got := r.messages("Scaled", "tenants/t/workloads/web"); len(got) < 2 || !strings.Contains(got[0], "from 5 to 8") {
			t.Errorf("events %q", got)
		}
		t.Logf("up after %v, down after %v", up, down)
	})
}

// Usage alone wakes nobody: the manager looks at it at its own times.
func TestUsageWakesNobody(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n := r.addNode("n1")
		r.want("web", "r1", 1, spec(service, "100m"))
		r.within(10*time.Second, "it is ready", func() bool { return r.ready("web") == 1 })
		time.Sleep(10 * time.Second)
		before := r.store.Snapshot().Generation
		for i := range 100 {
			n.set(func(n *fakeNode) { n.usage = &nodev1.Usage{CpuMilli: int64(i)} })
			time.Sleep(200 * time.Millisecond)
		}
		if after := r.store.Snapshot().Generation; after != before {
			t.Errorf("the generation went from %d to %d", before, after)
		}
	})
}

func TestCronRunsAndIsToldOf(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n := r.addNode("n1")
		n.set(func(n *fakeNode) { n.end = portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED })
		sp := spec(cron, "100m")
		sp.Cron = &portolanv1.WorkloadSpec_CronSpec{Schedule: "* * * * *"}
		sp.Job = &portolanv1.WorkloadSpec_JobSpec{}
		r.want("tick", "r1", 1, sp)
		time.Sleep(3*time.Minute + 30*time.Second)
		if got := r.messages("Finished", "tenants/t/workloads/tick"); len(got) != 3 || got[0] != "succeeded" {
			t.Errorf("runs that ended in three and a half minutes: %q", got)
		}
		if r.store.Snapshot().States["t/tick"].GetLastRun() == 0 {
			t.Error("the last run is not remembered")
		}
	})
}

func TestGangWaitsTogether(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		sp := spec(service, "1500m")
		sp.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Gang: &portolanv1.WorkloadSpec_Gang{Deadline: durationpb.New(time.Minute)}}
		r.want("train", "r1", 4, sp)
		time.Sleep(10 * time.Second)
		if got := r.placed("train"); len(got) != 0 {
			t.Fatalf("some of a gang began: %v", got)
		}
		if len(r.messages("GangWaiting", "tenants/t/workloads/train")) != 1 {
			t.Errorf("events %v", r.m.Events())
		}
		p := r.store.Snapshot().Pending["t/train"]
		if len(p) == 0 || len(p[0].Remedies) == 0 || !strings.Contains(p[0].NearestReason, "of CPU more") {
			t.Errorf("pending for %+v", p)
		}
		time.Sleep(time.Minute)
		if len(r.messages("GangExpired", "tenants/t/workloads/train")) != 1 {
			t.Errorf("events %v", r.m.Events())
		}
		r.addNode("n2")
		r.within(10*time.Second, "all run", func() bool { return r.ready("train") == 4 })
	})
}

func TestMisfitLeaves(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1", "disk=ssd")
		r.addNode("n2", "disk=ssd")
		sp := spec(service, "100m")
		sp.Scheduling = &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"disk": "ssd"}}
		r.want("web", "r1", 4, sp)
		r.within(10*time.Second, "four are ready", func() bool { return r.ready("web") == 4 })
		n1.set(func(n *fakeNode) {
			n.facts = &nodev1.NodeFacts{Address: "192.168.0.1", CpuMilli: 4000, MemoryBytes: 8 << 30, Labels: map[string]string{"disk": "hdd"}}
		})
		r.within(time.Minute, "all are on n2", func() bool {
			on := r.on("web")
			return r.ready("web") == 4 && !slices.ContainsFunc(on, func(s string) bool { return strings.HasPrefix(s, "n1") })
		})
		if got := r.messages("Moved", "tenants/t/workloads/web"); len(got) != 2 {
			t.Errorf("events Moved %q", got)
		}
		if got := r.messages("Replaced", "tenants/t/workloads/web"); len(got) != 2 || !strings.Contains(got[0], "no longer match the node selector") {
			t.Errorf("events Replaced %q", got)
		}
	})
}

func TestDevicesAreShared(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		n1.set(func(n *fakeNode) {
			n.facts = &nodev1.NodeFacts{
				Address: "192.168.0.1", CpuMilli: 4000, MemoryBytes: 8 << 30,
				Devices: []*nodev1.Device{{Kind: "gpu", Model: "T4", Index: 0}, {Kind: "gpu", Model: "T4", Index: 1}},
			}
		})
		sp := spec(service, "100m")
		sp.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Devices: []*portolanv1.DeviceRequest{{Kind: "gpu", ShareMilli: 600}}}
		r.want("infer", "r1", 3, sp)
		r.within(10*time.Second, "two run", func() bool { return r.ready("infer") == 2 })
		used := map[int32]int32{}
		for _, a := range r.store.Snapshot().Allocations {
			for _, d := range a.GetDevices() {
				used[d.GetIndex()] += d.GetMilli()
			}
		}
		if !maps.Equal(used, map[int32]int32{0: 600, 1: 600}) {
			t.Errorf("devices in use: %v", used)
		}
		if p := r.store.Snapshot().Pending["t/infer"]; len(p) != 1 || p[0].Code != "InsufficientDevices" {
			t.Errorf("the third is pending for %+v", p)
		}
	})
}

func codesOf(v *portolanv1.ScaleVerdict) []string {
	var out []string
	for _, r := range v.GetReasons() {
		out = append(out, r.GetCode())
	}
	return out
}

func TestPoolsWishToGrow(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.cluster(&portolanv1.ClusterSpec{Pools: []*portolanv1.NodePool{{Name: "default", MaxNodes: 5, NodeSize: &portolanv1.ResourceList{Cpu: "4", Memory: "8Gi"}, CpuCoreHourMicros: 10}}})
		r.addNode("n1")
		r.want("web", "r1", 6, spec(service, "1900m"))
		r.within(30*time.Second, "two more nodes are wanted", func() bool {
			w := r.store.Snapshot().Notes.Wishes["default"]
			return w.Nodes == 2 && w.Reason != ""
		})
		if p := r.store.Snapshot().PoolStatuses(); len(p) != 1 || p[0].GetWantedNodes() != 2 || p[0].GetNodesReady() != 1 || p[0].GetWantedHourMicros() != 2*4*10 {
			t.Errorf("pools %v", p)
		}
		r.addNode("n2")
		r.addNode("n3")
		r.within(30*time.Second, "all run and nothing more is wanted", func() bool {
			return r.ready("web") == 6 && r.store.Snapshot().Notes.Wishes["default"].Nodes == 0
		})
	})
}

// A new node has its daemons too: what fits only one without them makes no pool
// grow, and what fits beside them does.
func TestPoolsGrowBesideDaemons(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.cluster(&portolanv1.ClusterSpec{Pools: []*portolanv1.NodePool{{Name: "default", MaxNodes: 5, NodeSize: &portolanv1.ResourceList{Cpu: "4", Memory: "8Gi"}}}})
		r.addNode("n1")
		r.want("agent", "r1", 0, spec(daemon, "500m"))
		elsewhere := spec(daemon, "3000m")
		elsewhere.Scheduling = &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"disk": "ssd"}}
		r.want("other", "r1", 0, elsewhere)
		r.want("big", "r1", 1, spec(service, "3600m"))
		time.Sleep(30 * time.Second)
		if len(r.store.Snapshot().Pending["t/big"]) == 0 {
			t.Fatal("big found a node")
		}
		if w, ok := r.store.Snapshot().Notes.Wishes["default"]; ok {
			t.Errorf("for what fits no node beside its daemon: %+v", w)
		}
		r.unwant("big")
		r.want("web", "r1", 2, spec(service, "3200m"))
		r.within(30*time.Second, "one more node is wanted", func() bool { return r.store.Snapshot().Notes.Wishes["default"].Nodes == 1 })
	})
}

// A node that is there holds the daemons that it has, not those that a new one
// would: with less room it takes nothing in, so that no other can go.
func TestPoolsShrinkBesideDaemons(t *testing.T) {
	for cpu, want := range map[string]int32{"500m": -1, "3500m": 0} {
		story(t, func(t *testing.T, r *rig) {
			r.addNode("n1")
			r.addNode("n2", "disk=ssd")
			agent := spec(daemon, cpu)
			agent.Scheduling = &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"disk": "ssd"}}
			r.want("agent", "r1", 0, agent)
			sp := spec(service, "150m")
			sp.Scheduling = &portolanv1.WorkloadSpec_Scheduling{SpreadKey: "node", MaxSkew: 1}
			r.want("web", "r1", 4, sp)
			r.within(10*time.Second, "all run", func() bool { return r.ready("web") == 4 })
			r.cluster(&portolanv1.ClusterSpec{CpuCoreHourMicros: 10, Pools: []*portolanv1.NodePool{{Name: "default", MinNodes: 1, MaxNodes: 5}}})
			time.Sleep(30 * time.Second)
			if got := r.store.Snapshot().Notes.Wishes["default"].Nodes; got != want {
				t.Errorf("beside a daemon of %s: %+d nodes, want %+d", cpu, got, want)
			}
			p := r.store.Snapshot().PoolStatuses()[0]
			if len(p.GetUnneededNodes()) != int(-want) || p.GetWantedHourMicros() != int64(want)*4*10 {
				t.Errorf("beside a daemon of %s: %v", cpu, p)
			}
		})
	}
}

// What replicas used says what they should request, also after the manager began
// anew; an exit for want of memory raises it.
func TestRequestsAreAdvised(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n := r.addNode("n1")
		r.want("web", "r1", 2, spec(service, "500m"))
		n.set(func(n *fakeNode) { n.usage = &nodev1.Usage{CpuMilli: 100, MemoryBytes: 100 << 20} })
		r.within(10*time.Second, "it is ready", func() bool { return r.ready("web") == 2 })
		advice := func() *portolanv1.RequestAdvice { return r.store.Snapshot().Notes.Requests["t/web"] }
		time.Sleep(3 * time.Hour)
		q := advice()
		if got := q.GetTarget().GetCpuMilli(); got < 100 || got > 150 || q.GetRequested().GetCpuMilli() != 500 {
			t.Errorf("of 500m requested and 100m used: %v", q)
		}
		if got := q.GetTarget().GetMemoryBytes() >> 20; got < 100 || got > 150 {
			t.Errorf("of 100 MiB used: %v", q)
		}
		samples := q.GetReason().GetMessage()
		if len(r.store.Snapshot().States["t/web"].GetProfile()) == 0 {
			t.Fatal("nothing of it is written")
		}
		n.set(func(n *fakeNode) { n.usage = nil })
		r.restart(0)
		time.Sleep(adviseEvery + learnEvery)
		if again := advice(); again == nil || again.GetTarget().GetCpuMilli() != q.GetTarget().GetCpuMilli() {
			t.Errorf("after a restart %v, before it %s", again, samples)
		}
		n.set(func(n *fakeNode) { n.oom = 400 << 20 })
		time.Sleep(adviseEvery + learnEvery)
		if got := advice().GetTarget().GetMemoryBytes() >> 20; got < 480 {
			t.Errorf("killed for want of memory at 400 MiB: %v", advice())
		}
		r.want("web", "r1", 0, spec(service, "500m"))
		time.Sleep(adviseEvery + learnEvery)
		if q := advice(); q.GetRequested().GetCpuMilli() != 500 {
			t.Errorf("of a workload that has no replicas for now: %v", q)
		}
		r.unwant("web")
		time.Sleep(adviseEvery + learnEvery)
		if q := advice(); q != nil {
			t.Errorf("of a workload that is gone: %v", q)
		}
	})
}

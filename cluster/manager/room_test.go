package manager

import (
	"slices"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// lowOn fills a node with a replica that may be displaced, and has another workload
// wait for its room.
func lowOn(r *rig, node string) {
	r.addNode(node) // 4 cores
	low := spec(service, "3000m")
	low.Disruption = &portolanv1.DisruptionBudget{MaxUnavailable: new(int32(1))}
	r.want("low", "r1", 1, low)
	r.within(10*time.Second, "low runs", func() bool { return r.ready("low") == 1 })
	mid := spec(service, "3000m")
	mid.Priority = 5
	r.want("mid", "r1", 1, mid)
	r.within(5*time.Second, "room is made for mid", func() bool { return len(r.messages("Nominated", "tenants/t/workloads/mid")) == 1 })
}

// Room that is kept for one goes to another of higher priority, also before it is
// free: were it kept for both, neither would ever run.
func TestHigherTakesKeptRoom(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		lowOn(r, "n1")
		high := spec(service, "3000m")
		high.Priority = 9
		r.want("high", "r1", 1, high)
		r.within(20*time.Second, "high runs", func() bool { return r.ready("high") == 1 })
		r.within(5*time.Second, "mid is told that there is no room", func() bool {
			p := r.store.Snapshot().Pending["t/mid"]
			return len(p) > 0 && p[0].Code == schedule.InsufficientCPU.String()
		})
		r.addNode("n2")
		r.within(20*time.Second, "mid runs on a new node", func() bool { return r.ready("mid") == 1 })
	})
}

// Room on a node that takes nothing any more is of no use to whom it is kept for.
func TestKeptRoomOfNoUse(t *testing.T) {
	for name, spoil := range map[string]func(r *rig){
		"drained": func(r *rig) {
			if err := r.m.SetMode(r.t.Context(), "n1", "", portolanv1.NodeMode_NODE_MODE_DRAINING, time.Time{}); err != nil {
				r.t.Fatal(err)
			}
		},
		"lost": func(r *rig) { r.nodes["n1"].set(func(n *fakeNode) { n.cut = true }) },
		"tainted": func(r *rig) {
			r.nodes["n1"].set(func(n *fakeNode) {
				n.facts = &nodev1.NodeFacts{Address: "192.168.0.1", CpuMilli: 4000, MemoryBytes: 8 << 30, Taints: []*portolanv1.Taint{{Key: "x", Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE}}}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			story(t, func(t *testing.T, r *rig) {
				lowOn(r, "n1")
				spoil(r)
				r.addNode("n2")
				r.within(30*time.Second, "mid runs on n2", func() bool { return slices.Equal(r.on("mid"), []string{"n2 r1 ready"}) })
			})
		})
	}
}

// A selector that is changed in place moves who does not match any more; one that is
// taken back moves nobody.
func TestMisfitAfterAChangeInPlace(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1", "disk=hdd")
		r.addNode("n2", "disk=ssd")
		r.want("web", "r1", 2, spec(service, "100m"))
		r.within(10*time.Second, "two are ready", func() bool { return r.ready("web") == 2 })
		narrow := func(disk string) {
			r.changeWorkload("web", func(w *linkv1.WorkloadIntent) {
				w.Revisions[0].Spec.Scheduling = &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"disk": disk}}
			})
		}
		narrow("ssd")
		r.within(30*time.Second, "both are on n2", func() bool {
			return slices.Equal(r.on("web"), []string{"n2 r1 ready", "n2 r1 ready"})
		})
		moved := len(r.messages("Moved", "tenants/t/workloads/web"))
		r.changeWorkload("web", func(w *linkv1.WorkloadIntent) { w.Revisions[0].Spec.Scheduling = nil })
		time.Sleep(time.Minute)
		if n := len(r.messages("Moved", "tenants/t/workloads/web")); n != moved || moved == 0 {
			t.Errorf("%d moved, then %d", moved, n)
		}
	})
}

// Who waits for others to go is looked at when they may be together.
func TestWokenByAChangeInPlace(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		alone := spec(service, "100m")
		alone.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Affinity: []*portolanv1.WorkloadSpec_WorkloadAffinity{{Workload: "web", TopologyKey: "node", Anti: true}}}
		r.want("alone", "r1", 1, alone)
		r.within(10*time.Second, "alone runs", func() bool { return r.ready("alone") == 1 })
		r.want("web", "r1", 1, spec(service, "100m"))
		time.Sleep(5 * time.Second)
		if r.ready("web") != 0 {
			t.Fatal("web runs beside who is to be alone")
		}
		r.changeWorkload("alone", func(w *linkv1.WorkloadIntent) { w.Revisions[0].Spec.Scheduling = nil })
		r.within(10*time.Second, "web runs", func() bool { return r.ready("web") == 1 })
	})
}

// What is asked for is told to the table once, whether it finds a node or not.
func TestTheTableLearnsWhatIsAskedFor(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		n1.set(func(n *fakeNode) {
			n.facts = &nodev1.NodeFacts{Address: "192.168.0.1", CpuMilli: 4000, MemoryBytes: 8 << 30, Devices: []*nodev1.Device{{Kind: "gpu", Model: "T4"}}}
		})
		sp := spec(service, "100m")
		sp.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Devices: []*portolanv1.DeviceRequest{{Kind: "gpu", ShareMilli: 600}}}
		r.want("infer", "r1", 3, sp)
		r.within(10*time.Second, "one runs", func() bool { return r.ready("infer") == 1 })
		r.addNode("n2") // the others are looked at again
		time.Sleep(5 * time.Second)
		r.restart(0)
		r.within(20*time.Second, "it runs again", func() bool { return r.ready("infer") == 1 })
		time.Sleep(time.Second)
		m := r.m
		r.restart(0) // it runs no more
		if n := m.mirror.table.Observed(); n != 3 {
			t.Errorf("after a restart the table knows of %d requests, want the one that is bound and the two that wait", n)
		}
	})
}

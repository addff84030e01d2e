package schedule

import (
	"testing"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// A group that wants more replicas than it has room kept for does not get the kept
// room twice. Found by the model cluster (e2e/sim).
func TestKeptRoomIsUsedOnce(t *testing.T) {
	tb := NewTable(1)
	tb.PutNode(Node{ID: "n1", Addresses: 16, Facts: &nodev1.NodeFacts{CpuMilli: 4000, MemoryBytes: 8 << 30, Labels: map[string]string{"disk": "ssd"}}})
	tb.PutNode(Node{ID: "n2", Addresses: 16, Facts: &nodev1.NodeFacts{CpuMilli: 4000, MemoryBytes: 8 << 30, Labels: map[string]string{"disk": "hdd"}}})
	class := func(w string, priority int32, cpu string) *Class {
		c, err := Compile(&portolanv1.WorkloadSpec{
			Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, Priority: priority, Scheduling: &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"disk": "ssd"}},
			Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: cpu, Memory: "256Mi"}}},
		}, Options{Owner: Owner{Tenant: "t", Workload: w, Revision: "r1"}})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	tb.PutReplica(Replica{ID: "rest", Class: class("rest", 2, "2"), Node: "n1"})
	tb.PutReplica(Replica{ID: "low", Class: class("low", 0, "1500m"), Node: "n1"})
	g := Group{Key: "t/high/r1", Class: class("high", 1, "1500m"), Count: 2}
	b := Batch{Groups: []Group{g}, Allowance: map[string]int{"t/low": 1}}
	p := Schedule(tb, b).Placed[0]
	if len(p.Nominations) != 1 || p.Missing != 1 {
		t.Fatalf("one replica displaces, one waits: %+v", p)
	}
	tb.Nominate(g.Key, g.Class, "n1")
	tb.DeleteReplica("low")
	if p = Schedule(tb, b).Placed[0]; len(p.Bindings) != 1 || p.Missing != 1 {
		t.Errorf("%d are bound and %d are missing, there is room for one: %+v", len(p.Bindings), p.Missing, p)
	}
}

// Room that a group of the batch gave up for a higher priority is not used by that
// group as well, in whatever order they are served. Found by the model cluster.
func TestKeptRoomIsGivenUpOnce(t *testing.T) {
	class := func(w string, priority int32, cpu string) *Class {
		c, err := Compile(&portolanv1.WorkloadSpec{
			Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, Priority: priority, Scheduling: &portolanv1.WorkloadSpec_Scheduling{},
			Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: cpu, Memory: "256Mi"}}},
		}, Options{Owner: Owner{Tenant: "t", Workload: w, Revision: "r1"}})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	low := Group{Key: "t/low/r1", Class: class("low", 1, "2"), Count: 1}
	high := Group{Key: "t/high/r1", Class: class("high", 2, "1"), Count: 1}
	more := Group{Key: "t/more/r1", Class: class("more", 1, "1500m"), Count: 1}
	for _, groups := range [][]Group{{high, low, more}, {low, high, more}, {low, more, high}} {
		tb := NewTable(1)
		tb.PutNode(Node{ID: "n1", Addresses: 16, Facts: &nodev1.NodeFacts{CpuMilli: 2100, MemoryBytes: 8 << 30}})
		tb.PutReplica(Replica{ID: "some", Class: class("some", 0, "100m"), Node: "n1"})
		tb.Nominate(low.Key, low.Class, "n1")
		used := int64(0)
		for k, p := range Schedule(tb, Batch{Groups: groups}).Placed {
			used += int64(len(p.Bindings)+len(p.Nominations)) * groups[k].Class.ask.cpu
		}
		if used == 0 || used > 2000 {
			t.Errorf("%s first: %d of 2000 millicores are promised", groups[0].Key, used)
		}
	}
}

package reconcile

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The table says of every field whether it needs a restart, and it is obeyed.
func TestRestartTable(t *testing.T) {
	fields := (&portolanv1.WorkloadSpec{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		restart, ok := restarts[f.Name()]
		if !ok {
			t.Errorf("nothing is said of field %s", f.Name())
			continue
		}
		have, want := &portolanv1.WorkloadSpec{}, &portolanv1.WorkloadSpec{}
		set(want.ProtoReflect(), f)
		if proto.Equal(have, want) {
			t.Fatalf("field %s was not set", f.Name())
		}
		if needsRestart(have, want) != restart || needsRestart(want, have) != restart || needsRestart(want, proto.CloneOf(want)) {
			t.Errorf("field %s: the table says %v", f.Name(), restart)
		}
	}
	if len(restarts) != fields.Len() {
		t.Errorf("%d fields are in the table, there are %d", len(restarts), fields.Len())
	}
	gpu := &portolanv1.WorkloadSpec{Scheduling: &portolanv1.WorkloadSpec_Scheduling{Devices: []*portolanv1.DeviceRequest{{Count: 1}}}}
	if !needsRestart(&portolanv1.WorkloadSpec{}, gpu) {
		t.Error("devices are given at the start")
	}
}

// set gives a field some value.
func set(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	switch {
	case f.IsList():
		m.Mutable(f).List().AppendMutable()
	case f.Message() != nil:
		m.Mutable(f)
	case f.Kind() == protoreflect.BoolKind:
		m.Set(f, protoreflect.ValueOfBool(true))
	case f.Kind() == protoreflect.StringKind:
		m.Set(f, protoreflect.ValueOfString("x"))
	case f.Kind() == protoreflect.EnumKind:
		m.Set(f, protoreflect.ValueOfEnum(1))
	default:
		m.Set(f, protoreflect.ValueOfInt32(1))
	}
}

// Two tenants have stateful workloads of one name: neither waits for the other.
func TestNamesOfTwoTenants(t *testing.T) {
	w := newWorld()
	w.addNode("n1")
	spec := &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL}
	for _, tenant := range []string{"a", "b"} {
		k := Key{tenant, "db"}
		w.want(k, &linkv1.WorkloadIntent{Tenant: tenant, Workload: "db", Uid: tenant, Epoch: 1, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Replicas: 2, Spec: spec}}})
		for range 4 {
			w.apply(Reconcile(w.input()))
			w.settle()
		}
	}
	owners := map[string]string{"db-0": "a", "db-1": "a"}
	byTenant := map[string]int{}
	for id, a := range w.allocs {
		byTenant[a.GetTenant()]++
		if want, ok := owners[id]; ok && want != a.GetTenant() {
			t.Errorf("%s is of tenant %s", id, a.GetTenant())
		}
	}
	if byTenant["a"] != 2 || byTenant["b"] != 2 {
		t.Errorf("replicas by tenant: %v", byTenant)
	}
}

// What no allowance covers is refused, and the disruptions of a plan and of its
// victims are one record.
func TestDisplaceTogetherWithDrain(t *testing.T) {
	w := newWorld()
	for _, n := range []string{"n1", "n2", "n3"} {
		w.addNode(n)
	}
	spec := image(serviceSpec(0, 1, 0), "r1")
	spec.Disruption = &portolanv1.DisruptionBudget{MaxUnavailable: new(int32(2))}
	w.want(web, &linkv1.WorkloadIntent{Tenant: "t", Workload: "web", Uid: "u", Epoch: 1, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Replicas: 3, Spec: spec}}})
	w.apply(Reconcile(w.input()))
	w.settle()
	w.nodes["n1"].Record.Mode = portolanv1.NodeMode_NODE_MODE_DRAINING
	before := Reconcile(w.input())
	if before.Allowances[web] != 1 {
		t.Fatalf("after the drain's one, %d may be displaced", before.Allowances[web])
	}
	p, refused := Displace(w.input(), before, []Move{{Allocation: "web-1"}, {Allocation: "web-2"}, {Allocation: "web-3"}, {Allocation: "gone"}})
	if len(refused) != 3 || p.Allowances[web] != 0 || before.Allowances[web] != 1 {
		t.Errorf("refused %v, %d left, the plan before has %d", refused, p.Allowances[web], before.Allowances[web])
	}
	var states []*clusterv1.WorkloadState
	stops := 0
	for _, s := range p.Steps {
		if s.Kind == PutState {
			states = append(states, s.State)
		}
		stops += off(s.Kind == Stop && s.Disrupt)
	}
	if stops != 2 || len(states) != 1 || len(states[0].GetDisruptions()) != 2 {
		t.Errorf("%d disruptions, states %v", stops, states)
	}
}

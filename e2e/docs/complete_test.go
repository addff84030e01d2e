package docs

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// shown are the fields and enum values that the examples of the pages use.
var shown = map[protoreflect.FullName]bool{}

// show notes what a message uses.
func show(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		shown[f.FullName()] = true
		switch {
		case f.IsMap():
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				show(v.List().Get(i).Message())
			}
		case f.Message() != nil:
			show(v.Message())
		case f.Enum() != nil:
			if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
				shown[e.FullName()] = true
			}
		}
		return true
	})
}

// elsewhere are fields that other pages show, or that decide nothing by themselves.
var elsewhere = map[string]string{
	"ResourceList.pids": "a limit of the container, no constraint",
}

// TestEveryConstraintIsShown: whatever can be written about where replicas may be
// stands in an example with a result.
func TestEveryConstraintIsShown(t *testing.T) {
	TestPlacement(t)
	TestScheduling(t)
	missing := map[string]bool{}
	seen := map[protoreflect.FullName]bool{}
	var need func(m protoreflect.MessageDescriptor)
	need = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] || !strings.HasPrefix(string(m.FullName()), "portolan.") {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			if !shown[f.FullName()] {
				missing[strings.TrimPrefix(string(f.FullName()), "portolan.v1.")] = true
			}
			if f.Enum() != nil {
				for k := range f.Enum().Values().Len() {
					if e := f.Enum().Values().Get(k); e.Number() != 0 && !shown[e.FullName()] {
						missing[strings.TrimPrefix(string(e.FullName()), "portolan.v1.")] = true
					}
				}
			}
			if f.Message() != nil && !f.IsMap() {
				need(f.Message())
			}
		}
	}
	need((&portolanv1.WorkloadSpec_Placement{}).ProtoReflect().Descriptor())
	need((&portolanv1.WorkloadSpec_Scheduling{}).ProtoReflect().Descriptor())
	scoring := portolanv1.Scoring(0).Descriptor().Values()
	for k := 1; k < scoring.Len(); k++ {
		if e := scoring.Get(k); !shown[e.FullName()] {
			missing[string(e.Name())] = true
		}
	}
	for name := range elsewhere {
		if !missing[name] {
			t.Errorf("%s is shown, or is no field: take it out of elsewhere", name)
		}
		delete(missing, name)
	}
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		t.Errorf("no example with a result uses %s", name)
	}
}

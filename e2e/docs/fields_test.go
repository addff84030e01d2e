package docs

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

// without are fields and words that need no example, and why.
var without = map[string]string{
	"Placement.division=DIVISION_OBJECTIVE": "the default: every example without a division",
	"ResourceList.pids":                     "a limit of the container: no cluster and no node is chosen by it",
	"ResourceList.storage":                  "here only of overrides, where it is laid like cpu and memory",
}

// TestEveryFieldHasAnExample holds the pages to it that every constraint is in an
// example with a result.
func TestEveryFieldHasAnExample(t *testing.T) {
	seen, pools := map[string]bool{}, ""
	for _, file := range []string{"../../docs/placement.md", "../../docs/scheduling.md"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		nodes, yaml := "", ""
		for _, m := range fence.FindAllStringSubmatch(string(b), -1) {
			switch m[1] {
			case "nodes":
				nodes = m[2]
			case "yaml":
				yaml = m[2]
			case "result":
				pools += nodes
				objs, err := manifest.Parse(file, []byte(yaml))
				if err != nil {
					t.Fatal(err)
				}
				for _, o := range objs {
					if w, ok := o.Message.(*portolanv1.Workload); ok {
						used(w.GetSpec().GetPlacement().ProtoReflect(), seen)
						used(w.GetSpec().GetScheduling().ProtoReflect(), seen)
					}
				}
			}
		}
	}
	wanted := map[string]bool{}
	want((&portolanv1.WorkloadSpec_Placement{}).ProtoReflect().Descriptor(), wanted)
	want((&portolanv1.WorkloadSpec_Scheduling{}).ProtoReflect().Descriptor(), wanted)
	for k := range wanted {
		switch _, excused := without[k]; {
		case !seen[k] && !excused:
			t.Errorf("%s is in no example that has a result", k)
		case seen[k] && excused:
			t.Errorf("%s has an example: take it off the list", k)
		}
	}
	for k := range without {
		if !wanted[k] {
			t.Errorf("%s is no field: take it off the list", k)
		}
	}
	words := []string{"cpuOvercommit=", "reservedCpu=", "cpuPrice=", "spot="}
	for name, n := range portolanv1.Scoring_value {
		if n > 1 { // spread is the default: every example without a pool
			words = append(words, "scoring="+strings.TrimPrefix(name, "SCORING_"))
		}
	}
	for _, w := range words {
		if !strings.Contains(pools, w) {
			t.Errorf("no example with a result has a pool with %s", w)
		}
	}
}

func key(f protoreflect.FieldDescriptor) string {
	return string(f.Parent().Name()) + "." + string(f.Name())
}

func nested(f protoreflect.FieldDescriptor) bool {
	return f.Message() != nil && !f.IsMap() && f.Message().ParentFile().Package() == "portolan.v1"
}

// want collects the fields of a message, its nested ones, and each one's words.
func want(d protoreflect.MessageDescriptor, out map[string]bool) {
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		out[key(f)] = true
		if nested(f) {
			want(f.Message(), out)
		}
		if f.Enum() != nil {
			for j := 1; j < f.Enum().Values().Len(); j++ {
				out[key(f)+"="+string(f.Enum().Values().Get(j).Name())] = true
			}
		}
	}
}

// used collects what of it a message has.
func used(m protoreflect.Message, out map[string]bool) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		out[key(f)] = true
		switch {
		case f.Enum() != nil:
			out[key(f)+"="+string(f.Enum().Values().ByNumber(v.Enum()).Name())] = true
		case nested(f) && f.IsList():
			for i := range v.List().Len() {
				used(v.List().Get(i).Message(), out)
			}
		case nested(f):
			used(v.Message(), out)
		}
		return true
	})
}

// cleared is a field that the examples go without, while effects are looked at.
var cleared string

// ineffective are fields without which the pages say the same, and why.
var ineffective = map[string]string{
	"ClusterGroup.name":      "only a name",
	"ContainerOverride.name": "a container without a name is called main, as in the example",
	"DeviceRequest.kind":     "gpu, as in the examples, is the default",
	"Failover.after":         "5s, as in the example, is the default",
	"Gang.deadline":          "ends the wait in a condition; an example is one moment",
	"ResourceList.memory":    "of overrides, where it is laid like cpu",
}

// TestEveryFieldHasAnEffect decides the examples without one field after the other:
// a page has to tell the difference.
func TestEveryFieldHasAnEffect(t *testing.T) {
	defer func() { cleared = "" }()
	tell := func(field string) string {
		cleared = field
		return replay(t, "../../docs/placement.md", &clusters{}) + replay(t, "../../docs/scheduling.md", &nodes{table: schedule.NewTable(1)})
	}
	all := tell("")
	fields := map[string]bool{}
	want((&portolanv1.WorkloadSpec_Placement{}).ProtoReflect().Descriptor(), fields)
	want((&portolanv1.WorkloadSpec_Scheduling{}).ProtoReflect().Descriptor(), fields)
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		if strings.Contains(k, "=") || without[k] != "" {
			continue
		}
		if _, excused := ineffective[k]; (tell(k) == all) != excused {
			t.Errorf("%s: either no example shows what it does, or it is needlessly on the list (on it: %v)", k, excused)
		}
	}
}

// replay is what comes of all examples of a page.
func replay(t *testing.T, file string, w decider) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, m := range fence.FindAllStringSubmatch(string(b), -1) {
		switch {
		case strings.HasPrefix(m[0], "## "):
			if _, ok := w.(*clusters); ok {
				w = &clusters{}
			} else {
				w = &nodes{table: schedule.NewTable(1)}
			}
		case m[1] == "nodes" || m[1] == "clusters":
			w.there(t, m[2])
		case m[1] == "yaml":
			out.WriteString(w.decide(t, file, m[2]))
		}
	}
	return out.String()
}

// clearField takes a field away, wherever it is in the message.
func clearField(m protoreflect.Message, k string) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case key(f) == k:
			m.Clear(f)
		case nested(f) && f.IsList():
			for i := range v.List().Len() {
				clearField(v.List().Get(i).Message(), k)
			}
		case nested(f):
			clearField(v.Message(), k)
		}
		return true
	})
}

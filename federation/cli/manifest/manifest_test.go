package manifest

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func TestParseWorkload(t *testing.T) {
	objs, err := Parse("web.yaml", []byte(`
kind: Workload
tenant: shop
name: web
labels: {team: a}
spec:
  kind: daemon
  replicas: 2
  containers:
  - image: r/web:1
    limits: {cpu: 1, memory: 64Mi}
    readiness: {http: {path: /h, port: 8080}, period: 500ms}
  grace_period: 1m30s
---
---
{kind: svc, tenant: shop, name: web, spec: {ports: [{port: 80, protocol: tcp}]}}
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(objs) != 2 {
		t.Fatalf("got %d objects, want 2", len(objs))
	}
	replicas := int32(2)
	want := &portolanv1.Workload{Name: "tenants/shop/workloads/web", Labels: map[string]string{"team": "a"}, Spec: &portolanv1.WorkloadSpec{
		Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, Replicas: &replicas, GracePeriod: durationpb.New(90e9),
		Containers: []*portolanv1.Container{{
			Image: "r/web:1", Limits: &portolanv1.ResourceList{Cpu: "1", Memory: "64Mi"},
			Readiness: &portolanv1.Probe{Check: &portolanv1.Probe_Http{Http: &portolanv1.Probe_HttpCheck{Path: "/h", Port: 8080}}, Period: durationpb.New(5e8)},
		}},
	}}
	if d := cmp.Diff(want, objs[0].Message, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if objs[1].Name() != "tenants/shop/services/web" {
		t.Errorf("second object is %s", objs[1].Name())
	}
}

// Every fault has its place, and all of a file come together.
func TestFaults(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"unknown field", "kind: Workload\ntenant: a\nname: w\nspec:\n  replica: 2\n", "x.yaml:5:3: spec.replica: unknown field; did you mean replicas?"},
		{"far unknown field", "kind: Tenant\nname: w\nspec:\n  zzzzzzzz: 2\n", "x.yaml:4:3: spec.zzzzzzzz: unknown field; there are display_name, allowed_regions, ingress_suffixes"},
		{"wrong type", "kind: Workload\ntenant: a\nname: w\nspec:\n  replicas: many\n", `x.yaml:5:13: spec.replicas: must be a whole number, not "many"`},
		{"list wanted", "kind: Workload\ntenant: a\nname: w\nspec:\n  containers: {a: b}\n", "x.yaml:5:15: spec.containers: must be a list"},
		{"two faults", "kind: Workload\ntenant: a\nname: w\nspec:\n  foo: 1\n  containers:\n  - imagee: x\n", "x.yaml:5:3: spec.foo: unknown field; there are"},
		{"nested place", "kind: Workload\ntenant: a\nname: w\nspec:\n  containers:\n  - imagee: x\n", "x.yaml:6:5: spec.containers[0].imagee: unknown field; did you mean image?"},
		{"enum", "kind: Workload\ntenant: a\nname: w\nspec: {kind: deamon}\n", `x.yaml:4:14: spec.kind: unknown word "deamon"; use service, job, daemon`},
		{"duration", "kind: Workload\ntenant: a\nname: w\nspec: {grace_period: soon}\n", `spec.grace_period: must be a duration like 500ms, 10s or 5m, not "soon"`},
		{"number range", "kind: Workload\ntenant: a\nname: w\nspec: {replicas: 99999999999}\n", "spec.replicas: 99999999999 is out of range"},
		{"twice", "kind: Workload\ntenant: a\nname: w\nspec: {replicas: 1, replicas: 2}\n", "spec.replicas: is there twice"},
		{"oneof", "kind: Workload\ntenant: a\nname: w\nspec: {containers: [{liveness: {tcp: {port: 1}, http: {port: 1}}}]}\n", "only one of tcp and http may be given"},
		{"alias", "kind: Workload\ntenant: a\nname: w\nspec: {containers: [&a {image: x}, *a]}\n", "anchors and aliases are refused"},
		{"no kind", "name: w\n", "kind: is missing"},
		{"unknown kind", "kind: Pod\nname: w\n", `kind: "Pod" cannot be applied`},
		{"read-only kind", "kind: Placement\nname: w\n", "cannot be applied"},
		{"no tenant", "kind: Workload\nname: w\nspec: {}\n", "tenant: is missing"},
		{"tenant of a tenant", "kind: Tenant\ntenant: a\nname: w\n", "tenant: a Tenant belongs to no tenant"},
		{"bad name", "kind: Tenant\nname: Über\n", "is no valid ID"},
		{"status", "kind: Tenant\nname: w\nstatus: {}\n", "status: unknown field"},
		{"syntax", "kind: [\n", "x.yaml:"},
		{"no mapping", "- a\n", "a document must be a mapping"},
	} {
		t.Run(c.name, func(t *testing.T) {
			objs, err := Parse("x.yaml", []byte(c.in))
			var faults Faults
			if !errors.As(err, &faults) {
				t.Fatalf("error is %v (objects %v), want faults", err, objs)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
			if c.name == "two faults" && len(faults) != 2 {
				t.Errorf("got %d faults, want both: %v", len(faults), faults)
			}
		})
	}
}

// The sample's manifests are what a newcomer reads first: they parse, and a
// service's workload stays within fifteen lines.
func TestSampleManifests(t *testing.T) {
	dir := "../../../e2e/storefront/manifests"
	objs, err := ReadPaths([]string{dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	rank := -1
	for _, o := range objs {
		for i, k := range Kinds {
			if k.Name == o.Kind.Name {
				if i < rank {
					t.Errorf("%s comes too late", o.Name())
				}
				rank = i
			}
		}
	}
	for _, name := range []string{"20-payments.yaml", "30-catalog.yaml", "40-cart.yaml"} {
		b, err := os.ReadFile(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(b), "---")
		if n := strings.Count(first, "\n"); n > 15 {
			t.Errorf("%s: the workload takes %d lines", name, n)
		}
	}
}

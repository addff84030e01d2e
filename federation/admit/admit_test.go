package admit

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const fleet = "portolan.internal"

func good() *portolanv1.Workload {
	return &portolanv1.Workload{Name: "tenants/shop/workloads/web", Spec: &portolanv1.WorkloadSpec{
		Containers: []*portolanv1.Container{{
			Image: "r.example/web:1", Limits: &portolanv1.ResourceList{Cpu: "1", Memory: "64Mi"},
			Readiness: &portolanv1.Probe{Check: &portolanv1.Probe_Http{Http: &portolanv1.Probe_HttpCheck{Port: 8080}}},
		}},
	}}
}

func shop() *Snapshot {
	port := []*portolanv1.ServicePort{{Name: "http", Port: 80}}
	svc := func(id string) *portolanv1.Service {
		return &portolanv1.Service{Name: "tenants/shop/services/" + id, Spec: &portolanv1.ServiceSpec{Workload: "web", Ports: port}}
	}
	return &Snapshot{
		Fleet: fleet, Tenant: &portolanv1.Tenant{Name: "tenants/shop", Spec: &portolanv1.TenantSpec{AllowedRegions: []string{"eu-west"}, IngressSuffixes: []string{"shop.example"}}},
		Workloads: map[string]*portolanv1.Workload{"web": good()},
		Revisions: map[string]map[string]*portolanv1.WorkloadSpec{"web": {"r1": good().Spec}},
		Services:  map[string]*portolanv1.Service{"a": svc("a"), "b": svc("b"), "c": svc("c"), "d": svc("d")},
		Routes:    map[string]*portolanv1.Route{},
	}
}

func fields(vs []api.Violation) string {
	var out []string
	for _, v := range vs {
		out = append(out, v.Field)
	}
	return strings.Join(out, " ")
}

func TestDefaultsAreCompleteAndStable(t *testing.T) {
	for _, kind := range []portolanv1.WorkloadKind{0, portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON} {
		w := good()
		w.Spec.Kind = kind
		Defaults(w, shop())
		if vs := Validate(Input{Object: w, Snapshot: shop()}); len(vs) > 0 {
			t.Fatalf("%v: defaults do not validate: %v", kind, vs)
		}
		again := proto.CloneOf(w)
		Defaults(again, shop())
		if !proto.Equal(again, w) {
			t.Fatalf("%v: defaults of defaults differ:\n%v\n%v", kind, w, again)
		}
	}
	w := good()
	Defaults(w, shop())
	c := w.Spec.Containers[0]
	if w.Spec.GetReplicas() != 1 || w.Spec.Update.GetMaxSurge() != 1 || w.Spec.GracePeriod.AsDuration() != 30*time.Second || c.Name != "main" || c.Limits.Pids != 512 ||
		c.Requests.Memory != "64Mi" || c.Readiness.Period.AsDuration() != 10*time.Second || c.Readiness.GetHttp().Path != "/" {
		t.Fatal(w)
	}
	r := &portolanv1.Route{Name: "tenants/shop/routes/a", Spec: &portolanv1.RouteSpec{Service: "a", Rules: []*portolanv1.RouteRule{{Backends: []*portolanv1.RouteBackend{{}}}}}}
	Defaults(r, shop())
	if b := r.Spec.Rules[0].Backends[0]; b.Service != "a" || b.Port != "http" || b.Weight != 100 {
		t.Fatal(b)
	}
}

func TestMissingLimitsAreLeftToPolicy(t *testing.T) {
	w := good()
	w.Spec.Containers[0].Limits = nil
	Defaults(w, shop())
	if vs := Validate(Input{Object: w, Snapshot: shop()}); len(vs) > 0 {
		t.Fatal(vs)
	}
}

// Metrics are measured at replicas: to none a workload goes only where a schedule
// brings it back.
func TestScalingToNoneNeedsASchedule(t *testing.T) {
	rps := &portolanv1.ScaleMetric{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND, Target: 50}
	at := func(minimum int32) *portolanv1.ScaleSchedule {
		return &portolanv1.ScaleSchedule{Schedule: "0 8 * * *", Duration: durationpb.New(time.Hour), Min: minimum, Max: 2}
	}
	for _, c := range []struct {
		name      string
		schedules []*portolanv1.ScaleSchedule
		want      string
	}{
		{"requests per second", nil, "spec.autoscale.min"},
		{"a schedule that asks for none", []*portolanv1.ScaleSchedule{at(0)}, "spec.autoscale.min"},
		{"a schedule that brings it back", []*portolanv1.ScaleSchedule{at(0), at(1)}, ""},
	} {
		w := good()
		w.Spec.Autoscale = &portolanv1.Autoscale{Min: proto.Int32(0), Max: 3, Metrics: []*portolanv1.ScaleMetric{rps}, Schedules: c.schedules}
		Defaults(w, shop())
		if got := fields(Validate(Input{Object: w, Snapshot: shop()})); got != c.want {
			t.Errorf("%s: refused for %q, want %q", c.name, got, c.want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, c := range []struct {
		name string
		ok   bool
	}{
		{"CHOWN", true},
		{"NET_BIND_SERVICE", true},
		{"SETUID", false}, // with it a process becomes the proxy's user, whom nothing captures
		{"SETGID", false},
		{"SETPCAP", false},
		{"NET_ADMIN", false},
		{"CAP_CHOWN", false},
	} {
		w := good()
		w.Spec.Containers[0].AddCapabilities = []string{c.name}
		Defaults(w, shop())
		got, want := fields(Validate(Input{Object: w, Snapshot: shop()})), ""
		if !c.ok {
			want = "spec.containers[0].add_capabilities[0]"
		}
		if got != want {
			t.Errorf("%s: refused fields %q, want %q", c.name, got, want)
		}
	}
}

func TestResidency(t *testing.T) {
	w := good()
	w.Spec.Placement = &portolanv1.WorkloadSpec_Placement{AllowedRegions: []string{"eu-west", "us-east"}}
	Defaults(w, shop())
	if got := fields(Validate(Input{Object: w, Snapshot: shop()})); got != "spec.placement.allowed_regions[1]" {
		t.Fatal(got)
	}
}

func TestRevisionNames(t *testing.T) {
	for _, c := range []struct {
		revision string
		args     []string
		ok       bool
	}{
		{"r1", nil, true}, // back to what the server named
		{"r1", []string{"x"}, false},
		{"r2", nil, false}, // the server gives these
		{"v2", []string{"x"}, true},
		{"all", nil, false},
		{"V2", nil, false},
	} {
		w := good()
		w.Spec.Revision, w.Spec.Containers[0].Args = c.revision, c.args
		snap := shop()
		first := good()
		Defaults(first, snap)
		snap.Revisions["web"]["r1"] = first.Spec
		Defaults(w, snap)
		if vs := Validate(Input{Object: w, Snapshot: snap}); (len(vs) == 0) != c.ok || !c.ok && fields(vs) != "spec.revision" {
			t.Errorf("%v: %v", c, vs)
		}
	}
}

func TestTemplateIsWhatRuns(t *testing.T) {
	w := good()
	Defaults(w, shop())
	base := TemplateHash(w.Spec)
	same := proto.CloneOf(w.Spec)
	same.Replicas, same.Revision, same.Placement.Objective, same.Update.MaxSurge = proto.Int32(9), "v9", portolanv1.Objective_OBJECTIVE_COST, proto.Int32(3)
	same.Scheduling = &portolanv1.WorkloadSpec_Scheduling{SpreadKey: "zone"}
	if TemplateHash(same) != base {
		t.Error("where and how many makes a revision")
	}
	for name, change := range map[string]func(*portolanv1.WorkloadSpec){
		"image": func(s *portolanv1.WorkloadSpec) { s.Containers[0].ResolvedImage = "r.example/web@sha256:1" },
		"env":   func(s *portolanv1.WorkloadSpec) { s.Containers[0].Env = map[string]string{"a": "b"} },
		"grace": func(s *portolanv1.WorkloadSpec) { s.GracePeriod = durationpb.New(time.Second) },
	} {
		s := proto.CloneOf(w.Spec)
		change(s)
		if TemplateHash(s) == base {
			t.Errorf("%s makes no revision", name)
		}
	}
}

func route(service string, to ...string) *portolanv1.Route {
	r := &portolanv1.Route{Name: "tenants/shop/routes/" + service, Spec: &portolanv1.RouteSpec{Service: service}}
	for _, b := range to {
		r.Spec.Rules = append(r.Spec.Rules, &portolanv1.RouteRule{Backends: []*portolanv1.RouteBackend{{Service: b, Port: "http", Weight: 100}}})
	}
	return r
}

// TestCyclesAgainstADumbSearch adds routes at random, as long as they are
// admitted: then no walk along them comes back, and a refused one would have.
func TestCyclesAgainstADumbSearch(t *testing.T) {
	names := []string{"a", "b", "c", "d"}
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		snap := shop()
		edges := map[string][]string{}
		for range 6 {
			from := names[rnd.IntN(4)]
			to := []string{names[rnd.IntN(4)], names[rnd.IntN(4)]}
			r := route(from, to...)
			next := map[string][]string{}
			maps.Copy(next, edges)
			next[from] = slices.DeleteFunc(slices.Clone(to), func(s string) bool { return s == from })
			vs := Validate(Input{Object: r, Snapshot: snap})
			if loops := comesBack(next, from); loops != (len(vs) > 0) {
				t.Fatalf("seed %d: %s → %v on %v: violations %v", seed, from, to, edges, vs)
			}
			if len(vs) == 0 {
				snap.Routes[from], edges = r, next
			}
		}
	}
}

// comesBack walks every path of up to ten steps.
func comesBack(edges map[string][]string, from string) bool {
	at := map[string]bool{from: true}
	for range 10 {
		next := map[string]bool{}
		for n := range at {
			for _, m := range edges[n] {
				next[m] = true
			}
		}
		if next[from] {
			return true
		}
		at = next
	}
	return false
}

func TestReferrersAreNamed(t *testing.T) {
	snap := shop()
	snap.Routes["a"] = route("a", "b")
	if vs := Deletion(Input{Old: snap.Services["b"], Snapshot: snap}); len(vs) != 1 || !strings.Contains(vs[0].Message, "tenants/shop/routes/a") {
		t.Fatal(vs)
	}
	if vs := Deletion(Input{Old: snap.Services["c"], Snapshot: snap}); len(vs) != 0 {
		t.Fatal(vs)
	}
	if vs := Deletion(Input{Old: good(), Snapshot: snap}); len(vs) != 1 || !strings.Contains(vs[0].Message, "services/a, tenants/shop/services/b") {
		t.Fatal(vs)
	}
	for i := range 10 {
		snap.Others = append(snap.Others, fmt.Sprintf("x%d", i))
	}
	if vs := Deletion(Input{Old: snap.Services["c"], Snapshot: snap}); !strings.Contains(vs[0].Message, "and 5 more") {
		t.Fatal(vs)
	}
	narrow := &portolanv1.Tenant{Name: "tenants/shop", Spec: &portolanv1.TenantSpec{}}
	snap.Routes["a"].Spec.IngressHosts = []string{"www.shop.example"}
	if vs := Update(Input{Object: narrow, Old: snap.Tenant, Snapshot: snap}); fields(vs) != "spec.ingress_suffixes" {
		t.Fatal(vs)
	}
}

func TestLastFleetAdminStays(t *testing.T) {
	admin := func(name string) *portolanv1.RoleBinding {
		return &portolanv1.RoleBinding{Name: "roleBindings/" + name, Spec: &portolanv1.RoleBindingSpec{Role: portolanv1.Role_ROLE_FLEET_ADMIN, Subject: "spiffe://" + fleet + "/user/" + name}}
	}
	one, two := admin("one"), admin("two")
	lower := proto.CloneOf(one)
	lower.Spec.Role, lower.Spec.Tenant = portolanv1.Role_ROLE_TENANT_ADMIN, "shop"
	both := &Snapshot{Fleet: fleet, RoleBindings: []*portolanv1.RoleBinding{one, two}}
	alone := &Snapshot{Fleet: fleet, RoleBindings: []*portolanv1.RoleBinding{one}}
	if len(Deletion(Input{Old: one, Snapshot: both})) != 0 || len(Deletion(Input{Old: one, Snapshot: alone})) != 1 || len(Update(Input{Old: one, Object: lower, Snapshot: alone})) != 1 {
		t.Fatal("the fleet may lock itself out, or may not change its admins")
	}
}

func TestSystemPaths(t *testing.T) {
	for p, ok := range map[string]bool{
		"/tmp": true, "/var/cache/nginx": true, "/run": true, "/data": true,
		"/": false, "/proc": false, "/proc/self": false, "/sys/fs": false, "/dev": false, "/etc": false, "/usr": false, "/run/spiffe": false, "/tmp/": false, "//tmp": false, "/a/./b": false,
	} {
		w := good()
		w.Spec.Containers[0].Tmpfs = []string{p}
		Defaults(w, shop())
		if vs := Validate(Input{Object: w, Snapshot: shop()}); (len(vs) == 0) != ok {
			t.Errorf("%s: %v", p, vs)
		}
	}
}

// FuzzURLPath: what is accepted is what a router would not rewrite.
func FuzzURLPath(f *testing.F) {
	for _, s := range []string{"/", "/a/b", "/a/../b", "//", "/a%2fb", "a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) {
		c := &checker{snap: &Snapshot{}}
		c.urlPath("p", p)
		if len(c.out) == 0 && (!strings.HasPrefix(p, "/") || strings.Contains(p+"/", "/../") || strings.Contains(p, "//") || strings.Contains(p, "%")) {
			t.Fatalf("%q passes", p)
		}
	})
}

// What is said to begin at once does so, also when it is updated.
func TestGang(t *testing.T) {
	for _, c := range []struct {
		kind   portolanv1.WorkloadKind
		update portolanv1.UpdateType
		want   string
	}{
		{portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.UpdateType_UPDATE_TYPE_UNSPECIFIED, "spec.update.type"},
		{portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.UpdateType_UPDATE_TYPE_ROLLING, "spec.update.type"},
		{portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN, ""},
		{portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL, portolanv1.UpdateType_UPDATE_TYPE_ROLLING, "spec.scheduling.gang"},
		{portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, portolanv1.UpdateType_UPDATE_TYPE_UNSPECIFIED, "spec.scheduling.gang"},
		{portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.UpdateType_UPDATE_TYPE_UNSPECIFIED, ""},
	} {
		w := good()
		w.Spec.Kind, w.Spec.Scheduling = c.kind, &portolanv1.WorkloadSpec_Scheduling{Gang: &portolanv1.WorkloadSpec_Gang{}}
		if c.update != 0 {
			w.Spec.Update = &portolanv1.WorkloadSpec_UpdateStrategy{Type: c.update}
		}
		Defaults(w, shop())
		if vs := Validate(Input{Object: w, Snapshot: shop()}); fields(vs) != c.want {
			t.Errorf("%v, %v: %v, want %q", c.kind, c.update, vs, c.want)
		}
	}
}

package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/xds/distribute"
)

const testFleet = "portolan.internal"

// rig is a store, a mirror of it, and a stepper that follows.
type rig struct {
	t      testing.TB
	store  *mem.Store
	mirror *store.Mirror
	step   *stepper
	roots  []byte
}

func newRig(t testing.TB) *rig {
	r := &rig{t: t, store: mem.New(mem.Config{}), step: newStepper(testFleet), roots: []byte("fleet roots")}
	r.mirror = store.NewMirror(r.store, mirrored())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.mirror.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

// update commits, and takes the view at that revision through the stepper.
func (r *rig) update(fn func(store.Tx) error) (map[string]*update, []string) {
	r.t.Helper()
	rev, err := r.store.Update(context.Background(), fn)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.follow(rev)
}

func (r *rig) follow(rev int64) (map[string]*update, []string) {
	v, err := r.mirror.Wait(context.Background(), rev)
	if err != nil {
		r.t.Fatal(err)
	}
	var d dirt
	if r.step.revision >= 0 {
		changes, ok := r.mirror.Since(r.step.revision, v.Revision)
		if !ok {
			r.t.Fatal("the mirror forgot")
		}
		d = dirtOf(changes)
	}
	updates, gone, problems := r.step.step(v, r.roots, d)
	r.compare(v)
	slices.Sort(gone)
	return updates, append(gone, problems...)
}

// compare holds the step by step form against the full one.
func (r *rig) compare(v *store.View) {
	r.t.Helper()
	for rec := range v.List(store.Cluster, store.ListOptions{}) {
		c := strings.TrimPrefix(rec.Name, "clusters/")
		want, _ := Derive(v, testFleet, r.roots, c)
		got := map[string]*distribute.Resource{}
		for _, unit := range r.step.sets[c] {
			for name, res := range unit {
				if got[name] != nil {
					r.t.Fatalf("cluster %s: %s comes from two units", c, name)
				}
				got[name] = res
			}
		}
		delete(want, api.WatermarkName)
		if a, b := slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)); !slices.Equal(a, b) {
			r.t.Fatalf("cluster %s: step by step %v, at once %v", c, a, b)
		}
		for name, i := range want {
			res, err := distribute.NewResource(api.IntentTypeURL, name, i)
			if err != nil || res.Version != got[name].Version {
				r.t.Fatalf("cluster %s: %s differs from the full derivation", c, name)
			}
		}
	}
}

func compactJSON(t testing.TB, m proto.Message) string {
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Compact(&out, b); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestDerive runs scripted scenarios: "apply" commits records (one per line: kind,
// name, JSON; "-" before the kind deletes) and prints what each cluster is sent;
// "derive" prints all that one cluster is told.
func TestDerive(t *testing.T) {
	datadriven.Walk(t, "testdata/derive", func(t *testing.T, path string) {
		r := newRig(t)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "apply":
				updates, other := r.update(func(tx store.Tx) error { return applyLines(tx, d.Input) })
				return render(updates, other)
			case "derive":
				return renderAll(t, r, d)
			}
			t.Fatalf("unknown command %q", d.Cmd)
			return ""
		})
	})
}

func applyLines(tx store.Tx, lines string) error {
	for line := range strings.Lines(lines) {
		f := strings.SplitN(strings.TrimSpace(line), " ", 3)
		if kind, ok := strings.CutPrefix(f[0], "-"); ok {
			if err := tx.Delete(store.Kind(kind), f[1]); err != nil {
				return err
			}
			continue
		}
		info, ok := store.Info(store.Kind(f[0]))
		if !ok {
			return fmt.Errorf("no kind %q", f[0])
		}
		m := info.New()
		if len(f) > 2 {
			if err := protojson.Unmarshal([]byte(f[2]), m); err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
		}
		if err := tx.Put(info.Kind, f[1], m); err != nil {
			return err
		}
	}
	return nil
}

func render(updates map[string]*update, other []string) string {
	var b strings.Builder
	for _, c := range slices.Sorted(maps.Keys(updates)) {
		u := updates[c]
		var names []string
		for _, r := range u.put {
			names = append(names, "+"+r.Name)
		}
		for _, n := range u.remove {
			names = append(names, "-"+n)
		}
		slices.Sort(names)
		first := ""
		if u.first {
			first = " (first)"
		}
		fmt.Fprintf(&b, "%s%s: %s\n", c, first, strings.Join(names, " "))
	}
	for _, o := range other {
		fmt.Fprintf(&b, "note: %s\n", o)
	}
	return b.String()
}

func renderAll(t *testing.T, r *rig, d *datadriven.TestData) string {
	var cluster, only string
	d.ScanArgs(t, "cluster", &cluster)
	if d.HasArg("only") {
		d.ScanArgs(t, "only", &only)
	}
	all, _ := Derive(r.mirror.Snapshot(), testFleet, r.roots, cluster)
	names := slices.SortedFunc(maps.Keys(all), func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	var b strings.Builder
	for _, n := range names {
		if !strings.HasPrefix(n, only) {
			continue
		}
		i := proto.CloneOf(all[n])
		rev := i.GetRevision()
		i.Revision = 0
		fmt.Fprintf(&b, "%s @%d %s\n", n, rev, compactJSON(t, i))
	}
	return b.String()
}

// TestStepsEqualDerivation changes random records and holds the step by step form
// against the full one after each change (in rig.follow).
func TestStepsEqualDerivation(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRig(t)
		pick := func(label string, from ...string) string { return rapid.SampledFrom(from).Draw(rt, label) }
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			tenant, w, c := pick("tenant", "a", "b", "system"), pick("workload", "web", "db"), pick("cluster", "eu", "us", "ap")
			kind, name, m := randomRecord(pick, tenant, w, c)
			drop := rapid.IntRange(0, 3).Draw(rt, "drop") == 0
			r.update(func(tx store.Tx) error {
				if !drop {
					return tx.Put(kind, name, m)
				}
				if err := tx.Delete(kind, name); api.KindOf(err) != api.NotFound {
					return err
				}
				return nil
			})
		}
	})
}

func randomRecord(pick func(string, ...string) string, tenant, w, c string) (store.Kind, string, proto.Message) {
	gateway := portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED
	if tenant == api.SystemTenant && w == "web" {
		gateway = portolanv1.GatewayKind_GATEWAY_KIND_INGRESS
	}
	rev := pick("revision", "r1", "r2")
	switch pick("kind", "tenant", "cluster", "placement", "status", "revision", "service", "route", "policy", "bundle", "export", "workload") {
	case "tenant":
		return store.Tenant, api.TenantName(tenant), &portolanv1.Tenant{Name: api.TenantName(tenant)}
	case "cluster":
		return store.Cluster, api.ClusterName(c), &portolanv1.Cluster{Name: api.ClusterName(c), Spec: &portolanv1.ClusterSpec{Region: pick("region", "x", "y")}}
	case "placement":
		return store.Placement, api.PlacementName(tenant, w, c), &portolanv1.Placement{Spec: &portolanv1.PlacementSpec{Revisions: []*portolanv1.RevisionReplicas{{Revision: rev, Replicas: 1}}}}
	case "status":
		return store.PlacementStatus, api.PlacementName(tenant, w, c), &storev1.PlacementStatusRecord{}
	case "revision":
		return store.Revision, api.RevisionName(tenant, w, rev), &portolanv1.WorkloadRevision{Spec: &portolanv1.WorkloadSpec{Gateway: gateway}}
	case "service":
		return store.Service, api.ServiceName(tenant, w), &portolanv1.Service{Spec: &portolanv1.ServiceSpec{}}
	case "route":
		r := &portolanv1.Route{Spec: &portolanv1.RouteSpec{Service: w}}
		if pick("ingress", "yes", "no") == "yes" {
			r.Spec.IngressHosts = []string{"web.localhost"}
		}
		return store.Route, api.RouteName(tenant, w), r
	case "policy":
		name := "policyBundles/p"
		if pick("scope", "fleet", "tenant") == "tenant" {
			name = api.TenantName(tenant) + "/" + name
		}
		return store.PolicyBundle, name, &portolanv1.PolicyBundle{Spec: &portolanv1.PolicyBundleSpec{Kind: portolanv1.PolicyKind_POLICY_KIND_NETWORK}}
	case "bundle":
		return store.TrustBundle, c + "." + testFleet, &linkv1.TrustBundle{TrustDomain: c + "." + testFleet, Cluster: c, X509Roots: []byte(rev)}
	case "export":
		return store.ServiceExport, ExportName(tenant, w, c), &linkv1.ServiceExport{Cluster: c, Tenant: tenant, Service: w, Healthy: rev == "r1"}
	}
	return store.Workload, api.WorkloadName(tenant, w), &portolanv1.Workload{Uid: rev}
}

package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

func TestRequestIDHasOneResult(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	c, ctx := e.workloads(), e.as("shop")
	req := &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "web"), RequestId: uuid.NewString()}
	first := must[*portolanv1.Workload](t)(c.CreateWorkload(ctx, req))
	before := e.revision()
	again := must[*portolanv1.Workload](t)(c.CreateWorkload(ctx, req))
	if first.GetUid() != again.GetUid() || e.revision() != before {
		t.Fatalf("the retry did something: %v", again)
	}
	other := proto.CloneOf(req)
	other.Workload.Name = "tenants/shop/workloads/other"
	_, err := c.CreateWorkload(ctx, other)
	wantCode(t, err, codes.InvalidArgument)
	if !slices.Contains(fieldsOf(err), "request_id") {
		t.Fatal(err)
	}
	// Another caller's ID of the same text is another request.
	e.tenant("bank")
	other.Workload.Name = "tenants/bank/workloads/other"
	must[*portolanv1.Workload](t)(c.CreateWorkload(e.as("bank"), other))

	del := &portolanv1.DeleteWorkloadRequest{Name: first.GetName(), RequestId: uuid.NewString(), Etag: first.GetEtag()}
	for range 2 {
		if _, err := c.DeleteWorkload(ctx, del); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.server.maintain(t.Context(), time.Now().Add(requestResultLife+time.Hour)); err != nil {
		t.Fatal(err)
	}
	_, err = c.DeleteWorkload(ctx, del)
	wantCode(t, err, codes.NotFound)
}

func TestConcurrentCreatesHaveOneWinner(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	var wg sync.WaitGroup
	results := make([]codes.Code, 8)
	for i := range results {
		wg.Go(func() {
			_, err := e.workloads().CreateWorkload(e.as("shop"), &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "web")})
			results[i] = status.Code(err)
		})
	}
	wg.Wait()
	slices.Sort(results)
	if results[0] != codes.OK || results[1] != codes.AlreadyExists || results[7] != codes.AlreadyExists {
		t.Fatal(results)
	}
	e.audit()
}

func TestRevisions(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	c, ctx := e.workloads(), e.as("shop")
	put := func(change func(*portolanv1.WorkloadSpec)) (*portolanv1.Workload, error) {
		w := workload("shop", "web")
		change(w.Spec)
		return c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{Workload: w, AllowMissing: true})
	}
	current := func(want string, change func(*portolanv1.WorkloadSpec)) {
		t.Helper()
		if got := must[*portolanv1.Workload](t)(put(change)).GetStatus().GetCurrentRevision(); got != want {
			t.Fatalf("current revision %q, want %q", got, want)
		}
	}
	current("v1", func(s *portolanv1.WorkloadSpec) { s.Revision = "v1" })
	asked := e.resolver.count()
	e.resolver.digest = strings.Repeat("b", 64) // the tag has moved
	current("v1", func(s *portolanv1.WorkloadSpec) { s.Revision = "v1"; s.Replicas = proto.Int32(9) })
	if e.resolver.count() != asked {
		t.Fatal("a scaling asked the registry")
	}
	current("v2", func(s *portolanv1.WorkloadSpec) { s.Revision = "v2"; s.Containers[0].Args = []string{"new"} })
	if _, err := put(func(s *portolanv1.WorkloadSpec) { s.Revision = "v1"; s.Containers[0].Args = []string{"x"} }); status.Code(err) != codes.InvalidArgument || !slices.Contains(fieldsOf(err), "spec.revision") {
		t.Fatalf("a name was used again: %v", err)
	}
	// Going back needs nothing but the name, and gets the old digest.
	current("v1", func(s *portolanv1.WorkloadSpec) { s.Revision = "v1" })
	back := must[*portolanv1.Workload](t)(c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: "tenants/shop/workloads/web"}))
	if got := back.GetSpec().GetContainers()[0].GetResolvedImage(); !strings.HasSuffix(got, strings.Repeat("a", 64)) {
		t.Fatalf("the old revision runs another image: %s", got)
	}
	for i := range maxOldRevisions + 5 {
		must[*portolanv1.Workload](t)(put(func(s *portolanv1.WorkloadSpec) { s.Containers[0].Args = []string{fmt.Sprint(i)} }))
	}
	revs := must[*portolanv1.ListWorkloadRevisionsResponse](t)(c.ListWorkloadRevisions(ctx, &portolanv1.ListWorkloadRevisionsRequest{Parent: "tenants/shop/workloads/web", PageSize: 100}))
	if n := len(revs.GetWorkloadRevisions()); n != maxOldRevisions+1 {
		t.Fatalf("%d revisions are kept: %s", n, names(revs.GetWorkloadRevisions()))
	}
}

func TestVirtualIPs(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	ctx, seen := e.as("shop"), map[string]string{}
	for i := range 20 {
		s := must[*portolanv1.Service](t)(e.mesh().CreateService(ctx, &portolanv1.CreateServiceRequest{Service: service("shop", fmt.Sprintf("s%d", i), "web")}))
		ip := s.GetStatus().GetVirtualIp()
		if !strings.HasPrefix(ip, "10.68.") || seen[ip] != "" || s.GetStatus().GetHostname() != fmt.Sprintf("s%d.shop.mesh", i) {
			t.Fatalf("service %v, addresses %v", s, seen)
		}
		seen[ip] = s.GetName()
	}
	get := func() *portolanv1.Service {
		return must[*portolanv1.Service](t)(e.mesh().GetService(ctx, &portolanv1.GetServiceRequest{Name: "tenants/shop/services/s0"}))
	}
	ip := get().GetStatus().GetVirtualIp()
	ports := service("shop", "s0", "web")
	ports.Spec.Ports[0].Port = 81
	must[*portolanv1.Service](t)(e.mesh().UpdateService(ctx, &portolanv1.UpdateServiceRequest{Service: ports}))
	if get().GetStatus().GetVirtualIp() != ip {
		t.Fatal("an update changed the address")
	}
	if _, err := e.mesh().DeleteService(ctx, &portolanv1.DeleteServiceRequest{Name: "tenants/shop/services/s0"}); err != nil {
		t.Fatal(err)
	}
	held := func() *storev1.VirtualIP {
		var out *storev1.VirtualIP
		_, err := e.store.View(t.Context(), func(r store.Reader) error {
			rec, err := r.Get(store.VirtualIP, ip)
			if api.KindOf(err) == api.NotFound {
				return nil
			}
			out, _ = rec.Message.(*storev1.VirtualIP)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if err := e.server.maintain(t.Context(), time.Now().Add(virtualIPQuarantine-time.Minute)); err != nil || held() == nil {
		t.Fatalf("the address went too early: %v", err)
	}
	// The same service comes back to its address; nobody else gets it meanwhile.
	must[*portolanv1.Service](t)(e.mesh().CreateService(ctx, &portolanv1.CreateServiceRequest{Service: service("shop", "s0", "web")}))
	if get().GetStatus().GetVirtualIp() != ip || held().GetReleaseTime() != nil {
		t.Fatalf("came back to %v", get().GetStatus())
	}
	if _, err := e.mesh().DeleteService(ctx, &portolanv1.DeleteServiceRequest{Name: "tenants/shop/services/s0"}); err != nil {
		t.Fatal(err)
	}
	if err := e.server.maintain(t.Context(), time.Now().Add(virtualIPQuarantine+time.Minute)); err != nil || held() != nil {
		t.Fatalf("the address is still held: %v", err)
	}
}

// watching counts what single transactions do: the most deletions, and the most
// reads of addresses.
type watching struct {
	store.Store
	most, reads int
}

type watchingTx struct {
	store.Tx
	n, reads int
}

func (x *watchingTx) Get(k store.Kind, name string) (store.Record, error) {
	if k == store.VirtualIP {
		x.reads++
	}
	return x.Tx.Get(k, name)
}

func (x *watchingTx) Delete(k store.Kind, name string) error {
	x.n++
	return x.Tx.Delete(k, name)
}

func (w *watching) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	return w.Store.Update(ctx, func(tx store.Tx) error {
		x := &watchingTx{Tx: tx}
		err := fn(x)
		w.most, w.reads = max(w.most, x.n), max(w.reads, x.reads)
		return err
	})
}

// TestABacklogIsClearedInOneGo: however much expired of one kind, all of it goes,
// in transactions that are bounded, and that of the others too.
func TestABacklogIsClearedInOneGo(t *testing.T) {
	w := &watching{}
	e := newEnv(t, func(c *Config) { w.Store, c.Store = c.Store, w })
	now := time.Now()
	over, valid := timestamppb.New(now.Add(-time.Hour)), timestamppb.New(now.Add(time.Hour))
	if _, err := e.store.Update(t.Context(), func(tx store.Tx) error {
		for i := range 3*scanBatch + 7 {
			r := &storev1.RequestResult{ExpireTime: over}
			if i%3 == 0 {
				r.ExpireTime = valid
			}
			if err := tx.Put(store.RequestResult, fmt.Sprintf("somebody/%05d", i), r); err != nil {
				return err
			}
		}
		if err := tx.Put(store.VirtualIP, "10.68.0.9", &storev1.VirtualIP{ReleaseTime: over}); err != nil {
			return err
		}
		return tx.Put(store.JoinToken, "hash", &storev1.JoinToken{ExpireTime: over})
	}); err != nil {
		t.Fatal(err)
	}
	if err := e.server.maintain(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	left := map[store.Kind]int{}
	if _, err := e.store.View(t.Context(), func(r store.Reader) error {
		for _, k := range []store.Kind{store.RequestResult, store.VirtualIP, store.JoinToken} {
			for rec, err := range r.List(k, store.ListOptions{}) {
				if err != nil {
					return err
				}
				if left[k]++; expired(rec.Message, now) {
					t.Errorf("%s %s is still there", k, rec.Name)
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if left[store.RequestResult] != scanBatch+3 || left[store.VirtualIP]+left[store.JoinToken] != 0 {
		t.Errorf("left: %v", left)
	}
	if w.most == 0 || w.most > scanBatch {
		t.Errorf("%d deletions in one transaction", w.most)
	}
}

func TestAddressesRunOut(t *testing.T) {
	e := newEnv(t, func(c *Config) { c.VirtualIPs = prefix("10.68.0.0/30") })
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	for i := range 3 {
		_, err := e.mesh().CreateService(e.as("shop"), &portolanv1.CreateServiceRequest{Service: service("shop", fmt.Sprintf("s%d", i), "web")})
		want := codes.OK
		if i == 2 {
			want = codes.ResourceExhausted
		}
		wantCode(t, err, want)
	}
}

// TestCrowdedAddresses: a service whose name points into a crowd gets the first
// gap behind it, and no transaction reads the crowd row by row.
func TestCrowdedAddresses(t *testing.T) {
	w := &watching{}
	e := newEnv(t, func(c *Config) {
		c.VirtualIPs = prefix("10.68.0.0/22")
		w.Store, c.Store = c.Store, w
	})
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	svc := service("shop", "s", "web")
	count, at := e.server.addresses()
	start := e.server.preferred(svc.GetName())
	const crowd = 700
	if _, err := e.store.Update(t.Context(), func(tx store.Tx) error {
		for i := range uint32(crowd) {
			if err := tx.Put(store.VirtualIP, at((start+i)%count), &storev1.VirtualIP{Service: "tenants/bank/services/x"}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	w.reads = 0
	got := must[*portolanv1.Service](t)(e.mesh().CreateService(e.as("shop"), &portolanv1.CreateServiceRequest{Service: svc}))
	if want := at((start + crowd) % count); got.GetStatus().GetVirtualIp() != want {
		t.Errorf("got %s, the first gap is %s", got.GetStatus().GetVirtualIp(), want)
	}
	if w.reads == 0 || w.reads > maxProbes {
		t.Errorf("one transaction read %d addresses", w.reads)
	}
	// The rest of the range, and then one too many.
	for i := range count - crowd {
		_, err := e.mesh().CreateService(e.as("shop"), &portolanv1.CreateServiceRequest{Service: service("shop", fmt.Sprintf("x%d", i), "web")})
		if i < count-crowd-1 {
			wantCode(t, err, codes.OK)
		} else {
			wantCode(t, err, codes.ResourceExhausted)
		}
	}
}

func TestPolicyBundles(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	c := portolanv1.NewPolicyServiceClient(e.conn)
	bundle := func(files map[string]string) *portolanv1.PolicyBundle {
		return &portolanv1.PolicyBundle{Name: "policyBundles/extra", Spec: &portolanv1.PolicyBundleSpec{Kind: portolanv1.PolicyKind_POLICY_KIND_ADMISSION, Files: files}}
	}
	_, err := c.CreatePolicyBundle(e.root(), &portolanv1.CreatePolicyBundleRequest{PolicyBundle: bundle(map[string]string{"a.rego": "package portolan.admission\n\nimport rego.v1\n\ndeny contains {\n"})})
	wantCode(t, err, codes.InvalidArgument)
	if !strings.Contains(err.Error(), "a.rego:") {
		t.Fatalf("no file and line: %v", err)
	}
	rego := "package portolan.admission\n\nimport rego.v1\n\ndeny contains {\"msg\": \"nobody deploys on fridays\", \"field\": \"name\"} if input.kind == \"Workload\"\n"
	failing := map[string]string{"a.rego": rego, "a_test.rego": "package portolan.admission_test\n\nimport rego.v1\n\nimport data.portolan.admission\n\ntest_open if count(admission.deny) == 0 with input as {\"kind\": \"Workload\"}\n"}
	_, err = c.CreatePolicyBundle(e.root(), &portolanv1.CreatePolicyBundleRequest{PolicyBundle: bundle(failing)})
	wantCode(t, err, codes.InvalidArgument)
	got := must[*portolanv1.PolicyBundle](t)(c.CreatePolicyBundle(e.root(), &portolanv1.CreatePolicyBundleRequest{PolicyBundle: bundle(map[string]string{"a.rego": rego})}))
	if !strings.HasPrefix(got.GetStatus().GetDigest(), "sha256:") {
		t.Fatal(got.GetStatus())
	}
	_, err = e.workloads().CreateWorkload(e.as("shop"), &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "web")})
	wantCode(t, err, codes.PermissionDenied)
	if !strings.Contains(err.Error(), "fridays") || !strings.Contains(err.Error(), "policyBundles/extra/a.rego:5") {
		t.Fatal(err)
	}
	// The next decision is the next bundle's.
	if _, err := c.DeletePolicyBundle(e.root(), &portolanv1.DeletePolicyBundleRequest{Name: "policyBundles/extra"}); err != nil {
		t.Fatal(err)
	}
	e.create("shop", workload("shop", "web"))
	if _, err := c.DeletePolicyBundle(e.root(), &portolanv1.DeletePolicyBundleRequest{Name: BaselineName}); err != nil {
		t.Fatal(err)
	}
	_, err = e.workloads().CreateWorkload(e.as("shop"), &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "web2")})
	wantCode(t, err, codes.PermissionDenied)
}

func TestRegistryGone(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	e.resolver.err = api.E(api.Unavailable, "resolve", "gone")
	_, err := e.workloads().CreateWorkload(e.as("shop"), &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "new")})
	wantCode(t, err, codes.Unavailable)
	pinned := workload("shop", "pinned")
	pinned.Spec.Containers[0].Image = testRegistry + "/app@sha256:" + strings.Repeat("c", 64)
	if w := e.create("shop", pinned); w.GetSpec().GetContainers()[0].GetResolvedImage() != pinned.Spec.Containers[0].Image {
		t.Fatal(w)
	}
	asked := e.resolver.count()
	evil := workload("shop", "evil")
	evil.Spec.Containers[0].Image = "evil.example/app:1"
	_, err = e.workloads().CreateWorkload(e.as("shop"), &portolanv1.CreateWorkloadRequest{Workload: evil})
	wantCode(t, err, codes.InvalidArgument)
	if e.resolver.count() != asked {
		t.Fatal("an unlisted registry was asked")
	}
}

func TestAuditTellsOfChangesAndRefusals(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.create("shop", workload("shop", "web"))
	_, err := e.workloads().DeleteWorkload(e.as("shop"), &portolanv1.DeleteWorkloadRequest{Name: "tenants/shop/workloads/nothing"})
	wantCode(t, err, codes.NotFound)
	_, err = portolanv1.NewTenantServiceClient(e.conn).DeleteTenant(e.as("shop"), &portolanv1.DeleteTenantRequest{Name: "tenants/shop"})
	wantCode(t, err, codes.PermissionDenied)
	log := e.audit()
	n := len(log)
	made, absent, denied := log[n-3], log[n-2], log[n-1]
	if made.GetResource() != "tenants/shop/workloads/web" || made.GetTenant() != "shop" || made.GetRevision() == 0 || made.GetDecision() != portolanv1.AuditDecision_AUDIT_DECISION_ALLOWED {
		t.Fatal(made)
	}
	if absent.GetDecision() != portolanv1.AuditDecision_AUDIT_DECISION_REFUSED || absent.GetMethod() != "portolan.v1.WorkloadService/DeleteWorkload" {
		t.Fatal(absent)
	}
	if denied.GetDecision() != portolanv1.AuditDecision_AUDIT_DECISION_REFUSED || !strings.Contains(denied.GetReason(), "fleet admins") {
		t.Fatal(denied)
	}
	for range 100 {
		_, _ = e.workloads().DeleteWorkload(e.as("shop"), &portolanv1.DeleteWorkloadRequest{Name: "tenants/shop/workloads/nothing"})
	}
	if more := len(e.audit()) - n; more > 40 {
		t.Fatalf("%d rows for 100 refusals", more)
	}
	forged := slices.Clone(log)
	forged[1] = proto.CloneOf(forged[1])
	forged[1].Actor = "spiffe://" + testFleet + "/user/somebody-else"
	if VerifyAudit(forged) == nil || VerifyAudit(append(slices.Clone(log[:1]), log[2:]...)) == nil {
		t.Fatal("a forged chain verifies")
	}
	// Another replica, and one that starts now, find the end of the log.
	for _, hint := range []int64{0, 1, 5, int64(len(log))} {
		_, err := e.store.View(t.Context(), func(r store.Reader) error {
			n, last, err := lastAudit(r, hint)
			if err == nil && (n != int64(len(e.audit())) || last.GetHash() == "") {
				t.Errorf("hint %d: the end is %d", hint, n)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestBootstrapMayBeRepeated(t *testing.T) {
	e := newEnv(t)
	before := e.revision()
	if err := e.server.Bootstrap(t.Context(), "root"); err != nil || e.revision() != before {
		t.Fatalf("%v, revision %d after %d", err, e.revision(), before)
	}
}

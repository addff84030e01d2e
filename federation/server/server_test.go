package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

const (
	testFleet    = "portolan.internal"
	testRegistry = "registry.portolan.internal:5000"
	testImage    = testRegistry + "/app:1"
)

// opaEngine adapts policy/opa the way the binary does.
type opaEngine struct{}

func (opaEngine) CompileAdmission(_ context.Context, bundles []policy.Bundle) (policy.Admitter, error) {
	set, faults := opa.Update(nil, bundles, opa.Limits{Deadline: 5 * time.Second})
	var errs []error
	for _, f := range faults {
		errs = append(errs, f)
	}
	return set, errors.Join(errs...)
}

func (opaEngine) Check(ctx context.Context, b policy.Bundle) []api.Violation {
	return opa.Check(ctx, b)
}

// fakeResolver knows every tag but those in a repository "no/such".
type fakeResolver struct {
	mu     sync.Mutex
	asked  []string
	digest string
	err    error
}

func (f *fakeResolver) Resolve(_ context.Context, image string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, image)
	if f.err != nil {
		return "", f.err
	}
	if strings.Contains(image, "no/such") {
		return "", api.E(api.NotFound, "resolve", "absent")
	}
	repo, _, _ := strings.Cut(image[len(testRegistry):], ":")
	return testRegistry + repo + "@sha256:" + f.digest, nil
}

func (f *fakeResolver) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

type fakeTokens struct{}

func (fakeTokens) MintJoinToken() (string, error) { return "ptj1_secret", nil }

// fakeClusters are bufconn servers by cluster.
type fakeClusters map[string]grpc.ClientConnInterface

func (f fakeClusters) Conn(c string) (grpc.ClientConnInterface, bool) { cc, ok := f[c]; return cc, ok }

type env struct {
	t        *testing.T
	store    store.Store
	server   *Server
	resolver *fakeResolver
	conn     *grpc.ClientConn
	logs     *strings.Builder
}

// callerHeader carries the caller in tests whose subject is not TLS.
const callerHeader = "test-caller"

func identifyByHeader(ctx context.Context) (identity.ID, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	v := md.Get(callerHeader)
	if len(v) != 1 {
		return identity.ID{}, api.E(api.Unknown, "", "a client certificate is required")
	}
	return identity.Parse(v[0])
}

func serve(t *testing.T, register func(*grpc.Server), opts ...grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer(opts...)
	register(g)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l)
	}()
	cc, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes), grpc.MaxCallSendMsgSize(api.MaxMessageBytes)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cc.Close()
		g.Stop()
		<-done
	})
	return cc
}

func newEnv(t *testing.T, change ...func(*Config)) *env {
	t.Helper()
	e := &env{t: t, store: mem.New(mem.Config{RunTwice: true}), resolver: &fakeResolver{digest: strings.Repeat("a", 64)}, logs: &strings.Builder{}}
	cfg := Config{
		Store: e.store, Fleet: testFleet, Log: slog.New(slog.DiscardHandler), Identify: identifyByHeader,
		Admission: opaEngine{}, Policies: opaEngine{}, Resolver: e.resolver, Registries: []string{testRegistry},
		VirtualIPs: netip.MustParsePrefix("10.68.0.0/16"), Tokens: fakeTokens{},
	}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.server = s
	if err := s.Bootstrap(t.Context(), "root"); err != nil {
		t.Fatal(err)
	}
	e.conn = serve(t, func(g *grpc.Server) { s.Register(g) }, s.ServerOptions()...)
	return e
}

func (e *env) as(user string) context.Context {
	ctx, cancel := context.WithTimeout(e.t.Context(), 30*time.Second)
	e.t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, callerHeader, "spiffe://"+testFleet+"/user/"+user)
}

// forever is as without an end.
func (e *env) forever(user string) context.Context {
	return metadata.AppendToOutgoingContext(e.t.Context(), callerHeader, "spiffe://"+testFleet+"/user/"+user)
}

func (e *env) root() context.Context { return e.as("root") }

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// tenant makes a tenant and an admin of it, of the same name.
func (e *env) tenant(name string, suffixes ...string) {
	e.t.Helper()
	c := portolanv1.NewTenantServiceClient(e.conn)
	must[*portolanv1.Tenant](e.t)(c.CreateTenant(e.root(), &portolanv1.CreateTenantRequest{Tenant: &portolanv1.Tenant{
		Name: "tenants/" + name, Spec: &portolanv1.TenantSpec{IngressSuffixes: suffixes},
	}}))
	must[*portolanv1.RoleBinding](e.t)(c.CreateRoleBinding(e.root(), &portolanv1.CreateRoleBindingRequest{RoleBinding: &portolanv1.RoleBinding{
		Name: "roleBindings/" + name, Spec: &portolanv1.RoleBindingSpec{
			Subject: "spiffe://" + testFleet + "/user/" + name, Role: portolanv1.Role_ROLE_TENANT_ADMIN, Tenant: name,
		},
	}}))
}

func workload(tenant, id string) *portolanv1.Workload {
	return &portolanv1.Workload{Name: api.WorkloadName(tenant, id), Spec: &portolanv1.WorkloadSpec{
		Replicas: proto.Int32(2),
		Containers: []*portolanv1.Container{{
			Image: testImage, Ports: []*portolanv1.ContainerPort{{Port: 8080}}, Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "64Mi"},
		}},
	}}
}

func service(tenant, id, w string) *portolanv1.Service {
	return &portolanv1.Service{Name: api.ServiceName(tenant, id), Spec: &portolanv1.ServiceSpec{Workload: w, Ports: []*portolanv1.ServicePort{{Port: 80, TargetPort: 8080}}}}
}

func (e *env) workloads() portolanv1.WorkloadServiceClient {
	return portolanv1.NewWorkloadServiceClient(e.conn)
}

func (e *env) mesh() portolanv1.MeshServiceClient { return portolanv1.NewMeshServiceClient(e.conn) }

func (e *env) create(user string, w *portolanv1.Workload) *portolanv1.Workload {
	e.t.Helper()
	return must[*portolanv1.Workload](e.t)(e.workloads().CreateWorkload(e.as(user), &portolanv1.CreateWorkloadRequest{Workload: w}))
}

func (e *env) revision() int64 {
	e.t.Helper()
	return must[int64](e.t)(e.store.View(e.t.Context(), func(store.Reader) error { return nil }))
}

func wantCode(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("got %v, want code %s", err, code)
	}
}

func fieldsOf(err error) []string {
	var out []string
	for _, d := range status.Convert(err).Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range b.GetFieldViolations() {
				out = append(out, v.GetField())
			}
		}
	}
	return out
}

// audit reads the whole log through the API and checks the chain.
func (e *env) audit() []*portolanv1.AuditEntry {
	e.t.Helper()
	var out []*portolanv1.AuditEntry
	req := &portolanv1.ListAuditEntriesRequest{PageSize: 7}
	for {
		resp := must[*portolanv1.ListAuditEntriesResponse](e.t)(portolanv1.NewAuditServiceClient(e.conn).ListAuditEntries(e.root(), req))
		out = append(out, resp.GetAuditEntries()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if err := VerifyAudit(out); err != nil {
		e.t.Fatal(err)
	}
	return out
}

func names[T interface{ GetName() string }](list []T) string {
	var out []string
	for _, o := range list {
		out = append(out, o.GetName())
	}
	return strings.Join(out, " ")
}

func TestStandardMethods(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	c, ctx := e.workloads(), e.as("shop")
	w := e.create("shop", workload("shop", "web"))
	if w.GetGeneration() != 1 || w.GetUid() == "" || w.GetEtag() == "" || w.GetRevision() != e.revision() {
		t.Fatalf("created: %v", w)
	}
	ctr := w.GetSpec().GetContainers()[0]
	if ctr.GetName() != "main" || ctr.GetRequests().GetCpu() != "100m" || ctr.GetImage() != testImage || !strings.Contains(ctr.GetResolvedImage(), "/app@sha256:") {
		t.Fatalf("defaults and resolution: %v", ctr)
	}
	if got := w.GetStatus().GetCurrentRevision(); got != "r1" {
		t.Fatalf("current revision %q", got)
	}
	got := must[*portolanv1.Workload](t)(c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: w.GetName()}))
	if !proto.Equal(got, w) {
		t.Fatalf("got %v\nwant %v", got, w)
	}

	before := e.revision()
	same := must[*portolanv1.Workload](t)(c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{Workload: workload("shop", "web")}))
	if e.revision() != before || same.GetGeneration() != 1 || same.GetRevision() != w.GetRevision() {
		t.Fatalf("an unchanged update wrote something: %v", same)
	}

	scaled := must[*portolanv1.Workload](t)(c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{
		Workload:   &portolanv1.Workload{Name: w.GetName(), Etag: w.GetEtag(), Spec: &portolanv1.WorkloadSpec{Replicas: proto.Int32(5)}},
		UpdateMask: mask("spec.replicas"),
	}))
	if scaled.GetGeneration() != 2 || scaled.GetSpec().GetReplicas() != 5 || len(scaled.GetSpec().GetContainers()) != 1 || scaled.GetStatus().GetCurrentRevision() != "r1" {
		t.Fatalf("scaled: %v", scaled)
	}
	_, err := c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{Workload: &portolanv1.Workload{Name: w.GetName(), Etag: w.GetEtag(), Spec: w.GetSpec()}})
	wantCode(t, err, codes.Aborted)

	labelled := must[*portolanv1.Workload](t)(c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{
		Workload: &portolanv1.Workload{Name: w.GetName(), Labels: map[string]string{"a": "b"}}, UpdateMask: mask("labels"),
	}))
	if labelled.GetGeneration() != 2 || labelled.GetEtag() == scaled.GetEtag() {
		t.Fatalf("a label is no new generation but a new etag: %v", labelled)
	}

	before = e.revision()
	dry := must[*portolanv1.Workload](t)(c.CreateWorkload(ctx, &portolanv1.CreateWorkloadRequest{Workload: workload("shop", "dry"), ValidateOnly: true}))
	if dry.GetStatus().GetCurrentRevision() != "r1" || e.revision() != before {
		t.Fatalf("dry run: %v", dry)
	}
	must[*portolanv1.Workload](t)(c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{Workload: workload("shop", "up"), AllowMissing: true}))
	_, err = c.DeleteWorkload(ctx, &portolanv1.DeleteWorkloadRequest{Name: w.GetName(), Etag: "stale"})
	wantCode(t, err, codes.Aborted)
	if _, err = c.DeleteWorkload(ctx, &portolanv1.DeleteWorkloadRequest{Name: w.GetName()}); err != nil {
		t.Fatal(err)
	}
	_, err = c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: w.GetName()})
	wantCode(t, err, codes.NotFound)
	if _, err = c.DeleteWorkload(ctx, &portolanv1.DeleteWorkloadRequest{Name: w.GetName(), AllowMissing: true}); err != nil {
		t.Fatal(err)
	}
	revs := must[*portolanv1.ListWorkloadRevisionsResponse](t)(c.ListWorkloadRevisions(ctx, &portolanv1.ListWorkloadRevisionsRequest{Parent: w.GetName()}))
	if len(revs.GetWorkloadRevisions()) != 0 {
		t.Fatalf("revisions outlive their workload: %v", names(revs.GetWorkloadRevisions()))
	}
	e.audit()
}

func TestPagesAndSelectors(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	for i := range 7 {
		w := workload("shop", fmt.Sprintf("w%d", i))
		w.Labels = map[string]string{"odd": fmt.Sprint(i % 2)}
		e.create("shop", w)
	}
	c, ctx := e.workloads(), e.as("shop")
	var got []*portolanv1.Workload
	req := &portolanv1.ListWorkloadsRequest{Parent: "tenants/shop", PageSize: 2, LabelSelector: map[string]string{"odd": "1"}}
	for pages := 1; ; pages++ {
		resp := must[*portolanv1.ListWorkloadsResponse](t)(c.ListWorkloads(ctx, req))
		got = append(got, resp.GetWorkloads()...)
		if resp.GetNextPageToken() == "" {
			if pages != 2 {
				t.Fatalf("%d pages", pages)
			}
			break
		}
		req.PageToken = resp.GetNextPageToken()
	}
	if names(got) != "tenants/shop/workloads/w1 tenants/shop/workloads/w3 tenants/shop/workloads/w5" {
		t.Fatal(names(got))
	}
	for _, bad := range []*portolanv1.ListWorkloadsRequest{
		{Parent: "tenants/shop", PageToken: "!"},
		{Parent: "tenants/shop", PageToken: req.PageToken}, // of another selector
		{Parent: "-", PageToken: req.PageToken, LabelSelector: req.LabelSelector},
		{PageSize: -1},
		{Parent: "clusters/x"},
	} {
		_, err := c.ListWorkloads(ctx, bad)
		wantCode(t, err, codes.InvalidArgument)
	}
}

func TestTenantsAreApart(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.tenant("bank")
	e.create("bank", workload("bank", "vault"))
	c, ctx := e.workloads(), e.as("shop")
	_, theirs := c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: "tenants/bank/workloads/vault"})
	_, nobodys := c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: "tenants/bank/workloads/vaulx"})
	if a, b := status.Convert(theirs), status.Convert(nobodys); a.Code() != codes.NotFound || strings.ReplaceAll(a.Message(), "vault", "") != strings.ReplaceAll(b.Message(), "vaulx", "") {
		t.Fatalf("not yours and not found read differently: %v, %v", a, b)
	}
	for _, parent := range []string{"tenants/bank", "tenants/nobody"} {
		_, err := c.ListWorkloads(ctx, &portolanv1.ListWorkloadsRequest{Parent: parent})
		wantCode(t, err, codes.NotFound)
	}
	if l := must[*portolanv1.ListWorkloadsResponse](t)(c.ListWorkloads(ctx, &portolanv1.ListWorkloadsRequest{})); len(l.GetWorkloads()) != 0 {
		t.Fatal(names(l.GetWorkloads()))
	}
	if l := must[*portolanv1.ListTenantsResponse](t)(portolanv1.NewTenantServiceClient(e.conn).ListTenants(ctx, &portolanv1.ListTenantsRequest{})); names(l.GetTenants()) != "tenants/shop" {
		t.Fatal(names(l.GetTenants()))
	}
	for _, entry := range must[*portolanv1.ListAuditEntriesResponse](t)(portolanv1.NewAuditServiceClient(e.conn).ListAuditEntries(ctx, &portolanv1.ListAuditEntriesRequest{})).GetAuditEntries() {
		if entry.GetTenant() != "shop" {
			t.Fatalf("another's audit entry: %v", entry)
		}
	}
	_, err := portolanv1.NewPolicyServiceClient(e.conn).GetPolicyBundle(ctx, &portolanv1.GetPolicyBundleRequest{Name: BaselineName})
	wantCode(t, err, codes.NotFound)
	_, err = portolanv1.NewTenantServiceClient(e.conn).ListRoleBindings(ctx, &portolanv1.ListRoleBindingsRequest{})
	wantCode(t, err, codes.PermissionDenied)
	_, err = c.ListWorkloads(e.as("stranger"), &portolanv1.ListWorkloadsRequest{})
	wantCode(t, err, codes.PermissionDenied)
	_, err = c.ListWorkloads(t.Context(), &portolanv1.ListWorkloadsRequest{})
	wantCode(t, err, codes.Unauthenticated)
	_, err = c.ListWorkloads(metadata.AppendToOutgoingContext(t.Context(), callerHeader, "spiffe://eu-west."+testFleet+"/control"), &portolanv1.ListWorkloadsRequest{})
	wantCode(t, err, codes.PermissionDenied)
	// A binding that goes is gone for the next call.
	if _, err := portolanv1.NewTenantServiceClient(e.conn).DeleteRoleBinding(e.root(), &portolanv1.DeleteRoleBindingRequest{Name: "roleBindings/shop"}); err != nil {
		t.Fatal(err)
	}
	_, err = c.ListWorkloads(ctx, &portolanv1.ListWorkloadsRequest{})
	wantCode(t, err, codes.PermissionDenied)
	_, err = portolanv1.NewTenantServiceClient(e.conn).DeleteRoleBinding(e.root(), &portolanv1.DeleteRoleBindingRequest{Name: "roleBindings/root"})
	wantCode(t, err, codes.FailedPrecondition)
}

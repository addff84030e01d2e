package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestEveryRPCHasAPermission(t *testing.T) {
	seen := map[string]bool{}
	protoregistry.GlobalFiles.RangeFilesByPackage("portolan.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := "/" + string(s.FullName()) + "/" + string(s.Methods().Get(j).Name())
				seen[m] = true
				r, ok := rules[m]
				if !ok {
					t.Errorf("%s has no permission", m)
				}
				name := string(s.Methods().Get(j).Name())
				changes := strings.HasPrefix(name, "Create") || strings.HasPrefix(name, "Update") || strings.HasPrefix(name, "Delete")
				if changes && (r.needs == read || !r.audited) {
					t.Errorf("%s changes something, but anybody may or nobody hears of it", m)
				}
			}
		}
		return true
	})
	for m := range rules {
		if !seen[m] {
			t.Errorf("%s is no RPC", m)
		}
	}
	if len(seen) < 40 {
		t.Fatalf("only %d RPCs were found", len(seen))
	}
}

// events reads a watch until a bookmark or snapshot end at or past a revision,
// and gives "PUT name" and "DELETE name" for each change.
func events(t *testing.T, s grpc.ServerStreamingClient[portolanv1.WatchResponse], until int64) (list []string, objects map[string]proto.Message) {
	t.Helper()
	objects = map[string]proto.Message{}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		switch ev := m.GetEvent().(type) {
		case *portolanv1.WatchResponse_Change_:
			o, err := ev.Change.GetObject().UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			name := o.(interface{ GetName() string }).GetName()
			list = append(list, strings.TrimPrefix(ev.Change.GetKind().String(), "CHANGE_KIND_")+" "+name)
			objects[name] = o
		case *portolanv1.WatchResponse_SnapshotEnd_:
			if ev.SnapshotEnd.GetRevision() >= until {
				return list, objects
			}
		case *portolanv1.WatchResponse_Bookmark_:
			if ev.Bookmark.GetRevision() >= until {
				return list, objects
			}
		}
	}
}

func (e *env) put(kind store.Kind, name string, m proto.Message) int64 {
	e.t.Helper()
	return must[int64](e.t)(e.store.Update(e.t.Context(), func(tx store.Tx) error { return tx.Put(kind, name, m) }))
}

func TestWatch(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.tenant("bank")
	e.create("shop", workload("shop", "web"))
	e.create("bank", workload("bank", "vault"))
	c := portolanv1.NewWatchServiceClient(e.conn)
	w := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(c.Watch(e.as("shop"), &portolanv1.WatchRequest{}))
	if m := must[*portolanv1.WatchResponse](t)(w.Recv()); m.GetEstablished() == nil {
		t.Fatal(m)
	}
	got, _ := events(t, w, e.revision())
	if strings.Join(got, " ") != "PUT tenants/shop PUT tenants/shop/workloads/web PUT tenants/shop/workloads/web/revisions/r1" {
		t.Fatal(got)
	}
	resume := e.revision()
	e.create("bank", workload("bank", "vault2"))
	e.create("shop", workload("shop", "api"))
	if _, err := e.workloads().DeleteWorkload(e.as("shop"), &portolanv1.DeleteWorkloadRequest{Name: "tenants/shop/workloads/api"}); err != nil {
		t.Fatal(err)
	}
	got, _ = events(t, w, e.revision())
	want := "PUT tenants/shop/workloads/api/revisions/r1 PUT tenants/shop/workloads/api DELETE tenants/shop/workloads/api/revisions/r1 DELETE tenants/shop/workloads/api"
	if strings.Join(got, " ") != want {
		t.Fatalf("got %v", got)
	}
	// Status that is joined makes the object be sent again.
	p := "tenants/shop/workloads/web/placements/eu-west"
	e.put(store.Placement, p, &portolanv1.Placement{Name: p, Spec: &portolanv1.PlacementSpec{Epoch: 1, Revisions: []*portolanv1.RevisionReplicas{{Revision: "r1", Replicas: 2}}}})
	rev := e.put(store.PlacementStatus, p, &storev1.PlacementStatusRecord{Epoch: 1, Status: &portolanv1.PlacementStatus{Revisions: []*portolanv1.RevisionReplicas{{Revision: "r1", Replicas: 2, ReadyReplicas: 2}}}})
	_, objects := events(t, w, rev)
	web, ok := objects["tenants/shop/workloads/web"].(*portolanv1.Workload)
	if !ok || web.GetStatus().GetReadyReplicas() != 2 || web.GetStatus().GetObservedGeneration() != 1 || web.GetStatus().GetConditions()[1].GetState() != portolanv1.ConditionState_CONDITION_STATE_TRUE {
		t.Fatal(web.GetStatus())
	}
	// Resume after what was seen.
	again := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(c.Watch(e.as("shop"), &portolanv1.WatchRequest{FromRevision: resume, Kinds: []string{"Workload"}, Parent: "tenants/shop"}))
	got, _ = events(t, again, rev)
	if len(got) < 3 || got[0] != "PUT tenants/shop/workloads/api" || got[1] != "DELETE tenants/shop/workloads/api" || got[2] != "PUT tenants/shop/workloads/web" {
		t.Fatal(got)
	}
	for _, bad := range []struct {
		req  *portolanv1.WatchRequest
		code codes.Code
	}{
		{&portolanv1.WatchRequest{FromRevision: 1 << 40}, codes.OutOfRange},
		{&portolanv1.WatchRequest{Kinds: []string{"NackRecord"}}, codes.InvalidArgument},
		{&portolanv1.WatchRequest{Parent: "tenants/bank"}, codes.NotFound},
		{&portolanv1.WatchRequest{FromRevision: -1}, codes.InvalidArgument},
	} {
		s := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(c.Watch(e.as("shop"), bad.req))
		_, err := s.Recv()
		wantCode(t, err, bad.code)
	}
	if err := e.store.(interface {
		Compact(context.Context, int64) error
	}).Compact(t.Context(), resume+1); err != nil {
		t.Fatal(err)
	}
	s := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(c.Watch(e.as("shop"), &portolanv1.WatchRequest{FromRevision: resume}))
	for {
		m, err := s.Recv()
		if err != nil {
			wantCode(t, err, codes.OutOfRange)
			break
		}
		if m.GetEstablished() == nil {
			t.Fatalf("a compacted watch sent %v", m)
		}
	}
}

// TestWatchShowsClustersAsGetDoes: what lies in lease rows is joined in both.
func TestWatchShowsClustersAsGetDoes(t *testing.T) {
	e := newEnv(t)
	e.cluster("eu", portolanv1.ClusterState_CLUSTER_STATE_READY)
	e.progress("cluster/eu", 2)
	get := func() *portolanv1.Cluster {
		return must[*portolanv1.Cluster](t)(portolanv1.NewClusterServiceClient(e.conn).GetCluster(e.root(), &portolanv1.GetClusterRequest{Name: "clusters/eu"}))
	}
	w := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(portolanv1.NewWatchServiceClient(e.conn).Watch(e.root(), &portolanv1.WatchRequest{Kinds: []string{"Cluster"}}))
	_, objects := events(t, w, 0)
	same := func(what string) {
		t.Helper()
		seen, _ := objects["clusters/eu"].(*portolanv1.Cluster)
		got := get().GetStatus()
		off := seen.GetStatus().GetLastSeenTime().AsTime().Sub(got.GetLastSeenTime().AsTime()).Abs()
		if got.GetAppliedRevision() == 0 || got.GetLastSeenTime() == nil || seen.GetStatus().GetAppliedRevision() != got.GetAppliedRevision() || off > time.Second {
			t.Errorf("%s: the watch says %v, a get %v", what, seen.GetStatus(), got)
		}
	}
	same("snapshot")
	e.progress("cluster/eu", 3)
	rev := e.put(store.ClusterStatus, "clusters/eu", &storev1.ClusterStatusRecord{Status: &portolanv1.ClusterStatus{State: portolanv1.ClusterState_CLUSTER_STATE_READY, Nodes: 4}})
	_, objects = events(t, w, rev)
	same("change")
}

func (e *env) cluster(id string, state portolanv1.ClusterState) {
	e.t.Helper()
	must[*portolanv1.Cluster](e.t)(portolanv1.NewClusterServiceClient(e.conn).CreateCluster(e.root(), &portolanv1.CreateClusterRequest{
		Cluster: &portolanv1.Cluster{Name: "clusters/" + id, Spec: &portolanv1.ClusterSpec{Region: id}},
	}))
	if state != portolanv1.ClusterState_CLUSTER_STATE_PENDING {
		e.put(store.ClusterStatus, "clusters/"+id, &storev1.ClusterStatusRecord{Status: &portolanv1.ClusterStatus{State: state, Nodes: 3}})
	}
}

func (e *env) progress(lease string, n int64) {
	e.t.Helper()
	must[store.Lease](e.t)(e.store.Acquire(e.t.Context(), lease, lease, time.Minute, n))
}

func TestWaitConverged(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.cluster("eu-west", portolanv1.ClusterState_CLUSTER_STATE_READY)
	e.cluster("us-east", portolanv1.ClusterState_CLUSTER_STATE_LOST)
	c := portolanv1.NewConvergenceServiceClient(e.conn)
	wait := func(user string, req *portolanv1.WaitConvergedRequest) (last *portolanv1.WaitConvergedResponse, n int, err error) {
		s := must[grpc.ServerStreamingClient[portolanv1.WaitConvergedResponse]](t)(c.WaitConverged(e.as(user), req))
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return last, n, nil
			}
			if err != nil {
				return last, n, err
			}
			last, n = m, n+1
		}
	}
	short := durationpb.New(150 * time.Millisecond)
	got, _, err := wait("root", &portolanv1.WaitConvergedRequest{Timeout: short})
	if err != nil || got.GetConverged() || !got.GetFinal() || got.GetDerivedRevision() != 0 || got.GetLaggards()[0].GetName() != "loops/control/place" {
		t.Fatal(got, err)
	}
	rev := e.revision()
	e.progress("control/place", rev)
	got, n, err := wait("root", &portolanv1.WaitConvergedRequest{Timeout: durationpb.New(1200 * time.Millisecond)})
	if err != nil || n != 2 || got.GetConverged() || got.GetDerivedRevision() != rev || len(got.GetLaggards()) != 1 || got.GetLaggards()[0].GetName() != "clusters/eu-west" {
		t.Fatal(got, n, err)
	}
	e.progress("cluster/eu-west", rev)
	got, _, err = wait("shop", &portolanv1.WaitConvergedRequest{Revision: rev, Timeout: short})
	if err != nil || !got.GetConverged() || len(got.GetLaggards()) != 0 {
		t.Fatal(got, err)
	}
	got, _, err = wait("root", &portolanv1.WaitConvergedRequest{Clusters: []string{"us-east"}, Timeout: short})
	if err != nil || got.GetConverged() || !strings.Contains(got.GetLaggards()[0].GetDetail(), "silent") {
		t.Fatal(got, err)
	}
	_, _, err = wait("root", &portolanv1.WaitConvergedRequest{Clusters: []string{"nowhere"}})
	wantCode(t, err, codes.NotFound)
	_, _, err = wait("root", &portolanv1.WaitConvergedRequest{Revision: rev + 1})
	wantCode(t, err, codes.InvalidArgument)

	seen := must[*portolanv1.Cluster](t)(portolanv1.NewClusterServiceClient(e.conn).GetCluster(e.root(), &portolanv1.GetClusterRequest{Name: "clusters/eu-west"}))
	if seen.GetStatus().GetAppliedRevision() != rev || seen.GetStatus().GetNodes() != 3 {
		t.Fatal(seen.GetStatus())
	}
	seen = must[*portolanv1.Cluster](t)(portolanv1.NewClusterServiceClient(e.conn).GetCluster(e.as("shop"), &portolanv1.GetClusterRequest{Name: "clusters/eu-west"}))
	if seen.GetStatus().GetAppliedRevision() != 0 || seen.GetStatus().GetNodes() != 0 || seen.GetStatus().GetState() != portolanv1.ClusterState_CLUSTER_STATE_READY {
		t.Fatal(seen.GetStatus())
	}
}

// fakeRuntime is what a cluster serves on its tunnel.
type fakeRuntime struct {
	portolanv1.UnimplementedRuntimeServiceServer
	linkv1.UnimplementedClusterAdminServiceServer
}

const replica = "tenants/shop/workloads/web/replicas/web-abcde"

func (fakeRuntime) ListReplicas(context.Context, *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	return &portolanv1.ListReplicasResponse{Replicas: []*portolanv1.Replica{
		{Name: replica, Node: "n1", Cluster: "a-lie"},
		{Name: "tenants/bank/workloads/vault/replicas/vault-abcde", Node: "n1"},
	}}, nil
}

func (fakeRuntime) ListEvents(_ context.Context, req *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	return &portolanv1.ListEventsResponse{Events: []*portolanv1.Event{{Object: replica, Type: "Bound", Node: "n1"}, {Object: "clusters/eu-west/nodes/n1", Type: "NodeLost"}}}, nil
}

func (fakeRuntime) Logs(_ *portolanv1.LogsRequest, s grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	return s.Send(&portolanv1.LogsResponse{Data: []byte("hello")})
}

func (fakeRuntime) Exec(s grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_ExitCode{ExitCode: 7}})
		}
		if err != nil {
			return err
		}
		if in := m.GetStdin(); in != nil {
			if err := s.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_Stdout{Stdout: in}}); err != nil {
				return err
			}
		}
	}
}

func (fakeRuntime) CreateNodeJoinToken(context.Context, *linkv1.CreateNodeJoinTokenRequest) (*linkv1.CreateNodeJoinTokenResponse, error) {
	return &linkv1.CreateNodeJoinTokenResponse{Token: "ptj1_node"}, nil
}

func (fakeRuntime) DeleteNode(_ context.Context, req *linkv1.DeleteNodeRequest) (*linkv1.DeleteNodeResponse, error) {
	if !req.GetForce() {
		return nil, api.E(api.Precondition, "delete node "+req.GetNode(), "it is not lost")
	}
	return &linkv1.DeleteNodeResponse{}, nil
}

func (fakeRuntime) ListLaggards(context.Context, *linkv1.ListLaggardsRequest) (*linkv1.ListLaggardsResponse, error) {
	return &linkv1.ListLaggardsResponse{Laggards: []*portolanv1.Laggard{{Name: "clusters/eu-west/nodes/n1"}, {Name: "clusters/us-east/nodes/n1"}}}, nil
}

func TestRuntime(t *testing.T) {
	clusters := fakeClusters{}
	e := newEnv(t, func(c *Config) { c.Clusters = clusters })
	clusters["eu-west"] = serve(t, func(g *grpc.Server) {
		portolanv1.RegisterRuntimeServiceServer(g, fakeRuntime{})
		linkv1.RegisterClusterAdminServiceServer(g, fakeRuntime{})
	})
	e.tenant("shop")
	e.tenant("bank")
	e.create("shop", workload("shop", "web"))
	e.cluster("eu-west", portolanv1.ClusterState_CLUSTER_STATE_READY)
	for _, cl := range []string{"eu-west", "us-east"} {
		p := "tenants/shop/workloads/web/placements/" + cl
		e.put(store.Placement, p, &portolanv1.Placement{Name: p})
	}
	c := portolanv1.NewRuntimeServiceClient(e.conn)
	list := must[*portolanv1.ListReplicasResponse](t)(c.ListReplicas(e.as("shop"), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-"}))
	if names(list.GetReplicas()) != replica || list.GetReplicas()[0].GetNode() != "" || list.GetReplicas()[0].GetCluster() != "eu-west" || strings.Join(list.GetSilentClusters(), "") != "us-east" {
		t.Fatal(list)
	}
	list = must[*portolanv1.ListReplicasResponse](t)(c.ListReplicas(e.root(), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/web"}))
	if list.GetReplicas()[0].GetNode() != "n1" {
		t.Fatal(list)
	}
	_, err := c.ListReplicas(e.as("bank"), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/web"})
	wantCode(t, err, codes.NotFound)
	ev := must[*portolanv1.ListEventsResponse](t)(c.ListEvents(e.as("shop"), &portolanv1.ListEventsRequest{Parent: "tenants/shop"}))
	if len(ev.GetEvents()) != 1 || ev.GetEvents()[0].GetType() != "Bound" || ev.GetEvents()[0].GetNode() != "" {
		t.Fatal(ev)
	}
	ev = must[*portolanv1.ListEventsResponse](t)(c.ListEvents(e.root(), &portolanv1.ListEventsRequest{Parent: "tenants/shop"}))
	if len(ev.GetEvents()) != 1 || ev.GetEvents()[0].GetNode() != "n1" {
		t.Fatal(ev)
	}
	_, err = c.ListEvents(e.as("shop"), &portolanv1.ListEventsRequest{})
	wantCode(t, err, codes.PermissionDenied)

	logs := must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.as("shop"), &portolanv1.LogsRequest{Replica: replica}))
	if m := must[*portolanv1.LogsResponse](t)(logs.Recv()); string(m.GetData()) != "hello" {
		t.Fatal(m)
	}
	logs = must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.as("bank"), &portolanv1.LogsRequest{Replica: replica}))
	_, err = logs.Recv()
	wantCode(t, err, codes.NotFound)

	execs(t, e, c)
	tok := must[*portolanv1.CreateNodeJoinTokenResponse](t)(portolanv1.NewClusterServiceClient(e.conn).CreateNodeJoinToken(e.root(), &portolanv1.CreateNodeJoinTokenRequest{Cluster: "clusters/eu-west", Node: "n9"}))
	if tok.GetToken() == "" {
		t.Fatal(tok)
	}
	admin := portolanv1.NewClusterServiceClient(e.conn)
	for _, bad := range []struct {
		user, name string
		force      bool
		code       codes.Code
	}{
		{"root", "clusters/eu-west/nodes/n1", false, codes.FailedPrecondition},
		{"root", "clusters/eu-west", true, codes.InvalidArgument},
		{"root", "clusters/nowhere/nodes/n1", true, codes.NotFound},
		{"shop", "clusters/eu-west/nodes/n1", true, codes.PermissionDenied},
		{"root", "clusters/eu-west/nodes/n1", true, codes.OK},
	} {
		_, err := admin.DeleteNode(e.as(bad.user), &portolanv1.DeleteNodeRequest{Name: bad.name, Force: bad.force})
		wantCode(t, err, bad.code)
	}
	var said, details []string
	for _, entry := range e.audit() {
		if m := entry.GetMethod(); strings.Contains(m, "Runtime") || strings.Contains(m, "NodeJoin") || strings.Contains(m, "DeleteNode") {
			said = append(said, lastID(entry.GetMethod())+":"+entry.GetDecision().String()[len("AUDIT_DECISION_"):])
			details = append(details, entry.GetDetail())
		}
	}
	if strings.Join(said, " ") != "Logs:ALLOWED Logs:REFUSED Exec:ALLOWED CreateNodeJoinToken:ALLOWED DeleteNode:ALLOWED DeleteNode:REFUSED DeleteNode:REFUSED DeleteNode:REFUSED DeleteNode:ALLOWED" {
		t.Fatal(said)
	}
	if strings.Join(details, ",") != `,,["sh"],,,,,,force` {
		t.Errorf("details %q", details)
	}
	e.progress("control/place", e.revision())
	s := must[grpc.ServerStreamingClient[portolanv1.WaitConvergedResponse]](t)(portolanv1.NewConvergenceServiceClient(e.conn).WaitConverged(e.root(), &portolanv1.WaitConvergedRequest{Timeout: durationpb.New(100 * time.Millisecond)}))
	if m := must[*portolanv1.WaitConvergedResponse](t)(s.Recv()); names(m.GetLaggards()) != "clusters/eu-west clusters/eu-west/nodes/n1" {
		t.Fatal(m)
	}
}

// execs runs a command in a replica, and gets what it says and how it ends.
func execs(t *testing.T, e *env, c portolanv1.RuntimeServiceClient) {
	t.Helper()
	ex := must[grpc.BidiStreamingClient[portolanv1.ExecRequest, portolanv1.ExecResponse]](t)(c.Exec(e.as("shop")))
	for _, m := range []*portolanv1.ExecRequest{
		{Message: &portolanv1.ExecRequest_Start_{Start: &portolanv1.ExecRequest_Start{Replica: replica, Command: []string{"sh"}}}},
		{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("in")}},
	} {
		if err := ex.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if m := must[*portolanv1.ExecResponse](t)(ex.Recv()); string(m.GetStdout()) != "in" {
		t.Fatal(m)
	}
	if err := ex.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if m := must[*portolanv1.ExecResponse](t)(ex.Recv()); m.GetExitCode() != 7 {
		t.Fatal(m)
	}
	if _, err := ex.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

// scripted is a cluster's runtime that says what it is told to say.
type scripted struct {
	portolanv1.UnimplementedRuntimeServiceServer
	linkv1.UnimplementedClusterAdminServiceServer
	replicas []*portolanv1.Replica
	events   []*portolanv1.Event
	asked    atomic.Int32
}

func (x *scripted) ListReplicas(context.Context, *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	x.asked.Add(1)
	return &portolanv1.ListReplicasResponse{Replicas: x.replicas}, nil
}

func (x *scripted) ListEvents(context.Context, *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	x.asked.Add(1)
	return &portolanv1.ListEventsResponse{Events: x.events}, nil
}

func (*scripted) Logs(_ *portolanv1.LogsRequest, s grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	return s.Send(&portolanv1.LogsResponse{Data: []byte("hello")})
}

func (e *env) runtime(clusters fakeClusters, id string, x *scripted) {
	e.t.Helper()
	clusters[id] = serve(e.t, func(g *grpc.Server) { portolanv1.RegisterRuntimeServiceServer(g, x) })
	e.cluster(id, portolanv1.ClusterState_CLUSTER_STATE_READY)
}

// TestClustersAreBelievedAboutWhatIsPlacedThere: a cluster that lies reaches
// nobody's replica or events but those of workloads that it was given.
func TestClustersAreBelievedAboutWhatIsPlacedThere(t *testing.T) {
	clusters := fakeClusters{}
	e := newEnv(t, func(c *Config) { c.Clusters = clusters })
	e.tenant("shop")
	other := "tenants/shop/workloads/api/replicas/api-abcde"
	claims := func() *scripted {
		return &scripted{
			replicas: []*portolanv1.Replica{{Name: other}, {Name: replica}},
			events: []*portolanv1.Event{
				{Object: replica, Type: "Bound"},
				{Object: other, Type: "Bound"},
				{Object: "clusters/eu/nodes/n1", Type: "NodeLost"},
				{Object: "tenants/bank/workloads/vault", Type: "Halted"},
			},
		}
	}
	eu, us, ap := claims(), claims(), claims()
	e.runtime(clusters, "eu", eu)
	e.runtime(clusters, "us", us)
	e.runtime(clusters, "ap", ap) // nothing is placed there
	for p, kind := range map[string]store.Kind{
		"tenants/shop/workloads/web/placements/eu": store.Placement,
		"tenants/shop/workloads/api/placements/us": store.PlacementStatus, // it has not confirmed the stop
	} {
		m := proto.Message(&portolanv1.Placement{Name: p})
		if kind == store.PlacementStatus {
			m = &storev1.PlacementStatusRecord{}
		}
		e.put(kind, p, m)
	}
	c := portolanv1.NewRuntimeServiceClient(e.conn)
	said := func(list []*portolanv1.Replica) string {
		var out []string
		for _, r := range list {
			out = append(out, lastID(r.GetName())+"@"+r.GetCluster())
		}
		return strings.Join(out, " ")
	}
	for range 5 { // in the same order every time
		list := must[*portolanv1.ListReplicasResponse](t)(c.ListReplicas(e.as("shop"), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-"}))
		if got := said(list.GetReplicas()); got != "api-abcde@us web-abcde@eu" {
			t.Fatal(got)
		}
	}
	list := must[*portolanv1.ListReplicasResponse](t)(c.ListReplicas(e.as("shop"), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/web", Cluster: "us"}))
	if len(list.GetReplicas())+len(list.GetSilentClusters()) != 0 {
		t.Fatal(list)
	}
	seen := func(user, parent string) string {
		var out []string
		for _, ev := range must[*portolanv1.ListEventsResponse](t)(c.ListEvents(e.as(user), &portolanv1.ListEventsRequest{Parent: parent})).GetEvents() {
			out = append(out, lastID(ev.GetObject())+"@"+ev.GetCluster())
		}
		return strings.Join(out, " ")
	}
	if got := seen("shop", "tenants/shop"); got != "web-abcde@eu api-abcde@us" {
		t.Error(got)
	}
	if ap.asked.Load() != 0 {
		t.Error("a cluster was asked that has nothing of the tenant")
	}
	if got := seen("root", ""); got != "web-abcde@eu n1@eu api-abcde@us" {
		t.Error(got)
	}

	// Both may have replicas of it now, and both say they have this one.
	e.put(store.Placement, "tenants/shop/workloads/web/placements/us", &portolanv1.Placement{Name: "tenants/shop/workloads/web/placements/us"})
	logs := must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.as("shop"), &portolanv1.LogsRequest{Replica: replica}))
	_, err := logs.Recv()
	wantCode(t, err, codes.FailedPrecondition)
	us.replicas = nil
	logs = must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.as("shop"), &portolanv1.LogsRequest{Replica: replica}))
	if m := must[*portolanv1.LogsResponse](t)(logs.Recv()); string(m.GetData()) != "hello" {
		t.Fatal(m)
	}
}

// paged is a large cluster: it answers in pages, and knows single replicas.
type paged struct {
	scripted
	fails error
	most  int32
}

func (x *paged) ListReplicas(_ context.Context, req *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	x.asked.Add(1)
	out := &portolanv1.ListReplicasResponse{}
	for _, r := range x.replicas {
		switch {
		case r.GetName() <= req.GetPageToken() || !under(r.GetName(), req.GetParent()):
		case len(out.GetReplicas()) == int(req.GetPageSize()):
			out.NextPageToken = out.GetReplicas()[len(out.GetReplicas())-1].GetName()
			return out, x.fails
		default:
			out.Replicas = append(out.Replicas, r)
		}
	}
	x.most = max(x.most, int32(len(out.GetReplicas())))
	return out, x.fails
}

func TestLargeAndFaultyClustersAreNotSilent(t *testing.T) {
	clusters := fakeClusters{}
	e := newEnv(t, func(c *Config) { c.Clusters = clusters })
	e.tenant("shop")
	x := &paged{}
	const many = 2*replicaPage + 17
	for i := range many {
		x.replicas = append(x.replicas, &portolanv1.Replica{Name: fmt.Sprintf("tenants/shop/workloads/web/replicas/web-%05d", i)})
	}
	clusters["eu"] = serve(t, func(g *grpc.Server) { portolanv1.RegisterRuntimeServiceServer(g, x) })
	for _, c := range []string{"eu", "us"} { // us has no tunnel
		p := "tenants/shop/workloads/web/placements/" + c
		e.put(store.Placement, p, &portolanv1.Placement{Name: p})
	}
	c := portolanv1.NewRuntimeServiceClient(e.conn)
	list := func() (*portolanv1.ListReplicasResponse, error) {
		return c.ListReplicas(e.as("shop"), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-"})
	}
	got := must[*portolanv1.ListReplicasResponse](t)(list())
	if len(got.GetReplicas()) != many || x.asked.Load() != 3 || x.most > replicaPage || strings.Join(got.GetSilentClusters(), " ") != "us" {
		t.Errorf("%d replicas in %d pages, silent %v", len(got.GetReplicas()), x.asked.Load(), got.GetSilentClusters())
	}
	x.most = 0
	logs := must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.as("shop"), &portolanv1.LogsRequest{Replica: x.replicas[many-1].GetName()}))
	if m := must[*portolanv1.LogsResponse](t)(logs.Recv()); string(m.GetData()) != "hello" || x.asked.Load() != 4 || x.most != 1 {
		t.Errorf("a replica is found by its name: %v after %d questions, the greatest answer has %d", m, x.asked.Load(), x.most)
	}
	for code, want := range map[codes.Code]codes.Code{
		codes.Unavailable: codes.OK, codes.DeadlineExceeded: codes.OK,
		codes.ResourceExhausted: codes.ResourceExhausted, codes.Internal: codes.Internal, codes.InvalidArgument: codes.InvalidArgument,
	} {
		x.fails = status.Error(code, "no")
		got, err := list()
		wantCode(t, err, want)
		if silent := strings.Join(got.GetSilentClusters(), " "); want == codes.OK && silent != "eu us" {
			t.Errorf("%s: silent %q", code, silent)
		}
	}
}

// endless answers for as long as it is asked.
type endless struct {
	scripted
	fed chan string
}

func (x *endless) Logs(_ *portolanv1.LogsRequest, s grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	for {
		if err := s.Send(&portolanv1.LogsResponse{Data: []byte("on and on")}); err != nil {
			return err
		}
		select {
		case <-time.After(time.Second):
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

func (x *endless) Exec(s grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		if in := m.GetStdin(); in != nil {
			x.fed <- string(in)
		}
	}
}

// TestStreamsEndWithTheirCallersRole: whoever lost a role reads no more and types
// no more, at the latest ten seconds later. A role that was added disturbs nothing
// but a watch, which would not show what it opens.
func TestStreamsEndWithTheirCallersRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clusters := fakeClusters{}
		e := newEnv(t, func(c *Config) { c.Clusters = clusters })
		e.tenant("shop")
		e.tenant("bank")
		x := &endless{scripted: scripted{replicas: []*portolanv1.Replica{{Name: replica}}}, fed: make(chan string, 8)}
		clusters["eu"] = serve(t, func(g *grpc.Server) { portolanv1.RegisterRuntimeServiceServer(g, x) })
		e.cluster("eu", portolanv1.ClusterState_CLUSTER_STATE_READY)
		p := "tenants/shop/workloads/web/placements/eu"
		e.put(store.Placement, p, &portolanv1.Placement{Name: p})
		c := portolanv1.NewRuntimeServiceClient(e.conn)
		logs := must[grpc.ServerStreamingClient[portolanv1.LogsResponse]](t)(c.Logs(e.forever("shop"), &portolanv1.LogsRequest{Replica: replica}))
		ex := must[grpc.BidiStreamingClient[portolanv1.ExecRequest, portolanv1.ExecResponse]](t)(c.Exec(e.forever("shop")))
		for _, m := range []*portolanv1.ExecRequest{
			{Message: &portolanv1.ExecRequest_Start_{Start: &portolanv1.ExecRequest_Start{Replica: replica, Command: []string{"sh"}}}},
			{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("ls")}},
		} {
			if err := ex.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		watch := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(portolanv1.NewWatchServiceClient(e.conn).Watch(e.forever("shop"), &portolanv1.WatchRequest{Kinds: []string{"Workload"}}))
		// end reads a stream until it ends, and says when and how.
		type over struct {
			after time.Duration
			code  codes.Code
		}
		began := time.Now()
		end := func(recv func() error) chan over {
			ch := make(chan over, 1)
			go func() {
				for {
					if err := recv(); err != nil {
						ch <- over{time.Since(began), status.Code(err)}
						return
					}
				}
			}()
			return ch
		}
		ends := []chan over{
			end(func() error { _, err := logs.Recv(); return err }),
			end(func() error { _, err := ex.Recv(); return err }),
		}
		watched := end(func() error { _, err := watch.Recv(); return err })
		time.Sleep(25 * time.Second)
		synctest.Wait()
		if got := <-x.fed; got != "ls" || len(ends[0])+len(ends[1])+len(watched) != 0 {
			t.Fatal("a stream ended although nothing changed")
		}
		tenants := portolanv1.NewTenantServiceClient(e.conn)
		must[*portolanv1.RoleBinding](t)(tenants.CreateRoleBinding(e.root(), &portolanv1.CreateRoleBindingRequest{RoleBinding: &portolanv1.RoleBinding{
			Name: "roleBindings/more", Spec: &portolanv1.RoleBindingSpec{Subject: "spiffe://" + testFleet + "/user/shop", Role: portolanv1.Role_ROLE_TENANT_ADMIN, Tenant: "bank"},
		}}))
		if got := <-watched; got.code != codes.PermissionDenied || got.after > 36*time.Second {
			t.Error("the watch:", got)
		}
		time.Sleep(10 * time.Second)
		if len(ends[0])+len(ends[1]) != 0 {
			t.Fatal("a stream ended because of a role more")
		}
		began = time.Now()
		if _, err := tenants.DeleteRoleBinding(e.root(), &portolanv1.DeleteRoleBindingRequest{Name: "roleBindings/shop"}); err != nil {
			t.Fatal(err)
		}
		for _, ch := range ends {
			if got := <-ch; got.code != codes.PermissionDenied || got.after > recheckEvery+time.Second {
				t.Error(got)
			}
		}
		_ = ex.Send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("rm")}})
		time.Sleep(time.Second)
		if len(x.fed) != 0 {
			t.Error("what was typed afterwards arrived")
		}
	})
}

func TestJoinTokens(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop")
	e.cluster("eu-west", portolanv1.ClusterState_CLUSTER_STATE_PENDING)
	c := portolanv1.NewClusterServiceClient(e.conn)
	tok := must[*portolanv1.CreateClusterJoinTokenResponse](t)(c.CreateClusterJoinToken(e.root(), &portolanv1.CreateClusterJoinTokenRequest{Name: "clusters/eu-west"}))
	if tok.GetToken() == "" || time.Until(tok.GetExpireTime().AsTime()) > 10*time.Minute {
		t.Fatal(tok)
	}
	if strings.Contains(e.state(), tok.GetToken()) {
		t.Fatal("the secret is stored")
	}
	e.put(store.TrustBundle, "eu-west."+testFleet, &linkv1.TrustBundle{TrustDomain: "eu-west." + testFleet, Cluster: "eu-west"})
	if _, err := c.DeleteCluster(e.root(), &portolanv1.DeleteClusterRequest{Name: "clusters/eu-west"}); err != nil {
		t.Fatal(err)
	}
	if s := e.state(); strings.Contains(s, string(store.JoinToken)) || strings.Contains(s, string(store.TrustBundle)) {
		t.Fatalf("a deleted cluster may still come in:\n%s", s)
	}
	e.cluster("eu-west", portolanv1.ClusterState_CLUSTER_STATE_PENDING)
	_, err := c.CreateClusterJoinToken(e.root(), &portolanv1.CreateClusterJoinTokenRequest{Name: "clusters/nowhere"})
	wantCode(t, err, codes.NotFound)
	_, err = c.CreateClusterJoinToken(e.as("shop"), &portolanv1.CreateClusterJoinTokenRequest{Name: "clusters/eu-west"})
	wantCode(t, err, codes.PermissionDenied)
}

func TestInternalsStayInside(t *testing.T) {
	e := newEnv(t)
	for _, err := range []error{errors.New("password=secret"), &secretError{}} {
		got := e.server.answer("/portolan.v1.TenantService/GetTenant", err, nil)
		if status.Code(got) != codes.Internal || strings.Contains(got.Error(), "secret") {
			t.Errorf("%v", got)
		}
	}
	if got := e.server.answer("/portolan.v1.TenantService/GetTenant", nil, "secret"); status.Code(got) != codes.Internal || strings.Contains(got.Error(), "secret") {
		t.Errorf("%v", got)
	}
}

type secretError struct{}

func (*secretError) Error() string { return "secret" }

func TestCallersAreLimited(t *testing.T) {
	l := newLimiter()
	var release []func()
	for range maxStreamsPerCaller {
		r, err := l.take("a", true)
		if err != nil {
			t.Fatal(err)
		}
		release = append(release, r)
	}
	if _, err := l.take("a", true); err == nil {
		t.Fatal("no limit")
	}
	if _, err := l.take("b", true); err != nil {
		t.Fatal(err)
	}
	release[0]()
	if _, err := l.take("a", true); err != nil {
		t.Fatal(err)
	}
	for i := range maxCallers + 100 {
		r, err := l.take("x"+strconv.Itoa(i), false)
		if err != nil {
			t.Fatal(err)
		}
		r()
	}
	if len(l.callers) > maxCallers {
		t.Fatalf("%d callers are remembered", len(l.callers))
	}
}

// Who has no role is bounded as everybody is, before anything is read for them.
func TestWhoHasNoRoleIsLimitedToo(t *testing.T) {
	e := newEnv(t)
	stranger := "spiffe://" + testFleet + "/user/stranger"
	for range maxUnaryPerCaller {
		if _, err := e.server.limits.take(stranger, false); err != nil {
			t.Fatal(err)
		}
	}
	for range maxStreamsPerCaller {
		if _, err := e.server.limits.take(stranger, true); err != nil {
			t.Fatal(err)
		}
	}
	_, err := e.workloads().ListWorkloads(e.as("stranger"), &portolanv1.ListWorkloadsRequest{})
	wantCode(t, err, codes.ResourceExhausted)
	w := must[grpc.ServerStreamingClient[portolanv1.WatchResponse]](t)(portolanv1.NewWatchServiceClient(e.conn).Watch(e.as("stranger"), &portolanv1.WatchRequest{}))
	_, err = w.Recv()
	wantCode(t, err, codes.ResourceExhausted)
}

// TestBarrierInVirtualTime: progress is told at least each second, and the end
// comes when it was asked for. It also shows that the server works in a bubble.
func TestBarrierInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.cluster("eu-west", portolanv1.ClusterState_CLUSTER_STATE_READY)
		begin := time.Now()
		s := must[grpc.ServerStreamingClient[portolanv1.WaitConvergedResponse]](t)(portolanv1.NewConvergenceServiceClient(e.conn).WaitConverged(e.root(), &portolanv1.WaitConvergedRequest{Timeout: durationpb.New(20 * time.Second)}))
		last, n := begin, 0
		for {
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			n++
			if gap := time.Since(last); gap > convergeReport+2*convergePoll {
				t.Fatalf("silent for %v", gap)
			}
			last = time.Now()
			if m.GetFinal() {
				break
			}
		}
		if took := time.Since(begin); took != 20*time.Second || n < 19 {
			t.Fatalf("%d messages in %v", n, took)
		}
	})
}

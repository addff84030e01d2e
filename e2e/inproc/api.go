package inproc

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/trust"
)

// callTimeout bounds one call of the API.
const callTimeout = 10 * time.Second

// connect dials the API as the admin, over whichever replica answers.
func (f *Fleet) connect() {
	f.t.Helper()
	pair, err := f.authority.Issue(f.ctx, ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: fleetDomain, Name: adminName}, TTL: 24 * time.Hour})
	f.must("issue the admin's certificate", err)
	set := trust.NewSet()
	f.must("trust the fleet", set.Put(fleetDomain, f.authority.Bundle()))
	tls := trust.ClientTLS(trust.Static(pair.TLS()), set, federationName, identity.ID{Kind: identity.Control, TrustDomain: fleetDomain}, trust.Options{})
	f.conn, err = grpc.NewClient("passthrough:///federation", grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var err error
			for _, a := range f.federation {
				var c net.Conn
				if c, err = f.wires.Dial(ctx, "admin", a, a); err == nil {
					return c, nil
				}
			}
			return nil, err
		}))
	f.must("dial the federation", err)
}

// call is the context of one call.
func (f *Fleet) call() context.Context {
	ctx, cancel := context.WithTimeout(f.ctx, callTimeout)
	context.AfterFunc(ctx, cancel)
	return ctx
}

func message(name string) (protoreflect.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("portolan.v1." + name))
	if err != nil {
		return nil, err
	}
	return t.New(), nil
}

// TryApply sends the objects of a manifest, as `portolan apply` does.
func (f *Fleet) TryApply(yaml string) error {
	objs, err := manifest.Parse("test.yaml", []byte(yaml))
	if err != nil {
		return err
	}
	manifest.Sort(objs)
	for _, o := range objs {
		req, err := message("Update" + o.Kind.Name + "Request")
		if err != nil {
			return err
		}
		fields := req.Descriptor().Fields()
		for i := range fields.Len() {
			if d := fields.Get(i); d.Kind() == protoreflect.MessageKind && string(d.Message().Name()) == o.Kind.Name {
				req.Set(d, protoreflect.ValueOfMessage(o.Message.ProtoReflect()))
			}
		}
		req.Set(fields.ByName("allow_missing"), protoreflect.ValueOfBool(true))
		req.Set(fields.ByName("request_id"), protoreflect.ValueOfString(uuid.NewString()))
		out := o.Kind.New()
		if err := f.conn.Invoke(f.call(), "/portolan.v1."+o.Kind.Service+"/Update"+o.Kind.Name, req.Interface(), out); err != nil {
			return fmt.Errorf("%s: %w", o.Where, err)
		}
		if s, ok := out.(*portolanv1.Service); ok {
			vip, err := netip.ParseAddr(s.GetStatus().GetVirtualIp())
			if err != nil {
				return fmt.Errorf("%s has no virtual IP: %w", s.GetName(), err)
			}
			f.mu.Lock()
			f.vips[s.GetName()] = vip
			f.mu.Unlock()
		}
	}
	return nil
}

// Put creates or changes a workload.
func (f *Fleet) Put(w *portolanv1.Workload) {
	f.t.Helper()
	_, err := portolanv1.NewWorkloadServiceClient(f.conn).UpdateWorkload(f.call(), &portolanv1.UpdateWorkloadRequest{Workload: w, AllowMissing: true, RequestId: uuid.NewString()})
	f.must("put "+w.GetName(), err)
}

// Apply applies, and fails the test when something is refused.
func (f *Fleet) Apply(yaml string) {
	f.t.Helper()
	f.must("apply", f.TryApply(yaml))
}

// Get reads an object: Get(&portolanv1.Route{}, "tenants/shop/routes/catalog").
func Get[M proto.Message](f *Fleet, out M, name string) M {
	f.t.Helper()
	kind, err := manifest.FindKind(string(out.ProtoReflect().Descriptor().Name()))
	f.must("get", err)
	req, err := message("Get" + kind.Name + "Request")
	f.must("get", err)
	req.Set(req.Descriptor().Fields().ByName("name"), protoreflect.ValueOfString(name))
	f.must("get "+name, f.conn.Invoke(f.call(), "/portolan.v1."+kind.Service+"/Get"+kind.Name, req.Interface(), out))
	return out
}

// Delete deletes an object: Delete("Workload", "tenants/shop/workloads/web").
func (f *Fleet) Delete(kind, name string) {
	f.t.Helper()
	k, err := manifest.FindKind(kind)
	f.must("delete", err)
	req, err := message("Delete" + k.Name + "Request")
	f.must("delete", err)
	req.Set(req.Descriptor().Fields().ByName("name"), protoreflect.ValueOfString(name))
	f.must("delete "+name, f.conn.Invoke(f.call(), "/portolan.v1."+k.Service+"/Delete"+k.Name, req.Interface(), &emptypb.Empty{}))
}

// Replicas lists the replicas of a workload of tenant shop, as the API tells of
// them through the tunnels.
func (f *Fleet) Replicas(workload string) []*portolanv1.Replica {
	f.t.Helper()
	res, err := portolanv1.NewRuntimeServiceClient(f.conn).ListReplicas(f.call(), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/" + workload})
	f.must("list replicas of "+workload, err)
	slices.SortFunc(res.GetReplicas(), func(a, b *portolanv1.Replica) int {
		return cmp.Or(strings.Compare(a.GetCluster(), b.GetCluster()), strings.Compare(a.GetName(), b.GetName()))
	})
	return res.GetReplicas()
}

// Converged waits at most that long until everything that lives has applied all
// that was committed, and else says who has not.
func (f *Fleet) Converged(most time.Duration) (bool, []*portolanv1.Laggard) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, most+callTimeout)
	defer cancel()
	s, err := portolanv1.NewConvergenceServiceClient(f.conn).WaitConverged(ctx, &portolanv1.WaitConvergedRequest{Timeout: durationpb.New(most)})
	f.must("wait for convergence", err)
	for {
		res, err := s.Recv()
		f.must("wait for convergence", err)
		if res.GetFinal() {
			return res.GetConverged(), res.GetLaggards()
		}
	}
}

// WaitConverged waits, and fails the test when somebody lags. It returns how long
// it took.
func (f *Fleet) WaitConverged() time.Duration {
	f.t.Helper()
	began := time.Now()
	if ok, laggards := f.Converged(20 * time.Second); !ok {
		f.t.Fatalf("not converged: %v", laggards)
	}
	return time.Since(began)
}

// Write puts a record into the federation's store past its server: what another
// version may have left there.
func (f *Fleet) Write(kind store.Kind, name string, m proto.Message) {
	f.t.Helper()
	_, err := f.store.Update(f.ctx, func(tx store.Tx) error { return tx.Put(kind, name, m) })
	f.must("write "+name, err)
}

// Events gives the messages of the events of a type on a workload of tenant shop or
// its replicas, oldest first.
func (f *Fleet) Events(workload, typ string) []string {
	f.t.Helper()
	res, err := portolanv1.NewRuntimeServiceClient(f.conn).ListEvents(f.call(), &portolanv1.ListEventsRequest{Parent: "tenants/shop/workloads/" + workload, Limit: 5000})
	f.must("list events of "+workload, err)
	var out []string
	for _, e := range res.GetEvents() {
		if e.GetType() == typ {
			out = append(out, e.GetMessage())
		}
	}
	return out
}

// SetMode cordons, drains or frees a node.
func (f *Fleet) SetMode(node string, mode portolanv1.NodeMode) {
	f.t.Helper()
	_, err := portolanv1.NewClusterServiceClient(f.conn).SetNodeMode(f.call(), &portolanv1.SetNodeModeRequest{
		Name: "clusters/" + f.node(node).cluster.name + "/nodes/" + node, Mode: mode,
	})
	f.must("set the mode of "+node, err)
}

// Node asks what an operator sees of a node.
func (f *Fleet) Node(node string) *portolanv1.NodeInfo {
	f.t.Helper()
	cluster := "clusters/" + f.node(node).cluster.name
	res, err := portolanv1.NewClusterServiceClient(f.conn).ListNodes(f.call(), &portolanv1.ListNodesRequest{Cluster: cluster})
	f.must("list nodes", err)
	for _, n := range res.GetNodes() {
		if n.GetName() == cluster+"/nodes/"+node {
			return n
		}
	}
	f.t.Fatalf("node %s is not listed", node)
	return nil
}

// Condition gives a condition of a workload of tenant shop; nil when it has none of
// the type.
func (f *Fleet) Condition(workload, typ string) *portolanv1.Condition {
	f.t.Helper()
	for _, c := range Get(f, &portolanv1.Workload{}, "tenants/shop/workloads/"+workload).GetStatus().GetConditions() {
		if c.GetType() == typ {
			return c
		}
	}
	return nil
}

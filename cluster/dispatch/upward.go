package dispatch

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
)

// defaultEvents and maxListed bound a list of events.
const (
	defaultEvents = 200
	maxListed     = 5000
)

// runtimeServer answers for the cluster, and forwards to nodes what only they
// know.
type runtimeServer struct {
	portolanv1.UnimplementedRuntimeServiceServer
	d *Dispatch
}

// ListReplicas implements portolanv1.RuntimeServiceServer. A page token is the name
// after which the next page begins.
func (r *runtimeServer) ListReplicas(_ context.Context, req *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	const doing = "list replicas"
	match, err := parentFilter(req.GetParent())
	if err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	if req.GetPageSize() < 0 {
		return nil, api.E(api.Invalid, doing, "page_size: must not be negative")
	}
	s := r.d.cfg.State.Snapshot()
	names := map[string]*clusterv1.Allocation{}
	for _, a := range s.Allocations {
		if name := api.ReplicaName(a.GetTenant(), a.GetWorkload(), a.GetAllocation()); match(a) && name > req.GetPageToken() {
			names[name] = a
		}
	}
	out := &portolanv1.ListReplicasResponse{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if n := len(out.GetReplicas()); n > 0 && n == int(req.GetPageSize()) {
			out.NextPageToken = out.GetReplicas()[n-1].GetName()
			break
		}
		out.Replicas = append(out.Replicas, r.d.replica(s, names[name]))
	}
	return out, nil
}

// parentFilter reads tenants/{t}/workloads/{w}, where {w} and the whole may be
// "-", or the name of one replica.
func parentFilter(parent string) (func(*clusterv1.Allocation) bool, error) {
	if parent == "" || parent == "-" {
		return func(*clusterv1.Allocation) bool { return true }, nil
	}
	if tenant, ok := strings.CutSuffix(parent, "/workloads/-"); ok {
		ids, err := api.ParseName(tenant, api.TenantPattern)
		if err != nil {
			return nil, err
		}
		return func(a *clusterv1.Allocation) bool { return a.GetTenant() == ids[0] }, nil
	}
	ids, err := api.ParseName(parent, api.WorkloadPattern, api.ReplicaPattern)
	if err != nil {
		return nil, err
	}
	return func(a *clusterv1.Allocation) bool {
		return a.GetTenant() == ids[0] && a.GetWorkload() == ids[1] && (len(ids) == 2 || a.GetAllocation() == ids[2])
	}, nil
}

// replica joins what is desired and what is observed.
func (d *Dispatch) replica(s *state.Snapshot, a *clusterv1.Allocation) *portolanv1.Replica {
	out := &portolanv1.Replica{
		Name: api.ReplicaName(a.GetTenant(), a.GetWorkload(), a.GetAllocation()), Cluster: d.cfg.Facts.Cluster, Node: a.GetNode(),
		Revision: a.GetRevision(), Address: a.GetAddress(), Epoch: a.GetEpoch(), SpiffeId: d.identityOf(a).String(),
		State: portolanv1.ReplicaState_REPLICA_STATE_PENDING, Timeline: &portolanv1.Timeline{},
	}
	o := a.GetFinal()
	if st := s.NodeStatus[a.GetNode()]; st != nil {
		if seen := st.Allocations[a.GetAllocation()]; seen != nil {
			o = seen
		}
		out.ProxyAppliedRevision = st.Proxies[a.GetAllocation()].GetApplied().GetRevision()
	}
	if o != nil {
		out.State, out.Ready, out.Reason, out.Containers = o.GetState(), o.GetReady(), o.GetReason(), o.GetContainers()
		if o.GetTimeline() != nil {
			out.Timeline = proto.CloneOf(o.GetTimeline())
		}
	}
	out.Timeline.AtCluster, out.Timeline.Bound = a.GetAtCluster(), a.GetBound()
	if n := s.Nodes[a.GetNode()]; n == nil || n.GetLostTime() != nil {
		out.State, out.Ready = portolanv1.ReplicaState_REPLICA_STATE_LOST, false
		out.Reason = &portolanv1.Reason{Code: "NodeLost", Message: "its node is silent"}
	} else if a.GetStop() && out.Reason == nil && a.GetStopReason() != "" {
		out.Reason = &portolanv1.Reason{Code: "Stopping", Message: a.GetStopReason()}
	}
	return out
}

// ListEvents implements portolanv1.RuntimeServiceServer.
func (r *runtimeServer) ListEvents(_ context.Context, req *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	limit := min(cmp.Or(int(req.GetLimit()), defaultEvents), maxListed)
	if limit < 0 {
		return nil, api.E(api.Invalid, "list events", "limit: must not be negative")
	}
	parent := strings.TrimSuffix(strings.TrimSuffix(req.GetParent(), "-"), "/")
	all := r.d.cfg.Manager.Events()
	out := slices.DeleteFunc(slices.Clone(all), func(e *portolanv1.Event) bool {
		return parent != "" && e.GetObject() != parent && !strings.HasPrefix(e.GetObject(), parent+"/")
	})
	return &portolanv1.ListEventsResponse{Events: out[max(0, len(out)-limit):]}, nil
}

// nodeOf finds the node of a replica, and the way to it.
func (r *runtimeServer) nodeOf(replica string) (portolanv1.RuntimeServiceClient, error) {
	a, err := replicaName(r.d.cfg.State.Snapshot(), replica)
	if err != nil {
		return nil, err
	}
	cc, ok := r.d.tunnels.Get(a.GetNode())
	if !ok {
		return nil, api.E(api.Unavailable, "reach replica "+replica, "its node has no tunnel open")
	}
	return portolanv1.NewRuntimeServiceClient(cc), nil
}

// Logs implements portolanv1.RuntimeServiceServer.
func (r *runtimeServer) Logs(req *portolanv1.LogsRequest, out grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	c, err := r.nodeOf(req.GetReplica())
	if err != nil {
		return err
	}
	in, err := c.Logs(out.Context(), req)
	if err != nil {
		return err
	}
	return tunnel.Relay(in.Recv, out.Send)
}

// Exec implements portolanv1.RuntimeServiceServer.
func (r *runtimeServer) Exec(s grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	c, err := r.nodeOf(first.GetStart().GetReplica())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	node, err := c.Exec(ctx)
	if err != nil {
		return err
	}
	if err := node.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	go func() {
		if err := tunnel.Relay(s.Recv, node.Send); err != nil {
			// The caller is gone, or the node is: its own answer says which.
			if s.Context().Err() != nil {
				cancel()
			}
			return
		}
		_ = node.CloseSend()
	}()
	return tunnel.Relay(node.Recv, s.Send)
}

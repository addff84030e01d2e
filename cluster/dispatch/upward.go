package dispatch

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
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

// adminServer is what an operator asks of a cluster.
type adminServer struct {
	linkv1.UnimplementedClusterAdminServiceServer
	d *Dispatch
}

// CreateNodeJoinToken implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) CreateNodeJoinToken(ctx context.Context, req *linkv1.CreateNodeJoinTokenRequest) (*linkv1.CreateNodeJoinTokenResponse, error) {
	if _, err := api.ParseID(req.GetNode()); err != nil {
		return nil, api.E(api.Invalid, "create a join token", "node: %w", err)
	}
	token, hash := a.d.cfg.CA.NewToken()
	t := &clusterv1.NodeToken{Node: req.GetNode(), ExpireTime: timestamppb.New(time.Now().Add(DefaultTokenTTL))}
	if err := a.d.cfg.State.PutToken(ctx, hash, t); err != nil {
		return nil, err
	}
	return &linkv1.CreateNodeJoinTokenResponse{Token: token, ExpireTime: t.GetExpireTime()}, nil
}

// ListNodes implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ListNodes(context.Context, *linkv1.ListNodesRequest) (*linkv1.ListNodesResponse, error) {
	s := a.d.cfg.State.Snapshot()
	used := map[string]api.Resources{}
	count := map[string]int32{}
	for _, al := range s.Allocations {
		if al.GetFinal() != nil {
			continue
		}
		count[al.GetNode()]++
		if r, err := api.RequestsOf(al.GetSpec()); err == nil {
			used[al.GetNode()] = used[al.GetNode()].Add(r)
		}
	}
	out := &linkv1.ListNodesResponse{}
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[id]
		info := &portolanv1.NodeInfo{
			Name: api.ClusterName(a.d.cfg.Facts.Cluster) + "/nodes/" + id, Labels: n.GetFacts().GetLabels(), Taints: n.GetFacts().GetTaints(),
			Address: n.GetFacts().GetAddress(), ReplicaCidr: n.GetReplicaCidr(), CpuMilli: n.GetFacts().GetCpuMilli(), MemoryBytes: n.GetFacts().GetMemoryBytes(),
			AllocatedCpuMilli: used[id].CPUMilli, AllocatedMemoryBytes: used[id].MemoryBytes, Replicas: count[id],
		}
		if st := s.NodeStatus[id]; st != nil {
			info.Ready = n.GetLostTime() == nil && st.Connected
			info.AppliedRevision = st.Applied.GetRevision()
			info.LastSeenTime = timestamppb.New(st.LastSeen)
		}
		out.Nodes = append(out.Nodes, info)
	}
	return out, nil
}

// DeleteNode implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) DeleteNode(ctx context.Context, req *linkv1.DeleteNodeRequest) (*linkv1.DeleteNodeResponse, error) {
	if _, err := api.ParseID(req.GetNode()); err != nil {
		return nil, api.E(api.Invalid, "delete a node", "node: %w", err)
	}
	if err := a.d.cfg.Manager.DeleteNode(ctx, req.GetNode(), req.GetForce()); err != nil {
		return nil, err
	}
	a.d.log.Info("node deleted", "node", req.GetNode(), "force", req.GetForce())
	return &linkv1.DeleteNodeResponse{}, nil
}

// ExplainPending implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ExplainPending(_ context.Context, req *linkv1.ExplainPendingRequest) (*linkv1.ExplainPendingResponse, error) {
	ids, err := api.ParseName(req.GetWorkload(), api.WorkloadPattern)
	if err != nil {
		return nil, api.E(api.Invalid, "explain pending replicas", "workload: %w", err)
	}
	byReplica := map[string]*portolanv1.NodeVerdict{}
	out := &linkv1.ExplainPendingResponse{}
	for _, p := range a.d.cfg.State.Snapshot().Pending[ids[0]+"/"+ids[1]] {
		v := byReplica[p.Replica]
		if v == nil {
			v = &portolanv1.NodeVerdict{Cluster: a.d.cfg.Facts.Cluster, Replica: p.Replica}
			byReplica[p.Replica] = v
			out.Verdicts = append(out.Verdicts, v)
		}
		v.Reasons = append(v.Reasons, &portolanv1.Reason{Code: p.Code, Message: p.Message, Count: int32(p.Count)})
	}
	return out, nil
}

// ListLaggards implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ListLaggards(_ context.Context, req *linkv1.ListLaggardsRequest) (*linkv1.ListLaggardsResponse, error) {
	s := a.d.cfg.State.Snapshot()
	return &linkv1.ListLaggardsResponse{Laggards: s.Laggards(a.d.cfg.Facts.Cluster, req.GetRevision()), AppliedRevision: s.Applied()}, nil
}

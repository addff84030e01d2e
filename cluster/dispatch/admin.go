package dispatch

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

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

// SetNode implements linkv1.ClusterAdminServiceServer. The answer lists the nodes
// that it concerned.
func (a *adminServer) SetNode(ctx context.Context, req *linkv1.SetNodeRequest) (*linkv1.ListNodesResponse, error) {
	var deadline time.Time
	if req.GetDeadline() != nil {
		if deadline = req.GetDeadline().AsTime(); deadline.Before(time.Unix(0, 0)) {
			return nil, api.E(api.Invalid, "set the mode of nodes", "deadline: is before 1970")
		}
	}
	if err := a.d.cfg.Manager.SetMode(ctx, req.GetNode(), req.GetPool(), req.GetMode(), deadline); err != nil {
		return nil, err
	}
	s := a.d.cfg.State.Snapshot()
	return a.d.nodeInfos(s, func(n *clusterv1.Node) bool {
		return n.GetNode() == req.GetNode() || req.GetNode() == "" && state.PoolOf(n) == req.GetPool()
	}), nil
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

// ListNodes implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ListNodes(context.Context, *linkv1.ListNodesRequest) (*linkv1.ListNodesResponse, error) {
	return a.d.nodeInfos(a.d.cfg.State.Snapshot(), func(*clusterv1.Node) bool { return true }), nil
}

// used is what the replicas of a node take.
type used struct {
	resources api.Resources
	storage   int64
	replicas  int32
	devices   map[string]int64
}

// usage sums up allocations and volumes by node, as the scheduler charges them: each
// replica with its overhead.
func usage(s *state.Snapshot, overhead api.Resources) map[string]*used {
	out := make(map[string]*used, len(s.Nodes))
	for id := range s.Nodes {
		out[id] = &used{devices: map[string]int64{}}
	}
	for _, al := range s.Allocations {
		u := out[al.GetNode()]
		if al.GetFinal() != nil || u == nil {
			continue
		}
		u.replicas++
		if r, err := schedule.Requests(al.GetSpec(), overhead); err == nil {
			u.resources = u.resources.Add(r)
		}
		u.storage += scratchOf(al.GetSpec())
		for _, d := range al.GetDevices() {
			if k := deviceOf(s.Nodes[al.GetNode()], d); k != "" {
				u.devices[k] += int64(d.GetMilli())
			}
		}
	}
	for _, v := range s.Volumes {
		if u := out[v.GetNode()]; u != nil {
			u.storage += v.GetSizeBytes()
		}
	}
	return out
}

// scratchOf is the disk that a replica asks for beside its volumes.
func scratchOf(spec *portolanv1.WorkloadSpec) int64 {
	sum := int64(0)
	for _, c := range spec.GetContainers() {
		n, err := api.ParseBytes(cmp.Or(c.GetRequests().GetStorage(), c.GetLimits().GetStorage()))
		if err == nil {
			sum += n
		}
	}
	return sum
}

// deviceOf is the key of the device that a share is of; "" when the node has none
// such.
func deviceOf(n *clusterv1.Node, share *nodev1.DeviceShare) string {
	for _, d := range n.GetFacts().GetDevices() {
		if d.GetKind() == share.GetKind() && d.GetIndex() == share.GetIndex() {
			return state.DeviceKey(d)
		}
	}
	return ""
}

func (d *Dispatch) nodeInfos(s *state.Snapshot, match func(*clusterv1.Node) bool) *linkv1.ListNodesResponse {
	by, pools := usage(s, *d.cfg.Overhead), s.Pools()
	out := &linkv1.ListNodesResponse{}
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		if n := s.Nodes[id]; match(n) {
			out.Nodes = append(out.Nodes, d.nodeInfo(s, n, by[id], pools[state.PoolOf(n)]))
		}
	}
	return out
}

// nodeInfo is what an operator sees of a node.
func (d *Dispatch) nodeInfo(s *state.Snapshot, n *clusterv1.Node, u *used, pool *portolanv1.NodePool) *portolanv1.NodeInfo {
	room := state.Allocatable(n, pool)
	info := &portolanv1.NodeInfo{
		Name: api.ClusterName(d.cfg.Facts.Cluster) + "/nodes/" + n.GetNode(), Labels: n.GetFacts().GetLabels(), Taints: n.GetFacts().GetTaints(),
		Address: n.GetFacts().GetAddress(), ReplicaCidr: n.GetReplicaCidr(), CpuMilli: n.GetFacts().GetCpuMilli(), MemoryBytes: n.GetFacts().GetMemoryBytes(),
		AllocatedCpuMilli: u.resources.CPUMilli, AllocatedMemoryBytes: u.resources.MemoryBytes, Replicas: u.replicas,
		Pool: state.PoolOf(n), Mode: n.GetMode(), AllocatableCpuMilli: room.CPUMilli, AllocatableMemoryBytes: room.MemoryBytes,
		StorageBytes: n.GetFacts().GetStorageBytes(), AllocatedStorageBytes: u.storage,
		DevicesMilli: state.DevicesOf(n.GetFacts()), AllocatedDevicesMilli: u.devices,
	}
	for _, b := range s.Notes.Blocked[n.GetNode()] {
		info.Blocked = append(info.Blocked, &portolanv1.Reason{Code: b.Code, Message: b.Message, Count: int32(b.Count)})
	}
	if st := s.NodeStatus[n.GetNode()]; st != nil {
		info.Ready = n.GetLostTime() == nil && st.Connected
		info.AppliedRevision = st.Applied.GetRevision()
		info.LastSeenTime = timestamppb.New(st.LastSeen)
	}
	return info
}

// ExplainPending implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ExplainPending(_ context.Context, req *linkv1.ExplainPendingRequest) (*linkv1.ExplainPendingResponse, error) {
	ids, err := api.ParseName(req.GetWorkload(), api.WorkloadPattern)
	if err != nil {
		return nil, api.E(api.Invalid, "explain pending replicas", "workload: %w", err)
	}
	s, key := a.d.cfg.State.Snapshot(), ids[0]+"/"+ids[1]
	byReplica := map[string]*portolanv1.NodeVerdict{}
	out := &linkv1.ExplainPendingResponse{Requests: s.Notes.Requests[key], Scaling: s.Notes.Scaling[key]}
	if w, ok := s.Notes.Waiting[key]; ok {
		out.Verdicts = append(out.Verdicts, &portolanv1.NodeVerdict{
			Cluster: a.d.cfg.Facts.Cluster, Reasons: []*portolanv1.Reason{{Code: w.Code, Message: w.Message}},
		})
	}
	for _, p := range s.Pending[key] {
		v := byReplica[p.Replica]
		if v == nil {
			v = &portolanv1.NodeVerdict{Cluster: a.d.cfg.Facts.Cluster, Replica: p.Replica}
			byReplica[p.Replica] = v
			out.Verdicts = append(out.Verdicts, v)
		}
		v.Reasons = append(v.Reasons, &portolanv1.Reason{Code: p.Code, Message: p.Message, Count: int32(p.Count)})
		if p.Nearest != "" {
			v.Nearest, v.NearestReason = p.Nearest, p.NearestReason
		}
		for _, r := range p.Remedies {
			v.Remedies = append(v.Remedies, &portolanv1.Reason{Code: r.Code, Message: r.Message})
		}
	}
	return out, nil
}

// ListLaggards implements linkv1.ClusterAdminServiceServer.
func (a *adminServer) ListLaggards(_ context.Context, req *linkv1.ListLaggardsRequest) (*linkv1.ListLaggardsResponse, error) {
	s := a.d.cfg.State.Snapshot()
	return &linkv1.ListLaggardsResponse{Laggards: s.Laggards(a.d.cfg.Facts.Cluster, req.GetRevision()), AppliedRevision: s.Applied()}, nil
}

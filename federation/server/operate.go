package server

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity/attest"
)

// CreateClusterJoinToken mints a token for a registered cluster. Only its hash is
// stored; the secret is in no log and no audit row.
func (x *clusterService) CreateClusterJoinToken(ctx context.Context, req *portolanv1.CreateClusterJoinTokenRequest) (*portolanv1.CreateClusterJoinTokenResponse, error) {
	s, doing := x.s, "create a join token of "+clip(req.GetName())
	k := s.kinds[store.Cluster]
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := k.checkName(doing, "name", req.GetName()); err != nil {
		return nil, err
	}
	if s.cfg.Tokens == nil {
		return nil, api.E(api.Unavailable, doing, "this server mints no tokens")
	}
	token, err := s.cfg.Tokens.MintJoinToken()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	expire := timestamppb.New(now.Add(s.cfg.JoinTokenLife))
	var entry int64
	_, err = s.cfg.Store.Update(ctx, func(tx store.Tx) error {
		o, err := k.get(tx, req.GetName())
		if err != nil {
			return err
		}
		if o == nil {
			return k.absent(doing)
		}
		if err := tx.Put(store.JoinToken, attest.Hash(token), &storev1.JoinToken{Cluster: lastID(req.GetName()), ExpireTime: expire}); err != nil {
			return err
		}
		entry, err = s.audit(tx, newEntry(c, now, req.GetName(), ""))
		return err
	})
	if err != nil {
		return nil, err
	}
	s.auditHint.Store(entry)
	return &portolanv1.CreateClusterJoinTokenResponse{Token: token, ExpireTime: expire}, nil
}

// admin gives the administration of a cluster over its tunnel.
func (s *Server) admin(ctx context.Context, doing, cluster string) (linkv1.ClusterAdminServiceClient, error) {
	k := s.kinds[store.Cluster]
	if err := k.checkName(doing, "cluster", cluster); err != nil {
		return nil, err
	}
	var o object
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		var err error
		o, err = k.get(r, cluster)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case o == nil:
		return nil, k.absent(doing)
	case s.cfg.Clusters == nil:
		return nil, api.E(api.Unavailable, doing, "this server has no tunnels")
	}
	cc, ok := s.cfg.Clusters.Conn(lastID(cluster))
	if !ok {
		return nil, api.E(api.Unavailable, doing, "cluster %s has no tunnel to this replica", lastID(cluster))
	}
	return linkv1.NewClusterAdminServiceClient(cc), nil
}

// CreateNodeJoinToken asks the cluster for a token: its nodes belong to its own
// trust domain.
func (x *clusterService) CreateNodeJoinToken(ctx context.Context, req *portolanv1.CreateNodeJoinTokenRequest) (*portolanv1.CreateNodeJoinTokenResponse, error) {
	doing := "create a node's join token in " + clip(req.GetCluster())
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := x.s.checkRequest(doing, req); err != nil {
		return nil, err
	}
	if _, err := api.ParseID(req.GetNode()); err != nil {
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "node", Message: err.Error()}})
	}
	admin, err := x.s.admin(ctx, doing, req.GetCluster())
	if err != nil {
		return nil, err
	}
	// Audited first: a token that exists without a row would be worse than a row
	// without a token.
	if err := x.s.auditAlone(ctx, newEntry(c, time.Now(), req.GetCluster()+"/nodes/"+req.GetNode(), "")); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, clusterCallTimeout)
	defer cancel()
	resp, err := admin.CreateNodeJoinToken(ctx, &linkv1.CreateNodeJoinTokenRequest{Node: req.GetNode()})
	if err != nil {
		return nil, err
	}
	return &portolanv1.CreateNodeJoinTokenResponse{Token: resp.GetToken(), ExpireTime: resp.GetExpireTime()}, nil
}

// ListNodes reads the nodes of a cluster through.
func (x *clusterService) ListNodes(ctx context.Context, req *portolanv1.ListNodesRequest) (*portolanv1.ListNodesResponse, error) {
	admin, err := x.s.admin(ctx, "list nodes of "+clip(req.GetCluster()), req.GetCluster())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, clusterCallTimeout)
	defer cancel()
	resp, err := admin.ListNodes(ctx, &linkv1.ListNodesRequest{})
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListNodesResponse{Nodes: resp.GetNodes()}, nil
}

// DeleteNode has the cluster take a node out.
func (x *clusterService) DeleteNode(ctx context.Context, req *portolanv1.DeleteNodeRequest) (*emptypb.Empty, error) {
	doing := "delete node " + clip(req.GetName())
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	ids, err := api.ParseName(req.GetName(), api.NodePattern)
	if err != nil {
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "name", Message: err.Error()}})
	}
	admin, err := x.s.admin(ctx, doing, api.ClusterName(ids[0]))
	if err != nil {
		return nil, err
	}
	// Audited first, as with tokens.
	e := newEntry(c, time.Now(), req.GetName(), "")
	if req.GetForce() {
		e.Detail = "force"
	}
	if err := x.s.auditAlone(ctx, e); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, clusterCallTimeout)
	defer cancel()
	if _, err := admin.DeleteNode(ctx, &linkv1.DeleteNodeRequest{Node: ids[1], Force: req.GetForce()}); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// SetNodeMode cordons, drains or frees nodes. Their records are the cluster's.
func (x *clusterService) SetNodeMode(ctx context.Context, req *portolanv1.SetNodeModeRequest) (*portolanv1.ListNodesResponse, error) {
	doing := "set the mode of " + clip(req.GetName())
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := x.s.checkRequest(doing, req); err != nil {
		return nil, err
	}
	ids, err := api.ParseName(req.GetName(), api.NodePattern, api.PoolPattern)
	if err != nil {
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "name", Message: err.Error()}})
	}
	ask := &linkv1.SetNodeRequest{Mode: req.GetMode()}
	if strings.Contains(req.GetName(), "/pools/") {
		ask.Pool = ids[1]
	} else {
		ask.Node = ids[1]
	}
	if d := req.GetDeadline(); d != nil {
		if req.GetMode() != portolanv1.NodeMode_NODE_MODE_DRAINING || d.CheckValid() != nil || d.AsDuration() <= 0 {
			return nil, api.InvalidFields(doing, []api.Violation{{Field: "deadline", Message: "is a positive duration, of a drain only"}})
		}
		ask.Deadline = timestamppb.New(time.Now().Add(d.AsDuration()))
	}
	admin, err := x.s.admin(ctx, doing, api.ClusterName(ids[0]))
	if err != nil {
		return nil, err
	}
	if err := x.s.auditAlone(ctx, newEntry(c, time.Now(), req.GetName(), "")); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, clusterCallTimeout)
	defer cancel()
	resp, err := admin.SetNode(ctx, ask)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListNodesResponse{Nodes: resp.GetNodes()}, nil
}

// ofNodes are the codes of remedies that are a fleet admin's to apply, and name
// nodes.
var ofNodes = map[string]bool{
	"FreeCPU": true, "FreeMemory": true, "FreeStorage": true, "FreeAddress": true, "FreePort": true, "Uncordon": true, "LabelNode": true, "AddNode": true, "WaitForNode": true,
}

// withoutNodes takes the names of nodes out, and what only a fleet admin can change:
// nodes are no tenant's business. What the nearest one lacks stays.
func withoutNodes(v *portolanv1.NodeVerdict) {
	v.Nearest = ""
	v.Remedies = slices.DeleteFunc(v.Remedies, func(r *portolanv1.Reason) bool { return ofNodes[r.GetCode()] })
}

// ExplainWorkload runs the deciding function again on one snapshot, and reads
// through why replicas of it are pending inside clusters, how it scales there, and
// what they should request by what they used.
func (x *workloadService) ExplainWorkload(ctx context.Context, req *portolanv1.ExplainWorkloadRequest) (*portolanv1.ExplainWorkloadResponse, error) {
	s, doing := x.s, "explain "+clip(req.GetName())
	k := s.kinds[store.Workload]
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := k.checkName(doing, "name", req.GetName()); err != nil {
		return nil, err
	}
	if !c.owns(api.TenantOf(req.GetName())) {
		return nil, k.absent(doing)
	}
	if s.cfg.Explainer == nil {
		return nil, api.E(api.Unavailable, doing, "this server explains no placements")
	}
	var resp *portolanv1.ExplainWorkloadResponse
	var clusters []string
	_, err = s.cfg.Store.View(ctx, func(r store.Reader) error {
		o, err := k.get(r, req.GetName())
		if err != nil {
			return err
		}
		w, ok := o.(*portolanv1.Workload)
		if !ok {
			return k.absent(doing)
		}
		if resp, err = s.cfg.Explainer.Explain(r, proto.CloneOf(w)); err != nil {
			return err
		}
		resp.Revision = r.Revision()
		names, err := namesUnder(r, store.Placement, w.GetName()+"/placements/")
		clusters = nil
		for _, n := range names {
			clusters = append(clusters, lastID(n))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	got, _, _ := fanOut(ctx, s, clusters, func(ctx context.Context, _ string, cc grpc.ClientConnInterface) (*linkv1.ExplainPendingResponse, error) {
		return linkv1.NewClusterAdminServiceClient(cc).ExplainPending(ctx, &linkv1.ExplainPendingRequest{Workload: req.GetName()})
	})
	for _, cluster := range clusters {
		if q := got[cluster].GetRequests(); q != nil {
			q.Cluster = cluster
			resp.Requests = append(resp.Requests, q)
		}
		if v := got[cluster].GetScaling(); v != nil {
			v.Cluster = cluster
			resp.Scaling = append(resp.Scaling, v)
		}
		for _, v := range got[cluster].GetVerdicts() {
			v.Cluster = cluster
			if !c.fleet {
				withoutNodes(v)
			}
			resp.Nodes = append(resp.Nodes, v)
		}
	}
	return resp, nil
}

type auditService struct {
	portolanv1.UnimplementedAuditServiceServer
	s *Server
}

// GetAuditEntry implements portolanv1.AuditServiceServer.
func (x *auditService) GetAuditEntry(ctx context.Context, req *portolanv1.GetAuditEntryRequest) (*portolanv1.AuditEntry, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	doing := "get " + clip(req.GetName())
	var out *portolanv1.AuditEntry
	_, err = x.s.cfg.Store.View(ctx, func(r store.Reader) error {
		rec, err := r.Get(store.AuditEntry, req.GetName())
		if err != nil && api.KindOf(err) != api.NotFound {
			return err
		}
		e, ok := rec.Message.(*portolanv1.AuditEntry)
		if err != nil || !ok || !c.owns(e.GetTenant()) {
			return api.E(api.NotFound, doing, "no such audit entry")
		}
		out = proto.CloneOf(e)
		return nil
	})
	return out, err
}

// ListAuditEntries implements portolanv1.AuditServiceServer. Entries have no
// labels: a selector matches none.
func (x *auditService) ListAuditEntries(ctx context.Context, req *portolanv1.ListAuditEntriesRequest) (*portolanv1.ListAuditEntriesResponse, error) {
	const doing = "list audit entries"
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	q := listQuery{kind: store.AuditEntry, doing: doing, parent: req.GetParent(), req: req, scope: listScope{opts: store.ListOptions{Tenants: c.filter()}}}
	if p := req.GetParent(); p != "" && p != "-" {
		ids, err := api.ParseName(p, api.TenantPattern)
		if err != nil {
			return nil, api.InvalidFields(doing, []api.Violation{{Field: "parent", Message: err.Error()}})
		}
		if !c.owns(ids[0]) {
			return nil, api.E(api.NotFound, doing, "no such tenant")
		}
		q.scope.opts = store.ListOptions{Tenant: ids[0]}
	}
	p, err := listRecords(ctx, x.s, q, func(_ store.Reader, rec store.Record) (*portolanv1.AuditEntry, bool, error) {
		e, ok := rec.Message.(*portolanv1.AuditEntry)
		return e, ok && len(req.GetLabelSelector()) == 0, nil
	})
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListAuditEntriesResponse{AuditEntries: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

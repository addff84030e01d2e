package dispatch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
)

// Join implements nodev1.NodeServiceServer. Repeated with the same token and key
// it answers again, because the first answer may have been lost.
func (d *Dispatch) Join(ctx context.Context, req *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	doing := "join node"
	if err := d.strangers.Take(ctx, doing, time.Now()); err != nil {
		return nil, err
	}
	if _, err := api.ParseID(req.GetNode()); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	doing += " " + req.GetNode()
	hash, _, err := attest.ParseToken(req.GetToken())
	if err != nil {
		return nil, api.E(api.Denied, doing, "the token is not valid")
	}
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return nil, api.E(api.Invalid, doing, "the certificate request is not valid")
	}
	if req.GetFacts().GetAddress() == "" {
		return nil, api.E(api.Invalid, doing, "facts.address: must be present")
	}
	key := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	if err := d.redeem(ctx, doing, hash, req.GetNode(), key[:]); err != nil {
		d.log.Warn("join refused", "node", req.GetNode(), "error", err)
		return nil, err
	}
	n, err := d.cfg.Manager.RegisterNode(ctx, req.GetNode(), req.GetFacts(), key[:])
	if err != nil {
		return nil, err
	}
	chain, err := d.signNode(ctx, req.GetNode(), req.GetCsr())
	if err != nil {
		return nil, err
	}
	d.log.Info("node joined", "node", req.GetNode(), "replica_cidr", n.GetReplicaCidr())
	return &nodev1.JoinResponse{
		Chain: chain, Bundle: d.cfg.CA.Bundle(), Cluster: d.cfg.Facts.Cluster, TrustDomain: d.domain(),
		Fleet: d.cfg.Facts.Fleet, ReplicaCidr: n.GetReplicaCidr(),
	}, nil
}

// redeem uses a token up for one key. It is looked up before anybody waits for
// their turn.
func (d *Dispatch) redeem(ctx context.Context, doing, hash, node string, key []byte) error {
	if t, err := d.token(ctx, doing, hash, node, key); err != nil || t == nil {
		return err
	}
	d.joins.Lock()
	defer d.joins.Unlock()
	t, err := d.token(ctx, doing, hash, node, key)
	if err != nil || t == nil {
		return err
	}
	used := proto.CloneOf(t)
	used.RedeemedBy = key
	return d.cfg.State.PutToken(ctx, hash, used)
}

// token gives a token if it may be used for a key, nil when this is the same use
// again. What is wrong with a token is not told apart, so that nobody learns which
// exist.
func (d *Dispatch) token(ctx context.Context, doing, hash, node string, key []byte) (*clusterv1.NodeToken, error) {
	refused := api.E(api.Denied, doing, "the token is not valid: it does not exist, is used, has expired or is another node's")
	t, err := d.cfg.State.Token(ctx, hash)
	if api.KindOf(err) == api.NotFound {
		return nil, refused
	}
	if err != nil {
		return nil, err
	}
	if t.GetNode() != node {
		return nil, refused
	}
	over := !time.Now().Before(t.GetExpireTime().AsTime())
	if len(t.GetRedeemedBy()) > 0 {
		// The same again, unless the node was deleted or has joined with another key
		// meanwhile.
		same := bytes.Equal(t.GetRedeemedBy(), key)
		if same && (!over || bytes.Equal(d.cfg.State.Snapshot().Nodes[node].GetKeyHash(), key)) {
			return nil, nil
		}
		return nil, refused
	}
	if over {
		return nil, refused
	}
	return t, nil
}

func (d *Dispatch) signNode(ctx context.Context, node string, csr []byte) ([][]byte, error) {
	return d.cfg.CA.SignCSR(ctx, csr, ca.Request{ID: identity.ID{Kind: identity.Node, TrustDomain: d.domain(), Name: node}})
}

// Renew implements nodev1.NodeServiceServer.
func (d *Dispatch) Renew(ctx context.Context, req *nodev1.RenewRequest) (*nodev1.RenewResponse, error) {
	c, err := d.identify(ctx)
	if err != nil {
		return nil, err
	}
	doing := "renew node " + c.node
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return nil, api.E(api.Invalid, doing, "the certificate request is not valid")
	}
	chain, err := d.signNode(ctx, c.node, req.GetCsr())
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, api.E(api.Internal, doing, "read what was signed: %w", err)
	}
	// Noted before the node has it: what it shows next must count.
	key := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	if err := d.cfg.Manager.RenewNode(ctx, c.node, key[:], leaf.NotAfter); err != nil {
		return nil, err
	}
	return &nodev1.RenewResponse{Chain: chain, Bundle: d.cfg.CA.Bundle()}, nil
}

// SignWorkload implements nodev1.NodeServiceServer: never for a stopped allocation
// and never for one of another node.
func (d *Dispatch) SignWorkload(ctx context.Context, req *nodev1.SignWorkloadRequest) (*nodev1.SignWorkloadResponse, error) {
	c, err := d.identify(ctx)
	if err != nil {
		return nil, err
	}
	node, doing := c.node, "sign for allocation "+req.GetAllocation()
	s := d.cfg.State.Snapshot()
	a := s.Allocations[req.GetAllocation()]
	if a.GetNode() != node {
		d.log.Error("certificate refused", "alarm", true, "node", node, "allocation", req.GetAllocation(), "why", "it is not assigned to the node")
		return nil, api.E(api.Denied, doing, "it is not assigned to the calling node")
	}
	var seen *nodev1.AllocationStatus
	if st := s.NodeStatus[node]; st != nil {
		seen = st.Allocations[a.GetAllocation()]
	}
	if a.GetStop() || ended(a, seen) {
		return nil, api.E(api.Precondition, doing, "it is stopped")
	}
	chain, err := d.cfg.CA.SignCSR(ctx, req.GetCsr(), ca.Request{ID: d.identityOf(a)})
	if err != nil {
		return nil, err
	}
	return &nodev1.SignWorkloadResponse{Chain: chain, Bundle: d.cfg.CA.Bundle()}, nil
}

// ended says whether a replica has run to its end.
func ended(a *clusterv1.Allocation, o *nodev1.AllocationStatus) bool {
	if st := o.GetState(); st == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED || st == portolanv1.ReplicaState_REPLICA_STATE_FAILED {
		return true
	}
	return a.GetFinal() != nil
}

// identityOf is whom an allocation speaks as.
func (d *Dispatch) identityOf(a *clusterv1.Allocation) identity.ID {
	if a.GetTenant() == api.SystemTenant && a.GetSpec().GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED {
		return identity.ID{Kind: identity.Gateway, TrustDomain: d.domain(), Name: a.GetWorkload()}
	}
	return identity.ID{Kind: identity.Workload, TrustDomain: d.domain(), Tenant: a.GetTenant(), Workload: a.GetWorkload()}
}

package dispatch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/xds/distribute"
)

// certificateKey gives the SHA-256 of the public key in the caller's certificate.
func certificateKey(ctx context.Context) ([]byte, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, api.E(api.Unknown, "identify the caller", "no connection")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, api.E(api.Unknown, "identify the caller", "a client certificate is required")
	}
	sum := sha256.Sum256(info.State.PeerCertificates[0].RawSubjectPublicKeyInfo)
	return sum[:], nil
}

// caller is a node that calls, and the key of its certificate.
type caller struct {
	node string
	key  []byte
}

// identify gives the node that calls, by its certificate, and refuses everybody
// else: also one that was deleted, or whose key is of before it joined anew.
func (d *Dispatch) identify(ctx context.Context) (caller, error) {
	const doing = "identify node"
	id, err := d.cfg.Peer(ctx)
	if err != nil {
		return caller{}, api.E(api.Unknown, doing, "%w", err)
	}
	if id.Kind != identity.Node || id.TrustDomain != d.domain() {
		return caller{}, api.E(api.Denied, doing, "%s is no node of this cluster", id)
	}
	key, err := d.cfg.Key(ctx)
	if err != nil {
		return caller{}, api.E(api.Unknown, doing, "%w", err)
	}
	c := caller{node: id.Name, key: key}
	return c, c.check(d.cfg.State.Snapshot())
}

// check says whether the caller is, at a snapshot, who it was identified as.
func (c caller) check(s *state.Snapshot) error {
	n := s.Nodes[c.node]
	switch {
	case n == nil:
		return api.E(api.Denied, "identify node", "node %q is not registered: let it join again", c.node)
	case !bytes.Equal(n.GetKeyHash(), c.key) && !slices.ContainsFunc(n.GetRenewedKeys(), func(k *clusterv1.NodeKey) bool { return bytes.Equal(k.GetHash(), c.key) }):
		return api.E(api.Denied, "identify node", "node %q has joined with another key since", c.node)
	}
	return nil
}

// bound is a stream of a node; it lives as long as what its caller showed counts.
type bound struct {
	caller
	end context.CancelCauseFunc
}

// bind gives the context for a stream of the node that calls. It ends with a
// reason when the node is deleted or joins anew, and with this process. release
// must be called at the stream's end.
func (d *Dispatch) bind(ctx context.Context) (node string, life context.Context, release func(), err error) {
	c, err := d.identify(ctx)
	if err != nil {
		return "", nil, nil, err
	}
	b := &bound{caller: c}
	life, b.end = context.WithCancelCause(ctx)
	stop := context.AfterFunc(d.stopped, func() { b.end(api.E(api.Unavailable, "serve node "+c.node, "the cluster is stopping")) })
	d.mu.Lock()
	d.streams[b] = struct{}{}
	d.mu.Unlock()
	release = func() {
		stop()
		d.mu.Lock()
		delete(d.streams, b)
		d.mu.Unlock()
		b.end(nil)
	}
	// The record may have changed before the stream could be found.
	if err := c.check(d.cfg.State.Snapshot()); err != nil {
		release()
		return "", nil, nil, err
	}
	return c.node, life, release, nil
}

// fence ends the streams whose callers a snapshot no longer knows.
func (d *Dispatch) fence(s *state.Snapshot) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for b := range d.streams {
		if err := b.check(s); err != nil {
			d.log.Info("node cut off", "node", b.node, "why", err)
			b.end(err)
		}
	}
}

// discoveryServer serves directives on bound streams.
type discoveryServer struct {
	*distribute.Server
	d *Dispatch
}

// DeltaAggregatedResources implements the discovery service.
func (x discoveryServer) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	node, life, release, err := x.d.bind(stream.Context())
	if err != nil {
		return err
	}
	defer release()
	return x.Server.DeltaAggregatedResources(&boundStream{AggregatedDiscoveryService_DeltaAggregatedResourcesServer: stream, ctx: context.WithValue(life, nodeKey{}, node)})
}

// nodeKey is where a bound stream's context has its node.
type nodeKey struct{}

// viewOf names the set of a discovery stream that discoveryServer let in.
func viewOf(ctx context.Context) (string, error) {
	node, ok := ctx.Value(nodeKey{}).(string)
	if !ok {
		return "", api.E(api.Unknown, "identify node", "the stream is nobody's")
	}
	return node, nil
}

// boundStream is a stream with a shorter life.
type boundStream struct {
	discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	ctx context.Context //nolint:containedctx // a stream's context is its own, grpc-go's interface asks for it
}

func (b *boundStream) Context() context.Context { return b.ctx }

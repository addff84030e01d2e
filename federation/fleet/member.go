package fleet

import (
	"context"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/xds/distribute"
)

// member is a cluster of the fleet in one life of its name: one that was deleted
// and made again is another one, and nothing that was open of the first speaks
// for it. Made and ended by the goroutine that serves.
type member struct {
	id, uid string
	// in ends, with the reason, when the cluster leaves the fleet or this replica
	// stops. Every stream of the cluster ends with it.
	in  context.Context //nolint:containedctx // lifetime of streams that others' servers run
	out context.CancelCauseFunc
}

// admit lets in the clusters of a view that are new, and cuts off those that are
// no longer in it.
func (f *Fleet) admit(v *store.View) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range f.members {
		c, ok := store.One[*portolanv1.Cluster](v, store.Cluster, api.ClusterName(id))
		if ok && c.GetUid() == m.uid {
			continue
		}
		m.out(api.E(api.Denied, "serve cluster "+id, "it was taken out of the fleet"))
		delete(f.members, id)
		f.log.Info("cluster cut off", "cluster", id)
	}
	for name, c := range store.All[*portolanv1.Cluster](v, store.Cluster) {
		id := strings.TrimPrefix(name, "clusters/")
		if f.members[id] != nil {
			continue
		}
		f.members[id] = f.newMember(id, c.GetUid())
	}
}

func (f *Fleet) newMember(id, uid string) *member {
	in, out := context.WithCancelCause(f.stopped)
	return &member{id: id, uid: uid, in: in, out: out}
}

// member gives the cluster that calls, by its certificate, and refuses everybody
// else.
func (f *Fleet) member(ctx context.Context) (*member, error) {
	id, err := f.cfg.Peer(ctx)
	if err != nil {
		return nil, api.E(api.Unknown, "identify cluster", "%w", err)
	}
	c, ok := identity.ClusterOf(f.cfg.Fleet, id.TrustDomain)
	if !ok || id.Kind != identity.Control {
		return nil, api.E(api.Denied, "identify cluster", "%s is no control plane of a cluster", id)
	}
	if f.Revision() < 0 {
		return nil, api.E(api.Unavailable, "identify cluster", "this replica has no state yet")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[c]
	if m == nil {
		return nil, api.E(api.Denied, "identify cluster", "cluster %q is not in the fleet", c)
	}
	return m, nil
}

// discoveryServer ends discovery streams with their cluster's membership.
type discoveryServer struct {
	*distribute.Server
	f *Fleet
}

// DeltaAggregatedResources implements the discovery service.
func (d discoveryServer) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	m, err := d.f.member(stream.Context())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	defer context.AfterFunc(m.in, func() { cancel(context.Cause(m.in)) })()
	return d.Server.DeltaAggregatedResources(&boundStream{AggregatedDiscoveryService_DeltaAggregatedResourcesServer: stream, ctx: context.WithValue(ctx, memberKey{}, m)})
}

// memberKey is where a bound stream's context has its member.
type memberKey struct{}

// viewOf names the set of a discovery stream that discoveryServer let in.
func viewOf(ctx context.Context) (string, error) {
	m, ok := ctx.Value(memberKey{}).(*member)
	if !ok {
		return "", api.E(api.Unknown, "identify cluster", "the stream is nobody's")
	}
	return m.id, nil
}

// boundStream is a stream with a shorter life.
type boundStream struct {
	discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	ctx context.Context //nolint:containedctx // a stream's context is its own, grpc-go's interface asks for it
}

func (b *boundStream) Context() context.Context { return b.ctx }

package inproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"github.com/portolan-io/portolan/cluster/dispatch"
	"github.com/portolan-io/portolan/cluster/link"
	"github.com/portolan-io/portolan/cluster/manager"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/xds/distribute"
)

const (
	federationName = "federation." + fleetDomain
	membershipKey  = "federation/membership"
	dialTimeout    = time.Second
)

// cluster is what stays of a cluster when its process dies.
type cluster struct {
	name, region, cidr string
	token              string
	state              *mem.Store
	nodes              []*node
}

// membership is what a join gave.
type membership struct {
	Fleet, VirtualIPs string
	Bundle            []byte
}

// clusterProcess wires a cluster as portolan-cluster's serve does, on the state
// that the process before left.
func (f *Fleet) clusterProcess(c *cluster) (*process, error) {
	log := f.log.With("process", c.name)
	ctx := f.ctx
	st := c.state
	authority, err := ca.Open(ctx, ca.Config{TrustDomain: identity.ClusterDomain(fleetDomain, c.name), Storage: st, SealKey: make([]byte, 32)})
	if err != nil {
		return nil, err
	}
	m, err := f.join(ctx, c, authority)
	if err != nil {
		return nil, err
	}
	session := time.Now().UnixNano()
	own, err := source.New(source.Config{Log: log, Fetch: func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
		chain, err := authority.SignCSR(ctx, csr, ca.Request{
			ID:       identity.ID{Kind: identity.Control, TrustDomain: authority.TrustDomain()},
			DNSNames: []string{"cluster." + authority.TrustDomain()}, IncludeRoot: true,
		})
		return chain, authority.Bundle(), err
	}})
	if err != nil {
		return nil, err
	}
	below, above := trust.NewSet(), trust.NewSet()
	if err := errors.Join(below.Put(authority.TrustDomain(), authority.Bundle()), above.Put(m.Fleet, m.Bundle)); err != nil {
		return nil, err
	}
	mgr, err := manager.New(manager.Config{Store: st, Cluster: c.name, CIDR: c.cidr, Seed: uint64(session), Log: log})
	if err != nil {
		return nil, err
	}
	d, err := dispatch.New(dispatch.Config{
		State: st, Facts: dispatch.Facts{Cluster: c.name, Fleet: m.Fleet, VirtualIPs: m.VirtualIPs},
		CA: authority, Manager: mgr, Peer: trust.PeerID, Log: log,
	})
	if err != nil {
		return nil, err
	}
	upward := grpc.NewServer()
	l, err := link.New(link.Config{
		State: st, Cluster: c.name, Fleet: m.Fleet, Session: session, Addresses: f.federationOrder(c),
		Dial: f.dialer(c, own, above), Serve: upward, Nacks: d.Nacks, Log: log,
	})
	if err != nil {
		return nil, err
	}
	tls := trust.ServerTLS(own.Certificate, below, trust.Options{OptionalClientCert: true})
	nodes := grpc.NewServer(append(distribute.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)), grpc.ConnectionTimeout(10*time.Second))...)
	d.Register(nodes)
	d.RegisterUpward(upward)
	if _, err := own.Ensure(ctx); err != nil {
		return nil, err
	}
	p := &process{
		runs: []func(context.Context) error{
			own.Run, mgr.Run, d.Run, l.Run, serving(nodes, f.wires.Listen(c.name, c.name)),
			func(ctx context.Context) error { return followFleet(ctx, st, m.Fleet, above, log) },
			func(ctx context.Context) error { <-ctx.Done(); upward.Stop(); return nil },
		},
		// What is durable stays, what was observed is gone.
		die: func() { c.state = st.Reopen() },
	}
	return p, nil
}

// federationOrder spreads clusters over replicas.
func (f *Fleet) federationOrder(c *cluster) []string {
	i := slices.Index(f.clusters, c) % len(f.federation)
	return append(slices.Clone(f.federation[i:]), f.federation[:i]...)
}

// join redeems the token once; later processes find what it gave in the state.
func (f *Fleet) join(ctx context.Context, c *cluster, authority *ca.Authority) (membership, error) {
	var m membership
	if b, err := c.state.LoadBlob(ctx, membershipKey); err == nil {
		return m, json.Unmarshal(b, &m)
	}
	_, root, err := attest.ParseToken(c.token)
	if err != nil {
		return m, err
	}
	proof, err := authority.Prove(c.token)
	if err != nil {
		return m, err
	}
	cc, err := grpc.NewClient("passthrough:///"+f.federation[0], grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(trust.JoinTLS(root, federationName, trust.Options{}))),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return f.wires.Dial(ctx, c.name, a, c.name) }))
	if err != nil {
		return m, err
	}
	defer func() { _ = cc.Close() }()
	resp, err := linkv1.NewLinkServiceClient(cc).Join(ctx, &linkv1.JoinRequest{Token: c.token, Cluster: c.name, Bundle: authority.Bundle(), Proof: proof})
	if err != nil {
		return m, fmt.Errorf("join: %w", err)
	}
	m = membership{Fleet: resp.GetFleet(), Bundle: resp.GetFleetBundle(), VirtualIPs: resp.GetVirtualIpCidr()}
	b, err := json.Marshal(m)
	if err != nil {
		return m, err
	}
	return m, c.state.SaveBlob(ctx, membershipKey, b, false)
}

// dialer opens connections to federation replicas, over the cluster's way out.
func (f *Fleet) dialer(c *cluster, own *source.Source, above *trust.Set) func(context.Context, string) (distribute.Conn, error) {
	federation := identity.ID{Kind: identity.Control, TrustDomain: fleetDomain}
	return func(_ context.Context, address string) (distribute.Conn, error) {
		tls := trust.ClientTLS(own.Certificate, above, federationName, federation, trust.Options{})
		return grpc.NewClient("passthrough:///"+address, append(distribute.DialOptions(),
			grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(tls)),
			grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, dialTimeout)
				defer cancel()
				return f.wires.Dial(ctx, c.name, a, c.name, a)
			}),
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.5, MaxDelay: time.Second},
				MinConnectTimeout: 2 * dialTimeout,
			}))...)
	}
}

// followFleet keeps the fleet's roots at what the intents say.
func followFleet(ctx context.Context, st state.Store, fleet string, above *trust.Set, log *slog.Logger) error {
	for gen := int64(-1); ; {
		if err := st.Wait(ctx, gen); err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // asked to end
			}
			return err
		}
		s := st.Snapshot()
		gen = s.Generation
		if roots := s.Intents["bundle/"+fleet].GetBundle().GetX509Roots(); len(roots) > 0 {
			if err := above.Put(fleet, roots); err != nil {
				log.Error("the fleet's roots are broken", "error", err)
			}
		}
	}
}

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/nodeagent/agent"
	"github.com/portolan-io/portolan/xds/distribute"
)

const dialTimeout = 5 * time.Second

// upstream dials the cluster; it implements agent.Upstream.
type upstream struct {
	serverName string
	addresses  []string
}

// Join trusts only the root whose hash is in the token.
func (u *upstream) Join(_ context.Context, token string) (distribute.Conn, error) {
	_, root, err := attest.ParseToken(token)
	if err != nil {
		return nil, err
	}
	return u.conn(trust.JoinTLS(root, u.serverName, trust.Options{}))
}

// Dial presents the node's identity and accepts the cluster's control plane only.
func (u *upstream) Dial(_ context.Context, c agent.Credentials) (distribute.Conn, error) {
	set := trust.NewSet()
	if err := set.Put(c.TrustDomain, c.Bundle); err != nil {
		return nil, err
	}
	want := identity.ID{Kind: identity.Control, TrustDomain: c.TrustDomain}
	return u.conn(trust.ClientTLS(trust.Static(&c.Certificate), set, u.serverName, want, trust.Options{}))
}

func (u *upstream) conn(cfg *tls.Config) (distribute.Conn, error) {
	return grpc.NewClient("passthrough:///"+u.serverName,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(u.dial),
		grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)),
	)
}

// dial tries every address once, in random order.
func (u *upstream) dial(ctx context.Context, _ string) (net.Conn, error) {
	var errs []error
	for _, i := range rand.Perm(len(u.addresses)) {
		d := net.Dialer{Timeout: dialTimeout}
		c, err := d.DialContext(ctx, "tcp", u.addresses[i])
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("dial the cluster: %w", errors.Join(errs...))
}

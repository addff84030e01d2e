package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/trust"
)

const (
	membershipKey = "federation/membership"
	joinTimeout   = 10 * time.Second
	joinBackoff   = 3 * time.Second
)

// membership is what a join gave; kept in the state for ever after.
type membership struct {
	Fleet      string `json:"fleet"`
	Bundle     []byte `json:"bundle"`
	VirtualIPs string `json:"virtualIPs"`
}

// loadMembership gives what a former join gave; false when there was none.
func loadMembership(ctx context.Context, st state.Store) (membership, bool, error) {
	var m membership
	b, err := st.LoadBlob(ctx, membershipKey)
	if api.KindOf(err) == api.NotFound && err != nil {
		return m, false, nil //nolint:nilerr // there was no join yet
	}
	if err != nil {
		return m, false, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, false, fmt.Errorf("read what the join gave: %w", err)
	}
	return m, true, nil
}

// joined gives the membership, joining first when there is none. It tries until
// it succeeds or ctx ends: the token or the federation may come later.
func joined(ctx context.Context, c *Config, st state.Store, authority *ca.Authority, log *slog.Logger) (membership, error) {
	m, ok, err := loadMembership(ctx, st)
	if err != nil || ok {
		return m, err
	}
	for {
		m, err := join(ctx, c, authority)
		if err == nil {
			b, err := json.Marshal(m)
			if err != nil {
				return m, err
			}
			log.Info("joined the fleet", "fleet", m.Fleet)
			return m, st.SaveBlob(ctx, membershipKey, b, false)
		}
		if ctx.Err() != nil {
			return m, ctx.Err()
		}
		log.Warn("not joined yet", "error", attest.Redact(err.Error()))
		select {
		case <-time.After(rand.N(joinBackoff)):
		case <-ctx.Done():
			return m, ctx.Err()
		}
	}
}

// join redeems the token at the first replica that answers.
func join(ctx context.Context, c *Config, authority *ca.Authority) (membership, error) {
	b, err := os.ReadFile(c.Federation.TokenFile)
	if err != nil {
		return membership{}, fmt.Errorf("read the join token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	_, root, err := attest.ParseToken(token)
	if err != nil {
		return membership{}, err
	}
	proof, err := authority.Prove(token)
	if err != nil {
		return membership{}, err
	}
	req := &linkv1.JoinRequest{Token: token, Cluster: c.Cluster, Bundle: authority.Bundle(), Proof: proof}
	for _, a := range c.Federation.Addresses {
		var m membership
		if m, err = joinAt(ctx, c, a, root, req); err == nil {
			return m, nil
		}
	}
	return membership{}, err
}

func joinAt(ctx context.Context, c *Config, address string, root [32]byte, req *linkv1.JoinRequest) (membership, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(trust.JoinTLS(root, c.Federation.ServerName, trust.Options{}))))
	if err != nil {
		return membership{}, err
	}
	defer func() { _ = cc.Close() }()
	resp, err := linkv1.NewLinkServiceClient(cc).Join(ctx, req)
	if err != nil {
		return membership{}, fmt.Errorf("join at %s: %w", address, err)
	}
	// The answer came from who holds the token's root, but it must fit what was
	// configured: the authority's domain was made of it.
	if resp.GetFleet() != c.Fleet() || resp.GetTrustDomain() != identity.ClusterDomain(c.Fleet(), c.Cluster) {
		return membership{}, fmt.Errorf("join at %s: it is fleet %q, not %q", address, resp.GetFleet(), c.Fleet())
	}
	if !trust.BundleHas(resp.GetFleetBundle(), root) {
		return membership{}, fmt.Errorf("join at %s: the fleet's roots are not those of the token", address)
	}
	return membership{Fleet: resp.GetFleet(), Bundle: resp.GetFleetBundle(), VirtualIPs: resp.GetVirtualIpCidr()}, nil
}

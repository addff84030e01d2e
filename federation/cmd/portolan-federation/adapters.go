package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/control"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

// admissionDeadline bounds one admission: a person waits for it.
const admissionDeadline = 500 * time.Millisecond

// engine gives policy/opa the shapes that the server asks for.
type engine struct{ log *slog.Logger }

// CompileAdmission implements server.AdmissionCompiler. A broken bundle denies
// all; it cannot be stored by this version, but may come from another.
func (e engine) CompileAdmission(_ context.Context, bundles []policy.Bundle) (policy.Admitter, error) {
	set, faults := opa.Update(nil, bundles, opa.Limits{Deadline: admissionDeadline})
	var errs []error
	for _, f := range faults {
		errs = append(errs, f)
	}
	if err := errors.Join(errs...); err != nil {
		e.log.Error("an admission bundle is broken and denies everything", "error", err)
	}
	return set, nil
}

// Check implements server.PolicyChecker.
func (engine) Check(ctx context.Context, b policy.Bundle) []api.Violation { return opa.Check(ctx, b) }

// minter mints join tokens under the fleet's root.
type minter struct{ authority *ca.Authority }

// MintJoinToken implements server.TokenMinter.
func (m minter) MintJoinToken() (string, error) {
	token, _ := m.authority.NewToken()
	return token, nil
}

// newServer wires the API. clusters and explain may be nil where nothing is
// served.
func newServer(c *Config, st store.Store, authority *ca.Authority, images server.Resolver, clusters server.Clusters, explain server.Explainer, log *slog.Logger) (*server.Server, error) {
	vips, err := netip.ParsePrefix(c.VirtualIPs)
	if err != nil {
		return nil, fmt.Errorf("virtualIPs: %w", err)
	}
	return server.New(server.Config{
		Store: st, Fleet: c.Fleet, Log: log, Identify: trust.PeerID, Admission: engine{log}, Policies: engine{log},
		Resolver: images, Registries: c.Registries.Allow, VirtualIPs: vips,
		Clusters: clusters, Explainer: explain, Tokens: minter{authority},
		ControlLoops: []string{control.PlaceLease}, ClusterLease: fleet.LeaseOf, ClusterLeaseTTL: time.Duration(c.LivenessTimeout),
	})
}

// newResolver makes the resolver of images, with each registry's roots.
func newResolver(r Registries) (*server.RegistryResolver, error) {
	hosts := map[string]server.RegistryHost{}
	for name, h := range r.Hosts {
		host := server.RegistryHost{Address: h.Address}
		if h.CAFile != "" {
			var err error
			if host.Roots, err = readRoots(h.CAFile); err != nil {
				return nil, err
			}
		}
		hosts[name] = host
	}
	return server.NewRegistryResolver(server.ResolverConfig{Allow: r.Allow, Hosts: hosts}), nil
}

func readRoots(file string) (*x509.CertPool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read a registry's roots: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read a registry's roots: %s holds no certificate in PEM", file)
	}
	return pool, nil
}

// clusterPeer identifies a calling cluster, and verifies its certificate again
// with each call: a connection outlives the roots under which it was accepted, and
// those of a cluster that was deleted count no more. That the certificate expired
// meanwhile does not end what was accepted while it was valid.
func clusterPeer(set *trust.Set) func(context.Context) (identity.ID, error) {
	return func(ctx context.Context) (identity.ID, error) {
		id, err := trust.PeerID(ctx)
		if err != nil {
			return id, err
		}
		p, _ := peer.FromContext(ctx)
		chain := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates
		at := time.Now()
		if end := chain[0].NotAfter; at.After(end) {
			at = end
		}
		return set.Verify(chain, at)
	}
}

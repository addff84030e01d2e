package inproc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/control"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

const (
	fleetDomain = "portolan.internal"
	registry    = "registry.test"
	virtualIPs  = "10.68.0.0/16"
	adminName   = "admin"
)

// mortalStore is a store that refuses its process after the process's death.
type mortalStore struct {
	store.Store
	dead atomic.Bool
}

func (m *mortalStore) check(doing string) error {
	if m.dead.Load() {
		return api.E(api.Unavailable, doing, "the process is dead")
	}
	return nil
}

func (m *mortalStore) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	if err := m.check("update"); err != nil {
		return 0, err
	}
	return m.Store.Update(ctx, fn)
}

func (m *mortalStore) Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	if err := m.check("acquire"); err != nil {
		return store.Lease{}, err
	}
	return m.Store.Acquire(ctx, name, holder, ttl, progress)
}

func (m *mortalStore) Release(ctx context.Context, name, holder string) error {
	if err := m.check("release"); err != nil {
		return err
	}
	return m.Store.Release(ctx, name, holder)
}

// rego is the policy engine as the federation's main adapts it.
type rego struct{}

func (rego) CompileAdmission(_ context.Context, bundles []policy.Bundle) (policy.Admitter, error) {
	set, _ := opa.Update(nil, bundles, opa.Limits{})
	return set, nil
}

func (rego) Check(ctx context.Context, b policy.Bundle) []api.Violation { return opa.Check(ctx, b) }

type minter struct{ authority *ca.Authority }

func (m minter) MintJoinToken() (string, error) {
	token, _ := m.authority.NewToken()
	return token, nil
}

// images is a registry in which every image exists.
type images struct{}

func (images) Resolve(_ context.Context, image string) (string, error) {
	repository, _, _ := strings.Cut(strings.TrimPrefix(image, registry+"/"), ":")
	sum := sha256.Sum256([]byte(image))
	return registry + "/" + repository + "@sha256:" + hex.EncodeToString(sum[:]), nil
}

func newServer(st store.Store, authority *ca.Authority, clusters server.Clusters, explain server.Explainer, log *slog.Logger) (*server.Server, error) {
	return server.New(server.Config{
		Store: st, Fleet: fleetDomain, Log: log, Identify: trust.PeerID, Admission: rego{}, Policies: rego{},
		Resolver: images{}, Registries: []string{registry}, VirtualIPs: netip.MustParsePrefix(virtualIPs),
		Clusters: clusters, Explainer: explain, Tokens: minter{authority},
		ControlLoops: []string{control.PlaceLease}, ClusterLease: fleet.LeaseOf,
	})
}

// federationReplica wires a replica as portolan-federation's serve does.
func (f *Fleet) federationReplica(name string) (*process, error) {
	log := f.log.With("process", name)
	st := &mortalStore{Store: f.store}
	set := trust.NewSet()
	if err := set.Put(fleetDomain, f.authority.Bundle()); err != nil {
		return nil, err
	}
	own, err := source.New(source.Config{Log: log, Fetch: func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
		chain, err := f.authority.SignCSR(ctx, csr, ca.Request{
			ID:       identity.ID{Kind: identity.Control, TrustDomain: fleetDomain},
			DNSNames: []string{"federation." + fleetDomain}, IncludeRoot: true,
		})
		return chain, f.authority.Bundle(), err
	}})
	if err != nil {
		return nil, err
	}
	links, err := fleet.New(fleet.Config{
		Store: st, Replica: name, Fleet: fleetDomain, VirtualIPs: virtualIPs, FleetBundle: f.authority.Bundle, Peer: trust.PeerID,
		OnBundles: func(bundles map[string][]byte) {
			if err := set.Replace(bundles); err != nil {
				f.t.Errorf("%s: a trust bundle is broken: %v", name, err)
			}
		}, Log: log,
	})
	if err != nil {
		return nil, err
	}
	loops, err := control.New(control.Config{Store: st, Holder: name, Log: log})
	if err != nil {
		return nil, err
	}
	srv, err := newServer(st, f.authority, links, loops, log)
	if err != nil {
		return nil, err
	}
	tls := trust.ServerTLS(own.Certificate, set, trust.Options{OptionalClientCert: true})
	api := grpc.NewServer(append(srv.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)))...)
	srv.Register(api)
	links.Register(api)
	l := f.wires.Listen(name, name)
	return &process{
		runs: []func(context.Context) error{own.Run, links.Run, loops.Run, srv.Run, serving(api, l)},
		die:  func() { st.dead.Store(true) },
	}, nil
}

// serving is a server's Run.
func serving(s *grpc.Server, l net.Listener) func(context.Context) error {
	return func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, s.Stop)
		defer stop()
		if err := s.Serve(l); err != nil && ctx.Err() == nil && !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		<-ctx.Done()
		return nil
	}
}

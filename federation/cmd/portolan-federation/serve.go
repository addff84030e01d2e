package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/federation/api/process"
	"github.com/portolan-io/portolan/federation/control"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/cockroach"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
)

// stopTime is what calls under way get to end.
const stopTime = 5 * time.Second

// serve runs the replica until ctx ends.
func serve(ctx context.Context, c *Config) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("replica", c.Replica)
	authority, err := openAuthority(ctx, c)
	if err != nil {
		return err
	}
	st, err := cockroach.Open(ctx, cockroach.Config{URL: c.Database.URL, Log: log, Holder: c.Replica})
	if err != nil {
		return err
	}
	defer func() { _ = st.Close() }()
	p, err := wire(c, st, authority, log)
	if err != nil {
		return err
	}
	listeners, err := process.Listen(c.Listen)
	if err != nil {
		return err
	}
	admin, err := process.ListenAdmin(c.AdminSocket)
	if err != nil {
		return errors.Join(err, process.Close(listeners))
	}
	return p.Run(ctx, listeners, admin)
}

// wire makes every part, from the store up. Nothing runs yet.
func wire(c *Config, st store.Store, authority *ca.Authority, log *slog.Logger) (*process.Process, error) {
	set := trust.NewSet()
	if err := set.Put(c.Fleet, authority.Bundle()); err != nil {
		return nil, err
	}
	own, err := source.New(source.Config{Fetch: ownCertificate(c, authority), Log: log})
	if err != nil {
		return nil, err
	}
	links, err := fleet.New(fleet.Config{
		Store: st, Replica: c.Replica, Fleet: c.Fleet, VirtualIPs: c.VirtualIPs, FleetBundle: authority.Bundle, Peer: clusterPeer(set),
		OnBundles: func(bundles map[string][]byte) {
			if err := set.Replace(bundles); err != nil {
				log.Error("a trust bundle is broken; the former ones stay", "error", err)
			}
		},
		LivenessTimeout: time.Duration(c.LivenessTimeout), Log: log,
	})
	if err != nil {
		return nil, err
	}
	loops, err := control.New(control.Config{Store: st, Holder: c.Replica, Log: log})
	if err != nil {
		return nil, err
	}
	images, err := newResolver(c.Registries)
	if err != nil {
		return nil, err
	}
	srv, err := newServer(c, st, authority, images, links, loops, log)
	if err != nil {
		return nil, err
	}
	p := &process.Process{
		Log: log, API: newGRPC(srv, own, set), Admin: grpc.NewServer(), Health: health.NewServer(), StopTime: stopTime,
		Parts: map[string]func(context.Context) error{"identity": own.Run, "fleet": links.Run, "control": loops.Run, "server": srv.Run},
		Check: func(ctx context.Context) error {
			if _, ok := own.Current(); !ok {
				return errors.New("no certificate yet")
			}
			return st.Ping(ctx)
		},
	}
	srv.Register(p.API)
	links.Register(p.API)
	for _, s := range []*grpc.Server{p.API, p.Admin} {
		grpc_health_v1.RegisterHealthServer(s, p.Health)
	}
	return p, nil
}

func newGRPC(srv *server.Server, own *source.Source, set *trust.Set) *grpc.Server {
	// A joining cluster has no certificate yet; every RPC but Join asks for one.
	tls := trust.ServerTLS(own.Certificate, set, trust.Options{OptionalClientCert: true})
	return grpc.NewServer(append(srv.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)))...)
}

// ownCertificate signs this replica's server certificate with the fleet's own
// authority. The root goes along, because a joiner knows only its hash.
func ownCertificate(c *Config, authority *ca.Authority) source.FetchFunc {
	return func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
		chain, err := authority.SignCSR(ctx, csr, ca.Request{
			ID:       identity.ID{Kind: identity.Control, TrustDomain: c.Fleet},
			DNSNames: []string{"federation." + c.Fleet}, IncludeRoot: true,
		})
		return chain, authority.Bundle(), err
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/cluster/dispatch"
	"github.com/portolan-io/portolan/cluster/link"
	"github.com/portolan-io/portolan/cluster/manager"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/etcd"
	"github.com/portolan-io/portolan/federation/api/process"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/xds/distribute"
)

const (
	stopTime    = 3 * time.Second // what calls under way get to end
	dialTimeout = time.Second
)

// serve runs the cluster until ctx ends.
func serve(ctx context.Context, c *Config) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("cluster", c.Cluster)
	for _, dir := range []string{c.DataDir, filepath.Dir(c.SealKeyFile)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make a folder: %w", err)
		}
	}
	// The ports come first: a second process must end before it touches the state.
	listeners, err := process.Listen(c.Listen)
	if err != nil {
		return err
	}
	defer func() { _ = process.Close(listeners) }()
	st, err := etcd.Open(ctx, etcd.Config{Dir: filepath.Join(c.DataDir, "etcd"), Endpoints: c.Etcd.Endpoints, Log: log})
	if err != nil {
		return err
	}
	defer func() { _ = st.Close() }()
	if s := st.Snapshot(); s.Degraded != "" {
		log.Error("the newest intents could not be loaded", "alarm", true, "why", s.Degraded, "revision", s.IntentRevision)
	}
	key, err := ca.LoadOrCreateSealKey(c.SealKeyFile)
	if err != nil {
		return err
	}
	authority, err := ca.Open(ctx, ca.Config{TrustDomain: identity.ClusterDomain(c.Fleet(), c.Cluster), Storage: st, SealKey: key})
	if err != nil {
		return err
	}
	m, err := joined(ctx, c, st, authority, log)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	p, own, err := wire(c, st, authority, m, log)
	if err != nil {
		return err
	}
	if _, err := own.Ensure(ctx); err != nil {
		return err
	}
	admin, err := process.ListenAdmin(c.AdminSocket)
	if err != nil {
		return err
	}
	return p.Run(ctx, listeners, admin)
}

// wire makes every part, from the state up. Nothing runs yet.
func wire(c *Config, st state.Store, authority *ca.Authority, m membership, log *slog.Logger) (*process.Process, *source.Source, error) {
	session := time.Now().UnixNano()
	own, err := source.New(source.Config{Fetch: ownCertificate(authority), Log: log})
	if err != nil {
		return nil, nil, err
	}
	below, above := trust.NewSet(), trust.NewSet()
	if err := errors.Join(below.Put(authority.TrustDomain(), authority.Bundle()), above.Put(m.Fleet, m.Bundle)); err != nil {
		return nil, nil, err
	}
	mgr, err := manager.New(manager.Config{
		Store: st, Cluster: c.Cluster, CIDR: c.CIDR, NodeTimeout: time.Duration(c.NodeTimeout), Seed: uint64(session), Log: log,
	})
	if err != nil {
		return nil, nil, err
	}
	d, err := dispatch.New(dispatch.Config{
		State: st, Facts: dispatch.Facts{Cluster: c.Cluster, Fleet: m.Fleet, VirtualIPs: m.VirtualIPs},
		CA: authority, Manager: mgr, Peer: trust.PeerID, NodeTimeout: time.Duration(c.NodeTimeout), Log: log,
	})
	if err != nil {
		return nil, nil, err
	}
	// A joining node has no certificate yet; every RPC but Join asks for one.
	tls := trust.ServerTLS(own.Certificate, below, trust.Options{OptionalClientCert: true})
	nodes := grpc.NewServer(append(distribute.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)), grpc.ConnectionTimeout(10*time.Second))...)
	upward := grpc.NewServer()
	l, err := link.New(link.Config{
		State: st, Cluster: c.Cluster, Fleet: m.Fleet, Session: session, Addresses: c.Federation.Addresses,
		Dial: dialer(c, own, above), Serve: upward, Nacks: d.Nacks, NodeTimeout: time.Duration(c.NodeTimeout), Log: log,
	})
	if err != nil {
		return nil, nil, err
	}
	p := &process.Process{
		Log: log, API: nodes, Admin: grpc.NewServer(), Ended: []*grpc.Server{upward}, Health: health.NewServer(), StopTime: stopTime,
		Parts: map[string]func(context.Context) error{
			"identity": own.Run, "manager": mgr.Run, "dispatch": d.Run, "link": l.Run,
			"trust": func(ctx context.Context) error { return followFleet(ctx, st, m.Fleet, above, log) },
		},
		// The federation does not count: a cluster without it does its whole job.
		Check: st.Ping,
	}
	d.Register(nodes)
	d.RegisterUpward(upward)
	d.RegisterUpward(p.Admin)
	for _, s := range []*grpc.Server{nodes, upward, p.Admin} {
		grpc_health_v1.RegisterHealthServer(s, p.Health)
	}
	return p, own, nil
}

// ownCertificate signs this control plane's certificate with the cluster's own
// authority. The root goes along, because a joiner knows only its hash.
func ownCertificate(authority *ca.Authority) source.FetchFunc {
	return func(ctx context.Context, csr []byte) ([][]byte, []byte, error) {
		chain, err := authority.SignCSR(ctx, csr, ca.Request{
			ID:       identity.ID{Kind: identity.Control, TrustDomain: authority.TrustDomain()},
			DNSNames: []string{"cluster." + authority.TrustDomain()}, IncludeRoot: true,
		})
		return chain, authority.Bundle(), err
	}
}

// dialer opens connections to federation replicas. What does not connect within a
// second is given up, so that the link tries another replica.
func dialer(c *Config, own *source.Source, above *trust.Set) func(context.Context, string) (distribute.Conn, error) {
	federation := identity.ID{Kind: identity.Control, TrustDomain: c.Fleet()}
	return func(_ context.Context, address string) (distribute.Conn, error) {
		tls := trust.ClientTLS(own.Certificate, above, c.Federation.ServerName, federation, trust.Options{})
		return grpc.NewClient("passthrough:///"+address, append(distribute.DialOptions(),
			grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(tls)),
			grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
				return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", a)
			}),
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.5, MaxDelay: time.Second},
				MinConnectTimeout: 2 * dialTimeout,
			}))...)
	}
}

// followFleet keeps the fleet's roots at what the intents say, so that the
// federation's authority may rotate.
func followFleet(ctx context.Context, st state.Store, fleet string, above *trust.Set, log *slog.Logger) error {
	for gen := int64(-1); ; {
		if err := st.Wait(ctx, gen); err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // Run ends with nil when its context does
			}
			return err
		}
		s := st.Snapshot()
		gen = s.Generation
		roots := s.Intents["bundle/"+fleet].GetBundle().GetX509Roots()
		if len(roots) == 0 {
			continue
		}
		if err := above.Put(fleet, roots); err != nil {
			log.Error("the fleet's roots are broken; the former ones stay", "alarm", true, "error", err)
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
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
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/trust"
	"github.com/portolan-io/portolan/xds/distribute"
)

const (
	stopTime    = 3 * time.Second
	healthEvery = time.Second
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
	listeners, err := listen(c.Listen)
	if err != nil {
		return err
	}
	defer func() { _ = closeAll(listeners) }()
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
	p, err := wire(c, st, authority, m, log)
	if err != nil {
		return err
	}
	admin, err := listenAdmin(c.AdminSocket)
	if err != nil {
		return err
	}
	return p.run(ctx, listeners, admin)
}

// process is all that runs in this cluster's control plane.
type process struct {
	log    *slog.Logger
	state  state.Store
	own    *source.Source
	health *health.Server
	// nodes serves nodes, upward the federation through tunnels, admin root at the
	// local socket.
	nodes, upward, admin *grpc.Server
	// runs are the parts that run until the context ends.
	runs map[string]func(context.Context) error
}

// wire makes every part, from the state up. Nothing runs yet.
func wire(c *Config, st state.Store, authority *ca.Authority, m membership, log *slog.Logger) (*process, error) {
	session := time.Now().UnixNano()
	own, err := source.New(source.Config{Fetch: ownCertificate(authority), Log: log})
	if err != nil {
		return nil, err
	}
	below, above := trust.NewSet(), trust.NewSet()
	if err := errors.Join(below.Put(authority.TrustDomain(), authority.Bundle()), above.Put(m.Fleet, m.Bundle)); err != nil {
		return nil, err
	}
	mgr, err := manager.New(manager.Config{
		Store: st, Cluster: c.Cluster, CIDR: c.CIDR, NodeTimeout: time.Duration(c.NodeTimeout), Seed: uint64(session), Log: log,
	})
	if err != nil {
		return nil, err
	}
	d, err := dispatch.New(dispatch.Config{
		State: st, Facts: dispatch.Facts{Cluster: c.Cluster, Fleet: m.Fleet, VirtualIPs: m.VirtualIPs},
		CA: authority, Manager: mgr, Peer: trust.PeerID, NodeTimeout: time.Duration(c.NodeTimeout), Log: log,
	})
	if err != nil {
		return nil, err
	}
	p := &process{log: log, state: st, own: own, health: health.NewServer(), upward: grpc.NewServer(), admin: grpc.NewServer()}
	// A joining node has no certificate yet; every RPC but Join asks for one.
	tls := trust.ServerTLS(own.Certificate, below, trust.Options{OptionalClientCert: true})
	p.nodes = grpc.NewServer(append(distribute.ServerOptions(), grpc.Creds(credentials.NewTLS(tls)), grpc.ConnectionTimeout(10*time.Second))...)
	l, err := link.New(link.Config{
		State: st, Cluster: c.Cluster, Fleet: m.Fleet, Session: session, Addresses: c.Federation.Addresses,
		Dial: dialer(c, own, above), Serve: p.upward, Nacks: d.Nacks, NodeTimeout: time.Duration(c.NodeTimeout), Log: log,
	})
	if err != nil {
		return nil, err
	}
	d.Register(p.nodes)
	d.RegisterUpward(p.upward)
	d.RegisterUpward(p.admin)
	for _, s := range []*grpc.Server{p.nodes, p.upward, p.admin} {
		grpc_health_v1.RegisterHealthServer(s, p.health)
	}
	p.runs = map[string]func(context.Context) error{
		"identity": own.Run, "manager": mgr.Run, "dispatch": d.Run, "link": l.Run, "health": p.watchHealth,
		"trust": func(ctx context.Context) error { return followFleet(ctx, st, m.Fleet, above, log) },
	}
	return p, nil
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

// run runs everything; the first error ends all, and so does ctx.
func (p *process) run(ctx context.Context, listeners []net.Listener, admin net.Listener) error {
	if _, err := p.own.Ensure(ctx); err != nil {
		return errors.Join(err, admin.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	for name, run := range p.runs {
		g.Go(func() error {
			if err := run(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	for _, l := range listeners {
		g.Go(func() error { return ignoreStop(p.nodes.Serve(l)) })
	}
	g.Go(func() error { return ignoreStop(p.admin.Serve(admin)) })
	g.Go(func() error {
		<-ctx.Done()
		p.stop()
		return nil
	})
	p.log.Info("serving", "addresses", addresses(listeners))
	err := g.Wait()
	p.log.Info("stopped")
	return err
}

// stop refuses new calls, lets those under way end, and then ends what is left:
// sessions of nodes never end by themselves.
func (p *process) stop() {
	p.health.Shutdown()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.nodes.GracefulStop()
	}()
	t := time.NewTimer(stopTime)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		p.nodes.Stop()
		<-done
	}
	p.upward.Stop()
	p.admin.Stop()
}

// watchHealth says SERVING while the state answers. The federation does not count:
// a cluster without it does its whole job.
func (p *process) watchHealth(ctx context.Context) error {
	t := time.NewTicker(healthEvery)
	defer t.Stop()
	for {
		status := grpc_health_v1.HealthCheckResponse_SERVING
		pctx, cancel := context.WithTimeout(ctx, healthEvery)
		if err := p.state.Ping(pctx); err != nil {
			status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		cancel()
		p.health.SetServingStatus("", status)
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func ignoreStop(err error) error {
	if errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func listen(addrs []string) ([]net.Listener, error) {
	var out []net.Listener
	for _, a := range addrs {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return nil, errors.Join(api.E(api.Precondition, "listen on "+a, "%w", err), closeAll(out))
		}
		out = append(out, l)
	}
	return out, nil
}

// listenAdmin makes the socket for root only, in place of one that a former
// process left behind.
func listenAdmin(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the admin socket's folder: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the former admin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on the admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect the admin socket: %w", err), l.Close())
	}
	return l, nil
}

func closeAll(list []net.Listener) error {
	var errs []error
	for _, l := range list {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

func addresses(list []net.Listener) []string {
	var out []string
	for _, l := range list {
		out = append(out, l.Addr().String())
	}
	return out
}

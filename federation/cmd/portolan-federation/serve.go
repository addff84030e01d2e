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

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

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

const (
	stopTime    = 5 * time.Second
	healthEvery = time.Second
)

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
	listeners, err := listen(c.Listen)
	if err != nil {
		return err
	}
	admin, err := listenAdmin(c.AdminSocket)
	if err != nil {
		return errors.Join(err, closeAll(listeners))
	}
	return p.run(ctx, listeners, admin)
}

// process is all that runs in this replica.
type process struct {
	log    *slog.Logger
	store  store.Store
	own    *source.Source
	health *health.Server
	api    *grpc.Server
	admin  *grpc.Server
	// runs are the parts that run until the context ends.
	runs map[string]func(context.Context) error
}

// wire makes every part, from the store up. Nothing runs yet.
func wire(c *Config, st store.Store, authority *ca.Authority, log *slog.Logger) (*process, error) {
	set := trust.NewSet()
	if err := set.Put(c.Fleet, authority.Bundle()); err != nil {
		return nil, err
	}
	own, err := source.New(source.Config{Fetch: ownCertificate(c, authority), Log: log})
	if err != nil {
		return nil, err
	}
	links, err := fleet.New(fleet.Config{
		Store: st, Replica: c.Replica, Fleet: c.Fleet, VirtualIPs: c.VirtualIPs, FleetBundle: authority.Bundle, Peer: trust.PeerID,
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
	// A replica that starts again must not take itself for the holder it was.
	loops, err := control.New(control.Config{Store: st, Holder: c.Replica + "/" + uuid.NewString(), Log: log})
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
	p := &process{log: log, store: st, own: own, health: health.NewServer(), admin: grpc.NewServer()}
	p.api = newGRPC(srv, own, set)
	srv.Register(p.api)
	links.Register(p.api)
	grpc_health_v1.RegisterHealthServer(p.api, p.health)
	grpc_health_v1.RegisterHealthServer(p.admin, p.health)
	p.runs = map[string]func(context.Context) error{
		"identity": own.Run, "fleet": links.Run, "control": loops.Run, "server": srv.Run, "health": p.watchHealth,
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

// run runs everything; the first error ends all, and so does ctx.
func (p *process) run(ctx context.Context, listeners []net.Listener, admin net.Listener) error {
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
		g.Go(func() error { return ignoreStop(p.api.Serve(l)) })
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
// watches and links never end by themselves.
func (p *process) stop() {
	p.health.Shutdown()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.api.GracefulStop()
	}()
	t := time.NewTimer(stopTime)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		p.api.Stop()
		<-done
	}
	p.admin.Stop()
}

// watchHealth says SERVING while the store answers.
func (p *process) watchHealth(ctx context.Context) error {
	t := time.NewTicker(healthEvery)
	defer t.Stop()
	for {
		state := grpc_health_v1.HealthCheckResponse_SERVING
		pctx, cancel := context.WithTimeout(ctx, healthEvery)
		if err := p.store.Ping(pctx); err != nil {
			state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		cancel()
		if _, ok := p.own.Current(); !ok {
			state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		p.health.SetServingStatus("", state)
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
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
			return nil, errors.Join(fmt.Errorf("listen on %s: %w", a, err), closeAll(out))
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

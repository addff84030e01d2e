// Package process is what the binaries of the control planes have in common: it
// runs their parts and servers, tells their health, and ends them in order. It
// owns listeners while it runs them, and never knows what is served.
//
// Concurrency: a Process is filled, then Run is called once.
package process

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
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/federation/api"
)

// healthEvery is how often a process asks itself whether it can serve.
const healthEvery = time.Second

// Process is all that runs in one process of a control plane.
type Process struct {
	Log *slog.Logger
	// Parts run until the context ends. None may end before it.
	Parts map[string]func(context.Context) error
	// API is what the listeners serve; calls under way get StopTime to end.
	API      *grpc.Server
	StopTime time.Duration
	// Admin serves root at the local socket.
	Admin *grpc.Server
	// Ended are servers that somebody else serves, and that end with this process.
	Ended []*grpc.Server
	// Health is what the servers answer; Check says why they cannot serve.
	Health *health.Server
	Check  func(context.Context) error
}

// Run runs everything on the listeners; the first error ends all, and so does ctx.
// It closes the listeners.
func (p *Process) Run(ctx context.Context, listeners []net.Listener, admin net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	for name, run := range p.Parts {
		g.Go(func() error {
			if err := run(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	addresses := make([]string, 0, len(listeners))
	for _, l := range listeners {
		addresses = append(addresses, l.Addr().String())
		g.Go(func() error { return ignoreStop(p.API.Serve(l)) })
	}
	g.Go(func() error { return ignoreStop(p.Admin.Serve(admin)) })
	g.Go(func() error {
		p.watchHealth(ctx)
		p.stop()
		return nil
	})
	p.Log.Info("serving", "addresses", addresses)
	err := g.Wait()
	p.Log.Info("stopped")
	return err
}

// stop refuses new calls, lets those under way end, and then ends what is left:
// watches and sessions never end by themselves.
func (p *Process) stop() {
	p.Health.Shutdown()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.API.GracefulStop()
	}()
	t := time.NewTimer(p.StopTime)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		p.API.Stop()
		<-done
	}
	for _, s := range p.Ended {
		s.Stop()
	}
	p.Admin.Stop()
}

// watchHealth says SERVING while Check finds nothing, until ctx ends.
func (p *Process) watchHealth(ctx context.Context) {
	t := time.NewTicker(healthEvery)
	defer t.Stop()
	for {
		state := grpc_health_v1.HealthCheckResponse_SERVING
		check, cancel := context.WithTimeout(ctx, healthEvery)
		if err := p.Check(check); err != nil {
			state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		cancel()
		p.Health.SetServingStatus("", state)
		select {
		case <-ctx.Done():
			return
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

// Listen opens all addresses (host:port), or none.
func Listen(addresses []string) ([]net.Listener, error) {
	var out []net.Listener
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return nil, errors.Join(api.E(api.Precondition, "listen on "+a, "%w", err), Close(out))
		}
		out = append(out, l)
	}
	return out, nil
}

// ListenAdmin makes a Unix socket for root only, in place of one that a former
// process left behind.
func ListenAdmin(path string) (net.Listener, error) {
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

// Close closes listeners; those that are closed already are no error.
func Close(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

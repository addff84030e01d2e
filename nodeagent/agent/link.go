package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
)

// linkLoop holds the connection on which reports and the tunnel go; it comes
// back with full jitter.
func (a *Agent) linkLoop(ctx context.Context) {
	for attempt := 0; ; attempt++ {
		began := time.Now()
		err := a.linkOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > 10*time.Second {
			attempt = 0
		}
		wait := time.Duration(a.cfg.Rand() * float64(min(100*time.Millisecond<<min(attempt, 6), 5*time.Second)))
		a.log.Warn("link to the cluster ended", "error", err, "retry_in", wait)
		if !sleep(ctx, wait) {
			return
		}
	}
}

func (a *Agent) linkOnce(ctx context.Context) error {
	conn, err := a.cfg.Upstream.Dial(ctx, a.credentials())
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer func() { _ = conn.Close() }()
	a.mu.Lock()
	a.link = conn
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.link = nil
		a.mu.Unlock()
	}()
	client := nodev1.NewNodeServiceClient(conn)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.reportLoop(gctx, client) })
	g.Go(func() error { return a.tunnelLoop(gctx, client) })
	return g.Wait()
}

// tunnelLoop serves the runtime service upward.
func (a *Agent) tunnelLoop(ctx context.Context, client nodev1.NodeServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Tunnel(ctx)
	if err != nil {
		return fmt.Errorf("open tunnel: %w", err)
	}
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(api.MaxMessageBytes))
	defer srv.Stop()
	portolanv1.RegisterRuntimeServiceServer(srv, &runtimeServer{a: a})
	if err := tunnel.Serve(ctx, stream, srv); err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	return errors.New("tunnel: closed by the cluster")
}

// reportLoop sends what changed: full first, then deltas, a keepalive when there
// is nothing, and full again when the cluster saw a gap.
func (a *Agent) reportLoop(ctx context.Context, client nodev1.NodeServiceClient) error {
	if !a.settled(ctx) {
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Report(ctx)
	if err != nil {
		return fmt.Errorf("open report stream: %w", err)
	}
	a.board.reopened()
	var resync atomic.Bool
	ended := make(chan error, 1)
	go func() {
		for {
			ack, err := stream.Recv()
			if err != nil {
				ended <- fmt.Errorf("report stream: %w", err)
				return
			}
			a.board.acked(ack.GetSequence())
			if ack.GetResync() {
				resync.Store(true)
			}
		}
	}()
	keepalive := time.NewTicker(a.cfg.Keepalive)
	defer keepalive.Stop()
	resync.Store(true) // a stream begins with all there is
	for sequence := int64(1); ; sequence++ {
		changed := a.board.wait()
		if err := stream.Send(a.board.report(a.session, sequence, resync.Swap(false))); err != nil {
			cancel()
			return <-ended
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			return err
		case <-changed:
			if !sleep(ctx, a.cfg.Coalesce) {
				return ctx.Err()
			}
		case <-keepalive.C:
		}
	}
}

// settled waits, a little, until what ran before is taken over, so that the first
// full report does not claim that nothing runs.
func (a *Agent) settled(ctx context.Context) bool {
	for range 60 {
		a.mu.Lock()
		ok := a.adopted
		for id, r := range a.runners {
			_, seen := a.board.get(id)
			ok = ok && (seen || !r.launched)
		}
		a.mu.Unlock()
		if ok {
			return true
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return false
		}
	}
	return ctx.Err() == nil
}

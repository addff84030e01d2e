package process_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/process"
)

type rig struct {
	p         *process.Process
	listeners []net.Listener
	admin     net.Listener
	health    grpc_health_v1.HealthClient
	sick      atomic.Bool
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{}
	r.p = &process.Process{
		Log: slog.New(slog.DiscardHandler), API: grpc.NewServer(), Admin: grpc.NewServer(), Health: health.NewServer(), StopTime: 50 * time.Millisecond,
		Parts: map[string]func(context.Context) error{"idle": func(ctx context.Context) error { <-ctx.Done(); return nil }},
		Check: func(context.Context) error {
			if r.sick.Load() {
				return errors.New("sick")
			}
			return nil
		},
	}
	for _, s := range []*grpc.Server{r.p.API, r.p.Admin} {
		grpc_health_v1.RegisterHealthServer(s, r.p.Health)
	}
	dir, err := os.MkdirTemp("", "process")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "deep", "admin.sock")
	if r.admin, err = process.ListenAdmin(socket); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket has %v, %v", st, err)
	}
	if r.listeners, err = process.Listen([]string{"127.0.0.1:0", "127.0.0.1:0"}); err != nil {
		t.Fatal(err)
	}
	cc, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	r.health = grpc_health_v1.NewHealthClient(cc)
	return r
}

func TestRunTellsHealthAndEndsWatches(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- r.p.Run(ctx, r.listeners, r.admin) }()
	watch, err := r.health.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	await := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for {
			m, err := watch.Recv()
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if m.GetStatus() == want {
				return
			}
		}
	}
	await(grpc_health_v1.HealthCheckResponse_SERVING)
	r.sick.Store(true)
	await(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	// A watch at the API never ends by itself: stopping must not wait for it.
	cc, err := grpc.NewClient(r.listeners[1].Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cc.Close() }()
	held, err := grpc_health_v1.NewHealthClient(cc).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := held.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c, err := net.DialTimeout("tcp", r.listeners[0].Addr().String(), time.Second); err == nil {
		_ = c.Close()
		t.Error("it listens after its end")
	}
}

func TestFirstErrorEndsAll(t *testing.T) {
	r := newRig(t)
	broken := errors.New("broken")
	r.p.Parts["part"] = func(context.Context) error { return broken }
	if err := r.p.Run(t.Context(), r.listeners, r.admin); !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "part: ") {
		t.Errorf("error %v, want the part's, with its name", err)
	}
}

func TestListenAllOrNone(t *testing.T) {
	taken, err := process.Listen([]string{"127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = process.Close(taken) }()
	free, err := process.Listen([]string{"127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	address := free[0].Addr().String()
	if err := process.Close(append(free, free...)); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if _, err := process.Listen([]string{address, taken[0].Addr().String()}); api.KindOf(err) != api.Precondition {
		t.Errorf("a taken address gave %v", err)
	}
	again, err := process.Listen([]string{address})
	if err != nil {
		t.Fatalf("the first address was not let go: %v", err)
	}
	_ = process.Close(again)
}

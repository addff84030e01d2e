package tunnel

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// upper is a plane to which one lower plane dials a tunnel.
type upper struct {
	linkv1.UnimplementedLinkServiceServer
	conns Conns
	life  context.Context
}

func (u *upper) Tunnel(s grpc.BidiStreamingServer[linkv1.Chunk, linkv1.Chunk]) error {
	if err := u.conns.Handle(u.life, "eu", s); err != nil {
		return err
	}
	return context.Cause(u.life)
}

type lower struct {
	portolanv1.UnimplementedRuntimeServiceServer
	bytes int
}

func (l lower) ListEvents(context.Context, *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	return &portolanv1.ListEventsResponse{Events: []*portolanv1.Event{{Message: strings.Repeat("x", l.bytes)}}}, nil
}

// open dials a tunnel and serves on it; ended gives how that ended.
func open(life context.Context, t *testing.T, size int) (u *upper, ended chan error) {
	t.Helper()
	u = &upper{life: life}
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	linkv1.RegisterLinkServiceServer(server, u)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	cc, err := grpc.NewClient("passthrough:///upper", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	stream, err := linkv1.NewLinkServiceClient(cc).Tunnel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	served := grpc.NewServer()
	portolanv1.RegisterRuntimeServiceServer(served, lower{bytes: size})
	t.Cleanup(served.Stop)
	ended = make(chan error, 1)
	go func() { ended <- Serve(t.Context(), stream, served) }()
	synctest.Wait()
	return u, ended
}

func TestLargeAnswersPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 10 << 20 // grpc-go's own limit is 4 MiB
		u, _ := open(t.Context(), t, size)
		cc, ok := u.conns.Get("eu")
		if !ok {
			t.Fatal("no tunnel")
		}
		got, err := portolanv1.NewRuntimeServiceClient(cc).ListEvents(t.Context(), &portolanv1.ListEventsRequest{})
		if err != nil || len(got.GetEvents()[0].GetMessage()) != size {
			t.Fatal(err)
		}
	})
}

func TestTunnelEndsFromAbove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		life, cut := context.WithCancelCause(t.Context())
		u, ended := open(life, t, 1)
		cut(api.E(api.Denied, "serve cluster eu", "it was taken out of the fleet"))
		synctest.Wait()
		select {
		case err := <-ended:
			if status.Code(err) != codes.PermissionDenied {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the tunnel goes on")
		}
		if len(u.conns.Keys()) != 0 {
			t.Error("it is still there to be used")
		}
	})
}

// mute is a stream on which nothing ever comes, and which does not end.
type mute struct{ ctx context.Context }

func (mute) Send(*linkv1.Chunk) error { return nil }
func (m mute) Recv() (*linkv1.Chunk, error) {
	<-m.ctx.Done()
	return nil, m.ctx.Err()
}
func (m mute) Context() context.Context { return m.ctx }

func TestEndingDoesNotWaitForTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		served := grpc.NewServer()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, mute{t.Context()}, served) }()
		synctest.Wait()
		began := time.Now()
		cancel()
		err := <-ended
		served.Stop()
		if err != nil || time.Since(began) > 0 {
			t.Errorf("this side closed it; after %v it ended with %v", time.Since(began), err)
		}
		if err := Serve(t.Context(), mute{t.Context()}, served); err != nil || time.Since(began) > 0 {
			t.Errorf("by a server that was stopped before it was served for %v, and ended with %v", time.Since(began), err)
		}
	})
}

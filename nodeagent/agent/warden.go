package agent

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// WardenClient is the Warden on its Unix socket.
type WardenClient struct{ conn *grpc.ClientConn }

// NewWardenClient makes a client; it connects when it is used. Options come after
// its own: a test in virtual time dials memory instead of the socket.
func NewWardenClient(socket string, opts ...grpc.DialOption) (*WardenClient, error) {
	conn, err := grpc.NewClient("unix://"+socket, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
	}, opts...)...)
	if err != nil {
		return nil, err
	}
	return &WardenClient{conn}, nil
}

// Close ends it.
func (w *WardenClient) Close() error { return w.conn.Close() }

// Wake implements Warden.
func (w *WardenClient) Wake(ctx context.Context) error {
	_, err := nodev1.NewWardenServiceClient(w.conn).Wake(ctx, &nodev1.WakeRequest{})
	return err
}

// Watch implements Warden.
func (w *WardenClient) Watch(ctx context.Context, fn func(*nodev1.WardenStatus)) error {
	stream, err := nodev1.NewWardenServiceClient(w.conn).WatchStatus(ctx, &nodev1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	for {
		s, err := stream.Recv()
		if err != nil {
			return err
		}
		fn(s)
	}
}

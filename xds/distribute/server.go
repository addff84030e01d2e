package distribute

import (
	"context"
	"log/slog"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	delta "github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Cache *Cache
	// Identify gives the view of a stream from its peer (mTLS certificate, socket);
	// n is what the consumer says of itself and is not to be believed. Its error
	// ends the stream.
	Identify func(ctx context.Context, n *corev3.Node) (view string, err error)
	Log      *slog.Logger
}

// Server serves the cache as aggregated delta discovery and nothing else.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	ctx context.Context //nolint:containedctx // ends the streams, as go-control-plane's server wants it
	cfg ServerConfig
}

// NewServer makes a server whose streams end with ctx.
func NewServer(ctx context.Context, cfg ServerConfig) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{ctx: ctx, cfg: cfg}
}

// Register adds the discovery service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(r, s)
}

// DeltaAggregatedResources runs one stream. Each has a stream handler of
// go-control-plane of its own, behind which the session is cache and callbacks.
// It ends with the stream's context, which may end before the connection does,
// and then gives the context's cause.
func (s *Server) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	sess := newSession(s, stream)
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	defer context.AfterFunc(stream.Context(), cancel)()
	err := delta.NewServer(ctx, sess, sess).DeltaStreamHandler(stream, resource.AnyType)
	switch {
	case err == nil && s.ctx.Err() != nil:
		return status.Error(codes.Unavailable, "server is stopping")
	case err == nil && stream.Context().Err() != nil:
		return context.Cause(stream.Context())
	}
	return err
}

// StreamAggregatedResources is the state-of-the-world form, which is not served.
func (s *Server) StreamAggregatedResources(discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "only incremental (delta) discovery is served")
}

// ServerOptions are gRPC options for a server of this protocol on a network:
// keepalive that notices a dead peer within seconds, and message limits.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
		grpc.MaxRecvMsgSize(api.MaxMessageBytes),
	}
}

// DialOptions are the client's side of ServerOptions. grpc-go raises a shorter
// ping interval of a client to 10 s.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)),
	}
}

const (
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
)

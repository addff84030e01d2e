// Package workloadapi serves the SPIFFE Workload API to one workload: its X.509
// SVID with the key, and the bundles it may trust, renewed on the open stream.
// It owns the wire format and its rules. It never decides who the caller is: a
// Server is bound to one workload's Source, and only that workload can reach its
// socket. JWT and WIT SVIDs are not issued; their methods answer Unimplemented.
//
// Concurrency: a Server is safe for concurrent use. Streams are bounded per
// connection.
package workloadapi

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"log/slog"
	"maps"
	"net"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
)

const (
	// header is required by the Workload Endpoint standard, section 4, so that a
	// confused deputy (a fetcher of URLs) cannot call.
	header = "workload.spiffe.io"

	maxStreams = 64
	maxMessage = 64 << 10
)

// SVID is an identity with its key.
type SVID struct {
	// ID is the SPIFFE URI.
	ID string
	// Chain is DER, leaf first.
	Chain [][]byte
	Key   crypto.Signer
	// Hint says what it is for, when there is more than one; may be empty.
	Hint string
}

// Update is all that a workload may know. It must not be changed after it was
// handed out.
type Update struct {
	// SVIDs, the default first. None answers PermissionDenied.
	SVIDs []SVID
	// TrustDomain of the workload; its roots are in Bundles.
	TrustDomain string
	// Bundles are the DER roots of each trust domain by name, the workload's own
	// included.
	Bundles map[string][]*x509.Certificate
}

// Source gives the present Update.
type Source interface {
	// Current is false while there is no identity.
	Current() (Update, bool)
	// Changed gives a channel that is closed at the next change. It is taken
	// before Current.
	Changed() <-chan struct{}
}

// Config of a Server.
type Config struct {
	Source Source
	// Log may be nil.
	Log *slog.Logger
}

// Server serves one workload.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	source Source
	log    *slog.Logger
}

// New makes a server; Serve runs it, or Register puts it into one of the
// caller's.
func New(cfg Config) (*Server, error) {
	if cfg.Source == nil {
		return nil, api.E(api.Invalid, "make a workload API server", "no source")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{source: cfg.Source, log: cfg.Log}, nil
}

// Register puts the service into a gRPC server, which must have ServerOptions.
func (s *Server) Register(r grpc.ServiceRegistrar) { workload.RegisterSpiffeWorkloadAPIServer(r, s) }

// ServerOptions are what a gRPC server of this service needs: the header's check
// and bounds.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := checkHeader(ss.Context()); err != nil {
				return err
			}
			return h(srv, ss)
		}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxMessage),
	}
}

// Serve serves on the listener, which it closes, until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(ServerOptions()...)
	s.Register(g)
	// Streams last as long as their callers: a graceful stop would wait for them.
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	err := g.Serve(l)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return api.E(api.Internal, "serve the workload API", "%w", err)
	}
	return nil
}

func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(header); len(v) == 1 && v[0] == "true" {
		return nil
	}
	return status.Error(codes.InvalidArgument, "security header missing from request: workload.spiffe.io must be true")
}

// FetchX509SVID sends the identity, and again at each change.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(stream.Context(), s.source, func(u Update) error {
		if len(u.SVIDs) == 0 {
			return errNoIdentity
		}
		resp, err := svidResponse(u)
		if err != nil {
			s.log.Error("workload identity is unusable", slog.Any("error", err))
			return status.Error(codes.Internal, "the identity is unusable")
		}
		return stream.Send(resp)
	})
}

// FetchX509Bundles sends the roots of each trust domain, and again at each change.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	var last map[string][]byte
	return follow(stream.Context(), s.source, func(u Update) error {
		bundles := make(map[string][]byte, len(u.Bundles))
		for td, roots := range u.Bundles {
			bundles["spiffe://"+td] = concat(roots)
		}
		if last != nil && maps.EqualFunc(last, bundles, bytes.Equal) {
			return nil
		}
		last = bundles
		return stream.Send(&workload.X509BundlesResponse{Bundles: bundles})
	})
}

// errNoIdentity has the code that the Workload API standard names for a caller
// that is entitled to no identity; clients try again.
var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")

// follow calls send with the present update and with each later one.
func follow(ctx context.Context, src Source, send func(Update) error) error {
	for {
		changed := src.Changed()
		u, ok := src.Current()
		if !ok {
			return errNoIdentity
		}
		if err := send(u); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func svidResponse(u Update) (*workload.X509SVIDResponse, error) {
	const doing = "encode an identity"
	own, ok := u.Bundles[u.TrustDomain]
	if !ok {
		return nil, api.E(api.Internal, doing, "no roots of its own trust domain %q", u.TrustDomain)
	}
	resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	for _, td := range slices.Sorted(maps.Keys(u.Bundles)) {
		if td != u.TrustDomain {
			resp.FederatedBundles["spiffe://"+td] = concat(u.Bundles[td])
		}
	}
	for _, v := range u.SVIDs {
		key, err := x509.MarshalPKCS8PrivateKey(v.Key)
		if err != nil {
			return nil, api.E(api.Internal, doing, "%w", err)
		}
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: v.ID, X509Svid: bytes.Join(v.Chain, nil), X509SvidKey: key, Bundle: concat(own), Hint: v.Hint,
		})
	}
	return resp, nil
}

func concat(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, c.Raw...)
	}
	return out
}

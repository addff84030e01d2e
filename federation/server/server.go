// Package server is the tenants' API of the federation: who is calling, may
// they, is it admitted, and then one transaction that holds the change, its
// audit row and its revisions. It owns the records that users write (tenants,
// clusters, role bindings, workloads and their revisions, services, routes,
// policy bundles), join tokens, virtual IPs, request results and audit entries.
// It never decides where anything runs and never writes what federation/control
// and federation/fleet own; their records are joined to objects when these are
// read. Two records it shares, at moments that exclude each other: a join token is
// marked used, and a cluster's trust bundle made, by federation/fleet at Join; both
// are deleted here, with the cluster.
//
// Stored with the object although part of status, because only this package
// writes them: Service.status.virtual_ip and hostname,
// Workload.status.current_revision, PolicyBundle.status.digest.
//
// Concurrency: a Server is safe for concurrent use. Every call is its own
// transaction; nothing is kept between calls but bounded caches.
package server

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"buf.build/go/protovalidate"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/policy"
)

// Limits of one server process.
const (
	maxUnaryPerCaller   = 64
	maxStreamsPerCaller = 32
	maxCallers          = 4096 // whose limits are remembered
	unaryTimeout        = 20 * time.Second
	requestResultLife   = 24 * time.Hour
	maintainEvery       = time.Minute
	maxTransactionTries = 5
	virtualIPQuarantine = 24 * time.Hour
	maxOldRevisions     = 20
	clusterCallTimeout  = 3 * time.Second
	maxClusterCalls     = 16 // at a time for one request
)

// Clusters gives the connections over the tunnels that clusters dialled to this
// replica. federation/fleet has them.
type Clusters interface {
	Conn(cluster string) (grpc.ClientConnInterface, bool)
}

// PolicyChecker compiles a bundle and runs its tests. Each violation says file
// and line. policy/opa has it.
type PolicyChecker interface {
	Check(ctx context.Context, b policy.Bundle) []api.Violation
}

// AdmissionCompiler compiles the fleet's admission bundles into what decides.
// policy/opa has it. With no bundle at all it is not asked: nothing is admitted.
type AdmissionCompiler interface {
	CompileAdmission(ctx context.Context, bundles []policy.Bundle) (policy.Admitter, error)
}

// Resolver finds the digest of an image. The server has checked the registry
// against its allow-list before.
type Resolver interface {
	// Resolve gives registry/repository@sha256:…. An image that does not exist is
	// an error of kind api.NotFound; a registry that does not answer is Unavailable.
	Resolve(ctx context.Context, image string) (string, error)
}

// Explainer runs the deciding function of placement on a snapshot, as it is or as
// it would be. federation/control has it.
type Explainer interface {
	Explain(r store.Reader, w *portolanv1.Workload) (*portolanv1.ExplainWorkloadResponse, error)
	// Plan leaves revision, token and admission of its answer to the caller.
	Plan(r store.Reader, what api.WhatIf) (*portolanv1.PlanResponse, error)
}

// TokenMinter makes the opaque token of a joining cluster. identity/attest has it.
type TokenMinter interface {
	MintJoinToken() (string, error)
}

// Config of a Server.
type Config struct {
	// Store holds all state. Required.
	Store store.Store
	// Fleet is the trust domain of the fleet. Required.
	Fleet string
	// Log gets what a request's answer must not tell. Required.
	Log *slog.Logger
	// Identify gives the caller; the URI of the verified peer certificate when nil.
	// An error of kind api.Unknown means that there is none.
	Identify func(ctx context.Context) (identity.ID, error)
	// Admission and Policies are the policy engine. Required.
	Admission AdmissionCompiler
	Policies  PolicyChecker
	// Resolver of images. Required.
	Resolver Resolver
	// Registries from which images may come, host or host:port. Empty: none.
	Registries []string
	// VirtualIPs is the range of the services' addresses. Required, IPv4, at most a /8.
	VirtualIPs netip.Prefix
	// Clusters, Explainer and Tokens may be nil; what needs them is Unavailable then.
	Clusters  Clusters
	Explainer Explainer
	Tokens    TokenMinter
	// ControlLoops are the names of the leases whose progress WaitConverged waits
	// for; "control/place" when empty.
	ControlLoops []string
	// ClusterLease names the lease row that a cluster's reports renew, whose progress
	// is the revision that the whole cluster has applied; "cluster/<id>" when nil.
	ClusterLease func(cluster string) string
	// ClusterLeaseTTL is for how long a report renews that row: its end less this is
	// when the cluster was heard last. 3 s when 0.
	ClusterLeaseTTL time.Duration
	// JoinTokenLife is how long a join token is valid; 10 minutes when 0, never more.
	JoinTokenLife time.Duration
	// NewUID makes an object's uid; a random UUID when nil.
	NewUID func() string
}

// SetDefaults fills in what was left out.
func (c *Config) SetDefaults() {
	if c.Identify == nil {
		c.Identify = peerIdentity
	}
	if len(c.ControlLoops) == 0 {
		c.ControlLoops = []string{"control/place"}
	}
	if c.ClusterLease == nil {
		c.ClusterLease = func(cluster string) string { return "cluster/" + cluster }
	}
	if c.ClusterLeaseTTL <= 0 {
		c.ClusterLeaseTTL = 3 * time.Second
	}
	if c.JoinTokenLife <= 0 || c.JoinTokenLife > 10*time.Minute {
		c.JoinTokenLife = 10 * time.Minute
	}
	if c.NewUID == nil {
		c.NewUID = uuid.NewString
	}
}

// Validate returns all faults joined.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("federation/server config: "+what))
		}
	}
	need(c.Store != nil, "store is required")
	need(c.Fleet != "", "fleet is required")
	need(c.Log != nil, "log is required")
	need(c.Admission != nil && c.Policies != nil, "a policy engine is required")
	need(c.Resolver != nil, "a resolver is required")
	need(c.VirtualIPs.IsValid() && c.VirtualIPs.Addr().Is4() && c.VirtualIPs.Bits() >= 8 && c.VirtualIPs.Bits() <= 30,
		"virtual IPs must be an IPv4 range between /8 and /30")
	return errors.Join(errs...)
}

// progress reads what lease rows say, by name.
func (s *Server) progress(ctx context.Context) (map[string]int64, error) {
	leases, err := s.cfg.Store.Leases(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]int64, len(leases))
	for _, l := range leases {
		out[l.Name] = l.Progress
	}
	return out, nil
}

// Server serves the API.
type Server struct {
	cfg       Config
	kinds     map[store.Kind]*kindInfo
	validator protovalidate.Validator
	admission admissionCache
	limits    limiter
	auditHint atomic.Int64
}

// New makes a server. It does no I/O.
func New(cfg Config) (*Server, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	v, err := protovalidate.New()
	if err != nil {
		return nil, api.E(api.Internal, "compile the protos' constraints", "%w", err)
	}
	cfg.VirtualIPs = cfg.VirtualIPs.Masked()
	return &Server{cfg: cfg, kinds: kindTable(), validator: v, limits: newLimiter()}, nil
}

// Register registers every service of portolan.v1.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	portolanv1.RegisterTenantServiceServer(r, &tenantService{s: s})
	portolanv1.RegisterClusterServiceServer(r, &clusterService{s: s})
	portolanv1.RegisterWorkloadServiceServer(r, &workloadService{s: s})
	portolanv1.RegisterMeshServiceServer(r, &meshService{s: s})
	portolanv1.RegisterPolicyServiceServer(r, &policyService{s: s})
	portolanv1.RegisterAuditServiceServer(r, &auditService{s: s})
	portolanv1.RegisterWatchServiceServer(r, &watchService{s: s})
	portolanv1.RegisterConvergenceServiceServer(r, &convergenceService{s: s})
	portolanv1.RegisterRuntimeServiceServer(r, &runtimeService{s: s})
}

// ServerOptions are the limits and interceptors for the gRPC server that serves
// this package and federation/fleet on one port.
func (s *Server) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(api.MaxMessageBytes),
		grpc.MaxSendMsgSize(api.MaxMessageBytes),
		grpc.MaxConcurrentStreams(1024),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(s.UnaryInterceptor),
		grpc.ChainStreamInterceptor(s.StreamInterceptor),
	}
}

// Run clears what expired: request results, virtual IPs, join tokens. It blocks
// until ctx ends, and then returns nil.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		t := time.NewTicker(maintainEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-t.C:
			}
			if err := s.maintain(ctx, time.Now()); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("clearing expired records failed", "error", err)
			}
		}
	})
	return g.Wait()
}

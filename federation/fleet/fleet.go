// Package fleet is the federation's side towards its clusters: it serves each
// cluster its intents over the incremental protocol, redeems join tokens, takes
// status reports, decides which clusters are lost, and holds the tunnels through
// which lower planes are read. It never decides where anything runs and never
// writes what a user or a control loop wrote: its own records are ClusterStatus,
// PlacementStatus, ServiceExport and Nack; at a join it writes the TrustBundle and
// marks the JoinToken used, which are the server's otherwise.
//
// Concurrency: everything exported is safe for concurrent use. One goroutine owns
// the intents and who is a member (serve), one the decision about lost clusters
// and what is left of deleted ones (watchLiveness), and each report stream has its
// own.
package fleet

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/throttle"
	"github.com/portolan-io/portolan/federation/api/tunnel"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/xds/distribute"
)

// DefaultLivenessTimeout is how long a cluster may be silent.
const DefaultLivenessTimeout = 3 * time.Second

// Config configures a Fleet.
type Config struct {
	Store store.Store
	// Replica is the ID of this federation replica: holder of the lease under which
	// one replica decides which clusters are lost.
	Replica string
	// Fleet is the fleet's trust domain.
	Fleet string
	// VirtualIPs is the range of virtual IPs of the fleet, CIDR.
	VirtualIPs string
	// FleetBundle gives the PEM roots of the fleet's own trust domain.
	FleetBundle func() []byte
	// Peer gives the verified identity of a caller.
	Peer func(ctx context.Context) (identity.ID, error)
	// OnBundles hears of the roots per trust domain, the fleet's own included, at
	// the first snapshot and whenever they change; may be nil. Given to
	// identity/trust, it is how callers are verified.
	OnBundles func(bundles map[string][]byte)
	// LivenessTimeout is how long a cluster may be silent before it is lost; 3 s when
	// 0.
	LivenessTimeout time.Duration
	Log             *slog.Logger
}

// SetDefaults fills what was left out.
func (c *Config) SetDefaults() {
	if c.LivenessTimeout <= 0 {
		c.LivenessTimeout = DefaultLivenessTimeout
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.OnBundles == nil {
		c.OnBundles = func(map[string][]byte) {}
	}
}

// Validate names every fault.
func (c *Config) Validate() error {
	var errs []error
	for _, f := range []struct {
		missing bool
		name    string
	}{
		{c.Store == nil, "Store"},
		{c.Replica == "", "Replica"},
		{c.Fleet == "", "Fleet"},
		{c.FleetBundle == nil, "FleetBundle"},
		{c.Peer == nil, "Peer"},
	} {
		if f.missing {
			errs = append(errs, errors.New(f.name+" is required"))
		}
	}
	return errors.Join(errs...)
}

// mirrored are the kinds that this package reads.
func mirrored() []store.Kind {
	return append(append([]store.Kind{}, derivedKinds...), store.ClusterStatus, store.Nack)
}

// Fleet serves the clusters.
type Fleet struct {
	linkv1.UnimplementedLinkServiceServer
	cfg          Config
	log          *slog.Logger
	mirror       *store.Mirror
	cache        *distribute.Cache
	tunnels      tunnel.Conns
	strangers    *throttle.Throttle
	model        atomic.Pointer[model]
	rootsChanged chan struct{}
	// stopped ends what the gRPC server began, with a reason.
	stopped context.Context //nolint:containedctx // lifetime of streams that others' servers run
	stop    context.CancelCauseFunc

	mu sync.Mutex
	// members are the clusters that may be served, by ID.
	members map[string]*member
	// sessions holds the newest report stream of each cluster at this replica.
	sessions map[string]*session
}

// New makes a Fleet; Run starts it.
func New(cfg Config) (*Fleet, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, api.E(api.Invalid, "configure fleet", "%w", err)
	}
	f := &Fleet{
		cfg: cfg, log: cfg.Log, mirror: store.NewMirror(cfg.Store, mirrored()),
		cache: distribute.NewCache(distribute.CacheConfig{Log: cfg.Log}), rootsChanged: make(chan struct{}, 1), sessions: map[string]*session{},
		members: map[string]*member{}, strangers: throttle.New(),
	}
	f.model.Store(&model{view: f.mirror.Snapshot(), tenants: map[string]*tenantView{}})
	f.stopped, f.stop = context.WithCancelCause(context.Background())
	return f, nil
}

// Register adds the services for clusters to a server: delta discovery and
// LinkService.
func (f *Fleet) Register(r grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(r, discoveryServer{f: f, Server: distribute.NewServer(f.stopped, distribute.ServerConfig{
		Cache: f.cache, Log: f.log,
		Identify: func(ctx context.Context, _ *corev3.Node) (string, error) { return viewOf(ctx) },
	})})
	linkv1.RegisterLinkServiceServer(r, f)
}

// Run serves until ctx ends. Streams are answered only while it runs.
func (f *Fleet) Run(ctx context.Context) error {
	defer f.stop(api.E(api.Unavailable, "serve clusters", "this replica is stopping"))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return f.mirror.Run(ctx) })
	g.Go(func() error { return f.serve(ctx) })
	g.Go(func() error { return f.watchLiveness(ctx) })
	return g.Wait()
}

// Conn gives a connection to a cluster's own services (RuntimeService,
// ClusterAdminService), through its tunnel to this replica.
func (f *Fleet) Conn(cluster string) (grpc.ClientConnInterface, bool) { return f.tunnels.Get(cluster) }

// Connected lists the clusters whose tunnel to this replica is open.
func (f *Fleet) Connected() []string { return f.tunnels.Keys() }

// Status gives what a cluster's subscriber has acknowledged at this replica.
func (f *Fleet) Status(cluster string) (distribute.Status, bool) { return f.cache.Status(cluster) }

// Revision is the store revision that clusters of this replica are served.
func (f *Fleet) Revision() int64 { return f.model.Load().view.Revision }

// bundles gives the PEM roots of every trust domain of the fleet. Those of
// clusters that were taken out of it are not among them.
func bundles(v *store.View, fleet string, roots []byte) map[string][]byte {
	out := map[string][]byte{fleet: roots}
	for name, b := range store.All[*linkv1.TrustBundle](v, store.TrustBundle) {
		if _, ok := v.Get(store.Cluster, api.ClusterName(b.GetCluster())); ok && name == b.GetTrustDomain() {
			out[name] = b.GetX509Roots()
		}
	}
	return out
}

// RootsChanged says that FleetBundle gives something new.
func (f *Fleet) RootsChanged() {
	select {
	case f.rootsChanged <- struct{}{}:
	default:
	}
}

// Tunnel implements linkv1.LinkServiceServer.
func (f *Fleet) Tunnel(s grpc.BidiStreamingServer[linkv1.Chunk, linkv1.Chunk]) error {
	m, err := f.member(s.Context())
	if err != nil {
		return err
	}
	f.log.Info("tunnel opened", "cluster", m.id)
	defer f.log.Info("tunnel closed", "cluster", m.id)
	if err := f.tunnels.Handle(m.in, m.id, s); err != nil {
		return err
	}
	return context.Cause(m.in)
}

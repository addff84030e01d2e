// Package dispatch is a cluster's side towards its nodes and its operators: it
// serves each node its directives over the incremental protocol, takes node
// reports into the state, gives nodes and replicas their certificates, and
// answers what is asked of the cluster through its tunnels, reading through to
// nodes. It never decides what runs where: the manager does, and the two meet in
// the state. It writes the observed side of nodes and join tokens, nothing else.
//
// Concurrency: everything exported is safe for concurrent use. One goroutine owns
// the directives (serve), and ends the streams of nodes that are no longer who they
// were; each report stream has its own.
package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/throttle"
	"github.com/portolan-io/portolan/federation/api/tunnel"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Defaults and bounds.
const (
	DefaultNodeTimeout = 3 * time.Second
	DefaultTokenTTL    = 10 * time.Minute
	// coalesce is the least time between two recomputations.
	coalesce = 5 * time.Millisecond
	// touchEvery is how often, at most, a sign of life that says nothing else is
	// noted.
	touchEvery = 250 * time.Millisecond
)

// Authority signs for the cluster's trust domain. (*ca.Authority) is one.
type Authority interface {
	SignCSR(ctx context.Context, csrDER []byte, req ca.Request) (chain [][]byte, err error)
	Bundle() []byte
	NewToken() (token, hash string)
}

// Manager owns the records of nodes and the ring of events. (*manager.Manager) is
// one.
type Manager interface {
	Nodes
	Events
}

// Nodes writes the records of nodes.
type Nodes interface {
	// RegisterNode cuts the node's range and writes its record. The key that joined is
	// the only one that counts afterwards.
	RegisterNode(ctx context.Context, node string, facts *nodev1.NodeFacts, keyHash []byte) (*clusterv1.Node, error)
	// SetMode changes the mode of a node, or of a pool's nodes when node is empty; a
	// deadline of zero is none.
	SetMode(ctx context.Context, node, pool string, mode portolanv1.NodeMode, deadline time.Time) error
	// RenewNode lets another key count beside it, for which there is a certificate
	// until expire.
	RenewNode(ctx context.Context, node string, keyHash []byte, expire time.Time) error
	// DeleteNode takes a node out: a lost one, or any when forced.
	DeleteNode(ctx context.Context, node string, force bool) error
}

// Events is the ring of the newest events.
type Events interface {
	AddEvents(events ...*portolanv1.Event)
	// Events gives the newest events, oldest first.
	Events() []*portolanv1.Event
}

// Config configures a Dispatch.
type Config struct {
	State   state.Store
	Facts   Facts
	CA      Authority
	Manager Manager
	// Peer gives the verified identity of a caller.
	Peer func(ctx context.Context) (identity.ID, error)
	// Key gives the SHA-256 of the public key that a caller showed; of its TLS
	// certificate when nil.
	Key func(ctx context.Context) ([]byte, error)
	// Overhead of a replica beside its containers, the same as the manager's;
	// schedule.DefaultOverhead when nil.
	Overhead *api.Resources
	// NodeTimeout bounds how long, after the start, nodes are waited for before
	// anything is served; 3 s when 0.
	NodeTimeout time.Duration
	Log         *slog.Logger
}

// SetDefaults fills what was left out.
func (c *Config) SetDefaults() {
	if c.NodeTimeout <= 0 {
		c.NodeTimeout = DefaultNodeTimeout
	}
	if c.Overhead == nil {
		o := schedule.DefaultOverhead
		c.Overhead = &o
	}
	if c.Key == nil {
		c.Key = certificateKey
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate names every fault.
func (c *Config) Validate() error {
	var errs []error
	for _, f := range []struct {
		missing bool
		name    string
	}{
		{c.State == nil, "State"},
		{c.Facts.Cluster == "", "Facts.Cluster"},
		{c.Facts.Fleet == "", "Facts.Fleet"},
		{c.CA == nil, "CA"},
		{c.Manager == nil, "Manager"},
		{c.Peer == nil, "Peer"},
	} {
		if f.missing {
			errs = append(errs, errors.New(f.name+" is required"))
		}
	}
	return errors.Join(errs...)
}

// Dispatch serves the nodes of a cluster.
type Dispatch struct {
	nodev1.UnimplementedNodeServiceServer
	cfg     Config
	log     *slog.Logger
	cache   *distribute.Cache
	tunnels tunnel.Conns
	// strangers bounds those who have no certificate yet.
	strangers *throttle.Throttle
	// stopped ends what gRPC servers began.
	stopped context.Context //nolint:containedctx // lifetime of streams that others' servers run
	stop    context.CancelFunc

	mu sync.Mutex
	// sessions holds the newest report stream of each node.
	sessions map[string]*session
	// streams are all that nodes opened.
	streams map[*bound]struct{}
	// joins lets one redeem a token at a time, so that each is used once.
	joins sync.Mutex
}

// New makes a Dispatch; Run starts it.
func New(cfg Config) (*Dispatch, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, api.E(api.Invalid, "configure dispatch", "%w", err)
	}
	d := &Dispatch{cfg: cfg, log: cfg.Log, sessions: map[string]*session{}, streams: map[*bound]struct{}{}, strangers: throttle.New()}
	d.cache = distribute.NewCache(distribute.CacheConfig{Log: cfg.Log, OnChange: d.acknowledged})
	d.stopped, d.stop = context.WithCancel(context.Background())
	return d, nil
}

// Register adds the services for nodes to a server: delta discovery and
// NodeService.
func (d *Dispatch) Register(r grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(r, discoveryServer{d: d, Server: distribute.NewServer(d.stopped, distribute.ServerConfig{
		Cache: d.cache, Log: d.log,
		Identify: func(ctx context.Context, _ *corev3.Node) (string, error) { return viewOf(ctx) },
	})})
	nodev1.RegisterNodeServiceServer(r, d)
}

// RegisterUpward adds the services that the federation calls through the tunnels,
// and an operator at the local socket: RuntimeService and ClusterAdminService.
// Callers there are authorised already.
func (d *Dispatch) RegisterUpward(r grpc.ServiceRegistrar) {
	portolanv1.RegisterRuntimeServiceServer(r, &runtimeServer{d: d})
	linkv1.RegisterClusterAdminServiceServer(r, &adminServer{d: d})
}

// Status gives what a node's subscriber has acknowledged.
func (d *Dispatch) Status(node string) (distribute.Status, bool) { return d.cache.Status(node) }

// Nacks are the directives that nodes refused.
func (d *Dispatch) Nacks() []*linkv1.Nack {
	var out []*linkv1.Nack
	for _, node := range d.cfg.State.Snapshot().Live() {
		st, ok := d.cache.Status(node)
		if !ok {
			continue
		}
		for _, n := range st.Nacks {
			out = append(out, &linkv1.Nack{Resource: n.Name, Consumer: api.ClusterName(d.cfg.Facts.Cluster) + "/nodes/" + node, Message: n.Message})
		}
	}
	return out
}

func (d *Dispatch) domain() string {
	return identity.ClusterDomain(d.cfg.Facts.Fleet, d.cfg.Facts.Cluster)
}

// Tunnel implements nodev1.NodeServiceServer.
func (d *Dispatch) Tunnel(s grpc.BidiStreamingServer[linkv1.Chunk, linkv1.Chunk]) error {
	node, life, release, err := d.bind(s.Context())
	if err != nil {
		return err
	}
	defer release()
	if err := d.tunnels.Handle(life, node, s); err != nil {
		return err
	}
	return context.Cause(life)
}

// Package warden is the node's second process: from the last good generation on
// disk it serves every replica what it needs each second — configuration and
// keys to its Envoy, authorization, DNS, and the Workload API. It outlives the
// agent and holds no session upward: the disk is what it obeys, the agent only
// wakes it. It never starts or stops anything but its own sockets, and serves
// nothing before a generation is loaded.
//
// Concurrency: Run has one loop that owns what is served; decisions and DNS read
// one immutable generation behind an atomic pointer.
package warden

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Config of a Warden.
type Config struct {
	// Node is the node's name.
	Node string
	// DataDir holds lastgood; RunDir identities and sockets.
	DataDir, RunDir string
	// Compile makes the authorizer of all network bundles together.
	Compile func(ctx context.Context, bundles []policy.Bundle) (policy.Authorizer, error)
	// Active is proxy.Proxies'.
	Active func(ctx context.Context, id string) (map[string]map[string]string, error)
	// Connections closes what a denial forbids; nil: nothing can be closed.
	Connections Connections
	// DNSAddress to answer on; empty: no DNS.
	DNSAddress string
	// Poll is how often the disk is looked at unasked; 1 s when 0.
	Poll time.Duration
	Log  *slog.Logger

	// Listen makes sockets; nil: Unix sockets on disk. A test in virtual time
	// replaces it, and PeerUID with it.
	Listen func(path string, uid, gid int, mode os.FileMode) (net.Listener, error)
	// PeerUID is who is at the other end; nil: the kernel is asked.
	PeerUID func(net.Conn) (uint32, error)

	// onDisk says that sockets are files.
	onDisk bool
}

func (c *Config) setDefaults() {
	if c.Poll <= 0 {
		c.Poll = time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Listen == nil {
		c.Listen, c.onDisk = socket.Listen, true
	}
	if c.PeerUID == nil {
		c.PeerUID = socket.PeerUID
	}
}

func (c *Config) validate() error {
	var errs []error
	for name, missing := range map[string]bool{
		"node": c.Node == "", "dataDir": c.DataDir == "", "runDir": c.RunDir == "", "compile": c.Compile == nil, "active": c.Active == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("%s is missing", name))
		}
	}
	return errors.Join(errs...)
}

// inode identifies a socket's file; always the same when sockets are no files.
func (c *Config) inode(path string) uint64 {
	if !c.onDisk {
		return 1
	}
	return socket.Inode(path)
}

func (c *Config) prepare(dir string) error {
	if !c.onDisk {
		return nil
	}
	return prepareDir(dir)
}

func (c *Config) mkdir(dir string, mode os.FileMode) error {
	if !c.onDisk {
		return nil
	}
	return os.MkdirAll(dir, mode)
}

func (c *Config) privateDir(dir string) error {
	if !c.onDisk {
		return nil
	}
	return socket.PrivateDir(dir)
}

// cleanup removes a socket's file, and its directory when nothing else is in it.
func (c *Config) cleanup(path string) {
	if !c.onDisk {
		return
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.Log.Warn("socket not removed", "path", path, "error", err)
	}
	_ = os.Remove(filepath.Dir(path)) // not empty: others still use it
}

// Warden serves the replicas of one node.
type Warden struct {
	cfg   Config
	cache *distribute.Cache
	grpc  *grpc.Server

	world     atomic.Pointer[world]
	conns     *connTable
	decisions decisionLog
	status    *statusBoard
	wakes     chan chan struct{}
	serving   sync.WaitGroup

	// mu guards what the loop writes and others read.
	mu       sync.Mutex
	replicas map[string]*replica
	views    map[string]replicaView
	degraded string
	problems []*linkv1.Nack

	// The loop's own.
	lastGood    *distribute.LastGood
	seen        string // fingerprint of the generations on disk
	directives  map[string]parsed
	policies    policyState
	translation *translation
	sweepAgain  bool
	pruned      time.Time
}

// New checks the configuration; it touches nothing.
func New(cfg Config) (*Warden, error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, api.E(api.Invalid, "configure warden", "%w", err)
	}
	w := &Warden{
		cfg: cfg, status: newStatusBoard(), wakes: make(chan chan struct{}),
		replicas: map[string]*replica{}, views: map[string]replicaView{},
	}
	journals := ""
	if cfg.onDisk {
		journals = filepath.Join(cfg.RunDir, "warden")
	}
	w.conns = newConnTable(journals, cfg.Log)
	w.cache = distribute.NewCache(distribute.CacheConfig{Log: cfg.Log, OnChange: w.proxyChanged, Rules: distribute.EnvoyRules()})
	return w, nil
}

// Run serves until ctx ends; then nil.
func (w *Warden) Run(ctx context.Context) error {
	lg, err := distribute.OpenLastGood(filepath.Join(w.cfg.DataDir, "lastgood"), 0)
	if err != nil {
		return fmt.Errorf("warden: %w", err)
	}
	w.lastGood = lg
	if err := w.conns.restore(); err != nil {
		return fmt.Errorf("warden: remembered connections: %w", err)
	}
	defer w.conns.close()
	g, ctx := errgroup.WithContext(ctx)
	w.grpc = w.replicaServer(ctx)
	agent, err := w.agentListener()
	if err != nil {
		return fmt.Errorf("warden: %w", err)
	}
	agentServer := w.agentServer()
	g.Go(func() error { return serveUntil(ctx, agentServer, agent) })
	if w.cfg.DNSAddress != "" {
		r := &resolver{world: &w.world, log: w.cfg.Log}
		g.Go(func() error { return r.serve(ctx, w.cfg.DNSAddress) })
	}
	g.Go(func() error {
		defer w.shutdown()
		w.loop(ctx)
		return nil
	})
	err = g.Wait()
	w.serving.Wait()
	return err
}

// replicaServer answers on all replicas' sockets.
func (w *Warden) replicaServer(ctx context.Context) *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(socketCreds{uids: []uint32{proxy.UID, 0}, peerUID: w.cfg.PeerUID}),
		grpc.MaxRecvMsgSize(api.MaxMessageBytes), grpc.MaxConcurrentStreams(4096),
		// Envoy pings every few seconds to notice a warden that hangs; by default that
		// is held for an attack after three, and the connection is closed.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	distribute.NewServer(ctx, distribute.ServerConfig{Cache: w.cache, Identify: identify, Log: w.cfg.Log}).Register(s)
	authv3.RegisterAuthorizationServer(s, w)
	return s
}

// identify believes the socket, not the node message.
func identify(ctx context.Context, _ *corev3.Node) (string, error) {
	a, ok := allocationOf(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "the stream came on no replica's socket")
	}
	return a, nil
}

func (w *Warden) agentListener() (net.Listener, error) {
	if err := w.cfg.mkdir(w.cfg.RunDir, 0o711); err != nil {
		return nil, err
	}
	return w.cfg.Listen(filepath.Join(w.cfg.RunDir, "warden.sock"), os.Getuid(), os.Getgid(), 0o600)
}

func (w *Warden) agentServer() *grpc.Server {
	own := uint32(os.Getuid())
	s := grpc.NewServer(
		grpc.Creds(socketCreds{uids: []uint32{own, 0}, peerUID: w.cfg.PeerUID}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	nodev1.RegisterWardenServiceServer(s, wardenService{w: w})
	h := health.NewServer()
	grpc_health_v1.RegisterHealthServer(s, h)
	return s
}

func serveUntil(ctx context.Context, s *grpc.Server, l net.Listener) error {
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve the agent: %w", err)
	}
	return nil
}

// shutdown ends all that is served; files of sockets stay for the next warden.
func (w *Warden) shutdown() {
	w.grpc.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.replicas {
		r.stop()
		if r.listener != nil {
			r.listener.end()
		}
		if r.workload != nil {
			r.workload.end()
		}
	}
}

// Wake looks at the disk now, and returns when what was found is served.
func (w *Warden) Wake(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case w.wakes <- done:
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

func (w *Warden) loop(ctx context.Context) {
	tick := time.NewTicker(w.cfg.Poll)
	defer tick.Stop()
	w.pass(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.pass(ctx)
		case done := <-w.wakes:
			w.pass(ctx)
			close(done)
		}
	}
}

// proxyChanged is called by the cache, whose stream waits for it.
func (w *Warden) proxyChanged(view string) {
	w.mu.Lock()
	r := w.replicas[view]
	w.mu.Unlock()
	if r == nil {
		return
	}
	if st, ok := w.cache.Status(view); ok && !st.Connected {
		// The next one to connect may be a new process, which has nothing.
		r.mu.Lock()
		r.confirmed = ""
		r.mu.Unlock()
	}
	r.wake()
	w.status.changed()
}

func address(a *nodev1.Assignment) netip.Addr {
	addr, err := netip.ParseAddr(a.GetAddress())
	if err != nil {
		return netip.Addr{}
	}
	return addr
}

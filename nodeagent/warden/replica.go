package warden

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity/workloadapi"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/envoy"
	"github.com/portolan-io/portolan/xds/distribute"
	"github.com/portolan-io/portolan/xds/model"
	"github.com/portolan-io/portolan/xds/translate"
)

// replica is what the warden does for one allocation. The loop owns it, but for
// the part under mu, which the confirmer shares.
type replica struct {
	allocation string
	assignment *nodev1.Assignment
	keys       *keypair
	keyFault   string

	listener *replicaListener
	workload *workloadServer

	// target is what the proxy was last told.
	target target

	// poke wakes the confirmer.
	poke chan struct{}
	stop context.CancelFunc

	mu   sync.Mutex
	want target // the confirmer's copy
	// confirmed is the digest that the proxy's admin confirmed since it connected.
	confirmed string
	applied   *nodev1.Watermark
	detail    string
}

// target is one set of resources at a watermark.
type target struct {
	sets      map[string][]*distribute.Resource
	digest    string
	watermark *nodev1.Watermark
}

func newTarget(sets map[string][]*distribute.Resource, wm *nodev1.Watermark) target {
	h := sha256.New()
	types := make([]string, 0, len(sets))
	for t := range sets {
		types = append(types, t)
	}
	sort.Strings(types)
	for _, t := range types {
		for _, r := range sets[t] {
			fmt.Fprintf(h, "%s\x00%s\x00%s\n", t, r.Name, r.Version)
		}
	}
	return target{sets: sets, digest: hex.EncodeToString(h.Sum(nil)), watermark: wm}
}

func (w *Warden) proxyDir(allocation string) string {
	return filepath.Join(w.cfg.RunDir, "proxies", allocation)
}

// ensureSockets makes the replica's sockets, again when somebody removed one.
func (w *Warden) ensureSockets(ctx context.Context, r *replica) error {
	return errors.Join(w.ensureXDS(r), w.ensureWorkloadAPI(ctx, r))
}

func (w *Warden) ensureXDS(r *replica) error {
	dir := w.proxyDir(r.allocation)
	path := filepath.Join(dir, proxy.XDSSocketFile)
	if r.listener != nil {
		if w.cfg.inode(path) == r.listener.inode {
			return nil
		}
		r.listener.end()
		r.listener = nil
	}
	if err := w.cfg.prepare(dir); err != nil {
		return err
	}
	l, err := w.cfg.Listen(path, proxy.UID, proxy.GID, 0o600)
	if err != nil {
		return err
	}
	r.listener = &replicaListener{Listener: l, allocation: r.allocation, inode: w.cfg.inode(path), conns: map[*replicaConn]bool{}}
	lis := r.listener
	w.serving.Go(func() {
		// It ends when the listener is closed, or with the server.
		if err := w.grpc.Serve(lis); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			w.cfg.Log.Warn("replica's socket ended", "replica", lis.allocation, "error", err)
		}
	})
	return nil
}

// workloadServer is one replica's Workload API.
type workloadServer struct {
	source *workloadSource
	stop   context.CancelFunc
	done   chan struct{}
	inode  uint64
	path   string
	keys   *keypair
	world  *world
}

func (s *workloadServer) end() {
	s.stop()
	<-s.done
}

func (w *Warden) ensureWorkloadAPI(ctx context.Context, r *replica) error {
	if isGateway(r.assignment) {
		return nil
	}
	path := filepath.Join(w.cfg.RunDir, "workload", r.allocation, "workload.sock")
	source := newWorkloadSource()
	if r.workload != nil {
		if w.cfg.inode(path) == r.workload.inode {
			return nil
		}
		source = r.workload.source
		r.workload.end()
		r.workload = nil
	}
	// Whoever opens the socket gets the replica's key. Only its own containers have
	// the directory bound, and nobody else but root gets past the one above.
	if err := w.cfg.privateDir(filepath.Join(w.cfg.RunDir, "workload")); err != nil {
		return err
	}
	if err := w.cfg.mkdir(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	l, err := w.cfg.Listen(path, 0, 0, 0o666)
	if err != nil {
		return err
	}
	server, err := workloadapi.New(workloadapi.Config{Source: source, Log: w.cfg.Log})
	if err != nil {
		_ = l.Close()
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &workloadServer{source: source, stop: cancel, done: make(chan struct{}), inode: w.cfg.inode(path), path: path}
	w.serving.Go(func() {
		defer close(s.done)
		if err := server.Serve(ctx, l); err != nil {
			w.cfg.Log.Warn("workload API ended", "replica", r.allocation, "error", err)
		}
	})
	r.workload = s
	return nil
}

// refreshKeys reads the identity when its files changed; true when there is a
// new one.
func (w *Warden) refreshKeys(wd *world, r *replica) bool {
	dir := filepath.Join(w.cfg.RunDir, "identity", r.allocation)
	stamp := identityStamp(dir)
	if r.keys != nil && r.keys.stamp == stamp {
		return false
	}
	if stamp == "" && r.keys != nil {
		// The files are gone: what was read is still ours until the replica goes.
		return false
	}
	k, err := readIdentity(dir, wd.identityOf(r.assignment).String())
	if err != nil {
		if fault := err.Error(); fault != r.keyFault {
			r.keyFault = fault
			if !errors.Is(err, os.ErrNotExist) {
				w.cfg.Log.Warn("identity is unusable", "replica", r.allocation, "error", err)
			}
		}
		return false
	}
	r.keys, r.keyFault = k, ""
	return true
}

// configure tells the proxy what the generation means for it. Without an
// identity it is told nothing, and does not become live.
func (w *Warden) configure(wd *world, r *replica, tr *translation) error {
	if r.keys == nil {
		return nil
	}
	sets, err := tr.sets(w.proxyOf(r.assignment), r.keys)
	if err != nil {
		return err
	}
	next := newTarget(sets, wd.watermark)
	changed := next.digest != r.target.digest
	r.target = next
	if changed {
		w.cache.SetAll(r.allocation, sets)
	}
	r.mu.Lock()
	r.want = next
	r.mu.Unlock()
	r.wake()
	return w.feedWorkload(wd, r)
}

func (w *Warden) feedWorkload(wd *world, r *replica) error {
	if r.workload == nil || (r.workload.keys == r.keys && r.workload.world == wd) {
		return nil
	}
	u, err := workloadUpdate(r.keys, wd.input.Config.GetTrustDomain(), wd.input.Bundles, time.Now())
	if err != nil {
		return err
	}
	r.workload.source.set(u)
	r.workload.keys, r.workload.world = r.keys, wd
	return nil
}

func (r *replica) wake() {
	select {
	case r.poke <- struct{}{}:
	default:
	}
}

func (w *Warden) proxyOf(a *nodev1.Assignment) translate.Proxy {
	p := translate.Proxy{
		ID: a.GetAllocation(), Tenant: a.GetTenant(), Workload: a.GetWorkload(), Revision: a.GetRevision(),
		Node: w.cfg.Node, Role: translate.Sidecar,
		// Relative to the proxy's working directory, because paths of sockets are short.
		AuthzSocket: proxy.XDSSocketFile,
	}
	switch a.GetSpec().GetGateway() {
	case portolanv1.GatewayKind_GATEWAY_KIND_INGRESS:
		p.Role = translate.Ingress
	case portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST:
		p.Role = translate.EastWest
	case portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED:
	}
	p.Address = address(a)
	return p
}

// removeReplica ends all that is served to a replica that is gone.
func (w *Warden) removeReplica(r *replica) {
	r.stop()
	if r.listener != nil {
		r.listener.end()
	}
	if r.workload != nil {
		r.workload.end()
		w.cfg.cleanup(r.workload.path)
	}
	w.cfg.cleanup(filepath.Join(w.proxyDir(r.allocation), proxy.XDSSocketFile))
	w.cache.Remove(r.allocation)
}

// translation turns one graph into resources, each marshalled once.
type translation struct {
	tr   *translate.Translator
	made map[*translate.Resource]*distribute.Resource
	// problems of the graph and of what was translated, without doubles.
	problems []model.Problem
	known    map[model.Problem]bool
}

func newTranslation(in model.Input) *translation {
	graph, problems := model.Build(in)
	t := &translation{tr: translate.New(graph), made: map[*translate.Resource]*distribute.Resource{}, known: map[model.Problem]bool{}}
	t.note(problems)
	return t
}

func (t *translation) note(problems []model.Problem) {
	for _, p := range problems {
		if !t.known[p] {
			t.known[p] = true
			t.problems = append(t.problems, p)
		}
	}
}

func (t *translation) sets(p translate.Proxy, k *keypair) (map[string][]*distribute.Resource, error) {
	res, problems := t.tr.Proxy(p)
	t.note(problems)
	out := make(map[string][]*distribute.Resource, len(res))
	for typeURL, list := range res {
		out[typeURL] = make([]*distribute.Resource, 0, len(list)+1)
		for _, x := range list {
			d := t.made[x]
			if d == nil {
				var err error
				if d, err = distribute.NewResource(typeURL, x.Name, x.Message); err != nil {
					return nil, fmt.Errorf("resource %s: %w", x.Name, err)
				}
				t.made[x] = d
			}
			out[typeURL] = append(out[typeURL], d)
		}
	}
	own, err := k.secret()
	if err != nil {
		return nil, err
	}
	out[distribute.SecretType] = append(out[distribute.SecretType], own)
	return out, nil
}

// prepareDir is what a proxy's directory needs.
func prepareDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	return envoy.PrepareDir(dir)
}

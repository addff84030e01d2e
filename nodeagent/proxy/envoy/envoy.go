// Package envoy runs real Envoys: it writes their bootstrap, starts them inside
// their network namespace under the reserved user, supervises and adopts them by
// pid file, start time and pidfd, and asks their admin sockets. It never makes
// configuration beyond the bootstrap: that comes from the warden.
//
// Proxies outlive this process on purpose; only Stop ends one.
//
// Concurrency: Envoy is safe for concurrent use; calls for one ID are serialised.
package envoy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
)

// Config of the supervisor.
type Config struct {
	// Binary is Envoy's; a bare name is looked up in PATH.
	Binary string
	// Root holds the directories of all proxies: a Spec's Dir is Root/<ID>. Proxies
	// begin inside theirs and use relative paths, so what is above may be closed to
	// them; only the binary's path must be open (o+x).
	Root string
	// CgroupParent is the group under which each proxy gets one of its own, outside
	// this process's; empty: proxies stay in this process's.
	CgroupParent string
	// MemoryBytes bounds each proxy's group; 512 MiB when 0.
	MemoryBytes int64
	// Concurrency is the number of worker threads; 1 when 0.
	Concurrency int
	// MinBackoff and MaxBackoff between restarts; 100 ms and 10 s when 0.
	MinBackoff, MaxBackoff time.Duration
	// StopGrace between SIGTERM and SIGKILL; 2 s when 0.
	StopGrace time.Duration
	// MaxLogBytes of a proxy's own log, of which one older copy is kept; 1 MiB when 0.
	MaxLogBytes int64
	Log         *slog.Logger
}

// Envoy is the real proxy.Proxies.
type Envoy struct {
	cfg Config

	mu     sync.Mutex
	procs  map[string]*supervisor
	busy   map[string]chan struct{} // IDs in the hands of a call; closed when it returns
	closed bool
}

var (
	_ proxy.Proxies = (*Envoy)(nil)
	_ proxy.Meter   = (*Envoy)(nil)
)

// New checks the configuration; it starts nothing.
func New(cfg Config) (*Envoy, error) {
	if cfg.Binary == "" {
		return nil, api.E(api.Invalid, "configure proxies", "no envoy binary is named")
	}
	if !filepath.IsAbs(cfg.Root) {
		return nil, api.E(api.Invalid, "configure proxies", "root %q is not absolute", cfg.Root)
	}
	cfg.Root = filepath.Clean(cfg.Root)
	cfg.Concurrency = max(cfg.Concurrency, 1)
	if cfg.MinBackoff <= 0 {
		cfg.MinBackoff = 100 * time.Millisecond
	}
	if cfg.MaxBackoff <= 0 {
		cfg.MaxBackoff = 10 * time.Second
	}
	if cfg.StopGrace <= 0 {
		cfg.StopGrace = 2 * time.Second
	}
	if cfg.MemoryBytes <= 0 {
		cfg.MemoryBytes = defaultMemory
	}
	if cfg.MaxLogBytes <= 0 {
		cfg.MaxLogBytes = 1 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Envoy{cfg: cfg, procs: map[string]*supervisor{}, busy: map[string]chan struct{}{}}, nil
}

// Run waits for the end of ctx, then lets go of all proxies without ending them.
func (e *Envoy) Run(ctx context.Context) error {
	<-ctx.Done()
	e.Close()
	return nil
}

// Close lets go of all proxies without ending them, and waits for its own
// goroutines. Nothing can be started afterwards.
func (e *Envoy) Close() {
	e.mu.Lock()
	e.closed = true
	all := e.procs
	e.procs = map[string]*supervisor{}
	e.mu.Unlock()
	for _, s := range all {
		s.detach()
	}
}

// Start implements proxy.Proxies.
func (e *Envoy) Start(_ context.Context, spec proxy.Spec) error {
	doing := "start proxy " + spec.ID
	if err := checkID(doing, spec.ID); err != nil {
		return err
	}
	if filepath.Clean(spec.Dir) != e.dir(spec.ID) {
		return api.E(api.Invalid, doing, "directory %q is not %s", spec.Dir, e.dir(spec.ID))
	}
	plan, err := e.plan(spec)
	if err != nil {
		return err
	}
	defer e.hold(spec.ID)()
	s, closed := e.find(spec.ID)
	if closed {
		return api.E(api.Unavailable, doing, "the supervisor is closed")
	}
	if s != nil {
		if s.plan.digest == plan.digest {
			return nil
		}
		e.drop(spec.ID)
	}
	if err := prepareDir(e.cfg.Root, plan); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	s = newSupervisor(e.cfg, plan)
	if err := s.begin(); err != nil {
		return api.E(api.Unavailable, doing, "%w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		go s.detach()
		return api.E(api.Unavailable, doing, "the supervisor is closed")
	}
	e.procs[spec.ID] = s
	return nil
}

// hold serialises calls for one ID; the result lets go. Others are not kept
// waiting by a proxy that is slow to end.
func (e *Envoy) hold(id string) (release func()) {
	for {
		e.mu.Lock()
		other := e.busy[id]
		if other == nil {
			mine := make(chan struct{})
			e.busy[id] = mine
			e.mu.Unlock()
			return func() {
				e.mu.Lock()
				delete(e.busy, id)
				e.mu.Unlock()
				close(mine)
			}
		}
		e.mu.Unlock()
		<-other
	}
}

func (e *Envoy) find(id string) (s *supervisor, closed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.procs[id], e.closed
}

// drop ends the supervision of a proxy.
func (e *Envoy) drop(id string) {
	e.mu.Lock()
	s := e.procs[id]
	delete(e.procs, id)
	e.mu.Unlock()
	if s != nil {
		s.detach()
	}
}

// bootstrapFile is in the proxy's directory, for people to read; the proxy gets
// the same as an argument, because it would resolve a file's whole path.
const (
	bootstrapFile = "bootstrap.json"
	configFlag    = "--config-yaml"
)

// plan holds what starting one proxy takes.
type plan struct {
	id, dir   string
	bootstrap []byte
	argv      []string
	digest    string
}

func (p *plan) file(name string) string { return filepath.Join(p.dir, name) }

func (e *Envoy) plan(spec proxy.Spec) (*plan, error) {
	doing := "start proxy " + spec.ID
	b, err := bootstrap(spec)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	tools := map[string]string{"envoy": e.cfg.Binary, "setpriv": "setpriv", "nsenter": "nsenter"}
	for name, file := range tools {
		path, err := exec.LookPath(file)
		if err != nil {
			return nil, api.E(api.Precondition, doing, "%s is missing: %w", name, err)
		}
		tools[name] = path
	}
	p := &plan{id: spec.ID, dir: e.dir(spec.ID), bootstrap: b}
	var inode uint64
	if spec.NetNS != "" {
		if inode = socket.Inode(spec.NetNS); inode == 0 {
			return nil, api.E(api.Precondition, doing, "network namespace %s does not exist", spec.NetNS)
		}
		p.argv = append(p.argv, tools["nsenter"], "--net="+spec.NetNS, "--")
	}
	p.argv = append(
		p.argv, tools["setpriv"], "--reuid="+strconv.Itoa(proxy.UID), "--regid="+strconv.Itoa(proxy.GID), "--clear-groups",
		"--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--",
		tools["envoy"], configFlag, string(b), "--disable-hot-restart", "--concurrency", strconv.Itoa(e.cfg.Concurrency),
		"--drain-time-s", "5", "--drain-strategy", "immediate", "--log-level", "warning", "--skip-deprecated-logs",
	)
	h := sha256.New()
	fmt.Fprintf(h, "%d\x00%s\x00%s", inode, b, strings.Join(p.argv, "\x00"))
	p.digest = hex.EncodeToString(h.Sum(nil)[:16])
	return p, nil
}

// prepareDir makes the proxy's directory: root's, writable for the proxies'
// group, sticky so that the proxy cannot replace root's files.
func prepareDir(root string, p *plan) error {
	if err := os.MkdirAll(root, 0o711); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := PrepareDir(p.dir); err != nil {
		return err
	}
	path := p.file(bootstrapFile)
	if err := writeFile(path, p.bootstrap, 0o640); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	if err := os.Lchown(path, 0, proxy.GID); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	return nil
}

// PrepareDir makes the directory of one proxy with the owner and mode that a
// proxy needs; the warden calls it too, since its socket comes first.
func PrepareDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Lchown(dir, 0, proxy.GID); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Chmod(dir, 0o770|os.ModeSticky); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	return nil
}

// Status implements proxy.Proxies.
func (e *Envoy) Status(ctx context.Context, id string) (proxy.Status, error) {
	if err := checkID("status of proxy", id); err != nil {
		return proxy.Status{}, err
	}
	s, _ := e.find(id)
	if s == nil {
		return proxy.Status{}, api.E(api.NotFound, "status of proxy "+id, "it is not supervised")
	}
	st := s.status()
	if st.Running {
		st.Live = e.admin(id).ready(ctx)
	}
	return st, nil
}

// Active implements proxy.Proxies. It works for proxies that another process
// supervises, too.
func (e *Envoy) Active(ctx context.Context, id string) (map[string]map[string]string, error) {
	doing := "active configuration of proxy " + id
	if err := checkID(doing, id); err != nil {
		return nil, err
	}
	out, err := e.admin(id).active(ctx)
	if err != nil {
		return nil, api.E(api.Unavailable, doing, "%w", err)
	}
	return out, nil
}

// Requests implements proxy.Meter.
func (e *Envoy) Requests(ctx context.Context, id string) (uint64, error) {
	doing := "requests of proxy " + id
	if err := checkID(doing, id); err != nil {
		return 0, err
	}
	n, _, err := e.admin(id).requests(ctx)
	if err != nil {
		return 0, api.E(api.Unavailable, doing, "%w", err)
	}
	return n, nil
}

// Drain implements proxy.Proxies; a proxy that does not run has drained.
func (e *Envoy) Drain(ctx context.Context, id string) error {
	doing := "drain proxy " + id
	if err := checkID(doing, id); err != nil {
		return err
	}
	err := e.admin(id).drain(ctx)
	if err == nil {
		err = e.admin(id).quiet(ctx)
	}
	if err != nil {
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		return api.E(api.Unavailable, doing, "%w", err)
	}
	return nil
}

// Stop implements proxy.Proxies.
func (e *Envoy) Stop(_ context.Context, id string) error {
	doing := "stop proxy " + id
	if err := checkID(doing, id); err != nil {
		return err
	}
	defer e.hold(id)()
	e.drop(id)
	p := &plan{id: id, dir: e.dir(id)}
	proc, err := recorded(p)
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	if proc != nil {
		defer proc.release()
		if err := proc.end(e.cfg.StopGrace); err != nil {
			return api.E(api.Internal, doing, "%w", err)
		}
	}
	e.cfg.leaveGroup(id)
	// The warden's socket may still be there; then the directory stays for it.
	var errs []error
	for _, name := range ownFiles {
		if err := os.Remove(p.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	return nil
}

// ownFiles are those that this package or the proxy itself writes; the record is
// the last to go, because List goes by what is left.
var ownFiles = []string{proxy.AdminSocketFile, "envoy.log", "envoy.log.1", "access.log", bootstrapFile + ".new", "pid.new", bootstrapFile, "pid"}

// List implements proxy.Proxies: a directory with a bootstrap or a record.
func (e *Envoy) List(context.Context) ([]string, error) {
	found := map[string]bool{}
	for _, name := range []string{bootstrapFile, "pid"} {
		paths, err := filepath.Glob(filepath.Join(e.cfg.Root, "*", name))
		if err != nil {
			return nil, api.E(api.Internal, "list proxies", "%w", err)
		}
		for _, p := range paths {
			found[filepath.Base(filepath.Dir(p))] = true
		}
	}
	out := make([]string, 0, len(found))
	for id := range found {
		out = append(out, id)
	}
	sort.Strings(out)
	return out, nil
}

func (e *Envoy) dir(id string) string { return filepath.Join(e.cfg.Root, id) }

func (e *Envoy) admin(id string) admin {
	return admin{path: filepath.Join(e.dir(id), proxy.AdminSocketFile)}
}

func checkID(doing, id string) error {
	if id == "" || id == "." || id == ".." || len(id) > 100 || strings.ContainsAny(id, "/\x00*?[\\") {
		return api.E(api.Invalid, doing, "proxy %q is no file name", id)
	}
	return nil
}

// jitter gives a random time up to d, so that many do not restart in step.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1)
}

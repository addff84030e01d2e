package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
	"github.com/portolan-io/portolan/nodeagent/task"
	"github.com/portolan-io/portolan/xds/distribute"
)

func defaultRand() float64 { return rand.Float64() }

// Agent is the node's agent. New makes it, Run runs it once.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	session int64 // start time in ns; fences older senders
	board   *board
	self    *source.Source // the node's own identity, in memory and on disk
	wake    chan struct{}  // wakes the warden; capacity 1

	mu      sync.Mutex
	ctx     context.Context //nolint:containedctx // Run's; runners made later live as long
	runners map[string]*runner
	live    map[string]liveInstance // by engine ID
	link    distribute.Conn         // nil while the cluster is away
	config  *nodev1.NodeConfig
	peers   []*nodev1.NodePeer
	fresh   bool // a generation came from the cluster in this process
	adopted bool
	orphans map[string][]engine.Container // by allocation, until fresh
	serving map[string]*nodev1.WardenProxy
	group   sync.WaitGroup
}

type liveInstance struct {
	r         *runner
	container string
	attempt   int
}

// New checks the configuration; it does no I/O.
func New(cfg Config) (*Agent, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1),
		runners: map[string]*runner{}, live: map[string]liveInstance{}, orphans: map[string][]engine.Container{},
		serving: map[string]*nodev1.WardenProxy{},
	}
	a.board = newBoard(cfg.Facts)
	var err error
	a.self, err = source.New(source.Config{
		Dir: a.path("agent"), Fetch: a.renewal, RenewAt: renewAt, Jitter: renewJitter, Rand: cfg.Rand, Log: cfg.Log,
	})
	return a, err
}

func (a *Agent) path(parts ...string) string {
	return filepath.Join(append([]string{a.cfg.DataDir}, parts...)...)
}

func (a *Agent) runPath(parts ...string) string {
	return filepath.Join(append([]string{a.cfg.RunDir}, parts...)...)
}

// Run boots from disk, takes over what runs, and serves until ctx ends; then it
// returns nil and leaves containers and proxies running.
func (a *Agent) Run(ctx context.Context) error {
	a.session = time.Now().UnixNano()
	for _, d := range []string{a.path("agent", "tasks"), a.path("logs"), a.runPath("proxies")} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	// Keys, and sockets that give keys away to whoever opens them.
	for _, d := range []string{a.runPath("identity"), a.runPath("workload")} {
		if err := socket.PrivateDir(d); err != nil {
			return err
		}
	}
	good, err := distribute.OpenLastGood(a.path("lastgood"), distribute.DefaultKeep)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	a.mu.Lock()
	a.ctx = ctx
	a.mu.Unlock()
	known := a.boot(good)
	loops := []func(context.Context) error{
		a.wakeLoop, a.wardenLoop, a.adoptLoop, a.sampleLoop, a.rotateLoop, a.assertLoop,
		func(ctx context.Context) error { return a.upward(ctx, good, known) },
	}
	for _, loop := range loops {
		g.Go(func() error { return loop(ctx) })
	}
	err = g.Wait()
	a.group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// boot takes the newest sound generation and the tasks that an earlier agent
// wrote down. Nothing is stopped because of what is missing here.
func (a *Agent) boot(good *distribute.LastGood) *distribute.Generation {
	saved, err := good.Load()
	if err != nil {
		a.log.Error("generations on disk are broken and were passed over", "error", err)
	}
	var known *distribute.Generation
	if len(saved) > 0 {
		known = &saved[0].Generation
		gen, err := decode(*known)
		if err != nil {
			a.log.Error("last good generation does not parse in full", "error", err)
		}
		a.log.Info("booting from the last good generation", "number", saved[0].Number, "revision", gen.watermark.GetRevision(), "assignments", len(gen.assignments))
		a.restore(a.loadTasks())
		a.takeOver(gen, false)
		return known
	}
	a.restore(a.loadTasks())
	return nil
}

// restore makes runners for the tasks on disk.
func (a *Agent) restore(saved []savedTask) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range saved {
		if a.runners[s.assignment.GetAllocation()] == nil {
			a.addRunner(s.assignment, s.state, nil)
		}
	}
}

// sleep waits; false when ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// jittered is d less up to a fifth.
func (a *Agent) jittered(d time.Duration) time.Duration {
	return d - time.Duration(a.cfg.Rand()*float64(d)/5)
}

// pokeWarden asks for a wake-up, soon.
func (a *Agent) pokeWarden() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *Agent) wakeLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		}
		wctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		if err := a.cfg.Warden.Wake(wctx); err != nil && ctx.Err() == nil {
			// It reads the disk when it comes back; nothing is lost.
			a.log.Debug("warden not woken", "error", err)
		}
		cancel()
	}
}

// wardenLoop follows the warden's status.
func (a *Agent) wardenLoop(ctx context.Context) error {
	for wait := 50 * time.Millisecond; ; wait = min(wait*2, 2*time.Second) {
		err := a.cfg.Warden.Watch(ctx, func(s *nodev1.WardenStatus) {
			wait = 50 * time.Millisecond
			a.wardenSaid(s)
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to end
		}
		a.log.Warn("warden is away", "error", err)
		if !sleep(ctx, a.jittered(wait)) {
			return nil
		}
		a.pokeWarden()
	}
}

func (a *Agent) wardenSaid(s *nodev1.WardenStatus) {
	seen := make(map[string]*nodev1.WardenProxy, len(s.GetProxies()))
	var proxies []*nodev1.ProxyStatus
	for _, p := range s.GetProxies() {
		seen[p.GetStatus().GetAllocation()] = p
		// Those that never had a configuration serve nobody yet and hold nobody back.
		if p.GetStatus().GetApplied() != nil && p.GetConnected() {
			proxies = append(proxies, p.GetStatus())
		}
	}
	a.mu.Lock()
	a.serving = seen
	for id, r := range a.runners {
		r.post(proxySeen(seen[id]))
	}
	a.mu.Unlock()
	a.board.setProxies(proxies)
}

func proxySeen(p *nodev1.WardenProxy) task.ProxySeen {
	return task.ProxySeen{Serving: p.GetServing(), Ready: p.GetReady(), Detail: p.GetDetail()}
}

// sampleLoop reads memory, so that an OOM has a last figure.
func (a *Agent) sampleLoop(ctx context.Context) error {
	for sleep(ctx, a.jittered(a.cfg.Sample)) {
		for id, in := range a.liveNow() {
			u, err := a.cfg.Engine.Usage(ctx, id)
			if err == nil {
				in.r.post(task.Sampled{Container: in.container, Bytes: u.MemoryBytes})
			}
		}
	}
	return nil
}

func (a *Agent) liveNow() map[string]liveInstance {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.live)
}

// assertLoop brings about routes and replica networks again and again: a foreign
// flush must not last.
func (a *Agent) assertLoop(ctx context.Context) error {
	for sleep(ctx, a.jittered(a.cfg.Reassert)) {
		a.routes(ctx)
		a.mu.Lock()
		all := make([]*runner, 0, len(a.runners))
		for _, r := range a.runners {
			all = append(all, r)
		}
		a.mu.Unlock()
		for _, r := range all {
			r.reassert(ctx)
		}
	}
	return nil
}

// Package proxytest holds a proxy in memory and the conformance suite that it and
// Envoy pass. The fake takes its configuration by the real protocol (delta ADS),
// keeps what it accepted apart from what is active, and evaluates listeners,
// routes, weights, endpoints, trust and authorization as far as Portolan's
// translation uses them. It opens no port and moves no bytes.
//
// Concurrency: Fake and Mesh are safe for concurrent use, and work in virtual
// time when their connections do.
package proxytest

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
)

// FakeConfig of a Fake.
type FakeConfig struct {
	// Dial opens the proxy's connection to its socket; nil: the Unix socket of the
	// spec.
	Dial func(ctx context.Context, spec proxy.Spec) (net.Conn, error)
	// Reconnect is the wait between two tries; 100 ms when 0.
	Reconnect time.Duration
}

// Fake is proxy.Proxies in memory.
type Fake struct {
	cfg FakeConfig

	mu    sync.Mutex
	byID  map[string]*instance
	pids  int
	close bool
}

var (
	_ proxy.Proxies = (*Fake)(nil)
	_ proxy.Meter   = (*Fake)(nil)
)

// NewFake makes one without proxies.
func NewFake(cfg FakeConfig) *Fake {
	if cfg.Reconnect <= 0 {
		cfg.Reconnect = 100 * time.Millisecond
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, spec proxy.Spec) (net.Conn, error) { return socket.Dial(ctx, spec.XDSSocket) }
	}
	return &Fake{cfg: cfg, byID: map[string]*instance{}}
}

// instance is one proxy. Its goroutine runs one life after the other.
type instance struct {
	spec   proxy.Spec
	cfg    FakeConfig
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex
	pid      int
	restarts int
	state    *state
	conn     *grpc.ClientConn
	drained  bool
	requests uint64 // HTTP ones that came in, in this life
	warming  bool
	refuse   func(typeURL, name string) string
	frozen   chan struct{} // closed when it thaws; nil: not frozen
	kill     context.CancelFunc
}

// Start implements proxy.Proxies.
func (f *Fake) Start(ctx context.Context, spec proxy.Spec) error {
	doing := "start proxy " + spec.ID
	if spec.ID == "" {
		return api.E(api.Invalid, doing, "it has no ID")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return api.E(api.Canceled, doing, "%w", err)
	}
	if f.close {
		return api.E(api.Unavailable, doing, "the supervisor is closed")
	}
	if p := f.byID[spec.ID]; p != nil {
		if p.spec == spec {
			return nil
		}
		p.end()
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &instance{spec: spec, cfg: f.cfg, cancel: cancel, done: make(chan struct{}), pid: f.newPid()}
	p.state = newState()
	f.byID[spec.ID] = p
	go p.run(ctx, f)
	return nil
}

// newPid is called under mu.
func (f *Fake) newPid() int {
	f.pids++
	return 1000 + f.pids
}

func (p *instance) end() {
	p.cancel()
	<-p.done
}

// run is one life after the other until ctx ends.
func (p *instance) run(ctx context.Context, f *Fake) {
	defer close(p.done)
	for ctx.Err() == nil {
		life, kill := context.WithCancel(ctx)
		p.mu.Lock()
		p.kill = kill
		p.mu.Unlock()
		p.live(life)
		kill()
		if ctx.Err() != nil {
			return
		}
		f.mu.Lock()
		pid := f.newPid()
		f.mu.Unlock()
		p.mu.Lock()
		p.pid, p.state, p.drained, p.requests = pid, newState(), false, 0
		p.restarts++
		p.mu.Unlock()
	}
}

// live keeps a stream open until the process dies.
func (p *instance) live(ctx context.Context) {
	conn, err := grpc.NewClient("passthrough:///warden", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.cfg.Dial(ctx, p.spec) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)))
	if err != nil {
		<-ctx.Done()
		return
	}
	defer func() { _ = conn.Close() }()
	p.mu.Lock()
	p.conn = conn
	p.mu.Unlock()
	for ctx.Err() == nil {
		_ = p.stream(ctx, conn)
		conn.ResetConnectBackoff()
		t := time.NewTimer(p.cfg.Reconnect)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// get finds a proxy.
func (f *Fake) get(doing, id string) (*instance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.byID[id]
	if p == nil {
		return nil, api.E(api.NotFound, doing+" "+id, "it is not supervised")
	}
	return p, nil
}

// Status implements proxy.Proxies.
func (f *Fake) Status(_ context.Context, id string) (proxy.Status, error) {
	p, err := f.get("status of proxy", id)
	if err != nil {
		return proxy.Status{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return proxy.Status{Running: true, Live: p.state.live(), Pid: p.pid, Restarts: p.restarts}, nil
}

// Active implements proxy.Proxies. A frozen proxy does not answer before ctx
// ends.
func (f *Fake) Active(ctx context.Context, id string) (map[string]map[string]string, error) {
	p, err := f.get("active configuration of proxy", id)
	if err != nil {
		return nil, api.E(api.Unavailable, "active configuration of proxy "+id, "it is not running")
	}
	if err := p.thawed(ctx); err != nil {
		return nil, api.E(api.Unavailable, "active configuration of proxy "+id, "%w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.versions(), nil
}

// Requests implements proxy.Meter.
func (f *Fake) Requests(ctx context.Context, id string) (uint64, error) {
	p, err := f.get("requests of proxy", id)
	if err != nil {
		return 0, api.E(api.Unavailable, "requests of proxy "+id, "it is not running")
	}
	if err := p.thawed(ctx); err != nil {
		return 0, api.E(api.Unavailable, "requests of proxy "+id, "%w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests, nil
}

// Drain implements proxy.Proxies.
func (f *Fake) Drain(_ context.Context, id string) error {
	p, err := f.get("drain proxy", id)
	if err != nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drained = true
	return nil
}

// Stop implements proxy.Proxies.
func (f *Fake) Stop(_ context.Context, id string) error {
	if id == "" {
		return api.E(api.Invalid, "stop proxy", "it has no ID")
	}
	f.mu.Lock()
	p := f.byID[id]
	delete(f.byID, id)
	f.mu.Unlock()
	if p != nil {
		p.end()
	}
	return nil
}

// List implements proxy.Proxies.
func (f *Fake) List(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]string, 0, len(f.byID))
	for id := range f.byID {
		out = append(out, id)
	}
	slices.Sort(out)
	return out, nil
}

// Close ends all of them and waits.
func (f *Fake) Close() {
	f.mu.Lock()
	f.close = true
	all := f.byID
	f.byID = map[string]*instance{}
	f.mu.Unlock()
	for _, p := range all {
		p.end()
	}
}

// Kill ends the process of a proxy; it begins again with nothing.
func (f *Fake) Kill(id string) error {
	p, err := f.get("kill proxy", id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	kill := p.kill
	p.mu.Unlock()
	if kill != nil {
		kill()
	}
	return nil
}

// Freeze stops a proxy from taking configuration and answering its admin, as
// SIGSTOP would; false lets it go on.
func (f *Fake) Freeze(id string, on bool) error {
	p, err := f.get("freeze proxy", id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case on && p.frozen == nil:
		p.frozen = make(chan struct{})
	case !on && p.frozen != nil:
		close(p.frozen)
		p.frozen = nil
	}
	return nil
}

// Warm makes listeners and clusters that arrive from now on stay warming:
// accepted, not active. false makes them active.
func (f *Fake) Warm(id string, on bool) error {
	p, err := f.get("warm proxy", id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.warming = on
	p.state.settle(on)
	return nil
}

// Refuse makes a proxy reject resources for which why gives a reason; nil ends
// that.
func (f *Fake) Refuse(id string, why func(typeURL, name string) string) error {
	p, err := f.get("refuse at proxy", id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = why
	return nil
}

var errFrozen = errors.New("the proxy is frozen")

// thawed waits until the proxy is not frozen.
func (p *instance) thawed(ctx context.Context) error {
	for {
		p.mu.Lock()
		frozen := p.frozen
		p.mu.Unlock()
		if frozen == nil {
			return nil
		}
		select {
		case <-frozen:
		case <-ctx.Done():
			return errors.Join(errFrozen, ctx.Err())
		}
	}
}

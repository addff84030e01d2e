// Package enginetest holds what engines are tested with: the conformance suite
// Run, and Fake, an engine without containers that passes it and works inside
// testing/synctest bubbles, in virtual time.
//
// Concurrency: Fake is safe for concurrent use.
package enginetest

import (
	"context"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// Program is what a fake container runs; it gives the exit code. It ends when
// p.Killed is closed.
type Program func(p *Proc) int

// Proc is a fake process.
type Proc struct {
	Spec engine.Spec
	// Args is the whole command line, image's defaults included.
	Args []string
	// Signals but SIGKILL.
	Signals <-chan syscall.Signal
	// Killed is closed by SIGKILL, by OOM, and by Close of the engine.
	Killed <-chan struct{}
	Stdin  io.Reader
	Stdout io.Writer

	c *container
	f *Fake
}

// OOM ends the process as the kernel would, with that much memory in use. A
// program returns its result.
func (p *Proc) OOM(bytes int64) int {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	p.c.oom, p.c.memory = true, bytes
	return 137
}

// SetMemory sets what Usage shows.
func (p *Proc) SetMemory(bytes int64) {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	p.c.memory = bytes
}

// Listen opens a port in the container's namespace, for Fake.Dial.
func (p *Proc) Listen(port int) net.Listener {
	l := &listener{conns: make(chan net.Conn), done: p.c.killed, closed: make(chan struct{})}
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	p.c.ports[port] = l
	return l
}

type container struct {
	spec    engine.Spec
	state   engine.State
	pid     int
	started time.Time
	exit    *engine.Exit
	memory  int64
	oom     bool
	signals chan syscall.Signal
	killed  chan struct{}
	gone    chan struct{} // closed after exit was set
	ports   map[int]*listener
	log     *os.File
	once    sync.Once
}

// Fake is an engine whose containers are goroutines. The zero value is not
// usable: see NewFake.
type Fake struct {
	mu         sync.Mutex
	containers map[string]*container
	images     map[string]engine.Image
	programs   map[string]Program
	pullErrs   map[string]error
	pulls      map[string]int
	nextPid    int
	down       bool
	wg         sync.WaitGroup
}

// NewFake gives an engine in which every image exists and runs the suite's verbs
// (see Verbs) by its command line, or sleeps when that names none.
func NewFake() *Fake {
	return &Fake{
		containers: map[string]*container{}, images: map[string]engine.Image{}, programs: map[string]Program{},
		pullErrs: map[string]error{}, pulls: map[string]int{}, nextPid: 1000,
	}
}

// Script makes every container whose image reference or first command word
// contains name run the program.
func (f *Fake) Script(name string, p Program) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.programs[name] = p
}

// FailPull makes pulls of the reference fail; nil heals.
func (f *Fake) FailPull(ref string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pullErrs[ref] = err
}

// Pulls counts pulls of a reference.
func (f *Fake) Pulls(ref string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pulls[ref]
}

// SetDown makes every call fail as if the engine had crashed; containers go on.
func (f *Fake) SetDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// Close kills every container and waits for their goroutines.
func (f *Fake) Close() {
	f.mu.Lock()
	all := slices.Collect(maps.Values(f.containers))
	f.mu.Unlock()
	for _, c := range all {
		f.kill(c)
	}
	f.wg.Wait()
}

// Kill ends a container as `kill -9` from outside would.
func (f *Fake) Kill(id string) error { return f.Signal(context.Background(), id, 9, true) }

// Dial connects to a port that a running container of the namespace listens on.
func (f *Fake) Dial(ctx context.Context, netns string, port int) (net.Conn, error) {
	f.mu.Lock()
	var l *listener
	for _, c := range f.containers {
		if c.spec.NetNS == netns && c.state == engine.Running && c.ports[port] != nil {
			l = c.ports[port]
		}
	}
	f.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	return l.dial(ctx)
}

func (f *Fake) get(doing, id string) (*container, error) {
	if f.down {
		return nil, api.E(api.Unavailable, doing, "the engine is down")
	}
	c := f.containers[id]
	if c == nil {
		return nil, api.E(api.NotFound, doing, "no container %s", id)
	}
	return c, nil
}

// Pull implements engine.Engine.
func (f *Fake) Pull(ctx context.Context, ref string) (engine.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pulls[ref]++
	if f.down {
		return engine.Image{}, api.E(api.Unavailable, "pull "+ref, "the engine is down")
	}
	if err := f.pullErrs[ref]; err != nil {
		return engine.Image{}, err
	}
	_, digest, ok := strings.Cut(ref, "@")
	if !ok {
		return engine.Image{}, api.E(api.Invalid, "pull "+ref, "the reference has no digest")
	}
	img := engine.Image{Ref: ref, Digest: digest, Entrypoint: []string{"/work"}, WorkingDir: "/"}
	f.images[ref] = img
	return img, ctx.Err()
}

// Create implements engine.Engine.
func (f *Fake) Create(_ context.Context, spec engine.Spec) error {
	doing := "create container " + spec.ID
	if err := engine.CheckCapabilities(spec.AddCapabilities); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.down:
		return api.E(api.Unavailable, doing, "the engine is down")
	case f.containers[spec.ID] != nil:
		return api.E(api.Exists, doing, "it is there")
	case f.images[spec.Image].Ref == "":
		return api.E(api.NotFound, doing, "image %s was not pulled", spec.Image)
	}
	c := &container{
		spec: spec, state: engine.Created, signals: make(chan syscall.Signal, 16),
		killed: make(chan struct{}), gone: make(chan struct{}), ports: map[int]*listener{},
	}
	if spec.LogPath != "" {
		l, err := os.OpenFile(spec.LogPath, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
		if err != nil {
			return api.E(api.Internal, doing, "open log: %w", err)
		}
		c.log = l
	}
	f.nextPid++
	c.pid = f.nextPid
	f.containers[spec.ID] = c
	return nil
}

func (f *Fake) program(c *container) (Program, []string) {
	args := c.spec.Command
	if len(args) == 0 {
		args = f.images[c.spec.Image].Entrypoint
	}
	args = slices.Concat(args, c.spec.Args)
	for name, p := range f.programs {
		if strings.Contains(c.spec.Image, name) || strings.Contains(args[0], name) {
			return p, args
		}
	}
	return Verbs, args
}

// Start implements engine.Engine.
func (f *Fake) Start(_ context.Context, id string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.get("start container "+id, id)
	if err != nil {
		return 0, err
	}
	if c.state != engine.Created {
		return 0, api.E(api.Precondition, "start container "+id, "it was started before")
	}
	c.state, c.started, c.memory = engine.Running, time.Now(), 1<<20
	p, args := f.program(c)
	proc := &Proc{Spec: c.spec, Args: args, Signals: c.signals, Killed: c.killed, Stdin: eof{}, Stdout: c.output(), c: c, f: f}
	f.wg.Go(func() {
		f.exited(c, p(proc))
	})
	return c.pid, nil
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

func (c *container) output() io.Writer {
	if c.log == nil {
		return io.Discard
	}
	return c.log
}

func (f *Fake) exited(c *container, code int) {
	c.once.Do(func() {
		f.mu.Lock()
		x := engine.Exit{Code: code, Time: time.Now(), OOM: c.oom}
		if c.oom {
			x.MemoryBytes = c.memory
		}
		c.state, c.exit = engine.Exited, &x
		f.mu.Unlock()
		close(c.killed)
		close(c.gone)
		if c.log != nil {
			_ = c.log.Close()
		}
	})
}

func (f *Fake) kill(c *container) { f.exited(c, 137) }

// Signal implements engine.Engine.
func (f *Fake) Signal(_ context.Context, id string, sig int, _ bool) error {
	f.mu.Lock()
	c, err := f.get("signal container "+id, id)
	if err == nil && c.state != engine.Running {
		err = api.E(api.Precondition, "signal container "+id, "it does not run")
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if sig == int(syscall.SIGKILL) {
		f.kill(c)
		return nil
	}
	select {
	case c.signals <- syscall.Signal(sig):
	default: // as with a real process, pending signals merge
	}
	return nil
}

// Wait implements engine.Engine.
func (f *Fake) Wait(ctx context.Context, id string) (engine.Exit, error) {
	f.mu.Lock()
	c := f.containers[id]
	f.mu.Unlock()
	if c == nil {
		return engine.Exit{}, api.E(api.NotFound, "wait for container "+id, "no such container")
	}
	select {
	case <-c.gone:
		f.mu.Lock()
		defer f.mu.Unlock()
		return *c.exit, nil
	case <-ctx.Done():
		return engine.Exit{}, api.E(api.Canceled, "wait for container "+id, "%w", ctx.Err())
	}
}

// Delete implements engine.Engine.
func (f *Fake) Delete(_ context.Context, id string) error {
	f.mu.Lock()
	if f.down {
		f.mu.Unlock()
		return api.E(api.Unavailable, "delete container "+id, "the engine is down")
	}
	c := f.containers[id]
	delete(f.containers, id)
	f.mu.Unlock()
	if c != nil {
		f.kill(c)
	}
	return nil
}

func (c *container) view() engine.Container {
	out := engine.Container{ID: c.spec.ID, Labels: maps.Clone(c.spec.Labels), State: c.state, StartedAt: c.started}
	if c.state == engine.Running {
		out.Pid = c.pid
	}
	if c.exit != nil {
		x := *c.exit
		out.Exit = &x
	}
	return out
}

// Get implements engine.Engine.
func (f *Fake) Get(_ context.Context, id string) (engine.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.get("get container "+id, id)
	if err != nil {
		return engine.Container{}, err
	}
	return c.view(), nil
}

// List implements engine.Engine.
func (f *Fake) List(context.Context) ([]engine.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return nil, api.E(api.Unavailable, "list containers", "the engine is down")
	}
	var out []engine.Container
	for _, id := range slices.Sorted(maps.Keys(f.containers)) {
		out = append(out, f.containers[id].view())
	}
	return out, nil
}

// Usage implements engine.Engine.
func (f *Fake) Usage(_ context.Context, id string) (engine.Usage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.get("usage of container "+id, id)
	if err != nil {
		return engine.Usage{}, err
	}
	if c.state != engine.Running {
		return engine.Usage{}, api.E(api.Precondition, "usage of container "+id, "it does not run")
	}
	return engine.Usage{MemoryBytes: c.memory, MemoryLimit: c.spec.MemoryBytes, Pids: 1}, nil
}

// Exec implements engine.Engine: it runs a verb beside the container.
func (f *Fake) Exec(ctx context.Context, id string, spec engine.ExecSpec) (int, error) {
	f.mu.Lock()
	c, err := f.get("exec in container "+id, id)
	if err == nil && c.state != engine.Running {
		err = api.E(api.Precondition, "exec in container "+id, "it does not run")
	}
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	execCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &Proc{Spec: c.spec, Args: spec.Command, Signals: nil, Killed: mergeDone(execCtx, c.killed), Stdin: spec.Stdin, Stdout: spec.Stdout, c: c, f: f}
	if p.Stdin == nil {
		p.Stdin = eof{}
	}
	if p.Stdout == nil {
		p.Stdout = io.Discard
	}
	code := Verbs(p)
	return code, ctx.Err()
}

func mergeDone(ctx context.Context, other <-chan struct{}) <-chan struct{} {
	out := make(chan struct{})
	go func() {
		defer close(out)
		select {
		case <-ctx.Done():
		case <-other:
		}
	}()
	return out
}

// Ping implements engine.Engine.
func (f *Fake) Ping(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return api.E(api.Unavailable, "ping the engine", "it is down")
	}
	return nil
}

// listener is a net.Listener over pipes.
type listener struct {
	conns  chan net.Conn
	done   <-chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (l *listener) dial(ctx context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.done:
		return nil, syscall.ECONNREFUSED
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return fakeAddr{} }

type fakeAddr struct{}

func (fakeAddr) Network() string { return "fake" }
func (fakeAddr) String() string  { return "fake" }

var _ engine.Engine = (*Fake)(nil)

package localfleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

var nopLogger = slog.New(slog.DiscardHandler)

// Progress tells people what happens: a step that began, and how it ended.
type Progress interface {
	Begin(step string)
	End(err error)
}

// Config of a Supervisor.
type Config struct {
	Dirs  Dirs
	Fleet Fleet
	Tools Tools
	Log   *slog.Logger
	// Progress is told of each step of the start; may be nil.
	Progress Progress
	// Ready is called once when everything is up; may be nil.
	Ready func(context.Context, Status)
	// Contexts is the file in which the CLI's context is written.
	Contexts string
	// Apply applies manifests as the CLI does.
	Apply func(ctx context.Context, contexts string, files []string) error
}

// Supervisor runs the fleet's processes.
type Supervisor struct {
	cfg   Config
	parts *parts
	net   *network
	rec   *ledger
	log   *slog.Logger

	mu    sync.Mutex
	procs map[string]*process
	order []string
	wg    sync.WaitGroup

	cutNodes map[string]bool
	phase    string // what `status` says while starting
	ready    bool
	fault    string
}

// NewSupervisor prepares; nothing is started.
func NewSupervisor(c Config) (*Supervisor, error) {
	n := names{c.Dirs.ID}
	s := &Supervisor{cfg: c, log: c.Log, procs: map[string]*process{}, cutNodes: map[string]bool{}, rec: openLedger(c.Dirs.ledgerFile())}
	s.parts = &parts{fleet: &s.cfg.Fleet, dirs: c.Dirs, tools: c.Tools, names: n}
	s.net = &network{fleet: &s.cfg.Fleet, names: n}
	return s, nil
}

// Run starts the fleet and keeps it until ctx ends; then it stops all and leaves
// nothing but data. A fault of the start is shown by status, and stops all.
func (s *Supervisor) Run(ctx context.Context) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	// What an earlier, killed supervisor left is taken away; data stays.
	if err := Clean(ctx, s.cfg.Dirs, false); err != nil {
		return err
	}
	for _, d := range []string{s.parts.data("logs"), s.parts.data("config"), s.parts.data("tokens"), s.parts.run()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	s.rec.put("supervisor", os.Getpid())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ctl, err := s.serveControl(ctx, cancel)
	if err != nil {
		return err
	}
	startErr := s.start(ctx)
	s.mu.Lock()
	if startErr != nil && ctx.Err() == nil {
		s.fault = startErr.Error()
		s.mu.Unlock()
		s.log.Error("the fleet did not start", "error", startErr)
		// Whoever waits must be able to read why.
		_ = pause(ctx, 2*time.Second)
	} else {
		s.ready, s.phase = true, "running"
		s.mu.Unlock()
		if s.cfg.Ready != nil && ctx.Err() == nil {
			s.cfg.Ready(ctx, s.Status(ctx))
		}
		<-ctx.Done()
	}
	cancel(nil)
	s.wg.Wait()
	ctl()
	if errors.Is(startErr, context.Canceled) {
		startErr = nil
	}
	return errors.Join(startErr, Clean(context.WithoutCancel(ctx), s.cfg.Dirs, false))
}

// lock makes sure that one supervisor has the data folder.
func (s *Supervisor) lock() (func(), error) {
	if err := Claim(s.cfg.Dirs); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(s.cfg.Dirs.Data, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, api.E(api.Precondition, "start the fleet", "a fleet is running on %s already: see `portolan status`, or stop it with `portolan down`", s.cfg.Dirs.Data)
	}
	return func() { _ = f.Close() }, nil
}

// launch supervises a command from now on.
func (s *Supervisor) launch(ctx context.Context, c Command) {
	p := newProcess(c, s.rec, s.log)
	s.mu.Lock()
	s.procs[c.Name] = p
	s.order = append(s.order, c.Name)
	s.mu.Unlock()
	s.wg.Go(func() {
		p.run(ctx)
	})
}

// await waits until a process is healthy.
func (s *Supervisor) await(ctx context.Context, name string, limit time.Duration) error {
	p, err := s.find(name)
	if err != nil {
		return err
	}
	var last ProcessState
	for end := time.Now().Add(limit); time.Now().Before(end); {
		last = p.state(ctx)
		if last.State == "running" && last.Health == "ok" {
			return nil
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s is %s (%s) after %s: see %s; its last lines: %s", name, last.State, last.Health, limit, p.cmd.LogFile, lastLines(p.cmd.LogFile, 2))
}

func (s *Supervisor) find(name string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.procs[name]; ok {
		return p, nil
	}
	known := append([]string(nil), s.order...)
	sort.Strings(known)
	return nil, api.E(api.NotFound, "find a process", "there is no %q; there are: %s", name, strings.Join(known, ", "))
}

// step runs one named step of the start.
func (s *Supervisor) step(name string, fn func() error) error {
	s.mu.Lock()
	s.phase = name
	s.mu.Unlock()
	if s.cfg.Progress != nil {
		s.cfg.Progress.Begin(name)
	}
	err := fn()
	if s.cfg.Progress != nil {
		s.cfg.Progress.End(err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

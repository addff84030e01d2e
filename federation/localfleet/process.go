package localfleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Command is a child process to keep running.
type Command struct {
	// Name is unique in the fleet: "database", "federation-1", "eu-west",
	// "eu-west-1/agent".
	Name string
	Path string
	Args []string
	Env  []string
	Dir  string
	// NS is the network namespace to enter; empty is the machine's own.
	NS  string
	UID int // 0 stays root
	GID int
	// StopSignal asks it to end; SIGTERM when 0.
	StopSignal syscall.Signal
	// Health says whether it answers.
	Health func(context.Context) error
	// Address for people.
	Address string
	LogFile string
	// Stdin is what it reads; empty is nothing.
	Stdin string
}

// ProcessState is what `status` shows.
type ProcessState struct {
	Name     string    `json:"name"`
	State    string    `json:"state"` // "running", "held", "frozen", "restarting"
	Health   string    `json:"health"`
	Pid      int       `json:"pid,omitempty"`
	Started  time.Time `json:"started"`
	Restarts int       `json:"restarts"`
	Address  string    `json:"address,omitempty"`
	LogFile  string    `json:"log"`
}

// restart backoff of a child that dies.
const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
	stopGrace  = 10 * time.Second
)

// process supervises one Command.
type process struct {
	cmd Command
	log *slog.Logger
	rec *ledger

	mu       sync.Mutex
	pid      int
	started  time.Time
	restarts int
	held     bool
	frozen   bool
	wake     chan struct{}
}

func newProcess(c Command, rec *ledger, log *slog.Logger) *process {
	return &process{cmd: c, rec: rec, log: log.With("process", c.Name), wake: make(chan struct{}, 1)}
}

func (p *process) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run keeps the process running until ctx is done, then stops it.
func (p *process) run(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		p.mu.Lock()
		held := p.held
		p.mu.Unlock()
		if held {
			select {
			case <-ctx.Done():
			case <-p.wake:
			}
			continue
		}
		cmd, err := p.start()
		if err != nil {
			p.log.Error("child did not start", "error", err)
		} else {
			began := time.Now()
			p.wait(ctx, cmd)
			if time.Since(began) > 30*time.Second {
				backoff = minBackoff
			}
		}
		p.mu.Lock()
		p.pid, p.frozen = 0, false
		held = p.held
		if !held {
			p.restarts++
		}
		p.mu.Unlock()
		p.rec.remove(p.cmd.Name)
		if held || ctx.Err() != nil {
			continue
		}
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-time.After(backoff):
		}
		backoff = min(backoff*2, maxBackoff)
	}
}

func (p *process) start() (*exec.Cmd, error) {
	logFile, err := os.OpenFile(p.cmd.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open log of %s: %w", p.cmd.Name, err)
	}
	defer func() { _ = logFile.Close() }()
	path, args := p.cmd.Path, p.cmd.Args
	if p.cmd.NS != "" {
		// nsenter enters and then becomes the command: the pid stays.
		args = append([]string{"--net=" + nsPath(p.cmd.NS), "--", path}, args...)
		path = "nsenter"
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = logFile, logFile, p.cmd.Dir
	cmd.Env = append(os.Environ(), p.cmd.Env...)
	if p.cmd.Stdin != "" {
		cmd.Stdin = strings.NewReader(p.cmd.Stdin)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if p.cmd.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(p.cmd.UID), Gid: uint32(p.cmd.GID)}
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.cmd.Name, err)
	}
	p.mu.Lock()
	p.pid, p.started = cmd.Process.Pid, time.Now()
	p.mu.Unlock()
	p.rec.put(p.cmd.Name, cmd.Process.Pid)
	return cmd, nil
}

// wait returns when the child has ended. When ctx ends first, it is asked to
// stop, then killed.
func (p *process) wait(ctx context.Context, cmd *exec.Cmd) {
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = cmd.Wait()
	}()
	select {
	case <-done:
		p.log.Warn("child ended", "error", fmt.Sprint(err))
		return
	case <-ctx.Done():
	}
	p.signal(p.stopSignal())
	_ = cmd.Process.Signal(syscall.SIGCONT)
	select {
	case <-done:
	case <-time.After(stopGrace):
		_ = cmd.Process.Kill()
		<-done
	}
}

func (p *process) stopSignal() syscall.Signal {
	if p.cmd.StopSignal != 0 {
		return p.cmd.StopSignal
	}
	return syscall.SIGTERM
}

// signal sends to the child; false when it does not run.
func (p *process) signal(sig syscall.Signal) bool {
	p.mu.Lock()
	pid := p.pid
	p.mu.Unlock()
	return pid > 0 && syscall.Kill(pid, sig) == nil
}

func (p *process) hold(on bool) {
	p.mu.Lock()
	p.held = on
	p.mu.Unlock()
	p.poke()
}

func (p *process) setFrozen(on bool) {
	p.mu.Lock()
	p.frozen = on
	p.mu.Unlock()
}

func (p *process) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid > 0
}

func (p *process) state(ctx context.Context) ProcessState {
	p.mu.Lock()
	s := ProcessState{Name: p.cmd.Name, Pid: p.pid, Started: p.started, Restarts: p.restarts, Address: p.cmd.Address, LogFile: p.cmd.LogFile}
	switch {
	case p.frozen:
		s.State = "frozen"
	case p.pid > 0:
		s.State = "running"
	case p.held:
		s.State = "held"
	default:
		s.State = "restarting"
	}
	p.mu.Unlock()
	s.Health = "-"
	if s.State == "running" {
		s.Health = "ok"
		if p.cmd.Health != nil {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			if err := p.cmd.Health(ctx); err != nil {
				s.Health = "failing: " + firstLine(err.Error())
			}
		}
	}
	return s
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	if len(s) > 120 {
		s = s[:120] + "…"
	}
	return s
}

// startTime of a process in clock ticks since boot: with the pid it names a
// process for good. Field 22 of proc(5) stat.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The command's name may hold spaces and parentheses: count from the last ")".
	i := strings.LastIndexByte(string(b), ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, errors.New("malformed stat")
	}
	return strconv.ParseUint(f[19], 10, 64)
}

package envoy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/nodeagent/proxy"
)

// healthyAfter is how long a proxy must have run for its next death to count as
// the first.
const healthyAfter = 30 * time.Second

// supervisor keeps one proxy running. Its goroutine owns the process; others
// read the status.
type supervisor struct {
	cfg  Config
	plan *plan
	quit chan struct{}
	gone chan struct{}

	mu       sync.Mutex
	proc     *process // nil between two lives
	restarts int
}

func newSupervisor(cfg Config, p *plan) *supervisor {
	return &supervisor{cfg: cfg, plan: p, quit: make(chan struct{}), gone: make(chan struct{})}
}

// begin adopts or starts the proxy and, when that went well, keeps it running.
func (s *supervisor) begin() error {
	p, err := s.adopt()
	if err == nil && p == nil {
		p, err = s.start()
	}
	if err != nil {
		return err
	}
	s.set(p)
	go s.loop()
	return nil
}

// adopt gives the process of an earlier agent when it was started the same way;
// one that was not is ended.
func (s *supervisor) adopt() (*process, error) {
	p, err := recorded(s.plan)
	if err != nil || p == nil {
		return nil, err
	}
	if p.Spec == s.plan.digest {
		return p, nil
	}
	defer p.release()
	return nil, p.end(s.cfg.StopGrace)
}

// recorded takes hold of the process in the pid file, or of one that has none;
// nil when there is no process.
func recorded(p *plan) (*process, error) {
	r, ok := readRecord(p.file("pid"))
	if ok {
		proc, err := openProcess(r)
		if err == nil || !errors.Is(err, errGone) {
			return proc, err
		}
	}
	r, ok = findOrphan(p.dir)
	if !ok {
		return nil, nil
	}
	proc, err := openProcess(r)
	if errors.Is(err, errGone) {
		return nil, nil
	}
	return proc, err
}

func (s *supervisor) start() (*process, error) {
	// A dead proxy's admin socket would be in the way of the next one's.
	if err := os.Remove(s.plan.file(proxy.AdminSocketFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale admin socket: %w", err)
	}
	p, err := spawn(s.plan.argv, s.plan.dir, s.plan.file("pid"), s.plan.file("envoy.log"), s.plan.digest)
	if err != nil || s.cfg.CgroupParent == "" {
		return p, err
	}
	// Without its bounds a proxy still serves: better than none.
	if err := join(s.cfg.group(s.plan.id), s.cfg.MemoryBytes, p.PID); err != nil {
		s.cfg.Log.Error("proxy runs without bounds of its own", "proxy", s.plan.id, "error", err)
	}
	return p, nil
}

func (s *supervisor) loop() {
	defer close(s.gone)
	backoff := s.cfg.MinBackoff
	for {
		began := time.Now()
		if !s.watch() {
			return
		}
		if time.Since(began) > healthyAfter {
			backoff = s.cfg.MinBackoff
		}
		for {
			if !s.pause(jitter(backoff)) {
				return
			}
			backoff = min(2*backoff, s.cfg.MaxBackoff)
			p, err := s.start()
			if err == nil {
				s.cfg.Log.Warn("proxy restarted", "proxy", s.plan.id, "pid", p.PID)
				s.set(p)
				break
			}
			s.cfg.Log.Error("proxy does not start", "proxy", s.plan.id, "error", err)
		}
	}
}

// watch returns true when the process died, false when the supervisor is to let go.
func (s *supervisor) watch() bool {
	s.mu.Lock()
	p := s.proc
	s.mu.Unlock()
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-s.quit:
			p.release()
			return false
		case <-tick.C:
			if err := boundLog(s.plan.file("envoy.log"), s.cfg.MaxLogBytes); err != nil {
				s.cfg.Log.Warn("proxy log cannot be bounded", "proxy", s.plan.id, "error", err)
			}
		case <-p.done:
			p.release()
			s.mu.Lock()
			s.proc = nil
			s.restarts++
			s.mu.Unlock()
			s.cfg.Log.Warn("proxy died", "proxy", s.plan.id, "pid", p.PID)
			return true
		}
	}
}

// pause is false when the supervisor is to let go.
func (s *supervisor) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.quit:
		return false
	case <-t.C:
		return true
	}
}

func (s *supervisor) set(p *process) {
	s.mu.Lock()
	s.proc = p
	s.mu.Unlock()
}

func (s *supervisor) status() proxy.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := proxy.Status{Restarts: s.restarts}
	if s.proc != nil {
		st.Running, st.Pid = true, s.proc.PID
	}
	return st
}

// detach ends the supervision, not the proxy.
func (s *supervisor) detach() {
	close(s.quit)
	<-s.gone
}

// boundLog copies a log that grew too large aside and empties it; the proxy
// appends, so that it goes on at the beginning.
func boundLog(path string, limit int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil || st.Size() <= limit {
		return err
	}
	if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
		return err
	}
	tail, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return err
	}
	if err := writeFile(path+".1", tail, 0o600); err != nil {
		return err
	}
	return f.Truncate(0)
}

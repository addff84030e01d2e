package containerd

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// Exec implements engine.Engine. When ctx ends the process is killed.
func (e *Engine) Exec(ctx context.Context, id string, spec engine.ExecSpec) (int, error) {
	doing := "exec in container " + id
	nctx := e.in(ctx)
	c, err := e.client.LoadContainer(nctx, id)
	if err != nil {
		return 0, failed(doing, err)
	}
	process, err := execProcess(nctx, c, spec)
	if err != nil {
		return 0, failed(doing, err)
	}
	// Without IO: attaching would leak the fifos of an earlier attachment.
	task, err := c.Task(nctx, nil)
	if err != nil {
		return 0, failed(doing, err)
	}
	in := &stdin{r: spec.Stdin, eof: make(chan struct{})}
	p, err := task.Exec(nctx, spec.ID, process, e.execIO(spec, in))
	if err != nil {
		return 0, failed(doing, err)
	}
	code, err := e.runExec(nctx, p, spec, in)
	return code, failed(doing, err)
}

func execProcess(ctx context.Context, c client.Container, spec engine.ExecSpec) (*specs.Process, error) {
	s, err := c.Spec(ctx)
	if err != nil {
		return nil, err
	}
	if len(spec.Command) == 0 {
		return nil, api.E(api.Invalid, "exec", "no command")
	}
	p := *s.Process
	p.Args, p.Terminal = spec.Command, spec.TTY
	if spec.TTY {
		p.Env = append(append([]string(nil), p.Env...), "TERM=xterm")
	}
	return &p, nil
}

func (e *Engine) execIO(spec engine.ExecSpec, in *stdin) cio.Creator {
	var r io.Reader
	if spec.Stdin != nil {
		r = in
	}
	out, errs := spec.Stdout, spec.Stderr
	if out == nil {
		out = io.Discard
	}
	if errs == nil {
		errs = io.Discard
	}
	opts := []cio.Opt{cio.WithStreams(r, out, errs)}
	if spec.TTY {
		opts = append(opts, cio.WithTerminal)
	}
	if e.cfg.RuncRoot != "" {
		opts = append(opts, cio.WithFIFODir(filepath.Join(e.cfg.RuncRoot, "fifo")))
	}
	return cio.NewCreator(opts...)
}

// runExec starts the process and stays until it has ended and its output is read.
func (e *Engine) runExec(ctx context.Context, p client.Process, spec engine.ExecSpec, in *stdin) (int, error) {
	clean := context.WithoutCancel(ctx)
	defer func() {
		bounded, cancel := context.WithTimeout(clean, killBound)
		defer cancel()
		if _, err := p.Delete(bounded, client.WithProcessKill); err != nil && !is(err, api.NotFound) {
			e.cfg.Log.Debug("exec process not deleted", "id", p.ID(), "error", err)
		}
	}()
	waitCtx, stopWait := context.WithCancel(clean)
	defer stopWait()
	ended, err := p.Wait(waitCtx)
	if err != nil {
		return 0, err
	}
	if err := p.Start(ctx); err != nil {
		return 0, err
	}
	done := ctx.Done()
	eof := in.eof
	for {
		select {
		case x := <-ended:
			if err := x.Error(); err != nil {
				return 0, err
			}
			if ctx.Err() != nil {
				return int(x.ExitCode()), ctx.Err()
			}
			p.IO().Wait()
			return int(x.ExitCode()), nil
		case s := <-spec.Resize:
			if err := p.Resize(ctx, uint32(s.Columns), uint32(s.Rows)); err != nil && ctx.Err() == nil {
				e.cfg.Log.Debug("terminal not resized", "id", p.ID(), "error", err)
			}
		case <-eof:
			eof = nil
			if err := p.CloseIO(ctx, client.WithStdinCloser); err != nil && !is(err, api.NotFound) && ctx.Err() == nil {
				e.cfg.Log.Debug("stdin not closed", "id", p.ID(), "error", err)
			}
		case <-done:
			done = nil
			if err := p.Kill(clean, syscall.SIGKILL); err != nil {
				return 0, errors.Join(ctx.Err(), err)
			}
			t := time.AfterFunc(killBound, stopWait)
			defer t.Stop()
		}
	}
}

// stdin tells when its reader has ended, so that the process's own end can be
// closed: the shim holds it open otherwise.
type stdin struct {
	r    io.Reader
	eof  chan struct{}
	once sync.Once
}

func (s *stdin) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil {
		s.once.Do(func() { close(s.eof) })
	}
	return n, err
}

package agent

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// probe runs one probe; nil means that it passed.
func (r *runner) probe(ctx context.Context, id string, p *portolanv1.Probe) error {
	switch {
	case p.GetHttp() != nil:
		return r.httpCheck(ctx, p.GetHttp())
	case p.GetTcp() != nil:
		c, err := r.a.cfg.Dial(ctx, r.attached().NetNS, int(p.GetTcp().GetPort()))
		if err != nil {
			return err
		}
		return c.Close()
	case p.GetExec() != nil:
		return r.execCheck(ctx, id, p.GetExec())
	}
	return nil
}

// httpCheck passes on 200 to 399; redirects are not followed.
func (r *runner) httpCheck(ctx context.Context, h *portolanv1.Probe_HttpCheck) error {
	c, err := r.a.cfg.Dial(ctx, r.attached().NetNS, int(h.GetPort()))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	path := h.GetPath()
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort("127.0.0.1", strconv.Itoa(int(h.GetPort())))+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "portolan-probe")
	for k, v := range h.GetHeaders() {
		if strings.EqualFold(k, "host") {
			req.Host = v
		} else {
			req.Header.Set(k, v)
		}
	}
	req.Close = true
	if err := req.Write(c); err != nil {
		return timeoutWords(ctx, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(c, 64<<10)), req)
	if err != nil {
		return timeoutWords(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode < 200 || resp.StatusCode >= 400 {
		return fmt.Errorf("GET %s answered %d", path, resp.StatusCode)
	}
	return nil
}

func timeoutWords(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("no answer in time: %w", ctx.Err())
	}
	return err
}

func (r *runner) execCheck(ctx context.Context, id string, e *portolanv1.Probe_ExecCheck) error {
	var out limitedBuffer
	code, err := r.a.cfg.Engine.Exec(ctx, id, engine.ExecSpec{ID: execID(), Command: e.GetCommand(), Stdout: &out, Stderr: &out})
	if err != nil {
		return timeoutWords(ctx, err)
	}
	if code != 0 {
		return fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(out.b.String()))
	}
	return nil
}

// limitedBuffer keeps the first bytes.
type limitedBuffer struct{ b bytes.Buffer }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if room := 256 - l.b.Len(); room > 0 {
		l.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (r *runner) preStop(ctx context.Context, id string, h *portolanv1.Hook) error {
	switch {
	case h.GetExec() != nil:
		return r.execCheck(ctx, id, h.GetExec())
	case h.GetHttp() != nil:
		return r.httpCheck(ctx, h.GetHttp())
	case h.GetSleep() != nil:
		sleep(ctx, h.GetSleep().AsDuration())
	}
	return nil
}

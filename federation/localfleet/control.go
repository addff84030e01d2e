package localfleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// Status is what `portolan status` shows.
type Status struct {
	Fleet     string         `json:"fleet"`
	DataDir   string         `json:"dataDir"`
	Phase     string         `json:"phase"`
	Ready     bool           `json:"ready"`
	Fault     string         `json:"fault,omitempty"`
	Processes []ProcessState `json:"processes"`
	Cut       []string       `json:"cut,omitempty"`
	URL       string         `json:"url,omitempty"`
	Try       []string       `json:"try,omitempty"`
}

// Fault is a request of `portolan local`.
type Fault struct {
	// Verb: stop, start, kill, freeze, thaw, cut, heal.
	Verb string `json:"verb"`
	// Name of a process, cluster or node, or NODE/envoy/REPLICA.
	Name string `json:"name"`
	// Hold keeps a killed process down.
	Hold bool `json:"hold"`
}

// serveControl answers on the control socket until the returned function is
// called.
func (s *Supervisor) serveControl(ctx context.Context, cancel context.CancelCauseFunc) (func(), error) {
	sock := s.cfg.Dirs.controlSocket()
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", sock)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(sock, 0o600); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.Status(r.Context()))
	})
	mux.HandleFunc("POST /fault", func(w http.ResponseWriter, r *http.Request) {
		var f Fault
		if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&f); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := s.Fault(r.Context(), f); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	mux.HandleFunc("POST /down", func(http.ResponseWriter, *http.Request) { cancel(errors.New("asked to stop")) })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	go func() { _ = srv.Serve(l) }()
	return func() { _ = srv.Close() }, nil
}

// Status of everything now.
func (s *Supervisor) Status(ctx context.Context) Status {
	s.mu.Lock()
	st := Status{Fleet: s.cfg.Fleet.Name, DataDir: s.cfg.Dirs.Data, Phase: s.phase, Ready: s.ready, Fault: s.fault, Try: s.cfg.Fleet.Sample.Try}
	if s.cfg.Fleet.Sample.Host != "" {
		st.URL = fmt.Sprintf("http://%s:%d%s", s.cfg.Fleet.Sample.Host, s.cfg.Fleet.IngressPort, s.cfg.Fleet.Sample.Path)
	}
	var ps []*process
	for _, name := range s.order {
		ps = append(ps, s.procs[name])
	}
	s.mu.Unlock()
	st.Processes = make([]ProcessState, len(ps))
	done := make(chan struct{})
	for i, p := range ps {
		go func() {
			st.Processes[i] = p.state(ctx)
			done <- struct{}{}
		}()
	}
	for range ps {
		<-done
	}
	st.Cut = s.cuts()
	return st
}

// cuts lists clusters and nodes whose link is down.
func (s *Supervisor) cuts() []string {
	var out []string
	for i, c := range s.cfg.Fleet.Clusters {
		if b, err := os.ReadFile("/sys/class/net/" + s.parts.names.wan(i) + "/flags"); err == nil {
			if flags, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32); err == nil && flags&syscall.IFF_UP == 0 {
				out = append(out, c.Name)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.cutNodes {
		out = append(out, name)
	}
	return out
}

// Fault makes or mends one.
func (s *Supervisor) Fault(ctx context.Context, f Fault) error {
	switch f.Verb {
	case "cut", "heal":
		return s.link(ctx, f)
	}
	sig := map[string]syscall.Signal{"kill": syscall.SIGKILL, "freeze": syscall.SIGSTOP, "thaw": syscall.SIGCONT}[f.Verb]
	if node, replica, ok := strings.Cut(f.Name, "/envoy/"); ok {
		return s.signalProxy(node, replica, f.Verb, sig)
	}
	p, err := s.find(f.Name)
	if err != nil {
		return err
	}
	switch f.Verb {
	case "start":
		// A frozen process goes on; a held one starts.
		p.signal(syscall.SIGCONT)
		p.setFrozen(false)
		p.hold(false)
		return nil
	case "stop":
		p.hold(true)
		p.signal(syscall.SIGCONT)
		p.signal(p.stopSignal())
		return s.awaitEnd(ctx, p)
	case "kill", "freeze", "thaw":
		if f.Hold {
			p.hold(true)
		}
		if !p.signal(sig) {
			return api.E(api.Precondition, f.Verb+" "+f.Name, "it does not run")
		}
		p.setFrozen(f.Verb == "freeze")
		return nil
	}
	return api.E(api.Invalid, "make a fault", "unknown verb %q: use stop, start, kill, freeze, thaw, cut or heal", f.Verb)
}

func (s *Supervisor) awaitEnd(ctx context.Context, p *process) error {
	for end := time.Now().Add(stopGrace); time.Now().Before(end); {
		if !p.alive() {
			return nil
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	p.signal(syscall.SIGKILL)
	return nil
}

// signalProxy reaches the Envoy of a replica through its pid file.
func (s *Supervisor) signalProxy(node, replica, verb string, sig syscall.Signal) error {
	if sig == 0 {
		return api.E(api.Invalid, verb+" a proxy", "only kill, freeze and thaw are for proxies: the agent keeps them running")
	}
	file := filepath.Join(s.cfg.Dirs.Run, filepath.Base(node), "proxies", filepath.Base(replica), "pid")
	b, err := os.ReadFile(file)
	if err != nil {
		return api.E(api.NotFound, verb+" a proxy", "node %s has no proxy of replica %s", node, replica)
	}
	var rec ledgerEntry
	if err := json.Unmarshal(b, &rec); err != nil || rec.Pid <= 1 {
		return fmt.Errorf("read %s: no pid in it (%w)", file, err)
	}
	// The file outlives its process, whose number another may have by now.
	if start, err := startTime(rec.Pid); err != nil || start != rec.Start {
		return api.E(api.Precondition, verb+" a proxy", "the proxy of %s on %s does not run", replica, node)
	}
	return syscall.Kill(rec.Pid, sig)
}

// link cuts or heals a cluster's WAN or a node's link.
func (s *Supervisor) link(ctx context.Context, f Fault) error {
	cut := f.Verb == "cut"
	for i, c := range s.cfg.Fleet.Clusters {
		if c.Name == f.Name {
			if cut {
				return s.net.cutWAN(ctx, i)
			}
			return s.net.healWAN(ctx, i)
		}
		for j, n := range c.Nodes {
			if n.Name != f.Name {
				continue
			}
			do := s.net.healNode
			if cut {
				do = s.net.cutNode
			}
			if err := do(ctx, i, j); err != nil {
				return err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if cut {
				s.cutNodes[n.Name] = true
			} else {
				delete(s.cutNodes, n.Name)
			}
			return nil
		}
	}
	var known []string
	for _, c := range s.cfg.Fleet.Clusters {
		known = append(known, c.Name)
		for _, n := range c.Nodes {
			known = append(known, n.Name)
		}
	}
	return api.E(api.NotFound, f.Verb+" a link", "there is no cluster or node %q; there are: %s", f.Name, strings.Join(known, ", "))
}

// Remote talks to the supervisor of a data folder.
type Remote struct {
	http *http.Client
	dirs Dirs
}

// NewRemote prepares; nothing is dialled yet.
func NewRemote(d Dirs) *Remote {
	return &Remote{dirs: d, http: &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.controlSocket())
	}}}}
}

// Running says whether a supervisor answers.
func (r *Remote) Running(ctx context.Context) bool {
	_, err := r.Status(ctx)
	return err == nil
}

func (r *Remote) call(ctx context.Context, method, path string, in any) ([]byte, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return nil, api.E(api.Precondition, "ask the local fleet", "no fleet runs on %s: start one with `portolan up`", r.dirs.Data)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(strings.TrimSpace(string(b)))
	}
	return b, nil
}

// Status asks for it.
func (r *Remote) Status(ctx context.Context) (Status, error) {
	var st Status
	b, err := r.call(ctx, http.MethodGet, "/status", nil)
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal(b, &st)
}

// Fault makes or mends one.
func (r *Remote) Fault(ctx context.Context, f Fault) error {
	_, err := r.call(ctx, http.MethodPost, "/fault", f)
	return err
}

// Down asks the supervisor to stop everything; Clean waits for it.
func (r *Remote) Down(ctx context.Context) error {
	_, err := r.call(ctx, http.MethodPost, "/down", nil)
	return err
}

package warden

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// maxConns bounds the connections that are remembered per replica; beyond it new
// ones are refused, because one that is forgotten could not be closed.
const maxConns = 8192

// Connections is what the warden needs of the node's network.
type Connections interface {
	// CloseConnections is network.Networker's.
	CloseConnections(ctx context.Context, allocation string, remotes []netip.AddrPort, port uint16) (int, error)
	// Remotes gives the remote ends of the replica's open inbound connections.
	Remotes(ctx context.Context, allocation string) ([]netip.AddrPort, error)
}

// connTable remembers TCP connections that were allowed, so that a denial can
// close them. It is kept in the node's tmpfs, because the connections outlive
// the warden.
type connTable struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	byRep map[string]*repConns
}

type repConns struct {
	conns   map[netip.AddrPort]conn
	journal *os.File
	lines   int
}

// conn is an allowed connection. The journal holds it as a line of JSON.
type conn struct {
	Remote    netip.AddrPort `json:"remote"`
	Principal string         `json:"principal"`
	Port      int            `json:"port"`
	// Since says when it was allowed; one that is very young may not be visible
	// in the kernel's list yet.
	Since time.Time `json:"since"`
	// Closing: denied since, not yet destroyed.
	closing bool
}

func newConnTable(dir string, log *slog.Logger) *connTable {
	return &connTable{dir: dir, log: log, byRep: map[string]*repConns{}}
}

const journalSuffix = ".conns"

// restore reads the journals of an earlier warden.
func (t *connTable) restore() error {
	if t.dir == "" {
		return nil
	}
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range entries {
		allocation, ok := strings.CutSuffix(e.Name(), journalSuffix)
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(t.dir, e.Name()))
		if err != nil {
			return err
		}
		r := t.rep(allocation)
		for line := range strings.Lines(string(b)) {
			var c conn
			// The last line may be cut: its connection was not answered yet.
			if json.Unmarshal([]byte(line), &c) == nil && len(r.conns) < maxConns {
				r.conns[c.Remote] = c
			}
		}
	}
	return nil
}

// rep gives the replica's part. Under mu.
func (t *connTable) rep(allocation string) *repConns {
	r := t.byRep[allocation]
	if r == nil {
		r = &repConns{conns: map[netip.AddrPort]conn{}}
		t.byRep[allocation] = r
	}
	return r
}

// add remembers an allowed connection; false when there are too many.
func (t *connTable) add(c call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.rep(c.allocation)
	if _, known := r.conns[c.source]; !known && len(r.conns) >= maxConns {
		return false
	}
	entry := conn{Remote: c.source, Principal: c.principal, Port: c.port, Since: time.Now()}
	r.conns[c.source] = entry
	if err := t.append(c.allocation, r, entry); err != nil {
		t.log.Warn("connection not noted on disk", "replica", c.allocation, "error", err)
	}
	return true
}

func (t *connTable) append(allocation string, r *repConns, c conn) error {
	if t.dir == "" {
		return nil
	}
	if r.lines > 4*maxConns {
		return t.rewrite(allocation, r)
	}
	if r.journal == nil {
		f, err := os.OpenFile(filepath.Join(t.dir, allocation+journalSuffix), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		r.journal = f
	}
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	r.lines++
	_, err = r.journal.Write(append(b, '\n'))
	return err
}

// rewrite makes the journal anew from what is known.
func (t *connTable) rewrite(allocation string, r *repConns) error {
	if t.dir == "" {
		return nil
	}
	if r.journal != nil {
		_ = r.journal.Close()
		r.journal = nil
	}
	r.lines = 0
	var b []byte
	for _, c := range r.conns {
		line, err := json.Marshal(c)
		if err != nil {
			return err
		}
		b = append(append(b, line...), '\n')
		r.lines++
	}
	path := filepath.Join(t.dir, allocation+journalSuffix)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (t *connTable) drop(c call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.rep(c.allocation).conns, c.source)
}

// forget drops a replica that is gone.
func (t *connTable) forget(keep func(allocation string) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for allocation, r := range t.byRep {
		if keep(allocation) {
			continue
		}
		if r.journal != nil {
			_ = r.journal.Close()
		}
		delete(t.byRep, allocation)
		if t.dir == "" {
			continue
		}
		if err := os.Remove(filepath.Join(t.dir, allocation+journalSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.log.Warn("journal of connections not removed", "replica", allocation, "error", err)
		}
	}
}

// close releases the journals.
func (t *connTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.byRep {
		if r.journal != nil {
			_ = r.journal.Close()
			r.journal = nil
		}
	}
}

// review asks again for every connection and marks those that are denied now.
func (t *connTable) review(ctx context.Context, w *world) (denied int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for allocation, r := range t.byRep {
		// Calls from the same peer to the same port have one answer.
		type question struct {
			principal string
			port      int
		}
		answers := map[question]bool{}
		for remote, c := range r.conns {
			q := question{c.Principal, c.Port}
			ok, known := answers[q]
			if !known {
				ok = w.decide(ctx, call{allocation: allocation, principal: c.Principal, source: remote, port: c.Port, attributes: connAttributes(c)}).Allowed
				answers[q] = ok
			}
			if !ok && !c.closing {
				denied++
			}
			c.closing = !ok
			r.conns[remote] = c
		}
	}
	return denied
}

// connAttributes stand for those that came with the first question.
func connAttributes(c conn) map[string]any {
	return map[string]any{
		"source": map[string]any{
			"address":   map[string]any{"socketAddress": map[string]any{"address": c.Remote.Addr().String(), "portValue": int(c.Remote.Port())}},
			"principal": c.Principal,
		},
		"destination":       map[string]any{"address": map[string]any{"socketAddress": map[string]any{"portValue": c.Port}}},
		"contextExtensions": map[string]any{},
	}
}

// sweep destroys what was denied. What could not be destroyed is tried again.
func (t *connTable) sweep(ctx context.Context, network Connections) error {
	t.mu.Lock()
	todo := map[string][]netip.AddrPort{}
	for allocation, r := range t.byRep {
		for remote, c := range r.conns {
			if c.closing {
				todo[allocation] = append(todo[allocation], remote)
			}
		}
	}
	t.mu.Unlock()
	var errs []error
	for allocation, remotes := range todo {
		n, err := network.CloseConnections(ctx, allocation, remotes, 0)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		t.log.Info("connections closed by policy", "replica", allocation, "denied", len(remotes), "closed", n)
		t.mu.Lock()
		r := t.rep(allocation)
		for _, remote := range remotes {
			if r.conns[remote].closing {
				delete(r.conns, remote)
			}
		}
		// The address may come back for another connection.
		errs = append(errs, t.rewrite(allocation, r))
		t.mu.Unlock()
	}
	return errors.Join(errs...)
}

// visibleAfter is how old a connection must be before its absence in the
// kernel's list means that it ended.
const visibleAfter = 10 * time.Second

// prune forgets connections that ended.
func (t *connTable) prune(ctx context.Context, network Connections, now time.Time) error {
	t.mu.Lock()
	var busy []string
	for allocation, r := range t.byRep {
		if len(r.conns) > 0 {
			busy = append(busy, allocation)
		}
	}
	t.mu.Unlock()
	var errs []error
	for _, allocation := range busy {
		open, err := network.Remotes(ctx, allocation)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		alive := make(map[netip.AddrPort]bool, len(open))
		for _, r := range open {
			alive[r] = true
		}
		t.mu.Lock()
		r := t.rep(allocation)
		before := len(r.conns)
		for remote, c := range r.conns {
			if !alive[remote] && now.Sub(c.Since) > visibleAfter {
				delete(r.conns, remote)
			}
		}
		if len(r.conns) != before {
			errs = append(errs, t.rewrite(allocation, r))
		}
		t.mu.Unlock()
	}
	return errors.Join(errs...)
}

// count is how many connections of a replica are remembered.
func (t *connTable) count(allocation string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.byRep[allocation]; r != nil {
		return len(r.conns)
	}
	return 0
}

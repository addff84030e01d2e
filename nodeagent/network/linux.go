package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"github.com/portolan-io/portolan/federation/api"
)

// Config of the real Networker.
type Config struct {
	// RunDir is the node's root-only tmpfs; namespaces are bound under its netns.
	RunDir string
	// DataDir is the node's durable directory; resolv.conf and hosts go under its net.
	DataDir string
	// DevicePrefix begins the names of the node's side of all veths; "pt" when
	// empty, at most 4 characters.
	DevicePrefix string
	Log          *slog.Logger
}

// Linux is the real Networker. The process must run inside the node's own
// network namespace, as root.
type Linux struct {
	cfg Config

	// mu serialises changes: kernel objects of different replicas are
	// independent, but the work is a few milliseconds.
	mu sync.Mutex
}

var _ Networker = (*Linux)(nil)

// New checks the configuration; it touches nothing.
func New(cfg Config) (*Linux, error) {
	if cfg.DevicePrefix == "" {
		cfg.DevicePrefix = "pt"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	if !filepath.IsAbs(cfg.RunDir) {
		errs = append(errs, fmt.Errorf("runDir %q is not absolute", cfg.RunDir))
	}
	if !filepath.IsAbs(cfg.DataDir) {
		errs = append(errs, fmt.Errorf("dataDir %q is not absolute", cfg.DataDir))
	}
	if len(cfg.DevicePrefix) > 4 {
		errs = append(errs, fmt.Errorf("device prefix %q is longer than 4 characters", cfg.DevicePrefix))
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("configure network: %w", errors.Join(errs...))
	}
	return &Linux{cfg: cfg}, nil
}

func (l *Linux) nsPath(allocation string) string {
	return filepath.Join(l.cfg.RunDir, "netns", allocation)
}

func (l *Linux) filesDir(allocation string) string {
	return filepath.Join(l.cfg.DataDir, "net", allocation)
}

// checkAllocation keeps names that would leave their directory out.
func checkAllocation(doing, allocation string) error {
	if allocation == "" || allocation == "." || allocation == ".." || len(allocation) > 100 || strings.ContainsAny(allocation, "/\x00") {
		return api.E(api.Invalid, doing, "allocation %q is no file name", allocation)
	}
	return nil
}

// Ensure makes or repairs the replica's network. After an error parts of it may
// exist; Ensure again, or Remove.
func (l *Linux) Ensure(ctx context.Context, r Replica) (Attachment, error) {
	doing := "ensure network of " + r.Allocation
	if err := checkAllocation(doing, r.Allocation); err != nil {
		return Attachment{}, err
	}
	if !r.Capture {
		return Attachment{}, nil
	}
	if !r.Address.Is4() {
		return Attachment{}, api.E(api.Invalid, doing, "address %s is not IPv4", r.Address)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return Attachment{}, api.E(api.Canceled, doing, "%w", err)
	}
	path := l.nsPath(r.Allocation)
	steps := []struct {
		name string
		do   func() error
	}{
		{"write files", func() error { return l.writeFiles(r) }},
		{"make namespace", func() error { return ensureNamespace(path) }},
		{"set sysctls", func() error { return within(path, replicaSysctls) }},
		{"capture", func() error { return ensureCapture(path) }},
		{"connect", func() error { return ensureLink(path, l.device(r.Allocation), r) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return Attachment{}, api.E(api.Internal, doing, "%s: %w", s.name, err)
		}
	}
	return Attachment{NetNS: path, Dir: l.filesDir(r.Allocation)}, nil
}

// Remove deletes all there is of the allocation, and goes on after an error.
func (l *Linux) Remove(_ context.Context, allocation string) error {
	doing := "remove network of " + allocation
	if err := checkAllocation(doing, allocation); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	err := errors.Join(
		deleteLink(l.device(allocation)),
		removeNamespace(l.nsPath(allocation)),
		os.RemoveAll(l.filesDir(allocation)),
	)
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	return nil
}

// List looks on disk for namespaces and files, and in the kernel for veths.
func (l *Linux) List(context.Context) ([]string, error) {
	found := map[string]bool{}
	for _, dir := range []string{filepath.Join(l.cfg.RunDir, "netns"), filepath.Join(l.cfg.DataDir, "net")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, api.E(api.Internal, "list networks", "%w", err)
		}
		for _, e := range entries {
			found[e.Name()] = true
		}
	}
	owners, err := linkOwners(l.cfg.DevicePrefix)
	if err != nil {
		return nil, api.E(api.Internal, "list networks", "%w", err)
	}
	for _, o := range owners {
		found[o] = true
	}
	out := make([]string, 0, len(found))
	for a := range found {
		out = append(out, a)
	}
	sort.Strings(out)
	return out, nil
}

// Routes makes the node's routes to peers exactly these, and lets the devices
// they use forward.
func (l *Linux) Routes(_ context.Context, routes []Route) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range routes {
		if !r.CIDR.IsValid() || !r.CIDR.Addr().Is4() || !r.Via.Is4() {
			return api.E(api.Invalid, "set routes", "route %s via %s is not IPv4", r.CIDR, r.Via)
		}
	}
	if err := setRoutes(routes); err != nil {
		return api.E(api.Internal, "set routes", "%w", err)
	}
	return nil
}

// CloseConnections implements Networker.
func (l *Linux) CloseConnections(_ context.Context, allocation string, remotes []netip.AddrPort, port uint16) (int, error) {
	doing := "close connections of " + allocation
	if err := checkAllocation(doing, allocation); err != nil {
		return 0, err
	}
	if len(remotes) == 0 {
		return 0, nil
	}
	n, err := closeConnections(l.nsPath(allocation), remotes, port)
	if errors.Is(err, fs.ErrNotExist) {
		return n, api.E(api.NotFound, doing, "no namespace: %w", err)
	}
	if err != nil {
		return n, api.E(api.Internal, doing, "%w", err)
	}
	return n, nil
}

// Remotes gives the remote ends of the replica's open inbound connections.
func (l *Linux) Remotes(_ context.Context, allocation string) ([]netip.AddrPort, error) {
	doing := "list connections of " + allocation
	if err := checkAllocation(doing, allocation); err != nil {
		return nil, err
	}
	out, err := inboundRemotes(l.nsPath(allocation))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, api.E(api.NotFound, doing, "no namespace: %w", err)
	}
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	return out, nil
}

// writeFiles puts resolv.conf and hosts where the container binds them. They are
// renamed into place, inside a directory that is bound as a whole.
func (l *Linux) writeFiles(r Replica) error {
	dir := l.filesDir(r.Allocation)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	resolv := "nameserver " + LinkAddress + "\noptions timeout:1 attempts:3\n"
	if r.Tenant != "" {
		resolv = "search " + r.Tenant + ".mesh mesh\n" + resolv
	}
	hosts := "127.0.0.1 localhost\n" + r.Address.String() + " " + r.Allocation
	if r.Hostname != "" && r.Hostname != r.Allocation {
		hosts += " " + r.Hostname
	}
	hosts += "\n"
	return errors.Join(writeFile(filepath.Join(dir, "resolv.conf"), resolv), writeFile(filepath.Join(dir, "hosts"), hosts))
}

func writeFile(path, content string) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == content {
		return nil
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

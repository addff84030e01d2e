package localfleet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// Dirs are the folders of one local fleet.
type Dirs struct {
	// Data is durable: databases, last-good generations, logs, keys.
	Data string
	// Run is short and volatile: sockets, pids, keys of workloads.
	Run string
	ID  string
}

// NewDirs derives the folders from the data folder.
func NewDirs(data string) (Dirs, error) {
	abs, err := filepath.Abs(data)
	if err != nil {
		return Dirs{}, fmt.Errorf("data folder: %w", err)
	}
	id := fleetID(abs)
	return Dirs{Data: abs, Run: filepath.Join("/run/portolan", id), ID: id}, nil
}

func (d Dirs) markerFile() string    { return filepath.Join(d.Data, ".portolan-fleet") }
func (d Dirs) ledgerFile() string    { return filepath.Join(d.Data, "processes.json") }
func (d Dirs) controlSocket() string { return filepath.Join(d.Run, "supervisor.sock") }
func (d Dirs) cgroup() string        { return "/portolan-" + d.ID }

// Claim makes the data folder this fleet's own. A folder that holds something
// and is no fleet's, or another path's fleet, is refused: what is in it would be
// unmounted and deleted one day.
func Claim(d Dirs) error {
	if err := d.owned(); err != nil {
		return err
	}
	if err := os.MkdirAll(d.Data, 0o711); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return os.WriteFile(d.markerFile(), []byte(d.ID+"\n"), 0o600)
}

// owned says why the data folder may not be touched. Absent or empty, there is
// nothing to lose in it.
func (d Dirs) owned() error {
	marker, err := os.ReadFile(d.markerFile())
	if err == nil {
		if id := strings.TrimSpace(string(marker)); id != d.ID {
			return api.E(api.Precondition, "look at the data folder", "%s holds a fleet that was made under another path: use that path (its ID is %s, here it would be %s)", d.Data, id, d.ID)
		}
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("data folder: %w", err)
	}
	inside, err := os.ReadDir(d.Data)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("data folder: %w", err)
	case len(inside) > 0:
		return api.E(api.Precondition, "look at the data folder", "%s is not empty and no fleet's (it has no %s): give a folder of its own with --data-dir", d.Data, filepath.Base(d.markerFile()))
	}
	return nil
}

// Clean ends everything that a fleet left on this machine, the supervisor
// itself included, whatever state it is in, and may be repeated. With purge it
// deletes the data too. It touches only what carries the fleet's ID, and of the
// data folder only what a fleet makes there.
func Clean(ctx context.Context, d Dirs, purge bool) error {
	if err := d.owned(); err != nil {
		return err
	}
	n := names{d.ID}
	var errs []error
	// Supervised children first and gently, so that databases close well.
	errs = append(errs, endLedger(ctx, d))
	for range 20 {
		left, err := strays(n, d)
		if err != nil {
			errs = append(errs, err)
			break
		}
		if len(left) == 0 {
			break
		}
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	errs = append(errs, unmountUnder(d.Run), unmountUnder(filepath.Join(d.Data, nodesDir)), n.removeNetwork(ctx), removeCgroups(ctx, d.cgroup()))
	errs = append(errs, os.RemoveAll(d.Run))
	// The parent goes with the last fleet.
	_ = os.Remove(filepath.Dir(d.Run))
	_ = os.Remove(d.ledgerFile())
	if purge {
		errs = append(errs, d.purge())
	}
	return errors.Join(errs...)
}

// nodesDir is the one part of the data folder with mounts in it.
const nodesDir = "nodes"

// contents are what a fleet makes in its data folder.
var contents = []string{
	"clusters", "config", "db", "logs", nodesDir, "pki", "registry", "tokens", "federation-[0-9]*",
	"lock", "once.json*", "processes.json*",
}

// purge deletes the data; the marker last, so that an interrupted one can be
// repeated. What others put there stays, and the folder with it.
func (d Dirs) purge() error {
	var errs []error
	for _, c := range contents {
		found, err := filepath.Glob(filepath.Join(escapeGlob(d.Data), c))
		errs = append(errs, err)
		for _, f := range found {
			errs = append(errs, os.RemoveAll(f))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	inside, err := os.ReadDir(d.Data)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || len(inside) > 1 || len(inside) == 1 && inside[0].Name() != filepath.Base(d.markerFile()) {
		return err
	}
	return os.RemoveAll(d.Data)
}

// escapeGlob makes a path match itself alone.
func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// Leftovers says whether processes of a fleet still run whose supervisor is gone.
func Leftovers(d Dirs) bool {
	live := openLedger(d.ledgerFile()).live()
	_, supervised := live["supervisor"]
	return len(live) > 0 && !supervised
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// endLedger ends recorded processes that still live: the supervisor first, so
// that it restarts nothing.
func endLedger(ctx context.Context, d Dirs) error {
	live := openLedger(d.ledgerFile()).live()
	if pid, ok := live["supervisor"]; ok && pid != os.Getpid() {
		// It takes its children along.
		_ = syscall.Kill(pid, syscall.SIGTERM)
		if !gone(ctx, pid, 15*time.Second) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			gone(ctx, pid, time.Second)
		}
	}
	live = openLedger(d.ledgerFile()).live()
	delete(live, "supervisor")
	for name, pid := range live {
		sig := syscall.SIGTERM
		if name == "database" {
			sig = syscall.SIGINT // PostgreSQL: fast shutdown
		}
		_ = syscall.Kill(pid, syscall.SIGCONT)
		_ = syscall.Kill(pid, sig)
	}
	for _, pid := range live {
		if !gone(ctx, pid, 5*time.Second) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			gone(ctx, pid, time.Second)
		}
	}
	return ctx.Err()
}

// gone waits until a pid has ended.
func gone(ctx context.Context, pid int, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); {
		if _, err := startTime(pid); err != nil || zombie(pid) {
			return true
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			return false
		}
	}
	return false
}

func zombie(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	i := strings.LastIndexByte(string(b), ')')
	return err == nil && i > 0 && strings.HasPrefix(strings.TrimSpace(string(b[i+1:])), "Z")
}

// strays finds processes that live in one of the fleet's network namespaces, in
// one of its cgroups, or (shims) name one of its sockets on their command line.
func strays(n names, d Dirs) ([]int, error) {
	inodes := map[string]bool{}
	nss, err := n.namespaces()
	if err != nil {
		return nil, err
	}
	var files []string
	for _, ns := range nss {
		files = append(files, nsPath(ns))
	}
	replicas, _ := filepath.Glob(filepath.Join(d.Run, "*", "netns", "*"))
	for _, f := range append(files, replicas...) {
		var st syscall.Stat_t
		if syscall.Stat(f, &st) == nil {
			inodes[fmt.Sprintf("net:[%d]", st.Ino)] = true
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []int
	self := os.Getpid()
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == self || pid == os.Getppid() || zombie(pid) {
			continue
		}
		link, _ := os.Readlink(filepath.Join(p, "ns", "net"))
		cg, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		cmd, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		shim := strings.Contains(string(cmd), "containerd-shim") && strings.Contains(string(cmd), d.Run+"/")
		if inodes[link] || strings.Contains(string(cg), ":"+d.cgroup()+"/") || shim {
			out = append(out, pid)
		}
	}
	return out, nil
}

// unmountUnder detaches all mounts under a folder, innermost first.
func unmountUnder(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var points []string
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) > 4 && strings.HasPrefix(unescape(fields[4]), dir+"/") {
			points = append(points, unescape(fields[4]))
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	sort.Slice(points, func(i, j int) bool { return len(points[i]) > len(points[j]) })
	var errs []error
	for _, p := range points {
		if err := syscall.Unmount(p, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// unescape undoes mountinfo's octal escapes of blanks and backslashes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// removeCgroups removes the fleet's groups in every hierarchy, innermost first.
func removeCgroups(ctx context.Context, group string) error {
	roots := []string{"/sys/fs/cgroup"}
	if subs, err := filepath.Glob("/sys/fs/cgroup/*"); err == nil {
		roots = append(roots, subs...)
	}
	var errs []error
	for _, r := range roots {
		top := filepath.Join(r, group)
		var dirs []string
		_ = filepath.WalkDir(top, func(p string, e os.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			errs = append(errs, removeCgroup(ctx, dir))
		}
	}
	return errors.Join(errs...)
}

// removeCgroup retries while the kernel still counts a dying process.
func removeCgroup(ctx context.Context, dir string) error {
	var err error
	for range 50 {
		if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if perr := pause(ctx, 20*time.Millisecond); perr != nil {
			return perr
		}
	}
	return fmt.Errorf("remove cgroup: %w", err)
}

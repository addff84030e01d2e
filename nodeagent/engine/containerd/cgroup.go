package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

const cgroupRoot = "/sys/fs/cgroup"

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// unified says whether the machine has cgroup version 2 alone.
func unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// memory is one reading of a memory cgroup.
type memory struct {
	working, limit, peak int64
	oomKills             int64
}

// cgroupOf asks the container's own spec where its cgroup is.
func (e *Engine) cgroupOf(ctx context.Context, id string) (string, error) {
	c, err := e.client.LoadContainer(ctx, id)
	if err != nil {
		return "", err
	}
	s, err := c.Spec(ctx)
	if err != nil {
		return "", err
	}
	return s.Linux.CgroupsPath, nil
}

// memoryOf reads the cgroup's files: 0.2 ms, against 1.2 ms for the daemon's
// metrics call, and it also works while the daemon is away.
func (e *Engine) memoryOf(ctx context.Context, id string) (memory, error) {
	path, err := e.cgroupOf(ctx, id)
	if err != nil {
		return memory{}, err
	}
	return readMemory(path)
}

func readMemory(path string) (memory, error) {
	if unified() {
		dir := filepath.Join(cgroupRoot, path)
		current, err := readInt(dir, "memory.current")
		if err != nil {
			return memory{}, err
		}
		m := memory{working: current - keyed(dir, "memory.stat", "inactive_file"), oomKills: keyed(dir, "memory.events", "oom_kill")}
		m.limit, _ = readInt(dir, "memory.max") // "max" reads as 0: none
		m.peak, _ = readInt(dir, "memory.peak") // absent before Linux 5.19
		return m, nil
	}
	dir := filepath.Join(cgroupRoot, "memory", path)
	usage, err := readInt(dir, "memory.usage_in_bytes")
	if err != nil {
		return memory{}, err
	}
	m := memory{working: usage - keyed(dir, "memory.stat", "total_inactive_file"), oomKills: keyed(dir, "memory.oom_control", "oom_kill")}
	m.limit, _ = readInt(dir, "memory.limit_in_bytes")
	m.peak, _ = readInt(dir, "memory.max_usage_in_bytes")
	return m, nil
}

func readInt(dir, file string) (int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0, err
	}
	s := strings.TrimSpace(string(b))
	if s == "max" {
		return 0, nil
	}
	return strconv.ParseInt(s, 10, 64)
}

// keyed finds "key value" in a flat keyed file; 0 when absent.
func keyed(dir, file, key string) int64 {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}

// Usage implements engine.Engine.
func (e *Engine) Usage(ctx context.Context, id string) (engine.Usage, error) {
	doing := "usage of container " + id
	path, err := e.cgroupOf(e.in(ctx), id)
	if err != nil {
		return engine.Usage{}, failed(doing, err)
	}
	m, err := readMemory(path)
	if errors.Is(err, fs.ErrNotExist) {
		return engine.Usage{}, api.E(api.Precondition, doing, "it has no cgroup: it does not run")
	}
	if err != nil {
		return engine.Usage{}, failed(doing, err)
	}
	u := engine.Usage{MemoryBytes: m.working, MemoryLimit: m.limit}
	if unified() {
		dir := filepath.Join(cgroupRoot, path)
		u.CPU = time.Duration(keyed(dir, "cpu.stat", "usage_usec")) * time.Microsecond
		u.Pids, _ = readInt(dir, "pids.current")
		return u, nil
	}
	ns, _ := readInt(filepath.Join(cgroupRoot, "cpuacct", path), "cpuacct.usage")
	u.CPU = time.Duration(ns)
	u.Pids, _ = readInt(filepath.Join(cgroupRoot, "pids", path), "pids.current")
	return u, nil
}

// removeCgroup takes away what a shim that died could not; a cgroup that is not
// empty stays.
func (e *Engine) removeCgroup(id string) {
	if err := checkID(id); err != nil {
		return
	}
	pattern := filepath.Join(cgroupRoot, e.cgroup("", id))
	if !unified() {
		pattern = filepath.Join(cgroupRoot, "*", e.cgroup("", id))
	}
	dirs, err := filepath.Glob(pattern)
	if err != nil {
		return
	}
	for _, d := range dirs {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			e.cfg.Log.Debug("cgroup of a deleted container stays", "path", d, "error", err)
		}
	}
}

func checkID(id string) error {
	if id == "" || strings.ContainsAny(id, "/*?[\\") || strings.Contains(id, "..") {
		return fmt.Errorf("%q is no container ID", id)
	}
	return nil
}

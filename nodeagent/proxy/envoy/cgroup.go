package envoy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// A proxy's bounds: a sidecar takes about 70 MB, and a few threads per worker.
const (
	defaultMemory = 512 << 20
	maxTasks      = 256
)

func (c *Config) group(id string) string { return filepath.Join(c.CgroupParent, id) }

// leaveGroup removes a stopped proxy's group; the kernel may count the dead for a
// moment longer.
func (c *Config) leaveGroup(id string) {
	if c.CgroupParent == "" {
		return
	}
	var err error
	for range 20 {
		if err = leave(c.group(id)); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.Log.Warn("cgroup of a stopped proxy stays", "proxy", id, "error", err)
}

// hierarchies are the trees in which a process has a place: one with version 2,
// one for each controller with version 1.
func hierarchies() ([]string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return nil, err
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{cgroupRoot}, nil
	}
	all, err := filepath.Glob(filepath.Join(cgroupRoot, "*", "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, f := range all {
		out = append(out, filepath.Dir(f))
	}
	return out, nil
}

// join puts a process into a group of its own, in every tree, with bounds: beside
// the agent's group, so that it neither counts there nor dies with it.
func join(group string, memory int64, pid int) error {
	trees, err := hierarchies()
	if err != nil {
		return fmt.Errorf("find the cgroups: %w", err)
	}
	var errs []error
	for _, tree := range trees {
		errs = append(errs, joinTree(tree, group, memory, pid))
	}
	return errors.Join(errs...)
}

func joinTree(tree, group string, memory int64, pid int) error {
	dir := tree
	for part := range strings.SplitSeq(strings.Trim(group, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, part)
		// Version 2: a child has the controllers that its parent hands on. One that it
		// lacks leaves the bound's file out, which the write below shows.
		_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+memory +pids"), 0o644)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
		if err := inheritSets(parent, dir); err != nil {
			return err
		}
	}
	for file, bound := range map[string]int64{"memory.max": memory, "memory.limit_in_bytes": memory, "pids.max": maxTasks} {
		// A tree has the files of its own controllers alone.
		err := writeExisting(filepath.Join(dir, file), strconv.FormatInt(bound, 10))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("bound a proxy: %w", err)
		}
	}
	if err := writeExisting(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("move a proxy to its cgroup: %w", err)
	}
	return nil
}

// inheritSets: version 1's cpuset takes no process until its sets are filled.
func inheritSets(parent, dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || strings.TrimSpace(string(own)) != "" {
			continue // another controller's tree, or filled
		}
		b, err := os.ReadFile(filepath.Join(parent, file))
		if err != nil || strings.TrimSpace(string(b)) == "" {
			continue // version 2, where empty means the parent's
		}
		if err := writeExisting(filepath.Join(dir, file), string(b)); err != nil {
			return fmt.Errorf("inherit %s: %w", file, err)
		}
	}
	return nil
}

func writeExisting(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// leave removes a group that nothing is in.
func leave(group string) error {
	trees, err := hierarchies()
	if err != nil {
		return fmt.Errorf("find the cgroups: %w", err)
	}
	var errs []error
	for _, tree := range trees {
		if err := unix.Rmdir(filepath.Join(tree, group)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup of a proxy: %w", err))
		}
	}
	return errors.Join(errs...)
}

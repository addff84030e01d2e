package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// onThrowAwayThread runs f on a thread that dies afterwards, so that f may
// change the thread's namespace. f must not start a process. The main thread
// cannot die and /proc/self speaks of it: it is never used.
func onThrowAwayThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Holding the main thread here makes the scheduler use another one there.
			done <- onThrowAwayThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// within runs f on a thread inside the network namespace at path.
func within(path string, f func() error) error {
	return onThrowAwayThread(func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: path, Err: err}
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return &fs.PathError{Op: "setns", Path: path, Err: err}
		}
		return f()
	})
}

// Dial connects like net.Dialer from inside the namespace at netnsPath; empty
// means the process's own. address must be a literal, names are not resolved.
func Dial(ctx context.Context, netnsPath, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial %s in namespace %s: %w", address, netnsPath, err)
	}
	dialer := net.Dialer{FallbackDelay: -1}
	if netnsPath == "" {
		return dialer.DialContext(ctx, network, address)
	}
	var conn net.Conn
	err := within(netnsPath, func() error {
		c, err := dialer.DialContext(ctx, network, address)
		conn = c
		return err
	})
	return conn, err
}

// ensureNamespace makes a namespace and binds it at path, unless it is there. A
// plain file left by a reboot is no namespace.
func ensureNamespace(path string) error {
	is, err := isNamespace(path)
	if err != nil || is {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o400)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return onThrowAwayThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		own := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(own, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind namespace at %s: %w", path, err)
		}
		return nil
	})
}

func isNamespace(path string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("statfs %s: %w", path, err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// removeNamespace unbinds every layer at path and deletes the file.
func removeNamespace(path string) error {
	for {
		is, err := isNamespace(path)
		if err != nil {
			return err
		}
		if !is {
			break
		}
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// replicaSysctls runs inside the replica's namespace: no IPv6 there.
func replicaSysctls() error {
	for _, dev := range []string{"all", "default", "lo"} {
		err := setSysctl("net/ipv6/conf/"+dev+"/disable_ipv6", "1")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// setSysctl writes below /proc/sys; paths under net belong to the thread's
// namespace.
func setSysctl(name, value string) error {
	path := "/proc/sys/" + name
	if old, err := os.ReadFile(path); err == nil && len(old) > 0 && string(old[:len(old)-1]) == value {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0o644)
}

func openNS(path string) (netns.NsHandle, error) {
	h, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), &fs.PathError{Op: "open namespace", Path: path, Err: err}
	}
	return h, nil
}

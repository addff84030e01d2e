// Package socket makes and dials Unix sockets whose paths may be longer than the
// kernel's 107 bytes, by going through the open directory. It never decides who
// may connect: owner and mode are parameters, peers are for the caller to check.
//
// Concurrency: functions without state.
package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen makes the socket at path anew with that owner and mode. A file that lies
// there is replaced.
func Listen(path string, uid, gid int, mode os.FileMode) (net.Listener, error) {
	dir, short, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer func() { _ = dir.Close() }()
	if err := os.Remove(short); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The name in the listener speaks of a descriptor that is gone when it closes.
	l.SetUnlinkOnClose(false)
	base := filepath.Base(path)
	if err := unix.Fchownat(int(dir.Fd()), base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: chown: %w", path, err)
	}
	if err := os.Chmod(short, mode); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// PrivateDir makes a directory that its owner alone may walk, one that is there
// already included: what lies below is reached by bind mounts only.
func PrivateDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(dir, 0o700)
}

// Dial connects to the socket at path.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	dir, short, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	defer func() { _ = dir.Close() }()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", short)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	return c, nil
}

// Inode identifies the file at path; 0 when there is none.
func Inode(path string) uint64 {
	st, err := os.Lstat(path)
	if err != nil {
		return 0
	}
	return InodeOf(st)
}

// InodeOf gives the inode number of a file that was looked at.
func InodeOf(st fs.FileInfo) uint64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Ino
	}
	return 0
}

// PeerUID is the user at the other end, as the kernel knew it when it connected.
func PeerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("peer of %T: not a Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("peer of socket: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("peer of socket: %w", err)
	}
	if credErr != nil {
		return 0, fmt.Errorf("peer of socket: %w", credErr)
	}
	return cred.Uid, nil
}

// open gives the directory and a short path through it.
func open(path string) (*os.File, string, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", &fs.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	dir := os.NewFile(uintptr(fd), filepath.Dir(path))
	return dir, "/proc/self/fd/" + strconv.Itoa(fd) + "/" + filepath.Base(path), nil
}

package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// dialInNetNS connects to a port on lo inside a namespace. Only the socket is
// made there, on a thread that is thrown away: the goroutine ends locked to it.
func dialInNetNS(ctx context.Context, netns string, port int) (net.Conn, error) {
	if netns == "" {
		var d net.Dialer
		return d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", fmt.Sprint(port)))
	}
	fd, err := socketIn(netns)
	if err != nil {
		return nil, fmt.Errorf("socket in %s: %w", netns, err)
	}
	return connect(ctx, fd, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)))
}

func socketIn(netns string) (int, error) {
	type result struct {
		fd  int
		err error
	}
	out := make(chan result, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine, so that
		// nothing else ever runs (or forks) in the replica's namespace.
		runtime.LockOSThread()
		ns, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			out <- result{-1, err}
			return
		}
		defer func() { _ = unix.Close(ns) }()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			out <- result{-1, err}
			return
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		out <- result{fd, err}
	}()
	r := <-out
	return r.fd, r.err
}

// connect finishes what connect(2) began on a non-blocking socket, within ctx.
func connect(ctx context.Context, fd int, to netip.AddrPort) (net.Conn, error) {
	file := os.NewFile(uintptr(fd), "probe")
	defer func() { _ = file.Close() }()
	err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if err != nil && err != unix.EINPROGRESS { //nolint:errorlint // a bare errno
		return nil, err
	}
	if err != nil {
		if err := await(ctx, fd); err != nil {
			return nil, err
		}
	}
	return net.FileConn(file)
}

func await(ctx context.Context, fd int) error {
	for {
		left := 50 * time.Millisecond
		if d, ok := ctx.Deadline(); ok {
			left = min(left, time.Until(d))
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, max(int(left.Milliseconds()), 1))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == unix.EINTR || err == nil && n == 0: //nolint:errorlint // a bare errno
			continue
		case err != nil:
			return err
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return err
		}
		if code != 0 {
			return unix.Errno(code)
		}
		return nil
	}
}

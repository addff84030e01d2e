package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// closeConnections destroys matching sockets through inet_diag: each end of the
// socket sees an error at once and the peer gets a reset.
func closeConnections(nsPath string, remotes []netip.AddrPort, port uint16) (int, error) {
	ns, err := openNS(nsPath)
	if err != nil {
		return 0, err
	}
	defer func() { _ = ns.Close() }()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("socket diagnosis in namespace: %w", err)
	}
	defer h.Close()
	want := make(map[netip.AddrPort]bool, len(remotes))
	for _, r := range remotes {
		want[netip.AddrPortFrom(r.Addr().Unmap(), r.Port())] = true
	}
	closed := 0
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		socks, err := listSockets(h, family)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range socks {
			local, remote := endpoint(s.ID.Source, s.ID.SourcePort), endpoint(s.ID.Destination, s.ID.DestinationPort)
			if !matches(local, remote, want, port) {
				continue
			}
			err := h.SocketDestroy(net.TCPAddrFromAddrPort(local), net.TCPAddrFromAddrPort(remote))
			switch {
			case err == nil:
				closed++
			case !errors.Is(err, unix.ENOENT):
				errs = append(errs, fmt.Errorf("destroy %s to %s: %w", local, remote, err))
			}
		}
	}
	return closed, errors.Join(errs...)
}

// listSockets repeats a dump that changed under its reading, a few times.
func listSockets(h *netlink.Handle, family uint8) ([]*netlink.Socket, error) {
	var socks []*netlink.Socket
	var err error
	for range 5 {
		socks, err = h.SocketDiagTCP(family)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, nil
		}
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	return socks, nil
}

func endpoint(ip net.IP, port uint16) netip.AddrPort {
	a, ok := netip.AddrFromSlice(ip)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Unmap(), port)
}

func matches(local, remote netip.AddrPort, want map[netip.AddrPort]bool, port uint16) bool {
	if !remote.IsValid() || remote.Port() == 0 {
		return false // a listener
	}
	if !want[remote] && !want[netip.AddrPortFrom(remote.Addr(), 0)] {
		return false
	}
	return port == 0 || local.Port() == port || local.Port() == InboundPort
}

// inboundRemotes gives the remote ends of open connections that came in through
// the capture.
func inboundRemotes(nsPath string) ([]netip.AddrPort, error) {
	ns, err := openNS(nsPath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = ns.Close() }()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("socket diagnosis in namespace: %w", err)
	}
	defer h.Close()
	var out []netip.AddrPort
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		socks, err := listSockets(h, family)
		if err != nil {
			return nil, err
		}
		for _, s := range socks {
			if s.ID.SourcePort == InboundPort && s.ID.DestinationPort != 0 {
				out = append(out, endpoint(s.ID.Destination, s.ID.DestinationPort))
			}
		}
	}
	return out, nil
}

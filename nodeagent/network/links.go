package network

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks the node's routes to peers as ours, see rtnetlink(7). It
// lies in the range free for users.
const routeProtocol = 183

// device is the name of the node's side: at most 15 characters, stable.
func (l *Linux) device(allocation string) string {
	sum := sha256.Sum256([]byte(allocation))
	return l.cfg.DevicePrefix + hex.EncodeToString(sum[:])[:10]
}

// aliasPrefix marks a veth as ours; the allocation follows.
const aliasPrefix = "portolan:"

// ensureLink makes the veth pair between the node and the namespace, and puts
// addresses and routes on both sides.
func ensureLink(nsPath, device string, r Replica) error {
	ns, err := openNS(nsPath)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in namespace: %w", err)
	}
	defer inside.Close()
	node, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer node.Close()
	host, err := ensureVeth(node, inside, int(ns), device, r.Allocation)
	if err != nil {
		return err
	}
	if err := ensureNodeSide(node, host, r.Address); err != nil {
		return fmt.Errorf("node side: %w", err)
	}
	if err := ensureReplicaSide(inside, r.Address); err != nil {
		return fmt.Errorf("replica side: %w", err)
	}
	return nil
}

// ensureVeth gives the node's side. A half that lost its other half is made anew.
func ensureVeth(node, inside *netlink.Handle, nsFd int, device, allocation string) (netlink.Link, error) {
	host, err := findLink(node, device)
	if err != nil {
		return nil, err
	}
	peer, err := findLink(inside, "eth0")
	if err != nil {
		return nil, err
	}
	if host != nil && peer != nil && host.Attrs().ParentIndex == peer.Attrs().Index {
		return host, nil
	}
	for _, half := range []struct {
		h *netlink.Handle
		l netlink.Link
	}{{node, host}, {inside, peer}} {
		if half.l == nil {
			continue
		}
		if err := half.h.LinkDel(half.l); err != nil && !isAbsent(err) {
			return nil, fmt.Errorf("delete stale %s: %w", half.l.Attrs().Name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(nsFd)}
	if err := node.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth %s: %w", device, err)
	}
	host, err = node.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("find veth %s: %w", device, err)
	}
	if err := node.LinkSetAlias(host, aliasPrefix+allocation); err != nil {
		return nil, fmt.Errorf("name veth %s: %w", device, err)
	}
	return host, nil
}

func ensureNodeSide(node *netlink.Handle, host netlink.Link, addr netip.Addr) error {
	if err := node.AddrReplace(host, hostAddress(netip.MustParseAddr(LinkAddress))); err != nil {
		return fmt.Errorf("add address: %w", err)
	}
	if err := node.LinkSetUp(host); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	if err := setSysctl("net/ipv4/conf/"+host.Attrs().Name+"/forwarding", "1"); err != nil {
		return fmt.Errorf("allow forwarding: %w", err)
	}
	err := node.RouteReplace(&netlink.Route{LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: hostNet(addr)})
	if err != nil {
		return fmt.Errorf("add route to %s: %w", addr, err)
	}
	return nil
}

func ensureReplicaSide(inside *netlink.Handle, addr netip.Addr) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := inside.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := inside.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	eth, err := inside.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := onlyAddress(inside, eth, addr); err != nil {
		return err
	}
	gw := netip.MustParseAddr(LinkAddress)
	index := eth.Attrs().Index
	if err := inside.RouteReplace(&netlink.Route{LinkIndex: index, Scope: netlink.SCOPE_LINK, Dst: hostNet(gw)}); err != nil {
		return fmt.Errorf("add route to the node: %w", err)
	}
	if err := inside.RouteReplace(&netlink.Route{LinkIndex: index, Gw: gw.AsSlice(), Src: addr.AsSlice()}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

// onlyAddress leaves addr as the link's one IPv4 address.
func onlyAddress(h *netlink.Handle, link netlink.Link, addr netip.Addr) error {
	have, err := h.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	want := hostAddress(addr)
	for i := range have {
		if !have[i].Equal(*want) {
			if err := h.AddrDel(link, &have[i]); err != nil {
				return fmt.Errorf("delete address %s: %w", have[i].IPNet, err)
			}
		}
	}
	if err := h.AddrReplace(link, want); err != nil {
		return fmt.Errorf("add address %s: %w", addr, err)
	}
	return nil
}

func deleteLink(device string) error {
	link, err := netlink.LinkByName(device)
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find veth %s: %w", device, err)
	}
	if err := netlink.LinkDel(link); err != nil && !isAbsent(err) {
		return fmt.Errorf("delete veth %s: %w", device, err)
	}
	return nil
}

// linkOwners gives the allocations whose veth exists.
func linkOwners(prefix string) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var out []string
	for _, l := range links {
		owner, ours := strings.CutPrefix(l.Attrs().Alias, aliasPrefix)
		if ours && strings.HasPrefix(l.Attrs().Name, prefix) {
			out = append(out, owner)
		}
	}
	return out, nil
}

func setRoutes(routes []Route) error {
	filter := &netlink.Route{Protocol: routeProtocol}
	have, err := netlink.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	want := map[string]Route{}
	for _, r := range routes {
		want[r.CIDR.Masked().String()] = r
	}
	for i := range have {
		if have[i].Dst == nil {
			continue
		}
		if _, keep := want[have[i].Dst.String()]; keep {
			continue
		}
		if err := netlink.RouteDel(&have[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route %s: %w", have[i].Dst, err)
		}
	}
	var errs []error
	for _, r := range routes {
		errs = append(errs, addRoute(r))
	}
	return errors.Join(errs...)
}

func addRoute(r Route) error {
	via := net.IP(r.Via.AsSlice())
	// Only the device tells over which link the peer is, and only devices that
	// carry peers' traffic may forward.
	paths, err := netlink.RouteGet(via)
	if err != nil || len(paths) == 0 {
		return fmt.Errorf("find the way to %s: %w", r.Via, err)
	}
	link, err := netlink.LinkByIndex(paths[0].LinkIndex)
	if err != nil {
		return fmt.Errorf("find the device to %s: %w", r.Via, err)
	}
	dst := &net.IPNet{IP: r.CIDR.Masked().Addr().AsSlice(), Mask: net.CIDRMask(r.CIDR.Bits(), 32)}
	err = netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: via, LinkIndex: link.Attrs().Index, Protocol: routeProtocol})
	if err != nil {
		return fmt.Errorf("add route %s via %s: %w", r.CIDR, r.Via, err)
	}
	if err := setSysctl("net/ipv4/conf/"+link.Attrs().Name+"/forwarding", "1"); err != nil {
		return fmt.Errorf("allow forwarding: %w", err)
	}
	return nil
}

func findLink(h *netlink.Handle, name string) (netlink.Link, error) {
	l, err := h.LinkByName(name)
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	return l, nil
}

func isAbsent(err error) bool {
	var nf netlink.LinkNotFoundError
	return errors.As(err, &nf) || errors.Is(err, unix.ENODEV)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
}

func hostAddress(a netip.Addr) *netlink.Addr {
	return &netlink.Addr{IPNet: hostNet(a), Scope: unix.RT_SCOPE_UNIVERSE}
}

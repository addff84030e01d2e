// Package network gives each replica a network namespace of its own: veth pair,
// address, routes, nftables capture of all TCP into its Envoy before the
// workload starts, and DNS by the warden. The port is Networker; the real one
// uses netlink and nftables, networktest holds a fake and the suite.
//
// Concurrency: safe for concurrent use. It never changes the namespace of a
// thread that later forks.
package network

import (
	"context"
	"net/netip"
)

// Ports and users that capture relies on.
const (
	OutboundPort = 15001 // Envoy: captured outbound TCP
	InboundPort  = 15006 // Envoy: captured inbound TCP
	EastWestPort = 15443 // east-west gateway
	IngressPort  = 8080  // ingress gateway, plain HTTP
	// ProxyUID and ProxyGID are reserved: Envoy runs under them, traffic of theirs
	// is not captured, no workload may run under them.
	ProxyUID = 14010
	ProxyGID = 14010
	// LinkAddress is the node's side of every veth: gateway and DNS server.
	LinkAddress = "169.254.77.1"
)

// Replica is what Ensure brings about.
type Replica struct {
	Allocation string
	// Tenant whose services answer to short names; empty: none do.
	Tenant  string
	Address netip.Addr
	// Hostname of its containers, which must lead to it; empty: the allocation.
	Hostname string
	// Capture is off for gateways, which use the node's own namespace: then
	// nothing is made and NetNS is empty.
	Capture bool
}

// Attachment is where a replica's network is.
type Attachment struct {
	NetNS string // path to enter; empty means the node's own
	// Dir holds resolv.conf and hosts, to be bound read-only into the container.
	Dir string
}

// Route leads to a peer node's replicas.
type Route struct {
	CIDR netip.Prefix
	Via  netip.Addr
}

// Networker is the port. Every call is idempotent and re-asserts what a foreign
// flush took away.
type Networker interface {
	Ensure(ctx context.Context, r Replica) (Attachment, error)
	// Remove deletes namespace, veth and files; no error when absent.
	Remove(ctx context.Context, allocation string) error
	// List gives allocations that have anything.
	List(ctx context.Context) ([]string, error)
	// Routes makes the node's routes to peers exactly these.
	Routes(ctx context.Context, routes []Route) error
	// CloseConnections destroys established TCP connections inside the replica's
	// namespace whose remote address is one of those (a remote of port 0 stands for
	// every port of that address) and which came in for port (0: any). Captured
	// connections end at the proxy, so their local port is InboundPort: those match
	// every port. It returns how many.
	CloseConnections(ctx context.Context, allocation string, remotes []netip.AddrPort, port uint16) (int, error)
}

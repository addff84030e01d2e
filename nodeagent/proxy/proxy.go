// Package proxy is the port to the proxy beside each replica. envoy supervises
// the real one; proxytest holds the conformance suite and a fake that consumes
// ADS and evaluates routes, permissions and endpoints.
//
// Concurrency: safe for concurrent use.
package proxy

import "context"

// UID and GID under which every proxy runs: network.ProxyUID, network.ProxyGID.
const (
	UID = 14010
	GID = 14010
)

// Files in a proxy's directory.
const (
	XDSSocketFile   = "xds.sock"
	AdminSocketFile = "admin.sock"
)

// Roles of proxies.
const (
	RoleSidecar  = "sidecar"
	RoleIngress  = "ingress"
	RoleEastWest = "eastwest"
)

// Spec is a proxy to run.
type Spec struct {
	// ID is the allocation.
	ID string
	// NetNS to run in; empty means the node's own.
	NetNS string
	// XDSSocket is the Unix socket from which it takes its configuration.
	XDSSocket string
	// Dir is its own directory: bootstrap, admin socket, log.
	Dir string
	// Role: "sidecar", "ingress", "eastwest".
	Role string
	// Metadata for the node in the bootstrap.
	Cluster, Region, Zone, Tenant, Workload, Revision, Node string
}

// Status of a proxy.
type Status struct {
	Running bool
	Live    bool // has its initial configuration
	Pid     int
	// Restarts since this agent began to supervise it.
	Restarts int
}

// Proxies is the port.
type Proxies interface {
	// Start runs it, adopts it when an earlier agent started it, and restarts it
	// with backoff when it dies, until Stop. Idempotent.
	Start(ctx context.Context, spec Spec) error
	Status(ctx context.Context, id string) (Status, error)
	// Active returns for each resource type URL the versions that the proxy itself
	// says are active (not warming), by resource name. A type that the proxy cannot
	// tell of is absent from the map: for it the acknowledgement must do. Envoy:
	// config_dump of the admin socket.
	Active(ctx context.Context, id string) (map[string]map[string]string, error)
	// Drain stops accepting gracefully; connections that are open finish. It returns
	// when nothing is in flight any more, or after some seconds.
	Drain(ctx context.Context, id string) error
	// Stop ends it for good and removes its directory. Idempotent.
	Stop(ctx context.Context, id string) error
	// List gives IDs of proxies that run or left something behind.
	List(ctx context.Context) ([]string, error)
}

// Meter is an optional ability of Proxies.
type Meter interface {
	// Requests is how many requests the proxy has taken for its workload since it
	// started; connections for what is not HTTP are not among them.
	Requests(ctx context.Context, id string) (uint64, error)
}

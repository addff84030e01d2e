// Package translate makes Envoy's resources for one proxy out of the graph of
// its node: sidecars, ingress and east-west gateways. Pure: the same graph and
// proxy give the same resources byte for byte (marshalled deterministically).
//
// Names: clusters and endpoint sets "outbound/<tenant>/<service>/<port>/<revision
// or all>", "inbound/<port>", "east-west/…", "authorizer"; routes
// "outbound/<tenant>/<service>/<port>", "inbound/<port>", "ingress"; listeners
// "outbound", "inbound", "ingress", "east-west"; secrets: see the constants.
//
// Concurrency: a Translator is safe for concurrent use; its resources are shared
// between proxies and must not be changed.
package translate

import (
	"net/netip"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/xds/model"
)

// Type URLs of what is made.
const (
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	SecretType   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// Names of secrets. The first is the proxy's own certificate and key, which
// whoever serves the proxy adds; the others are made here.
const (
	SecretIdentity = "default" // TlsCertificate: NOT made here
	SecretTrust    = "ALL"     // roots of every domain, for callees
	SecretPeers    = "PEERS"   // the same, and which identities may call in
)

// Role of a proxy.
type Role string

// The roles, as in the proxy port's Spec.
const (
	Sidecar  Role = "sidecar"
	Ingress  Role = "ingress"
	EastWest Role = "eastwest"
)

// Proxy is one Envoy.
type Proxy struct {
	ID                         string // allocation
	Tenant, Workload, Revision string
	Node                       string
	Role                       Role
	// Address of the replica; the node's for gateways.
	Address netip.Addr
	// AuthzSocket is the path of the Unix socket that serves
	// envoy.service.auth.v3.Authorization; sidecars need it.
	AuthzSocket string
}

// Resource is one named resource. The same pointer means the same content, also
// between proxies of one Translator: marshal it once.
type Resource struct {
	Name    string
	Message proto.Message
}

// Resources of one proxy by type URL, each in order of name. All five types are
// always there, some empty.
type Resources map[string][]*Resource

// Ports on which proxies listen; the same as in nodeagent/network.
const (
	OutboundPort = 15001
	InboundPort  = 15006
	EastWestPort = 15443
	IngressPort  = 8080
)

// HealthPath is answered with 200 by an ingress for any host.
const HealthPath = "/.well-known/portolan/health"

// Translate is New(g).Proxy(p).
func Translate(g *model.Graph, p Proxy) (Resources, []model.Problem) { return New(g).Proxy(p) }

// Context extensions (HTTP: attributes.context_extensions; TCP and HTTP: gRPC
// request metadata with prefix "x-portolan-") that every authorization request
// carries about its destination.
const (
	ExtTenant   = "tenant"
	ExtWorkload = "workload"
	ExtService  = "service"  // first service by name that leads to the port
	ExtPort     = "port"     // port of the replica, decimal
	ExtProtocol = "protocol" // "http" or "tcp"
	MetaPrefix  = "x-portolan-"
)

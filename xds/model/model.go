// Package model resolves what a node was told (services, endpoints, routes,
// permits, trust bundles) into one closed graph: every reference exists, every
// conflict is decided, every fault is named. Pure: no clock, no I/O, no
// goroutines, no randomness; the same input gives the same graph, whatever its
// order (of two resources with one name the first counts).
//
// Concurrency: a Graph is never changed after Build and may be shared.
package model

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// Input is one generation of mesh directives.
type Input struct {
	Config    *nodev1.NodeConfig
	Services  []*nodev1.MeshService
	Endpoints []*nodev1.MeshEndpoints
	Routes    []*nodev1.MeshRoute
	Bundles   []*linkv1.TrustBundle
	Permits   []*linkv1.PeerPermit
	// Assignments of this node, for what its own proxies serve.
	Assignments []*nodev1.Assignment
}

// Graph is the resolved mesh as one node sees it.
type Graph struct {
	Cluster, Region, Zone string
	Fleet, TrustDomain    string
	// Services by name of tenant and service.
	Services []*Service
	// Hosts of the ingress, by name.
	Hosts []*Host
	// Domains that are trusted, by name.
	Domains []Domain
	// Peers are identities of other clusters that are accepted, sorted.
	Peers []string
	// Allocations of this node, by ID.
	Allocations []Allocation

	byKey   map[Key]*Service
	serving map[Key][]Served
}

// Key names a service, a workload or a route within the fleet.
type Key struct{ Tenant, Name string }

func (k Key) String() string { return k.Tenant + "/" + k.Name }

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Tenant, o.Tenant), cmp.Compare(k.Name, o.Name))
}

// Service is one service with all that is needed to call it.
type Service struct {
	Key
	Workload string
	VIP      netip.Addr // zero when it has none
	Ports    []Port     // as declared
	// Identities of its workload in each of its clusters, sorted: what a caller
	// accepts.
	Identities []string
	// Endpoints in this cluster, by allocation.
	Endpoints []Endpoint
	// Remotes are its exports by other clusters, by name of the cluster.
	Remotes []Remote
	// Route that answers for its name; nil: all revisions alike.
	Route *Route
	// Revisions that are named by a back end of any route, sorted.
	Revisions []string
}

// Port of a service.
type Port struct {
	Name   string
	Port   uint16
	Target uint16 // port of the replica
	HTTP   bool
}

// Port gives a port by name.
func (s *Service) Port(name string) (Port, bool) {
	for _, p := range s.Ports {
		if p.Name == name {
			return p, true
		}
	}
	return Port{}, false
}

// Endpoint is one replica in this cluster.
type Endpoint struct {
	Allocation string
	Address    netip.Addr
	Revision   string
	Node, Zone string
	Draining   bool
	// Standby is only for back ends that name its revision.
	Standby bool
}

// Remote is a way to the service through another cluster's gateways.
type Remote struct {
	Cluster, Region string
	Gateways        []netip.AddrPort // sorted
	// Ready replicas behind them, by port and revision ("" is all).
	Ready map[PortRevision]int
	// Healthy is false when the federation has not heard of that cluster.
	Healthy bool
}

// PortRevision names a part of an export.
type PortRevision struct{ Port, Revision string }

// Route is the rules that answer for a service or for ingress hosts.
type Route struct {
	Key
	Rules []Rule
}

// Rule sends what matches to its back ends. First match wins.
type Rule struct {
	Matches  []Match // none: everything
	Backends []Backend
	// Timeout and Retry as the user wrote them; nil: defaults.
	Spec RuleSpec
	// Broken rules answer 503 to what they match: a back end does not exist.
	Broken bool
}

// Backend is a resolved back end.
type Backend struct {
	Service *Service
	// Port is empty when the rule serves several ports: then it is the port that
	// was called.
	Port     string
	Revision string // "" is all
	Weight   uint32 // > 0
}

// Host of the ingress.
type Host struct {
	Name  string
	Route *Route
}

// Domain is a trust domain with its roots.
type Domain struct {
	Name  string
	Roots []byte // PEM
}

// Allocation is a replica or gateway of this node.
type Allocation struct {
	ID, Tenant, Workload, Revision string
	Address                        netip.Addr
}

// Served is a port that replicas of a workload serve.
type Served struct {
	Target uint16
	HTTP   bool
	// For are the service ports that lead here, at least one.
	For []ServedFor
}

// ServedFor is a service port that leads to a served one.
type ServedFor struct {
	Service string
	Port    string
}

// Problem is a fault in one resource of the input.
type Problem struct {
	// Resource by its directive name: "route/shop/catalog".
	Resource string
	// Field is the path in the resource's spec.
	Field   string
	Message string
}

func (p Problem) String() string {
	if p.Field == "" {
		return fmt.Sprintf("%s: %s", p.Resource, p.Message)
	}
	return fmt.Sprintf("%s: %s: %s", p.Resource, p.Field, p.Message)
}

// Service gives a service; false when there is none.
func (g *Graph) Service(tenant, name string) (*Service, bool) {
	s, ok := g.byKey[Key{tenant, name}]
	return s, ok
}

// Serves gives the ports that replicas of a workload serve, by number.
func (g *Graph) Serves(tenant, workload string) []Served {
	return g.serving[Key{tenant, workload}]
}

// Tenant gives the services of one tenant.
func (g *Graph) Tenant(tenant string) []*Service {
	var out []*Service
	for _, s := range g.Services {
		if s.Tenant == tenant {
			out = append(out, s)
		}
	}
	return out
}

// Package model resolves what a node was told (services, endpoints, routes,
// permits, trust bundles) into one closed graph: every reference exists, every
// conflict is decided, every fault is named. Pure: no clock, no I/O, no
// goroutines.
package model

import (
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

// Package identity holds the SPIFFE IDs of the fleet: which trust domains there
// are, what their paths mean, and how they are parsed. It does no I/O.
//
// The fleet is a trust domain ("portolan.internal") with paths /control and
// /user/<name>; each cluster is one of its own ("<cluster>.<fleet>") with
// /control, /node/<node>, /gateway/<name> and /tenant/<t>/workload/<w>.
package identity

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kind says what an ID stands for.
type Kind int

// The kinds of identities.
const (
	Control  Kind = iota + 1 // a control plane: the federation's or a cluster's
	User                     // a person or machine that calls the API
	Node                     // a node agent
	Gateway                  // an ingress or east-west gateway
	Workload                 // a tenant's workload
)

// ID is a parsed identity of the fleet.
type ID struct {
	Kind Kind
	// TrustDomain in full, "eu-west.portolan.internal".
	TrustDomain string
	// Name of the user, node or gateway.
	Name string
	// Tenant and Workload of a workload.
	Tenant, Workload string
}

// ClusterDomain is the trust domain of a cluster.
func ClusterDomain(fleet, cluster string) string { return cluster + "." + fleet }

// ClusterOf is the cluster of a trust domain under the fleet; false for the
// fleet's own and for foreign ones.
func ClusterOf(fleet, trustDomain string) (string, bool) {
	c, ok := strings.CutSuffix(trustDomain, "."+fleet)
	if !ok || c == "" || strings.Contains(c, ".") {
		return "", false
	}
	return c, true
}

// String gives the URI.
func (id ID) String() string {
	p := ""
	switch id.Kind {
	case Control:
		p = "/control"
	case User:
		p = "/user/" + id.Name
	case Node:
		p = "/node/" + id.Name
	case Gateway:
		p = "/gateway/" + id.Name
	case Workload:
		p = "/tenant/" + id.Tenant + "/workload/" + id.Workload
	}
	return "spiffe://" + id.TrustDomain + p
}

// SPIFFE gives go-spiffe's form.
func (id ID) SPIFFE() (spiffeid.ID, error) { return spiffeid.FromString(id.String()) }

// Parse reads a URI; anything but the paths above is refused.
func Parse(uri string) (ID, error) {
	s, err := spiffeid.FromString(uri)
	if err != nil {
		return ID{}, fmt.Errorf("parse spiffe id %q: %w", uri, err)
	}
	id := ID{TrustDomain: s.TrustDomain().Name()}
	seg := strings.Split(strings.TrimPrefix(s.Path(), "/"), "/")
	switch {
	case len(seg) == 1 && seg[0] == "control":
		id.Kind = Control
	case len(seg) == 2 && seg[0] == "user":
		id.Kind, id.Name = User, seg[1]
	case len(seg) == 2 && seg[0] == "node":
		id.Kind, id.Name = Node, seg[1]
	case len(seg) == 2 && seg[0] == "gateway":
		id.Kind, id.Name = Gateway, seg[1]
	case len(seg) == 4 && seg[0] == "tenant" && seg[2] == "workload":
		id.Kind, id.Tenant, id.Workload = Workload, seg[1], seg[3]
	default:
		return ID{}, fmt.Errorf("parse spiffe id %q: path stands for nothing in this fleet", uri)
	}
	return id, nil
}

// Package policy is the port to decisions: inputs, decisions and bundles. The
// engine behind it is OPA, in the sub-package opa. Default deny: where a
// decision is missing, undefined, late or failed, the answer is no.
package policy

import (
	"context"
	"time"
)

// Location is a place in a Rego file.
type Location struct {
	File string `json:"file"`
	Row  int    `json:"row"`
	Col  int    `json:"col"`
}

// Denial is one reason of a refusal.
type Denial struct {
	// Rule in full: "data.portolan.admission.deny".
	Rule     string
	Message  string
	Field    string // path in the object, when the rule names one
	Location Location
	Bundle   string // name of the bundle
}

// Decision is the outcome of one evaluation.
type Decision struct {
	Allowed bool
	// Denials say why not; never empty when not Allowed.
	Denials []Denial
	// HTTPStatus, Headers and Body for the answer to a denied request, when the
	// policy sets them (shape of opa-envoy-plugin).
	HTTPStatus int
	Headers    map[string]string
	Body       string
	// Took is how long it was.
	Took time.Duration
}

// Admission is the input of package portolan.admission.
type Admission struct {
	Operation string         `json:"operation"` // "CREATE", "UPDATE", "DELETE"
	Kind      string         `json:"kind"`      // "Workload"
	Actor     string         `json:"actor"`     // SPIFFE ID
	Roles     []string       `json:"roles"`
	Tenant    map[string]any `json:"tenant"`
	Object    map[string]any `json:"object"`     // JSON form of the object
	OldObject map[string]any `json:"old_object"` // when it existed
	// Facts gathered by the server before: registries, resolved digests.
	Facts map[string]any `json:"facts"`
}

// Peer is one end of a connection.
type Peer struct {
	SPIFFEID string `json:"spiffe_id"`
	Cluster  string `json:"cluster"`
	Tenant   string `json:"tenant"`
	Workload string `json:"workload"`
	Address  string `json:"address,omitempty"`
}

// Network is the input of package portolan.network. Attributes, ParsedPath and
// ParsedQuery follow opa-envoy-plugin's documented shape, so that users'
// policies port; Source, Destination, Protocol and Port are ours.
type Network struct {
	Attributes  map[string]any      `json:"attributes"`
	ParsedPath  []string            `json:"parsed_path"`
	ParsedQuery map[string][]string `json:"parsed_query"`
	Source      Peer                `json:"source"`
	Destination Peer                `json:"destination"`
	Service     string              `json:"service"`
	Protocol    string              `json:"protocol"` // "http" or "tcp"
	Port        int                 `json:"port"`     // of the destination
}

// Admitter decides admissions.
type Admitter interface {
	Admit(ctx context.Context, in Admission) Decision
}

// Authorizer decides network calls. Allowed means: every guardrail bundle allows,
// the callee's tenant has a bundle, and every one that it has allows.
type Authorizer interface {
	Authorize(ctx context.Context, in Network) Decision
}

// Bundle is Rego by relative path.
type Bundle struct {
	Name  string // resource name
	Kind  string // "admission" or "network"
	Files map[string]string
}

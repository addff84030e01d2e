// Package api holds what every plane agrees on: names and IDs, error kinds, the
// resource types of the protocol, and, in its sub-packages, the generated code
// of the protos beside it. It does no I/O and holds no state.
package api

// Type URLs of the resources on the two upper hops.
const (
	IntentTypeURL    = "type.googleapis.com/portolan.link.v1.Intent"
	DirectiveTypeURL = "type.googleapis.com/portolan.node.v1.Directive"
)

// WatermarkName is the resource name of the watermark on both upper hops.
const WatermarkName = "watermark"

// SystemTenant owns the gateways. No user may create objects in it but fleet
// admins.
const SystemTenant = "system"

// Limits of messages and objects, in bytes unless said otherwise.
const (
	MaxObjectBytes  = 1 << 20
	MaxMessageBytes = 16 << 20
	MaxLabels       = 64 // entries
)

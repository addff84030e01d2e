package store

import (
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
)

// The kinds, with their one writer in the comment.
const (
	Tenant          Kind = "Tenant"                // server
	Cluster         Kind = "Cluster"               // server
	RoleBinding     Kind = "RoleBinding"           // server
	PolicyBundle    Kind = "PolicyBundle"          // server
	Workload        Kind = "Workload"              // server
	Revision        Kind = "WorkloadRevision"      // server
	Service         Kind = "Service"               // server
	Route           Kind = "Route"                 // server
	TrustBundle     Kind = "TrustBundle"           // fleet, at Join; server deletes it with its cluster
	JoinToken       Kind = "JoinToken"             // server; fleet marks it used, once, at Join
	RequestResult   Kind = "RequestResult"         // server
	VirtualIP       Kind = "VirtualIP"             // server
	AuditEntry      Kind = "AuditEntry"            // server
	Placement       Kind = "Placement"             // control
	Rollout         Kind = "Rollout"               // control
	ClusterStatus   Kind = "ClusterStatusRecord"   // fleet
	PlacementStatus Kind = "PlacementStatusRecord" // fleet
	ServiceExport   Kind = "ServiceExport"         // fleet
	Nack            Kind = "NackRecord"            // fleet
)

// KindInfo is what implementations need of a kind.
type KindInfo struct {
	Kind Kind
	// New makes an empty message.
	New func() proto.Message
}

func kinds() []KindInfo {
	return []KindInfo{
		{Tenant, func() proto.Message { return &portolanv1.Tenant{} }},
		{Cluster, func() proto.Message { return &portolanv1.Cluster{} }},
		{RoleBinding, func() proto.Message { return &portolanv1.RoleBinding{} }},
		{TrustBundle, func() proto.Message { return &linkv1.TrustBundle{} }},
		{JoinToken, func() proto.Message { return &storev1.JoinToken{} }},
		{PolicyBundle, func() proto.Message { return &portolanv1.PolicyBundle{} }},
		{Workload, func() proto.Message { return &portolanv1.Workload{} }},
		{Revision, func() proto.Message { return &portolanv1.WorkloadRevision{} }},
		{Service, func() proto.Message { return &portolanv1.Service{} }},
		{VirtualIP, func() proto.Message { return &storev1.VirtualIP{} }},
		{Route, func() proto.Message { return &portolanv1.Route{} }},
		{Placement, func() proto.Message { return &portolanv1.Placement{} }},
		{Rollout, func() proto.Message { return &storev1.Rollout{} }},
		{ClusterStatus, func() proto.Message { return &storev1.ClusterStatusRecord{} }},
		{PlacementStatus, func() proto.Message { return &storev1.PlacementStatusRecord{} }},
		{ServiceExport, func() proto.Message { return &linkv1.ServiceExport{} }},
		{Nack, func() proto.Message { return &storev1.NackRecord{} }},
		{RequestResult, func() proto.Message { return &storev1.RequestResult{} }},
		{AuditEntry, func() proto.Message { return &portolanv1.AuditEntry{} }},
	}
}

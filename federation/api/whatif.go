package api

import "github.com/portolan-io/portolan/federation/api/portolanv1"

// WhatIf is a change that is only thought of: federation/server asks what would
// come of it, federation/control answers. Exactly one field is set.
type WhatIf struct {
	// Workload as it would be stored, with its new generation and revision.
	Workload *portolanv1.Workload
	// Deleted is the name of a workload that would be gone.
	Deleted string
	// Cluster that would be there, or be otherwise.
	Cluster *portolanv1.ClusterChange
}

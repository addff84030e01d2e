package fleet

import (
	"testing"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// How replicas are spread and updated makes no revision, and must reach clusters
// all the same; the stored revision stays as it is.
func TestOverlayOfWhatMakesNoRevision(t *testing.T) {
	stored := &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Name: "main"}}, Scheduling: &portolanv1.WorkloadSpec_Scheduling{SpreadKey: "zone"}}
	rs := []*linkv1.RevisionIntent{{Revision: "v1", Spec: stored}}
	surge := int32(3)
	now := &portolanv1.WorkloadSpec{Scheduling: &portolanv1.WorkloadSpec_Scheduling{SpreadKey: "node"}, Update: &portolanv1.WorkloadSpec_UpdateStrategy{MaxSurge: &surge}}
	if !overlay(rs, now) {
		t.Error("a change was not seen")
	}
	if got := rs[0].GetSpec(); got.GetScheduling().GetSpreadKey() != "node" || got.GetUpdate().GetMaxSurge() != 3 || len(got.GetContainers()) != 1 {
		t.Errorf("clusters are told %v", got)
	}
	if stored.GetScheduling().GetSpreadKey() != "zone" || stored.GetUpdate() != nil {
		t.Errorf("the stored revision changed: %v", stored)
	}
	if overlay(rs, now) {
		t.Error("no change counts as one")
	}
}

// Where replicas may be makes no revision either: a cluster that is told of it late
// would run a second one of what is exclusive, or bind to nodes that are not meant.
// What differs from cluster to cluster is the revision's own.
func TestOverlayOfPlacement(t *testing.T) {
	own := []*portolanv1.WorkloadSpec_ClusterOverride{{Containers: []*portolanv1.WorkloadSpec_ContainerOverride{{Args: []string{"--old"}}}}}
	stored := &portolanv1.WorkloadSpec{Placement: &portolanv1.WorkloadSpec_Placement{Overrides: own, Capacity: portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY}}
	rs := []*linkv1.RevisionIntent{{Revision: "v1", Spec: stored}}
	now := &portolanv1.WorkloadSpec{Placement: &portolanv1.WorkloadSpec_Placement{Overrides: []*portolanv1.WorkloadSpec_ClusterOverride{{Containers: []*portolanv1.WorkloadSpec_ContainerOverride{{Args: []string{"--new"}}}}}, Exclusive: true}}
	if !overlay(rs, now) {
		t.Fatal("a change was not seen")
	}
	got := rs[0].GetSpec().GetPlacement()
	if !got.GetExclusive() || got.GetCapacity() != portolanv1.CapacityType_CAPACITY_TYPE_UNSPECIFIED || len(got.GetOverrides()) != 1 || got.GetOverrides()[0].GetContainers()[0].GetArgs()[0] != "--old" {
		t.Errorf("clusters are told %v", got)
	}
	if stored.GetPlacement().GetExclusive() {
		t.Errorf("the stored revision changed: %v", stored)
	}
	now = &portolanv1.WorkloadSpec{}
	if rs[0].Spec = stored; !overlay(rs, now) || len(rs[0].GetSpec().GetPlacement().GetOverrides()) != 1 {
		t.Errorf("without placement clusters are told %v", rs[0].GetSpec())
	}
}

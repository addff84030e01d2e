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

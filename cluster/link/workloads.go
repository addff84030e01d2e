package link

import (
	"maps"
	"slices"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// workloads rolls replicas up, by "tenant/workload": everything that is intended
// or of which anything is left. A workload that is not in the map is gone from
// this cluster.
func workloads(s *state.Snapshot) map[string]*linkv1.WorkloadStatusReport {
	allocations := map[string][]*clusterv1.Allocation{}
	for _, a := range s.Allocations {
		k := a.GetTenant() + "/" + a.GetWorkload()
		allocations[k] = append(allocations[k], a)
	}
	out := map[string]*linkv1.WorkloadStatusReport{}
	for _, i := range s.Intents {
		if w := i.GetWorkload(); w != nil {
			k := w.GetTenant() + "/" + w.GetWorkload()
			out[k] = rollUp(s, w, allocations[k])
			delete(allocations, k)
		}
	}
	for k, left := range allocations {
		out[k] = rollUp(s, &linkv1.WorkloadIntent{Tenant: left[0].GetTenant(), Workload: left[0].GetWorkload()}, left)
	}
	return out
}

func rollUp(s *state.Snapshot, w *linkv1.WorkloadIntent, allocations []*clusterv1.Allocation) *linkv1.WorkloadStatusReport {
	out := &linkv1.WorkloadStatusReport{Tenant: w.GetTenant(), Workload: w.GetWorkload(), Epoch: w.GetEpoch()}
	count := map[string]*portolanv1.RevisionReplicas{}
	for _, r := range w.GetRevisions() {
		count[r.GetRevision()] = &portolanv1.RevisionReplicas{Revision: r.GetRevision()}
	}
	for _, a := range allocations {
		c := count[a.GetRevision()]
		if c == nil {
			c = &portolanv1.RevisionReplicas{Revision: a.GetRevision()}
			count[a.GetRevision()] = c
		}
		if w.GetEpoch() == 0 {
			out.Epoch = max(out.Epoch, a.GetEpoch())
		}
		c.Replicas++
		if !a.GetStop() && ready(s, a) {
			c.ReadyReplicas++
		}
	}
	for _, r := range slices.Sorted(maps.Keys(count)) {
		out.Revisions = append(out.Revisions, count[r])
	}
	return out
}

package place

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Override is the spec as one cluster runs it: every override of
// spec.placement.overrides that matches the cluster is laid over its containers,
// later ones over earlier ones. The spec is not changed, and is returned as it is
// when nothing matches.
func Override(spec *portolanv1.WorkloadSpec, clusterID string, cluster *portolanv1.ClusterSpec, labels map[string]string) *portolanv1.WorkloadSpec {
	out := spec
	for _, o := range spec.GetPlacement().GetOverrides() {
		if !matches(o.GetMatch(), clusterID, cluster, labels) {
			continue
		}
		if out == spec {
			out = proto.CloneOf(spec)
		}
		for _, c := range o.GetContainers() {
			for _, into := range slices.Concat(out.GetContainers(), out.GetInitContainers()) {
				api.LayOver(into, c)
			}
		}
	}
	return out
}

// matches says whether everything that the match gives holds of the cluster.
func matches(m *portolanv1.WorkloadSpec_ClusterMatch, id string, cluster *portolanv1.ClusterSpec, labels map[string]string) bool {
	within := func(list []string, v string) bool { return len(list) == 0 || slices.Contains(list, v) }
	if !within(m.GetClusters(), id) || !within(m.GetRegions(), cluster.GetRegion()) || !within(m.GetProviders(), cluster.GetProvider()) {
		return false
	}
	for k, v := range m.GetLabels() {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

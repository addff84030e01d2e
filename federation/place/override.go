package place

import (
	"slices"

	"google.golang.org/protobuf/proto"

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
			lay(out.GetContainers(), c)
			lay(out.GetInitContainers(), c)
		}
	}
	return out
}

// lay applies an override to the containers of its name.
func lay(containers []*portolanv1.Container, o *portolanv1.WorkloadSpec_ContainerOverride) {
	for _, c := range containers {
		if nameOf(c.GetName()) != nameOf(o.GetName()) {
			continue
		}
		for k, v := range o.GetEnv() {
			if c.Env == nil {
				c.Env = map[string]string{}
			}
			c.Env[k] = v
		}
		if len(o.GetArgs()) > 0 {
			c.Args = slices.Clone(o.GetArgs())
		}
		c.Requests = layResources(c.GetRequests(), o.GetRequests())
		c.Limits = layResources(c.GetLimits(), o.GetLimits())
	}
}

func nameOf(container string) string {
	if container == "" {
		return "main"
	}
	return container
}

// layResources replaces the quantities that are given.
func layResources(have, o *portolanv1.ResourceList) *portolanv1.ResourceList {
	if o == nil {
		return have
	}
	out := &portolanv1.ResourceList{}
	if have != nil {
		out = proto.CloneOf(have)
	}
	if o.GetCpu() != "" {
		out.Cpu = o.GetCpu()
	}
	if o.GetMemory() != "" {
		out.Memory = o.GetMemory()
	}
	if o.GetPids() != 0 {
		out.Pids = o.GetPids()
	}
	if o.GetStorage() != "" {
		out.Storage = o.GetStorage()
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

package place

import (
	"fmt"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Revision is one template of the workload.
type Revision struct {
	ID string
	// Requests of one replica, where nothing is overridden.
	Requests api.Resources
	// Surge is how many replicas more than declared an update may run.
	Surge int
	// spec is kept when its overrides change requests.
	spec *portolanv1.WorkloadSpec
}

// NewRevision reads what placement needs from a template. The error names a
// quantity that cannot be read, also one of an override.
func NewRevision(id string, spec *portolanv1.WorkloadSpec) (Revision, error) {
	r := Revision{ID: id, Surge: surge(spec)}
	var err error
	if r.Requests, err = api.RequestsOf(spec); err != nil {
		return r, err
	}
	for i, o := range spec.GetPlacement().GetOverrides() {
		for j, c := range o.GetContainers() {
			if c.GetRequests() == nil && c.GetLimits() == nil {
				continue
			}
			r.spec = spec
			for _, l := range []*portolanv1.ResourceList{c.GetRequests(), c.GetLimits()} {
				if _, err := api.ParseCPU(l.GetCpu()); err != nil {
					return r, fmt.Errorf("spec.placement.overrides[%d].containers[%d] cpu: %w", i, j, err)
				}
				if _, err := api.ParseBytes(l.GetMemory()); err != nil {
					return r, fmt.Errorf("spec.placement.overrides[%d].containers[%d] memory: %w", i, j, err)
				}
			}
		}
	}
	return r, nil
}

// requestsIn is what one replica requests in a cluster.
func (r *Revision) requestsIn(c *Cluster) api.Resources {
	if r.spec == nil || plant.overridesUncounted {
		return r.Requests
	}
	laid := Override(r.spec, c.ID, c.Spec, c.Labels)
	if laid == r.spec {
		return r.Requests
	}
	out, err := api.RequestsOf(laid)
	if err != nil {
		return r.Requests // NewRevision has read every quantity
	}
	return out
}

func surge(spec *portolanv1.WorkloadSpec) int {
	u := spec.GetUpdate()
	switch {
	case isJob(spec), spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, spec.GetPlacement().GetExclusive():
		return 0
	case spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		return 0 // a name is stopped before it is started anew
	case u.GetType() == portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN:
		return 0 // the new revision is a claim of its own
	case u.GetMaxSurge() == 0 && u.GetMaxUnavailable() == 0:
		return 1
	}
	return int(u.GetMaxSurge())
}

func isJob(spec *portolanv1.WorkloadSpec) bool {
	return spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
}

// Claim is what n replicas reserve in a cluster that overrides nothing.
func (w Workload) Claim(n int) api.Resources {
	var sum api.Resources
	if n <= 0 {
		return sum
	}
	for _, r := range w.Running() {
		sum = sum.Add(r.Requests.Times(int64(n + r.Surge)))
	}
	return sum
}

// Running revisions are all, but of an exclusive workload only the first.
func (w Workload) Running() []Revision {
	if w.Spec.GetPlacement().GetExclusive() && len(w.Revisions) > 1 {
		return w.Revisions[:1]
	}
	return w.Revisions
}

// most is how many replicas of the spec run over the fleet at once, at most: what
// is placed and reserved.
func most(spec *portolanv1.WorkloadSpec) int {
	switch {
	case spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		return 0
	case isJob(spec):
		return max(1, int(spec.GetJob().GetCompletions()))
	case scales(spec):
		n := int(spec.GetAutoscale().GetMax())
		for _, s := range spec.GetAutoscale().GetSchedules() {
			n = max(n, int(s.GetMax()))
		}
		return n
	}
	return begin(spec)
}

// begin is how many replicas the spec declares.
func begin(spec *portolanv1.WorkloadSpec) int {
	if spec == nil || spec.Replicas == nil {
		return 1
	}
	return max(0, int(spec.GetReplicas()))
}

// scales says whether clusters change the number of replicas by themselves.
func scales(spec *portolanv1.WorkloadSpec) bool {
	return spec.GetAutoscale() != nil && !spec.GetPlacement().GetExclusive() &&
		!isJob(spec) && spec.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
}

// least is the fewest replicas that a workload which scales may have.
func least(spec *portolanv1.WorkloadSpec) int {
	if spec.GetAutoscale().Min == nil {
		return 1
	}
	return int(spec.GetAutoscale().GetMin())
}

package autoscale

import (
	"fmt"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// ShapeOf is what replicas of a spec ask of a node: what its containers request,
// and the overhead of its proxy. Affinity between replicas and spread are not in
// it: they choose among nodes, and a new node of any pool is as good as another.
func ShapeOf(key string, count int, spec *portolanv1.WorkloadSpec, overhead api.Resources) (Shape, error) {
	r, err := api.RequestsOf(spec)
	if err != nil {
		return Shape{}, err
	}
	s := Shape{
		Key: key, Count: count, Priority: int(spec.GetPriority()), Request: r.Add(overhead), Capacity: spec.GetPlacement().GetCapacity(),
		Devices: spec.GetScheduling().GetDevices(), Selector: spec.GetScheduling().GetNodeSelector(),
		Affinity: spec.GetScheduling().GetNodeAffinity(), Tolerations: spec.GetScheduling().GetTolerations(),
	}
	for i, c := range spec.GetContainers() {
		text := c.GetRequests().GetStorage()
		if text == "" {
			text = c.GetLimits().GetStorage()
		}
		n, err := api.ParseBytes(text)
		if err != nil {
			return Shape{}, fmt.Errorf("spec.containers[%d].requests.storage: %w", i, err)
		}
		s.StorageBytes += n
	}
	for i, v := range spec.GetVolumes() {
		n, err := api.ParseBytes(v.GetSize())
		if err != nil {
			return Shape{}, fmt.Errorf("spec.volumes[%d].size: %w", i, err)
		}
		s.StorageBytes += n
	}
	return s, nil
}

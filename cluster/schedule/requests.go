package schedule

import (
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Requests is what one replica takes from a node: what its containers ask for
// (limits where requests are absent) and the overhead of its proxy.
func Requests(spec *portolanv1.WorkloadSpec, overhead api.Resources) (api.Resources, error) {
	r, err := api.RequestsOf(spec)
	if err != nil {
		return api.Resources{}, err
	}
	return r.Add(overhead), nil
}

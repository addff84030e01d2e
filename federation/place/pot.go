package place

import (
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Pot is what a cluster can promise and has promised, apart for nodes that the
// provider may take back (spot) and others. The zero value is empty.
type Pot struct {
	OnDemand, Spot api.Resources
	// claims by what they may lie on: only on demand, spot first, only spot.
	claims [3]api.Resources
}

// PotOf is a cluster's capacity; all of it is on demand when the cluster tells of
// no pools.
func PotOf(s *portolanv1.ClusterStatus) Pot {
	p := Pot{OnDemand: api.Resources{CPUMilli: s.GetCpuMilli(), MemoryBytes: s.GetMemoryBytes()}}
	for _, pool := range s.GetPools() {
		if pool.GetSpot() {
			r := api.Resources{CPUMilli: pool.GetCpuMilli(), MemoryBytes: pool.GetMemoryBytes()}
			p.Spot, p.OnDemand = p.Spot.Add(r), minus(p.OnDemand, r)
		}
	}
	return p
}

// Book adds a claim; a negative one takes it back.
func (p *Pot) Book(t portolanv1.CapacityType, claim api.Resources) {
	c := &p.claims[class(t)]
	c.CPUMilli += claim.CPUMilli
	c.MemoryBytes += claim.MemoryBytes
}

// Claims is all that is promised.
func (p *Pot) Claims() api.Resources { return p.claims[0].Add(p.claims[1]).Add(p.claims[2]) }

// Free is what is left. Claims that may lie on either are counted on spot nodes as
// far as these go; negative says by how much too much is promised.
func (p *Pot) Free() (onDemand, spot api.Resources) {
	spot = minus(p.Spot, p.claims[2])
	onSpot := api.Resources{CPUMilli: min(p.claims[1].CPUMilli, max(spot.CPUMilli, 0)), MemoryBytes: min(p.claims[1].MemoryBytes, max(spot.MemoryBytes, 0))}
	return minus(p.OnDemand, p.claims[0].Add(minus(p.claims[1], onSpot))), minus(spot, onSpot)
}

// CapacityOf is on what nodes the claims of a workload lie: a daemon's on every
// node, spot or not, whatever its placement says.
func CapacityOf(spec *portolanv1.WorkloadSpec) portolanv1.CapacityType {
	if isDaemon(spec) {
		return portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED
	}
	return spec.GetPlacement().GetCapacity()
}

// MakesRoom says whether what a claim on nodes of a capacity type leaves is of use to
// a workload: its own lies on nodes of the same kind. A daemon's are all.
func MakesRoom(on portolanv1.CapacityType, spec *portolanv1.WorkloadSpec) bool {
	return isDaemon(spec) || class(on) == class(CapacityOf(spec))
}

func class(t portolanv1.CapacityType) int {
	switch t {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		return 1
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		return 2
	default:
		return 0
	}
}

func minus(a, b api.Resources) api.Resources {
	return api.Resources{CPUMilli: a.CPUMilli - b.CPUMilli, MemoryBytes: a.MemoryBytes - b.MemoryBytes}
}

package place

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// TestFreeCapacityIsProportional: what is divided by free capacity is divided as
// seats are by votes (Sainte-Laguë), the votes of a cluster being the replicas that
// fit into what is free there: no cluster has one that another with room would have
// a better claim to.
func TestFreeCapacityIsProportional(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int32Range(1, 40).Draw(t, "replicas")
		it := item("t", "w", 0, n)
		it.Workload.Spec.Placement.Division = portolanv1.Division_DIVISION_FREE_CAPACITY
		s := Snapshot{Workload: it.Workload}
		votes := map[string]int{}
		for i := range rapid.IntRange(1, 5).Draw(t, "clusters") {
			cores := rapid.Int64Range(0, 200).Draw(t, "cores")
			c := site(fmt.Sprintf("c%d", i), cores)
			c.Spot = api.Resources{CPUMilli: 7000}
			s.Clusters = append(s.Clusters, c)
			votes[c.ID] = int(cores)
		}
		p := Place(s, epoch)
		for a, va := range votes {
			for b, vb := range votes {
				na, nb := p.units(a), p.units(b)
				// b gives its last to a: (2n-1)/votes of b against (2n+1)/votes of a.
				if nb > 0 && na < va && (2*nb-1)*va > (2*na+1)*vb {
					t.Errorf("%s has %d of %d that fit, %s %d of %d", a, na, va, b, nb, vb)
				}
			}
		}
		if p.Unplaced > 0 {
			for id, v := range votes {
				if p.units(id) < v {
					t.Errorf("%d are unplaced, %s has %d of %d", p.Unplaced, id, p.units(id), v)
				}
			}
		}
	})
}

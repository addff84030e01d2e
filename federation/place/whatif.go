package place

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Change is what may be asked "what if" about: the answer is PlaceAll of the
// changed World.
type Change int

// What may happen to a cluster.
const (
	// Lose: silent for so long that every failover is due.
	Lose Change = iota
	// Drain: everything is to leave.
	Drain
	// Cordon: nothing new.
	Cordon
	// Add: one that is not there yet.
	Add
	// Remove: taken out of the fleet.
	Remove
)

// DrainTaint is the key of the taint that stands for a drain.
const DrainTaint = "portolan/drained"

// With is the World after a change of one cluster; of c only Add needs more than
// the ID. The World itself is not changed.
func (w World) With(ch Change, c Cluster) World {
	w.Clusters = slices.Clone(w.Clusters)
	if ch == Add {
		w.Clusters = append(w.Clusters, c)
		return w
	}
	if ch == Remove {
		w.Clusters = slices.DeleteFunc(w.Clusters, func(o Cluster) bool { return o.ID == c.ID })
		return w
	}
	for i := range w.Clusters {
		x := &w.Clusters[i]
		if x.ID != c.ID {
			continue
		}
		switch ch {
		case Lose:
			x.State, x.LastSeen = portolanv1.ClusterState_CLUSTER_STATE_LOST, time.Time{}
		case Drain:
			x.Spec = proto.CloneOf(x.Spec)
			x.Spec.Taints = append(x.Spec.Taints, &portolanv1.Taint{Key: DrainTaint, Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE})
		default:
			x.Spec = proto.CloneOf(x.Spec)
			x.Spec.Cordoned = true
		}
	}
	return w
}

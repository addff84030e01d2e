package autoscale

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const (
	// idleBelow is how little of a node may be in use for it to go (the cluster
	// autoscaler's scale-down utilisation threshold).
	idleBelow = 0.5
	// shrinkAtOnce bounds how many nodes go in one plan: what is moved must settle
	// before more is.
	shrinkAtOnce = 10
)

// host is a node in thought.
type host struct {
	node *PoolNode
	pool int
	// like is its pool, with the node's own size.
	like Pool
	room *room
	gone bool
	// busy has taken in replicas of another, and stays.
	busy bool
}

// shrink finds nodes that are little used and whose replicas fit elsewhere: the
// dearest first, then the least used. No pool goes below its least number.
func (g *grower) shrink(nodes []PoolNode) {
	hosts := g.hosts(nodes)
	order := slices.Clone(hosts)
	slices.SortStableFunc(order, func(a, b *host) int {
		return cmp.Or(cmp.Compare(g.pools[b.pool].HourMicros, g.pools[a.pool].HourMicros), cmp.Compare(b.room.waste(&b.like), a.room.waste(&a.like)), cmp.Compare(a.node.ID, b.node.ID))
	})
	going := make([][]string, len(g.pools))
	total := 0
	for _, h := range order {
		p := &g.pools[h.pool]
		if total == shrinkAtOnce || p.Current-len(going[h.pool]) <= p.Min || h.busy || h.node.Pinned || used(h) >= idleBelow || !g.empty(h, hosts) {
			continue
		}
		h.gone = true
		going[h.pool] = append(going[h.pool], h.node.ID)
		total++
	}
	for i, ids := range going {
		if len(ids) == 0 {
			continue
		}
		g.plan.Changes = append(g.plan.Changes, PoolChange{
			Pool: g.pools[i].Name, Delta: -len(ids), HourMicros: -int64(len(ids)) * g.pools[i].HourMicros, Nodes: ids,
			Reason: &portolanv1.Reason{Code: NodesUnneeded, Message: fmt.Sprintf("shrink by %d: less than half of each is used, and what runs there fits elsewhere", len(ids))},
		})
	}
}

func (g *grower) hosts(nodes []PoolNode) []*host {
	var out []*host
	for i := range nodes {
		pool := slices.IndexFunc(g.pools, func(p Pool) bool { return p.Name == nodes[i].Pool })
		if pool < 0 {
			continue
		}
		h := &host{node: &nodes[i], pool: pool, like: g.pools[pool]}
		if own := nodes[i].Size; own != nil {
			h.like.Size, h.like.StorageBytes = *own, nodes[i].StorageBytes
		}
		h.room = newRoom(&h.like)
		for j := range h.node.Replicas {
			h.room.hold(&h.node.Replicas[j])
		}
		out = append(out, h)
	}
	slices.SortStableFunc(out, func(a, b *host) int { return cmp.Compare(a.node.ID, b.node.ID) })
	return out
}

// used is the greatest part of a node that is in use.
func used(h *host) float64 {
	out := max(1-ratio(h.room.cpu, h.like.Size.CPUMilli), 1-ratio(h.room.memory, h.like.Size.MemoryBytes))
	for _, f := range h.room.free {
		if f < 1000 {
			return 1 // devices are too dear to be moved about
		}
	}
	return out
}

// empty moves the replicas of a node to others in thought; when one finds no
// place, nothing is moved.
func (g *grower) empty(h *host, hosts []*host) bool {
	type was struct {
		h    *host
		room room
		busy bool
	}
	var undo []was
	for i := range h.node.Replicas {
		s := &h.node.Replicas[i]
		to := g.place(s, h, hosts)
		if to == nil {
			for _, w := range slices.Backward(undo) {
				*w.h.room, w.h.busy = w.room, w.busy
			}
			return false
		}
		undo = append(undo, was{to, *to.room, to.busy})
		to.room.take(s, 1)
		to.busy = true
	}
	return true
}

// place is the fullest other node that takes a replica.
func (g *grower) place(s *Shape, from *host, hosts []*host) *host {
	var best *host
	least := 0.0
	for _, h := range hosts {
		if h == from || h.gone {
			continue
		}
		if _, ok := suits(&h.like, s); !ok {
			continue
		}
		try := *h.room
		if try.take(s, 1) == 0 {
			continue
		}
		if w := h.room.waste(&h.like); best == nil || w < least {
			best, least = h, w
		}
	}
	return best
}

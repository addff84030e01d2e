package autoscale

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// PoolsInput is everything that GrowPools follows from.
type PoolsInput struct {
	// Pending are the replicas that found no node, by shape.
	Pending []Shape
	Pools   []Pool
	// Nodes are those that are there and well. Only shrinking reads them.
	Nodes []PoolNode
}

// Shape is a number of identical replicas and what a node must have for them.
type Shape struct {
	// Key tells shapes apart: "tenant/workload/revision".
	Key      string
	Count    int
	Priority int
	Request  api.Resources
	// StorageBytes of scratch space and volumes.
	StorageBytes int64
	Devices      []*portolanv1.DeviceRequest
	Selector     map[string]string
	Affinity     []*portolanv1.RequirementTerm
	Tolerations  []*portolanv1.Toleration
	Capacity     portolanv1.CapacityType
}

// Pool is one kind of node.
type Pool struct {
	Name string
	// Size is what one new node can be promised: without what is reserved and what
	// daemons take, with overcommit.
	Size         api.Resources
	StorageBytes int64
	Devices      []DeviceStock
	Labels       map[string]string
	Taints       []*portolanv1.Taint
	// HourMicros is the price of one node.
	HourMicros int64
	Spot       bool
	// Bounds, and how many nodes there are or are coming. It never grows where Max
	// is 0.
	Min, Max, Current int
}

// DeviceStock is a number of equal devices of one node.
type DeviceStock struct {
	Kind, Model string
	Count       int
}

// PoolNode is one node and what runs on it.
type PoolNode struct {
	ID, Pool string
	// Replicas that would have to go elsewhere, one for each; daemons apart.
	Replicas []Shape
	// Pinned says that something there can not move: a volume, a budget of none.
	Pinned bool
	// Size and StorageBytes are what it can be promised, without what the daemons that
	// are there take; its pool's when Size is nil.
	Size         *api.Resources
	StorageBytes int64
}

// PoolsPlan says what should change, in the order of the pools' names.
type PoolsPlan struct {
	Changes []PoolChange
	// Fills are what the new nodes are for.
	Fills []Fill
	// Unmet are replicas that no pool could take.
	Unmet []Unmet
}

// PoolChange is by how many nodes a pool should grow, or shrink.
type PoolChange struct {
	Pool  string
	Delta int
	// HourMicros is what that costs, or saves, negative.
	HourMicros int64
	// Nodes that should go.
	Nodes  []string
	Reason *portolanv1.Reason
}

// Fill is a number of equally filled new nodes.
type Fill struct {
	Pool  string
	Nodes int
	Takes []Take
}

// Take is how many replicas of a shape one node takes.
type Take struct {
	Key   string
	Count int
}

// Unmet is what stays pending, and why, by pool.
type Unmet struct {
	Key     string
	Count   int
	Reasons []*portolanv1.Reason
}

// Reason codes of pools.
const (
	PoolGrows     = "PoolGrows"
	PoolBelowMin  = "PoolBelowMin"
	NodesUnneeded = "NodesUnneeded"
	PoolFull      = "PoolAtMaximum"
	PoolFixed     = "PoolDoesNotGrow"
	NodeTooSmall  = "NodeTooSmall"
	NoSuchDevice  = "NoSuchDevice"
	LabelMismatch = "LabelMismatch"
	PoolTainted   = "TaintNotTolerated"
	NotOnSpot     = "NotOnSpot"
	SpotOnly      = "SpotOnly"
)

// grower holds what is left to place, and what pools have grown by.
type grower struct {
	pools  []Pool
	shapes []Shape
	left   []int
	worth  []float64
	// fits holds by pool and shape whether a new node could take one at all.
	fits  [][]bool
	grown []int
	plan  PoolsPlan
	why   []string
}

// GrowPools says which pools should grow, for what is pending, or else shrink.
//
// It chooses node by node. A node of each pool is filled in thought, the most
// wanted and the largest first. The price of a replica is that of the part of a
// node that it takes, where that is cheapest; the node that costs least against the
// price of what it takes wins, then the one with the least waste. (Cluster autoscalers call these the price and the least-waste
// expander: https://github.com/kubernetes/autoscaler/blob/master/cluster-autoscaler/FAQ.md)
func GrowPools(in PoolsInput) PoolsPlan {
	g := newGrower(in)
	for i := range g.pools {
		if missing := g.pools[i].Min - g.pools[i].Current; missing > 0 {
			g.toMinimum(i, missing)
		}
	}
	for g.choose() {
	}
	g.unmet()
	g.changes()
	if len(g.plan.Fills)+len(g.plan.Unmet) == 0 {
		g.shrink(in.Nodes)
	}
	slices.SortStableFunc(g.plan.Changes, func(a, b PoolChange) int { return cmp.Compare(a.Pool, b.Pool) })
	return g.plan
}

func newGrower(in PoolsInput) *grower {
	g := &grower{pools: slices.Clone(in.Pools)}
	slices.SortStableFunc(g.pools, func(a, b Pool) int { return cmp.Compare(a.Name, b.Name) })
	g.grown, g.why = make([]int, len(g.pools)), make([]string, len(g.pools))
	type ranked struct {
		shape Shape
		homes int
		worth float64
	}
	var all []ranked
	for _, s := range in.Pending {
		if s.Count > 0 {
			homes, worth := g.homes(s)
			all = append(all, ranked{s, homes, worth})
		}
	}
	// The most wanted first, then those that fit fewest pools, then the largest.
	slices.SortStableFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(b.shape.Priority, a.shape.Priority), cmp.Compare(a.homes, b.homes), cmp.Compare(b.worth, a.worth), cmp.Compare(a.shape.Key, b.shape.Key))
	})
	for _, r := range all {
		g.shapes, g.left, g.worth = append(g.shapes, r.shape), append(g.left, r.shape.Count), append(g.worth, r.worth)
	}
	for i := range g.pools {
		row := make([]bool, len(g.shapes))
		for j := range g.shapes {
			_, row[j] = suits(&g.pools[i], &g.shapes[j])
		}
		g.fits = append(g.fits, row)
	}
	return g
}

// homes counts the pools that a shape suits, and gives the least that its part of
// a node costs in any.
func (g *grower) homes(s Shape) (n int, worth float64) {
	worth = math.Inf(1)
	for i := range g.pools {
		if _, ok := suits(&g.pools[i], &s); ok {
			n++
			worth = min(worth, float64(g.pools[i].HourMicros)*part(&g.pools[i], &s))
		}
	}
	return n, worth
}

// part is the greatest part of a node that a replica takes.
func part(p *Pool, s *Shape) float64 {
	out := max(ratio(s.Request.CPUMilli, p.Size.CPUMilli), ratio(s.Request.MemoryBytes, p.Size.MemoryBytes), ratio(s.StorageBytes, p.StorageBytes))
	for _, d := range s.Devices {
		all := int64(0)
		for _, st := range p.Devices {
			if deviceMatches(d, st) {
				all += int64(st.Count) * 1000
			}
		}
		out = max(out, ratio(int64(d.GetCount())*1000+int64(d.GetShareMilli()), all))
	}
	return out
}

func ratio(a, b int64) float64 {
	if a <= 0 {
		return 0
	}
	if b <= 0 {
		return 1
	}
	return float64(a) / float64(b)
}

// option is one more node of a pool, filled.
type option struct {
	pool  int
	takes []int
	count int
	// price is what the node costs against the price of what it takes; waste what of
	// it stays empty.
	price, waste float64
}

func (g *grower) room(i int) int {
	if g.pools[i].Max <= 0 {
		return 0
	}
	return g.pools[i].Max - g.pools[i].Current - g.grown[i]
}

// fill puts what is left into one new node of a pool.
func (g *grower) fill(i int) option {
	o := option{pool: i, takes: make([]int, len(g.shapes))}
	r := newRoom(&g.pools[i])
	worth := 0.0
	for j := range g.shapes {
		if g.fits[i][j] {
			n := r.take(&g.shapes[j], g.left[j])
			o.takes[j] = n
			o.count += n
			worth += float64(n) * g.worth[j]
		}
	}
	o.waste = r.waste(&g.pools[i])
	if worth > 0 {
		o.price = float64(g.pools[i].HourMicros) / worth
	}
	return o
}

func (o option) better(than option, names []Pool) bool {
	// Sums of parts are not exact: what differs by less than a millionth is equal.
	near := func(a, b float64) int {
		if math.Abs(a-b) <= 1e-6*max(math.Abs(a), math.Abs(b)) {
			return 0
		}
		return cmp.Compare(a, b)
	}
	return cmp.Or(near(o.price, than.price), near(o.waste, than.waste), cmp.Compare(than.count, o.count), strings.Compare(names[o.pool].Name, names[than.pool].Name)) < 0
}

// choose grows the best pool by as many nodes as would be filled alike; false when
// nothing is left, or no pool takes any of it.
func (g *grower) choose() bool {
	best, second := option{pool: -1}, option{pool: -1}
	for i := range g.pools {
		if g.room(i) <= 0 {
			continue
		}
		o := g.fill(i)
		switch {
		case o.count == 0:
		case best.pool < 0 || o.better(best, g.pools):
			best, second = o, best
		case second.pool < 0 || o.better(second, g.pools):
			second = o
		}
	}
	if best.pool < 0 {
		return false
	}
	g.take(best, g.room(best.pool))
	if g.why[best.pool] == "" {
		g.why[best.pool] = g.sentence(best, second)
	}
	return true
}

func (g *grower) sentence(best, second option) string {
	text := fmt.Sprintf("a node costs %.2f times the price of what it takes, %.0f%% of it stays empty", best.price, best.waste*100)
	if best.price == 0 {
		text = fmt.Sprintf("%.0f%% of a node stays empty", best.waste*100)
	}
	if second.pool >= 0 {
		text += fmt.Sprintf("; %s comes next with %.2f and %.0f%%", g.pools[second.pool].Name, second.price, second.waste*100)
	}
	return text
}

// take adds nodes that are filled alike.
func (g *grower) take(o option, most int) {
	nodes := most
	var takes []Take
	for j, n := range o.takes {
		if n > 0 {
			nodes = min(nodes, g.left[j]/n)
			takes = append(takes, Take{g.shapes[j].Key, n})
		}
	}
	for j, n := range o.takes {
		g.left[j] -= n * nodes
	}
	g.grown[o.pool] += nodes
	g.plan.Fills = append(g.plan.Fills, Fill{Pool: g.pools[o.pool].Name, Nodes: nodes, Takes: takes})
}

// toMinimum adds the nodes that a pool lacks of its least number; what is pending
// may have them.
func (g *grower) toMinimum(i, missing int) {
	g.why[i] = fmt.Sprintf("it has %d nodes of at least %d", g.pools[i].Current, g.pools[i].Min)
	for missing > 0 {
		before := g.grown[i]
		o := g.fill(i)
		if o.count == 0 {
			g.grown[i] += missing
			return
		}
		g.take(o, missing)
		missing -= g.grown[i] - before
	}
}

func (g *grower) unmet() {
	for j, n := range g.left {
		if n == 0 {
			continue
		}
		u := Unmet{Key: g.shapes[j].Key, Count: n}
		for i := range g.pools {
			why, ok := suits(&g.pools[i], &g.shapes[j])
			switch {
			case ok && g.pools[i].Max <= 0:
				why = &portolanv1.Reason{Code: PoolFixed, Message: "it does not grow"}
			case ok:
				why = &portolanv1.Reason{Code: PoolFull, Message: fmt.Sprintf("it has %d nodes of at most %d", g.pools[i].Current+g.grown[i], g.pools[i].Max)}
			}
			why.Message = "pool " + g.pools[i].Name + ": " + why.GetMessage()
			u.Reasons = append(u.Reasons, why)
		}
		g.plan.Unmet = append(g.plan.Unmet, u)
	}
}

func (g *grower) changes() {
	for i, n := range g.grown {
		if n == 0 {
			continue
		}
		code := PoolGrows
		if g.pools[i].Current+n == g.pools[i].Min {
			code = PoolBelowMin
		}
		g.plan.Changes = append(g.plan.Changes, PoolChange{
			Pool: g.pools[i].Name, Delta: n, HourMicros: int64(n) * g.pools[i].HourMicros,
			Reason: &portolanv1.Reason{Code: code, Message: fmt.Sprintf("grow by %d: %s", n, g.why[i])},
		})
	}
}

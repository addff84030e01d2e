package place

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// World is what decisions on many workloads depend on, besides the time.
type World struct {
	// Clusters of the whole fleet, in any order, IDs unique. Free and Spot are their
	// capacity less what is promised to workloads that are not in the list; what
	// belongs to one workload (Previous, Ready, Stopped, Lower) is not read.
	Clusters  []Cluster
	Workloads []Item
	// Verdicts asks for verdicts on every cluster, for every workload.
	Verdicts bool
}

// Item is a workload of a World.
type Item struct {
	// Name is unique, and breaks ties.
	Name string
	// Tenant shares room with others in proportion to Weight; 1 when 0.
	Tenant   string
	Weight   int
	Workload Workload
	// Held is what it has, at most one for each cluster.
	Held []Held
}

// Held is what a workload has in one cluster, and what the cluster says of it.
type Held struct {
	Cluster  string
	Previous Previous
	Ready    int
	Stopped  bool
}

// PlaceAll decides on every workload, one after the other: those of higher
// priority first, and among equals each time the next of the tenant with the
// smallest share of the fleet for its weight. So at the end of a priority the
// shares of tenants that still want more differ by no more than one workload's
// claim. What is held stays booked until its workload's turn. Plan i is of
// workload i.
//
// A workload that finds no room takes it from lower priorities, and they look for
// another place in their own turn. Who found too little is asked once more at the
// end, when others have left room or are where it must be; a lower priority that
// came first to such room gives it back.
func PlaceAll(w World, now time.Time) []Plan {
	a := newAll(w, now)
	for turn, ok := a.fair.Next(); ok; turn, ok = a.fair.Next() {
		a.order = append(a.order, turn.Index)
		a.decide(turn.Index)
	}
	for _, i := range a.order {
		p := &a.plans[i]
		// Room may have been left since, or the workload that it must be near placed.
		again := a.freed || len(a.items[i].Workload.Spec.GetPlacement().GetAffinity()) > 0
		if a.lost[i] || !p.Frozen && p.Unplaced+p.FailoverUnplaced > 0 && again {
			a.decide(i)
		}
	}
	return a.plans
}

// all is the working state of PlaceAll.
type all struct {
	now      time.Time
	items    []Item
	clusters []Cluster
	index    map[string]int
	pots     []Pot
	plans    []Plan
	// held is what each item has now: before its turn, and after.
	held [][]Held
	// holders of claims in each cluster; some may have gone.
	holders [][]int32
	fair    *Fair
	order   []int // as they were decided
	verbose bool
	// freed says that a decision has given something back, and lost which items
	// others have taken something from since they were decided.
	freed  bool
	lost   []bool
	byID   map[[2]string]int
	having map[string][]int
}

func newAll(w World, now time.Time) *all {
	a := &all{
		now: now, items: w.Workloads, clusters: slices.Clone(w.Clusters), index: map[string]int{}, plans: make([]Plan, len(w.Workloads)), verbose: w.Verdicts,
		held: make([][]Held, len(w.Workloads)), pots: make([]Pot, len(w.Clusters)), holders: make([][]int32, len(w.Clusters)),
		byID: map[[2]string]int{}, having: map[string][]int{}, lost: make([]bool, len(w.Workloads)),
	}
	slices.SortFunc(a.clusters, func(x, y Cluster) int { return cmp.Compare(x.ID, y.ID) })
	var total api.Resources
	for i := range a.clusters {
		c := &a.clusters[i]
		a.index[c.ID], a.pots[i] = i, Pot{OnDemand: c.Free, Spot: c.Spot}
		total = total.Add(c.Free).Add(c.Spot)
	}
	a.fair = NewFair(total)
	for i := range a.items {
		it := &a.items[i]
		a.fair.Add(it.Tenant, it.Weight, Turn{Name: it.Name, Priority: a.priority(i), Index: i})
		a.byID[[2]string{it.Tenant, it.Workload.ID}] = i
		if len(it.Workload.Spec.GetPlacement().GetAffinity()) > 0 {
			a.having[it.Tenant] = append(a.having[it.Tenant], i)
		}
		a.held[i] = slices.Clone(it.Held)
		a.book(i, 1)
	}
	return a
}

func (a *all) priority(i int) int { return int(a.items[i].Workload.Spec.GetPriority()) }

// book enters (1) or takes out (-1) all that an item has.
func (a *all) book(i int, sign int64) {
	for _, h := range a.held[i] {
		a.bookOne(i, h.Cluster, api.Resources{CPUMilli: sign * h.Previous.Claim.CPUMilli, MemoryBytes: sign * h.Previous.Claim.MemoryBytes})
		if c, ok := a.index[h.Cluster]; ok && sign > 0 {
			a.holders[c] = append(a.holders[c], int32(i))
		}
	}
}

func (a *all) bookOne(i int, cluster string, r api.Resources) {
	it := &a.items[i]
	if c, ok := a.index[cluster]; ok {
		a.pots[c].Book(CapacityOf(it.Workload.Spec), r)
	}
	a.fair.Use(it.Tenant, r)
}

// decide makes one decision on what is free now, and books it.
func (a *all) decide(i int) {
	it := &a.items[i]
	a.book(i, -1)
	s := Snapshot{Workload: it.Workload, Clusters: a.clusters, Brief: !a.verbose, Others: a.others(i)}
	before := a.prepare(i)
	p := Place(s, a.now)
	if p.Unplaced > 0 && !it.Workload.Spec.GetNeverPreempt() && a.fillLower(i) {
		p = Place(s, a.now)
		for c := range a.clusters {
			a.clusters[c].Lower = nil
		}
	}
	for _, v := range p.Displaced {
		a.cut(v)
	}
	old := &a.plans[i] // of an earlier turn, or what it lost before
	p.Displaced = append(slices.Clone(old.Displaced), p.Displaced...)
	p.Moved += old.Moved
	p.Reasons = append(p.Reasons, lostTo(old.Reasons)...)
	a.plans[i], a.lost[i] = p, false
	if !p.Frozen {
		a.take(i, p)
	}
	a.book(i, 1)
	for _, h := range before {
		n := slices.IndexFunc(a.held[i], func(now Held) bool { return now.Cluster == h.Cluster })
		a.freed = a.freed || n < 0 || !h.Previous.Claim.Fits(a.held[i][n].Previous.Claim)
	}
}

// lostTo are the reasons by which an item learnt before its turn that it lost
// something.
func lostTo(reasons []Reason) []Reason {
	return slices.DeleteFunc(slices.Clone(reasons), func(r Reason) bool { return r.Code != DisplacedBy })
}

// prepare sets in the clusters what belongs to one item.
func (a *all) prepare(i int) []Held {
	for c := range a.clusters {
		x := &a.clusters[c]
		x.Free, x.Spot = a.pots[c].Free()
		x.Previous, x.Ready, x.Stopped = Previous{}, 0, false
	}
	for _, h := range a.held[i] {
		if c, ok := a.index[h.Cluster]; ok {
			x := &a.clusters[c]
			x.Previous, x.Ready, x.Stopped = h.Previous, h.Ready, h.Stopped
		}
	}
	return a.held[i]
}

// fillLower puts into the clusters who could be displaced; false when nobody.
func (a *all) fillLower(i int) bool {
	some := false
	for c := range a.clusters {
		x := &a.clusters[c]
		slices.Sort(a.holders[c])
		a.holders[c] = slices.Compact(a.holders[c])
		for _, o := range a.holders[c] {
			other := &a.items[o]
			low := a.priority(int(o)) < a.priority(i) || plant.displacesEquals && a.priority(int(o)) <= a.priority(i)
			if !low || int(o) == i || !MakesRoom(CapacityOf(other.Workload.Spec), a.items[i].Workload.Spec) {
				continue
			}
			for _, h := range a.held[o] {
				if l, ok := other.Workload.Claimant(other.Name, x, h.Previous); ok && h.Cluster == x.ID {
					x.Lower, some = append(x.Lower, l), true
				}
			}
		}
	}
	return some
}

// cut takes from a victim what it loses.
func (a *all) cut(v Displaced) {
	o := slices.IndexFunc(a.items, func(it Item) bool { return it.Name == v.Workload })
	for k := range a.held[o] {
		h := &a.held[o][k]
		if h.Cluster != v.Cluster {
			continue
		}
		c := a.index[v.Cluster]
		after := a.items[o].Workload.Cut(&a.clusters[c], h.Previous, v.Replicas)
		a.bookOne(o, v.Cluster, minus(after.Claim, h.Previous.Claim))
		h.Previous, a.lost[o] = after, true
	}
	a.plans[o].Reasons = append(a.plans[o].Reasons, Reason{
		Code: DisplacedBy, Count: v.Replicas, Message: strconv.Itoa(v.Replicas) + " replicas in " + v.Cluster + " made room for a higher priority",
	})
}

// take makes what was decided what the item has.
func (a *all) take(i int, p Plan) {
	held := make([]Held, 0, len(p.Assignments))
	for _, as := range p.Assignments {
		n, ready := max(as.Replicas, as.Max), 0
		for _, h := range a.held[i] {
			if h.Cluster == as.Cluster {
				ready = h.Ready
			}
		}
		held = append(held, Held{Cluster: as.Cluster, Ready: ready, Previous: Previous{
			Present: true, Declared: n - as.Failover, Failover: as.Failover, Claim: as.Claim, Basis: p.Basis,
		}})
	}
	a.held[i] = held
}

// others are the workloads that affinity relates an item to.
func (a *all) others(i int) []Other {
	it := &a.items[i]
	var out []Other
	seen := map[int]bool{i: true}
	add := func(o int) {
		if !seen[o] {
			seen[o] = true
			out = append(out, a.other(o))
		}
	}
	for _, f := range it.Workload.Spec.GetPlacement().GetAffinity() {
		if o, ok := a.byID[[2]string{it.Tenant, f.GetWorkload()}]; ok {
			add(o)
		}
	}
	for _, o := range a.having[it.Tenant] {
		if slices.ContainsFunc(a.items[o].Workload.Spec.GetPlacement().GetAffinity(), func(f *portolanv1.WorkloadSpec_ClusterAffinity) bool {
			return f.GetWorkload() == it.Workload.ID
		}) {
			add(o)
		}
	}
	return out
}

func (a *all) other(o int) Other {
	out := Other{ID: a.items[o].Workload.ID, Affinity: a.items[o].Workload.Spec.GetPlacement().GetAffinity()}
	for _, h := range a.held[o] {
		if h.Previous.Declared+h.Previous.Failover > 0 {
			out.Clusters = append(out.Clusters, h.Cluster)
		}
	}
	return out
}

package reconcile

import (
	"fmt"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// How many replicas of lost nodes are replaced per window: a quarter of all, and
// at least 20. Where most nodes of a zone, or of the cluster, are lost it is a
// tenth of that, where all of a zone are lost none.
const (
	evictWindow = 10 * time.Second
	evictShare  = 4
	evictMin    = 20
	darkShare   = 10
	// zoneNodes is from how many nodes on a zone is judged by itself: the loss of
	// one or two says nothing about the zone.
	zoneNodes = 3
	zoneKey   = "zone"
)

// evictions is how many replicas of lost nodes may be replaced now.
type evictions struct {
	all   int
	zones map[string]int
	dark  map[string]bool
}

func (in Input) zoneOf(node string) string {
	return in.Nodes[node].Record.GetFacts().GetLabels()[zoneKey]
}

func evictLimit(live, nodes, lost int) int {
	limit := max(evictMin, live/evictShare)
	switch {
	case lost == nodes:
		return 0
	case lost*2 > nodes:
		return limit / darkShare
	}
	return limit
}

// evictionBudget is the bound for the cluster and for each zone, less those
// replaced within the window.
func (in Input) evictionBudget() evictions {
	type tally struct{ nodes, lost, live, recent int }
	var all tally
	zones := map[string]*tally{}
	zone := func(node string) *tally {
		name := in.zoneOf(node)
		if zones[name] == nil {
			zones[name] = &tally{}
		}
		return zones[name]
	}
	for id, n := range in.Nodes {
		z := zone(id)
		z.nodes++
		all.nodes++
		if n.lost() {
			z.lost++
			all.lost++
		}
	}
	for _, a := range in.Allocations {
		switch {
		case a.GetReplacedBy() == "":
			all.live++
			zone(a.GetNode()).live++
		case in.evictedAt(a).Add(evictWindow).After(in.Now):
			all.recent++
			zone(a.GetNode()).recent++
		}
	}
	out := evictions{all: evictLimit(all.live, all.nodes, all.lost) - all.recent, zones: map[string]int{}, dark: map[string]bool{}}
	for name, z := range zones {
		out.zones[name] = out.all
		if z.nodes >= zoneNodes && !in.faults.zoneIgnored {
			out.zones[name] = evictLimit(z.live, z.nodes, z.lost) - z.recent
			out.dark[name] = z.lost == z.nodes
		}
	}
	return out
}

// evictedAt is when another one took a lost allocation's place. What took it may be
// gone already; in a record without the time, what took it says when it came.
func (in Input) evictedAt(a *clusterv1.Allocation) time.Time {
	if at := a.GetEvictTime(); at != nil {
		return at.AsTime()
	}
	by := in.Allocations[a.GetReplacedBy()]
	if by == nil || a.GetDisrupted() {
		return time.Time{}
	}
	return by.GetBound().AsTime()
}

// evictedFor says that an allocation is there because the node of another one was
// lost, and not because that one was to leave.
func evictedFor(a, by *clusterv1.Allocation) bool {
	return a.GetEvictTime() != nil && a.GetEvictTime().AsTime().Equal(by.GetBound().AsTime())
}

// replace makes a step the replacement of a lost replica; false when the rate or
// the state of its zone does not allow it now.
func (p *planner) replace(k Key, s *Step, lost *replica) bool {
	if p.evictions == nil { // counting takes a look at every node: only where one is lost
		budget := p.in.evictionBudget()
		p.evictions = &budget
	}
	zone := p.in.zoneOf(lost.GetNode())
	if p.evictions.dark[zone] {
		if _, told := p.plan.Waiting[k]; !told {
			p.plan.Waiting[k] = Note{ZoneDark, fmt.Sprintf("every node of zone %q is silent, so that the fault is likelier on the way there: %s is not replaced", zone, lost.GetAllocation())}
		}
		return false
	}
	if (p.evictions.all <= 0 || p.evictions.zones[zone] <= 0) && !p.in.faults.evictionUnlimited {
		p.wakeAt(p.in.Now.Add(evictWindow / 10))
		return false
	}
	p.evictions.all--
	p.evictions.zones[zone]--
	s.Code, s.Allocation = NodeLost, lost.GetAllocation()
	s.Reason = fmt.Sprintf("the node of %s is lost", lost.GetAllocation())
	return true
}

// mayReplace says that a second one of a lost replica may begin: not where at most
// one may live in the world, as the lost one may live on.
func (in Input) mayReplace(spec *portolanv1.WorkloadSpec) bool {
	return !spec.GetPlacement().GetExclusive() || in.faults.lostIgnored
}

package place

import "github.com/portolan-io/portolan/federation/api/portolanv1"

// Counts is what stored placements amount to.
type Counts struct {
	// Desired is how many replicas there should be at a time. A daemon's number is
	// known only by the clusters that have it, and a cron runs none between its times:
	// 0.
	Desired int
	// Unplaced is how many replicas no cluster has. What stands in for a lost cluster
	// is no place of its own. Of a cron it is a whole run.
	Unplaced int
}

// Count holds the placements of a workload against its spec. revision is the one
// that the spec stands for: what others have places for does not count.
func Count(spec *portolanv1.WorkloadSpec, revision string, placements []*portolanv1.PlacementSpec) Counts {
	placed := make([]int, len(placements))
	for i, p := range placements {
		placed[i] = placedIn(p, revision)
	}
	switch {
	case isDaemon(spec):
		return Counts{}
	case isJob(spec):
		// Placements have all that is to be done, of which so many run at a time.
		n := min(max(1, int(spec.GetJob().GetParallelism())), most(spec))
		c := Counts{Desired: n, Unplaced: max(0, n-sum(placed))}
		if spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
			c.Desired = 0
		}
		return c
	}
	n := begin(spec)
	if spec.GetPlacement().GetExclusive() {
		n = min(n, 1)
	}
	if !duplicated(spec) {
		return Counts{Desired: n, Unplaced: max(0, n-sum(placed))}
	}
	// Every cluster has its own, and only those that have some are known; there is to
	// be one at least.
	c := Counts{Desired: n * max(1, len(placements)), Unplaced: n * max(0, 1-len(placements))}
	for _, have := range placed {
		c.Unplaced += max(0, n-have)
	}
	return c
}

// Desired is how many replicas of a spec are to be placed: of a workload that scales
// by itself, its maximum; of a daemon, whose clusters know, 0.
func Desired(spec *portolanv1.WorkloadSpec) int {
	n := most(spec)
	if spec.GetPlacement().GetExclusive() {
		n = min(n, 1)
	}
	return n
}

// placedIn is how many replicas of a revision a placement has, but for those that
// stand in.
func placedIn(p *portolanv1.PlacementSpec, revision string) int {
	n := 0
	for _, r := range p.GetRevisions() {
		if r.GetRevision() == revision {
			n += int(r.GetReplicas())
		}
	}
	return max(0, n-PreviousOf(p).Failover)
}

func sum(list []int) int {
	n := 0
	for _, v := range list {
		n += v
	}
	return n
}

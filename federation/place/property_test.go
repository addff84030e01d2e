package place

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func subset(t *rapid.T, label string, of ...string) []string {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(of), 0, len(of), rapid.ID).Draw(t, label)
}

func drawSpec(t *rapid.T) *portolanv1.WorkloadSpec {
	n := rapid.Int32Range(0, 12).Draw(t, "replicas")
	spec := &portolanv1.WorkloadSpec{
		Kind:       rapid.SampledFrom([]portolanv1.WorkloadKind{0, 1, 1, 2, 3}).Draw(t, "kind"),
		Replicas:   &n,
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: fmt.Sprintf("%dm", rapid.Int32Range(0, 3).Draw(t, "cpu")), Memory: fmt.Sprint(rapid.Int32Range(0, 3).Draw(t, "mem"))}}},
		Placement: &portolanv1.WorkloadSpec_Placement{
			Objective: rapid.SampledFrom([]portolanv1.Objective{0, 1, 2, 3}).Draw(t, "objective"),
			Spread: &portolanv1.WorkloadSpec_ClusterSpread{
				Over: rapid.SampledFrom([]portolanv1.SpreadDomain{0, 1, 2, 3}).Draw(t, "over"), MinGroups: rapid.Int32Range(0, 4).Draw(t, "min_groups"),
				MaxSkew: rapid.SampledFrom([]int32{0, 0, 1, 2}).Draw(t, "max_skew"),
			},
			ForbiddenRegions: subset(t, "forbidden", "c"),
		},
	}
	if rapid.Bool().Draw(t, "rule") {
		spec.Placement.Failover = &portolanv1.WorkloadSpec_Failover{After: durationpb.New(5 * time.Second)}
	}
	if spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		spec.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: rapid.Int32Range(1, 8).Draw(t, "completions"), Parallelism: rapid.Int32Range(1, 8).Draw(t, "parallelism")}
	}
	return spec
}

func drawSnapshot(t *rapid.T) Snapshot {
	spec := drawSpec(t)
	s := Snapshot{Workload: Workload{Spec: spec, Residency: subset(t, "residency", "a", "b", "c")}}
	for i := range rapid.IntRange(1, 2).Draw(t, "revisions") {
		r, err := NewRevision(fmt.Sprint(i), spec)
		if err != nil {
			t.Fatal(err)
		}
		s.Workload.Revisions = append(s.Workload.Revisions, r)
	}
	for i := range rapid.IntRange(0, 6).Draw(t, "clusters") {
		s.Clusters = append(s.Clusters, drawCluster(t, s.Workload, i))
	}
	return s
}

func drawCluster(t *rapid.T, w Workload, i int) Cluster {
	c := Cluster{
		ID: fmt.Sprintf("c%d", i), Ready: rapid.IntRange(0, 8).Draw(t, "ready"), Nodes: rapid.IntRange(0, 3).Draw(t, "nodes"),
		State:    rapid.SampledFrom([]portolanv1.ClusterState{1, 2, 2, 2, 2, 3}).Draw(t, "state"),
		LastSeen: epoch.Add(-time.Duration(rapid.IntRange(0, 8).Draw(t, "silent")) * time.Second),
		Spec: &portolanv1.ClusterSpec{
			Region: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "region"), Zone: rapid.SampledFrom([]string{"1", "2"}).Draw(t, "zone"),
			Cordoned: rapid.IntRange(0, 5).Draw(t, "cordoned") == 0, CpuCoreHourMicros: rapid.Int64Range(0, 3).Draw(t, "price") * 1e6,
		},
		Free: api.Resources{CPUMilli: rapid.Int64Range(-3, 20).Draw(t, "free cpu"), MemoryBytes: rapid.Int64Range(-3, 20).Draw(t, "free mem")},
	}
	if e := rapid.SampledFrom([]portolanv1.TaintEffect{0, 0, 0, 1, 2, 3}).Draw(t, "taint"); e != 0 {
		c.Spec.Taints = []*portolanv1.Taint{{Key: "k", Effect: e}}
	}
	if rapid.Bool().Draw(t, "had") {
		c.Previous = Previous{Present: true, Declared: rapid.IntRange(0, 8).Draw(t, "declared"), Failover: rapid.SampledFrom([]int{0, 0, 0, 2}).Draw(t, "extra")}
		c.Previous.Claim = w.Claim(c.Previous.Declared + c.Previous.Failover)
	}
	return c
}

// TestProperties: what holds of every plan.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSnapshot(t)
		p := Place(s, epoch)
		byID := map[string]Cluster{}
		for _, c := range s.Clusters {
			byID[c.ID] = c
		}
		if len(p.Verdicts) != len(s.Clusters) {
			t.Fatalf("%d verdicts on %d clusters", len(p.Verdicts), len(s.Clusters))
		}
		for _, v := range p.Verdicts {
			if len(v.Reasons) == 0 {
				t.Errorf("%s has no reason", v.Cluster)
			}
		}
		again := s
		again.Clusters = slices.Clone(s.Clusters)
		rand.New(rand.NewPCG(1, 2)).Shuffle(len(again.Clusters), func(i, j int) {
			again.Clusters[i], again.Clusters[j] = again.Clusters[j], again.Clusters[i]
		})
		if d := cmp.Diff(p, Place(again, epoch)); d != "" {
			t.Errorf("another order of clusters, another plan:\n%s", d)
		}
		if p.Frozen {
			checkFrozen(t, s, p)
			return
		}
		checkAssignments(t, s, p, byID)
		checkStable(t, s, p)
	})
}

func checkFrozen(t *rapid.T, s Snapshot, p Plan) {
	n := 0
	for _, c := range s.Clusters {
		if c.State == portolanv1.ClusterState_CLUSTER_STATE_READY {
			t.Errorf("frozen while %s is ready", c.ID)
		}
		if c.Previous.Present {
			n++
		}
	}
	if len(p.Assignments) != n {
		t.Errorf("frozen with %d assignments of %d", len(p.Assignments), n)
	}
}

func checkAssignments(t *rapid.T, s Snapshot, p Plan, byID map[string]Cluster) {
	spec := s.Workload.Spec
	declared, extra, owed := 0, 0, 0
	hadExtra := 0
	for _, c := range s.Clusters {
		hadExtra += c.Previous.Failover
	}
	groups, lost := map[string]int{}, map[string]bool{}
	taken := map[string]int{}
	for _, a := range p.Assignments {
		c := byID[a.Cluster]
		if slices.Contains(spec.GetPlacement().GetForbiddenRegions(), c.Spec.GetRegion()) || len(s.Workload.Residency) > 0 && !slices.Contains(s.Workload.Residency, c.Spec.GetRegion()) {
			t.Errorf("%s may not run anything in %s", a.Cluster, c.Spec.GetRegion())
		}
		if c.State == portolanv1.ClusterState_CLUSTER_STATE_PENDING {
			t.Errorf("%s never joined", a.Cluster)
		}
		if !a.Claim.Fits(c.Free) && !a.Claim.Fits(c.Previous.Claim) {
			t.Errorf("%s is overcommitted: claim %+v, free %+v, before %+v", a.Cluster, a.Claim, c.Free, c.Previous.Claim)
		}
		isLost := c.State == portolanv1.ClusterState_CLUSTER_STATE_LOST
		if had := c.Previous.Declared + c.Previous.Failover; (isLost || c.Spec.GetCordoned()) && a.Replicas > had {
			t.Errorf("%s is closed and grew from %d to %d", a.Cluster, had, a.Replicas)
		}
		if isLost {
			if spec.GetPlacement().GetFailover() != nil && spec.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_JOB && !c.LastSeen.Add(5*time.Second).After(epoch) {
				owed += a.Replicas - a.Failover
			}
		} else {
			extra += a.Failover
		}
		declared += a.Replicas - a.Failover
		taken[a.Cluster] = a.Replicas
		g := fmt.Sprint(domainOf(spec.GetPlacement().GetSpread().GetOver(), &c))
		groups[g] += a.Replicas - a.Failover
		lost[g] = lost[g] || isLost
	}
	if spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		return
	}
	if declared+p.Unplaced != p.Desired || p.Unplaced < 0 {
		t.Errorf("%d placed and %d not, of %d", declared, p.Unplaced, p.Desired)
	}
	// More may stay of what was there, while a cluster that came back is awaited.
	if extra+p.FailoverUnplaced < owed || extra > max(owed, hadExtra) {
		t.Errorf("%d stand in and %d could not, for %d in lost clusters", extra, p.FailoverUnplaced, owed)
	}
	checkSpread(t, s, groups, lost)
	checkMaximal(t, s, p, taken)
}

func checkSpread(t *rapid.T, s Snapshot, groups map[string]int, lost map[string]bool) {
	skew := int(s.Workload.Spec.GetPlacement().GetSpread().GetMaxSkew())
	if skew == 0 || s.Workload.Spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		return
	}
	for a, n := range groups {
		for b, m := range groups {
			if m > 0 && n-m > skew && !lost[a] && !lost[b] {
				t.Errorf("%s has %d, %s has %d, with a skew of %d", a, n, b, m, skew)
			}
		}
	}
}

// checkMaximal: without a skew to keep, nothing stays unplaced where it fits.
func checkMaximal(t *rapid.T, s Snapshot, p Plan, taken map[string]int) {
	spec := s.Workload.Spec
	if p.Unplaced == 0 || spec.GetPlacement().GetSpread().GetMaxSkew() > 0 || spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		return
	}
	for _, v := range p.Verdicts {
		i := slices.IndexFunc(s.Clusters, func(c Cluster) bool { return c.ID == v.Cluster })
		c := s.Clusters[i]
		refused := slices.ContainsFunc(v.Reasons, func(r Reason) bool {
			return slices.Contains([]string{Residency, Forbidden, Pending, Lost, Taint, Cordoned}, r.Code)
		})
		if !refused && s.Workload.Claim(taken[v.Cluster]+1).Fits(c.Free) {
			t.Errorf("%d unplaced while %s has room", p.Unplaced, v.Cluster)
		}
	}
}

// checkStable: carried out and asked again, nothing moves.
func checkStable(t *rapid.T, s Snapshot, p Plan) {
	next := s
	next.Clusters = slices.Clone(s.Clusters)
	for i := range next.Clusters {
		next.Clusters[i].Previous = Previous{}
		for _, a := range p.Assignments {
			if a.Cluster == next.Clusters[i].ID {
				next.Clusters[i].Previous = Previous{Present: true, Declared: a.Replicas - a.Failover, Failover: a.Failover, Claim: a.Claim}
			}
		}
	}
	strip := func(p Plan) []Assignment {
		out := slices.Clone(p.Assignments)
		for i := range out {
			out[i].Reasons = nil
		}
		return out
	}
	if d := cmp.Diff(strip(p), strip(Place(next, epoch))); d != "" {
		t.Errorf("carried out and asked again, things move:\n%s", d)
	}
}

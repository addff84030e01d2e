package place

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func subset(t *rapid.T, label string, of ...string) []string {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(of), 0, len(of), rapid.ID).Draw(t, label)
}

// oneIn is true about once in n draws.
func oneIn(t *rapid.T, n int, label string) bool { return rapid.IntRange(1, n).Draw(t, label) == n }

func drawOver(t *rapid.T) portolanv1.SpreadDomain {
	return rapid.SampledFrom([]portolanv1.SpreadDomain{0, 1, 2, 3, 4}).Draw(t, "over")
}

func drawSpread(t *rapid.T) *portolanv1.WorkloadSpec_ClusterSpread {
	return &portolanv1.WorkloadSpec_ClusterSpread{
		Over: drawOver(t), MinGroups: rapid.Int32Range(0, 4).Draw(t, "min_groups"), MaxSkew: rapid.SampledFrom([]int32{0, 0, 1, 2}).Draw(t, "max_skew"), Prefer: oneIn(t, 5, "prefer"),
	}
}

func drawMatch(t *rapid.T) *portolanv1.WorkloadSpec_ClusterMatch {
	return &portolanv1.WorkloadSpec_ClusterMatch{Regions: subset(t, "match regions", "a", "b", "c"), Providers: subset(t, "match providers", "p", "q")}
}

func drawPlacement(t *rapid.T) *portolanv1.WorkloadSpec_Placement {
	p := &portolanv1.WorkloadSpec_Placement{
		Objective: rapid.SampledFrom([]portolanv1.Objective{0, 1, 2, 3, 4}).Draw(t, "objective"), Spread: drawSpread(t),
		Division:         rapid.SampledFrom([]portolanv1.Division{0, 0, 0, 2, 3, 4}).Draw(t, "division"),
		Capacity:         rapid.SampledFrom([]portolanv1.CapacityType{0, 0, 0, 1, 2, 3}).Draw(t, "capacity"),
		ForbiddenRegions: subset(t, "forbidden", "c"), ForbiddenClusters: subset(t, "forbidden clusters", "c1"), Exclusive: oneIn(t, 8, "exclusive"),
		Origins: []*portolanv1.WorkloadSpec_Origin{{Region: "a"}},
	}
	if oneIn(t, 6, "allowed") {
		p.AllowedClusters = []string{"c0", "c2", "c3"}
	}
	if oneIn(t, 6, "selector") {
		p.ClusterSelector = map[string]string{"tier": "prod"}
	}
	if oneIn(t, 3, "spreads") {
		p.Spreads = append(p.Spreads, drawSpread(t))
	}
	for i := range rapid.SampledFrom([]int{0, 0, 1, 2}).Draw(t, "fallbacks") {
		p.Fallbacks = append(p.Fallbacks, &portolanv1.WorkloadSpec_ClusterGroup{Name: fmt.Sprint(i), Match: drawMatch(t)})
	}
	for range rapid.IntRange(0, 2).Draw(t, "weights") {
		p.Weights = append(p.Weights, &portolanv1.WorkloadSpec_ClusterWeight{Match: drawMatch(t), Weight: rapid.Int32Range(0, 5).Draw(t, "weight")})
	}
	for range rapid.SampledFrom([]int{0, 0, 0, 1, 2}).Draw(t, "affinity") {
		p.Affinity = append(p.Affinity, &portolanv1.WorkloadSpec_ClusterAffinity{
			Workload: rapid.SampledFrom([]string{"w", "x", "y"}).Draw(t, "other"), Anti: rapid.Bool().Draw(t, "anti"), Over: drawOver(t), Prefer: oneIn(t, 3, "prefer"),
		})
		if a := p.Affinity[len(p.Affinity)-1]; a.GetWorkload() == "w" {
			a.Anti = true // near itself is refused on entry
		}
	}
	if rapid.Bool().Draw(t, "rule") {
		p.Failover = &portolanv1.WorkloadSpec_Failover{After: durationpb.New(5 * time.Second)}
	}
	if oneIn(t, 4, "tolerates") {
		p.Tolerations = []*portolanv1.Toleration{{Key: "k"}}
		if rapid.Bool().Draw(t, "stays") {
			p.Tolerations[0].Stay = durationpb.New(time.Duration(rapid.IntRange(1, 9).Draw(t, "stay")) * time.Second)
		}
	}
	if oneIn(t, 5, "override") {
		p.Overrides = []*portolanv1.WorkloadSpec_ClusterOverride{{Match: drawMatch(t), Containers: []*portolanv1.WorkloadSpec_ContainerOverride{{Limits: &portolanv1.ResourceList{Cpu: "5m"}}}}}
	}
	return p
}

func drawSpec(t *rapid.T) *portolanv1.WorkloadSpec {
	n := rapid.Int32Range(0, 12).Draw(t, "replicas")
	spec := &portolanv1.WorkloadSpec{
		Kind: rapid.SampledFrom([]portolanv1.WorkloadKind{0, 1, 1, 1, 1, 2, 3, 4, 5}).Draw(t, "kind"), Replicas: &n, Placement: drawPlacement(t),
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: fmt.Sprintf("%dm", rapid.Int32Range(0, 3).Draw(t, "cpu")), Memory: fmt.Sprint(rapid.Int32Range(0, 3).Draw(t, "mem"))}}},
		Priority:   rapid.SampledFrom([]int32{0, 0, 0, 5}).Draw(t, "priority"), NeverPreempt: oneIn(t, 5, "polite"),
	}
	switch spec.GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		spec.Placement.Exclusive = false // of one replica at most is no job of many
		spec.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: rapid.Int32Range(1, 8).Draw(t, "completions"), Parallelism: rapid.Int32Range(1, 8).Draw(t, "parallelism")}
	case portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		if rapid.Bool().Draw(t, "volumes") {
			spec.Volumes = []*portolanv1.Volume{{Name: "data", Size: "1Gi"}}
		}
	default:
	}
	if oneIn(t, 5, "scales") {
		spec.Autoscale = &portolanv1.Autoscale{Min: new(rapid.Int32Range(0, 4).Draw(t, "min")), Max: rapid.Int32Range(4, 12).Draw(t, "max")}
	}
	if oneIn(t, 8, "devices") {
		spec.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Devices: []*portolanv1.DeviceRequest{{Count: rapid.Int32Range(0, 2).Draw(t, "count"), ShareMilli: 0, Models: subset(t, "models", "A", "B")}}}
		if d := spec.GetScheduling().GetDevices()[0]; d.GetCount() == 0 {
			d.ShareMilli = rapid.Int32Range(1, 999).Draw(t, "share")
		}
	}
	return spec
}

func drawSnapshot(t *rapid.T) Snapshot {
	spec := drawSpec(t)
	s := Snapshot{Workload: Workload{ID: "w", Spec: spec, Residency: subset(t, "residency", "a", "b", "c")}}
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
	s.Others = []Other{{ID: "x", Clusters: subset(t, "x", "c0", "c1", "c2")}}
	if oneIn(t, 5, "theirs") {
		s.Others[0].Affinity = []*portolanv1.WorkloadSpec_ClusterAffinity{{Workload: "w", Anti: rapid.Bool().Draw(t, "their anti"), Over: drawOver(t)}}
	}
	return s
}

func drawCluster(t *rapid.T, w Workload, i int) Cluster {
	c := Cluster{
		ID: fmt.Sprintf("c%d", i), Ready: rapid.IntRange(0, 8).Draw(t, "ready"), Nodes: rapid.IntRange(0, 3).Draw(t, "nodes"),
		State:    rapid.SampledFrom([]portolanv1.ClusterState{1, 2, 2, 2, 2, 3}).Draw(t, "state"),
		LastSeen: epoch.Add(-time.Duration(rapid.IntRange(0, 8).Draw(t, "silent")) * time.Second), Changed: epoch.Add(-4 * time.Second),
		Labels: map[string]string{"tier": rapid.SampledFrom([]string{"prod", "prod", "test"}).Draw(t, "tier")},
		Spec: &portolanv1.ClusterSpec{
			Region: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "region"), Zone: rapid.SampledFrom([]string{"1", "2"}).Draw(t, "zone"),
			Provider: rapid.SampledFrom([]string{"p", "q"}).Draw(t, "provider"),
			Cordoned: oneIn(t, 6, "cordoned"), CpuCoreHourMicros: rapid.Int64Range(0, 3).Draw(t, "price") * 1e6, RttMillis: map[string]int32{"a": rapid.Int32Range(0, 3).Draw(t, "rtt")},
		},
		Free:    api.Resources{CPUMilli: rapid.Int64Range(-3, 20).Draw(t, "free cpu"), MemoryBytes: rapid.Int64Range(-3, 20).Draw(t, "free mem")},
		Spot:    api.Resources{CPUMilli: rapid.Int64Range(0, 9).Draw(t, "spot cpu"), MemoryBytes: rapid.Int64Range(0, 9).Draw(t, "spot mem")},
		Stopped: rapid.Bool().Draw(t, "stopped"),
	}
	if rapid.Bool().Draw(t, "pools") {
		c.Pools = []*portolanv1.PoolStatus{{Pool: "g", Devices: map[string]int32{"gpu/A": rapid.Int32Range(0, 4).Draw(t, "gpus")}}}
	}
	if e := rapid.SampledFrom([]portolanv1.TaintEffect{0, 0, 0, 1, 2, 3}).Draw(t, "taint"); e != 0 {
		c.Spec.Taints = []*portolanv1.Taint{{Key: "k", Effect: e}}
	}
	if rapid.Bool().Draw(t, "had") {
		c.Previous = Previous{Present: true, Declared: rapid.IntRange(0, 8).Draw(t, "declared"), Failover: rapid.SampledFrom([]int{0, 0, 0, 2}).Draw(t, "extra")}
		c.Previous.Claim = w.Claim(c.Previous.Declared + c.Previous.Failover)
		c.Previous.Basis = rapid.SampledFrom([]string{"", "", "another"}).Draw(t, "basis")
	}
	if oneIn(t, 4, "lower") {
		each := api.Resources{CPUMilli: rapid.Int64Range(0, 3).Draw(t, "lower cpu"), MemoryBytes: rapid.Int64Range(0, 3).Draw(t, "lower mem")}
		n := rapid.IntRange(1, 4).Draw(t, "lower n")
		c.Lower = []Claimant{{Workload: "low", Priority: rapid.SampledFrom([]int{-1, 0, 5, 9}).Draw(t, "lower priority"), Replicas: n, Each: each, Claim: each.Times(int64(n))}}
	}
	return c
}

// failer is told what is wrong.
type failer interface {
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// checker holds one plan against what must hold of every plan.
type checker struct {
	failer
	s    Snapshot
	p    Plan
	spec *portolanv1.WorkloadSpec
}

func (k *checker) job() bool { return isJob(k.spec) }
func (k *checker) daemon() bool {
	return k.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
}

func (k *checker) cluster(id string) Cluster {
	return k.s.Clusters[slices.IndexFunc(k.s.Clusters, func(c Cluster) bool { return c.ID == id })]
}

// TestProperties: what holds of every plan.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		check(t, drawSnapshot(t))
	})
}

// TestTiers: the same of workloads with groups of fallbacks, and little else.
func TestTiers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) { check(t, drawTiers(t)) })
}

func drawTiers(t *rapid.T) Snapshot {
	s := drawSnapshot(t)
	p := s.Workload.Spec.GetPlacement()
	p.Spread, p.Spreads, p.Affinity, p.Exclusive, s.Others[0].Affinity = nil, nil, nil, false, nil
	p.Fallbacks = []*portolanv1.WorkloadSpec_ClusterGroup{{Name: "first", Match: drawMatch(t)}, {Name: "rest", Match: drawMatch(t)}}
	return s
}

func check(t failer, s Snapshot) {
	k := &checker{t, s, Place(s, epoch), s.Workload.Spec}
	k.checkVerdicts()
	k.checkOrder()
	if k.p.Frozen {
		k.checkFrozen()
		return
	}
	k.checkInvariants()
	k.checkCounts()
	k.checkTiers()
	k.checkStable()
}

// checkTiers: nothing is in a later group of the fallbacks while an earlier one has
// room, unless spreads or volumes keep it there.
func (k *checker) checkTiers() {
	p := k.spec.GetPlacement()
	bounded := slices.ContainsFunc(spreadsOf(k.s.Workload), func(s *portolanv1.WorkloadSpec_ClusterSpread) bool { return s.GetMaxSkew() > 0 || s.GetMinGroups() > 1 })
	if len(p.GetFallbacks()) < 2 || bounded || len(p.GetAffinity())+len(k.s.Others[0].Affinity) > 0 || k.job() || k.daemon() || len(k.spec.GetVolumes()) > 0 || p.GetExclusive() ||
		p.GetDivision() == portolanv1.Division_DIVISION_DUPLICATED || k.spec.GetScheduling() != nil {
		return
	}
	tier := func(c Cluster) int {
		return slices.IndexFunc(p.GetFallbacks(), func(g *portolanv1.WorkloadSpec_ClusterGroup) bool {
			return matches(g.GetMatch(), c.ID, c.Spec, c.Labels)
		})
	}
	for _, a := range k.p.Assignments {
		late := k.cluster(a.Cluster)
		if k.p.declared(a.Cluster) == 0 || late.State == portolanv1.ClusterState_CLUSTER_STATE_LOST {
			continue
		}
		for _, c := range k.s.Clusters {
			all, fresh := forbids(k.s, c)
			if all+fresh != "" || tier(c) >= tier(late) || k.weightless(c) {
				continue
			}
			n := 0
			for _, b := range k.p.Assignments {
				if b.Cluster == c.ID {
					n = max(b.Replicas, b.Max)
				}
			}
			if n < k.p.Desired && k.claimOf(c, n+1).Fits(k.free(c)) {
				k.Errorf("%s has some while %s of an earlier group has room", a.Cluster, c.ID)
			}
		}
	}
}

// weightless clusters get nothing of a division by weight.
func (k *checker) weightless(c Cluster) bool {
	if k.spec.GetPlacement().GetDivision() != portolanv1.Division_DIVISION_WEIGHTED {
		return false
	}
	for _, w := range k.spec.GetPlacement().GetWeights() {
		if w.GetWeight() > 0 && matches(w.GetMatch(), c.ID, c.Spec, c.Labels) {
			return false
		}
	}
	return true
}

func (k *checker) checkVerdicts() {
	if len(k.p.Verdicts) != len(k.s.Clusters) {
		k.Fatalf("%d verdicts on %d clusters", len(k.p.Verdicts), len(k.s.Clusters))
	}
	for _, v := range k.p.Verdicts {
		if len(v.Reasons) == 0 {
			k.Errorf("%s has no reason", v.Cluster)
		}
		for _, r := range v.Reasons {
			if r.Message == "" || r.Message == v.Cluster {
				k.Errorf("%s: %s says nothing", v.Cluster, r.Code)
			}
		}
	}
}

// checkOrder: the order of clusters does not count.
func (k *checker) checkOrder() {
	again := k.s
	again.Clusters = slices.Clone(k.s.Clusters)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(again.Clusters), func(i, j int) {
		again.Clusters[i], again.Clusters[j] = again.Clusters[j], again.Clusters[i]
	})
	if d := cmp.Diff(k.p, Place(again, epoch)); d != "" {
		k.Errorf("another order of clusters, another plan:\n%s", d)
	}
}

func (k *checker) checkFrozen() {
	n := 0
	for _, c := range k.s.Clusters {
		if c.State == portolanv1.ClusterState_CLUSTER_STATE_READY {
			k.Errorf("frozen while %s is ready", c.ID)
		}
		if c.Previous.Present {
			n++
		}
	}
	if len(k.p.Assignments) != n {
		k.Errorf("frozen with %d assignments of %d", len(k.p.Assignments), n)
	}
}

// forbids says what forbids the workload a cluster, and whether only what is new.
func forbids(s Snapshot, c Cluster) (all, fresh string) {
	p := s.Workload.Spec.GetPlacement()
	in := func(list []string, v string) bool { return len(list) == 0 || slices.Contains(list, v) }
	switch {
	case !in(s.Workload.Residency, c.Spec.GetRegion()):
		all = "residency"
	case slices.Contains(p.GetForbiddenRegions(), c.Spec.GetRegion()), !in(p.GetAllowedRegions(), c.Spec.GetRegion()):
		all = "its region"
	case slices.Contains(p.GetForbiddenClusters(), c.ID), !in(p.GetAllowedClusters(), c.ID):
		all = "its name"
	case p.GetClusterSelector()["tier"] != "" && c.Labels["tier"] != p.GetClusterSelector()["tier"]:
		all = "its labels"
	case c.State == portolanv1.ClusterState_CLUSTER_STATE_PENDING:
		all = "that it never joined"
	case len(p.GetFallbacks()) > 0 && !slices.ContainsFunc(p.GetFallbacks(), func(g *portolanv1.WorkloadSpec_ClusterGroup) bool {
		return matches(g.GetMatch(), c.ID, c.Spec, c.Labels)
	}):
		all = "that it is in no group"
	}
	for _, taint := range c.Spec.GetTaints() {
		tolerated := len(p.GetTolerations()) > 0
		stay := tolerated && p.GetTolerations()[0].GetStay() != nil
		over := stay && !c.Changed.Add(p.GetTolerations()[0].GetStay().AsDuration()).After(epoch)
		switch taint.GetEffect() {
		case portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE:
			if !tolerated || over {
				all = "a taint"
			} else if stay {
				fresh = "a taint that it tolerates for a while"
			}
		case portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE:
		default:
			if !tolerated {
				fresh = "a taint"
			}
		}
	}
	if c.Spec.GetCordoned() || c.State == portolanv1.ClusterState_CLUSTER_STATE_LOST {
		fresh = "that it is cordoned or lost"
	}
	return all, fresh
}

// checkInvariants: nothing runs where it must not (3), claims fit (4), an exclusive
// workload is in one place (2).
func (k *checker) checkInvariants() {
	running := 0
	for _, a := range k.p.Assignments {
		c := k.cluster(a.Cluster)
		had := c.Previous.Declared + c.Previous.Failover
		n := max(a.Replicas, a.Max)
		all, fresh := forbids(k.s, c)
		if all != "" && (n > 0 || k.daemon()) {
			k.Errorf("%s has %d against %s", a.Cluster, n, all)
		}
		if fresh != "" && n > had && (!k.daemon() || !c.Previous.Present) {
			k.Errorf("%s grew from %d to %d against %s", a.Cluster, had, n, fresh)
		}
		room := k.free(c)
		for _, v := range k.p.Displaced {
			if v.Cluster == a.Cluster {
				room = room.Add(c.Lower[0].Each.Times(int64(v.Replicas)))
			}
		}
		if !a.Claim.Fits(room) && !a.Claim.Fits(c.Previous.Claim) {
			k.Errorf("%s is overcommitted: claim %+v, room %+v, before %+v", a.Cluster, a.Claim, room, c.Previous.Claim)
		}
		if claim := k.claimOf(c, n); !k.daemon() && !k.job() && a.Replicas > 0 && a.Claim != claim && (!k.spec.GetPlacement().GetExclusive() || a.Claim != c.Previous.Claim) {
			k.Errorf("%s claims %+v, %d replicas and their surge are %+v", a.Cluster, a.Claim, n, claim)
		}
		running += min(1, a.Replicas)
	}
	if k.spec.GetPlacement().GetExclusive() && !k.daemon() {
		k.checkExclusive(running)
	}
	for _, v := range k.p.Displaced {
		if l := k.cluster(v.Cluster).Lower[0]; l.Priority >= int(k.spec.GetPriority()) || k.spec.GetNeverPreempt() || v.Replicas > l.Replicas || v.Replicas <= 0 {
			k.Errorf("displaced %+v of %+v", v, l)
		}
	}
}

func (k *checker) free(c Cluster) api.Resources {
	if k.daemon() { // on every node
		return c.Free.Add(c.Spot)
	}
	switch k.spec.GetPlacement().GetCapacity() {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		return c.Spot
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		return c.Free.Add(c.Spot)
	default:
		return c.Free
	}
}

// claimOf adds up what n replicas request in a cluster, override and surge included.
func (k *checker) claimOf(c Cluster, n int) api.Resources {
	var sum api.Resources
	for _, r := range k.s.Workload.Running() {
		one, err := api.RequestsOf(Override(k.spec, c.ID, c.Spec, c.Labels))
		if err != nil {
			k.Fatalf("%v", err)
		}
		sum = sum.Add(one.Times(int64(n + r.Surge)))
	}
	return sum
}

func (k *checker) checkExclusive(running int) {
	held := 0
	for _, c := range k.s.Clusters {
		if c.Previous.Present && (c.Previous.Declared > 0 || !c.Stopped) {
			held++
		}
	}
	for _, a := range k.p.Assignments {
		if c := k.cluster(a.Cluster); a.Replicas > 0 && held > 0 && c.Previous.Declared == 0 {
			k.Errorf("it begins in %s while it may still run elsewhere", a.Cluster)
		}
	}
	if running > 1 {
		k.Errorf("%d clusters run it", running)
	}
	for _, c := range k.s.Clusters {
		has := slices.ContainsFunc(k.p.Assignments, func(a Assignment) bool { return a.Cluster == c.ID })
		if c.Previous.Present && (c.Previous.Declared > 0 || !c.Stopped) && !has {
			k.Errorf("%s may still run it, and is forgotten", c.ID)
		}
	}
}

// checkCounts: everything is placed or reported, stand-ins are owed (7), and shares
// of a scaled workload add up.
func (k *checker) checkCounts() {
	if k.daemon() {
		if n := len(k.p.Assignments); n+k.p.Unplaced != k.p.Desired || k.p.Unplaced < 0 {
			k.Errorf("%d clusters have it and %d have no room, of %d", n, k.p.Unplaced, k.p.Desired)
		}
		return
	}
	declared, extra, owed, hadExtra, low := 0, 0, 0, 0, 0
	for _, c := range k.s.Clusters {
		hadExtra += c.Previous.Failover
	}
	due := k.spec.GetPlacement().GetFailover() != nil && !k.job() && len(k.spec.GetVolumes()) == 0 && !k.spec.GetPlacement().GetExclusive() && k.spec.GetPlacement().GetDivision() != portolanv1.Division_DIVISION_DUPLICATED
	for _, a := range k.p.Assignments {
		c, n := k.cluster(a.Cluster), max(a.Replicas, a.Max)
		if c.State == portolanv1.ClusterState_CLUSTER_STATE_LOST {
			if due && !c.LastSeen.Add(5*time.Second).After(epoch) {
				owed += n - a.Failover
			}
		} else {
			extra += a.Failover
		}
		declared += n - a.Failover
		if low += a.Min; a.Min > a.Replicas || a.Max > 0 && a.Replicas > a.Max {
			k.Errorf("%s begins with %d of %d to %d", a.Cluster, a.Replicas, a.Min, a.Max)
		}
	}
	if declared+k.p.Unplaced != k.p.Desired || k.p.Unplaced < 0 {
		k.Errorf("%d placed and %d not, of %d", declared, k.p.Unplaced, k.p.Desired)
	}
	// More may stay of what was there, while a cluster that came back is awaited.
	if extra+k.p.FailoverUnplaced < owed || extra > max(owed, hadExtra) {
		k.Errorf("%d stand in and %d could not, for %d in lost clusters", extra, k.p.FailoverUnplaced, owed)
	}
	if scales(k.spec) && low < min(int(k.spec.GetAutoscale().GetMin()), declared) {
		k.Errorf("the minima sum to %d, %d are asked for", low, k.spec.GetAutoscale().GetMin())
	}
}

// carryOut is the snapshot after a plan.
func carryOut(s Snapshot, p Plan) Snapshot {
	next := s
	next.Clusters = slices.Clone(s.Clusters)
	for i := range next.Clusters {
		c := &next.Clusters[i]
		before := c.Previous
		c.Previous = Previous{}
		for _, a := range p.Assignments {
			if a.Cluster == c.ID {
				n := max(a.Replicas, a.Max)
				c.Previous = Previous{Present: true, Declared: n - a.Failover, Failover: a.Failover, Claim: a.Claim, Basis: p.Basis}
			}
		}
		if before.Declared > 0 && c.Previous.Present && c.Previous.Declared == 0 {
			c.Stopped = false // it was just told
		}
		for _, v := range p.Displaced {
			if v.Cluster == c.ID {
				freed := c.Lower[0].Each.Times(int64(v.Replicas))
				if s.Workload.Spec.GetPlacement().GetCapacity() == portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY {
					c.Spot = c.Spot.Add(freed)
				} else {
					c.Free = c.Free.Add(freed)
				}
				c.Lower = nil
			}
		}
	}
	return next
}

// checkStable: carried out and asked again, nothing moves. What had no place may
// get what the plan itself gave up, once, and nobody leaves for it.
func (k *checker) checkStable() {
	p, s := k.p, carryOut(k.s, k.p)
	again := Place(s, epoch)
	if short := p.Unplaced + p.FailoverUnplaced; short > 0 && again.Unplaced+again.FailoverUnplaced < short {
		for _, a := range p.Assignments {
			if n := max(a.Replicas, a.Max); again.units(a.Cluster) < n {
				k.Errorf("carried out and asked again, %d of %d leave %s", n-again.units(a.Cluster), n, a.Cluster)
			}
		}
		p, s = again, carryOut(s, again)
		again = Place(s, epoch)
	}
	if d := cmp.Diff(p.Assignments, again.Assignments, cmpopts.IgnoreFields(Assignment{}, "Reasons"), cmpopts.EquateEmpty()); d != "" {
		k.Errorf("carried out and asked again, things move:\n%s", d)
	}
}

// TestRemedies: when every change that a verdict names is made, the cluster takes
// one more.
func TestRemedies(t *testing.T) {
	followed := 0
	rapid.Check(t, func(t *rapid.T) {
		s := drawSnapshot(t)
		s.Workload.Spec.NeverPreempt = true
		p := Place(s, epoch)
		for _, v := range p.Verdicts {
			if len(v.Remedies) == 0 {
				continue
			}
			followed++
			after := Place(follow(t, s, v), epoch)
			i := slices.IndexFunc(after.Verdicts, func(w Verdict) bool { return w.Cluster == v.Cluster })
			// A cluster that is back counts in the spreads again, which may take as much.
			back := slices.ContainsFunc(v.Remedies, func(r Remedy) bool { return r.Code == Lost })
			// So does what the changes let other clusters take: a domain that was missing,
			// or what the workload now bears in all of them.
			back = back || p.says(MinGroups) && !after.says(MinGroups) || slices.ContainsFunc(after.Verdicts, func(w Verdict) bool {
				return w.Cluster != v.Cluster && w.Feasible && !p.feasible(w.Cluster)
			})
			placed := after.declared(v.Cluster) > p.declared(v.Cluster) || isDaemon(s.Workload.Spec) && after.feasible(v.Cluster)
			if w := after.Verdicts[i]; !w.Feasible || p.Unplaced > 0 && !back && after.Unplaced >= p.Unplaced && !placed {
				t.Errorf("%s: after %+v it has %d of %d before, %d are unplaced of %d: %+v", v.Cluster, v.Remedies, w.Replicas, v.Replicas, after.Unplaced, p.Unplaced, w.Reasons)
			}
		}
	})
	if followed == 0 {
		t.Error("no remedy was followed")
	}
}

func (p Plan) says(code string) bool {
	return slices.ContainsFunc(p.Reasons, func(r Reason) bool { return r.Code == code })
}

func (p Plan) feasible(cluster string) bool {
	return slices.ContainsFunc(p.Verdicts, func(v Verdict) bool { return v.Cluster == cluster && v.Feasible })
}

// units in a cluster: replicas, or the share of the maximum.
func (p Plan) units(cluster string) int {
	for _, a := range p.Assignments {
		if a.Cluster == cluster {
			return max(a.Replicas, a.Max)
		}
	}
	return 0
}

// declared units in a cluster, none of them standing in.
func (p Plan) declared(cluster string) int {
	for _, a := range p.Assignments {
		if a.Cluster == cluster {
			return max(a.Replicas, a.Max) - a.Failover
		}
	}
	return 0
}

// follow makes the changes of a verdict.
func follow(t *rapid.T, s Snapshot, v Verdict) Snapshot {
	s.Clusters, s.Others = slices.Clone(s.Clusters), slices.Clone(s.Others)
	s.Workload.Spec = proto.CloneOf(s.Workload.Spec)
	c := &s.Clusters[slices.IndexFunc(s.Clusters, func(c Cluster) bool { return c.ID == v.Cluster })]
	c.Spec = proto.CloneOf(c.Spec)
	p := s.Workload.Spec.GetPlacement()
	without := func(list []string, v string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(o string) bool { return o == v })
	}
	for _, r := range v.Remedies {
		switch r.Code {
		case Residency:
			s.Workload.Residency = append(slices.Clone(s.Workload.Residency), r.Key)
		case NotAllowed:
			p.AllowedRegions = append(p.AllowedRegions, r.Key)
		case Forbidden:
			p.ForbiddenRegions = without(p.GetForbiddenRegions(), r.Key)
		case ClusterNotAllowed:
			p.AllowedClusters = append(p.AllowedClusters, r.Key)
		case ClusterForbidden:
			p.ForbiddenClusters = without(p.GetForbiddenClusters(), r.Key)
		case Selector:
			c.Labels = map[string]string{r.Key: r.Value}
		case Taint, Staying:
			p.Tolerations = append(p.Tolerations, &portolanv1.Toleration{Key: r.Key})
		case NoGroup:
			p.Fallbacks = append(p.Fallbacks, &portolanv1.WorkloadSpec_ClusterGroup{Name: "more", Match: &portolanv1.WorkloadSpec_ClusterMatch{Clusters: []string{r.Key}}})
		case NoWeight:
			p.Weights = append(p.Weights, &portolanv1.WorkloadSpec_ClusterWeight{Match: &portolanv1.WorkloadSpec_ClusterMatch{Clusters: []string{r.Key}}, Weight: 1})
		case Device:
			model := "A"
			if r.Value != "" {
				model = r.Value[:1]
			}
			c.Pools = append(slices.Clone(c.Pools), &portolanv1.PoolStatus{Devices: map[string]int32{r.Key + "/" + model: int32(r.Number)}})
		case Affinity, AntiAffinity:
			p.Affinity = slices.DeleteFunc(p.Affinity, func(a *portolanv1.WorkloadSpec_ClusterAffinity) bool {
				return a.GetWorkload() == r.Key && a.GetAnti() == (r.Code == AntiAffinity)
			})
			for i := range s.Others {
				if s.Others[i].ID == r.Key && strings.HasPrefix(r.Message, "drop the anti-affinity of") {
					s.Others[i].Affinity = nil
				}
			}
		case Cordoned:
			c.Spec.Cordoned = false
		case Lost, Pending:
			c.State = portolanv1.ClusterState_CLUSTER_STATE_READY
		case Capacity:
			c.Free, c.Spot = c.Free.Add(r.Amount), c.Spot.Add(r.Amount)
			if p.GetCapacity() == portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED {
				c.Spot = minus(c.Spot, r.Amount)
			}
		case Spread:
			loosen(p, r)
		default:
			t.Fatalf("how to follow %+v?", r)
		}
	}
	return s
}

func loosen(p *portolanv1.WorkloadSpec_Placement, r Remedy) {
	i := r.Index
	if p.GetSpread() != nil {
		if i == 0 {
			p.Spread.MaxSkew = int32(r.Number)
			return
		}
		i--
	}
	if i < len(p.GetSpreads()) {
		p.Spreads[i].MaxSkew = int32(r.Number)
		return
	}
	p.Affinity = slices.DeleteFunc(p.Affinity, func(a *portolanv1.WorkloadSpec_ClusterAffinity) bool { return a.GetWorkload() == "w" && !a.GetPrefer() })
}

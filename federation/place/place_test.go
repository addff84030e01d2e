package place

import (
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// world is the state of one scenario.
type world struct {
	clusters map[string]*Cluster
	w        Workload
	others   []Other
	now      time.Time
}

// TestScenarios runs the stories in testdata. Commands:
//
//	cluster ID [region= zone= provider= cpu= mem= spot=cpu/mem price=core/gib[/spot core] labels=(k=v,…) taints=(k:effect,…) rtt=(region:ms,…) gpus=
//	            lower=(workload:priority:replicas:cpu,…) state= nodes= ready= stopped= cordoned= gone]
//	other ID    a workload of the tenant, at=(clusters) [keeps-away]
//	workload    the spec in YAML, [residency=(…)] [revisions=(a,b)]
//	place       prints the plan and makes it the previous one; [dry] only prints
//	pass        time goes by
func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		if filepath.Ext(path) != ".txt" {
			return // what rapid leaves of a failure
		}
		wd := &world{clusters: map[string]*Cluster{}, now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "cluster":
				wd.cluster(t, d)
				return ""
			case "other":
				o := Other{ID: d.CmdArgs[0].Key}
				for _, a := range d.CmdArgs[1:] {
					if a.Key == "at" {
						o.Clusters = a.Vals
					} else {
						o.Affinity = []*portolanv1.WorkloadSpec_ClusterAffinity{{Workload: "w", Anti: true, Over: portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER}}
					}
				}
				wd.others = append(wd.others, o)
				return ""
			case "workload":
				return wd.workload(t, d)
			case "pass":
				dur, err := time.ParseDuration(d.CmdArgs[0].Key)
				if err != nil {
					t.Fatal(err)
				}
				wd.now = wd.now.Add(dur)
				return ""
			case "place":
				return wd.place(d.HasArg("dry"))
			}
			t.Fatalf("unknown command %s", d.Cmd)
			return ""
		})
	})
}

func (wd *world) cluster(t *testing.T, d *datadriven.TestData) {
	id := d.CmdArgs[0].Key
	c := wd.clusters[id]
	if c == nil {
		c = &Cluster{ID: id, Labels: map[string]string{}, State: portolanv1.ClusterState_CLUSTER_STATE_READY, Nodes: 1, Spec: &portolanv1.ClusterSpec{Region: id, Zone: "a"}}
		wd.clusters[id] = c
	}
	for _, a := range d.CmdArgs[1:] {
		v := ""
		if len(a.Vals) > 0 {
			v = a.Vals[0]
		}
		if v == "none" {
			a.Vals = nil
		}
		var err error
		switch a.Key {
		case "region":
			c.Spec.Region = v
		case "zone":
			c.Spec.Zone = v
		case "cpu":
			c.Free.CPUMilli, err = api.ParseCPU(v)
		case "mem":
			c.Free.MemoryBytes, err = api.ParseBytes(v)
		case "price":
			parts := strings.Split(v, "/")
			c.Spec.CpuCoreHourMicros, _ = strconv.ParseInt(parts[0], 10, 64)
			c.Spec.MemoryGibHourMicros, err = strconv.ParseInt(parts[1], 10, 64)
			if len(parts) > 2 {
				spot, _ := strconv.ParseInt(parts[2], 10, 64)
				c.Pools = append(c.Pools, &portolanv1.PoolStatus{Spot: true, CpuCoreHourMicros: spot})
			}
		case "provider":
			c.Spec.Provider = v
		case "spot":
			cpu, mem, _ := strings.Cut(v, "/")
			c.Spot.CPUMilli, _ = api.ParseCPU(cpu)
			c.Spot.MemoryBytes, err = api.ParseBytes(mem)
		case "rtt":
			c.Spec.RttMillis = map[string]int32{}
			for _, l := range a.Vals {
				region, ms, _ := strings.Cut(l, ":")
				n, _ := strconv.Atoi(ms)
				c.Spec.RttMillis[region] = int32(n)
			}
		case "gpus":
			n, _ := strconv.Atoi(v)
			c.Pools = append(c.Pools, &portolanv1.PoolStatus{Devices: map[string]int32{"gpu/A100": int32(n)}})
		case "lower":
			c.Lower = nil
			for _, l := range a.Vals {
				f := strings.Split(l, ":")
				priority, _ := strconv.Atoi(f[1])
				n, _ := strconv.Atoi(f[2])
				cpu, _ := api.ParseCPU(f[3])
				each := api.Resources{CPUMilli: cpu}
				c.Lower = append(c.Lower, Claimant{Workload: f[0], Priority: priority, Replicas: n, Each: each, Claim: each.Times(int64(n))})
			}
		case "stopped":
			c.Stopped = v == "true"
		case "labels":
			for _, l := range a.Vals {
				k, val, _ := strings.Cut(l, "=")
				c.Labels[k] = val
			}
		case "taints":
			c.Spec.Taints, c.Changed = nil, wd.now
			for _, l := range a.Vals {
				k, effect, _ := strings.Cut(l, ":")
				c.Spec.Taints = append(c.Spec.Taints, &portolanv1.Taint{Key: k, Effect: portolanv1.TaintEffect(portolanv1.TaintEffect_value["TAINT_EFFECT_"+effect])})
			}
		case "state":
			c.State = portolanv1.ClusterState(portolanv1.ClusterState_value["CLUSTER_STATE_"+v])
			c.LastSeen = wd.now
		case "nodes":
			c.Nodes, err = strconv.Atoi(v)
		case "ready":
			c.Ready, err = strconv.Atoi(v)
		case "cordoned":
			c.Spec.Cordoned = v == "true"
		case "gone":
			delete(wd.clusters, id)
		default:
			t.Fatalf("unknown argument %s", a.Key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (wd *world) workload(t *testing.T, d *datadriven.TestData) string {
	js, err := yaml.YAMLToJSON([]byte(d.Input))
	if err != nil {
		t.Fatal(err)
	}
	wd.w = Workload{ID: "w", Spec: &portolanv1.WorkloadSpec{}}
	if err := protojson.Unmarshal(js, wd.w.Spec); err != nil {
		t.Fatal(err)
	}
	revs := []string{"r1"}
	for _, a := range d.CmdArgs {
		switch a.Key {
		case "residency":
			wd.w.Residency = a.Vals
		case "revisions":
			revs = a.Vals
		}
	}
	for _, id := range revs {
		r, err := NewRevision(id, wd.w.Spec)
		if err != nil {
			return err.Error()
		}
		wd.w.Revisions = append(wd.w.Revisions, r)
	}
	return ""
}

func (wd *world) snapshot() Snapshot {
	s := Snapshot{Workload: wd.w, Others: wd.others}
	for _, c := range wd.clusters {
		s.Clusters = append(s.Clusters, *c)
	}
	return s
}

func (wd *world) place(dry bool) string {
	p := Place(wd.snapshot(), wd.now)
	if !dry {
		for _, c := range wd.clusters {
			c.Previous = Previous{}
		}
		for _, a := range p.Assignments {
			n := max(a.Replicas, a.Max)
			wd.clusters[a.Cluster].Previous = Previous{Present: true, Declared: n - a.Failover, Failover: a.Failover, Claim: a.Claim, Basis: p.Basis}
		}
	}
	return p.text(wd.now)
}

func (p Plan) text(now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "desired %d, unplaced %d", p.Desired, p.Unplaced)
	if p.FailoverUnplaced > 0 {
		fmt.Fprintf(&b, ", of lost clusters %d", p.FailoverUnplaced)
	}
	if p.Moved > 0 {
		fmt.Fprintf(&b, ", moved %d", p.Moved)
	}
	if p.CostMicros > 0 {
		fmt.Fprintf(&b, ", %d micros an hour", p.CostMicros)
	}
	if p.Frozen {
		b.WriteString(", frozen")
	}
	if !p.Again.IsZero() {
		fmt.Fprintf(&b, ", again in %v", p.Again.Sub(now))
	}
	b.WriteString("\n")
	for _, r := range p.Reasons {
		fmt.Fprintf(&b, "! %s: %s\n", r.Code, r.Message)
	}
	claims := map[string]Assignment{}
	for _, a := range p.Assignments {
		claims[a.Cluster] = a
	}
	for _, v := range p.Verdicts {
		mark := "-"
		if v.Feasible {
			mark = "+"
		}
		fmt.Fprintf(&b, "%s %s: %d", mark, v.Cluster, v.Replicas)
		if a, ok := claims[v.Cluster]; ok {
			if a.Max > 0 {
				fmt.Fprintf(&b, " (scales %d to %d)", a.Min, a.Max)
			}
			fmt.Fprintf(&b, " (%d for others), claims %dm %dMi", a.Failover, a.Claim.CPUMilli, a.Claim.MemoryBytes>>20)
		}
		b.WriteString("\n")
		for _, r := range v.Reasons {
			fmt.Fprintf(&b, "    %s: %s\n", r.Code, r.Message)
		}
		for _, r := range v.Remedies {
			fmt.Fprintf(&b, "    > %s: %s\n", r.Code, r.Message)
		}
	}
	for _, v := range p.Displaced {
		fmt.Fprintf(&b, "displaced: %d of %s in %s\n", v.Replicas, v.Workload, v.Cluster)
	}
	return b.String()
}

func TestPreviousOf(t *testing.T) {
	p := &portolanv1.PlacementSpec{
		Revisions:        []*portolanv1.RevisionReplicas{{Revision: "a", Replicas: 5}, {Revision: "b", Replicas: 5}},
		ReservedCpuMilli: 7,
		Reasons:          []*portolanv1.Reason{{Code: Kept, Count: 3}, {Code: Failover, Count: 2}},
	}
	want := Previous{Present: true, Declared: 3, Failover: 2, Claim: api.Resources{CPUMilli: 7}}
	if got := PreviousOf(p); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// BenchmarkT5_PlaceDecision: one decision over 100 clusters in 20 regions, 200
// replicas, in memory. It reports the 99th percentile.
func BenchmarkT5_PlaceDecision(b *testing.B) {
	for _, c := range []struct {
		name      string
		objective portolanv1.Objective
		over      portolanv1.SpreadDomain
		placed    bool
	}{
		{"spread", portolanv1.Objective_OBJECTIVE_SPREAD, portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER, false},
		{"regions", portolanv1.Objective_OBJECTIVE_SPREAD, portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION, false},
		{"cost", portolanv1.Objective_OBJECTIVE_COST, portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER, false},
		{"again", portolanv1.Objective_OBJECTIVE_SPREAD, portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := hundred(c.objective, c.over)
			now := time.Unix(0, 0)
			if c.placed {
				for _, a := range Place(s, now).Assignments {
					for i := range s.Clusters {
						if s.Clusters[i].ID == a.Cluster {
							s.Clusters[i].Previous = Previous{Present: true, Declared: a.Replicas, Claim: a.Claim}
						}
					}
				}
			}
			// The thread's own time: on a shared machine the clock on the wall also counts
			// the others.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			var took []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				start := threadTime(b)
				if p := Place(s, now); p.Unplaced > 0 {
					b.Fatalf("unplaced: %d", p.Unplaced)
				}
				took = append(took, threadTime(b)-start)
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100])/1e6, "p99-ms")
			b.ReportMetric(float64(took[len(took)/2])/1e6, "p50-ms")
		})
	}
}

func threadTime(b *testing.B) time.Duration {
	b.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

func hundred(o portolanv1.Objective, over portolanv1.SpreadDomain) Snapshot {
	n := int32(200)
	spec := &portolanv1.WorkloadSpec{
		Replicas:   &n,
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "500m", Memory: "256Mi"}}},
		Placement: &portolanv1.WorkloadSpec_Placement{
			Objective: o, ForbiddenRegions: []string{"region-3"}, ClusterSelector: map[string]string{"tier": "prod"},
			Spread: &portolanv1.WorkloadSpec_ClusterSpread{Over: over, MinGroups: 3},
		},
	}
	rev, err := NewRevision("r1", spec)
	if err != nil {
		panic(err)
	}
	s := Snapshot{Workload: Workload{Spec: spec, Revisions: []Revision{rev}}}
	for i := range 100 {
		c := Cluster{
			ID: fmt.Sprintf("cluster-%02d", i), Labels: map[string]string{"tier": "prod"}, State: portolanv1.ClusterState_CLUSTER_STATE_READY, Nodes: 50,
			Spec: &portolanv1.ClusterSpec{Region: fmt.Sprintf("region-%d", i%20), CpuCoreHourMicros: int64(1000 + i*7%13), MemoryGibHourMicros: 100},
			Free: api.Resources{CPUMilli: 16_000, MemoryBytes: 64 << 30},
		}
		if i%20 == 7 {
			c.Spec.Taints = []*portolanv1.Taint{{Key: "dedicated"}}
		}
		s.Clusters = append(s.Clusters, c)
	}
	return s
}

package bench

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/place"
)

// Workload W3: 100 clusters in 20 regions of 5,000 nodes each, 10,000 workloads of
// 200 replicas with lists of regions, spread over 3 clusters, a taint on 5 % of
// the clusters and nodes, 3 priorities.
const (
	w3Clusters, w3Regions, w3Nodes = 100, 20, 5000
	w3Workloads, w3Replicas        = 10_000, 200
	w3Seed                         = 42
)

// w3 is the World, and the table of every cluster's nodes.
func w3(b *testing.B) (place.World, []*schedule.Table) {
	b.Helper()
	rnd := rand.New(rand.NewPCG(w3Seed, w3Seed))
	var w place.World
	tables := make([]*schedule.Table, w3Clusters)
	labels := make([]map[string]string, 50)
	for i := range labels {
		labels[i] = map[string]string{"rack": fmt.Sprintf("r%d", i)}
	}
	taint := []*portolanv1.Taint{{Key: "dedicated", Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE}}
	for c := range w3Clusters {
		cl := place.Cluster{
			ID: fmt.Sprintf("c%02d", c), State: portolanv1.ClusterState_CLUSTER_STATE_READY, Nodes: w3Nodes,
			Spec: &portolanv1.ClusterSpec{Region: fmt.Sprintf("r%d", c%w3Regions), Zone: fmt.Sprint(c / w3Regions), CpuCoreHourMicros: 1000 + rnd.Int64N(500)},
			Free: api.Resources{CPUMilli: w3Nodes * 8000, MemoryBytes: w3Nodes * 8 << 30},
		}
		if c%20 == 7 {
			cl.Spec.Taints = taint
		}
		w.Clusters = append(w.Clusters, cl)
		tables[c] = schedule.NewTable(w3Seed)
		for n := range w3Nodes {
			f := &nodev1.NodeFacts{CpuMilli: 9000, MemoryBytes: 9 << 30, Labels: labels[n%50]}
			if n%20 == 3 {
				f.Taints = taint
			}
			tables[c].PutNode(schedule.Node{ID: fmt.Sprintf("n%04d", n), Facts: f, Addresses: 253})
		}
	}
	for i := range w3Workloads {
		n := int32(w3Replicas)
		spec := &portolanv1.WorkloadSpec{
			Replicas: &n, Priority: int32(i % 3), Update: &portolanv1.WorkloadSpec_UpdateStrategy{MaxUnavailable: new(int32(1))},
			Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "1", Memory: "1Gi"}}},
			Placement: &portolanv1.WorkloadSpec_Placement{
				Objective: portolanv1.Objective_OBJECTIVE_COST, Failover: &portolanv1.WorkloadSpec_Failover{},
				Spread: &portolanv1.WorkloadSpec_ClusterSpread{Over: portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER, MinGroups: 3, MaxSkew: 1},
			},
		}
		for _, r := range rnd.Perm(w3Regions)[:5] {
			spec.Placement.AllowedRegions = append(spec.Placement.AllowedRegions, fmt.Sprintf("r%d", r))
		}
		rev, err := place.NewRevision("r1", spec)
		if err != nil {
			b.Fatal(err)
		}
		tenant := fmt.Sprintf("t%02d", i%50)
		w.Workloads = append(w.Workloads, place.Item{
			Name: fmt.Sprintf("tenants/%s/workloads/w%05d", tenant, i), Tenant: tenant,
			Workload: place.Workload{ID: fmt.Sprintf("w%05d", i), Spec: spec, Revisions: []place.Revision{rev}},
		})
	}
	return w, tables
}

// w3Batch is how many groups are scheduled at once.
const w3Batch = 200

// bind schedules what plans ask of every cluster, more than in before, and binds it
// in the tables. It says how many replicas found no node.
func bind(b *testing.B, w place.World, tables []*schedule.Table, before, plans []place.Plan) (missing int) {
	b.Helper()
	index := map[string]int{}
	for c := range w.Clusters {
		index[w.Clusters[c].ID] = c
	}
	groups := make([][]schedule.Group, len(tables))
	for i, p := range plans {
		had := map[string]int{}
		if before != nil {
			for _, a := range before[i].Assignments {
				had[a.Cluster] = a.Replicas
			}
		}
		item := &w.Workloads[i]
		class, err := schedule.Compile(item.Workload.Spec, schedule.Options{Owner: schedule.Owner{Tenant: item.Tenant, Workload: item.Workload.ID, Revision: "r1"}})
		if err != nil {
			b.Fatal(err)
		}
		for _, a := range p.Assignments {
			if n := a.Replicas - had[a.Cluster]; n > 0 {
				groups[index[a.Cluster]] = append(groups[index[a.Cluster]], schedule.Group{Key: item.Name, Class: class, Count: n})
			}
		}
	}
	for c, t := range tables {
		for batch := range slices.Chunk(groups[c], w3Batch) {
			for g, p := range schedule.Schedule(t, schedule.Batch{Groups: batch, NoPreemption: true}).Placed {
				missing += p.Missing
				for _, x := range p.Bindings {
					bound++
					t.PutReplica(schedule.Replica{ID: strconv.Itoa(bound), Class: batch[g].Class, Node: x.Node})
				}
			}
		}
	}
	return missing
}

// bound counts replicas, for their names.
var bound int

func cpuSeconds(b *testing.B) float64 {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// BenchmarkT4_Decide_W3: 2 M replicas on 500,000 nodes in 100 clusters are decided:
// placed over the clusters and scheduled over all their nodes. Then one cluster is
// lost, and what it held is placed and scheduled elsewhere (T17). In CPU seconds
// of the process; GiB is the heap in use with everything in it.
func BenchmarkT4_Decide_W3(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		w, nodes := w3(b)
		runtime.GC()
		now := time.Unix(1<<31, 0)
		b.StartTimer()
		start := cpuSeconds(b)
		plans := place.PlaceAll(w, now)
		placed := cpuSeconds(b)
		missing := bind(b, w, nodes, nil, plans)
		done := cpuSeconds(b)
		unplaced := 0
		for i := range plans {
			unplaced += plans[i].Unplaced
		}
		if missing+unplaced > 0 {
			b.Fatalf("%d replicas found no cluster, %d no node", unplaced, missing)
		}
		b.ReportMetric(done-start, "s-decided")
		b.ReportMetric(placed-start, "s-placed")
		b.ReportMetric(done-placed, "s-scheduled")
		b.StopTimer()
		loseOne(b, w, nodes, plans, now)
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapInuse)/(1<<30), "GiB")
		runtime.KeepAlive(nodes)
		runtime.KeepAlive(plans)
		runtime.KeepAlive(w.Workloads)
		b.StartTimer()
	}
}

// loseOne loses the cluster that holds most.
func loseOne(b *testing.B, w place.World, nodes []*schedule.Table, plans []place.Plan, now time.Time) {
	b.Helper()
	held := map[string]int{}
	lost := ""
	for i, p := range plans {
		w.Workloads[i].Held = nil
		for _, a := range p.Assignments {
			w.Workloads[i].Held = append(w.Workloads[i].Held, place.Held{Cluster: a.Cluster, Previous: place.Previous{Present: true, Declared: a.Replicas, Claim: a.Claim, Basis: p.Basis}})
			if held[a.Cluster] += a.Replicas; held[a.Cluster] > held[lost] {
				lost = a.Cluster
			}
		}
	}
	start := cpuSeconds(b)
	after := place.PlaceAll(w.With(place.Lose, place.Cluster{ID: lost}), now)
	placed := cpuSeconds(b)
	extra, short := 0, 0
	for _, p := range after {
		short += p.FailoverUnplaced
		for _, a := range p.Assignments {
			extra += a.Failover
		}
	}
	missing := bind(b, w, nodes, plans, after)
	done := cpuSeconds(b)
	if extra != held[lost] || short+missing > 0 {
		b.Fatalf("%d stand in for the %d of %s, %d found no cluster and %d no node", extra, held[lost], lost, short, missing)
	}
	b.ReportMetric(float64(extra), "replicas-lost")
	b.ReportMetric(placed-start, "s-replaced")
	b.ReportMetric(done-placed, "s-rescheduled")
}

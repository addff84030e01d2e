package schedule

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Workload W1, after Nomad's scheduler benchmarks: nodes of 32 GB in 2
// datacentres and 50 racks, half of them eligible, jobs of 1,200 replicas.
const (
	w1Replicas = 1200
	w1Jobs     = 5
	w1Racks    = 50
	w1Zones    = 3
	w1Seed     = 42
)

func w1Node(i int) Node {
	return Node{
		ID: fmt.Sprintf("n%06d", i), Addresses: 253,
		Facts: &nodev1.NodeFacts{CpuMilli: 16000, MemoryBytes: 32 << 30, StorageBytes: 500 << 30, Labels: map[string]string{
			"datacentre": fmt.Sprintf("dc%d", i%2), "rack": fmt.Sprintf("r%d", i%w1Racks), "class": fmt.Sprintf("c%d", i/w1Racks%2), "zone": fmt.Sprintf("z%d", i%w1Racks%w1Zones),
		}},
	}
}

func w1Table(nodes int) *Table {
	t := NewTable(w1Seed)
	for i := range nodes {
		t.PutNode(w1Node(i))
	}
	return t
}

func w1Spec(change func(*portolanv1.WorkloadSpec_Scheduling)) *portolanv1.WorkloadSpec {
	s := &portolanv1.WorkloadSpec{
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "100Mi"}}},
		Scheduling: &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"class": "c1"}},
	}
	if change != nil {
		change(s.Scheduling)
	}
	return s
}

func mustCompile(tb testing.TB, spec *portolanv1.WorkloadSpec, workload string) *Class {
	tb.Helper()
	c, err := Compile(spec, Options{Owner: Owner{"t", workload, "r1"}, Overhead: api.Resources{}})
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// fleet places groups, commits what was placed, and takes it away again.
type fleet struct {
	t   *Table
	ids []string
	n   int
}

func (f *fleet) commit(b Batch, r Result) (placed int) {
	for k, p := range r.Placed {
		for _, s := range p.Bindings {
			if f.n == len(f.ids) {
				f.ids = append(f.ids, fmt.Sprintf("a%07d", f.n))
			}
			f.t.PutReplica(Replica{ID: f.ids[f.n], Class: b.Groups[k].Class, Node: s.Node})
			f.n++
			placed++
		}
	}
	return placed
}

func (f *fleet) clear() {
	for ; f.n > 0; f.n-- {
		f.t.DeleteReplica(f.ids[f.n-1])
	}
}

// benchW1 measures Schedule with the commit of what it decides; the jobs are taken
// away outside the measurement.
func benchW1(b *testing.B, change func(*portolanv1.WorkloadSpec_Scheduling)) {
	b.Helper()
	for _, n := range []int{1000, 5000, 10000, 100000} {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			f := &fleet{t: w1Table(n)}
			var batch Batch
			for j := range w1Jobs {
				batch.Groups = append(batch.Groups, Group{Key: fmt.Sprintf("t/job%d/r1", j), Class: mustCompile(b, w1Spec(change), fmt.Sprintf("job%d", j)), Count: w1Replicas})
			}
			benchBatches(b, f, batch, w1Jobs*w1Replicas)
		})
	}
}

func benchBatches(b *testing.B, f *fleet, batch Batch, want int) {
	b.Helper()
	if got := f.commit(batch, Schedule(f.t, batch)); got != want {
		b.Fatalf("%d of %d placed: %+v", got, want, Schedule(f.t, batch).Placed[0].Refusal)
	}
	f.clear()
	var used time.Duration
	placed := 0
	allocs := testing.AllocsPerRun(1, func() { Schedule(f.t, batch) })
	for b.Loop() {
		before := cpu(b)
		placed += f.commit(batch, Schedule(f.t, batch))
		used += cpu(b) - before
		b.StopTimer()
		f.clear()
		b.StartTimer()
	}
	b.ReportMetric(float64(placed)/used.Seconds(), "placements/cpu-s")
	b.ReportMetric(allocs/float64(want), "allocs/placement")
}

func BenchmarkT1_Schedule(b *testing.B) { benchW1(b, nil) }

func BenchmarkT2_ScheduleSpread(b *testing.B) {
	b.Run("over=rack", func(b *testing.B) {
		benchW1(b, func(s *portolanv1.WorkloadSpec_Scheduling) { s.SpreadKey, s.MaxSkew = "rack", 1 })
	})
	b.Run("over=rack+zone", func(b *testing.B) {
		benchW1(b, func(s *portolanv1.WorkloadSpec_Scheduling) {
			s.SpreadKey, s.MaxSkew = "rack", 1
			s.Spreads = []*portolanv1.WorkloadSpec_TopologySpread{{TopologyKey: "zone", MaxSkew: 100}}
		})
	})
}

// BenchmarkT1_SingleRequests is W4: 100,000 nodes of which 1,000 change between
// every 5,000 requests for one replica each, of 50 classes.
func BenchmarkT1_SingleRequests(b *testing.B) {
	for _, n := range []int{5000, 100000} {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) { benchSingle(b, n) })
	}
}

func benchSingle(b *testing.B, n int) {
	b.Helper()
	f := &fleet{t: w1Table(n)}
	var classes []*Class
	for j := range 50 {
		spec := w1Spec(nil)
		spec.Containers[0].Limits.Cpu = fmt.Sprintf("%dm", 50+j*10)
		classes = append(classes, mustCompile(b, spec, fmt.Sprintf("job%d", j)))
		Schedule(f.t, Batch{Groups: []Group{{Class: classes[j], Count: 1}}})
	}
	groups := make([]Group, 1)
	var took []time.Duration
	before := cpu(b)
	k := 0
	for b.Loop() {
		if k%5 == 0 {
			i := int(mix(1, uint64(k)) % uint64(n))
			node := w1Node(i)
			node.Facts.CpuMilli += int64(k % 7)
			f.t.PutNode(node)
		}
		at := time.Now()
		groups[0] = Group{Class: classes[k%50], Count: 1}
		batch := Batch{Groups: groups}
		r := Schedule(f.t, batch)
		took = append(took, time.Since(at))
		if f.commit(batch, r) != 1 {
			b.Fatal("not placed")
		}
		if k++; f.n == 20*n {
			b.StopTimer()
			f.clear()
			b.StartTimer()
		}
	}
	b.ReportMetric(float64(k)/(cpu(b)-before).Seconds(), "placements/cpu-s")
	slices.Sort(took)
	for _, q := range []struct {
		name string
		at   float64
	}{{"p50-µs", 0.5}, {"p99-µs", 0.99}, {"p99.9-µs", 0.999}} {
		b.ReportMetric(float64(took[int(q.at*float64(len(took)-1))].Nanoseconds())/1000, q.name)
	}
}

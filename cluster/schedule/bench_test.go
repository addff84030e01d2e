package schedule

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// Workload W1, after Nomad's scheduler benchmarks: nodes of 32 GB in 2
// datacentres and 50 racks, half of them eligible, jobs of 1,200 replicas.
const (
	w1Replicas = 1200
	w1Jobs     = 5
	w1Racks    = 50
	w1Seed     = 42
)

func w1(nodes int, spreadKey string) Input {
	in := Input{Seed: w1Seed}
	for i := range nodes {
		in.Nodes = append(in.Nodes, Node{
			ID: fmt.Sprintf("n%06d", i), Capacity: api.Resources{CPUMilli: 16000, MemoryBytes: 32 << 30}, Addresses: 253,
			Labels: map[string]string{"datacentre": fmt.Sprintf("dc%d", i%2), "rack": fmt.Sprintf("r%d", i%w1Racks), "class": fmt.Sprintf("c%d", i/w1Racks%2)},
		})
	}
	for j := range w1Jobs {
		in.Groups = append(in.Groups, Group{
			Key: fmt.Sprintf("t/job%d/r1", j), Count: w1Replicas, Request: api.Resources{CPUMilli: 100, MemoryBytes: 100 << 20},
			Selector: map[string]string{"class": "c1"}, SpreadKey: spreadKey, Address: true,
		})
	}
	return in
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func bench(b *testing.B, spreadKey string) {
	b.Helper()
	for _, n := range []int{1000, 5000, 10000} {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			in := w1(n, spreadKey)
			b.ReportAllocs()
			before := cpu(b)
			placed := 0
			for b.Loop() {
				for _, p := range Schedule(in) {
					placed += len(p.Nodes)
				}
			}
			if placed != b.N*w1Jobs*w1Replicas {
				b.Fatalf("%d placed in %d runs", placed, b.N)
			}
			b.ReportMetric(float64(placed)/(cpu(b)-before).Seconds(), "placements/cpu-s")
		})
	}
}

func BenchmarkT1_Schedule(b *testing.B)       { bench(b, "") }
func BenchmarkT2_ScheduleSpread(b *testing.B) { bench(b, "rack") }

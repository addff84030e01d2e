package bench

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/manager"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/etcd"
	statemem "github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Workload W1, as cluster/schedule's own benchmark has it: nodes of 32 GB in 2
// datacentres and 50 racks, half of them eligible, jobs of 1,200 replicas.
const (
	w1Nodes    = 5000
	w1Racks    = 50
	w1Jobs     = 5
	w1Replicas = 1200
)

// BenchmarkT1_Manager is W1 through the whole of a cluster's manager: from the
// intents of 5 workloads in the state until their 6,000 replicas are bound there.
// Beside Schedule, which BenchmarkT1_Schedule has alone, it holds the watch of the
// state, the reconciler, names, addresses and the commit of every allocation; on
// "etcd" each is durable. The collector and, on etcd, the embedded member count.
func BenchmarkT1_Manager(b *testing.B) {
	for _, stores := range []struct {
		name string
		open func() (state.Store, error)
	}{
		{"mem", func() (state.Store, error) { return statemem.New(), nil }},
		{"etcd", func() (state.Store, error) { return etcd.Open(b.Context(), etcd.Config{Dir: b.TempDir()}) }},
	} {
		b.Run(stores.name, func(b *testing.B) {
			var used, wall time.Duration
			placed := 0
			for b.Loop() {
				b.StopTimer()
				st, err := stores.open()
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				cpu, took := manageW1(b, st)
				b.StopTimer()
				used, wall, placed = used+cpu, wall+took, placed+w1Jobs*w1Replicas
				if err := st.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(placed)/used.Seconds(), "placements/cpu-s")
			b.ReportMetric(float64(placed)/wall.Seconds(), "placements/s")
			b.ReportMetric(0, "ns/op") // the nodes' registration: it says nothing
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func manageW1(b *testing.B, st state.Store) (used, wall time.Duration) {
	var c state.Change
	for i := range w1Nodes {
		c.PutNodes = append(c.PutNodes, &clusterv1.Node{
			Node: fmt.Sprintf("n%06d", i), ReplicaCidr: fmt.Sprintf("10.%d.%d.0/24", i/250, i%250+1),
			Facts: &nodev1.NodeFacts{Address: fmt.Sprintf("172.16.%d.%d", i/250, i%250+1), CpuMilli: 16000, MemoryBytes: 32 << 30, Labels: map[string]string{
				"datacentre": fmt.Sprintf("dc%d", i%2), "rack": fmt.Sprintf("r%d", i%w1Racks), "class": fmt.Sprintf("c%d", i/w1Racks%2),
			}},
		})
	}
	if err := st.Commit(b.Context(), c); err != nil {
		b.Fatal(err)
	}
	for _, n := range c.PutNodes {
		if err := st.Observe(n.GetNode(), &state.NodeStatus{Connected: true, LastSeen: time.Now(), Session: 1, Facts: n.GetFacts(), Applied: &nodev1.Watermark{}}); err != nil {
			b.Fatal(err)
		}
	}
	m, err := manager.New(manager.Config{Store: st, Cluster: clusterID, CIDR: "10.0.0.0/8", NodeTimeout: time.Hour, Seed: seed})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}()
	commit := func(revision int64, intents map[string]*linkv1.Intent) {
		if err := st.CommitIntents(b.Context(), revision, intents, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
	settled := func(revision int64) *state.Snapshot {
		for {
			s := st.Snapshot()
			if s.Settled >= revision {
				return s
			}
			if err := st.Wait(b.Context(), s.Generation); err != nil {
				b.Fatal(err)
			}
		}
	}
	commit(1, nil) // the manager has seen the nodes
	settled(1)
	jobs := map[string]*linkv1.Intent{}
	for j := range w1Jobs {
		name := fmt.Sprintf("job%d", j)
		jobs["workload/t/"+name] = &linkv1.Intent{Revision: 2, Body: &linkv1.Intent_Workload{Workload: &linkv1.WorkloadIntent{
			Tenant: "t", Workload: name, Uid: "u-" + name, Epoch: 2, CurrentRevision: "r1",
			Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Replicas: w1Replicas, Spec: &portolanv1.WorkloadSpec{
				Kind:       portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE,
				Containers: []*portolanv1.Container{{Name: "main", Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "100Mi"}}},
				Scheduling: &portolanv1.WorkloadSpec_Scheduling{NodeSelector: map[string]string{"class": "c1"}},
			}}},
		}}}
	}
	start, before := time.Now(), cpuTime(b)
	commit(2, jobs)
	s := settled(2)
	for len(s.Allocations) < w1Jobs*w1Replicas {
		if err := st.Wait(b.Context(), s.Generation); err != nil {
			b.Fatal(err)
		}
		s = st.Snapshot()
	}
	return cpuTime(b) - before, time.Since(start)
}

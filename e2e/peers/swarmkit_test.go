// Package peers holds the benchmarks of other schedulers, on the workloads of
// Portolan's own. It owns nothing but their set-up, and is a module of its own.
package peers

import (
	"fmt"
	"io"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/moby/swarmkit/v2/api"
	"github.com/moby/swarmkit/v2/manager/scheduler"
	"github.com/moby/swarmkit/v2/manager/state"
	"github.com/moby/swarmkit/v2/manager/state/store"
	"github.com/sirupsen/logrus"
)

// Workload W1, as in cluster/schedule: nodes of 16 cores and 32 GB in 2 datacentres
// and 50 racks, half of them eligible by a label, jobs of 1,200 replicas of 100 m
// and 100 MiB.
const (
	w1Replicas = 1200
	w1Racks    = 50
)

// swarm is a store with nodes, its scheduler running, and nothing to do yet.
type swarm struct {
	store     *store.MemoryStore
	scheduler *scheduler.Scheduler
	done      chan error
}

func newSwarm(b *testing.B, nodes int) *swarm {
	b.Helper()
	s := &swarm{store: store.NewMemoryStore(nil), done: make(chan error, 1)}
	err := s.store.Update(func(tx store.Tx) error {
		for i := range nodes {
			err := store.CreateNode(tx, &api.Node{
				ID: fmt.Sprintf("n%06d", i),
				Spec: api.NodeSpec{Annotations: api.Annotations{Name: fmt.Sprintf("n%06d", i), Labels: map[string]string{
					"datacentre": fmt.Sprintf("dc%d", i%2), "rack": fmt.Sprintf("r%d", i%w1Racks), "class": fmt.Sprintf("c%d", i/w1Racks%2),
				}}},
				Status:      api.NodeStatus{State: api.NodeStatus_READY},
				Description: &api.NodeDescription{Engine: &api.EngineDescription{}, Resources: &api.Resources{NanoCPUs: 16e9, MemoryBytes: 32 << 30}},
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	s.scheduler = scheduler.New(s.store)
	go func() { s.done <- s.scheduler.Run(b.Context()) }()
	return s
}

func (s *swarm) stop(b *testing.B) {
	b.Helper()
	s.scheduler.Stop()
	if err := <-s.done; err != nil {
		b.Error(err)
	}
	if err := s.store.Close(); err != nil {
		b.Error(err)
	}
}

// load is what is asked of it.
type load struct {
	jobs, replicas int
	// grouped: the tasks of one job share a service and a version, as those of a
	// service do, and the scheduler finds nodes for them together. Otherwise each is
	// by itself, without requests and constraints, as in SwarmKit's own benchmark.
	grouped bool
	spread  string
}

func (l load) task(j, i int, placement *api.Placement) *api.Task {
	id := fmt.Sprintf("job%d-%d", j, i)
	t := &api.Task{ID: id, ServiceAnnotations: api.Annotations{Name: id}, DesiredState: api.TaskStateRunning, Status: api.TaskStatus{State: api.TaskStatePending}}
	if l.grouped {
		t.ServiceID, t.Slot, t.SpecVersion = fmt.Sprintf("job%d", j), uint64(i+1), &api.Version{Index: 1}
		t.ServiceAnnotations.Name = t.ServiceID
		t.Spec = api.TaskSpec{Placement: placement, Resources: &api.ResourceRequirements{Reservations: &api.Resources{NanoCPUs: 1e8, MemoryBytes: 100 << 20}}}
	}
	return t
}

// submit creates the tasks in one transaction, and gives the CPU time at its end,
// before the scheduler hears of it.
func (s *swarm) submit(b *testing.B, l load) time.Duration {
	b.Helper()
	before := time.Duration(0)
	placement := &api.Placement{Constraints: []string{"node.labels.class==c1"}}
	if l.spread != "" {
		placement.Preferences = []*api.PlacementPreference{{Preference: &api.PlacementPreference_Spread{Spread: &api.SpreadOver{SpreadDescriptor: "node.labels." + l.spread}}}}
	}
	err := s.store.Update(func(tx store.Tx) error {
		for j := range l.jobs {
			for i := range l.replicas {
				if err := store.CreateTask(tx, l.task(j, i, placement)); err != nil {
					return err
				}
			}
		}
		runtime.GC() // what building the store left is not the scheduler's
		b.StartTimer()
		before = cpu(b)
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return before
}

// check holds the peer to what it was asked: every task on an eligible node.
func (s *swarm) check(b *testing.B, l load) {
	b.Helper()
	s.store.View(func(tx store.ReadTx) {
		tasks, err := store.FindTasks(tx, store.All)
		if err != nil || len(tasks) != l.jobs*l.replicas {
			b.Fatalf("%d tasks: %v", len(tasks), err)
		}
		for _, t := range tasks {
			if n := store.GetNode(tx, t.NodeID); n == nil || l.grouped && n.Spec.Annotations.Labels["class"] != "c1" {
				b.Fatalf("task %s is on node %q", t.ID, t.NodeID)
			}
		}
	})
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// bench measures as SwarmKit's own benchmark does, from the tasks' commit to the
// last assignment, in CPU seconds: its store is in it, as it has no scheduler
// without one.
func bench(b *testing.B, nodes int, l load) {
	b.Helper()
	logrus.SetOutput(io.Discard)
	b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
		placed, used := 0, time.Duration(0)
		for range b.N {
			b.StopTimer()
			s := newSwarm(b, nodes)
			watch, cancel := state.Watch(s.store.WatchQueue(), api.EventUpdateTask{})
			before := s.submit(b, l)
			for range l.jobs * l.replicas {
				<-watch
			}
			used += cpu(b) - before
			b.StopTimer()
			placed += l.jobs * l.replicas
			s.check(b, l)
			cancel()
			s.stop(b)
		}
		b.ReportMetric(float64(placed)/used.Seconds(), "placements/cpu-s")
	})
}

// Jobs are fewer where it is slow: the figure is per placement.
var w1 = []struct{ nodes, jobs int }{{1000, 5}, {5000, 5}, {10000, 2}, {100000, 1}}

func BenchmarkT1_Peer_SwarmKit(b *testing.B) {
	for _, w := range w1 {
		bench(b, w.nodes, load{jobs: w.jobs, replicas: w1Replicas, grouped: true})
	}
}

func BenchmarkT2_Peer_SwarmKit(b *testing.B) {
	for _, w := range w1 {
		bench(b, w.nodes, load{jobs: w.jobs, replicas: w1Replicas, grouped: true, spread: "rack"})
	}
}

// BenchmarkT1_Peer_SwarmKitSingle is SwarmKit's own benchmark: single tasks that
// ask for nothing.
func BenchmarkT1_Peer_SwarmKitSingle(b *testing.B) {
	bench(b, 1000, load{jobs: 1, replicas: 10000})
	bench(b, 5000, load{jobs: 1, replicas: 2000})
	bench(b, 10000, load{jobs: 1, replicas: 1000})
	bench(b, 100000, load{jobs: 1, replicas: 100})
}

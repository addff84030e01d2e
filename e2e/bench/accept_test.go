package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/state/etcd"
	statemem "github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/cockroach"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/federation/store/storetest/pgtest"
)

const (
	samples = 200
	seed    = 42
)

// BenchmarkT6_AcceptToCluster: from CreateWorkload's answer in the caller's hand
// until the workload's intent is committed in the cluster's state, one workload at
// a time with pauses of 0 to 20 ms between, in a tenant that has 50 or 1,000
// others already (and 200 more at the end). One region, one cluster of 16 nodes,
// two federation replicas; the caller and the cluster are at different ones, and
// either may hold the placement loop. "mem" has both stores in memory and gives
// what the code itself costs; "postgres" has them as the mains do: PostgreSQL
// with a disk that syncs, and an embedded etcd at the cluster. All of it shares
// the machine's cores. call-p99-ms is CreateWorkload itself, which comes before.
func BenchmarkT6_AcceptToCluster(b *testing.B) {
	for _, others := range []int{50, 1000} {
		b.Run(fmt.Sprintf("mem/workloads=%d", others), func(b *testing.B) {
			st := mem.New(mem.Config{})
			acceptToCluster(b, newWorld(b, statemem.New(), st, st), others)
		})
		b.Run(fmt.Sprintf("postgres/workloads=%d", others), func(b *testing.B) {
			st, err := etcd.Open(b.Context(), etcd.Config{Dir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = st.Close() })
			acceptToCluster(b, newWorld(b, st, postgres(b, 2)...), others)
		})
	}
}

// postgres opens one database n times, as n replicas do.
func postgres(b *testing.B, n int) []store.Store {
	b.Helper()
	url := pgtest.Postgres(b, "fsync=on", "full_page_writes=on").Database(b)
	if err := cockroach.Migrate(b.Context(), url); err != nil {
		b.Fatal(err)
	}
	var out []store.Store
	for i := range n {
		s, err := cockroach.Open(b.Context(), cockroach.Config{URL: url, Holder: fmt.Sprintf("fed-%d", i+1)})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = s.Close() })
		out = append(out, s)
	}
	return out
}

func acceptToCluster(b *testing.B, w *world, others int) {
	_, err := portolanv1.NewTenantServiceClient(w.admin).CreateTenant(w.ctx, &portolanv1.CreateTenantRequest{
		Tenant: &portolanv1.Tenant{Name: api.TenantName("shop"), Spec: &portolanv1.TenantSpec{DisplayName: "Shop"}},
	})
	w.must("create the tenant", err)
	w.fill(others)
	random := rand.New(rand.NewPCG(seed, seed))
	var called, arrived []time.Duration
	// With -benchtime 1x too there are enough samples for a figure.
	for b.Loop() {
		for range samples {
			time.Sleep(time.Duration(random.Int64N(int64(20 * time.Millisecond))))
			id := fmt.Sprintf("w%d", len(called))
			start := time.Now()
			w.create(id)
			accepted := time.Now()
			w.await(id)
			called, arrived = append(called, accepted.Sub(start)), append(arrived, time.Since(accepted))
		}
	}
	slices.Sort(called)
	slices.Sort(arrived)
	ms := func(all []time.Duration, percent int) float64 { return float64(all[len(all)*percent/100]) / 1e6 }
	b.ReportMetric(ms(arrived, 50), "p50-ms")
	b.ReportMetric(ms(arrived, 95), "p95-ms")
	b.ReportMetric(ms(arrived, 99), "p99-ms")
	b.ReportMetric(ms(called, 99), "call-p99-ms")
	b.ReportMetric(0, "ns/op") // pauses and calls: it says nothing
}

// fill makes the other workloads and waits until they are bound; it warms
// everything up.
func (w *world) fill(n int) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := i; j < n; j += 8 {
				w.create(fmt.Sprintf("other%d", j))
			}
		})
	}
	wg.Wait()
	w.within("the other workloads are bound", func() bool { return len(w.state.Snapshot().Allocations) == n })
}

func (w *world) create(id string) {
	replicas := int32(1)
	_, err := portolanv1.NewWorkloadServiceClient(w.admin).CreateWorkload(w.ctx, &portolanv1.CreateWorkloadRequest{Workload: &portolanv1.Workload{
		Name: api.WorkloadName("shop", id),
		Spec: &portolanv1.WorkloadSpec{Replicas: &replicas, Containers: []*portolanv1.Container{{
			Image: registry + "/shop/web:v1", Limits: &portolanv1.ResourceList{Cpu: "10m", Memory: "16Mi"},
		}}},
	}})
	if err != nil && w.ctx.Err() == nil {
		w.b.Errorf("create a workload: %v", err)
	}
}

// await waits until the cluster's state has the workload's intent.
func (w *world) await(id string) {
	ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
	defer cancel()
	for {
		s := w.state.Snapshot()
		if _, ok := s.Intents["workload/shop/"+id]; ok {
			return
		}
		w.must("wait for "+id+" at the cluster", w.state.Wait(ctx, s.Generation))
	}
}

package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/cockroach"
	"github.com/portolan-io/portolan/federation/store/storetest/pgtest"
)

// BenchmarkT5_PlaceCommit: from the commit of a workload to the commit of its
// placements over 100 clusters, on PostgreSQL with a disk that syncs.
func BenchmarkT5_PlaceCommit(b *testing.B) {
	url := pgtest.Postgres(b, "fsync=on", "full_page_writes=on").Database(b)
	if err := cockroach.Migrate(b.Context(), url); err != nil {
		b.Fatal(err)
	}
	s, err := cockroach.Open(b.Context(), cockroach.Config{URL: url})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	put := func(fn func(tx store.Tx) error) int64 {
		rev, err := s.Update(b.Context(), fn)
		if err != nil {
			b.Fatal(err)
		}
		return rev
	}
	put(func(tx store.Tx) error {
		for i := range 100 {
			name := fmt.Sprintf("clusters/c%02d", i)
			if err := tx.Put(store.Cluster, name, &portolanv1.Cluster{Name: name, Spec: &portolanv1.ClusterSpec{Region: fmt.Sprint(i % 20)}}); err != nil {
				return err
			}
			if err := tx.Put(store.ClusterStatus, name, status(ready, 1<<20)); err != nil {
				return err
			}
		}
		return nil
	})
	c, err := New(Config{Store: s, Holder: "bench", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	var took []time.Duration
	place := func() {
		name := fmt.Sprintf("tenants/t/workloads/w%d", len(took))
		rev := put(func(tx store.Tx) error {
			return tx.Put(store.Workload, name, &portolanv1.Workload{Name: name, Generation: 1, Spec: spec(200)})
		})
		start := time.Now()
		for v := c.mirror.Snapshot(); ; {
			if _, ok := v.Get(store.Placement, name+"/placements/c00"); ok {
				break
			}
			if v, err = c.mirror.Wait(b.Context(), max(rev, v.Revision+1)); err != nil {
				b.Fatal(err)
			}
		}
		took = append(took, time.Since(start))
	}
	// With -benchtime 1x too there are enough samples for a figure.
	for b.Loop() {
		for range 200 {
			place()
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100])/1e6, "p99-ms")
	b.ReportMetric(float64(took[len(took)/2])/1e6, "p50-ms")
}

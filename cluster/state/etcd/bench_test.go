package etcd

import (
	"fmt"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// BenchmarkCommitIntents is one changed intent of 1,000, made durable.
func BenchmarkCommitIntents(b *testing.B) {
	s, err := Open(b.Context(), Config{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	all := intents(1000)
	rev := int64(0)
	for b.Loop() {
		rev++
		all[fmt.Sprintf("service/t/s%d", rev%1000)] = intents(1)["service/t/s0"]
		if err := s.CommitIntents(b.Context(), rev, all, time.Unix(rev, 0)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommitAllocations is 200 new allocations on 100 nodes, made durable.
func BenchmarkCommitAllocations(b *testing.B) {
	s, err := Open(b.Context(), Config{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	n := 0
	for b.Loop() {
		c := state.Change{Base: s.Snapshot().Generation}
		for i := range 200 {
			n++
			c.PutAllocations = append(c.PutAllocations, &clusterv1.Allocation{Allocation: fmt.Sprintf("w-%d", n), Node: fmt.Sprintf("n%d", i%100)})
		}
		if err := s.Commit(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}

package live

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// The cluster has room, but no node has: a replica of lower priority makes it, and
// its events say why.
func TestPreemption(t *testing.T) {
	settle(t)
	free := int64(1 << 62)
	most := int64(0)
	for _, node := range []string{"eu-west-1", "eu-west-2"} {
		n, err := nodeInfo(always(t), "eu-west", node)
		if err != nil {
			t.Fatal(err)
		}
		room := n.GetAllocatableCpuMilli() - n.GetAllocatedCpuMilli() // proxies are among what is allocated
		free, most = min(free, room), max(most, room)
	}
	// One of low on each node; high fits no node beside one, and each without.
	low := free * 4 / 10
	high := most - low + 20
	if high+50 > free {
		t.Skipf("missing: nodes of eu-west that are about equally free; they have %dm and %dm", free, most)
	}
	const noSurge = "  update: {max_surge: 0, max_unavailable: 1}\n"
	apply(t, serviceOf("low", 2, fmt.Sprintf("%dm", low), noSurge+"  disruption: {max_unavailable: 1}\n  scheduling: {spread_key: node, max_skew: 1}"))
	t.Cleanup(func() { cli(t, "delete", "workload", "low", "-t", "shop") })
	before, _ := readyReplicas(t, 60*time.Second, "low", 2)
	if before[0].GetNode() == before[1].GetNode() {
		t.Fatalf("both replicas of low are on %s", before[0].GetNode())
	}
	apply(t, serviceOf("high", 1, fmt.Sprintf("%dm", high), noSurge+"  priority: 50"))
	t.Cleanup(func() { cli(t, "delete", "workload", "high", "-t", "shop"); settle(t) })
	_, took := readyReplicas(t, 90*time.Second, "high", 1)
	got, err := eventsOf(always(t), "low", "Preempted")
	if err != nil || len(got) != 1 || !strings.Contains(got[0], "a workload of higher priority needs its room") || strings.Contains(got[0], "shop/high") {
		t.Errorf("events Preempted: %q, %v", got, err)
	}
	if out := cli(t, "events", "-t", "shop"); !strings.Contains(out, "Preempted") {
		t.Errorf("`portolan events` does not show it:\n%s", out)
	}
	rs, err := listReplicas(always(t), "low")
	if err != nil || len(ready(rs)) != 1 {
		t.Errorf("%d of low are ready, %v; its budget lets 1 be missing", len(ready(rs)), err)
	}
	t.Logf("nodes have %dm and %dm free; high with %dm was ready after %s, one of low with %dm left", free, most, high, took.Round(time.Millisecond), low)
}

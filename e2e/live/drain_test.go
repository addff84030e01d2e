package live

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// setMode cordons, drains or frees a node.
func setMode(t *testing.T, cluster, node string, mode portolanv1.NodeMode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(always(t), 10*time.Second)
	defer cancel()
	_, err := portolanv1.NewClusterServiceClient(fleet.conn).SetNodeMode(ctx, &portolanv1.SetNodeModeRequest{Name: "clusters/" + cluster + "/nodes/" + node, Mode: mode})
	if err != nil {
		t.Fatalf("set the mode of %s: %v", node, err)
	}
}

func nodeInfo(ctx context.Context, cluster, node string) (*portolanv1.NodeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := portolanv1.NewClusterServiceClient(fleet.conn).ListNodes(ctx, &portolanv1.ListNodesRequest{Cluster: "clusters/" + cluster})
	if err != nil {
		return nil, err
	}
	for _, n := range r.GetNodes() {
		if last(n.GetName()) == node {
			return n, nil
		}
	}
	return nil, fmt.Errorf("node %s is not listed", node)
}

// service is a workload of the shop's binary in eu-west, with what is added to its
// spec.
func serviceOf(name string, replicas int, requests, more string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: %s
spec:
  replicas: %d
  containers:
  - image: %scatalog:v1
    requests: {cpu: %s}
    limits: {cpu: "4", memory: 32Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
  placement: {allowed_clusters: [eu-west]}
%s
`, name, replicas, image, requests, more)
}

// readyReplicas waits until exactly so many of a workload are there, ready.
func readyReplicas(t *testing.T, limit time.Duration, workload string, n int) ([]*portolanv1.Replica, time.Duration) {
	t.Helper()
	var rs []*portolanv1.Replica
	took := eventually(t, limit, fmt.Sprintf("%d ready replicas of %s", n, workload), func() error {
		var err error
		if rs, err = listReplicas(always(t), workload); err != nil {
			return err
		}
		if len(ready(rs)) != n || len(rs) != n {
			return fmt.Errorf("%d of %d are ready", len(ready(rs)), len(rs))
		}
		return nil
	})
	return rs, took
}

// A node is drained under load: replicas leave within the budget, no request fails,
// and the node says what still runs there.
func TestDrain(t *testing.T) {
	settle(t)
	apply(t, serviceOf("drained", 4, "50m", "  disruption: {max_unavailable: 1}"))
	t.Cleanup(func() { cli(t, "delete", "workload", "drained", "-t", "shop") })
	readyReplicas(t, 60*time.Second, "drained", 4)
	const node = "eu-west-1"
	on := func(rs []*portolanv1.Replica) int {
		n := 0
		for _, r := range rs {
			// A job that has ended is history, wherever it ran.
			ended := r.GetState() == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED || r.GetState() == portolanv1.ReplicaState_REPLICA_STATE_FAILED
			if r.GetNode() == node && !ended {
				n++
			}
		}
		return n
	}
	rs, err := listReplicas(always(t), "drained")
	if err != nil || on(rs) == 0 {
		t.Fatalf("%d replicas on %s, %v", on(rs), node, err)
	}
	l := startLoad(t, ingressOf["eu-west"][1], "/api/items", 50)
	t.Cleanup(func() { setMode(t, "eu-west", node, portolanv1.NodeMode_NODE_MODE_UNSPECIFIED) })
	began := time.Now()
	setMode(t, "eu-west", node, portolanv1.NodeMode_NODE_MODE_DRAINING)
	least, blocked := 4, ""
	took := eventually(t, 3*time.Minute, node+" is empty", func() error {
		rs, err := listReplicas(always(t), "drained")
		if err != nil {
			return err
		}
		least = min(least, len(ready(rs)))
		info, err := nodeInfo(always(t), "eu-west", node)
		if err != nil {
			return err
		}
		if b := info.GetBlocked(); len(b) > 0 && blocked == "" {
			blocked = fmt.Sprint(b)
		}
		all, err := listReplicas(always(t), "-")
		if err != nil {
			return err
		}
		if n := on(all); n > 0 {
			return fmt.Errorf("%d replicas of the shop are left: %v", n, info.GetBlocked())
		}
		return nil
	})
	total, failed := l.Stop()
	if least < 3 {
		t.Errorf("only %d of 4 were ready at a time; the budget lets 1 be missing", least)
	}
	if blocked == "" {
		t.Error("the node never said what still ran there")
	}
	if failed > 0 {
		t.Errorf("%d of %d requests failed: %s%s", failed, total, l.first, l.lastFailure(began))
	}
	got, err := eventsOf(always(t), "drained", "Drained")
	if err != nil || len(got) == 0 || !strings.Contains(got[0], "NodeDraining") {
		t.Errorf("events Drained: %q, %v", got, err)
	}
	t.Logf("drained in %s: at least %d of 4 ready, %d requests, %d failed; first blocked by %s", took.Round(time.Millisecond), least, total, failed, blocked)
	readyReplicas(t, 60*time.Second, "drained", 4)
}

func period(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

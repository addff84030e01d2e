package cli

import (
	"slices"
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// A node is drained when nothing runs there. That nothing is said to block it is not
// enough: right after the drain was asked for, the cluster has not looked yet.
func TestStillThere(t *testing.T) {
	draining := portolanv1.NodeMode_NODE_MODE_DRAINING
	nodes := []*portolanv1.NodeInfo{
		{Name: "clusters/eu/nodes/n1", Mode: draining, Replicas: 2},
		{Name: "clusters/eu/nodes/n2", Mode: draining, Replicas: 1, Blocked: []*portolanv1.Reason{{Code: "BudgetExhausted", Message: "t/web: 1 of 2 must stay"}}},
		{Name: "clusters/eu/nodes/n3", Mode: draining},
		{Name: "clusters/eu/nodes/n4", Replicas: 7},
	}
	drained := map[string]bool{"clusters/eu/nodes/n1": true, "clusters/eu/nodes/n2": true, "clusters/eu/nodes/n3": true}
	got, err := stillThere(nodes, drained)
	if want := []string{"n1: 2 replicas", "n2: t/web: 1 of 2 must stay"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
	nodes[0].Replicas, nodes[1].Replicas, nodes[1].Blocked = 0, 0, nil
	if got, err := stillThere(nodes, drained); err != nil || len(got) > 0 {
		t.Errorf("empty nodes: %q, %v", got, err)
	}
	nodes[0].Replicas, nodes[0].Mode = 1, portolanv1.NodeMode_NODE_MODE_UNSPECIFIED
	if _, err := stillThere(nodes, drained); err == nil || !strings.Contains(err.Error(), "n1 is drained no more") {
		t.Errorf("a node that was freed meanwhile: %v", err)
	}
}

package server

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// A tenant learns what the nearest node lacks, and what to ask for instead; not which
// node it is, nor what to do with it.
func TestTenantsSeeNoNodes(t *testing.T) {
	v := &portolanv1.NodeVerdict{
		Cluster: "eu", Replica: "r1", Nearest: "n1", NearestReason: "500m of CPU more",
		Remedies: []*portolanv1.Reason{{Code: "AskLessCPU"}, {Code: "FreeCPU", Message: "free 500m on n1"}},
	}
	withoutNodes(v)
	want := &portolanv1.NodeVerdict{Cluster: "eu", Replica: "r1", NearestReason: "500m of CPU more", Remedies: []*portolanv1.Reason{{Code: "AskLessCPU"}}}
	if !proto.Equal(v, want) {
		t.Errorf("a tenant sees %v", v)
	}
}

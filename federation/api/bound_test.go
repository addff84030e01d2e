package api

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func TestBoundCutsTextAndLists(t *testing.T) {
	long := strings.Repeat("é", 4000)
	m := &nodev1.NodeReport{
		Allocations: []*nodev1.AllocationStatus{{Allocation: "web-aaaaa", Reason: &portolanv1.Reason{Code: "Error", Message: long}}},
		Facts:       &nodev1.NodeFacts{Labels: map[string]string{long: "v", "a": long}, Taints: []*portolanv1.Taint{{Key: "k"}}},
	}
	for i := range 300 {
		m.Removed = append(m.Removed, fmt.Sprint(i))
		m.Allocations[0].Containers = append(m.Allocations[0].Containers, &portolanv1.ContainerState{Name: long})
		m.Facts.Labels[fmt.Sprintf("l%03d", i)] = "v"
	}
	if !Bound(m, MaxTextBytes, MaxListItems) {
		t.Error("nothing was said to be cut")
	}
	a := m.GetAllocations()[0]
	for _, text := range []string{a.GetReason().GetMessage(), a.GetContainers()[0].GetName(), m.GetFacts().GetLabels()["a"]} {
		if len(text) > MaxTextBytes+len("…") || !utf8.ValidString(text) || !strings.HasSuffix(text, "…") {
			t.Errorf("%d bytes, valid %t", len(text), utf8.ValidString(text))
		}
	}
	labels := m.GetFacts().GetLabels()
	_, first := labels["l000"]
	_, last := labels["l299"]
	if len(a.GetContainers()) != MaxListItems || len(m.GetRemoved()) != MaxListItems || len(labels) != MaxListItems || !first || last || labels[long] != "" {
		t.Errorf("%d containers, %d removed, %d labels", len(a.GetContainers()), len(m.GetRemoved()), len(labels))
	}
	if a.GetAllocation() != "web-aaaaa" || a.GetReason().GetCode() != "Error" {
		t.Errorf("what fits was changed: %v", a.GetReason().GetCode())
	}
	before := proto.CloneOf(m)
	if Bound(m, MaxTextBytes+len("…"), MaxListItems) || !proto.Equal(before, m) {
		t.Error("what fits was cut")
	}
}

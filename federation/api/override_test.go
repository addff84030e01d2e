package api

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func TestLayOver(t *testing.T) {
	list := func(cpu, memory string) *portolanv1.ResourceList {
		if cpu+memory == "" {
			return nil
		}
		return &portolanv1.ResourceList{Cpu: cpu, Memory: memory}
	}
	for _, c := range []struct {
		name                               string
		requests, limits, over, overLimits *portolanv1.ResourceList
		wantRequests, wantLimits           *portolanv1.ResourceList
	}{
		{"a limit raises the request that follows from it", list("1", "1Gi"), list("1", "1Gi"), nil, list("5", ""), list("5", "1Gi"), list("5", "1Gi")},
		{"and lowers it", list("1", "1Gi"), list("1", "1Gi"), nil, list("500m", ""), list("500m", "1Gi"), list("500m", "1Gi")},
		{"a request of its own stays", list("200m", "1Gi"), list("1", "1Gi"), nil, list("5", ""), list("200m", "1Gi"), list("5", "1Gi")},
		{"one that is given counts", list("1", "1Gi"), list("1", "1Gi"), list("2", ""), list("5", "2Gi"), list("2", "2Gi"), list("5", "2Gi")},
		{"without a limit before", list("1", ""), nil, nil, list("5", ""), list("1", ""), list("5", "")},
		{"only a request", list("1", "1Gi"), list("1", "2Gi"), list("", "2Gi"), nil, list("1", "2Gi"), list("1", "2Gi")},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &portolanv1.WorkloadSpec_ContainerOverride{Name: "main", Requests: c.over, Limits: c.overLimits}
			before := proto.CloneOf(o)
			got := &portolanv1.Container{Requests: c.requests, Limits: c.limits}
			LayOver(got, o)
			if diff := cmp.Diff(&portolanv1.Container{Requests: c.wantRequests, Limits: c.wantLimits}, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
			if !proto.Equal(before, o) {
				t.Errorf("the override changed to %v", o)
			}
		})
	}
	other := &portolanv1.Container{Name: "sidecar", Limits: list("1", "")}
	LayOver(other, &portolanv1.WorkloadSpec_ContainerOverride{Name: "main", Limits: list("5", "")})
	if other.GetLimits().GetCpu() != "1" {
		t.Errorf("another container changed: %v", other)
	}
}

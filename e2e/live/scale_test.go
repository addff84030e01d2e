package live

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Replicas that use more than the target are joined by others, and go when the load
// does.
func TestAutoscale(t *testing.T) {
	settle(t)
	ctx, cancel := context.WithTimeout(always(t), 10*time.Second)
	defer cancel()
	_, err := portolanv1.NewWorkloadServiceClient(fleet.conn).UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{AllowMissing: true, Workload: &portolanv1.Workload{
		Name: "tenants/shop/workloads/scaled",
		Spec: &portolanv1.WorkloadSpec{
			Replicas: new(int32(2)),
			Containers: []*portolanv1.Container{{
				Image: image + "catalog:v1", Requests: &portolanv1.ResourceList{Cpu: "100m"}, Limits: &portolanv1.ResourceList{Cpu: "100m", Memory: "32Mi"},
				Readiness: &portolanv1.Probe{Check: &portolanv1.Probe_Http{Http: &portolanv1.Probe_HttpCheck{Path: "/healthz", Port: 8080}}, Period: period(time.Second)},
			}},
			Placement: &portolanv1.WorkloadSpec_Placement{AllowedClusters: []string{"eu-west"}},
			Autoscale: &portolanv1.Autoscale{
				Min: new(int32(1)), Max: 4, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU, Target: 50}},
				Down: &portolanv1.ScaleRule{Stabilization: period(20 * time.Second)},
			},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cli(t, "delete", "workload", "scaled", "-t", "shop") })
	rs, _ := readyReplicas(t, 60*time.Second, "scaled", 2)
	const burning = 60
	for _, r := range rs {
		if out := inReplica(t, r, "POST", "/burn?seconds=60"); !strings.Contains(out, "202") {
			t.Fatalf("burn in %s: %s", last(r.GetName()), out)
		}
	}
	// Two that use all of what they ask for, at a target of half: four.
	_, up := readyReplicas(t, burning*time.Second, "scaled", 4)
	_, down := readyReplicas(t, burning*time.Second+150*time.Second, "scaled", 1)
	got, err := eventsOf(always(t), "scaled", "Scaled")
	if err != nil || len(got) < 2 || !strings.Contains(got[0], "ScaledUp") || !strings.Contains(got[len(got)-1], "ScaledDown") {
		t.Errorf("events Scaled: %q, %v", got, err)
	}
	t.Logf("load began → four ready %s; → one left %s later: %q", up.Round(time.Millisecond), down.Round(time.Millisecond), got)
}

package api

import (
	"math"
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func TestParseCPU(t *testing.T) {
	for in, want := range map[string]int64{"": 0, "0": 0, "2": 2000, "250m": 250, "0.5": 500, "1.0001": 1001, "0.1m": 1, "100000": 100_000_000} {
		if got, err := ParseCPU(in); err != nil || got != want {
			t.Errorf("ParseCPU(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"-1", "+1", "1e3", "m", ".5", "5.", "1..2", "1.2.3", "1M", "1 ", "0x10", "1/2", "99999999999999999999", strings.Repeat("9", 40)} {
		if got, err := ParseCPU(in); err == nil {
			t.Errorf("ParseCPU(%q) = %d, want an error", in, got)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]int64{"": 0, "0": 0, "1048576": 1 << 20, "64Mi": 64 << 20, "1.5Gi": 3 << 29, "1G": 1e9, "1k": 1000, "0.5": 1, "7Ei": 7 << 60} {
		if got, err := ParseBytes(in); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"-1", "64MiB", "64mi", "Mi", "1e3", "8Ei", "1 Gi", "64m", "1K", "1/2Mi"} {
		if got, err := ParseBytes(in); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", in, got)
		}
	}
}

func TestRequestsOf(t *testing.T) {
	spec := &portolanv1.WorkloadSpec{
		Containers: []*portolanv1.Container{
			{Requests: &portolanv1.ResourceList{Cpu: "100m"}, Limits: &portolanv1.ResourceList{Cpu: "1", Memory: "64Mi"}},
			{Limits: &portolanv1.ResourceList{Cpu: "200m", Memory: "1Mi"}},
		},
		InitContainers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "50m", Memory: "128Mi"}}},
	}
	got, err := RequestsOf(spec)
	if want := (Resources{CPUMilli: 300, MemoryBytes: 128 << 20}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	spec.Containers[1].Limits.Memory = "lots"
	if _, err := RequestsOf(spec); err == nil || !strings.HasPrefix(err.Error(), "spec.containers[1].limits.memory") {
		t.Errorf("error %v does not name the field", err)
	}
}

func TestResourcesSaturate(t *testing.T) {
	r := Resources{CPUMilli: math.MaxInt64 / 2, MemoryBytes: 10}
	if got := r.Times(3); got.CPUMilli != math.MaxInt64 || got.MemoryBytes != 30 {
		t.Errorf("got %+v", got)
	}
	if got := r.Times(2).Add(r); got.CPUMilli != math.MaxInt64 {
		t.Errorf("got %+v", got)
	}
}

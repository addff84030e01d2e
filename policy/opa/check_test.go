package opa

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/portolan-io/portolan/policy"
)

const limitsTestRego = `package portolan.admission_test

import data.portolan.admission

test_memory_is_required if {
	count(admission.deny) == 1 with input as {"object": {"spec": {"containers": [{"name": "a", "image": "x"}]}}}
}

test_wrong if {
	print("containers:", 2)
	admission.deny == {"something"} with input as {}
}

todo_test_later if {
	false
}

test_table[name] if {
	some name, c in {"latest": {"image": "r/a:latest", "want": 1}, "digest": {"image": "r/a@sha256:1", "want": 7}}
	got := admission.deny with input as {"object": {"spec": {"containers": [{"name": "a", "image": c.image, "limits": {"memory": "1"}}]}}}
	count(got) == c.want
}
`

func TestRunTests(t *testing.T) {
	b := admission("policyBundles/limits", "limits.rego", limitsRego, "limits_test.rego", limitsTestRego)
	r := RunTests(t.Context(), b, Limits{})
	if r.OK() {
		t.Error("OK, although tests fail")
	}
	want := []TestResult{
		{Name: "data.portolan.admission_test.test_memory_is_required", Location: policy.Location{File: "limits_test.rego", Row: 5, Col: 1}, Outcome: Passed},
		{Name: "data.portolan.admission_test.test_wrong", Location: policy.Location{File: "limits_test.rego", Row: 9, Col: 1}, Outcome: Failed, Message: "failed", Output: "containers: 2\n"},
		{Name: "data.portolan.admission_test.todo_test_later", Location: policy.Location{File: "limits_test.rego", Row: 14, Col: 1}, Outcome: Skipped},
		{Name: "data.portolan.admission_test.test_table", Location: policy.Location{File: "limits_test.rego", Row: 18, Col: 1}, Outcome: Failed, Message: "failed in digest"},
	}
	if diff := cmp.Diff(want, r.Results, cmpopts.IgnoreFields(TestResult{}, "Took")); diff != "" {
		t.Error(diff)
	}
	if len(r.Files) != 1 || r.Files[0].File != "limits.rego" {
		t.Fatalf("%+v", r.Files)
	}
	// The DELETE rule is tested by nobody.
	f := r.Files[0]
	if diff := cmp.Diff([]int{16, 17, 18, 19}, f.UncoveredLines); diff != "" {
		t.Error(diff)
	}
	if f.Percent <= 50 || f.Percent >= 100 || f.Percent != r.Percent || f.Lines != f.Covered+4 {
		t.Errorf("%+v %v", f, r.Percent)
	}
	var faults []string
	for _, v := range Check(t.Context(), b) {
		faults = append(faults, v.String())
	}
	wantFaults := []string{
		`spec.files["limits_test.rego"]: limits_test.rego:9: data.portolan.admission_test.test_wrong failed (rule data.portolan.admission_test.test_wrong, limits_test.rego:9)`,
		`spec.files["limits_test.rego"]: limits_test.rego:18: data.portolan.admission_test.test_table failed in digest (rule data.portolan.admission_test.test_table, limits_test.rego:18)`,
	}
	if diff := cmp.Diff(wantFaults, faults); diff != "" {
		t.Error(diff)
	}
}

func TestCheckAcceptsWhatCompiles(t *testing.T) {
	for _, b := range []policy.Bundle{
		admission("policyBundles/a", "a.rego", limitsRego),
		network("tenants/shop/policyBundles/n", "default allow := false\n\nallow if input.port == 80"),
	} {
		if vs := Check(t.Context(), b); len(vs) > 0 {
			t.Errorf("%s: %v", b.Name, vs)
		}
	}
}

func TestAnErrorOfABuiltinFailsATestOfAdmission(t *testing.T) {
	b := admission("policyBundles/a", "a.rego", "package portolan.admission\n\ndeny contains \"big\" if units.parse_bytes(input.size) > 1",
		"a_test.rego", "package portolan.admission_test\n\ntest_a if count(data.portolan.admission.deny) == 0 with input.size as \"many\"")
	vs := Check(t.Context(), b)
	if len(vs) != 1 || vs[0].File != "a_test.rego" || vs[0].Line != 3 || !strings.Contains(vs[0].Message, "units.parse_bytes") {
		t.Errorf("%+v", vs)
	}
}

func TestEndlessTestsEnd(t *testing.T) {
	b := network("policyBundles/slow", slow)
	b.Files["n_test.rego"] = "package portolan.network_test\n\ntest_slow if data.portolan.network.allow with input.service as \"none\""
	start := time.Now()
	r := RunTests(t.Context(), b, Limits{Test: 20 * time.Millisecond, Tests: 10 * time.Second})
	if r.OK() || len(r.Results) != 1 || r.Results[0].Outcome != Errored {
		t.Errorf("%+v", r)
	}
	r = RunTests(t.Context(), b, Limits{Test: 20 * time.Second, Tests: 20 * time.Millisecond})
	if r.OK() {
		t.Errorf("%+v", r)
	}
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestKindOf(t *testing.T) {
	for want, files := range map[string]map[string]string{
		KindAdmission: {"a.rego": "package portolan.admission\n\ndeny contains 1", "lib.rego": "package lib"},
		KindNetwork:   {"a.rego": "package portolan.network\n\nallow := true"},
		"":            {"a.rego": "package portolan.network\n\nallow := true", "b.rego": "package portolan.admission\n\nx := 1"},
	} {
		if got := KindOf(files); got != want {
			t.Errorf("%v: %q", files, got)
		}
	}
}

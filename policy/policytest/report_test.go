package policytest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
	"github.com/portolan-io/portolan/policy/opa"
)

func writeBundle(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for p, text := range files {
		if err := os.WriteFile(filepath.Join(dir, p), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestReportOfAFolder(t *testing.T) {
	dir := writeBundle(t, map[string]string{
		"policy.rego":      "package portolan.network\n\ndefault allow := false\n\nallow if {\n\tinput.source.workload == \"web\"\n}\n\nallow if {\n\tinput.port == 1\n}\n",
		"policy_test.rego": "package portolan.network_test\n\nimport data.portolan.network\n\ntest_web if network.allow with input.source.workload as \"web\"\n\ntest_other if not network.allow with input.source.workload as \"spy\"\n",
		"README.md":        "not a policy",
	})
	files, err := bundle.LoadDir(dir, bundle.Limits{})
	b := policy.Bundle{Name: "policyBundles/local", Kind: opa.KindOf(files), Files: files}
	if err != nil || b.Kind != "network" || len(b.Files) != 2 {
		t.Fatalf("%+v %v", b, err)
	}
	r := runTests(t, b)
	if !r.OK() || len(r.Results) != 2 || len(r.Files) != 1 {
		t.Fatalf("%+v", r)
	}
	if !slices.Contains(r.Files[0].UncoveredLines, 9) || r.Percent >= 100 || slices.Contains(r.Files[0].UncoveredLines, 6) {
		t.Errorf("%+v", r.Files[0])
	}
	if files, err := bundle.LoadDir(writeBundle(t, map[string]string{"a.rego": "package x"}), bundle.Limits{}); err != nil || opa.KindOf(files) != "" {
		t.Errorf("a folder without a decision is of kind %q, %v", opa.KindOf(files), err)
	}
	if r := runTests(t, policy.Bundle{Name: "policyBundles/x", Kind: "network", Files: map[string]string{"a.rego": "package portolan.network\n\nallow if nope("}}); r.OK() || len(r.Violations) == 0 || r.Violations[0].Line != 3 {
		t.Errorf("%+v", r)
	}
}

type constant bool

func (c constant) Authorize(context.Context, policy.Network) policy.Decision {
	return policy.Decision{Allowed: bool(c)}
}

func TestDiffer(t *testing.T) {
	a := openOPA(t, []policy.Bundle{network("tenants/shop/policyBundles/n", "allow if input.source.workload == \"web\"")})
	web, spy := Peer("eu-west", "shop", "web"), Peer("eu-west", "shop", "spy")
	in := []policy.Network{Call(web, spy, "GET", "/a/b"), Call(spy, web, "GET", "/")}
	Differ(t.Context(), t, a, a, in)
	probe := &testing.T{}
	Differ(t.Context(), probe, a, constant(true), in)
	if !probe.Failed() {
		t.Error("two that differ were not told apart")
	}
	if got := Call(web, spy, "GET", "/a/b").ParsedPath; !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%v", got)
	}
}

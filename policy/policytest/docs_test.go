package policytest

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

func runTests(t *testing.T, b policy.Bundle) opa.TestReport {
	t.Helper()
	return opa.RunTests(t.Context(), b, opa.Limits{})
}

// regoBlocks gives the Rego of a guide, in order.
func regoBlocks(t *testing.T, file string) []string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, part := range strings.Split(string(text), "```rego\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		out = append(out, block)
	}
	return out
}

// The guide's own policies must be accepted, and behave as it says.
func TestTheGuideIsRight(t *testing.T) {
	blocks := regoBlocks(t, "../../docs/write-a-policy.md")
	if len(blocks) != 4 {
		t.Fatalf("%d blocks of Rego in the guide", len(blocks))
	}
	r := runTests(t, policy.Bundle{Name: "tenants/shop/policyBundles/calls", Kind: "network", Files: map[string]string{"calls.rego": blocks[0], "calls_test.rego": blocks[1]}})
	if !r.OK() || len(r.Results) != 3 {
		t.Fatalf("%+v", r)
	}
	// "here those of the second allow"
	if diff := cmp.Diff([]int{12, 13, 14, 15}, r.Files[0].UncoveredLines); diff != "" {
		t.Error(diff)
	}
	answer := "package portolan.network\n\n" + blocks[2] + "\ntoo_many if input.port == 1\n"
	if r := runTests(t, policy.Bundle{Name: "policyBundles/a", Kind: "network", Files: map[string]string{"a.rego": answer}}); !r.OK() {
		t.Errorf("%+v", r)
	}
	if r := runTests(t, policy.Bundle{Name: "policyBundles/memory", Kind: "admission", Files: map[string]string{"memory.rego": blocks[3]}}); !r.OK() {
		t.Errorf("%+v", r)
	}
}

// Package policytest runs the tests of policy bundles, for authors, and holds the
// suite that every policy.Authorizer must pass, with a differential check of two
// of them on the same inputs. It owns no engine and never prints: what a report
// looks like is its reader's business.
//
// Concurrency: functions only, safe for concurrent use.
package policytest

import (
	"context"
	"fmt"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
	"github.com/portolan-io/portolan/policy/opa"
)

// Report is the outcome of the tests of one bundle.
type Report = opa.TestReport

// Result is one test.
type Result = opa.TestResult

// FileCoverage is the coverage of one file.
type FileCoverage = opa.FileCoverage

// The outcomes of a test.
const (
	Passed  = opa.Passed
	Failed  = opa.Failed
	Errored = opa.Errored
	Skipped = opa.Skipped
)

// RunTests compiles a bundle under the rules that the server applies, and runs
// its tests. A bundle that does not compile is a report with violations.
func RunTests(ctx context.Context, b policy.Bundle) Report {
	return opa.RunTests(ctx, b, opa.Limits{})
}

// LoadDir makes a bundle of a folder, for RunTests. The kind follows from the
// entry package; the name is a stand-in where none is given.
func LoadDir(dir, name string) (policy.Bundle, error) {
	files, err := bundle.LoadDir(dir, bundle.Limits{})
	if err != nil {
		return policy.Bundle{}, err
	}
	b := policy.Bundle{Name: name, Kind: opa.KindOf(files), Files: files}
	if b.Name == "" {
		b.Name = "policyBundles/local"
	}
	if b.Kind == "" {
		return b, api.E(api.Invalid, "load policy bundle "+dir, "%s", fmt.Sprintf(
			"found files, but no package %s or %s (or both) that parses", opa.EntryPackage(opa.KindAdmission), opa.EntryPackage(opa.KindNetwork)))
	}
	return b, nil
}

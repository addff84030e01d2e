package opa

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/policy"
)

// Outcome of a test.
type Outcome string

// The outcomes. Skipped is a rule named todo_test_….
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Errored Outcome = "error"
	Skipped Outcome = "skipped"
)

// TestResult is one test rule.
type TestResult struct {
	// Name in full, "data.portolan.admission_test.test_latest_is_refused".
	Name     string
	Location policy.Location
	Outcome  Outcome
	// Message says why it did not pass.
	Message string
	// Output of print.
	Output string
	Took   time.Duration
}

// FileCoverage says which lines of a file the tests evaluated.
type FileCoverage struct {
	File           string
	Covered, Lines int
	UncoveredLines []int
	Percent        float64
}

// TestReport is the outcome of all tests of a bundle.
type TestReport struct {
	// Violations say why the tests could not be run; there are no results then.
	Violations []api.Violation
	// Results by place.
	Results []TestResult
	// Files that are served, in order, without tests.
	Files []FileCoverage
	// Percent over all of them; 100 when there is nothing to cover.
	Percent float64
}

// OK says that all tests passed, or that there are none.
func (r TestReport) OK() bool {
	return len(r.Violations) == 0 && !slices.ContainsFunc(r.Results, func(t TestResult) bool {
		return t.Outcome == Failed || t.Outcome == Errored
	})
}

// Faults gives violations and what did not pass, with file and line.
func (r TestReport) Faults() []api.Violation {
	vs := slices.Clone(r.Violations)
	for _, t := range r.Results {
		if t.Outcome == Failed || t.Outcome == Errored {
			v := violation(&ast.Location{File: t.Location.File, Row: t.Location.Row}, t.Name+" "+t.Message)
			v.Rule = t.Name
			vs = append(vs, v)
		}
	}
	return vs
}

// Check says all that is wrong with a bundle: paths, sizes, syntax, types,
// built-ins, the shape of its decision, and tests that do not pass. An empty
// answer means that Compile accepts it.
func Check(ctx context.Context, b policy.Bundle) []api.Violation {
	return RunTests(ctx, b, Limits{}).Faults()
}

// RunTests compiles a bundle and runs its tests, all rules named test_…, with
// coverage of the files that are served.
func RunTests(ctx context.Context, b policy.Bundle, l Limits) TestReport {
	l = l.withDefaults()
	if _, vs := compileBundle(b, l); len(vs) > 0 {
		return TestReport{Violations: vs}
	}
	m, vs := parse(b, l)
	if len(vs) > 0 {
		return TestReport{Violations: vs}
	}
	ctx, cancel := context.WithTimeout(ctx, l.Tests)
	defer cancel()
	coverage := cover.New()
	store := inmem.New()
	txn, err := store.NewTransaction(ctx, storage.WriteParams)
	if err != nil {
		return TestReport{Violations: []api.Violation{{Field: "spec.files", Message: "run the tests: " + err.Error()}}}
	}
	compiler := ast.NewCompiler().WithCapabilities(capabilities()).WithDefaultRegoVersion(ast.RegoV1).WithEnablePrintStatements(true)
	results, err := tester.NewRunner().SetCompiler(compiler).SetStore(store).SetModules(m.all).SetCoverageQueryTracer(coverage).
		SetTimeout(l.Test).SetParallel(1).CapturePrintOutput(true).RaiseBuiltinErrors(b.Kind == KindAdmission).RunTests(ctx, txn)
	if err != nil {
		store.Abort(context.WithoutCancel(ctx), txn)
		return TestReport{Violations: violations(err, "")}
	}
	report, done := collect(ctx, results, l.Tests)
	if !done {
		// The tests still run: what they have covered must not be read, and the
		// transaction stays theirs. The store goes with them.
		return report
	}
	store.Abort(context.WithoutCancel(ctx), txn)
	report.cover(coverage, m)
	return report
}

// collect reads results until the end or the deadline. A test that cannot be
// stopped is left to end by itself.
func collect(ctx context.Context, results chan *tester.Result, limit time.Duration) (r TestReport, done bool) {
	defer func() {
		slices.SortStableFunc(r.Results, func(a, b TestResult) int {
			return cmp.Or(cmp.Compare(a.Location.File, b.Location.File), cmp.Compare(a.Location.Row, b.Location.Row), cmp.Compare(a.Name, b.Name))
		})
	}()
	for {
		select {
		case t, ok := <-results:
			if !ok {
				return r, true
			}
			r.Results = append(r.Results, testResult(t))
		case <-ctx.Done():
			go func() {
				for range results {
				}
			}()
			r.Violations = append(r.Violations, api.Violation{Field: "spec.files", Message: fmt.Sprintf("the tests did not end within %s", limit)})
			return r, false
		}
	}
}

const maxOutput = 16 << 10

func testResult(t *tester.Result) TestResult {
	out := TestResult{Name: t.Package + "." + t.Name, Location: location(t.Location), Took: t.Duration, Outcome: Passed}
	if o := t.Output; len(o) > maxOutput {
		out.Output = string(o[:maxOutput]) + "…"
	} else {
		out.Output = string(o)
	}
	switch {
	case t.Skip:
		out.Outcome = Skipped
	case t.Error != nil:
		out.Outcome, out.Message = Errored, "ended with an error: "+t.Error.Error()
	case t.Fail:
		out.Outcome, out.Message = Failed, "failed"+failedCases(t.SubResults)
	}
	return out
}

// failedCases names the cases of a table test that failed.
func failedCases(cases tester.SubResultMap) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		if cases[name].Fail {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return " in " + strings.Join(names, ", ")
}

// cover fills in the coverage of what is served.
func (r *TestReport) cover(c *cover.Cover, m modules) {
	served := make(map[string]*ast.Module, len(m.served))
	for _, p := range m.served {
		served[p] = m.all[p]
	}
	rep := c.Report(served)
	covered, lines := 0, 0
	for _, p := range m.served {
		f := FileCoverage{File: p, Percent: 100}
		if fr := rep.Files[p]; fr != nil {
			rows := map[int]bool{}
			for _, n := range fr.NotCovered {
				for row := n.Start.Row; row <= n.End.Row; row++ {
					rows[row] = true
				}
			}
			for row := range rows {
				if fr.IsCovered(row) {
					delete(rows, row)
				}
			}
			f.UncoveredLines = slices.Sorted(maps.Keys(rows))
			f.Covered = fr.CoveredLines
			f.Lines = f.Covered + len(f.UncoveredLines)
		}
		f.Percent = percent(f.Covered, f.Lines)
		covered, lines = covered+f.Covered, lines+f.Lines
		r.Files = append(r.Files, f)
	}
	r.Percent = percent(covered, lines)
}

func percent(part, whole int) float64 {
	if whole == 0 {
		return 100
	}
	return 100 * float64(part) / float64(whole)
}

// KindOf guesses the kind of a bundle from its packages; empty when no file, or
// files of both kinds, have an entry package.
func KindOf(files map[string]string) string {
	kind := ""
	for _, p := range slices.Sorted(maps.Keys(files)) {
		mod, err := ast.ParseModuleWithOpts(p, files[p], ast.ParserOptions{Capabilities: capabilities(), RegoVersion: ast.RegoV1})
		if err != nil || mod == nil {
			continue
		}
		for _, k := range []string{KindAdmission, KindNetwork} {
			if mod.Package.Path.Equal(ast.MustParseRef("data." + EntryPackage(k))) {
				if kind != "" && kind != k {
					return ""
				}
				kind = k
			}
		}
	}
	return kind
}

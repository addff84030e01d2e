package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
	"github.com/portolan-io/portolan/policy/opa"
)

func (a *app) policyCommand() *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Work on policies", GroupID: "fleet", Example: "  portolan policy test policies/calls"}
	var verbose bool
	test := &cobra.Command{
		Use: "test DIR", Short: "Run a bundle's Rego tests, with coverage", Args: cobra.ExactArgs(1),
		Long: `Compiles the folder's .rego files under the rules that the server applies, runs the
tests of its _test.rego files and shows which lines they reached. The server does
the same before it accepts a bundle. The exit code is 1 when anything fails.`,
		Example: `  portolan policy test policies/calls
  portolan policy test policies/calls -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			files, err := bundle.LoadDir(args[0], bundle.Limits{})
			if err != nil {
				return err
			}
			b := policy.Bundle{Name: "policyBundles/local", Kind: opa.KindOf(files), Files: files}
			if b.Kind == "" {
				return fmt.Errorf("%s has no package portolan.admission or portolan.network that can be read", args[0])
			}
			r := opa.RunTests(cmd.Context(), b, opa.Limits{})
			if a.output == "json" || a.output == "yaml" {
				err = a.encode(r)
			} else {
				a.report(r, verbose)
			}
			if err == nil && !r.OK() {
				err = exitCode(1)
			}
			return err
		},
	}
	a.outputFlag(test)
	test.Flags().BoolVar(&verbose, "verbose", false, "show each test and each line not reached")
	c.AddCommand(test)
	return c
}

func (a *app) report(r opa.TestReport, verbose bool) {
	for _, v := range r.Violations {
		a.printf("refused: %s\n", v)
	}
	counts := map[opa.Outcome]int{}
	for _, t := range r.Results {
		counts[t.Outcome]++
		if verbose || t.Outcome == opa.Failed || t.Outcome == opa.Errored {
			a.printf("%-7s %s (%s:%d, %s)\n", t.Outcome, t.Name, t.Location.File, t.Location.Row, t.Took.Round(time.Microsecond))
			if t.Message != "" {
				a.printf("        %s\n", t.Message)
			}
		}
		if t.Output != "" {
			a.printf("%s", t.Output)
		}
	}
	if len(r.Violations) > 0 {
		return
	}
	if len(r.Files) > 0 {
		t := newTable("FILE", "COVERED", "LINES", "NOT REACHED")
		for _, f := range r.Files {
			t.add(f.File, fmt.Sprintf("%.0f %%", f.Percent), fmt.Sprint(f.Lines), lineRanges(f.UncoveredLines))
		}
		a.print(t)
	}
	a.printf("\n%d passed, %d failed, %d skipped; %.0f %% of the lines covered\n", counts[opa.Passed], counts[opa.Failed]+counts[opa.Errored], counts[opa.Skipped], r.Percent)
}

// lineRanges writes 3,4,5,9 as "3-5, 9".
func lineRanges(lines []int) string {
	out := ""
	for i := 0; i < len(lines); {
		j := i
		for j+1 < len(lines) && lines[j+1] == lines[j]+1 {
			j++
		}
		if out != "" {
			out += ", "
		}
		out += fmt.Sprint(lines[i])
		if j > i {
			out += fmt.Sprintf("-%d", lines[j])
		}
		i = j + 1
	}
	return orDash(out)
}

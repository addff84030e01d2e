package autoscale

import (
	"flag"
	"fmt"
	"os"
	"testing"
)

// TestMain takes the number of random cases of each property from SIM_CASES (see
// `make sim`); 300 when absent.
func TestMain(m *testing.M) {
	flag.Parse()
	cases := os.Getenv("SIM_CASES")
	if cases == "" {
		cases = "300"
	}
	explicit := false
	flag.Visit(func(f *flag.Flag) { explicit = explicit || f.Name == "rapid.checks" })
	if !explicit {
		if err := flag.Set("rapid.checks", cases); err != nil {
			fmt.Fprintln(os.Stderr, "SIM_CASES:", err)
			os.Exit(2)
		}
	}
	os.Exit(m.Run())
}

package sim

import (
	"reflect"
	"strings"
	"testing"
)

// TestPlantedBugs: each bug that is planted where the cores are fed, or where their
// plans are carried out, breaks an invariant within a few lives of a cluster, and
// what is told names it.
func TestPlantedBugs(t *testing.T) {
	// Words of what must be found: a check that fires for another reason proves
	// nothing.
	found := map[string]string{
		"surgeOffByOne":     "are the most",
		"parallelOffByOne":  "replicas at a time in run",
		"maxIgnored":        "are the most",
		"exclusiveDropped":  "may have one process in the world",
		"intentStale":       "invariant 13",
		"taintHidden":       "whose labels and taints refuse it",
		"modeHidden":        "was bound to",
		"apartDropped":      "keeps apart from",
		"capacityStale":     "has promised",
		"budgetIgnored":     "are the least",
		"roomFreedEarly":    "has promised",
		"volumeAnywhere":    "its volume",
		"devicesForgotten":  "thousandths of devices",
		"replacedForgotten": "invariant",
		"evictionUnseen":    "replicas of lost nodes were replaced",
		"epochAhead":        "invariant 12",
		"removedAtOnce":     "invariant",
		"finishForgotten":   "does not settle",
		"runForgotten":      "does not settle",
		"rateForgotten":     "of the hour",
		"wrongStopped":      "invariant",
	}
	typ := reflect.TypeFor[faults]()
	for i := range typ.NumField() {
		field := typ.Field(i)
		if field.Type.Kind() != reflect.Bool {
			continue
		}
		t.Run(field.Name, func(t *testing.T) {
			t.Parallel()
			words, listed := found[field.Name]
			if !listed {
				t.Fatal("what it must be found by is not said")
			}
			var others []string
			for seed := uint64(1); seed <= 40; seed++ {
				c := newCluster(seed, faults{})
				f := reflect.ValueOf(&c.faults).Elem().Field(i)
				reflect.NewAt(f.Type(), f.Addr().UnsafePointer()).Elem().SetBool(true)
				err := c.live(eventsPerSeed)
				switch {
				case err == nil:
				case strings.Contains(err.Error(), words):
					t.Logf("seed %d, after %v: %v", seed, c.Now.Sub(start), err)
					return
				default:
					others = append(others, err.Error())
				}
			}
			t.Errorf("not found; other findings: %q", others)
		})
	}
}

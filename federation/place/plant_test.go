package place

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// witness hears of the first thing that is wrong.
type witness struct{ said string }

func (w *witness) Errorf(format string, args ...any) {
	if w.said == "" {
		w.said = fmt.Sprintf(format, args...)
	}
}

func (w *witness) Fatalf(format string, args ...any) { w.Errorf(format, args...) }

// TestPlanted: each known mistake is noticed by the checks that every plan goes
// through, and without one nothing is said.
func TestPlanted(t *testing.T) {
	snapshots := rapid.Custom(drawSnapshot)
	tiers := rapid.Custom(drawTiers)
	references := rapid.Custom(func(t *rapid.T) Snapshot { return drawReference(t, true) })
	look := func(cases int) string {
		for i := range cases {
			w := &witness{}
			check(w, snapshots.Example(i))
			check(w, tiers.Example(i))
			if w.said == "" {
				checkMoves(w, references.Example(i))
			}
			if w.said != "" {
				return fmt.Sprintf("case %d: %.200s", i, w.said)
			}
		}
		return ""
	}
	if said := look(500); said != "" {
		t.Fatalf("without a mistake: %s", said)
	}
	for _, c := range []struct {
		name string
		bug  *bool
	}{
		{"a taint of NO_EXECUTE only closes", &plant.keepsUnderNoExecute},
		{"one more than the skew allows", &plant.ignoresSkew},
		{"the surge is not claimed", &plant.surgeForgotten},
		{"equals are displaced", &plant.displacesEquals},
		{"failover before it is due", &plant.failsOverEarly},
		{"an exclusive one does not wait", &plant.exclusiveHurries},
		{"overflow does not go back", &plant.returnsNever},
		{"what was there is forgotten", &plant.forgetsPrevious},
		{"overrides are not counted", &plant.overridesUncounted},
		{"no search where the greedy way is stuck", &plant.searchesNever},
	} {
		*c.bug = true
		said := look(5000)
		*c.bug = false
		if said == "" {
			t.Errorf("%s: nobody noticed", c.name)
		}
		t.Logf("%s: %s", c.name, said)
	}
}

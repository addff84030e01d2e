package reconcile

import (
	"os"
	"reflect"
	"slices"
	"strconv"
	"testing"
)

// number reads a number from the environment: SEED replays one seed, SIM_EVENTS
// says how many events there are in all.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

const eventsPerSeed = 300

// Random events over a cluster with one workload of every kind never break an
// invariant, and reach the states that matter.
func TestInvariants(t *testing.T) {
	seeds := number(t, "SIM_EVENTS", 30_000) / eventsPerSeed
	first := number(t, "SEED", 1)
	if os.Getenv("SEED") != "" {
		seeds = 1
	}
	reach := map[string]int{}
	for seed := first; seed < first+seeds; seed++ {
		m := newModel(uint64(seed), faults{})
		if err := m.run(eventsPerSeed); err != nil {
			t.Fatalf("SEED=%d: %v", seed, err)
		}
		for what, n := range m.reach {
			reach[what] += n
		}
	}
	for _, what := range []string{"halted", "disrupted", "volume gone", "run", "all dark", "evicted", "moved"} {
		if seeds > 50 && reach[what] == 0 {
			t.Errorf("the state %q was never reached", what)
		}
	}
	t.Logf("%d events, reached: %v", seeds*eventsPerSeed, reach)
}

// The same seed gives the same plans, down to the words.
func TestSameInputSamePlans(t *testing.T) {
	for seed := range uint64(10) {
		var first []string
		for range 2 {
			var told []string
			m := newModel(seed, faults{})
			m.trace = func(l string) { told = append(told, l) }
			if err := m.run(eventsPerSeed); err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = told
			}
			if !slices.Equal(first, told) {
				t.Fatalf("seed %d: two runs differ", seed)
			}
		}
	}
}

// Each planted bug breaks an invariant: the rig is as good as what it catches.
func TestPlantedBugs(t *testing.T) {
	typ := reflect.TypeFor[faults]()
	for i := range typ.NumField() {
		t.Run(typ.Field(i).Name, func(t *testing.T) {
			f := reflect.New(typ).Elem()
			reflect.NewAt(typ.Field(i).Type, f.Field(i).Addr().UnsafePointer()).Elem().SetBool(true)
			for seed := range uint64(400) {
				m := newModel(seed+1, f.Interface().(faults))
				if err := m.run(eventsPerSeed); err != nil {
					t.Logf("seed %d: %v", seed+1, err)
					return
				}
			}
			t.Error("no invariant was broken")
		})
	}
}

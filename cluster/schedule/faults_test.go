package schedule

import (
	"fmt"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// said is how a witness leaves a check.
type said string

// witness hears of the first thing that is wrong.
type witness struct{}

func (witness) Fatalf(format string, args ...any) { panic(said(fmt.Sprintf(format, args...))) }

// decided is a scene, and two answers about it.
type decided struct {
	sc           *scene
	first, again []Placed
}

// drawDecided lets a scheduler with faults decide a drawn scene twice.
func drawDecided(f faults) *rapid.Generator[decided] {
	return rapid.Custom(func(t *rapid.T) decided {
		sc := drawScene(t)
		sc.faults = f
		tab, b := sc.table(t, "order"), sc.batchFor(t)
		return decided{sc, copyResult(Schedule(tab, b)), copyResult(Schedule(tab, b))}
	})
}

// look gives the first thing that is wrong in so many cases, and the case.
func look(f faults, cases int) (wrong string, at int) {
	scenes := drawDecided(f)
	for at = range cases {
		if wrong = scenes.Example(at).wrong(); wrong != "" {
			return wrong, at
		}
	}
	return "", cases
}

// wrong checks what TestAgainstBruteForce does.
func (d decided) wrong() (wrong string) {
	defer func() {
		if x := recover(); x != nil {
			s, ok := x.(said)
			if !ok {
				panic(x)
			}
			wrong = string(s)
		}
	}()
	if show(d.first) != show(d.again) {
		return "asked twice, it gives two answers"
	}
	d.sc.verifyAll(witness{}, d.first)
	return ""
}

// Each planted bug breaks a property within few cases, and none breaks without: the
// reference is as good as what it catches.
func TestPlantedBugs(t *testing.T) {
	const cases = 3000
	if wrong, at := look(faults{}, 500); wrong != "" {
		t.Fatalf("case %d, without a bug: %s", at, wrong)
	}
	typ := reflect.TypeFor[faults]()
	for i := range typ.NumField() {
		t.Run(typ.Field(i).Name, func(t *testing.T) {
			f := reflect.New(typ).Elem()
			reflect.NewAt(typ.Field(i).Type, f.Field(i).Addr().UnsafePointer()).Elem().SetBool(true)
			wrong, at := look(f.Interface().(faults), cases)
			if wrong == "" {
				t.Fatalf("nothing is wrong in %d cases", cases)
			}
			t.Logf("case %d: %.200s", at, wrong)
		})
	}
}

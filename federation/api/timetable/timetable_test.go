package timetable

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The scripts in testdata. Commands:
//
//	next|last [zone=] from=2026-03-28T00:00:00Z n=5     one expression a line of input
//	window [days=(mon,tue)] start= end= [zone=]         one time a line of input
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			switch d.Cmd {
			case "next", "last":
				return times(t, d)
			case "window":
				return window(t, d)
			}
			t.Fatalf("%s: command %s is not known", d.Pos, d.Cmd)
			return ""
		})
	})
}

func option(d *datadriven.TestData, key, otherwise string) string {
	for _, a := range d.CmdArgs {
		if a.Key == key {
			return strings.Join(a.Vals, ",")
		}
	}
	return otherwise
}

func instantOf(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func times(t *testing.T, d *datadriven.TestData) string {
	zone, n := option(d, "zone", ""), 0
	if _, err := fmt.Sscan(option(d, "n", "4"), &n); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for expr := range strings.Lines(d.Input) {
		s, err := Parse(expr, zone)
		if err != nil {
			fmt.Fprintln(&b, err)
			continue
		}
		at := instantOf(t, option(d, "from", ""))
		fmt.Fprintf(&b, "%s\n", strings.TrimSpace(expr))
		for range n {
			if d.Cmd == "next" {
				at = s.Next(at)
			} else {
				at = s.Last(at)
			}
			if at.IsZero() {
				fmt.Fprintln(&b, "  never")
				break
			}
			fmt.Fprintf(&b, "  %s  %s\n", at.Format(time.RFC3339), at.In(s.zone).Format("Mon 2006-01-02 15:04 MST"))
		}
	}
	return b.String()
}

func window(t *testing.T, d *datadriven.TestData) string {
	spec := &portolanv1.TimeWindow{Start: option(d, "start", ""), End: option(d, "end", ""), TimeZone: option(d, "zone", "")}
	if days := option(d, "days", ""); days != "" {
		spec.Days = strings.Split(days, ",")
	}
	w, err := WindowOf(spec)
	if err != nil {
		return err.Error() + "\n"
	}
	var b strings.Builder
	for line := range strings.Lines(d.Input) {
		at := instantOf(t, strings.TrimSpace(line))
		open, change := Open([]Window{w}, at)
		fmt.Fprintf(&b, "%s open=%v, changes %s\n", at.Format("Mon 2006-01-02T15:04:05Z07:00"), open, change.In(w.zone).Format("Mon 2006-01-02 15:04 MST"))
	}
	return b.String()
}

// changes are days around clock changes: by an hour and by half of one, over
// midnight, and a day that never was.
var changes = []struct{ zone, from string }{
	{"Europe/Berlin", "2026-03-28T00:00:00Z"},
	{"Europe/Berlin", "2026-10-24T00:00:00Z"},
	{"America/New_York", "2026-10-31T12:00:00Z"},
	{"Australia/Lord_Howe", "2026-04-04T00:00:00Z"},
	{"Australia/Lord_Howe", "2026-10-03T00:00:00Z"},
	{"Asia/Beirut", "2026-03-28T00:00:00Z"},
	{"Pacific/Apia", "2011-12-29T00:00:00Z"},
	{"", "2026-02-27T00:00:00Z"},
}

func drawField(t *rapid.T, f field) string {
	last := min(f.max, 59)
	part := func() string {
		a := rapid.IntRange(f.min, last).Draw(t, f.name)
		switch rapid.IntRange(0, 4).Draw(t, "form") {
		case 0:
			return "*"
		case 1:
			return fmt.Sprintf("*/%d", rapid.IntRange(1, last).Draw(t, "step"))
		case 2:
			return fmt.Sprintf("%d-%d/%d", a, rapid.IntRange(a, last).Draw(t, "to"), rapid.IntRange(1, last).Draw(t, "step"))
		}
		return fmt.Sprint(a)
	}
	if rapid.Bool().Draw(t, "list") {
		return part() + "," + part()
	}
	return part()
}

// member says by the letter of the notation whether a value is in a field.
func member(text string, v, top int) bool {
	for part := range strings.SplitSeq(text, ",") {
		var a, b, step int
		switch {
		case part == "*":
			return true
		case scan(part, "*/%d", &step):
			a, b = -1, top
			if top == 31 || top == 12 {
				a = 1
			} else {
				a = 0
			}
		case scan(part, "%d-%d/%d", &a, &b, &step):
		case scan(part, "%d", &a):
			b, step = a, 1
		}
		for x := a; x <= b; x += step {
			if x == v || (top == 7 && x == 7 && v == 0) {
				return true
			}
		}
	}
	return false
}

func scan(text, format string, into ...any) bool {
	n, err := fmt.Sscanf(text, format, into...)
	return err == nil && n == len(into)
}

// reference walks every minute of four days: a civil minute that is in the
// expression is at the first minute that shows it, or at the first that shows a
// later one.
func reference(fields []string, zone *time.Location, from time.Time) []time.Time {
	const minutes = 4 * 24 * 60
	var out []time.Time
	shown := make([]time.Time, minutes)
	for i := range shown {
		shown[i] = civil(from.Add(time.Duration(i)*time.Minute), zone)
	}
	for c := shown[0]; c.Before(shown[minutes-1]); c = c.Add(time.Minute) {
		dom, dow := member(fields[2], c.Day(), 31), member(fields[4], int(c.Weekday()), 7)
		both := fields[2][0] != '*' && fields[4][0] != '*'
		if !member(fields[0], c.Minute(), 59) || !member(fields[1], c.Hour(), 23) || !member(fields[3], int(c.Month()), 12) ||
			(both && !dom && !dow) || (!both && (!dom || !dow)) {
			continue
		}
		for i, s := range shown {
			if !s.Before(c) {
				if at := from.Add(time.Duration(i) * time.Minute); len(out) == 0 || at.After(out[len(out)-1]) {
					out = append(out, at)
				}
				break
			}
		}
	}
	return out
}

// Next and Last agree with walking over every minute, clock changes included.
func TestAgainstEveryMinute(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := rapid.SampledFrom(changes).Draw(t, "change")
		fields := []string{drawField(t, minuteField), drawField(t, hourField), drawField(t, domField), drawField(t, monthField), drawField(t, dowField)}
		expr := strings.Join(fields, " ")
		s, err := Parse(expr, c.zone)
		if err != nil {
			if !strings.Contains(err.Error(), "no month") {
				t.Fatal(err)
			}
			return
		}
		from, err := time.Parse(time.RFC3339, c.from)
		if err != nil {
			t.Fatal(err)
		}
		want := reference(fields, s.zone, from)
		at := from.Add(-time.Nanosecond)
		for _, w := range want {
			if got := s.Next(at); !got.Equal(w) {
				t.Fatalf("%s in %q: after %v comes %v, not %v", expr, c.zone, at, got, w)
			}
			if got := s.Last(w.Add(time.Nanosecond)); !got.Equal(w) {
				t.Fatalf("%s in %q: the last until %v is %v", expr, c.zone, w, got)
			}
			if back := s.Last(w); at.After(from) && !back.Equal(at) {
				t.Fatalf("%s in %q: before %v comes %v, not %v", expr, c.zone, w, back, at)
			}
			at = w
		}
	})
}

// A window is open exactly from its openings to its ends, told by walking.
func TestWindowAgainstEveryMinute(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := rapid.SampledFrom(changes).Draw(t, "change")
		hm := func(name string) string {
			return fmt.Sprintf("%02d:%02d", rapid.IntRange(0, 23).Draw(t, name), rapid.SampledFrom([]int{0, 15, 30}).Draw(t, name))
		}
		spec := &portolanv1.TimeWindow{TimeZone: c.zone, Start: hm("start"), End: hm("end"), Days: rapid.SliceOfNDistinct(rapid.SampledFrom(dowField.names), 0, 3, rapid.ID).Draw(t, "days")}
		w, err := WindowOf(spec)
		if err != nil {
			t.Fatal(err)
		}
		at, err := time.Parse(time.RFC3339, c.from)
		if err != nil {
			t.Fatal(err)
		}
		open, change := Open([]Window{w}, at)
		for range 3 * 24 * 4 {
			at = at.Add(15 * time.Minute)
			got := w.Contains(at)
			if !at.Before(change) && !change.IsZero() {
				open, change = Open([]Window{w}, at)
			}
			if got != open {
				t.Fatalf("%v at %v: open is %v, the last change said %v", spec, at, got, open)
			}
			if next := w.NextOpen(at); got && !next.Equal(at) || !got && !next.IsZero() && !w.Contains(next) {
				t.Fatalf("%v at %v: opens %v", spec, at, next)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("*/5 0-6 1,15 jan-mar mon-fri", "Europe/Berlin")
	f.Add("@daily", "")
	f.Fuzz(func(t *testing.T, expr, zone string) {
		s, err := Parse(expr, zone)
		if err != nil {
			return
		}
		at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		next := s.Next(at)
		if next.IsZero() || !next.After(at) {
			t.Fatalf("%q has no next time: %v", expr, next)
		}
		if last := s.Last(next.Add(1)); !last.Equal(next) {
			t.Fatalf("%q: the last until %v is %v", expr, next, last)
		}
	})
}

func BenchmarkNext(b *testing.B) {
	s, err := Parse("15 3 * * mon-fri", "Europe/Berlin")
	if err != nil {
		b.Fatal(err)
	}
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for b.Loop() {
		s.Next(at)
	}
}

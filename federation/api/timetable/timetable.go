// Package timetable holds the two notations for recurring times: cron expressions
// and windows of the week. It owns their syntax and what clock changes mean to
// them; it never looks at a clock, times are parameters.
//
// The parser is its own, and not a library's: the known ones leave out a time that
// a clock change skips, and run one that comes twice two times.
//
// Concurrency: values are immutable; everything may be called by many at once.
package timetable

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // The same rules wherever a binary runs, also where the system has none.
)

// Schedule is the times of a cron expression in a time zone. A time that a clock
// change skips is at the change; one that comes twice is at its first.
type Schedule struct {
	minute, hour, dom, month, dow uint64
	// either: day of month and day of week are both given, and one of them is enough
	// (the rule of crontab(5)).
	either bool
	zone   *time.Location
}

// horizon bounds the search in days: the longest gap is the eight years between
// two 29ths of February over a century, and a weekday added to that is 40 years.
const horizon = 41 * 366

type field struct {
	name     string
	min, max int
	names    []string
}

var (
	minuteField = field{name: "minute", max: 59}
	hourField   = field{name: "hour", max: 23}
	domField    = field{name: "day of month", min: 1, max: 31}
	monthField  = field{name: "month", min: 1, max: 12, names: []string{"", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}}
	// 7 is Sunday too.
	dowField = field{name: "day of week", max: 7, names: []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}}
)

var macros = map[string]string{
	"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *",
	"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}

// Parse reads five fields (minute, hour, day of month, month, day of week), each
// "*", numbers, names, ranges, steps and lists of them, or a macro like "@daily".
// zone is an IANA name, UTC when empty. An expression that never comes true is an
// error.
func Parse(expr, zone string) (Schedule, error) {
	loc, err := Zone(zone)
	if err != nil {
		return Schedule{}, err
	}
	expr = strings.TrimSpace(expr)
	text := strings.ToLower(expr)
	if strings.HasPrefix(text, "@") {
		full, ok := macros[text]
		if !ok {
			return Schedule{}, fmt.Errorf("schedule %q: no such macro", expr)
		}
		text = full
	}
	parts := strings.Fields(text)
	if len(parts) != 5 {
		return Schedule{}, fmt.Errorf("schedule %q: %d fields, five are needed: minute, hour, day of month, month, day of week", expr, len(parts))
	}
	s := Schedule{zone: loc}
	for i, f := range []struct {
		field
		set *uint64
	}{{minuteField, &s.minute}, {hourField, &s.hour}, {domField, &s.dom}, {monthField, &s.month}, {dowField, &s.dow}} {
		if *f.set, err = f.parse(parts[i]); err != nil {
			return Schedule{}, fmt.Errorf("schedule %q: %w", expr, err)
		}
	}
	if s.dow&(1<<7) != 0 {
		s.dow |= 1
	}
	s.either = parts[2][0] != '*' && parts[4][0] != '*'
	if !s.possible() {
		return Schedule{}, fmt.Errorf("schedule %q: no month of it has such a day", expr)
	}
	return s, nil
}

// parse gives the values of a field as bits.
func (f field) parse(text string) (uint64, error) {
	var set uint64
	for part := range strings.SplitSeq(text, ",") {
		b, err := f.part(part)
		if err != nil {
			return 0, fmt.Errorf("%s %q: %w", f.name, text, err)
		}
		set |= b
	}
	return set, nil
}

// part reads "*", "a", "a-b", each with "/step"; "a/step" goes to the end.
func (f field) part(text string) (uint64, error) {
	span, every, stepped := strings.Cut(text, "/")
	step := 1
	if stepped {
		n, err := strconv.Atoi(every)
		if err != nil || n < 1 || n > f.max {
			return 0, fmt.Errorf("step %q is not a number from 1 to %d", every, f.max)
		}
		step = n
	}
	low, high, err := f.span(span, stepped)
	if err != nil {
		return 0, err
	}
	var set uint64
	for v := low; v <= high; v += step {
		set |= 1 << v
	}
	return set, nil
}

func (f field) span(text string, stepped bool) (low, high int, err error) {
	last := f.max
	if f.max == dowField.max {
		last = 6 // Sunday once
	}
	if text == "*" {
		return f.min, last, nil
	}
	from, to, ranged := strings.Cut(text, "-")
	if low, err = f.value(from); err != nil {
		return 0, 0, err
	}
	switch {
	case ranged:
		if high, err = f.value(to); err != nil {
			return 0, 0, err
		}
		if high == 0 && low > 0 && f.max == dowField.max {
			high = f.max // "fri-sun"
		}
	case stepped:
		high = max(low, last)
	default:
		high = low
	}
	if high < low {
		return 0, 0, fmt.Errorf("range %q ends before it begins", text)
	}
	return low, high, nil
}

func (f field) value(text string) (int, error) {
	for i, name := range f.names {
		if name != "" && name == text {
			return i, nil
		}
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < f.min || n > f.max || text[0] == '+' || text[0] == '-' {
		return 0, fmt.Errorf("%q is not one of %d to %d", text, f.min, f.max)
	}
	return n, nil
}

// possible says that some day of some year is in it.
func (s Schedule) possible() bool {
	longest := [13]int{1: 31, 2: 29, 3: 31, 4: 30, 5: 31, 6: 30, 7: 31, 8: 31, 9: 30, 10: 31, 11: 30, 12: 31}
	first := bits.TrailingZeros64(s.dom)
	for m := 1; m <= 12; m++ {
		if s.month&(1<<m) != 0 && (s.either || first <= longest[m]) {
			return true
		}
	}
	return false
}

// day says whether the day of a civil time is in it.
func (s Schedule) day(c time.Time) bool {
	if s.month&(1<<c.Month()) == 0 {
		return false
	}
	dom, dow := s.dom&(1<<c.Day()) != 0, s.dow&(1<<c.Weekday()) != 0
	if s.either {
		return dom || dow
	}
	return dom && dow
}

// Next is the first time after another; zero when there is none.
func (s Schedule) Next(after time.Time) time.Time {
	if s.zone == nil {
		return time.Time{}
	}
	c := civil(after, s.zone).Truncate(time.Minute)
	for range horizon {
		if s.day(c) {
			for h := c.Hour(); h < 24; h++ {
				if s.hour&(1<<h) == 0 {
					continue
				}
				for m := range 60 {
					if s.minute&(1<<m) == 0 {
						continue
					}
					if t := instant(at(c, h, m), s.zone); t.After(after) {
						return t
					}
				}
			}
		}
		c = at(c, 24, 0)
	}
	return time.Time{}
}

// Last is the last time before another; zero when there is none.
func (s Schedule) Last(before time.Time) time.Time {
	if s.zone == nil {
		return time.Time{}
	}
	c := civil(before, s.zone)
	// Within the second of two equal times, later ones of the first are over too.
	if back := civil(before.Add(-25*time.Hour), s.zone).Add(25 * time.Hour); back.After(c) {
		c = back
	}
	for range horizon {
		if s.day(c) {
			for h := c.Hour(); h >= 0; h-- {
				if s.hour&(1<<h) == 0 {
					continue
				}
				for m := 59; m >= 0; m-- {
					if s.minute&(1<<m) == 0 {
						continue
					}
					if t := instant(at(c, h, m), s.zone); t.Before(before) {
						return t
					}
				}
			}
		}
		c = at(c, 0, 0).Add(-time.Minute)
	}
	return time.Time{}
}

// at is a time of the civil day of c.
func at(c time.Time, hour, minute int) time.Time {
	y, m, d := c.Date()
	return time.Date(y, m, d, hour, minute, 0, 0, time.UTC)
}

// civil is what the clock on the wall shows, written as if it were UTC.
func civil(t time.Time, zone *time.Location) time.Time {
	l := t.In(zone)
	_, offset := l.Zone()
	return l.Add(time.Duration(offset) * time.Second).UTC()
}

// instant is when the clock on the wall shows a civil time: the first time, and
// the clock change when it never does.
func instant(c time.Time, zone *time.Location) time.Time {
	t := time.Date(c.Year(), c.Month(), c.Day(), c.Hour(), c.Minute(), c.Second(), 0, zone)
	start, end := t.ZoneBounds()
	switch shown := civil(t, zone); {
	case shown.After(c):
		return start.UTC()
	case shown.Before(c):
		return end.UTC()
	}
	if start.IsZero() {
		return t.UTC()
	}
	_, offset := start.Add(-time.Second).Zone()
	if first := c.Add(-time.Duration(offset) * time.Second); first.Before(start) {
		return first
	}
	return t.UTC()
}

// zones remembers loaded zones: a few hundred at most, as only names that exist
// get in.
var zones sync.Map

// Zone gives a time zone by its IANA name, UTC for the empty one.
func Zone(name string) (*time.Location, error) {
	if name == "" || name == "UTC" {
		return time.UTC, nil
	}
	if z, ok := zones.Load(name); ok {
		return z.(*time.Location), nil
	}
	if name == "Local" {
		return nil, fmt.Errorf("time zone %q: the name of a zone is needed, not the one of a machine", name)
	}
	z, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("time zone %q is not known", name)
	}
	zones.Store(name, z)
	return z, nil
}

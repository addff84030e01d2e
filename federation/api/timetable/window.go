package timetable

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Window is a span of the clock on some days of the week. The zero value is never
// open.
type Window struct {
	days       [7]bool // by time.Weekday, on which it opens
	start, end int     // minutes of the day; end may be on the next day
	zone       *time.Location
}

const day = 24 * 60

// WindowOf reads a window. No days are all days, no times the whole day; an end
// that is not after the start is on the next day.
func WindowOf(w *portolanv1.TimeWindow) (Window, error) {
	zone, err := Zone(w.GetTimeZone())
	if err != nil {
		return Window{}, err
	}
	out := Window{zone: zone}
	for _, name := range w.GetDays() {
		i := slices.Index(dowField.names, strings.ToLower(name))
		if i < 0 {
			return Window{}, fmt.Errorf("day %q is not one of mon to sun", name)
		}
		out.days[i] = true
	}
	if len(w.GetDays()) == 0 {
		out.days = [7]bool{true, true, true, true, true, true, true}
	}
	if out.start, err = clock(w.GetStart()); err != nil {
		return Window{}, err
	}
	if out.end, err = clock(w.GetEnd()); err != nil {
		return Window{}, err
	}
	if out.end <= out.start {
		out.end += day
	}
	return out, nil
}

// WindowsOf reads several, and gives the first fault.
func WindowsOf(ws []*portolanv1.TimeWindow) ([]Window, error) {
	var out []Window
	for i, w := range ws {
		x, err := WindowOf(w)
		if err != nil {
			return nil, fmt.Errorf("window %d: %w", i+1, err)
		}
		out = append(out, x)
	}
	return out, nil
}

// clock reads "hh:mm" as minutes; empty is 0, and "24:00" the end of the day.
func clock(text string) (int, error) {
	if text == "" {
		return 0, nil
	}
	hour, minute, ok := strings.Cut(text, ":")
	h, errH := strconv.ParseUint(hour, 10, 8)
	m, errM := strconv.ParseUint(minute, 10, 8)
	if !ok || errH != nil || errM != nil || len(hour) != 2 || len(minute) != 2 || m > 59 || h*60+m > day {
		return 0, fmt.Errorf("time %q is not one of 00:00 to 24:00", text)
	}
	return int(h*60 + m), nil
}

// on is the window that opens on the civil day of c, if one does.
func (w Window) on(c time.Time) (open, shut time.Time, ok bool) {
	if w.zone == nil || !w.days[c.Weekday()] {
		return time.Time{}, time.Time{}, false
	}
	return instant(at(c, 0, w.start), w.zone), instant(at(c, 0, w.end), w.zone), true
}

// Contains says whether it is open at a time; it is at its start and not at its
// end.
func (w Window) Contains(t time.Time) bool {
	_, ok := w.closes(t)
	return ok
}

// closes is when the window that is open at a time ends.
func (w Window) closes(t time.Time) (time.Time, bool) {
	c := civil(t, w.zoneOrUTC())
	for back := range 3 { // an end may be two midnights after a start, over a clock change
		if open, shut, ok := w.on(at(c, 0, 0).AddDate(0, 0, -back)); ok && !t.Before(open) && t.Before(shut) {
			return shut, true
		}
	}
	return time.Time{}, false
}

func (w Window) zoneOrUTC() *time.Location {
	if w.zone == nil {
		return time.UTC
	}
	return w.zone
}

// NextOpen is the given time when the window is open, else when it opens next;
// zero when it never does.
func (w Window) NextOpen(t time.Time) time.Time {
	if w.Contains(t) {
		return t
	}
	c := at(civil(t, w.zoneOrUTC()), 0, 0)
	// Two weeks: a clock change may swallow one whole.
	for ahead := range 15 {
		if open, shut, ok := w.on(c.AddDate(0, 0, ahead)); ok && open.After(t) && shut.After(open) {
			return open
		}
	}
	return time.Time{}
}

// Open says whether one of several windows is open, and when that changes; none
// at all is always open. The change is zero when there is none.
func Open(ws []Window, t time.Time) (open bool, change time.Time) {
	if len(ws) == 0 {
		return true, time.Time{}
	}
	for _, w := range ws {
		if shut, ok := w.closes(t); ok {
			if !open || shut.After(change) {
				open, change = true, shut
			}
		}
	}
	if open {
		return true, change
	}
	for _, w := range ws {
		if next := w.NextOpen(t); !next.IsZero() && (change.IsZero() || next.Before(change)) {
			change = next
		}
	}
	return false, change
}

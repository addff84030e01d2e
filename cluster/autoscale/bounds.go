package autoscale

import (
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

// bounds gives the least and greatest number now: the cluster's share of the
// spec's, or of the schedules that hold. A schedule never exceeds what is reserved.
//
// A workload keeps one replica, or gets it back, where nothing could ask for it
// without any; unless a schedule wants none.
func bounds(p *planner) (low, high int) {
	low, high = p.Min, p.Max
	first := true
	for _, s := range p.Spec.GetSchedules() {
		if !p.holds(s) {
			continue
		}
		sLow, sHigh := p.part(s.GetMin()), p.part(s.GetMax())
		if s.GetMax() == 0 && s.GetMin() > 0 {
			sHigh = p.Max
		}
		if first {
			low, high, first = sLow, sHigh, false
		} else {
			low, high = max(low, sLow), max(high, sHigh)
		}
		p.because(ScheduleHolds, "schedule %q holds: %d to %d", s.GetSchedule(), sLow, sHigh)
	}
	high = max(0, min(high, p.Max))
	if low <= 0 && high > 0 && !p.returns() {
		if p.Current <= 1 {
			p.because(KeepsOne, "one is kept: nothing that is known without replicas could ask for any")
		}
		low = 1
	}
	return max(0, min(low, high)), high
}

// part is this cluster's part of a number for the whole fleet, in the proportion
// of what is reserved here; rounded up, so that the parts are enough together.
func (p *planner) part(n int32) int {
	all := int64(p.Spec.GetMax())
	if all <= 0 {
		return int(n)
	}
	return int((int64(n)*int64(p.Max) + all - 1) / all)
}

// returns says that something asks without replicas: a demand that is known now, or
// a schedule.
func (p *planner) returns() bool {
	for _, m := range p.Spec.GetMetrics() {
		if _, known := p.Demand[MetricName(m)]; known && !share(m) {
			return true
		}
	}
	return slices.ContainsFunc(p.Spec.GetSchedules(), func(s *portolanv1.ScaleSchedule) bool {
		_, err := timetable.Parse(s.GetSchedule(), s.GetTimeZone())
		return err == nil && s.GetMin() > 0
	})
}

// holds says whether a schedule began and has not ended, and wakes when that
// changes. Starts of one schedule may overlap; then it goes on.
func (p *planner) holds(s *portolanv1.ScaleSchedule) bool {
	times, err := timetable.Parse(s.GetSchedule(), s.GetTimeZone())
	if err != nil {
		p.because(ScheduleInvalid, "%s", err.Error())
		return false
	}
	if next := times.Next(p.Now); !next.IsZero() {
		p.wakeAt(next)
	}
	// The last start until now, this very moment included.
	start := times.Last(p.Now.Add(time.Nanosecond))
	if start.IsZero() {
		return false
	}
	end := start.Add(s.GetDuration().AsDuration())
	p.wakeAt(end)
	return p.Now.Before(end)
}

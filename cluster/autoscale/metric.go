package autoscale

import (
	"fmt"
	"strconv"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// MetricName tells metrics of a spec apart: "cpu", "memory",
// "requests_per_second", or the name of the custom one.
func MetricName(m *portolanv1.ScaleMetric) string {
	switch m.GetKind() {
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU:
		return "cpu"
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY:
		return "memory"
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND:
		return "requests_per_second"
	default:
		return m.GetName()
	}
}

// share says that a metric is percent of what replicas request, and can not be
// known without any.
func share(m *portolanv1.ScaleMetric) bool {
	return m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU || m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY
}

// wanted is the greatest answer of all metrics. A metric that is missing may hide
// a greater one, so it forbids going down; when all are missing, nothing changes.
func wanted(p *planner, low int) (int, bool) {
	metrics := p.Spec.GetMetrics()
	if len(metrics) == 0 {
		p.because(NoMetrics, "no metric is given: the least number is wanted")
		return low, true
	}
	greatest, known := 0, 0
	for _, m := range metrics {
		n, ok := p.answer(m)
		if ok {
			known++
			greatest = max(greatest, n)
		}
	}
	if known == 0 || known < len(metrics) && greatest < p.Current {
		p.because(MetricsHold, "%d of %d metrics are missing: %d stay", len(metrics)-known, len(metrics), p.Current)
		return 0, false
	}
	return greatest, true
}

// answer is what one metric asks for.
func (p *planner) answer(m *portolanv1.ScaleMetric) (int, bool) {
	if p.Current == 0 {
		return p.fromZero(m)
	}
	c := p.census(m)
	if c.measured.count == 0 {
		p.because(MetricMissing, "%s of none of %d replicas is known", MetricName(m), p.Current)
		return 0, false
	}
	n, what := p.replicas(c)
	code := MetricAsks
	if what != "" {
		code, what = WithinTolerance, ", "+what
	}
	p.because(code, "%s%s%s: %d", describe(m, c.measured.ratio()), c.others(), what, n)
	return n, true
}

// fromZero has no replicas to measure, only the demand. Any at all wants one.
func (p *planner) fromZero(m *portolanv1.ScaleMetric) (int, bool) {
	v, ok := p.Demand[MetricName(m)]
	if share(m) || !ok {
		p.because(MetricMissing, "%s is not known without replicas", MetricName(m))
		return 0, false
	}
	n := p.ceil(v / m.GetTarget())
	p.because(MetricAsks, "%s is %s in all, target %s for each: %d", MetricName(m), number(v), number(m.GetTarget()), n)
	return n, true
}

// sum is the use of some replicas beside what they would use at the target.
type sum struct {
	count        int
	used, target float64
}

func (s *sum) add(used, target float64) {
	s.count++
	s.used += used
	s.target += target
}

func (s sum) ratio() float64 {
	if s.target <= 0 {
		return 1
	}
	return s.used / s.target
}

// census sorts replicas by what a metric knows of them.
type census struct {
	measured sum
	// missing should have a measurement and have none; starting are not expected
	// to have one that means anything. Of both only the target is known.
	missing, starting sum
}

func (c census) others() string {
	out := ""
	if c.missing.count > 0 {
		out += fmt.Sprintf(", %d without a measurement", c.missing.count)
	}
	if c.starting.count > 0 {
		out += fmt.Sprintf(", %d not yet ready", c.starting.count)
	}
	return out
}

func (p *planner) census(m *portolanv1.ScaleMetric) census {
	var c census
	for i := range p.Samples {
		s := &p.Samples[i]
		used, target, ok := p.measure(m, s)
		switch {
		case p.isStarting(m, s, ok):
			c.starting.add(0, target)
		case ok:
			c.measured.add(used, target)
		default:
			c.missing.add(0, target)
		}
	}
	// Replicas that are wanted and not there come in time, like the measured ones.
	if c.measured.count > 0 {
		for range p.Current - len(p.Samples) {
			c.starting.add(0, c.measured.target/float64(c.measured.count))
		}
	}
	return c
}

// measure gives what a replica uses and what it would use at the target.
func (p *planner) measure(m *portolanv1.ScaleMetric, s *Sample) (used, target float64, ok bool) {
	target = m.GetTarget()
	switch m.GetKind() {
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU:
		target *= float64(s.Request.CPUMilli) / 100
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY:
		target *= float64(s.Request.MemoryBytes) / 100
	default:
	}
	if s.Usage == nil || target <= 0 {
		return 0, target, false
	}
	old := s.Usage.GetTime().AsTime().Add(fresh)
	if !p.Now.Before(old) {
		return 0, target, false
	}
	used, ok = value(m, s.Usage)
	if ok {
		p.wakeAt(old)
	}
	return used, target, ok
}

func value(m *portolanv1.ScaleMetric, u *nodev1.Usage) (float64, bool) {
	switch m.GetKind() {
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU:
		return float64(u.GetCpuMilli()), true
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY:
		return float64(u.GetMemoryBytes()), true
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND:
		return u.GetRequestsPerSecond(), u.RequestsPerSecond != nil
	default:
		v, ok := u.GetCustom()[m.GetName()]
		return v, ok
	}
}

// isStarting says that a replica is not yet ready in the sense of the HPA: it has
// no measurement and never was ready; or, for CPU, what is measured may be the
// work of its start. One that was ready once and is no longer may be overloaded,
// and counts.
func (p *planner) isStarting(m *portolanv1.ScaleMetric, s *Sample, measured bool) bool {
	never := s.ReadyAt.IsZero()
	if m.GetKind() != portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU || !measured {
		return !measured && never
	}
	end := s.Bound.Add(initializing)
	if !p.Now.Before(end) {
		return !s.Ready && never
	}
	p.wakeAt(end)
	return !s.Ready || s.Usage.GetTime().AsTime().Before(s.ReadyAt.Add(warmUp))
}

// fill: a replica without a measurement uses nothing when the others would scale
// up, and all of the target when they would scale down.
func fill(up bool) float64 {
	if up {
		return 0
	}
	return 1
}

// replicas is the formula, ceil(count × use ÷ target). The text says why it is
// the present number when the ratio is not far enough from 1, or would cross it.
func (p *planner) replicas(c census) (int, string) {
	s := c.measured
	up := s.ratio() > 1
	if up {
		s = plus(s, c.starting, 0)
	}
	s = plus(s, c.missing, p.fill(up))
	switch {
	case p.tolerable(s.ratio()):
		return p.Current, "within the tolerance"
	case up != (s.ratio() > 1):
		return p.Current, "the others would turn it round"
	}
	n := p.ceil(s.ratio() * float64(s.count))
	if filled := s.count != c.measured.count; filled && up != (n > p.Current) {
		return p.Current, "the others would turn it round"
	}
	return n, ""
}

// plus adds replicas that are taken to use a share of their target.
func plus(s, others sum, used float64) sum {
	return sum{count: s.count + others.count, used: s.used + used*others.target, target: s.target + others.target}
}

func (p *planner) tolerable(ratio float64) bool {
	t := float64(defaultTolerance)
	if p.Spec.TolerancePercent != nil {
		t = float64(p.Spec.GetTolerancePercent())
	}
	return ratio >= 1-t/100-1e-9 && ratio <= 1+t/100+1e-9
}

func describe(m *portolanv1.ScaleMetric, ratio float64) string {
	mean, target := number(ratio*m.GetTarget()), number(m.GetTarget())
	if share(m) {
		return fmt.Sprintf("%s at %s%% of the request, target %s%%", MetricName(m), mean, target)
	}
	return fmt.Sprintf("%s is %s for each, target %s", MetricName(m), mean, target)
}

// number shows at most two places.
func number(v float64) string {
	text := strconv.FormatFloat(v, 'f', 2, 64)
	for text[len(text)-1] == '0' {
		text = text[:len(text)-1]
	}
	if text[len(text)-1] == '.' {
		text = text[:len(text)-1]
	}
	return text
}

// since says how long ago, for sentences.
func since(d time.Duration) string { return d.Round(time.Second).String() }

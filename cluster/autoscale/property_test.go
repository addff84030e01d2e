package autoscale

import (
	"fmt"
	"math"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

var epoch = time.Date(2026, 3, 2, 7, 0, 0, 0, time.UTC)

// draws are the choices that a simulated workload is made of.
type draws interface {
	number(low, high int, what string) int
}

type rapidDraws struct{ *rapid.T }

func (r rapidDraws) number(low, high int, what string) int {
	return rapid.IntRange(low, high).Draw(r.T, what)
}

// chance is a small generator for runs that only need to be many.
type chance struct{ state uint64 }

func (c *chance) number(low, high int, _ string) int {
	c.state ^= c.state << 13
	c.state ^= c.state >> 7
	c.state ^= c.state << 17
	return low + int(c.state%uint64(high-low+1))
}

func drawRule(d draws, what string) *portolanv1.ScaleRule {
	if d.number(0, 3, what) == 0 {
		return nil
	}
	r := &portolanv1.ScaleRule{MaxReplicas: int32(d.number(0, 3, "replicas")), MaxPercent: int32(d.number(0, 2, "percent") * 40), Disabled: d.number(0, 9, "disabled") == 0}
	if d.number(0, 3, "window given") > 0 {
		r.Stabilization = durationpb.New(time.Duration(d.number(0, 12, "window")) * 20 * time.Second)
	}
	if d.number(0, 1, "period given") > 0 {
		r.Period = durationpb.New(time.Duration(d.number(1, 8, "period")) * 15 * time.Second)
	}
	return r
}

func drawSpec(d draws) *portolanv1.Autoscale {
	spec := &portolanv1.Autoscale{Max: int32(d.number(1, 30, "fleet max")), Up: drawRule(d, "up"), Down: drawRule(d, "down")}
	for i := range d.number(0, 3, "metrics") {
		m := &portolanv1.ScaleMetric{Kind: portolanv1.ScaleMetricKind(d.number(1, 4, "kind")), Target: float64(d.number(1, 10, "target") * 10)}
		if m.Kind == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CUSTOM {
			m.Name = fmt.Sprintf("m%d", i)
		}
		spec.Metrics = append(spec.Metrics, m)
	}
	for range d.number(0, 2, "schedules") {
		spec.Schedules = append(spec.Schedules, &portolanv1.ScaleSchedule{
			Schedule: []string{"*/10 * * * *", "15,20 * * * *", "0 * * * *", "never"}[d.number(0, 3, "cron")],
			Duration: durationpb.New(time.Duration(d.number(1, 8, "minutes")) * time.Minute),
			Min:      int32(d.number(0, 6, "schedule min")), Max: int32(d.number(0, 12, "schedule max")),
		})
	}
	if d.number(0, 2, "tolerance given") > 0 {
		spec.TolerancePercent = new(int32(d.number(0, 30, "tolerance")))
	}
	return spec
}

func drawSample(d draws, now time.Time) Sample {
	s := Sample{
		Ready: d.number(0, 5, "ready") > 0, Bound: now.Add(-time.Duration(d.number(1, 30, "age")) * 20 * time.Second),
		Request: api.Resources{CPUMilli: int64(d.number(0, 4, "request") * 100), MemoryBytes: 100},
	}
	if d.number(0, 4, "was ready") > 0 {
		s.ReadyAt = s.Bound.Add(10 * time.Second)
	} else {
		s.Ready = false
	}
	if d.number(0, 6, "known") > 0 {
		u := &nodev1.Usage{Time: timestamppb.New(now.Add(-time.Duration(d.number(0, 70, "old")) * time.Second)), Custom: map[string]float64{}}
		level := d.number(0, 20, "level")
		u.CpuMilli, u.MemoryBytes = int64(level*20), int64(level*10)
		if d.number(0, 4, "requests known") > 0 {
			u.RequestsPerSecond = new(float64(level * 10))
		}
		for i := range d.number(0, 3, "custom known") {
			u.Custom[fmt.Sprintf("m%d", i)] = float64(level * 7)
		}
		s.Usage = u
	}
	return s
}

// reference decides by the letter of the documentation, and remembers everything.
type reference struct {
	times    []time.Time // of every decision
	wanted   []int       // what each asked for
	replicas []int       // and decided
	before   int         // what ran before the first
}

func (r *reference) decide(in Input) int {
	low, high := r.bounds(in)
	want, hold := r.want(in, low)
	n := in.Current
	if hold {
		want = r.before
		if len(r.wanted) > 0 {
			want = r.wanted[len(r.wanted)-1]
		}
	} else {
		n = r.rate(in, r.toggled(in, r.steady(in, want)))
	}
	n = min(max(n, low), high)
	r.times, r.wanted, r.replicas = append(r.times, in.Now), append(r.wanted, want), append(r.replicas, n)
	return n
}

func (r *reference) toggled(in Input, n int) int {
	if n > in.Current && in.Spec.GetUp().GetDisabled() || n < in.Current && in.Spec.GetDown().GetDisabled() {
		return in.Current
	}
	return n
}

func (r *reference) bounds(in Input) (low, high int) {
	low, high = in.Min, in.Max
	var lows, highs []int
	part := func(n int32) int { return int(math.Ceil(float64(n) * float64(in.Max) / float64(in.Spec.GetMax()))) }
	for _, s := range in.Spec.GetSchedules() {
		c, err := timetable.Parse(s.GetSchedule(), s.GetTimeZone())
		if err != nil {
			continue
		}
		for t := in.Now.Truncate(time.Minute); t.After(in.Now.Add(-s.GetDuration().AsDuration())); t = t.Add(-time.Minute) {
			if !c.Next(t.Add(-1)).Equal(t) {
				continue
			}
			lows = append(lows, part(s.GetMin()))
			if s.GetMax() == 0 && s.GetMin() > 0 {
				highs = append(highs, in.Max)
			} else {
				highs = append(highs, part(s.GetMax()))
			}
			break
		}
	}
	for i := range lows {
		if i == 0 {
			low, high = 0, 0
		}
		low, high = max(low, lows[i]), max(high, highs[i])
	}
	high = min(high, in.Max)
	back := false
	for _, m := range in.Spec.GetMetrics() {
		_, known := in.Demand[MetricName(m)]
		back = back || known && m.GetKind() >= portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND
	}
	for _, s := range in.Spec.GetSchedules() {
		back = back || s.GetMin() > 0 && s.GetSchedule() != "never"
	}
	if !back {
		low = max(low, 1)
	}
	return min(low, high), high
}

func (r *reference) want(in Input, low int) (int, bool) {
	if len(in.Spec.GetMetrics()) == 0 {
		return low, false
	}
	best, missing := -1, 0
	for _, m := range in.Spec.GetMetrics() {
		if n := r.metric(in, m); n < 0 {
			missing++
		} else {
			best = max(best, n)
		}
	}
	return best, best < 0 || missing > 0 && best < in.Current
}

// metric gives -1 when it is missing. A replica is known, missing or starting;
// everything is counted in shares of the target.
func (r *reference) metric(in Input, m *portolanv1.ScaleMetric) int {
	if in.Current == 0 {
		v, ok := in.Demand[MetricName(m)]
		if !ok || m.GetKind() <= portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY {
			return -1
		}
		return int(math.Ceil(v/m.GetTarget() - 1e-9))
	}
	var use, full, missing, starting, count, missingN, startingN float64
	for _, s := range in.Samples {
		v, whole, ok := r.value(in, m, s)
		init := in.Now.Sub(s.Bound) <= 5*time.Minute-0 && in.Now.Before(s.Bound.Add(5*time.Minute))
		cpu := m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU
		first := false
		switch {
		case !ok:
			first = s.ReadyAt.IsZero()
		case cpu && init:
			first = !s.Ready || s.Usage.GetTime().AsTime().Sub(s.ReadyAt) < 15*time.Second
		case cpu:
			first = !s.Ready && s.ReadyAt.IsZero()
		}
		switch {
		case first:
			starting, startingN = starting+whole, startingN+1
		case ok:
			use, full, count = use+v, full+whole, count+1
		default:
			missing, missingN = missing+whole, missingN+1
		}
	}
	if count == 0 {
		return -1
	}
	if n := float64(in.Current - len(in.Samples)); n > 0 {
		starting, startingN = starting+n*full/count, startingN+n
	}
	tolerance := 0.1
	if in.Spec.TolerancePercent != nil {
		tolerance = float64(in.Spec.GetTolerancePercent()) / 100
	}
	first := use / full
	total, n := full, count
	if first > 1 {
		total, n = total+starting+missing, n+startingN+missingN
	} else {
		use, total, n = use+missing, total+missing, n+missingN
	}
	ratio := use / total
	if math.Abs(ratio-1) <= tolerance+1e-9 || (first > 1) != (ratio > 1) {
		return in.Current
	}
	out := int(math.Ceil(ratio*n - 1e-9))
	if n != count && (first > 1) != (out > in.Current) {
		return in.Current
	}
	return out
}

func (r *reference) value(in Input, m *portolanv1.ScaleMetric, s Sample) (v, whole float64, ok bool) {
	whole = m.GetTarget()
	if m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU {
		whole = whole / 100 * float64(s.Request.CPUMilli)
	}
	if m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY {
		whole = whole / 100 * float64(s.Request.MemoryBytes)
	}
	if s.Usage == nil || whole == 0 || in.Now.Sub(s.Usage.GetTime().AsTime()) >= time.Minute {
		return 0, whole, false
	}
	switch m.GetKind() {
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU:
		return float64(s.Usage.GetCpuMilli()), whole, true
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY:
		return float64(s.Usage.GetMemoryBytes()), whole, true
	case portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND:
		return s.Usage.GetRequestsPerSecond(), whole, s.Usage.RequestsPerSecond != nil
	default:
		v, ok = s.Usage.GetCustom()[m.GetName()]
		return v, whole, ok
	}
}

// steady looks at every answer that was in force at some time of a window.
func (r *reference) steady(in Input, want int) int {
	given := func(rule *portolanv1.ScaleRule, otherwise time.Duration) time.Duration {
		if rule.GetStabilization() != nil {
			return rule.GetStabilization().AsDuration()
		}
		return otherwise
	}
	bound := func(w time.Duration, pick func(a, b int) int) int {
		out := want
		if w <= 0 {
			return out
		}
		if len(r.times) == 0 {
			return pick(out, in.Current)
		}
		if r.times[0].After(in.Now.Add(-w)) {
			out = pick(out, r.before) // it was wanted until the first decision
		}
		for i := range r.times {
			end := in.Now
			if i+1 < len(r.times) {
				end = r.times[i+1]
			}
			if end.After(in.Now.Add(-w)) {
				out = pick(out, r.wanted[i])
			}
		}
		return out
	}
	up := bound(given(in.Spec.GetUp(), 0), func(a, b int) int { return min(a, b) })
	down := bound(given(in.Spec.GetDown(), 5*time.Minute), func(a, b int) int { return max(a, b) })
	return min(max(in.Current, up), down)
}

func (r *reference) rate(in Input, n int) int {
	rule := in.Spec.GetUp()
	if n < in.Current {
		rule = in.Spec.GetDown()
	}
	if n == in.Current || rule.GetMaxReplicas() == 0 && rule.GetMaxPercent() == 0 {
		return n
	}
	d := time.Minute
	if rule.GetPeriod() != nil {
		d = rule.GetPeriod().AsDuration()
	}
	// How many there were at the beginning of the period.
	base := r.before
	for i := range r.times {
		if !r.times[i].After(in.Now.Add(-d)) {
			base = r.replicas[i]
		}
	}
	allowed := int(rule.GetMaxReplicas())
	if p := int(rule.GetMaxPercent()); p > 0 {
		allowed = max(allowed, 1, (base*p+99)/100)
	}
	if n > in.Current {
		return max(in.Current, min(n, base+allowed))
	}
	return min(in.Current, max(n, base-allowed))
}

// simulate runs a workload under random load beside the reference. The error says
// where they part, or which promise is broken.
func simulate(d draws, r rules) error {
	spec := drawSpec(d)
	ref := &reference{before: d.number(0, 12, "current")}
	in := Input{Now: epoch, Spec: spec, Current: ref.before, Max: d.number(0, int(spec.GetMax()), "max")}
	in.Min = d.number(0, in.Max, "min")
	for range d.number(1, 25, "decisions") {
		in.Now = in.Now.Add(time.Duration(d.number(0, 100, "seconds")) * time.Second)
		in.Samples = nil
		for range max(0, in.Current+d.number(-2, 2, "surge")) {
			in.Samples = append(in.Samples, drawSample(d, in.Now))
		}
		in.Demand = map[string]float64{}
		if d.number(0, 2, "demand") > 0 {
			in.Demand["requests_per_second"], in.Demand["m0"] = float64(d.number(0, 200, "rps")), float64(d.number(0, 50, "m0"))
		}
		p := decide(in, r)
		if want := ref.decide(in); p.Replicas != want {
			return fmt.Errorf("%d replicas, %d in the reference\n%v\n%s", p.Replicas, want, p.Reasons, prototext.Format(spec))
		}
		if err := promises(in, p); err != nil {
			return err
		}
		in.State, in.Current = p.Scale, p.Replicas
	}
	return nil
}

// promises are what holds of every plan by itself.
func promises(in Input, p Plan) error {
	h := p.Scale.GetHistory()
	switch {
	case p.Replicas < 0 || p.Replicas > in.Max:
		return fmt.Errorf("%d replicas: %d are reserved", p.Replicas, in.Max)
	case int(p.Scale.GetReplicas()) != p.Replicas || int(h[len(h)-1].GetReplicas()) != p.Replicas:
		return fmt.Errorf("the record has %d replicas, its history %d, the plan %d", p.Scale.GetReplicas(), h[len(h)-1].GetReplicas(), p.Replicas)
	case len(h) > historyLimit:
		return fmt.Errorf("a history of %d", len(h))
	case !p.Next.IsZero() && !p.Next.After(in.Now):
		return fmt.Errorf("next is at %v, not after %v", p.Next, in.Now)
	}
	for i := 1; i < len(h)-1; i++ {
		if h[i].GetTime().AsTime().Before(h[i-1].GetTime().AsTime()) {
			return fmt.Errorf("the history goes back at %d", i)
		}
	}
	return nil
}

func TestAgainstReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if err := simulate(rapidDraws{t}, sound()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestPlantedBugs: each broken step is noticed.
func TestPlantedBugs(t *testing.T) {
	for name, plant := range map[string]func(*rules){
		"rounded down":                      func(r *rules) { r.ceil = func(x float64) int { return int(x) } },
		"one too many":                      func(r *rules) { r.ceil = func(x float64) int { return int(x) + 1 } },
		"missing replicas are idle":         func(r *rules) { r.fill = func(bool) float64 { return 0 } },
		"missing replicas are busy":         func(r *rules) { r.fill = func(bool) float64 { return 1 } },
		"no stabilisation":                  func(r *rules) { r.stabilize = func(_ *planner, n int) int { return n } },
		"no rate limit":                     func(r *rules) { r.limit = func(_ *planner, n int) int { return n } },
		"rate off by one":                   func(r *rules) { r.limit = offByOne },
		"more than is reserved":             func(r *rules) { r.bounds = func(p *planner) (int, int) { l, h := bounds(p); return l, h + 1 } },
		"schedules are not looked at":       func(r *rules) { r.bounds = func(p *planner) (int, int) { return min(p.Min, p.Max), p.Max } },
		"a missing metric is not missed":    func(r *rules) { r.wanted = careless },
		"the history is forgotten":          func(r *rules) { r.record = forgetful },
		"spans end when they should not":    func(r *rules) { r.record = hasty },
		"going down forgets what was asked": func(r *rules) { r.stabilize = oneSided },
	} {
		r := sound()
		plant(&r)
		caught := false
		for seed := uint64(1); seed <= 3000 && !caught; seed++ {
			caught = simulate(&chance{seed * 0x9e3779b97f4a7c15}, r) != nil
		}
		if !caught {
			t.Errorf("%s: nobody noticed", name)
		}
	}
	for seed := uint64(1); seed <= 300; seed++ {
		if err := simulate(&chance{seed * 0x9e3779b97f4a7c15}, sound()); err != nil {
			t.Fatalf("without a bug, seed %d: %v", seed, err)
		}
	}
}

func offByOne(p *planner, n int) int {
	if got := limit(p, n); got < n {
		return got + 1
	}
	return n
}

// careless takes the answer of the metrics that are there, up and down.
func careless(p *planner, low int) (int, bool) {
	greatest, known := 0, len(p.Spec.GetMetrics()) == 0
	for _, m := range p.Spec.GetMetrics() {
		if n, ok := p.answer(m); ok {
			greatest, known = max(greatest, n), true
		}
	}
	if len(p.Spec.GetMetrics()) == 0 {
		return low, true
	}
	return greatest, known
}

func forgetful(p *planner, wanted, n int) []*clusterv1.ScaleSample {
	h := record(p, wanted, n)
	return h[max(0, len(h)-1):]
}

// hasty keeps the time at which a span began as the one at which it ended.
func hasty(p *planner, wanted, n int) []*clusterv1.ScaleSample {
	h := record(p, wanted, n)
	if len(h) >= 2 && len(p.history) > 0 {
		h[len(h)-2] = entry(h[len(h)-2], p.history[len(p.history)-1].GetTime().AsTime())
	}
	return h
}

func oneSided(p *planner, n int) int {
	least, _ := p.over(n, p.upWindow())
	return max(min(n, p.Current), least)
}

// Until Next nothing changes by itself.
func TestNextIsWhenTimeChangesTheAnswer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := rapidDraws{t}
		spec := drawSpec(d)
		in := Input{Now: epoch, Spec: spec, Current: d.number(0, 8, "current"), Max: d.number(1, int(spec.GetMax()), "max")}
		in.Min = d.number(0, in.Max, "min")
		for range d.number(1, 6, "decisions") {
			in.Now = in.Now.Add(time.Duration(d.number(1, 60, "seconds")) * time.Second)
			in.Samples = nil
			for range in.Current {
				in.Samples = append(in.Samples, drawSample(d, in.Now))
			}
			p := Decide(in)
			in.State, in.Current = p.Scale, p.Replicas
		}
		p := Decide(in)
		for range 50 {
			if !p.Changed {
				break
			}
			in.State, in.Current = p.Scale, p.Replicas
			p = Decide(in)
		}
		if p.Changed {
			return // the samples speak of another number of replicas than there are
		}
		end := p.Next
		if end.IsZero() {
			end = in.Now.Add(2 * time.Hour)
		}
		for range 5 {
			later := in
			later.Now = in.Now.Add(time.Duration(d.number(0, int(end.Sub(in.Now))-1, "later")))
			if q := Decide(later); q.Replicas != p.Replicas {
				t.Fatalf("%d replicas at %v, %d at %v, and next was %v\n%v\n%v", p.Replicas, in.Now, q.Replicas, later.Now, p.Next, p.Reasons, q.Reasons)
			}
		}
	})
}

// The same input gives the same bytes, in any order of the samples.
func TestDeterministic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := rapidDraws{t}
		in := Input{Now: epoch, Spec: drawSpec(d), Current: d.number(0, 8, "current"), Max: 20, Min: 1}
		for range in.Current {
			in.Samples = append(in.Samples, drawSample(d, in.Now))
		}
		first := Decide(in)
		in.Samples = rapid.Permutation(in.Samples).Draw(t, "order")
		again := Decide(in)
		if fmt.Sprint(first.Reasons, first.Replicas, first.Next) != fmt.Sprint(again.Reasons, again.Replicas, again.Next) {
			t.Fatalf("two plans of one input differ:\n%v\n%v", first.Reasons, again.Reasons)
		}
	})
}

// A workload whose metrics never stand still keeps a small history: the changes of
// one period, and few spans beside them.
func TestHistoryStaysSmall(t *testing.T) {
	spec := &portolanv1.Autoscale{Max: 100000, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND, Target: 1}}, Down: &portolanv1.ScaleRule{Stabilization: durationpb.New(time.Hour)}}
	in := Input{Now: epoch, Spec: spec, Current: 10000, Max: 100000}
	c := &chance{7}
	longest := 0
	for range 20000 {
		in.Now = in.Now.Add(time.Second)
		v := float64(c.number(0, 50000, "")) / float64(in.Current)
		in.Samples = []Sample{{Ready: true, ReadyAt: epoch, Bound: epoch, Usage: &nodev1.Usage{Time: timestamppb.New(in.Now), RequestsPerSecond: &v}}}
		in.Current = 1
		p := Decide(in)
		in.State, in.Current = p.Scale, max(1, p.Replicas)
		longest = max(longest, len(p.Scale.GetHistory()))
	}
	if longest > 120 {
		t.Errorf("random answers grew a history of %d", longest)
	}
	// The worst there is: every answer is less than the one before.
	in.State, in.Current = nil, 1
	for i := range 2000 {
		in.Now = in.Now.Add(time.Second)
		v := float64(50000 - i)
		in.Samples = []Sample{{Ready: true, ReadyAt: epoch, Bound: epoch, Usage: &nodev1.Usage{Time: timestamppb.New(in.Now), RequestsPerSecond: &v}}}
		in.State = Decide(in).Scale
	}
	if n := len(in.State.GetHistory()); n != historyLimit {
		t.Errorf("the history has %d spans, %d are allowed", n, historyLimit)
	}
}

func BenchmarkDecide(b *testing.B) {
	spec := &portolanv1.Autoscale{Max: 100, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU, Target: 50}}}
	in := Input{Now: epoch, Spec: spec, Current: 50, Max: 100, Min: 1}
	for range 50 {
		in.Samples = append(in.Samples, Sample{Ready: true, ReadyAt: epoch.Add(-time.Hour), Bound: epoch.Add(-time.Hour), Request: api.Resources{CPUMilli: 100}, Usage: &nodev1.Usage{Time: timestamppb.New(epoch), CpuMilli: 60}})
	}
	b.ReportAllocs()
	for b.Loop() {
		if p := Decide(in); p.Replicas != 60 {
			b.Fatal(p.Replicas)
		}
	}
}

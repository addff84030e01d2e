package autoscale

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// story is a workload and what is measured of it, on a clock of its own.
type story struct {
	in  Input
	now time.Time
	// use is what every replica reports, by metric; load what all of them share
	// evenly. both are per replica in the metric's own unit.
	use, load map[string]float64
	// odd replicas by index: "missing", "starting", "unready".
	odd map[int]string
	age time.Duration
}

// The stories in testdata/decide. Commands:
//
//	spec current=5 min=1 max=10 [fleetmax=N] [tolerance=N]   one line of input each:
//	     metric cpu 50 | metric custom queue 10 | up|down [window=] [replicas=] [percent=] [period=] [off] | schedule "0 8 * * *" 2h min=5 max=10 [zone=]
//	use cpu=80 …           what each replica uses (percent, or in the metric's unit); "none" takes it away
//	load cpu=400 …         what they use together, shared evenly
//	demand queue=30        what is known without replicas
//	odd 3=missing 4=starting 5=unready | odd none
//	at 2026-03-02T07:59:00Z | wait 5m
//	decide                 once, and keep it
//	run 10m every=30s      decide at that pace, and tell what changes
//	sleep                  go to the time at which the answer may change, decide
func TestDecideStories(t *testing.T) {
	told := 0
	datadriven.Walk(t, "testdata/decide", func(t *testing.T, path string) {
		told++
		s := &story{now: time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC), use: map[string]float64{}, load: map[string]float64{}, odd: map[int]string{}, age: time.Hour}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			return s.command(t, d)
		})
	})
	if told == 0 {
		t.Error("no story was told")
	}
}

func (s *story) command(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatalf("%s: %v", d.Pos, err)
		}
	}
	numbers := func(into map[string]float64) string {
		for _, a := range d.CmdArgs {
			if a.Key == "none" {
				clear(into)
				continue
			}
			v, err := strconv.ParseFloat(a.Vals[0], 64)
			must(err)
			into[a.Key] = v
		}
		return ""
	}
	length := func(text string) time.Duration {
		v, err := time.ParseDuration(text)
		must(err)
		return v
	}
	switch d.Cmd {
	case "spec":
		must(s.spec(d))
	case "use":
		return numbers(s.use)
	case "load":
		return numbers(s.load)
	case "demand":
		s.in.Demand = map[string]float64{}
		return numbers(s.in.Demand)
	case "odd":
		clear(s.odd)
		for _, a := range d.CmdArgs {
			if i, err := strconv.Atoi(a.Key); err == nil {
				s.odd[i] = a.Vals[0]
			}
		}
	case "at":
		at, err := time.Parse(time.RFC3339, d.CmdArgs[0].Key)
		must(err)
		s.now = at
	case "wait":
		s.now = s.now.Add(length(d.CmdArgs[0].Key))
	case "decide":
		return s.tell(s.decide())
	case "sleep":
		s.now = s.decide().Next
		return s.now.Format("2006-01-02 15:04:05") + "\n" + s.tell(s.decide())
	case "run":
		return s.run(length(d.CmdArgs[0].Key), length(d.CmdArgs[1].Vals[0]))
	default:
		t.Fatalf("%s: command %s is not known", d.Pos, d.Cmd)
	}
	return ""
}

func (s *story) spec(d *datadriven.TestData) error {
	s.in = Input{Spec: &portolanv1.Autoscale{}}
	into := map[string]*int{"current": &s.in.Current, "min": &s.in.Min, "max": &s.in.Max}
	fleet := 0
	for _, a := range d.CmdArgs {
		n, err := strconv.Atoi(a.Vals[0])
		if err != nil {
			return err
		}
		switch a.Key {
		case "tolerance":
			s.in.Spec.TolerancePercent = new(int32(n))
		case "fleetmax":
			fleet = n
		default:
			*into[a.Key] = n
		}
	}
	s.in.Spec.Max = int32(max(fleet, s.in.Max))
	for line := range strings.Lines(d.Input) {
		if err := specLine(s.in.Spec, strings.TrimSpace(line)); err != nil {
			return err
		}
	}
	return nil
}

func specLine(spec *portolanv1.Autoscale, line string) error {
	quoted := ""
	if before, rest, ok := strings.Cut(line, `"`); ok {
		quoted, rest, _ = strings.Cut(rest, `"`)
		line = before + rest
	}
	words := strings.Fields(line)
	option := map[string]string{}
	for _, w := range words[1:] {
		k, v, _ := strings.Cut(w, "=")
		option[k] = v
	}
	number := func(k string) int32 {
		n, _ := strconv.Atoi(option[k])
		return int32(n)
	}
	length := func(text string) (*durationpb.Duration, error) {
		if text == "" {
			return nil, nil
		}
		v, err := time.ParseDuration(text)
		return durationpb.New(v), err
	}
	switch words[0] {
	case "metric":
		m := &portolanv1.ScaleMetric{Kind: map[string]portolanv1.ScaleMetricKind{"cpu": 1, "memory": 2, "requests_per_second": 3, "custom": 4}[words[1]]}
		if words[1] == "custom" {
			m.Name = words[2]
		}
		target, err := strconv.ParseFloat(words[len(words)-1], 64)
		m.Target = target
		spec.Metrics = append(spec.Metrics, m)
		return err
	case "up", "down":
		_, off := option["off"]
		r := &portolanv1.ScaleRule{MaxReplicas: number("replicas"), MaxPercent: number("percent"), Disabled: off}
		var err1, err2 error
		r.Stabilization, err1 = length(option["window"])
		r.Period, err2 = length(option["period"])
		if words[0] == "up" {
			spec.Up = r
		} else {
			spec.Down = r
		}
		if err1 != nil {
			return err1
		}
		return err2
	case "schedule":
		d, err := length(words[1])
		spec.Schedules = append(spec.Schedules, &portolanv1.ScaleSchedule{Schedule: quoted, Duration: d, Min: number("min"), Max: number("max"), TimeZone: option["zone"]})
		return err
	}
	return fmt.Errorf("%q is not known", line)
}

// sample is what replica i reports now: all of them request one core and 100 MiB.
func (s *story) sample(i int) Sample {
	bound := s.now.Add(-s.age)
	out := Sample{Allocation: fmt.Sprintf("web-%d", i), Ready: true, Bound: bound, ReadyAt: bound.Add(time.Minute), Request: api.Resources{CPUMilli: 1000, MemoryBytes: 100 << 20}}
	u := &nodev1.Usage{Time: timestamppb.New(s.now), Custom: map[string]float64{}}
	put := func(name string, v float64) {
		switch name {
		case "cpu":
			u.CpuMilli = int64(v * 10)
		case "memory":
			u.MemoryBytes = int64(v * (1 << 20))
		case "requests_per_second":
			u.RequestsPerSecond = &v
		default:
			u.Custom[name] = v
		}
	}
	for name, v := range s.use {
		put(name, v)
	}
	for name, v := range s.load {
		put(name, v/float64(s.in.Current))
	}
	out.Usage = u
	switch s.odd[i] {
	case "missing":
		out.Usage = nil
	case "stale":
		u.Time = timestamppb.New(s.now.Add(-2 * time.Minute))
	case "norequest":
		out.Request = api.Resources{}
	case "starting":
		out.Ready, out.ReadyAt, out.Bound = false, time.Time{}, s.now.Add(-10*time.Second)
	case "unready":
		out.Ready = false
	}
	return out
}

func (s *story) decide() Plan {
	s.in.Now = s.now
	s.in.Samples = nil
	if len(s.use)+len(s.load) > 0 {
		for i := range s.in.Current {
			s.in.Samples = append(s.in.Samples, s.sample(i+1))
		}
	}
	p := Decide(s.in)
	s.in.State, s.in.Current = p.Scale, p.Replicas
	return p
}

func (s *story) tell(p Plan) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d replicas", p.Replicas)
	if !p.Changed {
		b.WriteString(", nothing to write")
	}
	b.WriteString("\n")
	for _, r := range p.Reasons {
		fmt.Fprintf(&b, "  %s: %s\n", r.GetCode(), r.GetMessage())
	}
	return b.String()
}

func (s *story) run(total, pace time.Duration) string {
	var b strings.Builder
	begin, last := s.now, s.in.Current
	for ; s.now.Sub(begin) <= total; s.now = s.now.Add(pace) {
		p := s.decide()
		if p.Replicas != last {
			fmt.Fprintf(&b, "+%v %s", s.now.Sub(begin), s.tell(p))
		}
		last = p.Replicas
	}
	if b.Len() == 0 {
		b.WriteString("nothing changes\n")
	}
	fmt.Fprintf(&b, "history of %d\n", len(s.in.State.GetHistory()))
	return b.String()
}

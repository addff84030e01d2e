// Package autoscale says how many replicas a workload should have (Decide), how
// much each of them should request (Recommend), and which node pools should grow
// or shrink (GrowPools). It owns the rules and what they look back on; it never
// measures, and changes nothing.
//
// Decide follows the algorithm that Kubernetes publishes for its
// HorizontalPodAutoscaler, so that what people know of it holds here:
// https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
// (algorithm details; configurable scaling behavior).
//
// Concurrency: pure functions. The input is only read; messages in the output may
// be the input's.
package autoscale

import (
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Input is everything that a decision follows from.
type Input struct {
	Now time.Time
	// Current is how many replicas are wanted as of now: State's number, or where
	// the workload begins.
	Current int
	// Min and Max are this cluster's share of the spec's bounds. Max is reserved
	// for it, and never exceeded.
	Min, Max int
	Spec     *portolanv1.Autoscale
	// Samples has one entry for each replica that is there and meant to stay, in
	// any order.
	Samples []Sample
	// Demand is the load on the workload as a whole, by MetricName: a caller that
	// knows demand without replicas gives it, any other leaves it nil. It brings a
	// workload back from zero; where it is not known, and no schedule would, the
	// workload does not go there.
	Demand map[string]float64
	// State is what the last decision wrote; nil before the first.
	State *clusterv1.Scale
}

// Sample is one replica and what was measured of it.
type Sample struct {
	Allocation string
	Ready      bool
	// Bound is when it came to its node, ReadyAt when it became ready; zero while
	// it never was.
	Bound, ReadyAt time.Time
	// Usage is nil while nothing is known.
	Usage *nodev1.Usage
	// Request is what its containers ask for, its proxy apart: CPU and memory are
	// measured in percent of it.
	Request api.Resources
}

// Plan is a decision.
type Plan struct {
	// Scale is the record as it should be; Changed says that it differs from
	// Input.State.
	Scale   *clusterv1.Scale
	Changed bool
	// Replicas is Scale's number, Wanted what the metrics alone ask for.
	Replicas, Wanted int
	// Reasons are what each metric asks for, then what kept from it, in the order
	// in which it was looked at.
	Reasons []*portolanv1.Reason
	// Next is when time alone may change the answer; zero when it does not.
	Next time.Time
}

// Reason codes.
const (
	MetricAsks      = "MetricAsks"
	WithinTolerance = "WithinTolerance"
	MetricMissing   = "MetricMissing"
	MetricsHold     = "MetricsHold"
	NoMetrics       = "NoMetrics"
	Stabilizing     = "Stabilizing"
	RateLimited     = "RateLimited"
	UpDisabled      = "UpDisabled"
	DownDisabled    = "DownDisabled"
	AtMin           = "AtMin"
	AtMax           = "AtMax"
	KeepsOne        = "KeepsOne"
	ScheduleHolds   = "ScheduleHolds"
	ScheduleInvalid = "ScheduleInvalid"
	ScaledUp        = "ScaledUp"
	ScaledDown      = "ScaledDown"
	Started         = "Started"
)

// Fixed times of the algorithm.
const (
	// fresh is how old a measurement may be before it counts as missing.
	fresh = time.Minute
	// initializing is how long the CPU of a replica that is not ready says more of
	// its start than of its load (the HPA's cpu-initialization-period).
	initializing = 5 * time.Minute
	// warmUp is how long after becoming ready a mean over the last period still
	// reaches back into the start.
	warmUp = 15 * time.Second
	// defaultDown is the stabilisation window for going down.
	defaultDown      = 5 * time.Minute
	defaultPeriod    = time.Minute
	defaultTolerance = 10
)

// rules are the steps of a decision. Tests put a broken one in a step's place,
// and show that it is caught.
type rules struct {
	// bounds gives the least and greatest number now.
	bounds func(*planner) (low, high int)
	// wanted gives what the metrics ask for; false holds what is.
	wanted func(p *planner, low int) (n int, known bool)
	// ceil rounds a number of replicas.
	ceil func(float64) int
	// fill says what a replica without a measurement is taken to use, as a share
	// of the target, when the others alone would scale up or down.
	fill func(up bool) float64
	// stabilize holds an answer against those of the windows, limit against what
	// the rates allow.
	stabilize, limit func(p *planner, n int) int
	// record writes the decision into the history.
	record func(p *planner, wanted, n int) []*clusterv1.ScaleSample
}

func sound() rules {
	return rules{bounds: bounds, wanted: wanted, ceil: ceil, fill: fill, stabilize: stabilize, limit: limit, record: record}
}

// planner gathers a plan.
type planner struct {
	Input
	rules
	history []*clusterv1.ScaleSample
	plan    Plan
}

// Decide says how many replicas there should be.
func Decide(in Input) Plan { return decide(in, sound()) }

func decide(in Input, r rules) Plan {
	p := &planner{Input: in, rules: r, history: in.State.GetHistory()}
	low, high := p.bounds(p)
	want, known := p.wanted(p, low)
	n := in.Current
	if known {
		n = p.limit(p, p.switches(p.stabilize(p, want)))
	} else {
		want = p.lastWanted()
	}
	n = p.clamp(n, low, high)
	p.plan.Wanted, p.plan.Replicas = want, n
	p.plan.Scale = p.write(want, n)
	p.plan.Changed = p.plan.Scale != in.State
	return p.plan
}

// switches holds against a direction that is switched off.
func (p *planner) switches(n int) int {
	if n > p.Current && p.Spec.GetUp().GetDisabled() {
		p.because(UpDisabled, "scaling up is switched off: %d stay, %d would be wanted", p.Current, n)
		return p.Current
	}
	if n < p.Current && p.Spec.GetDown().GetDisabled() {
		p.because(DownDisabled, "scaling down is switched off: %d stay, %d would be wanted", p.Current, n)
		return p.Current
	}
	return n
}

// clamp holds the bounds, whatever else was said: they are somebody's word, and
// rates and windows are only caution.
func (p *planner) clamp(n, low, high int) int {
	switch {
	case n > high:
		p.because(AtMax, "at most %d are allowed here, %d would be wanted", high, n)
		return high
	case n < low:
		p.because(AtMin, "at least %d are kept here, %d would be wanted", low, n)
		return low
	}
	return n
}

// write gives the record after the decision: the present one where nothing
// changes, so that a steady workload writes nothing.
func (p *planner) write(want, n int) *clusterv1.Scale {
	history := p.record(p, want, n)
	if history == nil {
		return p.State
	}
	next := &clusterv1.Scale{Replicas: int32(n), Time: p.State.GetTime(), Reason: p.State.GetReason(), History: history}
	if p.State == nil || int(p.State.GetReplicas()) != n {
		next.Time, next.Reason = timestamppb.New(p.Now), p.main(n)
	}
	return next
}

// main is the reason of a new number: the direction, and the sentence that led
// to it.
func (p *planner) main(n int) *portolanv1.Reason {
	r := &portolanv1.Reason{Code: Started, Message: fmt.Sprintf("begins with %d", n)}
	switch {
	case n > p.Current:
		r.Code, r.Message = ScaledUp, fmt.Sprintf("from %d to %d", p.Current, n)
	case n < p.Current:
		r.Code, r.Message = ScaledDown, fmt.Sprintf("from %d to %d", p.Current, n)
	}
	for i, why := range p.plan.Reasons {
		if i == 0 {
			r.Message += ": " + why.GetMessage()
		} else {
			r.Message += "; " + why.GetMessage()
		}
	}
	return r
}

func (p *planner) lastWanted() int {
	if len(p.history) > 0 {
		return int(p.history[len(p.history)-1].GetWanted())
	}
	return p.Current
}

func (p *planner) because(code, format string, args ...any) {
	p.plan.Reasons = append(p.plan.Reasons, &portolanv1.Reason{Code: code, Message: fmt.Sprintf(format, args...)})
}

// wakeAt notes a time at which the answer may change.
func (p *planner) wakeAt(t time.Time) {
	if t.After(p.Now) && (p.plan.Next.IsZero() || t.Before(p.plan.Next)) {
		p.plan.Next = t
	}
}

// ceil rounds up, and takes the noise of division for none; at most what a record
// can hold.
func ceil(x float64) int {
	return int(math.Ceil(min(x, math.MaxInt32) - 1e-9))
}

// entry copies a sample of the history with another time.
func entry(s *clusterv1.ScaleSample, at time.Time) *clusterv1.ScaleSample {
	c := proto.CloneOf(s)
	c.Time = timestamppb.New(at)
	return c
}

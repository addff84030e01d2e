package autoscale

import (
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The history is a list of spans without gaps, oldest first. All but the newest
// carry the time at which they ended; the newest carries the time at which it
// began, and goes on. So an answer that does not change writes nothing, and a span
// that no window can ask for any more goes without making another one longer.

// historyLimit bounds it. Only a workload whose metrics ask for that many
// different numbers in one direction, one after the other, within a window comes
// near; then the window looks back less far.
const historyLimit = 500

// window gives a rule's length of looking back.
func window(r *portolanv1.ScaleRule, otherwise time.Duration) time.Duration {
	if r.GetStabilization() == nil {
		return otherwise
	}
	return max(0, r.GetStabilization().AsDuration())
}

func period(r *portolanv1.ScaleRule) time.Duration {
	if d := r.GetPeriod().AsDuration(); d > 0 {
		return d
	}
	return defaultPeriod
}

func (p *planner) upWindow() time.Duration   { return window(p.Spec.GetUp(), 0) }
func (p *planner) downWindow() time.Duration { return window(p.Spec.GetDown(), defaultDown) }

// over gives the least and the greatest of an answer and of all that were given
// within a window.
func (p *planner) over(n int, w time.Duration) (least, greatest int) {
	least, greatest = n, n
	if w <= 0 {
		return least, greatest
	}
	see := func(was int, end time.Time) {
		if was != n && end.Add(w).After(p.Now) {
			least, greatest = min(least, was), max(greatest, was)
			p.wakeAt(end.Add(w))
		}
	}
	for i, s := range p.history {
		if i < len(p.history)-1 {
			see(int(s.GetWanted()), s.GetTime().AsTime())
		} else {
			see(int(s.GetWanted()), p.Now)
		}
	}
	if len(p.history) == 0 {
		see(p.Current, p.Now) // what runs was wanted until now
	}
	return least, greatest
}

// stabilize goes up only to what was asked for during the whole window for going
// up, and down only to what was never exceeded in the other.
func stabilize(p *planner, n int) int {
	least, _ := p.over(n, p.upWindow())
	_, greatest := p.over(n, p.downWindow())
	switch {
	case p.Current < least:
		if least < n {
			p.because(Stabilizing, "%d were enough within the last %s: up to %d only", least, since(p.upWindow()), least)
		}
		return least
	case p.Current > greatest:
		if greatest > n {
			p.because(Stabilizing, "%d were wanted within the last %s: down to %d only", greatest, since(p.downWindow()), greatest)
		}
		return greatest
	case n > p.Current:
		p.because(Stabilizing, "%d were enough within the last %s: no more yet", least, since(p.upWindow()))
	case n < p.Current:
		p.because(Stabilizing, "%d were wanted within the last %s: no fewer yet", greatest, since(p.downWindow()))
	}
	return p.Current
}

// limit holds an answer to what may change within a period: the greater of a
// number and of a percentage of how many there were at its start.
func limit(p *planner, n int) int {
	r := p.Spec.GetUp()
	if n < p.Current {
		r = p.Spec.GetDown()
	}
	if n == p.Current || r.GetMaxReplicas() == 0 && r.GetMaxPercent() == 0 {
		return n
	}
	base := p.Current - p.changed(period(r))
	most := base + step(base, r)
	least := base - step(base, r)
	got := min(p.Current, max(n, least))
	if n > p.Current {
		got = max(p.Current, min(n, most))
	}
	if got != n {
		p.because(RateLimited, "there were %d replicas %s ago: %d by now, not yet %d", base, since(period(r)), got, n)
		p.wakeChanges(period(r))
	}
	return got
}

// step is how many replicas a rule lets come or go. A percentage lets at
// least one.
func step(base int, r *portolanv1.ScaleRule) int {
	percent := int(math.Ceil(float64(base) * float64(r.GetMaxPercent()) / 100))
	if r.GetMaxPercent() > 0 {
		percent = max(percent, 1)
	}
	return max(int(r.GetMaxReplicas()), percent)
}

// changed is by how much the number changed within a period.
func (p *planner) changed(d time.Duration) int {
	sum := 0
	for i := range len(p.history) - 1 {
		if p.history[i].GetTime().AsTime().Add(d).After(p.Now) {
			sum += int(p.history[i+1].GetReplicas() - p.history[i].GetReplicas())
		}
	}
	return sum
}

// wakeChanges wakes when the oldest change of a period leaves it. Where the limit
// holds without one there is a change that is being decided now.
func (p *planner) wakeChanges(d time.Duration) {
	p.wakeAt(p.Now.Add(d))
	for i := range len(p.history) - 1 {
		if p.history[i].GetReplicas() != p.history[i+1].GetReplicas() {
			p.wakeAt(p.history[i].GetTime().AsTime().Add(d))
		}
	}
}

// record gives the history after a decision; nil when it is as before.
func record(p *planner, wanted, n int) []*clusterv1.ScaleSample {
	now := &clusterv1.ScaleSample{Time: timestamppb.New(p.Now), Wanted: int32(wanted), Replicas: int32(n)}
	var spans []*clusterv1.ScaleSample
	if last := len(p.history) - 1; last >= 0 {
		was := p.history[last]
		if was.GetWanted() == now.GetWanted() && was.GetReplicas() == now.GetReplicas() {
			return nil
		}
		spans = append(append(spans, p.history[:last]...), entry(was, p.Now))
	} else {
		spans = append(spans, &clusterv1.ScaleSample{Time: now.GetTime(), Wanted: int32(p.Current), Replicas: int32(p.Current)})
	}
	return p.trim(append(spans, now))
}

// trim drops the spans that neither a window nor a period can ask for: those that
// are too old, and those that a later one exceeds and a later one undercuts.
func (p *planner) trim(spans []*clusterv1.ScaleSample) []*clusterv1.ScaleSample {
	look := max(p.upWindow(), p.downWindow())
	count := max(period(p.Spec.GetUp()), period(p.Spec.GetDown()))
	last := len(spans) - 1
	kept := []*clusterv1.ScaleSample{spans[last]}
	least, greatest, replicas := spans[last].GetWanted(), spans[last].GetWanted(), spans[last].GetReplicas()
	for i := last - 1; i >= 0; i-- {
		s := spans[i]
		end, w := s.GetTime().AsTime(), s.GetWanted()
		seen := (w < least || w > greatest) && end.Add(look).After(p.Now)
		counted := s.GetReplicas() != replicas && end.Add(count).After(p.Now)
		if (seen || counted) && len(kept) < historyLimit {
			kept = append(kept, s)
			least, greatest, replicas = min(least, w), max(greatest, w), s.GetReplicas()
		}
	}
	slices.Reverse(kept)
	return kept
}

package autoscale

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Profile is what the replicas of a workload used: two histograms that forget.
// The zero value is empty. Times must not be before 1970, and are kept to the
// second.
type Profile struct {
	cpu, memory histogram
	first, last time.Time // of the samples
	samples     uint64
	// peak is the most memory that any replica used in the day that ends at peakEnd.
	// It counts like a sample of the end of the day.
	peak    int64
	peakEnd time.Time
}

// MaxProfileBytes bounds a written profile.
const MaxProfileBytes = 1 + 5*10 + 2*(10+8+buckets*4+1)

// profileVersion is the first byte of a written profile.
const profileVersion = 1

// minWeight is the weight of a CPU sample of a replica that requests little; else
// it is the request in cores, so that many small ones do not hide a great one.
const minWeight = 0.1

// Observe adds a measurement of one replica. What is older than the day that is
// being looked at counts as of that day.
func (p *Profile) Observe(u *nodev1.Usage, request api.Resources) {
	if u == nil {
		return
	}
	at := u.GetTime().AsTime()
	if p.samples == 0 {
		p.first, p.last = at, at
	}
	p.samples++
	p.last = later(p.last, at)
	p.cpu.add(float64(max(u.GetCpuMilli(), 0))/1000/cpuFirst, max(minWeight, float64(request.CPUMilli)/1000), at)
	p.observeMemory(u.GetMemoryBytes(), at)
}

// ObserveOOM adds that a replica was killed for want of memory, with what it had:
// it needs a fifth more, and at least 100 MiB more.
func (p *Profile) ObserveOOM(at time.Time, had int64) {
	p.observeMemory(max(had+100<<20, had/5*6), at)
}

func (p *Profile) observeMemory(bytes int64, at time.Time) {
	if p.peakEnd.IsZero() {
		p.peakEnd = at.Add(halfLife)
	}
	if !at.Before(p.peakEnd) {
		p.memory.add(float64(p.peak)/memoryFirst, 1, p.peakEnd)
		days := at.Sub(p.peakEnd)/halfLife + 1
		p.peak, p.peakEnd = 0, p.peakEnd.Add(days*halfLife)
	}
	p.peak = max(p.peak, bytes)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// MarshalBinary writes it in at most MaxProfileBytes. Weights are rounded to a ten
// thousandth of the greatest.
func (p *Profile) MarshalBinary() ([]byte, error) {
	b := []byte{profileVersion}
	for _, v := range []int64{unix(p.first), unix(p.last), p.peak, unix(p.peakEnd)} {
		b = binary.AppendVarint(b, v)
	}
	b = binary.AppendUvarint(b, p.samples)
	return p.memory.append(p.cpu.append(b)), nil
}

// UnmarshalBinary reads what MarshalBinary wrote.
func (p *Profile) UnmarshalBinary(b []byte) error {
	if len(b) == 0 || len(b) > MaxProfileBytes || b[0] != profileVersion {
		return errProfile
	}
	r := &reader{b: b[1:]}
	q := Profile{first: r.time(), last: r.time(), peak: r.varint(), peakEnd: r.time(), samples: r.uvarint()}
	q.cpu, q.memory = r.histogram(), r.histogram()
	if r.bad || len(r.b) > 0 || q.peak < 0 {
		return errProfile
	}
	*p = q
	return nil
}

// Recommendation is what each replica should request.
type Recommendation struct {
	// Target is right; requests below Lower or above Upper should be changed. The
	// less is known, the further these are from it.
	Lower, Target, Upper api.Resources
	// Confidence counts days of one sample a minute.
	Confidence float64
	Reason     *portolanv1.Reason
}

// Reason codes of recommendations.
const (
	Recommended = "Recommended"
	NoUsage     = "NoUsage"
)

// The estimator's numbers, as published.
const (
	lowerShare, targetShare, upperShare = 0.5, 0.9, 0.95
	safety                              = 1.15
	// A bound is multiplied by (1 + factor ÷ confidence) to the exponent.
	lowerFactor, lowerExponent = 0.001, -2
	upperFactor, upperExponent = 1.0, 1
	samplesPerDay              = 24 * 60
)

// What no recommendation goes below, and above.
var (
	leastRequest    = api.Resources{CPUMilli: 25, MemoryBytes: 16 << 20}
	greatestRequest = api.Resources{CPUMilli: 1000 * 1000, MemoryBytes: 1e12}
)

// Recommend says what replicas should request. Of CPU it takes percentiles over
// all samples; of memory over daily peaks, for memory can not be had later.
func Recommend(p *Profile) Recommendation {
	if p.samples == 0 {
		return Recommendation{Reason: &portolanv1.Reason{Code: NoUsage, Message: "nothing is known of what it uses"}}
	}
	memory := p.memory
	memory.add(float64(p.peak)/memoryFirst, 1, p.peakEnd)
	out := Recommendation{Confidence: min(float64(p.last.Sub(p.first))/float64(halfLife), float64(p.samples)/samplesPerDay)}
	at := func(share, factor float64, exponent int) api.Resources {
		by := safety
		if factor > 0 {
			by *= math.Pow(1+factor/out.Confidence, float64(exponent))
		}
		return within(p.cpu.percentile(share)*cpuFirst*1000*by, memory.percentile(share)*memoryFirst*by)
	}
	out.Lower = at(lowerShare, lowerFactor, lowerExponent)
	out.Target = at(targetShare, 0, 1)
	out.Upper = at(upperShare, upperFactor, upperExponent)
	out.Reason = &portolanv1.Reason{Code: Recommended, Message: fmt.Sprintf("90%% of the time %dm of CPU and %d MiB are enough (%d samples over %s, 15%% margin)",
		out.Target.CPUMilli, out.Target.MemoryBytes>>20, p.samples, since(p.last.Sub(p.first)))}
	return out
}

// within rounds up to whole millicores and MiB, inside the bounds.
func within(milli, bytes float64) api.Resources {
	r := api.Resources{
		CPUMilli:    int64(math.Ceil(min(milli, float64(greatestRequest.CPUMilli)))),
		MemoryBytes: int64(math.Ceil(min(bytes, float64(greatestRequest.MemoryBytes))/(1<<20))) << 20,
	}
	return r.Max(leastRequest)
}

package autoscale

import (
	"encoding/binary"
	"errors"
	"math"
	"time"
)

// The histograms are those that Kubernetes publishes for its vertical autoscaler
// (https://github.com/kubernetes/autoscaler/tree/master/vertical-pod-autoscaler,
// recommender/model and recommender/util): each bucket is 5 % wider than the one
// before, and a sample has half the weight of one that is 24 h younger.
const (
	growth   = 1.05
	buckets  = 176
	halfLife = 24 * time.Hour
	// Sizes of the first buckets; the last begin at 1,000 cores and 1 TB.
	cpuFirst    = 0.01 // cores
	memoryFirst = 1e7  // bytes
	// renormalizeAfter bounds the exponent of the newest weight.
	renormalizeAfter = 100
	// precision is what the heaviest bucket is written as.
	precision = 10000
)

// histogram of values whose weight halves. The zero value is empty.
type histogram struct {
	weights   [buckets]float64
	reference time.Time // when a new sample has weight 1; zero while it is empty
}

// bucketOf gives the bucket of a value in units of the first bucket's size.
func bucketOf(v float64) int {
	if v < 1 {
		return 0
	}
	return min(int(math.Log(v*(growth-1)+1)/math.Log(growth)), buckets-1)
}

// startOf is the inverse: where a bucket begins.
func startOf(b int) float64 { return (math.Pow(growth, float64(b)) - 1) / (growth - 1) }

// factor is the weight of a sample at a time, and makes room for it.
func (h *histogram) factor(at time.Time) float64 {
	if h.reference.IsZero() {
		h.reference = at
	}
	age := float64(at.Sub(h.reference)) / float64(halfLife)
	if age > renormalizeAfter {
		scale := math.Exp2(-age)
		for i := range h.weights {
			h.weights[i] *= scale
		}
		h.reference, age = at, 0
	}
	return math.Exp2(age)
}

func (h *histogram) add(v, weight float64, at time.Time) {
	h.weights[bucketOf(v)] += weight * h.factor(at)
}

// percentile gives the end of the bucket that holds it, so it is never less than
// what was seen; the start of the last one.
func (h *histogram) percentile(p float64) float64 {
	total := 0.0
	for _, w := range h.weights {
		total += w
	}
	sum := 0.0
	for b, w := range h.weights {
		sum += w
		if w > 0 && sum >= p*total {
			return startOf(min(b+1, buckets-1))
		}
	}
	return 0
}

// append writes it with weights relative to the heaviest.
func (h *histogram) append(b []byte) []byte {
	heaviest := 0.0
	for _, w := range h.weights {
		heaviest = max(heaviest, w)
	}
	b = binary.AppendVarint(b, unix(h.reference))
	b = binary.BigEndian.AppendUint64(b, math.Float64bits(heaviest))
	last := -1
	for i, w := range h.weights {
		if n := uint64(math.Round(w / max(heaviest, math.SmallestNonzeroFloat64) * precision)); n > 0 {
			b = binary.AppendUvarint(b, uint64(i-last))
			b = binary.AppendUvarint(b, n)
			last = i
		}
	}
	return binary.AppendUvarint(b, 0)
}

var errProfile = errors.New("profile of use: the bytes are not those of one")

// reader takes a written profile apart; after the first fault everything is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	return v * r.take(n)
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	return v * int64(r.take(n))
}

// take goes on by n bytes: 1 when they are there.
func (r *reader) take(n int) uint64 {
	if n <= 0 || n > len(r.b) {
		r.b, r.bad = nil, true
		return 0
	}
	r.b = r.b[n:]
	return 1
}

func (r *reader) float() float64 {
	if len(r.b) < 8 {
		r.take(8)
		return 0
	}
	v := math.Float64frombits(binary.BigEndian.Uint64(r.b))
	r.take(8)
	if math.IsNaN(v) || v < 0 || v > math.MaxFloat64/buckets {
		r.bad = true
	}
	return v
}

func (r *reader) time() time.Time {
	if v := r.varint(); v != 0 {
		return time.Unix(v, 0).UTC()
	}
	return time.Time{}
}

func (r *reader) histogram() histogram {
	h := histogram{reference: r.time()}
	heaviest := r.float()
	for i := -1; !r.bad; {
		step := r.uvarint()
		if step == 0 {
			break
		}
		n := r.uvarint()
		if step > buckets || i+int(step) >= buckets || n == 0 || n > precision {
			r.bad = true
			break
		}
		i += int(step)
		h.weights[i] = float64(n) / precision * heaviest
	}
	return h
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

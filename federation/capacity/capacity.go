// Package capacity is the field's arithmetic of capacity and cost: how many
// replicas a node holds, how many a load needs, what a fleet costs, and what
// bandwidth requests take. It owns the formulas and their rounding, in whole
// numbers; it never asks anybody for figures.
//
// Concurrency: pure functions.
package capacity

import (
	"errors"
	"fmt"
	"math"
	"math/bits"

	"github.com/portolan-io/portolan/federation/api"
)

// HoursPerMonth is the field's month.
const HoursPerMonth = 730

// Node is a machine and what it would run.
type Node struct {
	// Size of the machine, and what is reserved of it for the system.
	Size, Reserved api.Resources
	// Request of one replica.
	Request api.Resources
	// Overhead of one replica beside its request: its proxy, its runtime, its
	// start.
	Overhead api.Resources
	// BusyOneIn says that one replica in so many has its CPU overhead at one time;
	// DefaultBusyOneIn when 0, all of them with 1. Memory overhead is there all the
	// time.
	BusyOneIn int64
}

// DefaultBusyOneIn is how rarely the CPU overhead of replicas coincides. Where
// each has 0.1 core of it beside a request of 100m, a node that could hold 70 by
// their requests is safe with 60: those use 6 of its 7 cores, and ten of them may
// have their overhead at once.
const DefaultBusyOneIn = 6

// Fit is how many replicas a node holds.
type Fit struct {
	// Available is the size without what is reserved.
	Available api.Resources
	// ByCPU and ByMemory are the bounds of each resource by the requests alone, Most
	// the least of them; Unbounded where nothing is requested.
	ByCPU    int64
	ByMemory int64
	Most     int64
	// Safe leaves room for the overhead.
	Safe int64
	// Bound is the resource that ends first, of Safe: "cpu" or "memory".
	Bound string
}

// Unbounded is how many fit where nothing is asked for.
const Unbounded = math.MaxInt64

// Fit gives min over resources of floor(available ÷ request), and the same with
// the overhead added.
func (n Node) Fit() (Fit, error) {
	f := Fit{Available: api.Resources{CPUMilli: n.Size.CPUMilli - n.Reserved.CPUMilli, MemoryBytes: n.Size.MemoryBytes - n.Reserved.MemoryBytes}}
	if f.Available.CPUMilli < 0 || f.Available.MemoryBytes < 0 {
		return Fit{}, errors.New("more is reserved than the node has")
	}
	if n.Request == (api.Resources{}) {
		return Fit{}, errors.New("a replica that requests nothing fits any number of times: say what it requests")
	}
	busy := n.BusyOneIn
	if busy == 0 {
		busy = DefaultBusyOneIn
	}
	if busy < 0 || min(n.Request.CPUMilli, n.Request.MemoryBytes, n.Overhead.CPUMilli, n.Overhead.MemoryBytes) < 0 {
		return Fit{}, errors.New("amounts must not be negative")
	}
	f.ByCPU, f.ByMemory = floor(f.Available.CPUMilli, n.Request.CPUMilli, 1), floor(f.Available.MemoryBytes, n.Request.MemoryBytes, 1)
	f.Most = min(f.ByCPU, f.ByMemory)
	// floor(available ÷ (request + overhead ÷ busy)), without fractions.
	cpu := floor(f.Available.CPUMilli, satAdd(satMul(busy, n.Request.CPUMilli), n.Overhead.CPUMilli), busy)
	memory := floor(f.Available.MemoryBytes, satAdd(n.Request.MemoryBytes, n.Overhead.MemoryBytes), 1)
	f.Safe, f.Bound = cpu, "cpu"
	if memory < cpu {
		f.Safe, f.Bound = memory, "memory"
	}
	return f, nil
}

// floor gives floor(available × times ÷ each), Unbounded when nothing is asked for.
func floor(available, each, times int64) int64 {
	if each <= 0 {
		return Unbounded
	}
	hi, lo := bits.Mul64(uint64(available), uint64(times))
	if hi >= uint64(each) {
		return Unbounded
	}
	q, _ := bits.Div64(hi, lo, uint64(each))
	return int64(min(q, Unbounded))
}

func satMul(a, b int64) int64 {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	if hi > 0 || lo > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(lo)
}

func satAdd(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// Replicas gives ceil(current × used ÷ target): how many replicas bring a
// utilisation to its target. 5 at 80 % with a target of 50 % become 8.
func Replicas(current int64, usedPercent, targetPercent float64) (int64, error) {
	if current < 0 || !(usedPercent >= 0) || !(targetPercent > 0) {
		return 0, errors.New("replicas and use must not be negative, and the target must be above 0")
	}
	return up(float64(current) * usedPercent / targetPercent)
}

// ReplicasForRate gives ceil(rate ÷ (rate of one × target)): how many replicas
// serve a rate of requests when each serves so many at most, and is to be used to
// a target only.
func ReplicasForRate(perSecond, each, targetPercent float64) (int64, error) {
	if !(perSecond >= 0) || !(each > 0) || !(targetPercent > 0) {
		return 0, errors.New("the rate must not be negative; the rate of one and the target must be above 0")
	}
	return up(perSecond / (each * targetPercent / 100))
}

// up rounds up, and takes the noise of division for none.
func up(x float64) (int64, error) {
	n := math.Ceil(x - 1e-9*max(1, x))
	if !(n < 1e15) {
		return 0, fmt.Errorf("%g replicas are beyond all measure", n)
	}
	return int64(n), nil
}

// NodesFor gives ceil(replicas ÷ replicas of one node).
func NodesFor(replicas, perNode int64) (int64, error) {
	if replicas < 0 || perNode <= 0 {
		return 0, errors.New("a node must hold at least one replica")
	}
	return (replicas + perNode - 1) / perNode, nil
}

// Bandwidth is what requests take.
type Bandwidth struct {
	BytesPerSecond float64
	BitsPerSecond  float64
	BytesPerMonth  float64
}

// BandwidthOf gives rate × size. Networks count in powers of ten: 10,000 requests/s
// of 20 KB are 200 MB/s, 1.6 Gbps.
func BandwidthOf(perSecond, bytes float64) (Bandwidth, error) {
	if !(perSecond >= 0) || !(bytes >= 0) {
		return Bandwidth{}, errors.New("rate and size must not be negative")
	}
	b := perSecond * bytes
	return Bandwidth{BytesPerSecond: b, BitsPerSecond: b * 8, BytesPerMonth: b * 3600 * HoursPerMonth}, nil
}

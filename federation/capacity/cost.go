package capacity

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Prices are in micro-units of currency, as the API has them.

// Micros is what a price in units comes to.
func Micros(units float64) (int64, error) {
	if !(units >= 0) || units > 1e12 {
		return 0, fmt.Errorf("%g is no price", units)
	}
	return int64(math.Round(units * 1e6)), nil
}

// Operation is a way to run a fleet for a month: so many control planes and nodes
// by the hour, and so many hours of people.
type Operation struct {
	ControlPlanes, Nodes         int64
	ControlPlaneHour, NodeHour   int64
	OperatorHours, OperatorPrice int64
	// Hours of the month; HoursPerMonth when 0.
	Hours int64
}

// Bill is what it costs in a month.
type Bill struct {
	ControlPlanes int64
	Nodes         int64
	Operators     int64
	Total         int64
}

// Bill sums it up. Self-managed, 3 control planes at $0.10 and 20 nodes at $0.15 for
// 730 hours and 40 hours at $100 are $6,409; managed, with one control plane's fee
// and 10 hours, $3,263.
func (o Operation) Bill() (Bill, error) {
	if min(o.ControlPlanes, o.Nodes, o.ControlPlaneHour, o.NodeHour, o.OperatorHours, o.OperatorPrice, o.Hours) < 0 {
		return Bill{}, errors.New("amounts must not be negative")
	}
	hours := cmp.Or(o.Hours, HoursPerMonth)
	b := Bill{
		ControlPlanes: satMul(satMul(o.ControlPlanes, o.ControlPlaneHour), hours), Nodes: satMul(satMul(o.Nodes, o.NodeHour), hours),
		Operators: satMul(o.OperatorHours, o.OperatorPrice),
	}
	b.Total = satAdd(satAdd(b.ControlPlanes, b.Nodes), b.Operators)
	return b, nil
}

// Price is that of a cluster or pool.
type Price struct{ CoreHour, GiBHour int64 }

// PriceOf gives the price of a pool: its own where it has one, else its cluster's.
func PriceOf(c *portolanv1.ClusterCapacity, p *portolanv1.PoolStatus) Price {
	return Price{CoreHour: cmp.Or(p.GetCpuCoreHourMicros(), c.GetCpuCoreHourMicros()), GiBHour: cmp.Or(p.GetMemoryGibHourMicros(), c.GetMemoryGibHourMicros())}
}

// MeanPrice is that of a cluster's pools, which count by their size, and of what is
// in none. What is reserved is not tied to a pool, and has this price.
func MeanPrice(c *portolanv1.ClusterCapacity) Price {
	cpu, memory := mean{}, mean{}
	for _, p := range c.GetPools() {
		own := PriceOf(c, p)
		cpu.add(p.GetCpuMilli(), own.CoreHour)
		memory.add(p.GetMemoryBytes(), own.GiBHour)
	}
	return Price{CoreHour: cpu.of(c.GetCpuMilli(), c.GetCpuCoreHourMicros()), GiBHour: memory.of(c.GetMemoryBytes(), c.GetMemoryGibHourMicros())}
}

// mean of prices, weighted by size.
type mean struct{ sum, size float64 }

func (m *mean) add(size, price int64) {
	m.sum, m.size = m.sum+float64(size)*float64(price), m.size+float64(size)
}

// of all of a cluster, what is in no pool at its own price.
func (m mean) of(all, price int64) int64 {
	m.add(max(0, all-int64(m.size)), price)
	if m.size == 0 {
		return price
	}
	return int64(math.Round(m.sum / m.size))
}

// PerHour is what an amount costs in an hour, rounded to the nearest micro-unit.
func (p Price) PerHour(r api.Resources) int64 {
	micros := float64(r.CPUMilli)/1000*float64(p.CoreHour) + float64(r.MemoryBytes)/(1<<30)*float64(p.GiBHour)
	return int64(math.Round(min(micros, math.MaxInt64/2)))
}

// Line is one line of a fleet's bill.
type Line struct {
	Name string
	// Capacity and Reserved are promised to replicas at most, and now.
	Capacity api.Resources
	Reserved api.Resources
	// CapacityHour is the price of all of it, ReservedHour of what is promised, in
	// micro-units an hour.
	CapacityHour int64
	ReservedHour int64
}

// Idle is what is paid for and not promised to anybody.
func (l Line) Idle() int64 { return max(0, l.CapacityHour-l.ReservedHour) }

func (l *Line) add(o Line) {
	l.Capacity, l.Reserved = l.Capacity.Add(o.Capacity), l.Reserved.Add(o.Reserved)
	l.CapacityHour, l.ReservedHour = satAdd(l.CapacityHour, o.CapacityHour), satAdd(l.ReservedHour, o.ReservedHour)
}

// ByCluster is the bill by cluster, in the order of the names; ByRegion by region.
func ByCluster(cs []*portolanv1.ClusterCapacity) []Line {
	return gather(cs, func(c *portolanv1.ClusterCapacity) string { return last(c.GetCluster()) })
}

// ByRegion is the bill by region, in the order of the names.
func ByRegion(cs []*portolanv1.ClusterCapacity) []Line {
	return gather(cs, (*portolanv1.ClusterCapacity).GetRegion)
}

func gather(cs []*portolanv1.ClusterCapacity, name func(*portolanv1.ClusterCapacity) string) []Line {
	sums := map[string]*Line{}
	for _, c := range cs {
		at(sums, name(c)).add(Line{
			Capacity: api.Resources{CPUMilli: c.GetCpuMilli(), MemoryBytes: c.GetMemoryBytes()}, Reserved: api.Resources{CPUMilli: c.GetReservedCpuMilli(), MemoryBytes: c.GetReservedMemoryBytes()},
			CapacityHour: c.GetCapacityCostMicros(), ReservedHour: c.GetReservedCostMicros(),
		})
	}
	return sorted(sums)
}

func at(sums map[string]*Line, name string) *Line {
	if sums[name] == nil {
		sums[name] = &Line{Name: name}
	}
	return sums[name]
}

func sorted(sums map[string]*Line) []Line {
	out := make([]Line, 0, len(sums))
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		out = append(out, *sums[name])
	}
	return out
}

// ByPlacement is what placements reserve, at the mean prices of their clusters, under
// the name that a function gives each: its tenant, its workload. A placement in a
// cluster that is not listed has no price.
func ByPlacement(cs []*portolanv1.ClusterCapacity, ps []*portolanv1.Placement, name func(*portolanv1.Placement) string) []Line {
	clusters := map[string]*portolanv1.ClusterCapacity{}
	for _, c := range cs {
		clusters[last(c.GetCluster())] = c
	}
	sums := map[string]*Line{}
	for _, p := range ps {
		claim := api.Resources{CPUMilli: p.GetSpec().GetReservedCpuMilli(), MemoryBytes: p.GetSpec().GetReservedMemoryBytes()}
		at(sums, name(p)).add(Line{Reserved: claim, ReservedHour: MeanPrice(clusters[last(p.GetName())]).PerHour(claim)})
	}
	return sorted(sums)
}

// last segment of a resource name.
func last(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

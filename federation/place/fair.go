package place

import (
	"cmp"
	"slices"

	"github.com/portolan-io/portolan/federation/api"
)

// Fair says whose turn it is among many workloads: higher priority first, and
// among equals the tenant that uses the smallest share of the fleet for its
// weight (dominant resource fairness, Ghodsi et al. 2011); one tenant's in order
// of name.
type Fair struct {
	total   api.Resources
	tenants []*tenant // in order of name
}

type tenant struct {
	name   string
	weight float64
	used   api.Resources
	queue  []Turn
	sorted bool
}

// Turn is one workload that waits. Index is the caller's.
type Turn struct {
	Name     string
	Priority int
	Index    int
}

// NewFair begins with nobody waiting, in a fleet of so much capacity.
func NewFair(total api.Resources) *Fair { return &Fair{total: total} }

// Add makes a workload wait. weight 0 is 1.
func (f *Fair) Add(name string, weight int, turn Turn) {
	t := f.tenant(name)
	t.weight = float64(max(1, weight))
	t.queue = append(t.queue, turn)
	t.sorted = false
}

// Use enters what a tenant's claims grew by; less is negative.
func (f *Fair) Use(name string, r api.Resources) {
	t := f.tenant(name)
	t.used.CPUMilli += r.CPUMilli
	t.used.MemoryBytes += r.MemoryBytes
}

func (f *Fair) tenant(name string) *tenant {
	i, ok := slices.BinarySearchFunc(f.tenants, name, func(t *tenant, name string) int { return cmp.Compare(t.name, name) })
	if !ok {
		f.tenants = slices.Insert(f.tenants, i, &tenant{name: name, weight: 1})
	}
	return f.tenants[i]
}

// Next is the workload whose turn it is; ok is false when none waits.
func (f *Fair) Next() (turn Turn, ok bool) {
	var best *tenant
	for _, t := range f.tenants {
		if len(t.queue) == 0 {
			continue
		}
		if !t.sorted {
			slices.SortFunc(t.queue, func(a, b Turn) int {
				return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.Name, b.Name))
			})
			t.sorted = true
		}
		if best == nil || t.queue[0].Priority > best.queue[0].Priority ||
			t.queue[0].Priority == best.queue[0].Priority && f.share(t) < f.share(best) {
			best = t
		}
	}
	if best == nil {
		return Turn{}, false
	}
	turn, best.queue = best.queue[0], best.queue[1:]
	return turn, true
}

// share is a tenant's dominant share, for its weight.
func (f *Fair) share(t *tenant) float64 {
	cpu := float64(t.used.CPUMilli) / float64(max(1, f.total.CPUMilli))
	mem := float64(t.used.MemoryBytes) / float64(max(1, f.total.MemoryBytes))
	return max(cpu, mem) / t.weight
}

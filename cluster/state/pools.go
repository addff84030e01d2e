package state

import (
	"cmp"
	"maps"
	"slices"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// DefaultPool is the pool of nodes without the label "pool".
const DefaultPool = "default"

// PoolOf is the pool that a node belongs to.
func PoolOf(n *clusterv1.Node) string { return cmp.Or(n.GetFacts().GetLabels()["pool"], DefaultPool) }

// Pools gives the pools that the cluster's spec describes, by name.
func (s *Snapshot) Pools() map[string]*portolanv1.NodePool {
	out := map[string]*portolanv1.NodePool{}
	for _, p := range s.Intents["cluster"].GetCluster().GetSpec().GetPools() {
		out[p.GetName()] = p
	}
	return out
}

// DevicesOf counts a node's devices in thousandths, by kind and model: "gpu/A100".
func DevicesOf(facts *nodev1.NodeFacts) map[string]int64 {
	out := map[string]int64{}
	for _, d := range facts.GetDevices() {
		out[DeviceKey(d)] += 1000
	}
	return out
}

// DeviceKey is kind and model, "gpu/A100"; the kind alone when it has no model.
func DeviceKey(d *nodev1.Device) string {
	if d.GetModel() == "" {
		return d.GetKind()
	}
	return d.GetKind() + "/" + d.GetModel()
}

// PoolStatuses sums up the nodes by pool, in order; pools of the spec that have no
// node are among them.
func (s *Snapshot) PoolStatuses() []*portolanv1.PoolStatus {
	specs := s.Pools()
	by := map[string]*portolanv1.PoolStatus{}
	of := func(name string) *portolanv1.PoolStatus {
		if by[name] == nil {
			spec := specs[name]
			by[name] = &portolanv1.PoolStatus{
				Pool: name, Spot: spec.GetSpot(), CpuCoreHourMicros: spec.GetCpuCoreHourMicros(), MemoryGibHourMicros: spec.GetMemoryGibHourMicros(),
			}
		}
		return by[name]
	}
	for name := range specs {
		of(name)
	}
	for _, n := range s.Nodes {
		st := of(PoolOf(n))
		st.Nodes++
		if n.GetLostTime() != nil {
			continue
		}
		st.NodesReady++
		room := s.schedulable(n, specs[PoolOf(n)])
		st.CpuMilli += room.CPUMilli
		st.MemoryBytes += room.MemoryBytes
		for _, d := range n.GetFacts().GetDevices() {
			if st.Devices == nil {
				st.Devices = map[string]int32{}
			}
			st.Devices[DeviceKey(d)]++
		}
	}
	out := make([]*portolanv1.PoolStatus, 0, len(by))
	for _, name := range slices.Sorted(maps.Keys(by)) {
		st, wish := by[name], s.Notes.Wishes[name]
		st.WantedNodes, st.WantedReason, st.UnneededNodes, st.WantedHourMicros = wish.Nodes, wish.Reason, wish.Going, wish.HourMicros
		out = append(out, st)
	}
	return out
}

// schedulable is what of a live node counts as room: a node that is drained has
// none, a cordoned one only what is bound to it.
func (s *Snapshot) schedulable(n *clusterv1.Node, pool *portolanv1.NodePool) api.Resources {
	room := Allocatable(n, pool)
	switch n.GetMode() {
	case portolanv1.NodeMode_NODE_MODE_DRAINING:
		return api.Resources{}
	case portolanv1.NodeMode_NODE_MODE_CORDONED:
		var bound api.Resources
		for _, a := range s.Allocations {
			if r, err := api.RequestsOf(a.GetSpec()); err == nil && a.GetNode() == n.GetNode() && a.GetFinal() == nil {
				bound = bound.Add(r)
			}
		}
		return api.Resources{CPUMilli: min(room.CPUMilli, bound.CPUMilli), MemoryBytes: min(room.MemoryBytes, bound.MemoryBytes)}
	case portolanv1.NodeMode_NODE_MODE_UNSPECIFIED:
	}
	return room
}

// Allocatable is what a node can be promised: what it has, without what its pool
// reserves for the system, times the pool's overcommit.
func Allocatable(n *clusterv1.Node, pool *portolanv1.NodePool) api.Resources {
	return AllocatableOf(n.GetFacts().GetCpuMilli(), n.GetFacts().GetMemoryBytes(), pool)
}

// AllocatableOf is the same for a node of that size. A reservation that does not
// parse counts as none: the federation refuses it.
func AllocatableOf(cpuMilli, memoryBytes int64, pool *portolanv1.NodePool) api.Resources {
	cpu, _ := api.ParseCPU(pool.GetReserved().GetCpu())
	mem, _ := api.ParseBytes(pool.GetReserved().GetMemory())
	return api.Resources{
		CPUMilli: percent(cpuMilli-cpu, pool.GetCpuOvercommitPercent()), MemoryBytes: percent(memoryBytes-mem, pool.GetMemoryOvercommitPercent()),
	}
}

// percent gives p percent of n, all of it when p is 0; never negative.
func percent(n int64, p int32) int64 {
	n = max(n, 0)
	if p <= 0 {
		return n
	}
	// In two parts, so that it cannot overflow below 2^56 times a hundred.
	return n/100*int64(p) + n%100*int64(p)/100
}

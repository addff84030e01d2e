package manager

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/cluster/autoscale"
	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Rates of what is looked at beside the plan.
const (
	// growEvery is how often the sizes of pools are thought over.
	growEvery = 10 * time.Second
	// rebalanceEvery is how often better nodes are looked for, and maxMoves how many
	// proposals are made at a time.
	rebalanceEvery = 30 * time.Second
	maxMoves       = 16
)

// moves are proposals: what no longer fits its node, looked for when nodes or pools
// changed, and from time to time what has a better one.
func (m *Manager) moves(s *state.Snapshot, now time.Time) []reconcile.Move {
	if m.mirror.changed {
		m.mirror.changed = false
		m.misfits = nil
		for _, f := range schedule.Misfits(m.mirror.table) {
			m.misfits = append(m.misfits, reconcile.Move{Allocation: f.Replica, Code: f.Code.String(), Reason: f.Message})
		}
	}
	out := slices.Clip(m.misfits)
	r := s.Intents["cluster"].GetCluster().GetSpec().GetRebalance()
	if r.GetMaxMovesPerHour() <= 0 || len(m.waiting) > 0 {
		m.nextRebalance = time.Time{}
		return out
	}
	if m.nextRebalance.IsZero() || !now.Before(m.nextRebalance) {
		m.nextRebalance = now.Add(rebalanceEvery)
		for _, mv := range schedule.Moves(m.mirror.table, maxMoves, int(cmp.Or(r.GetMinGainPercent(), 10))) {
			out = append(out, reconcile.Move{Allocation: mv.Replica, Node: mv.To, Code: reconcile.Rebalance, Reason: mv.Message})
		}
	}
	return out
}

// wishes says by how many nodes pools should grow or shrink. It is thought over now
// and then, where any pool may change at all.
func (m *Manager) wishes(s *state.Snapshot, now time.Time) map[string]state.PoolWish {
	grows := false
	for _, p := range s.Pools() {
		grows = grows || p.GetMaxNodes() > 0
	}
	if !grows {
		m.nextGrowth, m.wanted = time.Time{}, nil
		return nil
	}
	if !m.nextGrowth.IsZero() && now.Before(m.nextGrowth) {
		return m.wanted
	}
	m.nextGrowth = now.Add(growEvery)
	plan := autoscale.GrowPools(autoscale.PoolsInput{Pending: m.pendingShapes(), Pools: m.pools(s), Nodes: m.poolNodes(s)})
	m.wanted = make(map[string]state.PoolWish, len(plan.Changes))
	for _, c := range plan.Changes {
		m.wanted[c.Pool] = state.PoolWish{
			Nodes: int32(c.Delta), Reason: c.Reason.GetCode() + ": " + c.Reason.GetMessage(), Going: c.Nodes, HourMicros: c.HourMicros,
		}
	}
	return m.wanted
}

// pendingShapes are the groups that found no node, in order.
func (m *Manager) pendingShapes() []autoscale.Shape {
	var out []autoscale.Shape
	for _, key := range slices.Sorted(maps.Keys(m.waiting)) {
		w := m.waiting[key]
		if len(w.refused) == 0 || w.bad != nil || w.group.Node != "" {
			continue // a node of its own is what it waits for
		}
		sh := shapeOf(key, w.steps[0].Revision.GetSpec(), w.group.Class)
		sh.Count = w.group.Count
		out = append(out, sh)
	}
	return out
}

func shapeOf(key string, spec *portolanv1.WorkloadSpec, class *schedule.Class) autoscale.Shape {
	sc := spec.GetScheduling()
	sh := autoscale.Shape{
		Key: key, Count: 1, Priority: int(spec.GetPriority()), Request: class.Request(), Devices: sc.GetDevices(), Selector: sc.GetNodeSelector(),
		Affinity: sc.GetNodeAffinity(), Tolerations: sc.GetTolerations(), Capacity: spec.GetPlacement().GetCapacity(),
	}
	for _, c := range spec.GetContainers() {
		if n, err := api.ParseBytes(cmp.Or(c.GetRequests().GetStorage(), c.GetLimits().GetStorage())); err == nil {
			sh.StorageBytes += n
		}
	}
	for _, v := range spec.GetVolumes() {
		if n, err := api.ParseBytes(v.GetSize()); err == nil {
			sh.StorageBytes += n
		}
	}
	return sh
}

// pools describes what a new node of each pool would be: as its spec says, and else
// like one that is there. Of its size is left what the daemons leave that it would
// admit.
func (m *Manager) pools(s *state.Snapshot) []autoscale.Pool {
	daemons := m.daemons(s)
	cluster := s.Intents["cluster"].GetCluster().GetSpec()
	like, count := map[string]*clusterv1.Node{}, map[string]int{}
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		p := state.PoolOf(s.Nodes[id])
		if count[p]++; like[p] == nil {
			like[p] = s.Nodes[id]
		}
	}
	var out []autoscale.Pool
	for _, p := range cluster.GetPools() {
		facts := like[p.GetName()].GetFacts()
		cpu, _ := api.ParseCPU(p.GetNodeSize().GetCpu()) // the federation refuses what does not parse
		mem, _ := api.ParseBytes(p.GetNodeSize().GetMemory())
		disk, _ := api.ParseBytes(p.GetNodeSize().GetStorage())
		size := state.AllocatableOf(cmp.Or(cpu, facts.GetCpuMilli()), cmp.Or(mem, facts.GetMemoryBytes()), p)
		pool := autoscale.Pool{
			Name: p.GetName(), Size: size, StorageBytes: cmp.Or(disk, facts.GetStorageBytes()), Labels: maps.Clone(facts.GetLabels()), Taints: facts.GetTaints(),
			Spot: p.GetSpot(), Min: int(p.GetMinNodes()), Max: int(p.GetMaxNodes()), Current: count[p.GetName()],
		}
		if pool.Labels == nil {
			pool.Labels = map[string]string{}
		}
		pool.Labels[schedule.PoolKey] = p.GetName()
		delete(pool.Labels, schedule.NodeKey) // a new one has a name of its own
		perCore := cmp.Or(p.GetCpuCoreHourMicros(), cluster.GetCpuCoreHourMicros())
		perGiB := cmp.Or(p.GetMemoryGibHourMicros(), cluster.GetMemoryGibHourMicros())
		pool.HourMicros = cmp.Or(cpu, facts.GetCpuMilli())*perCore/1000 + cmp.Or(mem, facts.GetMemoryBytes())>>20*perGiB>>10
		pool.Devices = stock(facts.GetDevices())
		node := &clusterv1.Node{Facts: &nodev1.NodeFacts{Labels: pool.Labels, Taints: pool.Taints}}
		for _, d := range daemons {
			if schedule.Admit(node, d.spec).Begin {
				pool.Size, pool.StorageBytes = without(pool.Size, pool.StorageBytes, d.shape)
			}
		}
		out = append(out, pool)
	}
	return out
}

// onEach is a daemon: what every node that admits it runs one replica of.
type onEach struct {
	spec  *portolanv1.WorkloadSpec
	shape autoscale.Shape
}

// daemons are those that the cluster is to run, by their current revision.
func (m *Manager) daemons(s *state.Snapshot) []onEach {
	var out []onEach
	for _, i := range s.Intents {
		w := i.GetWorkload()
		for _, r := range w.GetRevisions() {
			if r.GetRevision() != w.GetCurrentRevision() || r.GetSpec().GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
				continue
			}
			owner := schedule.Owner{Tenant: w.GetTenant(), Workload: w.GetWorkload(), Revision: r.GetRevision()}
			if class, err := m.mirror.class(owner, r.GetSpec()); err == nil { // what does not compile runs nowhere
				out = append(out, onEach{spec: r.GetSpec(), shape: shapeOf("", r.GetSpec(), class)})
			}
		}
	}
	return out
}

// without is what a daemon leaves, never less than nothing.
func without(size api.Resources, storage int64, d autoscale.Shape) (api.Resources, int64) {
	left := api.Resources{CPUMilli: max(0, size.CPUMilli-d.Request.CPUMilli), MemoryBytes: max(0, size.MemoryBytes-d.Request.MemoryBytes)}
	return left, max(0, storage-d.StorageBytes)
}

// poolNodes are the nodes that are well, with what runs on them. Daemons are no
// replicas that would have to go elsewhere: a node is as large as its own leave it.
func (m *Manager) poolNodes(s *state.Snapshot) []autoscale.PoolNode {
	by, specs := map[string]*autoscale.PoolNode{}, s.Pools()
	for id, n := range s.Nodes {
		if n.GetLostTime() == nil {
			size := state.Allocatable(n, specs[state.PoolOf(n)])
			by[id] = &autoscale.PoolNode{ID: id, Pool: state.PoolOf(n), Size: &size, StorageBytes: n.GetFacts().GetStorageBytes()}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.Allocations)) {
		a := s.Allocations[id]
		n := by[a.GetNode()]
		if n == nil || a.GetFinal() != nil {
			continue
		}
		isDaemon := a.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
		n.Pinned = n.Pinned || !isDaemon && len(a.GetVolumes()) > 0
		class, err := m.mirror.class(ownerOf(a), a.GetSpec())
		if err != nil {
			continue
		}
		shape := shapeOf(ownerKey(a), a.GetSpec(), class)
		if isDaemon {
			*n.Size, n.StorageBytes = without(*n.Size, n.StorageBytes, shape)
		} else {
			n.Replicas = append(n.Replicas, shape)
		}
	}
	out := make([]autoscale.PoolNode, 0, len(by))
	for _, id := range slices.Sorted(maps.Keys(by)) {
		out = append(out, *by[id])
	}
	return out
}

func ownerKey(a *clusterv1.Allocation) string {
	return a.GetTenant() + "/" + a.GetWorkload() + "/" + a.GetRevision()
}

// blocked says of the nodes that are drained what still runs there, and why.
func blocked(s *state.Snapshot, draining map[reconcile.Key]reconcile.Note) map[string][]state.Blocked {
	var left []*clusterv1.Allocation
	for _, a := range s.Allocations {
		if a.GetFinal() == nil && s.Nodes[a.GetNode()].GetMode() == portolanv1.NodeMode_NODE_MODE_DRAINING {
			left = append(left, a)
		}
	}
	slices.SortFunc(left, func(a, b *clusterv1.Allocation) int { return cmp.Compare(a.GetAllocation(), b.GetAllocation()) })
	out := map[string][]state.Blocked{}
	for _, a := range left {
		b := state.Blocked{Code: "Waiting", Message: "it is about to be looked at", Count: 1}
		if note, ok := draining[reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}]; ok {
			b.Code, b.Message = note.Code, note.Message
		}
		if a.GetStop() {
			b.Code, b.Message = "Stopping", "it was told to stop"
		}
		b.Message = a.GetTenant() + "/" + a.GetWorkload() + ": " + b.Message
		list := out[a.GetNode()]
		if i := slices.IndexFunc(list, func(x state.Blocked) bool { return x.Code == b.Code && x.Message == b.Message }); i >= 0 {
			list[i].Count++
			continue
		}
		out[a.GetNode()] = append(list, b)
	}
	return out
}

// stock counts a node's devices by kind and model, in order.
func stock(devices []*nodev1.Device) []autoscale.DeviceStock {
	var out []autoscale.DeviceStock
	for _, d := range devices {
		i := slices.IndexFunc(out, func(s autoscale.DeviceStock) bool { return s.Kind == d.GetKind() && s.Model == d.GetModel() })
		if i < 0 {
			out = append(out, autoscale.DeviceStock{Kind: d.GetKind(), Model: d.GetModel()})
			i = len(out) - 1
		}
		out[i].Count++
	}
	return out
}

// Package sim is a model cluster: the deciding cores of a cluster on nodes that are
// a few maps, in one goroutine, driven by a seed. Every event is followed by what
// the cluster's loop does, and that by a check of the invariants. The same seed
// gives the same run, to the byte.
//
// It owns the model and the checks; it decides nothing: reconcile and schedule do.
//
// Concurrency: a Cluster belongs to one goroutine.
package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const (
	maxNodes     = 8
	maxWorkloads = 9
	// addresses that a node has for replicas.
	addresses = 16
	// silence after which a node counts as lost.
	silence = 3 * time.Second
	// sweep is how often what no longer fits and what could be better is looked for.
	sweep = 10 * time.Second
)

// start is when each cluster's life begins.
var start = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

// process is what runs on a node, whatever its cluster knows of it.
type process struct {
	key     reconcile.Key
	spec    *portolanv1.WorkloadSpec
	volumes []string
	began   time.Time
	// until is when it comes to its end: a job's work, or the grace of a stop.
	until    time.Time
	stopping bool
	status   *nodev1.AllocationStatus
}

// node is a machine: its record at the cluster, and itself.
type node struct {
	record *clusterv1.Node
	cut    bool
	heard  time.Time
	procs  map[string]*process
	// known is what the node was told when it was last reachable, applied the
	// generation of that; reported what it said.
	known    map[string]*clusterv1.Allocation
	applied  int64
	reported map[string]*nodev1.AllocationStatus
}

// Cluster is the model.
type Cluster struct {
	rand *rand.Rand
	Now  time.Time
	log  []string
	tell int // how many lines of it are kept

	intents  map[reconcile.Key]reconcile.Workload
	nodes    map[string]*node
	allocs   map[string]*clusterv1.Allocation
	modified map[string]int64
	volumes  map[string]*clusterv1.Volume
	states   map[reconcile.Key]*clusterv1.WorkloadState
	pending  map[reconcile.Key][]*portolanv1.Reason
	gen      int64
	epoch    int64
	// revisions counts those of all workloads.
	revisions int64
	named     int
	swept     time.Time
	moves     []reconcile.Move
	// nominated are the groups for which room is kept.
	nominated map[string]bool
	// load is how much CPU a workload that scales needs on the whole, in thousandths
	// of a core; scaled is when its metrics were last looked at.
	load   map[reconcile.Key]int64
	scaled time.Time
	pools  []*portolanv1.NodePool
	// began is the newest run of each cron workload that has begun, disrupted when
	// replicas of a workload were disrupted: both by key and uid.
	began     map[string]int64
	disrupted map[string][]time.Time
	evicted   []eviction
	requests  map[*portolanv1.WorkloadSpec]api.Resources
	faults    faults

	table   *schedule.Table
	classes map[*portolanv1.WorkloadSpec]*schedule.Class
	// bad revisions never get ready, by name.
	bad map[string]bool
	// Reached counts what the run came to.
	Reached map[string]int
	// pass is the trace of the last one, for checks.
	pass trace
}

// eviction is the replacement of a replica whose node is lost.
type eviction struct {
	of string
	at time.Time
}

// trace is what one pass did.
type trace struct {
	stops   []reconcile.Step
	evicted int
	bound   []string
	created map[reconcile.Key]bool
	before  map[reconcile.Key]int // replicas that serve, before
	// mine are the records of the present workload of each key, sorted; foreign says
	// that there are others of the name.
	mine    map[reconcile.Key][]*clusterv1.Allocation
	foreign map[reconcile.Key]bool
}

// New makes an empty cluster with a few nodes.
func New(seed uint64) *Cluster { return newCluster(seed, faults{}) }

func newCluster(seed uint64, f faults) *Cluster {
	c := &Cluster{
		faults: f, tell: 100,
		rand: rand.New(rand.NewPCG(seed, 0x706f72746f6c616e)), Now: start,
		intents: map[reconcile.Key]reconcile.Workload{}, nodes: map[string]*node{}, allocs: map[string]*clusterv1.Allocation{}, modified: map[string]int64{},
		volumes: map[string]*clusterv1.Volume{}, states: map[reconcile.Key]*clusterv1.WorkloadState{}, pending: map[reconcile.Key][]*portolanv1.Reason{},
		load: map[reconcile.Key]int64{}, began: map[string]int64{}, disrupted: map[string][]time.Time{}, requests: map[*portolanv1.WorkloadSpec]api.Resources{},
		table: schedule.NewTable(seed), classes: map[*portolanv1.WorkloadSpec]*schedule.Class{}, bad: map[string]bool{}, nominated: map[string]bool{}, Reached: map[string]int{},
	}
	c.setPools()
	for range 4 {
		c.addNode()
	}
	return c
}

func keyOf(a *clusterv1.Allocation) reconcile.Key {
	return reconcile.Key{Tenant: a.GetTenant(), Workload: a.GetWorkload()}
}

// setPools draws how nodes are used: some keep a part for the system, some promise
// more CPU than there is.
func (c *Cluster) setPools() {
	c.pools = []*portolanv1.NodePool{
		{Name: schedule.DefaultPool, Scoring: portolanv1.Scoring(c.rand.IntN(5)), Reserved: &portolanv1.ResourceList{Cpu: "250m", Memory: "256Mi"}},
		{Name: "dense", Scoring: portolanv1.Scoring(c.rand.IntN(5)), CpuOvercommitPercent: 100 + 25*int32(c.rand.IntN(4))},
	}
	c.table.SetPools(schedule.Pools{Pools: c.pools, CPUCoreHourMicros: 30_000, MemGiBHourMicros: 4_000})
	c.say("pools: %v", c.pools)
}

func (c *Cluster) say(format string, args ...any) {
	c.log = append(c.log, c.Now.Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	if len(c.log) > 2*c.tell {
		c.log = slices.Delete(c.log, 0, c.tell)
	}
}

// Log is the end of what happened.
func (c *Cluster) Log() []string { return c.log }

func (c *Cluster) addNode() {
	c.named++
	id := fmt.Sprintf("n%d", c.named)
	n := &node{
		record: &clusterv1.Node{Node: id, Facts: &nodev1.NodeFacts{
			CpuMilli: 4000 + 2000*c.rand.Int64N(3), MemoryBytes: 8 << 30, StorageBytes: 64 << 30,
			Labels: map[string]string{"zone": string(rune('a' + c.rand.IntN(3))), "disk": []string{"ssd", "hdd"}[c.rand.IntN(2)]},
		}},
		heard: c.Now, procs: map[string]*process{}, known: map[string]*clusterv1.Allocation{}, reported: map[string]*nodev1.AllocationStatus{},
	}
	if c.rand.IntN(3) == 0 {
		n.record.Facts.Labels[schedule.PoolKey] = "dense"
	}
	if c.rand.IntN(3) == 0 {
		for i := range int32(2) {
			n.record.Facts.Devices = append(n.record.Facts.Devices, &nodev1.Device{Kind: "gpu", Model: []string{"small", "big"}[c.rand.IntN(2)], Index: i})
		}
	}
	c.nodes[id] = n
	c.say("node %s: %v", id, n.record.GetFacts().GetLabels())
}

// input is what reconcile reads.
func (c *Cluster) input() reconcile.Input {
	in := reconcile.Input{
		Now: c.Now, Workloads: c.intents, Nodes: make(map[string]reconcile.Node, len(c.nodes)), Allocations: c.allocs, Modified: c.modified, Volumes: c.volumes,
		States: c.states, Admit: admit, Moves: c.moves, Rebalance: &portolanv1.Rebalance{MaxMovesPerHour: 6}, Pending: c.pending,
	}
	for id, n := range c.nodes {
		in.Nodes[id] = reconcile.Node{Record: n.record, Observed: true, Applied: n.applied, Allocations: n.reported}
	}
	c.faults.input(&in, c.gen)
	return in
}

func admit(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) reconcile.Admission {
	n = &clusterv1.Node{Node: n.GetNode(), Facts: n.GetFacts(), TaintTimes: n.GetTaintTimes()}
	switch a := schedule.Admit(n, spec); {
	case a.Begin:
		return reconcile.Admitted
	case a.Stay:
		return reconcile.Stay
	}
	return reconcile.Refused
}

// class compiles a spec once.
func (c *Cluster) class(k reconcile.Key, revision string, spec *portolanv1.WorkloadSpec) *schedule.Class {
	if cl := c.classes[spec]; cl != nil {
		return cl
	}
	cl, err := schedule.Compile(c.faults.compiled(spec), schedule.Options{Owner: schedule.Owner{Tenant: k.Tenant, Workload: k.Workload, Revision: revision}})
	if err != nil {
		panic(err) // the model writes its specs itself
	}
	c.classes[spec] = cl
	return cl
}

// requestsOf is what a replica takes of a node.
func (c *Cluster) requestsOf(spec *portolanv1.WorkloadSpec) api.Resources {
	r, known := c.requests[spec]
	if !known {
		var err error
		if r, err = schedule.Requests(spec, api.Resources{}); err != nil {
			panic(err) // the model writes its specs itself
		}
		c.requests[spec] = r
	}
	return r
}

// used is what a node has promised by the records.
func (c *Cluster) used(id string) (api.Resources, map[int32]int32) {
	var sum api.Resources
	shares := map[int32]int32{}
	for _, a := range c.allocs {
		if a.GetNode() != id || a.GetFinal() != nil {
			continue
		}
		sum = sum.Add(c.requestsOf(a.GetSpec()))
		for _, d := range a.GetDevices() {
			shares[d.GetIndex()] += d.GetMilli()
		}
	}
	return sum, shares
}

// capacity is what a node may promise: what it has, less what its pool keeps for
// the system, as much of that as the pool says.
func (c *Cluster) capacity(n *node) api.Resources {
	f := n.record.GetFacts()
	cpu, memory := f.GetCpuMilli(), f.GetMemoryBytes()
	for _, p := range c.pools {
		name := f.GetLabels()[schedule.PoolKey]
		if name == "" {
			name = schedule.DefaultPool
		}
		if p.GetName() != name {
			continue
		}
		if p.GetReserved() != nil {
			cpu, memory = cpu-250, memory-256<<20
		}
		if o := int64(p.GetCpuOvercommitPercent()); o > 0 {
			cpu = cpu * o / 100
		}
	}
	return api.Resources{CPUMilli: cpu, MemoryBytes: memory}
}

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
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

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

// process is what runs on a node, whatever its cluster knows of it.
type process struct {
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

	intents  map[reconcile.Key]reconcile.Workload
	nodes    map[string]*node
	allocs   map[string]*clusterv1.Allocation
	modified map[string]int64
	volumes  map[string]*clusterv1.Volume
	states   map[reconcile.Key]*clusterv1.WorkloadState
	pending  map[reconcile.Key][]*portolanv1.Reason
	gen      int64
	epoch    int64
	named    int
	swept    time.Time
	moves    []reconcile.Move
	// nominated are the groups for which room is kept.
	nominated map[string]bool

	table   *schedule.Table
	classes map[*portolanv1.WorkloadSpec]*schedule.Class
	// bad revisions never get ready, by name.
	bad map[string]bool
	// Reached counts what the run came to.
	Reached map[string]int
	// pass is the trace of the last one, for checks.
	pass trace
}

// trace is what one pass did.
type trace struct {
	stops    []reconcile.Step
	evicted  int
	bound    []string
	held     bool
	before   map[reconcile.Key]int // replicas that serve, before
	disrupts map[reconcile.Key]int
}

// New makes an empty cluster with a few nodes.
func New(seed uint64) *Cluster {
	c := &Cluster{
		rand: rand.New(rand.NewPCG(seed, 0x706f72746f6c616e)), Now: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC),
		intents: map[reconcile.Key]reconcile.Workload{}, nodes: map[string]*node{}, allocs: map[string]*clusterv1.Allocation{}, modified: map[string]int64{},
		volumes: map[string]*clusterv1.Volume{}, states: map[reconcile.Key]*clusterv1.WorkloadState{}, pending: map[reconcile.Key][]*portolanv1.Reason{},
		table: schedule.NewTable(seed), classes: map[*portolanv1.WorkloadSpec]*schedule.Class{}, bad: map[string]bool{}, nominated: map[string]bool{}, Reached: map[string]int{},
	}
	for range 4 {
		c.addNode()
	}
	return c
}

func (c *Cluster) say(format string, args ...any) {
	c.log = append(c.log, c.Now.Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	if len(c.log) > 200 {
		c.log = slices.Delete(c.log, 0, 100)
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
		for i := range int32(2) {
			n.record.Facts.Devices = append(n.record.Facts.Devices, &nodev1.Device{Kind: "gpu", Model: []string{"small", "big"}[c.rand.IntN(2)], Index: i})
		}
	}
	c.nodes[id] = n
	c.say("node %s: %v", id, n.record.GetFacts().GetLabels())
}

// sync has every reachable node do what it is told and report.
func (c *Cluster) sync() {
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[id]
		n.live(c)
		if n.cut {
			continue
		}
		n.heard, n.applied = c.Now, c.gen
		n.known = map[string]*clusterv1.Allocation{}
		for a, rec := range c.allocs {
			if rec.GetNode() == id {
				n.known[a] = rec
			}
		}
		n.obey(c)
		n.reported = map[string]*nodev1.AllocationStatus{}
		for a, p := range n.procs {
			n.reported[a] = p.status
		}
	}
}

// obey starts and stops processes as the node was last told.
func (n *node) obey(c *Cluster) {
	for _, a := range slices.Sorted(maps.Keys(n.known)) {
		rec, p := n.known[a], n.procs[a]
		switch {
		case p == nil && !rec.GetStop() && rec.GetFinal() == nil:
			p = &process{spec: rec.GetSpec(), volumes: rec.GetVolumes(), began: c.Now, status: &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_STARTING}}
			if k := rec.GetSpec().GetKind(); k == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || k == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
				p.until = c.Now.Add(time.Duration(1+c.rand.IntN(20)) * time.Second)
			}
			n.procs[a] = p
		case p != nil && rec.GetStop() && !p.stopping:
			p.stopping, p.until = true, c.Now.Add(time.Duration(c.rand.IntN(3000))*time.Millisecond)
		}
	}
	for a, p := range n.procs {
		if n.known[a] == nil {
			p.stopping, p.until = true, c.Now // nobody wants it any more
		}
	}
	n.end(c)
}

// live lets processes get on: ready after two seconds, done when their time is up.
func (n *node) live(c *Cluster) {
	for _, a := range slices.Sorted(maps.Keys(n.procs)) {
		p := n.procs[a]
		finite := p.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || p.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
		rev := n.known[a].GetRevision()
		switch {
		case p.stopping || p.status.GetState() == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED || p.status.GetState() == portolanv1.ReplicaState_REPLICA_STATE_FAILED:
		case finite && !c.Now.Before(p.until):
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED}
			if c.bad[rev] || c.rand.IntN(5) == 0 {
				p.status.State = portolanv1.ReplicaState_REPLICA_STATE_FAILED
			}
		case finite:
		case c.bad[rev] && c.Now.Sub(p.began) > 2*time.Second:
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_BACKOFF, Containers: []*portolanv1.ContainerState{{
				Restarts: int32(c.Now.Sub(p.began) / (10 * time.Second)), LastExitReason: "Error", LastExitTime: timestamppb.New(c.Now),
			}}}
		case !p.status.GetReady() && c.Now.Sub(p.began) > 2*time.Second:
			p.status = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true, Timeline: &portolanv1.Timeline{Ready: timestamppb.New(c.Now)}}
		}
	}
	n.end(c)
}

func (n *node) end(c *Cluster) {
	for a, p := range n.procs {
		if p.stopping && !c.Now.Before(p.until) {
			delete(n.procs, a)
		}
	}
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
	cl, err := schedule.Compile(spec, schedule.Options{Owner: schedule.Owner{Tenant: k.Tenant, Workload: k.Workload, Revision: revision}})
	if err != nil {
		panic(err) // the model writes its specs itself
	}
	c.classes[spec] = cl
	return cl
}

// free is what a node has left by its records, for the check against the table.
func (c *Cluster) used(id string) (api.Resources, map[int32]int32) {
	var sum api.Resources
	shares := map[int32]int32{}
	for _, a := range c.allocs {
		if a.GetNode() != id || a.GetFinal() != nil {
			continue
		}
		r, err := schedule.Requests(a.GetSpec(), api.Resources{})
		if err != nil {
			panic(err)
		}
		sum = sum.Add(r)
		for _, d := range a.GetDevices() {
			shares[d.GetIndex()] += d.GetMilli()
		}
	}
	return sum, shares
}

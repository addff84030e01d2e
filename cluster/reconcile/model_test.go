package reconcile

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The workloads of the model, one of every kind.
var (
	lockKey = Key{"t", "lock"} // at most one in the world
	dbKey   = Key{"t", "db"}
	sumKey  = Key{"t", "sum"}
	tickKey = Key{"t", "tick"}
	gwKey   = Key{"t", "gw"}
)

// model drives a world with random events and holds every plan against the
// invariants. The same seed does the same.
type model struct {
	*world
	rng    *rand.Rand
	epoch  int64
	uids   int
	events int
	reach  map[string]int // rare states that were reached

	trace  func(string) // of every step, to look at a failing seed
	moved  []time.Time
	quiet  bool // no more faults
	rounds int  // of the calm
	steps  int  // of the last plan
}

func newModel(seed uint64, f faults) *model {
	m := &model{world: newWorld(), rng: rand.New(rand.NewPCG(seed, 1)), reach: map[string]int{}}
	m.faults = f
	for i := range 2 + m.rng.IntN(6) {
		n := m.addNode(fmt.Sprintf("n%d", i+1))
		n.Record.Facts.Labels = map[string]string{"zone": fmt.Sprintf("z%d", i%2)}
	}
	if m.chance(2) {
		m.rebalance = &portolanv1.Rebalance{MaxMovesPerHour: int32(1 + m.rng.IntN(2))}
	}
	for _, k := range []Key{web, lockKey, dbKey, sumKey, tickKey, gwKey} {
		m.newIntent(k)
	}
	return m
}

func (m *model) chance(n int) bool { return m.rng.IntN(n) == 0 }

func pickOne[T any](m *model, from []T) T { return from[m.rng.IntN(len(from))] }

func (m *model) anyNode() *Node { return m.nodes[pickOne(m, slices.Sorted(maps.Keys(m.nodes)))] }

// anyReplica is one whose node is there; empty when there is none.
func (m *model) anyReplica(of func(*clusterv1.Allocation) bool) string {
	var ids []string
	for _, id := range slices.Sorted(maps.Keys(m.allocs)) {
		if a := m.allocs[id]; a.GetFinal() == nil && !m.nodes[a.GetNode()].lost() && of(a) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return pickOne(m, ids)
}

func (m *model) budgetSpec() *portolanv1.DisruptionBudget {
	b := &portolanv1.DisruptionBudget{}
	switch m.rng.IntN(6) {
	case 0:
		return nil
	case 1:
		b.MaxUnavailable = new(int32(m.rng.IntN(3)))
	case 2:
		b.MinAvailable = new(int32(m.rng.IntN(4)))
	case 3:
		b.MaxUnavailablePercent = new(int32(m.rng.IntN(60)))
	case 4:
		b.MaxPerHour = new(int32(1 + m.rng.IntN(3)))
	case 5:
		b.Windows = []*portolanv1.TimeWindow{{Start: "00:00", End: "00:03"}, {Start: "00:10", End: "12:00"}}
	}
	return b
}

// newIntent wants something new of a workload.
func (m *model) newIntent(k Key) {
	m.epoch++
	in := &linkv1.WorkloadIntent{Tenant: k.Tenant, Workload: k.Workload, Uid: "u", Epoch: m.epoch}
	if old := m.workloads[k].Intent; old != nil {
		in.Uid = old.GetUid()
	} else if m.uids++; true {
		in.Uid = fmt.Sprintf("u%d", m.uids)
	}
	spec := &portolanv1.WorkloadSpec{Update: &portolanv1.WorkloadSpec_UpdateStrategy{
		MaxSurge: new(int32(m.rng.IntN(3))), MaxUnavailable: new(int32(m.rng.IntN(3))), Paused: m.chance(8), MaxFailures: new(int32(m.rng.IntN(3))),
	}, Disruption: m.budgetSpec()}
	if m.chance(2) {
		spec.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Tolerations: []*portolanv1.Toleration{{Key: "m", Stay: durationpb.New(20 * time.Second)}}}
	}
	replicas := int32(m.rng.IntN(6))
	switch k {
	case web:
		spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE
		if m.chance(4) {
			replicas = 40 + int32(m.rng.IntN(40)) // enough for rates to bind
			spec.Update.MaxSurge = new(int32(40))
		}
	case lockKey:
		spec.Placement, replicas = &portolanv1.WorkloadSpec_Placement{Exclusive: true}, 1
	case dbKey:
		spec.Kind, spec.Volumes = portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL, []*portolanv1.Volume{{Name: "data", Size: "1Gi"}}
	case sumKey, tickKey:
		spec.Kind, replicas = portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, int32(1+m.rng.IntN(4))
		spec.Job = &portolanv1.WorkloadSpec_JobSpec{Parallelism: int32(1 + m.rng.IntN(2)), MaxRetries: new(int32(m.rng.IntN(3)))}
		if k == tickKey {
			spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
			spec.Cron = &portolanv1.WorkloadSpec_CronSpec{
				Schedule: "* * * * *", Concurrency: portolanv1.CronConcurrency(m.rng.IntN(4)), StartingDeadline: durationpb.New(time.Duration(20+m.rng.IntN(30)) * time.Second),
				Suspended: m.chance(8),
			}
		}
	case gwKey:
		spec.Kind, replicas = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, 0
	}
	names := []string{"r1", "r2", "r3"}
	m.rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	in.CurrentRevision = names[0]
	in.Revisions = []*linkv1.RevisionIntent{{Revision: names[0], Replicas: replicas, Spec: image(spec, names[0])}}
	if k == web && m.chance(4) {
		in.Revisions = append(in.Revisions, &linkv1.RevisionIntent{Revision: names[1], Replicas: int32(m.rng.IntN(4)), Spec: image(spec, names[1])})
	}
	if k == web && m.chance(4) {
		in.Revisions[0].MinReplicas, in.Revisions[0].MaxReplicas = 1, 6
	}
	m.want(k, in)
}

// event is one random thing that happens.
func (m *model) event() error {
	m.events++
	switch m.rng.IntN(32) {
	case 0:
		m.newIntent(pickOne(m, []Key{web, web, lockKey, dbKey, sumKey, tickKey, gwKey}))
	case 1:
		if m.chance(4) {
			delete(m.workloads, pickOne(m, []Key{dbKey, web, sumKey}))
		} else {
			for _, k := range []Key{web, dbKey, sumKey} {
				if m.workloads[k].Intent == nil {
					m.newIntent(k)
				}
			}
		}
	case 2:
		n := m.anyNode()
		n.Record.LostTime = timestamppb.New(m.now)
		if m.chance(5) {
			for _, other := range m.nodes {
				if other.Record.GetFacts().GetLabels()["zone"] == n.Record.GetFacts().GetLabels()["zone"] {
					other.Record.LostTime = timestamppb.New(m.now)
				}
			}
		}
	case 3, 4:
		m.anyNode().Record.LostTime = nil
	case 5:
		n := m.anyNode().Record
		n.Mode, n.DrainDeadline = portolanv1.NodeMode(m.rng.IntN(3)), nil
		if m.chance(3) {
			n.DrainDeadline = timestamppb.New(m.now.Add(time.Duration(m.rng.IntN(120)) * time.Second))
		}
	case 6:
		m.anyNode().Record.Mode = portolanv1.NodeMode_NODE_MODE_UNSPECIFIED
	case 7:
		n := m.anyNode().Record
		n.Facts.Taints, n.TaintTimes = nil, nil
		if m.chance(3) {
			n.Facts.Taints = []*portolanv1.Taint{{Key: "m", Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE}}
			n.TaintTimes = map[string]*timestamppb.Timestamp{"m=": timestamppb.New(m.now)}
		}
	case 8, 9:
		if id := m.anyReplica(func(a *clusterv1.Allocation) bool { return !a.GetStop() && a.GetRun() == 0 && a.GetWorkload() != "sum" }); id != "" {
			m.crash(id)
		}
	case 10, 11, 12:
		if id := m.anyReplica(func(a *clusterv1.Allocation) bool { return a.GetRun() != 0 || a.GetWorkload() == "sum" }); id != "" {
			m.report(id, pickOne(m, []portolanv1.ReplicaState{portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED, portolanv1.ReplicaState_REPLICA_STATE_FAILED}), false)
		}
	case 13:
		m.proposeMoves()
	case 14:
		m.taken[pickOne(m, slices.Sorted(maps.Keys(m.nodes)))] = m.chance(2)
	case 15:
		if w := m.workloads[web]; w.Intent != nil {
			st := m.input().newState(web, w.Intent.GetUid())
			st.Scale = &clusterv1.Scale{Replicas: int32(m.rng.IntN(8))}
			m.states[web] = st
		}
	case 16:
		m.now = m.now.Add(time.Duration(m.rng.IntN(90)) * time.Second)
	case 17:
		if m.chance(8) {
			m.now = m.now.Add(time.Hour)
		}
	case 18, 19, 20:
		m.settle()
	case 21:
		n := m.anyNode()
		n.Observed = n.Observed == false || !m.chance(3)
	default:
		m.now = m.now.Add(time.Duration(m.rng.IntN(5000)) * time.Millisecond)
		return m.pass()
	}
	return nil
}

func (m *model) proposeMoves() {
	m.moves = nil
	for range m.rng.IntN(3) {
		if id := m.anyReplica(func(a *clusterv1.Allocation) bool { return a.GetWorkload() == "web" }); id != "" {
			mv := Move{Allocation: id, Code: Rebalance, Reason: "better", Node: pickOne(m, slices.Sorted(maps.Keys(m.nodes)))}
			if m.chance(3) {
				mv.Code, mv.Node = "InsufficientMemory", ""
			}
			m.moves = append(m.moves, mv)
		}
	}
}

// pass reconciles once, sometimes with victims of a preemption, checks the plan
// and does it.
func (m *model) pass() error {
	p := Reconcile(m.input())
	if !m.quiet && m.chance(6) {
		var victims []Move
		for range 3 {
			if id := m.anyReplica(func(*clusterv1.Allocation) bool { return true }); id != "" {
				victims = append(victims, Move{Allocation: id, Reason: "a higher priority needs its place"})
			}
		}
		p, _ = Displace(m.input(), p, victims)
	}
	if err := m.check(p); err != nil {
		return err
	}
	m.steps = len(p.Steps)
	for _, l := range m.apply(p) {
		if m.trace != nil {
			m.trace(fmt.Sprintf("%s  %s", m.now.Format("15:04:05.000"), l))
		}
	}
	return nil
}

// calm ends all faults, and holds that everything becomes as it should.
func (m *model) calm() error {
	m.moves, m.rebalance, m.quiet = nil, nil, true
	clear(m.taken)
	for _, n := range m.nodes {
		n.Observed, n.Record.LostTime, n.Record.Mode, n.Record.DrainDeadline = true, nil, 0, nil
		n.Record.Facts.Taints, n.Record.TaintTimes = nil, nil
	}
	for _, k := range []Key{web, lockKey, dbKey, gwKey} {
		if m.workloads[k].Intent == nil {
			continue
		}
		m.newIntent(k)
		for _, r := range m.workloads[k].Intent.GetRevisions() {
			r.Spec.Update.Paused, r.Spec.Update.MaxFailures, r.Spec.Disruption = false, new(int32(1000)), nil
		}
	}
	for idle := 0; idle < 15 && m.rounds < 400; m.rounds++ { // longer than anything waits
		if !m.settle() && m.steps == 0 {
			idle++
		} else {
			idle = 0
		}
		if err := m.pass(); err != nil {
			return err
		}
		m.now = m.now.Add(time.Second)
	}
	return m.checkSettled()
}

// run does a number of events and gives the first violation.
func (m *model) run(events int) error {
	for range events {
		if err := m.event(); err != nil {
			return fmt.Errorf("event %d: %w", m.events, err)
		}
	}
	if err := m.calm(); err != nil {
		return fmt.Errorf("after %d events: %w", m.events, err)
	}
	return nil
}

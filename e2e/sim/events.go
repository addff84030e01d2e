package sim

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Step makes one random event happen, lets the cluster do what follows, and says
// what invariant is broken.
func (c *Cluster) Step() error {
	c.event()
	return c.settle()
}

func (c *Cluster) event() {
	switch r := c.rand.IntN(100); {
	case r < 55:
		c.tick(time.Duration(100+c.rand.IntN(4000)) * time.Millisecond)
	case r < 57:
		c.tick(time.Duration(1+c.rand.IntN(20)) * time.Minute)
	case r < 63:
		c.apply1(c.key(), true)
	case r < 70:
		c.apply1(c.any(), false)
	case r < 72:
		c.remove(c.any())
	case r < 78:
		c.cutOrHeal()
	case r < 86:
		c.mode()
	case r < 90:
		c.taint()
	case r < 95:
		c.crash()
	case r < 97:
		c.nodes1()
	default:
		c.heal()
	}
}

// key is one of a few workloads, of two tenants.
func (c *Cluster) key() reconcile.Key {
	return reconcile.Key{Tenant: []string{"red", "blue"}[c.rand.IntN(2)], Workload: fmt.Sprintf("w%d", c.rand.IntN(maxWorkloads))}
}

// any is one that is there.
func (c *Cluster) any() reconcile.Key {
	keys := slices.SortedFunc(maps.Keys(c.intents), compareKeys)
	if len(keys) == 0 {
		return c.key()
	}
	return keys[c.rand.IntN(len(keys))]
}

// apply1 brings a new decision on a workload: another number, another template, or
// another workload of the name.
func (c *Cluster) apply1(k reconcile.Key, fresh bool) {
	c.epoch++
	old, there := c.intents[k]
	if !there && len(c.intents) >= maxWorkloads {
		return
	}
	i := &linkv1.WorkloadIntent{Tenant: k.Tenant, Workload: k.Workload, Uid: fmt.Sprintf("u%d", c.epoch), Epoch: c.epoch}
	rev := fmt.Sprintf("r%d", c.epoch)
	var spec *portolanv1.WorkloadSpec
	replicas := int32(c.rand.IntN(6))
	switch {
	case there && !fresh && c.rand.IntN(2) == 0: // only the number
		i.Uid, rev, spec = old.Intent.GetUid(), old.Intent.GetCurrentRevision(), old.Intent.GetRevisions()[0].GetSpec()
	case there && !fresh: // another template of the same kind
		i.Uid, spec = old.Intent.GetUid(), c.spec(old.Intent.GetRevisions()[0].GetSpec().GetKind())
		replicas = old.Intent.GetRevisions()[0].GetReplicas()
	default:
		spec = c.spec(portolanv1.WorkloadKind_WORKLOAD_KIND_UNSPECIFIED)
	}
	if rev == fmt.Sprintf("r%d", c.epoch) && c.rand.IntN(6) == 0 {
		c.bad[rev] = true
	}
	i.CurrentRevision = rev
	if spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON || spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		replicas = 0
	}
	i.Revisions = []*linkv1.RevisionIntent{{Revision: rev, Replicas: replicas, Spec: spec}}
	c.intents[k] = reconcile.Workload{Intent: i, Revision: c.epoch, Committed: c.Now}
	c.say("intent %s %s ×%d of %s: %v", k, rev, replicas, i.GetUid(), spec)
}

func (c *Cluster) remove(k reconcile.Key) {
	delete(c.intents, k)
	c.say("intent %s is gone", k)
}

var kinds = []portolanv1.WorkloadKind{
	portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE,
	portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL, portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON, portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON,
}

func (c *Cluster) chance(n int) bool { return c.rand.IntN(n) == 0 }

// spec makes a random one.
func (c *Cluster) spec(kind portolanv1.WorkloadKind) *portolanv1.WorkloadSpec {
	if kind == 0 {
		kind = kinds[c.rand.IntN(len(kinds))]
	}
	s := &portolanv1.WorkloadSpec{
		Kind:       kind,
		Containers: []*portolanv1.Container{{Name: "main", Image: fmt.Sprintf("i%d", c.rand.IntN(1000)), Limits: &portolanv1.ResourceList{Cpu: fmt.Sprintf("%dm", 250*(1+c.rand.IntN(8))), Memory: fmt.Sprintf("%dMi", 256*(1+c.rand.IntN(6)))}}},
		Priority:   int32(c.rand.IntN(3)), Scheduling: &portolanv1.WorkloadSpec_Scheduling{},
		Update: &portolanv1.WorkloadSpec_UpdateStrategy{MaxSurge: new(int32(c.rand.IntN(3))), MaxUnavailable: new(int32(c.rand.IntN(2))), MaxFailures: new(int32(2)), ProgressDeadline: durationpb.New(5 * time.Minute)},
	}
	switch kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		s.Update.MaxSurge, s.Update.MaxUnavailable = new(int32(0)), new(int32(1))
		if c.chance(2) {
			s.Volumes = []*portolanv1.Volume{{Name: "data", Size: "1Gi"}}
		}
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		s.Job = &portolanv1.WorkloadSpec_JobSpec{Completions: int32(1 + c.rand.IntN(4)), Parallelism: int32(1 + c.rand.IntN(2)), MaxRetries: new(int32(c.rand.IntN(4)))}
		if c.chance(3) {
			s.Job.Ttl = durationpb.New(time.Minute)
		}
		if kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
			s.Cron = &portolanv1.WorkloadSpec_CronSpec{Schedule: "*/2 * * * *", Concurrency: portolanv1.CronConcurrency(1 + c.rand.IntN(3)), StartingDeadline: durationpb.New(time.Minute), KeepSucceeded: new(int32(2)), KeepFailed: new(int32(1))}
		}
	default:
	}
	c.constrain(s)
	return s
}

func (c *Cluster) constrain(s *portolanv1.WorkloadSpec) {
	sc := s.Scheduling
	if c.chance(5) {
		sc.NodeSelector = map[string]string{"disk": "ssd"}
	}
	if c.chance(4) {
		sc.Tolerations = []*portolanv1.Toleration{{Key: "busy"}}
		if c.chance(2) {
			sc.Tolerations[0].Stay = durationpb.New(20 * time.Second)
		}
	}
	if c.chance(4) {
		sc.Spreads = []*portolanv1.WorkloadSpec_TopologySpread{{TopologyKey: []string{"zone", "node"}[c.rand.IntN(2)], MaxSkew: int32(1 + c.rand.IntN(2)), Prefer: c.chance(2)}}
	}
	if c.chance(5) && s.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		sc.Affinity = []*portolanv1.WorkloadSpec_WorkloadAffinity{{Workload: fmt.Sprintf("w%d", c.rand.IntN(maxWorkloads)), Anti: c.chance(2), TopologyKey: []string{"zone", "node"}[c.rand.IntN(2)], Prefer: c.chance(3)}}
	}
	if c.chance(8) {
		sc.Gang = &portolanv1.WorkloadSpec_Gang{}
	}
	if c.chance(6) {
		sc.Devices = []*portolanv1.DeviceRequest{{Kind: "gpu", Count: 1}}
		if c.chance(2) {
			sc.Devices[0] = &portolanv1.DeviceRequest{Kind: "gpu", ShareMilli: int32(250 * (1 + c.rand.IntN(3))), Models: []string{"big"}}
		}
	}
	if c.chance(3) {
		s.Disruption = c.budget()
	}
	s.NeverPreempt = c.chance(6)
}

func (c *Cluster) budget() *portolanv1.DisruptionBudget {
	b := &portolanv1.DisruptionBudget{}
	switch c.rand.IntN(5) {
	case 0:
		b.MaxUnavailable = new(int32(c.rand.IntN(3)))
	case 1:
		b.MaxUnavailablePercent = new(int32(25 * c.rand.IntN(3)))
	case 2:
		b.MinAvailable = new(int32(c.rand.IntN(4)))
	case 3:
		b.MaxPerHour = new(int32(c.rand.IntN(3)))
	default:
		b.Windows = []*portolanv1.TimeWindow{{Start: "02:00", End: "03:00"}}
	}
	return b
}

// nodeIDs in order.
func (c *Cluster) nodeIDs() []string { return slices.Sorted(maps.Keys(c.nodes)) }

func (c *Cluster) anyNode() *node {
	ids := c.nodeIDs()
	return c.nodes[ids[c.rand.IntN(len(ids))]]
}

func (c *Cluster) cutOrHeal() {
	if c.chance(12) { // everything at once
		for _, id := range c.nodeIDs() {
			c.nodes[id].cut = true
		}
		c.say("all nodes are cut off")
		return
	}
	n := c.anyNode()
	n.cut = !n.cut
	c.say("node %s cut off: %v", n.record.GetNode(), n.cut)
}

func (c *Cluster) mode() {
	n := c.anyNode()
	n.record = proto.CloneOf(n.record)
	n.record.Mode = portolanv1.NodeMode(c.rand.IntN(3))
	n.record.DrainDeadline = nil
	if n.record.GetMode() == portolanv1.NodeMode_NODE_MODE_DRAINING && c.chance(3) {
		n.record.DrainDeadline = timestamppb.New(c.Now.Add(time.Minute))
	}
	c.say("node %s is %v", n.record.GetNode(), n.record.GetMode())
}

// taint gives a node a taint, or takes all away.
func (c *Cluster) taint() {
	n := c.anyNode()
	n.record = proto.CloneOf(n.record)
	n.record.Facts = proto.CloneOf(n.record.GetFacts())
	if len(n.record.GetFacts().GetTaints()) > 0 {
		n.record.Facts.Taints, n.record.TaintTimes = nil, nil
		c.say("node %s has no taint", n.record.GetNode())
		return
	}
	t := &portolanv1.Taint{Key: "busy", Value: "yes", Effect: portolanv1.TaintEffect(1 + c.rand.IntN(3))}
	n.record.Facts.Taints = []*portolanv1.Taint{t}
	n.record.TaintTimes = map[string]*timestamppb.Timestamp{"busy=yes": timestamppb.New(c.Now)}
	c.say("node %s has taint %v", n.record.GetNode(), t)
}

// crash ends a process; its node starts it again, as an agent does.
func (c *Cluster) crash() {
	n := c.anyNode()
	for _, id := range slices.Sorted(maps.Keys(n.procs)) {
		if p := n.procs[id]; !p.stopping && p.status.GetReady() && c.chance(2) {
			p.began = c.Now
			p.status = proto.CloneOf(p.status)
			p.status.Ready, p.status.State = false, portolanv1.ReplicaState_REPLICA_STATE_STARTING
			c.say("%s on %s crashed", id, n.record.GetNode())
			return
		}
	}
}

// nodes1 adds a node, or takes one that is lost and empty out for good.
func (c *Cluster) nodes1() {
	if len(c.nodes) < maxNodes && c.chance(2) {
		c.addNode()
		return
	}
	for _, id := range c.nodeIDs() {
		if n := c.nodes[id]; n.gone() && len(n.procs) == 0 && len(c.nodes) > 2 {
			delete(c.nodes, id)
			c.table.DeleteNode(id)
			c.say("node %s is taken out", id)
			return
		}
	}
}

// heal mends everything, so that long runs do not end in ruins.
func (c *Cluster) heal() {
	for _, id := range c.nodeIDs() {
		n := c.nodes[id]
		n.cut = false
		n.record = proto.CloneOf(n.record)
		n.record.Facts = proto.CloneOf(n.record.GetFacts())
		n.record.Mode, n.record.DrainDeadline, n.record.Facts.Taints, n.record.TaintTimes = 0, nil, nil, nil
	}
	c.say("all nodes are well")
	c.tick(time.Second)
}

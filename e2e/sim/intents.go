package sim

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// declare brings another workload of a name.
func (c *Cluster) declare(k reconcile.Key) {
	if _, there := c.intents[k]; !there && len(c.intents) >= maxWorkloads {
		return
	}
	spec := c.spec(portolanv1.WorkloadKind_WORKLOAD_KIND_UNSPECIFIED)
	if (isService(spec) || isStateful(spec)) && c.chance(8) {
		spec.Placement = &portolanv1.WorkloadSpec_Placement{Exclusive: true}
	}
	if isService(spec) && spec.GetPlacement() == nil && c.chance(4) {
		spec.Autoscale = &portolanv1.Autoscale{
			Min: new(int32(1)), Max: 6, Metrics: []*portolanv1.ScaleMetric{{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU, Target: 50}},
			Down: &portolanv1.ScaleRule{Stabilization: durationpb.New(time.Minute)},
		}
	}
	i := &linkv1.WorkloadIntent{Uid: fmt.Sprintf("u%d", c.epoch+1), Revisions: []*linkv1.RevisionIntent{c.revision(spec, c.number(spec))}}
	c.commit(k, i, "declared")
}

// number is how many replicas there are to be; of jobs and daemons their spec says
// it.
func (c *Cluster) number(s *portolanv1.WorkloadSpec) int32 {
	switch {
	case s.GetPlacement().GetExclusive():
		return int32(c.rand.IntN(4)+2) / 3 // mostly one
	case isService(s) || isStateful(s):
		return int32(c.rand.IntN(6))
	}
	return 0
}

// revision is a new one; some never get ready.
func (c *Cluster) revision(s *portolanv1.WorkloadSpec, n int32) *linkv1.RevisionIntent {
	c.revisions++
	r := &linkv1.RevisionIntent{Revision: fmt.Sprintf("r%d", c.revisions), Replicas: n, Spec: s}
	if a := s.GetAutoscale(); a != nil {
		r.MinReplicas, r.MaxReplicas = a.GetMin(), a.GetMax()
		r.Replicas = max(1, n)
	}
	if c.rand.IntN(6) == 0 {
		c.bad[r.GetRevision()] = true
	}
	return r
}

// redeclare changes a workload: its number, its template, or how far blue and green
// are.
func (c *Cluster) redeclare(k reconcile.Key) {
	old := c.intents[k].Intent
	if old == nil {
		return
	}
	revs := old.GetRevisions()
	i := &linkv1.WorkloadIntent{Uid: old.GetUid(), ActiveRevision: old.GetActiveRevision(), Revisions: revs}
	spec := revs[0].GetSpec()
	switch r := c.rand.IntN(4); {
	case len(revs) == 2:
		c.turn(k, i, r)
		return
	case r < 2: // only the number
		n := c.number(spec)
		i.Revisions = []*linkv1.RevisionIntent{{Revision: revs[0].GetRevision(), Replicas: n, Spec: spec, MinReplicas: revs[0].GetMinReplicas(), MaxReplicas: revs[0].GetMaxReplicas()}}
	case r == 2 && isService(spec) && spec.GetPlacement() == nil && spec.GetAutoscale() == nil: // green beside blue, which serves
		i.ActiveRevision = revs[0].GetRevision()
		i.Revisions = []*linkv1.RevisionIntent{c.revision(c.template(spec), revs[0].GetReplicas()), revs[0]}
		c.Reached["previewed"]++
	default: // another template
		i.Revisions = []*linkv1.RevisionIntent{c.revision(c.template(spec), revs[0].GetReplicas())}
	}
	c.commit(k, i, "changed")
}

// template is another one for a workload.
func (c *Cluster) template(old *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	s := c.spec(old.GetKind())
	s.Placement, s.Autoscale = old.GetPlacement(), old.GetAutoscale()
	if c.chance(4) { // needs no restart
		s.Containers, s.Volumes, s.Scheduling.Devices = old.GetContainers(), old.GetVolumes(), old.GetScheduling().GetDevices()
	}
	return s
}

// turn goes on with blue and green: it switches, takes one of them away, or
// changes the numbers.
func (c *Cluster) turn(k reconcile.Key, i *linkv1.WorkloadIntent, r int) {
	green, blue := i.GetRevisions()[0], i.GetRevisions()[1]
	serves := green
	if i.GetActiveRevision() == blue.GetRevision() {
		serves = blue
	}
	switch r {
	case 0, 1: // switch, or back
		if i.ActiveRevision = green.GetRevision(); serves == green {
			i.ActiveRevision = blue.GetRevision()
		}
		c.Reached["switched"]++
	case 2: // the one that serves stays
		i.Revisions, i.ActiveRevision = []*linkv1.RevisionIntent{serves}, ""
		if serves == blue {
			c.Reached["preview given up"]++
		}
	default:
		i.Revisions = []*linkv1.RevisionIntent{
			{Revision: green.GetRevision(), Replicas: c.number(green.GetSpec()), Spec: green.GetSpec()},
			{Revision: blue.GetRevision(), Replicas: c.number(blue.GetSpec()), Spec: blue.GetSpec()},
		}
	}
	c.commit(k, i, "turned")
}

// commit makes a decision the cluster's.
func (c *Cluster) commit(k reconcile.Key, i *linkv1.WorkloadIntent, what string) {
	c.epoch++
	i.Tenant, i.Workload, i.Epoch, i.CurrentRevision = k.Tenant, k.Workload, c.epoch, i.GetRevisions()[0].GetRevision()
	c.intents[k] = reconcile.Workload{Intent: i, Revision: c.epoch, Committed: c.Now}
	if _, has := c.load[k]; i.GetRevisions()[0].GetMaxReplicas() == 0 {
		delete(c.load, k)
	} else if !has {
		c.load[k] = 100 * c.rand.Int64N(60)
	}
	c.say("%s is %s: uid %s epoch %d active %q", k, what, i.GetUid(), i.GetEpoch(), i.GetActiveRevision())
	for _, r := range i.GetRevisions() {
		c.say("  %s ×%d: %v", r.GetRevision(), r.GetReplicas(), r.GetSpec())
	}
}

func (c *Cluster) remove(k reconcile.Key) {
	delete(c.intents, k)
	delete(c.load, k)
	c.say("%s is gone", k)
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

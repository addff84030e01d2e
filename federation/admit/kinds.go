package admit

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

// This file says which parts of a spec belong to which kind of workload, and
// checks those that only some kinds have.

const (
	defaultKeepSucceeded = 3
	defaultKeepFailed    = 1
	defaultStarting      = 10 * time.Minute
	defaultMaxFailures   = 3
	defaultTolerance     = 10
	defaultStabilization = 5 * time.Minute
	// maxScaleWindow is how far back a cluster remembers what it decided.
	maxScaleWindow = time.Hour
)

// kindSet is a set of kinds.
type kindSet uint

func kinds(of ...portolanv1.WorkloadKind) kindSet {
	var s kindSet
	for _, k := range of {
		s |= 1 << k
	}
	return s
}

func (s kindSet) has(k portolanv1.WorkloadKind) bool { return s&(1<<k) != 0 }

var (
	services   = kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL)
	finite     = kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON)
	onlyDaemon = kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON)
	allKinds   = services | finite | onlyDaemon
)

// belongs says of each part that not every kind has which kinds have it, and what
// to do instead.
var belongs = []struct {
	field   string
	kinds   kindSet
	set     func(*portolanv1.WorkloadSpec) bool
	instead string
}{
	{"spec.replicas", services, func(s *portolanv1.WorkloadSpec) bool { return s.Replicas != nil }, "a job has completions and parallelism (spec.job), a daemon one replica on every eligible node: leave it out"},
	{"spec.job", finite, func(s *portolanv1.WorkloadSpec) bool { return s.Job != nil }, "only WORKLOAD_KIND_JOB and WORKLOAD_KIND_CRON come to an end: set the kind, or leave it out"},
	{"spec.cron", kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_CRON), func(s *portolanv1.WorkloadSpec) bool { return s.Cron != nil }, "only WORKLOAD_KIND_CRON runs at times: set the kind, or leave it out"},
	{"spec.update", services | onlyDaemon, func(s *portolanv1.WorkloadSpec) bool { return s.Update != nil }, "a job is not updated: start another"},
	{"spec.autoscale", services, func(s *portolanv1.WorkloadSpec) bool { return s.Autoscale != nil }, "only services and stateful workloads have a number of replicas to change"},
	{"spec.volumes", kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL), func(s *portolanv1.WorkloadSpec) bool { return len(s.Volumes) > 0 }, "a volume stays with a replica's name, which only WORKLOAD_KIND_STATEFUL has: set the kind, or use tmpfs"},
	{"spec.placement.failover", kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE), func(s *portolanv1.WorkloadSpec) bool { return s.GetPlacement().GetFailover() != nil }, "only the replicas of a service can be had twice"},
	{"spec.placement.spread", allKinds &^ onlyDaemon, func(s *portolanv1.WorkloadSpec) bool { return s.GetPlacement().GetSpread() != nil }, "a daemon runs on every eligible node: there is nothing to spread"},
	{"spec.placement.spreads", allKinds &^ onlyDaemon, func(s *portolanv1.WorkloadSpec) bool { return len(s.GetPlacement().GetSpreads()) > 0 }, "a daemon runs on every eligible node: there is nothing to spread"},
	{"spec.placement.division", services, func(s *portolanv1.WorkloadSpec) bool {
		return s.GetPlacement().GetDivision() > portolanv1.Division_DIVISION_OBJECTIVE
	}, "only replicas of services and stateful workloads are divided"},
	{"spec.placement.fallbacks", allKinds &^ onlyDaemon, func(s *portolanv1.WorkloadSpec) bool { return len(s.GetPlacement().GetFallbacks()) > 0 }, "a daemon runs on every eligible node: nothing is left over"},
	{"spec.placement.exclusive", kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL), func(s *portolanv1.WorkloadSpec) bool { return s.GetPlacement().GetExclusive() }, "only a service or a stateful workload can be the only one"},
	{"spec.scheduling.gang", kinds(portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_JOB), func(s *portolanv1.WorkloadSpec) bool { return s.GetScheduling().GetGang() != nil }, "only replicas of services and jobs begin together, those of a stateful workload one after the other: leave it out"},
}

// byKind checks that only parts of the kind are set.
func (c *checker) byKind(s *portolanv1.WorkloadSpec) {
	for _, b := range belongs {
		if b.set(s) && !b.kinds.has(s.GetKind()) {
			c.add(b.field, "%s", b.instead)
		}
	}
	if finite.has(s.GetKind()) {
		c.job(s.GetJob())
	}
	if s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
		c.cron(s.GetCron())
	}
	if a := s.GetAutoscale(); a != nil && services.has(s.GetKind()) {
		c.autoscale(s, a)
	}
	if s.GetPlacement().GetExclusive() && (s.GetReplicas() > 1 || s.GetAutoscale() != nil) {
		c.add("spec.placement.exclusive", "at most one replica in the world: set replicas to 1 and leave autoscale out")
	}
	c.gang(s)
	c.disruption(s.GetDisruption())
	c.volumes(s)
}

// gang checks that a service's replicas begin together also when it is updated.
func (c *checker) gang(s *portolanv1.WorkloadSpec) {
	service := s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE
	if service && s.GetScheduling().GetGang() != nil && s.GetUpdate().GetType() != portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN {
		c.add("spec.update.type", "a rolling update begins the replicas of a gang one by one: set UPDATE_TYPE_BLUE_GREEN, or leave spec.scheduling.gang out")
	}
}

func (c *checker) job(j *portolanv1.WorkloadSpec_JobSpec) {
	if j == nil {
		return
	}
	if j.GetParallelism() > j.GetCompletions() {
		c.add("spec.job.parallelism", "%d is more than the %d completions", j.GetParallelism(), j.GetCompletions())
	}
	c.duration("spec.job.deadline", j.GetDeadline(), bounds{time.Second, 7 * 24 * time.Hour})
	c.duration("spec.job.ttl", j.GetTtl(), bounds{0, 90 * 24 * time.Hour})
}

func defaultCron(s *portolanv1.WorkloadSpec) {
	defaultJob(s)
	if s.Cron == nil {
		return
	}
	if s.Cron.Concurrency == portolanv1.CronConcurrency_CRON_CONCURRENCY_UNSPECIFIED {
		s.Cron.Concurrency = portolanv1.CronConcurrency_CRON_CONCURRENCY_ALLOW
	}
	if s.Cron.StartingDeadline == nil {
		s.Cron.StartingDeadline = durationpb.New(defaultStarting)
	}
	if s.Cron.KeepSucceeded == nil {
		s.Cron.KeepSucceeded = proto.Int32(defaultKeepSucceeded)
	}
	if s.Cron.KeepFailed == nil {
		s.Cron.KeepFailed = proto.Int32(defaultKeepFailed)
	}
}

func (c *checker) cron(r *portolanv1.WorkloadSpec_CronSpec) {
	if r == nil {
		c.add("spec.cron", "is required for WORKLOAD_KIND_CRON: schedule says when it runs")
		return
	}
	c.timetable("spec.cron.schedule", r.GetSchedule(), "spec.cron.time_zone", r.GetTimeZone())
	c.duration("spec.cron.starting_deadline", r.GetStartingDeadline(), bounds{time.Second, 7 * 24 * time.Hour})
	c.duration("spec.cron.jitter", r.GetJitter(), bounds{0, 24 * time.Hour})
}

// timetable checks a cron expression and its zone.
func (c *checker) timetable(field, expr, zoneField, zone string) {
	if _, err := timetable.Zone(zone); err != nil {
		c.add(zoneField, "%v", err)
		return
	}
	if _, err := timetable.Parse(expr, zone); err != nil {
		c.add(field, "%v", err)
	}
}

func defaultAutoscale(a *portolanv1.Autoscale) {
	if a == nil {
		return
	}
	if a.Min == nil {
		a.Min = proto.Int32(1)
	}
	if a.TolerancePercent == nil {
		a.TolerancePercent = proto.Int32(defaultTolerance)
	}
	if a.Down == nil {
		a.Down = &portolanv1.ScaleRule{}
	}
	if a.Down.Stabilization == nil {
		a.Down.Stabilization = durationpb.New(defaultStabilization)
	}
	for _, m := range a.Metrics {
		if m.Kind == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CUSTOM && m.Path == "" {
			m.Path = "/metrics"
		}
	}
}

func (c *checker) autoscale(s *portolanv1.WorkloadSpec, a *portolanv1.Autoscale) {
	const field = "spec.autoscale"
	if a.GetMin() > a.GetMax() {
		c.add(field+".min", "%d is more than max, %d", a.GetMin(), a.GetMax())
	}
	if len(a.GetMetrics()) == 0 && len(a.GetSchedules()) == 0 {
		c.add(field+".metrics", "nothing says when to scale: give metrics or schedules")
	}
	for i, m := range a.GetMetrics() {
		c.metric(at(field+".metrics", i), m)
	}
	returns := slices.ContainsFunc(a.GetSchedules(), func(w *portolanv1.ScaleSchedule) bool { return w.GetMin() > 0 })
	if a.Min != nil && a.GetMin() == 0 && !returns {
		c.add(field+".min", "0 needs a schedule with a min of its own, which brings replicas back: metrics are measured at replicas, and without any none would come")
	}
	for i, w := range a.GetSchedules() {
		f := at(field+".schedules", i)
		c.timetable(f+".schedule", w.GetSchedule(), f+".time_zone", w.GetTimeZone())
		c.duration(f+".duration", w.GetDuration(), bounds{time.Minute, 7 * 24 * time.Hour})
		if w.GetMax() > 0 && w.GetMin() > w.GetMax() {
			c.add(f+".min", "%d is more than max, %d", w.GetMin(), w.GetMax())
		}
		if w.GetMax() > a.GetMax() || w.GetMin() > a.GetMax() {
			c.add(f+".max", "is more than spec.autoscale.max, %d, which is what capacity is reserved for", a.GetMax())
		}
	}
	for _, r := range []struct {
		name string
		rule *portolanv1.ScaleRule
	}{{"up", a.GetUp()}, {"down", a.GetDown()}} {
		c.duration(field+"."+r.name+".stabilization", r.rule.GetStabilization(), bounds{0, maxScaleWindow})
		c.duration(field+"."+r.name+".period", r.rule.GetPeriod(), bounds{time.Second, maxScaleWindow})
	}
	if sp := s.GetPlacement().GetSpread(); sp.GetMinGroups() > a.GetMax() {
		c.add(field+".max", "%d replicas cannot be in %d domains", a.GetMax(), sp.GetMinGroups())
	}
}

func (c *checker) metric(field string, m *portolanv1.ScaleMetric) {
	custom := m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CUSTOM
	switch {
	case custom && m.GetName() == "":
		c.add(field+".name", "is required: the name of a gauge")
	case custom && m.GetPort() == 0:
		c.add(field+".port", "is required: where the replica serves its metrics")
	case !custom && (m.GetName() != "" || m.GetPort() != 0 || m.GetPath() != ""):
		c.add(field+".name", "only a custom metric has a name, a port and a path")
	}
	if custom && m.GetPath() != "" {
		c.urlPath(field+".path", m.GetPath())
	}
	percent := m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CPU || m.GetKind() == portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_MEMORY
	if percent && m.GetTarget() > 1000 {
		c.add(field+".target", "%v is no sensible percentage of what is requested", m.GetTarget())
	}
}

func (c *checker) disruption(b *portolanv1.DisruptionBudget) {
	if b == nil {
		return
	}
	const field = "spec.disruption"
	if b.MaxUnavailable == nil && b.MaxUnavailablePercent == nil && b.MinAvailable == nil && b.MaxPerHour == nil && len(b.GetWindows()) == 0 {
		c.add(field, "bounds nothing: give max_unavailable, max_unavailable_percent, min_available, max_per_hour or windows, or leave it out")
	}
	for i, w := range b.GetWindows() {
		if _, err := timetable.WindowOf(w); err != nil {
			c.add(at(field+".windows", i), "%v", err)
		}
	}
}

func (c *checker) volumes(s *portolanv1.WorkloadSpec) {
	names := map[string]bool{}
	for i, v := range s.GetVolumes() {
		f := at("spec.volumes", i)
		if c.id(f+".name", v.GetName()) && names[v.GetName()] {
			c.add(f+".name", "%q is there twice", v.GetName())
		}
		names[v.GetName()] = true
		if n, err := api.ParseBytes(v.GetSize()); err != nil {
			c.add(f+".size", "%v", err)
		} else if n < 1<<20 {
			c.add(f+".size", "%s is less than 1Mi", v.GetSize())
		}
	}
	for i, ctr := range s.GetContainers() {
		c.mounts(at("spec.containers", i), ctr, names)
	}
	for i, ctr := range s.GetInitContainers() {
		c.mounts(at("spec.init_containers", i), ctr, names)
	}
}

func (c *checker) mounts(field string, ctr *portolanv1.Container, volumes map[string]bool) {
	paths := slices.Clone(ctr.GetTmpfs())
	for i, m := range ctr.GetMounts() {
		f := at(field+".mounts", i)
		if !volumes[m.GetVolume()] {
			c.add(f+".volume", "%q is not in spec.volumes", clip(m.GetVolume()))
		}
		if !c.mountPath(f+".path", m.GetPath()) {
			continue
		}
		for _, p := range paths {
			if within(m.GetPath(), p) || within(p, m.GetPath()) {
				c.add(f+".path", "%q and %q cover each other", m.GetPath(), p)
			}
		}
		paths = append(paths, m.GetPath())
	}
}

// priority checks it against what the tenant may have.
func (c *checker) priority(s *portolanv1.WorkloadSpec) {
	most := int32(defaultMaxPriority)
	if c.snap.Tenant.GetSpec() != nil && c.snap.Tenant.Spec.MaxPriority != nil {
		most = c.snap.Tenant.GetSpec().GetMaxPriority()
	}
	if s.GetPriority() > most {
		c.add("spec.priority", "%d is more than %d, the highest that a fleet admin granted this tenant", s.GetPriority(), most)
	}
}

// defaultMaxPriority is what a tenant may use when its spec says nothing.
const defaultMaxPriority = 100

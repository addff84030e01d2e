package admit

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The defaults of a workload, in the places where the proto names them.
const (
	defaultGrace            = 30 * time.Second
	defaultProgressDeadline = 10 * time.Minute
	defaultFailoverAfter    = 5 * time.Second
	defaultJobRetries       = 6
	defaultPids             = 512
	allRevisions            = "all" // stands for every revision in an SNI
)

func defaultWorkload(w *portolanv1.Workload) {
	if w.Spec == nil {
		w.Spec = &portolanv1.WorkloadSpec{}
	}
	s := w.Spec
	if s.Kind == portolanv1.WorkloadKind_WORKLOAD_KIND_UNSPECIFIED {
		s.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE
		if s.Gateway != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED {
			s.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
		}
	}
	switch s.Kind {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		defaultJob(s)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		defaultCron(s)
	case portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE, portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL:
		defaultAutoscale(s.Autoscale)
		defaultReplicas(s)
		defaultUpdate(s)
	default:
	}
	defaultScheduling(s.Scheduling)
	if s.Placement == nil {
		s.Placement = &portolanv1.WorkloadSpec_Placement{}
	}
	defaultPlacement(s.Placement)
	if f := s.Placement.Failover; f != nil && f.After == nil {
		f.After = durationpb.New(defaultFailoverAfter)
	}
	if s.GracePeriod == nil {
		s.GracePeriod = durationpb.New(defaultGrace)
	}
	for _, c := range slices.Concat(s.Containers, s.InitContainers) {
		defaultContainer(c)
	}
	if len(s.Containers) == 1 && s.Containers[0].Name == "" {
		s.Containers[0].Name = "main"
	}
	if len(s.InitContainers) == 1 && s.InitContainers[0].Name == "" {
		s.InitContainers[0].Name = "init"
	}
}

func defaultJob(s *portolanv1.WorkloadSpec) {
	if s.Job == nil {
		s.Job = &portolanv1.WorkloadSpec_JobSpec{}
	}
	if s.Job.Completions == 0 {
		s.Job.Completions = 1
	}
	if s.Job.Parallelism == 0 {
		s.Job.Parallelism = 1
	}
	if s.Job.MaxRetries == nil {
		s.Job.MaxRetries = proto.Int32(defaultJobRetries)
	}
}

// defaultReplicas begins at one, and within the bounds of autoscale.
func defaultReplicas(s *portolanv1.WorkloadSpec) {
	if s.Replicas == nil {
		s.Replicas = proto.Int32(1)
		if a := s.Autoscale; a != nil && a.GetMax() > 0 {
			s.Replicas = new(min(max(1, a.GetMin()), a.GetMax()))
		}
	}
}

func defaultUpdate(s *portolanv1.WorkloadSpec) {
	if s.Update == nil {
		s.Update = &portolanv1.WorkloadSpec_UpdateStrategy{}
	}
	if s.Update.Type == portolanv1.UpdateType_UPDATE_TYPE_UNSPECIFIED {
		s.Update.Type = portolanv1.UpdateType_UPDATE_TYPE_ROLLING
	}
	if s.Update.AutoRollback == nil {
		s.Update.AutoRollback = new(true)
	}
	if s.Update.MaxFailures == nil {
		s.Update.MaxFailures = proto.Int32(defaultMaxFailures)
	}
	// A stateful replica keeps its name, so there is no second one beside it.
	if s.Kind == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL && s.Update.MaxSurge == nil && s.Update.MaxUnavailable == nil {
		s.Update.MaxSurge, s.Update.MaxUnavailable = proto.Int32(0), proto.Int32(1)
	}
	if s.Update.MaxSurge == nil && s.Update.MaxUnavailable == nil {
		s.Update.MaxSurge, s.Update.MaxUnavailable = proto.Int32(1), proto.Int32(0)
	}
	if s.Update.ProgressDeadline == nil {
		s.Update.ProgressDeadline = durationpb.New(defaultProgressDeadline)
	}
}

// workload checks the spec as a whole; containers are in container.go.
func (c *checker) workload(w *portolanv1.Workload) {
	s := w.GetSpec()
	if s == nil {
		c.add("spec", "is required")
		return
	}
	if g := s.GetGateway(); g != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED {
		c.gateway(w)
	} else {
		if len(s.GetContainers()) == 0 {
			c.add("spec.containers", "at least one container is required")
		}
		c.containers(s)
	}
	c.byKind(s)
	c.placement(w.GetName(), s)
	c.scheduling(s)
	c.update(s)
	c.priority(s)
	c.duration("spec.grace_period", s.GetGracePeriod(), anyDelay)
	c.revision(w)
}

func (c *checker) gateway(w *portolanv1.Workload) {
	s := w.GetSpec()
	if api.TenantOf(w.GetName()) != api.SystemTenant {
		c.add("spec.gateway", "gateways belong to tenant %q", api.SystemTenant)
	}
	if s.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		c.add("spec.kind", "a gateway is a daemon: leave kind out or set WORKLOAD_KIND_DAEMON")
	}
	if len(s.GetContainers()) > 0 {
		c.add("spec.containers", "a gateway has no containers of its own")
	}
	if len(s.GetInitContainers()) > 0 {
		c.add("spec.init_containers", "a gateway has no containers of its own")
	}
}

// revision checks the name of the revision against those that exist.
func (c *checker) revision(w *portolanv1.Workload) {
	name := w.GetSpec().GetRevision()
	if name == "" {
		return
	}
	const field = "spec.revision"
	if !c.id(field, name) {
		return
	}
	if name == allRevisions {
		c.add(field, "%q stands for every revision; choose another name", name)
		return
	}
	old, ok := c.snap.Revisions[id(w)][name]
	switch {
	case ok && TemplateHash(old) != TemplateHash(w.GetSpec()):
		c.add(field, "revision %q already stands for another template: choose a new name", name)
	case !ok && autoName.MatchString(name):
		c.add(field, "names like %q are given by the server; choose another, or leave it out", name)
	}
}

// Template is the part of a spec that makes a revision: what runs in a replica,
// also where it differs from cluster to cluster, and what it is given. How many
// there are, where and when they are and how they are exchanged is not.
func Template(s *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	t := proto.CloneOf(s)
	t.Replicas, t.Revision, t.Placement, t.Scheduling, t.Update = nil, "", nil, nil, nil
	t.Cron, t.Autoscale, t.Disruption, t.Priority, t.NeverPreempt = nil, nil, nil, 0, false
	if o := s.GetPlacement().GetOverrides(); len(o) > 0 {
		t.Placement = &portolanv1.WorkloadSpec_Placement{Overrides: o}
	}
	if d := s.GetScheduling().GetDevices(); len(d) > 0 {
		t.Scheduling = &portolanv1.WorkloadSpec_Scheduling{Devices: d}
	}
	return t
}

// Overlay puts what is no part of the template from one spec into a copy of
// another: how the newest spec schedules and updates also holds for replicas of
// older revisions. It gives the spec itself when nothing differs.
func Overlay(revision, now *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	out := proto.CloneOf(revision)
	out.Cron, out.Autoscale, out.Disruption, out.Priority, out.NeverPreempt = now.GetCron(), now.GetAutoscale(), now.GetDisruption(), now.GetPriority(), now.GetNeverPreempt()
	out.Update = now.GetUpdate()
	out.Placement = proto.CloneOf(now.GetPlacement())
	if own := revision.GetPlacement().GetOverrides(); len(own) > 0 || len(out.GetPlacement().GetOverrides()) > 0 {
		if out.Placement == nil {
			out.Placement = &portolanv1.WorkloadSpec_Placement{}
		}
		out.Placement.Overrides = own
	}
	out.Scheduling = proto.CloneOf(now.GetScheduling())
	if own := revision.GetScheduling().GetDevices(); len(own) > 0 || len(out.GetScheduling().GetDevices()) > 0 {
		if out.Scheduling == nil {
			out.Scheduling = &portolanv1.WorkloadSpec_Scheduling{}
		}
		out.Scheduling.Devices = own
	}
	if proto.Equal(out, revision) {
		return revision
	}
	return out
}

// TemplateHash is the hex SHA-256 of the template.
func TemplateHash(s *portolanv1.WorkloadSpec) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(Template(s))
	if err != nil {
		// Only invalid UTF-8 fails, and then every such spec is different.
		return err.Error()
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

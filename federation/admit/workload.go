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
	case portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE:
		if s.Replicas == nil {
			s.Replicas = proto.Int32(1)
		}
		defaultUpdate(s)
	default:
	}
	if s.Placement == nil {
		s.Placement = &portolanv1.WorkloadSpec_Placement{}
	}
	if s.Placement.Objective == portolanv1.Objective_OBJECTIVE_UNSPECIFIED {
		s.Placement.Objective = portolanv1.Objective_OBJECTIVE_SPREAD
	}
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

func defaultUpdate(s *portolanv1.WorkloadSpec) {
	if s.Update == nil {
		s.Update = &portolanv1.WorkloadSpec_UpdateStrategy{}
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
	c.placement(s)
	c.scheduling(s)
	c.update(s.GetUpdate())
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

// byKind checks that only fields of the kind are set.
func (c *checker) byKind(s *portolanv1.WorkloadSpec) {
	kind := s.GetKind()
	job := kind == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB
	daemon := kind == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
	if job && s.Replicas != nil {
		c.add("spec.replicas", "a job has completions and parallelism instead (spec.job)")
	}
	if daemon && s.Replicas != nil {
		c.add("spec.replicas", "a daemon has one replica on every eligible node: leave it out")
	}
	if !job && s.GetJob() != nil {
		c.add("spec.job", "only for WORKLOAD_KIND_JOB")
	}
	if job && s.GetUpdate() != nil {
		c.add("spec.update", "a job is not updated: start another")
	}
	if daemon && s.GetPlacement().GetFailover() != nil {
		c.add("spec.placement.failover", "a daemon belongs to its nodes and fails over nowhere")
	}
	if daemon && s.GetPlacement().GetSpread() != nil {
		c.add("spec.placement.spread", "a daemon runs on every eligible node: there is nothing to spread")
	}
	if j := s.GetJob(); job && j != nil {
		if j.GetParallelism() > j.GetCompletions() {
			c.add("spec.job.parallelism", "%d is more than the %d completions", j.GetParallelism(), j.GetCompletions())
		}
		c.duration("spec.job.deadline", j.GetDeadline(), bounds{time.Second, 7 * 24 * time.Hour})
	}
}

func (c *checker) placement(s *portolanv1.WorkloadSpec) {
	p := s.GetPlacement()
	const field = "spec.placement"
	c.uniqueIDs(field+".allowed_regions", p.GetAllowedRegions())
	c.uniqueIDs(field+".forbidden_regions", p.GetForbiddenRegions())
	residency := c.snap.Tenant.GetSpec().GetAllowedRegions()
	for i, r := range p.GetAllowedRegions() {
		if slices.Contains(p.GetForbiddenRegions(), r) {
			c.add(at(field+".allowed_regions", i), "region %q is allowed and forbidden at once", r)
		}
		if len(residency) > 0 && !slices.Contains(residency, r) {
			c.add(at(field+".allowed_regions", i), "the tenant may not run in region %q; it may in %v", r, residency)
		}
	}
	c.labels(field+".cluster_selector", p.GetClusterSelector(), 32)
	c.tolerations(field+".tolerations", p.GetTolerations())
	if sp := p.GetSpread(); sp != nil {
		n := len(p.GetAllowedRegions())
		if sp.GetOver() == portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION && n > 0 && int(sp.GetMinGroups()) > n {
			c.add(field+".spread.min_groups", "%d regions are asked for, but only %d are allowed", sp.GetMinGroups(), n)
		}
		if s.Replicas != nil && sp.GetMinGroups() > 1 && sp.GetMinGroups() > s.GetReplicas() {
			c.add(field+".spread.min_groups", "%d replicas cannot be in %d domains", s.GetReplicas(), sp.GetMinGroups())
		}
	}
	c.duration(field+".failover.after", p.GetFailover().GetAfter(), longWait)
}

func (c *checker) scheduling(s *portolanv1.WorkloadSpec) {
	sc := s.GetScheduling()
	c.labels("spec.scheduling.node_selector", sc.GetNodeSelector(), 32)
	c.tolerations("spec.scheduling.tolerations", sc.GetTolerations())
	if k := sc.GetSpreadKey(); k != "" {
		c.labelKey("spec.scheduling.spread_key", k)
	} else if sc.GetMaxSkew() > 0 {
		c.add("spec.scheduling.max_skew", "needs spread_key, the node label over whose values replicas spread")
	}
}

func (c *checker) update(u *portolanv1.WorkloadSpec_UpdateStrategy) {
	if u == nil {
		return
	}
	if u.MaxSurge != nil && u.MaxUnavailable != nil && u.GetMaxSurge() == 0 && u.GetMaxUnavailable() == 0 {
		c.add("spec.update.max_unavailable", "max_surge and max_unavailable are both 0: no update could begin")
	}
	if u.MaxSurge == nil && u.MaxUnavailable != nil && u.GetMaxUnavailable() == 0 {
		c.add("spec.update.max_unavailable", "0 without a max_surge: no update could begin")
	}
	if u.MaxUnavailable == nil && u.MaxSurge != nil && u.GetMaxSurge() == 0 {
		c.add("spec.update.max_surge", "0 without a max_unavailable: no update could begin")
	}
	c.duration("spec.update.min_ready", u.GetMinReady(), anyDelay)
	c.duration("spec.update.progress_deadline", u.GetProgressDeadline(), longWait)
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

// Template is the part of a spec that makes a revision: what runs in a replica.
// How many there are, where they are and how they are exchanged is not.
func Template(s *portolanv1.WorkloadSpec) *portolanv1.WorkloadSpec {
	t := proto.CloneOf(s)
	t.Replicas, t.Revision, t.Placement, t.Scheduling, t.Update = nil, "", nil, nil, nil
	return t
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

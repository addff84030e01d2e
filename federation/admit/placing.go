package admit

import (
	"path"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// This file checks where and how replicas may be: placement over clusters,
// scheduling over nodes, and how they are exchanged.

// NodeKey is the topology key under which every node is a domain of its own.
const NodeKey = "node"

func defaultPlacement(p *portolanv1.WorkloadSpec_Placement) {
	if p.Objective == portolanv1.Objective_OBJECTIVE_UNSPECIFIED {
		p.Objective = portolanv1.Objective_OBJECTIVE_SPREAD
	}
	for _, a := range p.Affinity {
		if a.Over == portolanv1.SpreadDomain_SPREAD_DOMAIN_UNSPECIFIED {
			a.Over = portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER
		}
		if a.Prefer && a.Weight == 0 {
			a.Weight = 1
		}
	}
	for _, o := range p.Origins {
		if o.Weight == 0 {
			o.Weight = 1
		}
	}
}

func defaultScheduling(s *portolanv1.WorkloadSpec_Scheduling) {
	for _, a := range s.GetAffinity() {
		if a.Prefer && a.Weight == 0 {
			a.Weight = 1
		}
	}
	for _, t := range s.GetSpreads() {
		if t.MaxSkew == 0 {
			t.MaxSkew = 1
		}
	}
	for _, d := range s.GetDevices() {
		if d.Kind == "" {
			d.Kind = "gpu"
		}
	}
}

func (c *checker) placement(name string, s *portolanv1.WorkloadSpec) {
	p := s.GetPlacement()
	const field = "spec.placement"
	c.uniqueIDs(field+".allowed_regions", p.GetAllowedRegions())
	c.uniqueIDs(field+".forbidden_regions", p.GetForbiddenRegions())
	c.uniqueIDs(field+".allowed_clusters", p.GetAllowedClusters())
	c.uniqueIDs(field+".forbidden_clusters", p.GetForbiddenClusters())
	residency := c.snap.Tenant.GetSpec().GetAllowedRegions()
	for i, r := range p.GetAllowedRegions() {
		if slices.Contains(p.GetForbiddenRegions(), r) {
			c.add(at(field+".allowed_regions", i), "region %q is allowed and forbidden at once", r)
		}
		if len(residency) > 0 && !slices.Contains(residency, r) {
			c.add(at(field+".allowed_regions", i), "the tenant may not run in region %q; it may in %v", r, residency)
		}
	}
	for i, r := range p.GetAllowedClusters() {
		if slices.Contains(p.GetForbiddenClusters(), r) {
			c.add(at(field+".allowed_clusters", i), "cluster %q is allowed and forbidden at once", r)
		}
	}
	c.labels(field+".cluster_selector", p.GetClusterSelector(), 32)
	c.tolerations(field+".tolerations", p.GetTolerations())
	if sp := p.GetSpread(); sp != nil {
		c.clusterSpread(field+".spread", s, sp)
	}
	over := map[portolanv1.SpreadDomain]bool{}
	if sp := p.GetSpread(); sp != nil {
		over[sp.GetOver()] = true
	}
	for i, sp := range p.GetSpreads() {
		f := at(field+".spreads", i)
		if over[sp.GetOver()] {
			c.add(f+".over", "there is a spread over the same already")
		}
		over[sp.GetOver()] = true
		c.clusterSpread(f, s, sp)
	}
	c.duration(field+".failover.after", p.GetFailover().GetAfter(), longWait)
	c.division(s, p)
	c.clusterAffinity(path.Base(name), p.GetAffinity())
	c.overrides(s, p.GetOverrides())
}

func (c *checker) clusterSpread(field string, s *portolanv1.WorkloadSpec, sp *portolanv1.WorkloadSpec_ClusterSpread) {
	n := len(s.GetPlacement().GetAllowedRegions())
	if sp.GetOver() == portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION && n > 0 && int(sp.GetMinGroups()) > n {
		c.add(field+".min_groups", "%d regions are asked for, but only %d are allowed", sp.GetMinGroups(), n)
	}
	if s.Replicas != nil && s.Autoscale == nil && sp.GetMinGroups() > 1 && sp.GetMinGroups() > s.GetReplicas() {
		c.add(field+".min_groups", "%d replicas cannot be in %d domains", s.GetReplicas(), sp.GetMinGroups())
	}
}

// division checks how replicas are shared out: weights, groups, origins.
func (c *checker) division(s *portolanv1.WorkloadSpec, p *portolanv1.WorkloadSpec_Placement) {
	const field = "spec.placement"
	weighted := p.GetDivision() == portolanv1.Division_DIVISION_WEIGHTED
	if weighted && len(p.GetWeights()) == 0 {
		c.add(field+".weights", "are required for DIVISION_WEIGHTED")
	}
	if !weighted && len(p.GetWeights()) > 0 {
		c.add(field+".weights", "only count for DIVISION_WEIGHTED: set division, or leave them out")
	}
	for i, w := range p.GetWeights() {
		c.clusterMatch(at(field+".weights", i)+".match", w.GetMatch())
	}
	if p.GetDivision() == portolanv1.Division_DIVISION_DUPLICATED && (p.GetFailover() != nil || p.GetExclusive()) {
		c.add(field+".division", "all replicas in every cluster leave nothing to fail over and are not exclusive")
	}
	names := map[string]bool{}
	for i, g := range p.GetFallbacks() {
		f := at(field+".fallbacks", i)
		if c.id(f+".name", g.GetName()) && names[g.GetName()] {
			c.add(f+".name", "%q is there twice", g.GetName())
		}
		names[g.GetName()] = true
		c.clusterMatch(f+".match", g.GetMatch())
	}
	latency := p.GetObjective() == portolanv1.Objective_OBJECTIVE_LATENCY
	if latency && len(p.GetOrigins()) == 0 {
		c.add(field+".origins", "are required for OBJECTIVE_LATENCY: the regions of its callers")
	}
	if !latency && len(p.GetOrigins()) > 0 {
		c.add(field+".origins", "only count for OBJECTIVE_LATENCY: set objective, or leave them out")
	}
	for i, o := range p.GetOrigins() {
		c.id(at(field+".origins", i)+".region", o.GetRegion())
	}
	if _, ok := portolanv1.CapacityType_name[int32(p.GetCapacity())]; !ok {
		c.add(field+".capacity", "is no known type")
	}
	if s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL && p.GetCapacity() > portolanv1.CapacityType_CAPACITY_TYPE_ON_DEMAND && len(s.GetVolumes()) > 0 {
		c.add(field+".capacity", "a volume would go with its spot node")
	}
}

func (c *checker) clusterMatch(field string, m *portolanv1.WorkloadSpec_ClusterMatch) {
	c.uniqueIDs(field+".clusters", m.GetClusters())
	c.uniqueIDs(field+".regions", m.GetRegions())
	c.labels(field+".labels", m.GetLabels(), 32)
}

func (c *checker) clusterAffinity(own string, list []*portolanv1.WorkloadSpec_ClusterAffinity) {
	for i, a := range list {
		f := at("spec.placement.affinity", i)
		c.id(f+".workload", a.GetWorkload())
		if a.GetWorkload() == own && !a.GetAnti() {
			c.add(f+".workload", "is this workload itself: to keep its replicas together use division, to keep them apart set anti")
		}
		if !a.GetPrefer() && a.GetWeight() != 0 {
			c.add(f+".weight", "only a wish has a weight: set prefer, or leave it out")
		}
	}
}

// overrides name containers of the spec and give what a container may have.
func (c *checker) overrides(s *portolanv1.WorkloadSpec, list []*portolanv1.WorkloadSpec_ClusterOverride) {
	known := map[string]*portolanv1.Container{}
	for _, ctr := range slices.Concat(s.GetContainers(), s.GetInitContainers()) {
		known[ctr.GetName()] = ctr
	}
	for i, o := range list {
		f := at("spec.placement.overrides", i)
		c.clusterMatch(f+".match", o.GetMatch())
		for j, co := range o.GetContainers() {
			cf := at(f+".containers", j)
			if known[co.GetName()] == nil {
				c.add(cf+".name", "there is no container %q", clip(co.GetName()))
				continue
			}
			c.env(cf+".env", co.GetEnv())
			c.text(cf+".args", co.GetArgs())
			c.resources(cf, overridden(known[co.GetName()], co))
		}
	}
}

// overridden is a container as an override leaves it.
func overridden(ctr *portolanv1.Container, o *portolanv1.WorkloadSpec_ContainerOverride) *portolanv1.Container {
	out := proto.CloneOf(ctr)
	api.LayOver(out, o)
	return out
}

func (c *checker) scheduling(s *portolanv1.WorkloadSpec) {
	sc := s.GetScheduling()
	const field = "spec.scheduling"
	c.labels(field+".node_selector", sc.GetNodeSelector(), 32)
	c.tolerations(field+".tolerations", sc.GetTolerations())
	keys := map[string]bool{}
	if k := sc.GetSpreadKey(); k != "" {
		c.labelKey(field+".spread_key", k)
		keys[k] = true
	} else if sc.GetMaxSkew() > 0 {
		c.add(field+".max_skew", "needs spread_key, the node label over whose values replicas spread")
	}
	for i, t := range sc.GetSpreads() {
		f := at(field+".spreads", i) + ".topology_key"
		c.labelKey(f, t.GetTopologyKey())
		if keys[t.GetTopologyKey()] {
			c.add(f, "there is a spread over %q already", clip(t.GetTopologyKey()))
		}
		keys[t.GetTopologyKey()] = true
	}
	for i, term := range sc.GetNodeAffinity() {
		c.term(at(field+".node_affinity", i), term)
	}
	for i, p := range sc.GetPreferredNodes() {
		c.term(at(field+".preferred_nodes", i)+".term", p.GetTerm())
	}
	for i, a := range sc.GetAffinity() {
		f := at(field+".affinity", i)
		c.id(f+".workload", a.GetWorkload())
		c.labelKey(f+".topology_key", a.GetTopologyKey())
		if !a.GetPrefer() && a.GetWeight() != 0 {
			c.add(f+".weight", "only a wish has a weight: set prefer, or leave it out")
		}
	}
	c.duration(field+".gang.deadline", sc.GetGang().GetDeadline(), bounds{time.Second, 7 * 24 * time.Hour})
	c.devices(sc.GetDevices())
}

func (c *checker) term(field string, t *portolanv1.RequirementTerm) {
	for i, r := range t.GetRequirements() {
		f := at(field+".requirements", i)
		c.labelKey(f+".key", r.GetKey())
		switch r.GetOperator() {
		case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN, portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_IN:
			if len(r.GetValues()) == 0 {
				c.add(f+".values", "at least one is required")
			}
			for j, v := range r.GetValues() {
				c.labelValue(at(f+".values", j), v)
			}
		case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS, portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_EXISTS:
			if len(r.GetValues()) > 0 {
				c.add(f+".values", "asks only whether the label is there: leave them out")
			}
		default:
			if len(r.GetValues()) != 1 {
				c.add(f+".values", "exactly one integer is required")
			} else if _, err := strconv.ParseInt(r.GetValues()[0], 10, 64); err != nil {
				c.add(f+".values", "%q is no integer", clip(r.GetValues()[0]))
			}
		}
	}
}

func (c *checker) devices(list []*portolanv1.DeviceRequest) {
	kinds := map[string]bool{}
	for i, d := range list {
		f := at("spec.scheduling.devices", i)
		c.id(f+".kind", d.GetKind())
		if kinds[d.GetKind()] {
			c.add(f+".kind", "%q is there twice", clip(d.GetKind()))
		}
		kinds[d.GetKind()] = true
		if (d.GetCount() > 0) == (d.GetShareMilli() > 0) {
			c.add(f+".count", "either whole devices (count) or a share of one (share_milli, 1 to 999)")
		}
		for j, m := range d.GetModels() {
			c.labelValue(at(f+".models", j), m)
		}
	}
}

func (c *checker) update(s *portolanv1.WorkloadSpec) {
	u := s.GetUpdate()
	if u == nil {
		return
	}
	const field = "spec.update"
	if u.MaxSurge != nil && u.MaxUnavailable != nil && u.GetMaxSurge() == 0 && u.GetMaxUnavailable() == 0 {
		c.add(field+".max_unavailable", "max_surge and max_unavailable are both 0: no update could begin")
	}
	if u.MaxSurge == nil && u.MaxUnavailable != nil && u.GetMaxUnavailable() == 0 {
		c.add(field+".max_unavailable", "0 without a max_surge: no update could begin")
	}
	if u.MaxUnavailable == nil && u.MaxSurge != nil && u.GetMaxSurge() == 0 {
		c.add(field+".max_surge", "0 without a max_unavailable: no update could begin")
	}
	c.duration(field+".min_ready", u.GetMinReady(), anyDelay)
	c.duration(field+".progress_deadline", u.GetProgressDeadline(), longWait)
	blueGreen := u.GetType() == portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN
	stateful := s.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL
	switch {
	case blueGreen && s.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE:
		c.add(field+".type", "only the replicas of a service can be there twice")
	case !blueGreen && u.GetBlueGreen() != nil:
		c.add(field+".blue_green", "only counts for UPDATE_TYPE_BLUE_GREEN: set type, or leave it out")
	}
	if stateful && u.GetMaxSurge() > 0 {
		c.add(field+".max_surge", "a stateful replica keeps its name, so there is no second one beside it: use max_unavailable")
	}
	if b := u.GetBlueGreen(); b != nil {
		c.duration(field+".blue_green.switch_after", b.GetSwitchAfter(), bounds{0, 7 * 24 * time.Hour})
		c.duration(field+".blue_green.keep_old", b.GetKeepOld(), bounds{0, 7 * 24 * time.Hour})
		if b.GetActive() != "" {
			c.id(field+".blue_green.active", b.GetActive())
		}
	}
}

// pools checks the node pools of a cluster.
func (c *checker) pools(list []*portolanv1.NodePool) {
	names := map[string]bool{}
	for i, p := range list {
		f := at("spec.pools", i)
		if c.id(f+".name", p.GetName()) && names[p.GetName()] {
			c.add(f+".name", "%q is there twice", p.GetName())
		}
		names[p.GetName()] = true
		if _, ok := portolanv1.Scoring_name[int32(p.GetScoring())]; !ok {
			c.add(f+".scoring", "is no known scoring")
		}
		for _, o := range []struct {
			name  string
			value int32
		}{{"cpu_overcommit_percent", p.GetCpuOvercommitPercent()}, {"memory_overcommit_percent", p.GetMemoryOvercommitPercent()}} {
			if o.value != 0 && (o.value < 100 || o.value > 1000) {
				c.add(f+"."+o.name, "%d is not between 100 (none) and 1000", o.value)
			}
		}
		if p.GetCpuCoreHourMicros() < 0 || p.GetMemoryGibHourMicros() < 0 {
			c.add(f+".cpu_core_hour_micros", "a price is not negative")
		}
		if p.GetMinNodes() < 0 || p.GetMaxNodes() < 0 || p.GetMaxNodes() > 0 && p.GetMinNodes() > p.GetMaxNodes() {
			c.add(f+".min_nodes", "must be between 0 and max_nodes")
		}
		for _, l := range []struct {
			name string
			list *portolanv1.ResourceList
		}{{"reserved", p.GetReserved()}, {"node_size", p.GetNodeSize()}} {
			c.quantity(f+"."+l.name+".cpu", l.list.GetCpu(), api.ParseCPU)
			c.quantity(f+"."+l.name+".memory", l.list.GetMemory(), api.ParseBytes)
			c.quantity(f+"."+l.name+".storage", l.list.GetStorage(), api.ParseBytes)
		}
	}
}

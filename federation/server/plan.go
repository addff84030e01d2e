package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/capacity"
	"github.com/portolan-io/portolan/federation/store"
)

// Plan says what a change would do; nothing is stored, no image is pulled, no
// replica moved.
func (x *workloadService) Plan(ctx context.Context, req *portolanv1.PlanRequest) (*portolanv1.PlanResponse, error) {
	s, doing := x.s, "plan"
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.checkRequest(doing, req); err != nil {
		return nil, err
	}
	if s.cfg.Explainer == nil {
		return nil, api.E(api.Unavailable, doing, "this server explains no placements")
	}
	switch {
	case req.GetWorkload() != nil:
		return s.planWorkload(ctx, req)
	case req.GetDeleteWorkload() != "":
		return s.planDeletion(ctx, req.GetDeleteWorkload())
	case req.GetCluster() != nil:
		if !c.fleet {
			return nil, api.E(api.Denied, doing, "only fleet admins see what becomes of clusters")
		}
		return s.planCluster(ctx, req.GetCluster())
	}
	return nil, api.InvalidFields(doing, []api.Violation{{Message: "one of workload, delete_workload and cluster is required"}})
}

// planWorkload takes the way of an update to all but its end.
func (s *Server) planWorkload(ctx context.Context, req *portolanv1.PlanRequest) (*portolanv1.PlanResponse, error) {
	ch := &change{k: s.kinds[store.Workload], op: opUpdate, object: req.GetWorkload(), name: req.GetWorkload().GetName(), etag: req.GetWorkload().GetEtag(), allowMissing: true, dry: true, request: req}
	if err := s.begin(ctx, ch); err != nil {
		return nil, err
	}
	d, set, err := s.consider(ctx, ch)
	if err != nil {
		return nil, err
	}
	var admission []*portolanv1.Reason
	if d.result == nil {
		if admission, err = admissionReasons(s.askPolicy(ctx, ch, d, set)); err != nil {
			return nil, err
		}
	}
	resp, err := s.foresee(ctx, ch, d)
	if err != nil {
		return nil, err
	}
	resp.Admission = admission
	if len(admission) > 0 {
		resp.Token = ""
	}
	return resp, nil
}

// foresee plans what a decision would store.
func (s *Server) foresee(ctx context.Context, ch *change, d *decision) (*portolanv1.PlanResponse, error) {
	m := d.result
	if m == nil {
		dry := *ch
		dry.dry = true
		var err error
		if m, err = s.commit(ctx, &dry, d); err != nil {
			if errors.Is(err, errMoved) {
				err = api.E(api.Conflict, ch.doing, "what this depends on has just changed; try again")
			}
			return nil, err
		}
	}
	w, ok := m.(*portolanv1.Workload)
	if !ok {
		return nil, api.E(api.Internal, ch.doing, "the result is a %T", m)
	}
	return s.whatIf(ctx, api.WhatIf{Workload: w})
}

// admissionReasons turns a refusal into reasons; an error that is none stays.
func admissionReasons(err error) ([]*portolanv1.Reason, error) {
	if err == nil {
		return nil, nil
	}
	var e *api.Error
	if !errors.As(err, &e) || e.Kind != api.Denied {
		return nil, err
	}
	if len(e.Violations) == 0 {
		return []*portolanv1.Reason{{Code: "Denied", Message: e.Message}}, nil
	}
	var out []*portolanv1.Reason
	for _, v := range e.Violations {
		out = append(out, &portolanv1.Reason{Code: cmp.Or(v.Rule, "Denied"), Message: v.String()})
	}
	return out, nil
}

func (s *Server) planDeletion(ctx context.Context, name string) (*portolanv1.PlanResponse, error) {
	ch := &change{k: s.kinds[store.Workload], op: opDelete, name: name, dry: true}
	if err := s.begin(ctx, ch); err != nil {
		return nil, err
	}
	if _, err := s.decide(ctx, ch); err != nil {
		return nil, err
	}
	return s.whatIf(ctx, api.WhatIf{Deleted: name})
}

// planCluster shows a change of the fleet itself.
func (s *Server) planCluster(ctx context.Context, cc *portolanv1.ClusterChange) (*portolanv1.PlanResponse, error) {
	doing := "plan for " + clip(cc.GetCluster().GetName())
	k := s.kinds[store.Cluster]
	if err := k.checkName(doing, "cluster.name", cc.GetCluster().GetName()); err != nil {
		return nil, err
	}
	if vs := s.constraints(cc.GetCluster()); len(vs) > 0 {
		return nil, api.InvalidFields(doing, vs)
	}
	var exists bool
	if _, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		o, err := k.get(r, cc.GetCluster().GetName())
		exists = o != nil
		return err
	}); err != nil {
		return nil, err
	}
	added := cc.GetKind() == portolanv1.ClusterChange_KIND_ADDED
	switch {
	case added && exists:
		return nil, api.E(api.Exists, doing, "the cluster exists already: plan for lost or drained, or choose another name")
	case added && cc.GetCluster().GetStatus().GetCpuMilli() == 0:
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "cluster.status.cpu_milli", Message: "is required: how much the new cluster would have"}})
	case !added && !exists:
		return nil, k.absent(doing)
	}
	return s.whatIf(ctx, api.WhatIf{Cluster: cc})
}

func (s *Server) whatIf(ctx context.Context, what api.WhatIf) (*portolanv1.PlanResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	var resp *portolanv1.PlanResponse
	rev, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		var err error
		resp, err = s.cfg.Explainer.Plan(r, what)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !c.fleet {
		c.withoutForeign(resp)
	}
	resp.Revision = rev
	resp.Token, err = planToken(resp)
	return resp, err
}

// withoutForeign leaves of a plan what the caller may read. Of the workloads of other
// tenants it shows only how many replicas they would lose in each cluster.
func (c *caller) withoutForeign(p *portolanv1.PlanResponse) {
	p.Workloads = slices.DeleteFunc(p.Workloads, func(w *portolanv1.WorkloadPlan) bool { return !c.owns(api.TenantOf(w.GetWorkload())) })
	p.CostBeforeMicros, p.CostAfterMicros = 0, 0
	for _, w := range p.GetWorkloads() {
		p.CostBeforeMicros += w.GetCostBeforeMicros()
		p.CostAfterMicros += w.GetCostAfterMicros()
		foreign := map[string]int32{}
		w.Displaced = slices.DeleteFunc(w.Displaced, func(d *portolanv1.Displaced) bool {
			if c.owns(api.TenantOf(d.GetWorkload())) {
				return false
			}
			foreign[d.GetCluster()] += d.GetReplicas()
			return true
		})
		for _, cluster := range slices.Sorted(maps.Keys(foreign)) {
			w.Displaced = append(w.Displaced, &portolanv1.Displaced{Cluster: cluster, Replicas: foreign[cluster]})
		}
	}
}

// planToken names what a plan does, not when it was made: two plans with one token
// place, cost and displace alike.
func planToken(p *portolanv1.PlanResponse) (string, error) {
	same := &portolanv1.PlanResponse{CostBeforeMicros: p.GetCostBeforeMicros(), CostAfterMicros: p.GetCostAfterMicros()}
	for _, w := range p.GetWorkloads() {
		c := proto.CloneOf(w)
		c.Reasons = nil
		for _, x := range c.GetPlacements() {
			x.Reasons = nil
		}
		same.Workloads = append(same.Workloads, c)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(same)
	if err != nil {
		return "", api.E(api.Internal, "plan", "%w", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16]), nil
}

// checkToken refuses a change whose plan is not the one that was looked at.
func (s *Server) checkToken(ctx context.Context, ch *change, d *decision) error {
	if ch.planToken == "" {
		return nil
	}
	p, err := s.foresee(ctx, ch, d)
	if err != nil {
		return err
	}
	if p.GetToken() != ch.planToken {
		return api.E(api.Conflict, ch.doing, "the plan would be another one by now: plan again, and look at it")
	}
	return nil
}

// GetCapacity sums up what clusters have and what is reserved.
func (x *clusterService) GetCapacity(ctx context.Context, req *portolanv1.GetCapacityRequest) (*portolanv1.GetCapacityResponse, error) {
	s, doing := x.s, "get capacity"
	k := s.kinds[store.Cluster]
	if name := req.GetCluster(); name != "" {
		if err := k.checkName(doing, "cluster", name); err != nil {
			return nil, err
		}
	}
	var out []*portolanv1.ClusterCapacity
	rev, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		var err error
		out, err = capacityOf(r, req.GetCluster())
		return err
	})
	if err != nil {
		return nil, err
	}
	if req.GetCluster() != "" && len(out) == 0 {
		return nil, k.absent(doing)
	}
	return &portolanv1.GetCapacityResponse{Clusters: out, Revision: rev}, nil
}

func capacityOf(r store.Reader, only string) ([]*portolanv1.ClusterCapacity, error) {
	j := newJoiner(r, &caller{fleet: true}, "")
	g := &gatherer{r: r}
	byID := map[string]*portolanv1.ClusterCapacity{}
	var out []*portolanv1.ClusterCapacity
	each(g, store.Cluster, store.ListOptions{}, func(name string, cl *portolanv1.Cluster) {
		if only != "" && name != only {
			return
		}
		o, err := j.join(cl)
		if err != nil {
			g.err = err
			return
		}
		st := o.(*portolanv1.Cluster).GetStatus()
		c := &portolanv1.ClusterCapacity{
			Cluster: name, Region: cl.GetSpec().GetRegion(), State: st.GetState(), CpuMilli: st.GetCpuMilli(), MemoryBytes: st.GetMemoryBytes(), Pools: st.GetPools(),
			CpuCoreHourMicros: cl.GetSpec().GetCpuCoreHourMicros(), MemoryGibHourMicros: cl.GetSpec().GetMemoryGibHourMicros(),
		}
		byID[lastID(name)] = c
		out = append(out, c)
	})
	each(g, store.Placement, store.ListOptions{}, func(name string, p *portolanv1.Placement) {
		if c := byID[lastID(name)]; c != nil {
			c.ReservedCpuMilli += p.GetSpec().GetReservedCpuMilli()
			c.ReservedMemoryBytes += p.GetSpec().GetReservedMemoryBytes()
		}
	})
	for _, c := range out {
		p := capacity.MeanPrice(c)
		c.ReservedCostMicros = p.PerHour(api.Resources{CPUMilli: c.GetReservedCpuMilli(), MemoryBytes: c.GetReservedMemoryBytes()})
		c.CapacityCostMicros = p.PerHour(api.Resources{CPUMilli: c.GetCpuMilli(), MemoryBytes: c.GetMemoryBytes()})
	}
	slices.SortFunc(out, func(a, b *portolanv1.ClusterCapacity) int { return cmp.Compare(a.GetCluster(), b.GetCluster()) })
	return out, g.err
}

// begin names the caller and what is done, and checks what needs no state.
func (s *Server) begin(ctx context.Context, ch *change) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	ch.c, ch.doing = c, verbs[ch.op]+clip(ch.name)
	if err := s.edge(ch); err != nil {
		return err
	}
	return c.mayWrite(ch.k, ch.doing, ch.name)
}

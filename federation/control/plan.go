package control

import (
	"cmp"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// maxPlanned bounds the workloads of one answer.
const maxPlanned = 1000

// Plan decides as the loop would if the change were made: in the loop's order, by
// the loop's own steps, each decision seeing the claims of those before it, and
// who is displaced decided anew. It writes nothing.
func (c *Control) Plan(r store.Reader, what api.WhatIf) (*portolanv1.PlanResponse, error) {
	base := &readerSource{r: r}
	p := planner{src: changed{source: base, what: what, now: time.Now()}, out: &portolanv1.PlanResponse{}, asked: what.Deleted}
	if what.Workload != nil {
		p.asked = what.Workload.GetName()
	}
	l := &loop{cfg: c.cfg, log: slog.New(slog.DiscardHandler), whatIf: p.src}
	l.reset()
	l.ledger = ledgerOf(base)
	if p.asked != "" {
		l.dirty[p.asked] = true
	} else {
		for _, rec := range p.src.under(store.Workload, "") {
			l.dirty[rec.Name] = true
		}
	}
	queue := l.queue()
	for more := true; more; {
		var made []decision
		made, more = l.batch(queue, p.src.now)
		for _, d := range made {
			p.add(d)
		}
	}
	if base.err != nil {
		return nil, base.err
	}
	slices.SortStableFunc(p.out.Workloads, func(a, b *portolanv1.WorkloadPlan) int { return cmp.Compare(a.GetWorkload(), b.GetWorkload()) })
	p.out.Workloads = p.out.GetWorkloads()[:min(len(p.out.GetWorkloads()), maxPlanned)]
	return p.out, nil
}

type planner struct {
	src changed
	out *portolanv1.PlanResponse
	// asked is the workload that the change is about; empty when it is a cluster.
	asked string
}

// add takes in what would be written for one workload.
func (p *planner) add(d decision) {
	after := p.before(d.workload)
	for _, name := range d.deletes {
		delete(after, lastID(name))
	}
	for name, spec := range d.puts {
		after[lastID(name)] = spec
	}
	wp := &portolanv1.WorkloadPlan{
		Workload: d.workload, DesiredReplicas: int32(d.plan.Desired), UnplacedReplicas: int32(d.plan.Unplaced + d.plan.FailoverUnplaced), Reasons: reasonsOf(d.plan.Reasons),
	}
	for _, v := range d.plan.Displaced {
		wp.Displaced = append(wp.Displaced, &portolanv1.Displaced{Workload: v.Workload, Cluster: v.Cluster, Replicas: int32(v.Replicas)})
	}
	reasons := map[string][]*portolanv1.Reason{}
	for _, v := range d.plan.Verdicts {
		reasons[v.Cluster] = reasonsOf(v.Reasons)
	}
	var w *portolanv1.Workload
	if rec, ok := p.src.get(store.Workload, d.workload); ok {
		w = message[*portolanv1.Workload](rec)
	}
	p.compare(wp, w, after, reasons)
}

// before is what is stored.
func (p *planner) before(name string) map[string]*portolanv1.PlacementSpec {
	out := map[string]*portolanv1.PlacementSpec{}
	for _, rec := range p.src.under(store.Placement, name+"/placements/") {
		out[lastID(rec.Name)] = message[*portolanv1.Placement](rec).GetSpec()
	}
	return out
}

func (p *planner) compare(wp *portolanv1.WorkloadPlan, w *portolanv1.Workload, after map[string]*portolanv1.PlacementSpec, reasons map[string][]*portolanv1.Reason) {
	name := wp.GetWorkload()
	before := p.before(name)
	var stored *portolanv1.Workload
	if rec, ok := p.src.source.get(store.Workload, name); ok {
		stored = message[*portolanv1.Workload](rec)
	}
	clusters := maps.Clone(before)
	maps.Copy(clusters, after)
	moved := false
	for _, c := range slices.Sorted(maps.Keys(clusters)) {
		pp := &portolanv1.PlacementPlan{Cluster: c, ReplicasBefore: replicasOf(before[c]), ReplicasAfter: replicasOf(after[c]), Reasons: reasons[c]}
		moved = moved || pp.GetReplicasBefore() != pp.GetReplicasAfter()
		wp.Placements = append(wp.Placements, pp)
		wp.CostBeforeMicros += p.cost(name, stored, before[c], c)
		wp.CostAfterMicros += p.cost(name, w, after[c], c)
	}
	if stored != nil && len(before) > 0 {
		wp.UnplacedBefore = max(0, desiredOf(stored)-sum(before))
	}
	p.out.CostBeforeMicros += wp.GetCostBeforeMicros()
	p.out.CostAfterMicros += wp.GetCostAfterMicros()
	if name == p.asked || moved || wp.GetUnplacedReplicas() > 0 {
		p.out.Workloads = append(p.out.Workloads, wp)
	}
}

// replicasOf counts them over all revisions.
func replicasOf(p *portolanv1.PlacementSpec) int32 {
	var n int32
	for _, r := range p.GetRevisions() {
		n += r.GetReplicas()
	}
	return n
}

func sum(ps map[string]*portolanv1.PlacementSpec) int32 {
	var n int32
	for _, p := range ps {
		if rs := p.GetRevisions(); len(rs) > 0 {
			n += rs[0].GetReplicas()
		}
	}
	return n
}

func desiredOf(w *portolanv1.Workload) int32 {
	switch w.GetSpec().GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		return 0
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		return max(1, w.GetSpec().GetJob().GetCompletions())
	default:
		return w.GetSpec().GetReplicas()
	}
}

// cost of a placement for an hour, in micro-units of currency: what its replicas
// request at the cluster's prices; a daemon counts once for each node.
func (p *planner) cost(name string, w *portolanv1.Workload, spec *portolanv1.PlacementSpec, cluster string) int64 {
	if spec == nil || w == nil {
		return 0
	}
	rec, ok := p.src.get(store.Cluster, api.ClusterName(cluster))
	if !ok {
		return 0
	}
	cl := message[*portolanv1.Cluster](rec)
	total := 0.0
	for _, r := range spec.GetRevisions() {
		rs := w.GetSpec()
		if r.GetRevision() != currentRevision(w) {
			old, ok := p.src.get(store.Revision, name+"/revisions/"+r.GetRevision())
			if !ok {
				continue
			}
			rs = admit.Overlay(message[*portolanv1.WorkloadRevision](old).GetSpec(), w.GetSpec())
		}
		req, err := api.RequestsOf(place.Override(rs, cluster, cl.GetSpec(), cl.GetLabels()))
		if err != nil {
			continue // admission let it in: it parses
		}
		n := int64(r.GetReplicas())
		if spec.GetDaemon() {
			n = p.nodes(cluster)
		}
		req = req.Times(n)
		total += float64(req.CPUMilli)/1000*float64(cl.GetSpec().GetCpuCoreHourMicros()) + float64(req.MemoryBytes)/(1<<30)*float64(cl.GetSpec().GetMemoryGibHourMicros())
	}
	return int64(math.Round(total))
}

func (p *planner) nodes(cluster string) int64 {
	rec, ok := p.src.get(store.ClusterStatus, api.ClusterName(cluster))
	if !ok {
		return 0
	}
	return int64(message[*storev1.ClusterStatusRecord](rec).GetStatus().GetNodes())
}

// changed is a source in which one thing is otherwise.
type changed struct {
	source
	what api.WhatIf
	now  time.Time
}

func (s changed) get(kind store.Kind, name string) (store.Record, bool) {
	rec, ok := s.source.get(kind, name)
	switch {
	case kind == store.Workload && name == s.what.Deleted:
		return store.Record{}, false
	case kind == store.Workload && s.what.Workload != nil && name == s.what.Workload.GetName():
		rec.Kind, rec.Name, rec.Message = kind, name, s.what.Workload
		return rec, true
	case s.what.Cluster != nil && name == s.what.Cluster.GetCluster().GetName():
		return s.otherwise(kind, rec, ok)
	}
	return rec, ok
}

func (s changed) under(kind store.Kind, prefix string) []store.Record {
	recs := s.source.under(kind, prefix)
	var name string
	switch {
	case kind == store.Workload && s.what.Workload != nil:
		name = s.what.Workload.GetName()
	case kind == store.Workload:
		name = s.what.Deleted
	case kind == store.Cluster || kind == store.ClusterStatus:
		name = s.what.Cluster.GetCluster().GetName()
	default:
	}
	if name == "" || !strings.HasPrefix(name, prefix) {
		return recs
	}
	out := slices.DeleteFunc(slices.Clone(recs), func(r store.Record) bool { return r.Name == name })
	if rec, ok := s.get(kind, name); ok {
		out = append(out, rec)
	}
	slices.SortFunc(out, func(a, b store.Record) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// otherwise is the changed cluster's record, or its status'.
func (s changed) otherwise(kind store.Kind, rec store.Record, ok bool) (store.Record, bool) {
	added := s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_ADDED
	switch kind {
	case store.Cluster:
		cl := proto.CloneOf(message[*portolanv1.Cluster](rec))
		if added {
			cl, ok = proto.CloneOf(s.what.Cluster.GetCluster()), true
		}
		if s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_DRAINED && cl.GetSpec() != nil {
			cl.Spec.Taints = append(cl.Spec.Taints, &portolanv1.Taint{Key: place.DrainTaint, Effect: portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE})
		}
		rec.Name, rec.Message = s.what.Cluster.GetCluster().GetName(), cl
	case store.ClusterStatus:
		st := &storev1.ClusterStatusRecord{Status: &portolanv1.ClusterStatus{}}
		if ok {
			st = proto.CloneOf(message[*storev1.ClusterStatusRecord](rec))
		}
		if added {
			st.Status = proto.CloneOf(s.what.Cluster.GetCluster().GetStatus())
			st.Status.State, st.Status.LastSeenTime, ok = portolanv1.ClusterState_CLUSTER_STATE_READY, timestamppb.New(s.now), true
		}
		if s.what.Cluster.GetKind() == portolanv1.ClusterChange_KIND_LOST {
			// Long enough for every failover to be due.
			st.Status.State, st.Status.LastSeenTime = portolanv1.ClusterState_CLUSTER_STATE_LOST, timestamppb.New(s.now.AddDate(-1, 0, 0))
		}
		rec.Name, rec.Message = s.what.Cluster.GetCluster().GetName(), st
	default:
	}
	return rec, ok
}

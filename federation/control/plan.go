package control

import (
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

const (
	// maxPlanned bounds the workloads of one answer.
	maxPlanned = 1000
	// maxDecisions for each workload bound the way to a state that needs no other
	// decision: workloads that never agree on one would go on for ever.
	maxDecisions = 8
)

// Plan decides as the loop would if the change were made: in the loop's order, by
// the loop's own steps, each step seeing what those before it claim, place and
// displace, until nothing is left to decide. It writes nothing.
func (c *Control) Plan(r store.Reader, what api.WhatIf) (*portolanv1.PlanResponse, error) {
	base := &readerSource{r: r}
	src := newChanged(base, what, time.Now())
	l := &loop{cfg: c.cfg, log: slog.New(slog.DiscardHandler), whatIf: src}
	l.reset()
	l.ledger, l.near = ledgerOf(base), src.near
	p := planner{src: src, out: &portolanv1.PlanResponse{}, asked: what.Deleted, told: map[string]*foretold{}, before: l.ledger.clone(), after: l.ledger}
	if what.Workload != nil {
		p.asked = what.Workload.GetName()
	}
	workloads := src.under(store.Workload, "")
	if p.asked != "" {
		l.dirty[p.asked] = true
		l.short = waiting(base) // for room that the change may make
	} else {
		for _, rec := range workloads {
			l.dirty[rec.Name] = true
		}
	}
	for left := maxDecisions * (len(workloads) + 1); len(l.dirty) > 0 && left > 0 && base.err == nil; {
		left -= p.step(l)
	}
	for _, name := range slices.Sorted(maps.Keys(p.told)) {
		p.tell(name)
	}
	if base.err != nil {
		return nil, base.err
	}
	p.out.Workloads = p.out.GetWorkloads()[:min(len(p.out.GetWorkloads()), maxPlanned)]
	return p.out, nil
}

// planner follows the steps, and says what came of them.
type planner struct {
	src *changed
	out *portolanv1.PlanResponse
	// asked is the workload that the change is about; empty when it is a cluster.
	asked string
	told  map[string]*foretold
	// before and after are what is reserved without the change and with it.
	before, after *ledger
}

// foretold is what was decided for one workload.
type foretold struct {
	desired, unplaced int
	// reasons, for each cluster and for none, are of the last decision that moves
	// something: the next finds it there, and only says that it stays.
	reasons   []place.Reason
	verdicts  []place.Verdict
	displaced []place.Displaced
}

// step is one turn of the loop: it decides what is marked, and marks what that
// changes. It gives the number of decisions.
func (p *planner) step(l *loop) int {
	var made []decision
	queue := l.queue()
	for more := true; more; {
		var some []decision
		some, more = l.batch(queue, p.src.now)
		made = append(made, some...)
	}
	for _, d := range made {
		p.add(d)
		if d.any() {
			l.dirty[d.workload] = true
		}
		if len(d.puts)+len(d.deletes) > 0 {
			for _, other := range l.near.of(d.workload) {
				l.dirty[other] = true
			}
		}
	}
	return len(made)
}

// add takes in what would be decided for one workload.
func (p *planner) add(d decision) {
	f := p.told[d.workload]
	if f == nil {
		f = &foretold{}
		p.told[d.workload] = f
	}
	f.desired, f.unplaced = d.plan.Desired, d.plan.Unplaced+d.plan.FailoverUnplaced
	if d.any() || f.verdicts == nil && (f.unplaced > 0 || d.workload == p.asked) {
		f.reasons, f.verdicts = d.plan.Reasons, d.plan.Verdicts
	}
	for _, v := range d.plan.Displaced {
		i := slices.IndexFunc(f.displaced, func(o place.Displaced) bool { return o.Workload == v.Workload && o.Cluster == v.Cluster })
		if i < 0 {
			f.displaced = append(f.displaced, v)
		} else {
			f.displaced[i].Replicas += v.Replicas
		}
	}
	p.src.take(d)
}

// tell compares what is stored of a workload with what would be.
func (p *planner) tell(name string) {
	f := p.told[name]
	wp := &portolanv1.WorkloadPlan{Workload: name, DesiredReplicas: int32(f.desired), UnplacedReplicas: int32(f.unplaced), Reasons: reasonsOf(f.reasons)}
	for _, v := range f.displaced {
		wp.Displaced = append(wp.Displaced, &portolanv1.Displaced{Workload: v.Workload, Cluster: v.Cluster, Replicas: int32(v.Replicas)})
	}
	reasons := map[string][]*portolanv1.Reason{}
	for _, v := range f.verdicts {
		reasons[v.Cluster] = reasonsOf(v.Reasons)
	}
	before, after := placementsOf(p.src.source, name), placementsOf(p.src, name)
	stored, next := workloadIn(p.src.source, name), workloadIn(p.src, name)
	clusters := maps.Clone(before)
	maps.Copy(clusters, after)
	moved := false
	for _, c := range slices.Sorted(maps.Keys(clusters)) {
		pp := &portolanv1.PlacementPlan{Cluster: c, ReplicasBefore: replicasOf(before[c]), ReplicasAfter: replicasOf(after[c]), Reasons: reasons[c]}
		moved = moved || pp.GetReplicasBefore() != pp.GetReplicasAfter() || (before[c] == nil) != (after[c] == nil)
		wp.Placements = append(wp.Placements, pp)
		wp.CostBeforeMicros += p.cost(p.before, name, stored, before[c], c)
		wp.CostAfterMicros += p.cost(p.after, name, next, after[c], c)
	}
	if stored != nil {
		wp.UnplacedBefore = max(0, int32(place.Desired(stored.GetSpec()))-declared(before))
	}
	if name != p.asked && !moved && wp.GetUnplacedReplicas() <= wp.GetUnplacedBefore() {
		return
	}
	p.out.CostBeforeMicros += wp.GetCostBeforeMicros()
	p.out.CostAfterMicros += wp.GetCostAfterMicros()
	p.out.Workloads = append(p.out.Workloads, wp)
}

func workloadIn(s source, name string) *portolanv1.Workload {
	rec, _ := s.get(store.Workload, name)
	return message[*portolanv1.Workload](rec)
}

// placementsOf a workload, by cluster.
func placementsOf(s source, name string) map[string]*portolanv1.PlacementSpec {
	out := map[string]*portolanv1.PlacementSpec{}
	for _, rec := range s.under(store.Placement, name+"/placements/") {
		out[lastID(rec.Name)] = message[*portolanv1.Placement](rec).GetSpec()
	}
	return out
}

// replicasOf counts them over all revisions.
func replicasOf(p *portolanv1.PlacementSpec) int32 {
	var n int32
	for _, r := range p.GetRevisions() {
		n += r.GetReplicas()
	}
	return n
}

// declared counts replicas of each revision, without those that stand in for lost
// clusters.
func declared(ps map[string]*portolanv1.PlacementSpec) int32 {
	n := 0
	for _, p := range ps {
		n += place.PreviousOf(p).Declared
	}
	return int32(n)
}

// waiting are the workloads of which less is placed than is desired.
func waiting(s source) map[string]bool {
	placed, out := map[string]int32{}, map[string]bool{}
	for _, rec := range s.under(store.Placement, "") {
		placed[workloadOf(rec.Name)] += int32(place.PreviousOf(message[*portolanv1.Placement](rec).GetSpec()).Declared)
	}
	for _, rec := range s.under(store.Workload, "") {
		if int32(place.Desired(message[*portolanv1.Workload](rec).GetSpec())) > placed[rec.Name] {
			out[rec.Name] = true
		}
	}
	return out
}

// cost of a placement for an hour, in micro-units of currency, as placing counts it.
func (p *planner) cost(led *ledger, name string, w *portolanv1.Workload, spec *portolanv1.PlacementSpec, cluster string) int64 {
	rec, ok := p.src.get(store.Cluster, api.ClusterName(cluster))
	if spec == nil || w == nil || !ok {
		return 0
	}
	var ids []string
	for _, r := range spec.GetRevisions() {
		ids = append(ids, r.GetRevision())
	}
	revs, err := runningRevisions(p.src, name, w, ids)
	if err != nil {
		return 0 // admission let it in: it parses
	}
	// A route may name others, which this placement does not run.
	revs = slices.DeleteFunc(revs, func(r place.Revision) bool { return !slices.Contains(ids, r.ID) })
	cl := message[*portolanv1.Cluster](rec)
	c := place.Cluster{ID: cluster, Labels: cl.GetLabels(), Spec: cl.GetSpec()}
	if st, ok := p.src.get(store.ClusterStatus, rec.Name); ok {
		status := message[*storev1.ClusterStatusRecord](st).GetStatus()
		c.Nodes, c.Pools = int(status.GetNodes()), status.GetPools()
		_, c.Spot = led.free(cluster, place.PotOf(status), led.claims[name+"/placements/"+cluster])
	}
	n := 0
	for _, r := range spec.GetRevisions() {
		n = max(n, int(r.GetReplicas()))
	}
	return place.Workload{ID: lastID(name), Spec: w.GetSpec(), Revisions: revs}.HourMicros(&c, n)
}

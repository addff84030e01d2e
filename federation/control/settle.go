package control

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/rollout"
	"github.com/portolan-io/portolan/federation/store"
)

// decision is what is to be written for one workload.
type decision struct {
	workload string
	// basis is the revision of the workload's record that it was derived from; 0
	// when there is none.
	basis   int64
	puts    map[string]*portolanv1.PlacementSpec // by placement name
	deletes []string
	// victims lose replicas to this one; of a victim's decision, victim is set: it
	// must be stored together with the one that displaced it.
	victims []string
	victim  bool
	// plan that it carries out, for those who want to know why.
	plan place.Plan
	// rollout to store, nil when it stays as it is; dropRollout when it goes.
	rollout     *storev1.Rollout
	dropRollout bool
}

// any says that there is something to write.
func (d decision) any() bool {
	return len(d.puts)+len(d.deletes) > 0 || d.rollout != nil || d.dropRollout
}

// settle decides every marked workload, and commits in batches. After an error
// everything is to be taken in anew.
func (l *loop) settle(ctx context.Context, now time.Time) error {
	view, queue := l.view, l.queue()
	var last int64
	for more := true; more; {
		var made []decision
		made, more = l.batch(queue, now)
		if write := slices.DeleteFunc(made, func(d decision) bool { return !d.any() }); len(write) > 0 {
			rev, err := l.commit(ctx, write)
			if err != nil {
				return err
			}
			last = rev
		}
		if !time.Now().Before(l.renew) && !l.keepLease(ctx, time.Now()) || l.view != view {
			return api.E(api.Conflict, "place workloads", "the lease is not held any more")
		}
	}
	if last == 0 {
		return nil
	}
	// The next decisions must see these.
	ctx, cancel := context.WithTimeout(ctx, l.callTimeout())
	defer cancel()
	_, err := l.mirror.Wait(ctx, last)
	return err
}

// queue puts the marked workloads in order: by priority, and then fair between
// tenants.
func (l *loop) queue() *place.Fair {
	var total api.Resources
	src := l.source()
	for _, rec := range src.under(store.ClusterStatus, "") {
		st := message[*storev1.ClusterStatusRecord](rec).GetStatus()
		total = total.Add(api.Resources{CPUMilli: st.GetCpuMilli(), MemoryBytes: st.GetMemoryBytes()})
	}
	q := place.NewFair(total)
	for tenant, used := range l.ledger.tenants {
		q.Use(tenant, used)
	}
	for name := range l.dirty {
		tenant := api.TenantOf(name)
		t, _ := src.get(store.Tenant, api.TenantName(tenant))
		q.Add(tenant, int(message[*portolanv1.Tenant](t).GetSpec().GetWeight()), place.Turn{Name: name, Priority: int(l.priority(name))})
	}
	return q
}

// batch decides the next workloads, also those for which nothing is to be written;
// more is false when it is the last. A displacement is always the last: who lost
// something is decided and stored together with who took it, and what follows must
// see both.
func (l *loop) batch(queue *place.Fair, now time.Time) (made []decision, more bool) {
	for range l.cfg.MaxBatch {
		turn, ok := queue.Next()
		if !ok {
			return made, false
		}
		tenant := api.TenantOf(turn.Name)
		before := l.ledger.tenants[tenant]
		chain, displaced := l.chain(turn.Name, now)
		made = append(made, chain...)
		if displaced {
			return made, false
		}
		after := l.ledger.tenants[tenant]
		queue.Use(tenant, api.Resources{CPUMilli: after.CPUMilli - before.CPUMilli, MemoryBytes: after.MemoryBytes - before.MemoryBytes})
	}
	return made, true
}

// chain decides one workload, and whom it displaces, whom these displace, and so
// on: the highest priority first, so that none is decided before the last that
// takes something from it.
func (l *loop) chain(name string, now time.Time) (made []decision, displaced bool) {
	todo := map[string]bool{name: true}
	for len(todo) > 0 {
		next := slices.MinFunc(slices.Sorted(maps.Keys(todo)), func(a, b string) int { return cmp.Compare(l.priority(b), l.priority(a)) })
		delete(todo, next)
		delete(l.dirty, next) // before, because it may be marked again
		d := l.decide(next, now)
		d.victim = displaced
		for _, v := range d.victims {
			todo[v], displaced = true, true
		}
		made = append(made, d)
	}
	return made, displaced
}

func (l *loop) priority(name string) int32 {
	w, _ := l.source().get(store.Workload, name)
	return message[*portolanv1.Workload](w).GetSpec().GetPriority()
}

// source is what decisions read: the view, unless they are only thought of.
func (l *loop) source() source {
	if l.whatIf != nil {
		return l.whatIf
	}
	return viewSource{l.view, l.near}
}

// decide makes one decision on the view and books it in the ledger, so that the
// next one sees what it takes.
func (l *loop) decide(name string, now time.Time) decision {
	src := l.source()
	d := decision{workload: name, puts: map[string]*portolanv1.PlacementSpec{}}
	have := src.under(store.Placement, name+"/placements/")
	delete(l.short, name)
	delete(l.standing, name)
	delete(l.rolling, name)
	delete(l.due, name)
	_, rolled := src.get(store.Rollout, name)
	if rec, exists := src.get(store.Workload, name); exists {
		d.basis = rec.Revision
		w := message[*portolanv1.Workload](rec)
		for _, p := range have { // what nodes they may lie on can have changed
			l.ledger.set(p.Name, claimAs(l.ledger.claims[p.Name].Resources, w))
		}
		roll, step, changed := stepRollout(src, name, w, now)
		snap, err := snapshot(src, l.ledger, name, w, step.Revisions)
		if err != nil {
			l.log.Error("workload cannot be placed", "workload", name, "error", err)
			return d
		}
		plan := place.Place(snap, now)
		if plan.Unplaced > 0 && lower(src, l.ledger, name, snap) {
			plan = place.Place(snap, now)
		}
		for _, v := range plan.Displaced {
			l.ledger.cuts[v.Workload+"/placements/"+v.Cluster] += v.Replicas
			d.victims = append(d.victims, v.Workload)
		}
		if plan.Frozen && !l.frozen {
			l.log.Error("every cluster looks dead: nothing is changed", "alarm", true)
		}
		if l.frozen = plan.Frozen; plan.Frozen {
			return decision{workload: name, plan: plan}
		}
		l.note(name, plan)
		l.noteRollout(name, roll, step)
		for _, a := range plan.Assignments {
			spec := specOf(a, snap.Workload, plan.Basis)
			spec.ActiveRevision = step.Active
			d.puts[name+"/placements/"+a.Cluster] = spec
		}
		if changed {
			d.rollout = roll
		}
		d.dropRollout = roll == nil && rolled
		d.plan = plan
	} else {
		d.dropRollout = rolled
	}
	for _, rec := range have {
		delete(l.ledger.cuts, rec.Name)
		want := d.puts[rec.Name]
		switch {
		case want == nil:
			d.deletes = append(d.deletes, rec.Name)
		case same(message[*portolanv1.Placement](rec).GetSpec(), want):
			delete(d.puts, rec.Name)
		}
	}
	for p, spec := range d.puts {
		l.book(p, claimOf(src, p, spec))
	}
	for _, p := range d.deletes {
		l.book(p, claim{})
	}
	return d
}

// noteRollout remembers what else moves a rollout on.
func (l *loop) noteRollout(name string, r *storev1.Rollout, d rollout.Decision) {
	if moving(r) {
		l.rolling[name] = true
	}
	if at, ok := l.due[name]; !d.Again.IsZero() && (!ok || d.Again.Before(at)) {
		l.due[name] = d.Again
	}
}

// book enters a reservation; room that it frees is for those that wait.
func (l *loop) book(placement string, c claim) {
	if !l.ledger.claims[placement].Fits(c.Resources) {
		l.markShort()
	}
	l.ledger.set(placement, c)
}

// unbook takes a decision that was not stored out of the ledger.
func (l *loop) unbook(d decision) {
	back := func(placement string) {
		rec, _ := l.view.Get(store.Placement, placement)
		l.book(placement, claimOf(viewSource{l.view, l.near}, placement, message[*portolanv1.Placement](rec).GetSpec()))
	}
	for p := range d.puts {
		back(p)
	}
	for _, p := range d.deletes {
		back(p)
	}
}

// note remembers what else may change a decision.
func (l *loop) note(name string, p place.Plan) {
	if p.Unplaced > 0 || p.FailoverUnplaced > 0 {
		l.short[name] = true
	}
	if !p.Again.IsZero() {
		l.due[name] = p.Again
	}
	for _, a := range p.Assignments {
		// Also an exclusive one that is to stop, which its cluster will tell.
		if a.Failover > 0 || slices.ContainsFunc(a.Reasons, func(r place.Reason) bool { return r.Code == place.Leaving }) {
			l.standing[name] = true
		}
	}
}

// specOf is the record of an assignment, but for its epochs.
func specOf(a place.Assignment, w place.Workload, basis string) *portolanv1.PlacementSpec {
	spec := &portolanv1.PlacementSpec{
		ReservedCpuMilli: a.Claim.CPUMilli, ReservedMemoryBytes: a.Claim.MemoryBytes, Reasons: reasonsOf(a.Reasons), Basis: basis,
		Daemon: w.Spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON,
	}
	for _, r := range w.Running() {
		spec.Revisions = append(spec.Revisions, &portolanv1.RevisionReplicas{
			Revision: r.ID, Replicas: int32(a.Replicas), MinReplicas: int32(a.Min), MaxReplicas: int32(a.Max),
		})
	}
	return spec
}

func reasonsOf(in []place.Reason) []*portolanv1.Reason {
	var out []*portolanv1.Reason
	for _, r := range in {
		out = append(out, &portolanv1.Reason{Code: r.Code, Message: r.Message, Count: int32(r.Count)})
	}
	return out
}

func remediesOf(in []place.Remedy) []*portolanv1.Reason {
	var out []*portolanv1.Reason
	for _, r := range in {
		out = append(out, &portolanv1.Reason{Code: r.Code, Message: r.Message})
	}
	return out
}

// same compares decisions. The sentences do not count: a replica that was chosen
// is kept the next time, and that is no reason to write.
func same(have, want *portolanv1.PlacementSpec) bool {
	strip := func(s *portolanv1.PlacementSpec) *portolanv1.PlacementSpec {
		c := proto.CloneOf(s)
		c.Epoch, c.WriterEpoch, c.Reasons, c.Basis = 0, 0, nil, ""
		return c
	}
	return place.PreviousOf(have) == place.PreviousOf(want) && proto.Equal(strip(have), strip(want))
}

// commit stores decisions in one transaction, if what they rest on still holds in
// it: the epoch, the clusters and their room. Decisions on workloads that changed
// meanwhile are left out; the change marks them again.
func (l *loop) commit(ctx context.Context, batch []decision) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, l.callTimeout())
	defer cancel()
	now := timestamppb.Now()
	var stale []decision
	rev, err := l.cfg.Store.Update(ctx, func(tx store.Tx) error {
		stale = nil
		if err := tx.CheckLease(PlaceLease, l.lease.Epoch); err != nil {
			return err
		}
		if err := l.checkClusters(tx, l.growing(batch)); err != nil {
			return err
		}
		names := make([]string, 0, len(batch))
		for _, d := range batch {
			names = append(names, d.workload)
		}
		workloads, err := tx.GetAll(store.Workload, names)
		if err != nil {
			return err
		}
		for _, d := range batch {
			if workloads[d.workload].Revision != d.basis {
				if d.victim || len(d.victims) > 0 {
					return api.E(api.Conflict, "place "+d.workload, "it changed while a displacement was decided")
				}
				stale = append(stale, d)
			} else if err := l.write(tx, d, now); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		for _, d := range stale {
			l.unbook(d)
		}
	}
	return rev, err
}

// growing are the names of the clusters in which something claims more than before.
func (l *loop) growing(batch []decision) []string {
	out := map[string]bool{}
	for _, d := range batch {
		for p, spec := range d.puts {
			have, ok := l.view.Get(store.Placement, p)
			if !ok || !reservation(spec).Fits(reservation(message[*portolanv1.Placement](have).GetSpec())) {
				out[api.ClusterName(lastID(p))] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(out))
}

// checkClusters: replicas are added only to clusters that are still as they were,
// and have room for all that is reserved.
func (l *loop) checkClusters(tx store.Tx, names []string) error {
	clusters, err := tx.GetAll(store.Cluster, names)
	if err != nil {
		return err
	}
	states, err := tx.GetAll(store.ClusterStatus, names)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := l.checkCluster(name, clusters[name], states[name]); err != nil {
			return err
		}
	}
	return nil
}

// checkCluster compares one with what was decided on; a record is zero when there is
// none. The sum of what is reserved is the ledger's: nobody else writes reservations
// while the epoch holds.
func (l *loop) checkCluster(name string, cluster, state store.Record) error {
	doing := "place in " + name
	if seen, known := l.view.Get(store.Cluster, name); !known || cluster.Revision != seen.Revision {
		return api.E(api.Conflict, doing, "the cluster changed")
	}
	seen, _ := l.view.Get(store.ClusterStatus, name)
	was, is := message[*storev1.ClusterStatusRecord](seen).GetStatus(), message[*storev1.ClusterStatusRecord](state).GetStatus()
	room := func(s *portolanv1.ClusterStatus) api.Resources {
		return api.Resources{CPUMilli: s.GetCpuMilli(), MemoryBytes: s.GetMemoryBytes()}
	}
	if was.GetState() != is.GetState() || !room(was).Fits(room(is)) && !l.ledger.total(lastID(name)).Fits(room(is)) {
		return api.E(api.Conflict, doing, "it is %v with %dm CPU and %d bytes of memory now", is.GetState(), is.GetCpuMilli(), is.GetMemoryBytes())
	}
	return nil
}

// write stores one decision. Epochs are revisions: they grow also over a
// deletion.
func (l *loop) write(tx store.Tx, d decision, now *timestamppb.Timestamp) error {
	if err := l.writeRollout(tx, d); err != nil {
		return err
	}
	for _, name := range d.deletes {
		if err := tx.Delete(store.Placement, name); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.puts)) {
		p := &portolanv1.Placement{Name: name, Uid: uuid.NewString(), CreateTime: now}
		// The view is as good as the transaction: nobody else writes placements
		// while the epoch holds.
		if rec, ok := l.view.Get(store.Placement, name); ok {
			p = proto.CloneOf(message[*portolanv1.Placement](rec))
		}
		p.Generation++
		p.UpdateTime = now
		p.Spec = proto.CloneOf(d.puts[name])
		p.Spec.Epoch, p.Spec.WriterEpoch = tx.Revision(), l.lease.Epoch
		p.Etag = strconv.FormatInt(p.Spec.Epoch, 36)
		if err := tx.Put(store.Placement, name, p); err != nil {
			return err
		}
	}
	return nil
}

// Explain runs the deciding function on a reader's snapshot, for a workload as it
// is given, which need not be stored. It writes nothing.
func (c *Control) Explain(r store.Reader, w *portolanv1.Workload) (*portolanv1.ExplainWorkloadResponse, error) {
	src := &readerSource{r: r}
	led := ledgerOf(src)
	_, step, _ := stepRollout(src, w.GetName(), w, time.Now())
	snap, err := snapshot(src, led, w.GetName(), w, step.Revisions)
	if src.err != nil {
		return nil, src.err
	}
	if err != nil {
		return nil, api.E(api.Invalid, "explain "+w.GetName(), "%w", err)
	}
	now := time.Now()
	plan := place.Place(snap, now)
	if plan.Unplaced > 0 && lower(src, led, w.GetName(), snap) {
		plan = place.Place(snap, now)
	}
	if src.err != nil {
		return nil, src.err
	}
	out := &portolanv1.ExplainWorkloadResponse{
		DesiredReplicas: int32(plan.Desired), UnplacedReplicas: int32(plan.Unplaced), Revision: r.Revision(),
		FailoverUnplacedReplicas: int32(plan.FailoverUnplaced), Reasons: reasonsOf(plan.Reasons), Kind: w.GetSpec().GetKind(), ScoreOf: plan.Scored,
	}
	for _, v := range plan.Verdicts {
		out.Clusters = append(out.Clusters, &portolanv1.ClusterVerdict{
			Cluster: v.Cluster, Feasible: v.Feasible, Replicas: int32(v.Replicas), Score: v.Score, Reasons: reasonsOf(v.Reasons), Remedies: remediesOf(v.Remedies),
		})
	}
	return out, nil
}

package server

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// joiner adds status to objects as they are read, all from one snapshot, and
// leaves out what the caller may not see. It reads the records under its scope
// once, at first need.
type joiner struct {
	r     store.Reader
	c     *caller
	scope string // prefix of the objects' names; empty for all that the caller may read

	placements map[string][]*portolanv1.Placement        // by workload
	reported   map[string]*storev1.PlacementStatusRecord // by placement
	clusters   map[string]*storev1.ClusterStatusRecord   // by cluster's name
	nacks      map[string][]*storev1.NackRecord          // by intent resource
	rollouts   map[string]*portolanv1.RolloutStatus      // by workload
	// heard of clusters, by ID, when it was asked for before.
	heard  map[string]heard
	loaded struct{ placements, clusters, nacks bool }
}

func newJoiner(r store.Reader, c *caller, scope string) *joiner {
	return &joiner{r: r, c: c, scope: scope}
}

// join gives a copy of the object with its status.
func (j *joiner) join(o object) (object, error) {
	o = cloneObject(o)
	var err error
	switch m := o.(type) {
	case *portolanv1.Workload:
		err = j.workload(m)
	case *portolanv1.Placement:
		err = j.placement(m)
	case *portolanv1.Cluster:
		err = j.cluster(m)
	case *portolanv1.Service:
		if m.Status == nil {
			m.Status = &portolanv1.ServiceStatus{}
		}
		m.Status.Conditions, err = j.accepted("service", o)
	case *portolanv1.Route:
		m.Status = &portolanv1.RouteStatus{}
		m.Status.Conditions, err = j.accepted("route", o)
	case *portolanv1.PolicyBundle:
		if m.Status == nil {
			m.Status = &portolanv1.PolicyBundleStatus{}
		}
		m.Status.Conditions, err = j.accepted("policy", o)
	}
	return o, err
}

func (j *joiner) loadPlacements() error {
	if j.loaded.placements {
		return nil
	}
	j.placements, j.reported = map[string][]*portolanv1.Placement{}, map[string]*storev1.PlacementStatusRecord{}
	opts := store.ListOptions{Prefix: j.scope}
	if j.scope == "" {
		opts.Tenants = j.c.filter()
	}
	for rec, err := range j.r.List(store.Placement, opts) {
		if err != nil {
			return err
		}
		if p, ok := rec.Message.(*portolanv1.Placement); ok {
			w := workloadOf(rec.Name)
			j.placements[w] = append(j.placements[w], p)
		}
	}
	for rec, err := range j.r.List(store.PlacementStatus, opts) {
		if err != nil {
			return err
		}
		if p, ok := rec.Message.(*storev1.PlacementStatusRecord); ok {
			j.reported[rec.Name] = p
		}
	}
	j.loaded.placements = true
	return nil
}

// workloadOf is the workload in the name of something below it.
func workloadOf(name string) string {
	seg := strings.SplitN(name, "/", 5)
	if len(seg) < 4 {
		return name
	}
	return strings.Join(seg[:4], "/")
}

// statusOf gives what a cluster reported of a placement, unless it speaks of an
// older decision's epoch.
func (j *joiner) statusOf(p *portolanv1.Placement) *portolanv1.PlacementStatus {
	got := j.reported[p.GetName()]
	if got.GetEpoch() < p.GetSpec().GetEpoch() {
		return nil
	}
	return got.GetStatus()
}

func (j *joiner) placement(p *portolanv1.Placement) error {
	if err := j.loadPlacements(); err != nil {
		return err
	}
	p.Status = proto.CloneOf(j.statusOf(p))
	return nil
}

func (j *joiner) workload(w *portolanv1.Workload) error {
	if err := j.loadPlacements(); err != nil {
		return err
	}
	st := &portolanv1.WorkloadStatus{CurrentRevision: w.GetStatus().GetCurrentRevision()}
	tally, carried := revisionTally{}, len(j.placements[w.GetName()]) > 0
	var specs []*portolanv1.PlacementSpec
	for _, p := range j.placements[w.GetName()] {
		specs = append(specs, p.GetSpec())
		said := j.statusOf(p)
		carried = carried && said != nil
		sum := &portolanv1.PlacementSummary{Cluster: lastID(p.GetName())}
		for _, rev := range p.GetSpec().GetRevisions() {
			tally.of(rev.GetRevision()).placed += rev.GetReplicas()
		}
		// Replicas of an older decision run on until the newer one is carried out.
		for _, rev := range j.reported[p.GetName()].GetStatus().GetRevisions() {
			sum.Revisions = append(sum.Revisions, proto.CloneOf(rev))
			sum.ReadyReplicas += rev.GetReadyReplicas()
			st.Replicas += rev.GetReplicas()
			st.ReadyReplicas += rev.GetReadyReplicas()
			t := tally.of(rev.GetRevision())
			t.have, t.ready = t.have+rev.GetReplicas(), t.ready+rev.GetReadyReplicas()
		}
		for _, cond := range said.GetConditions() {
			sum.Conditions = append(sum.Conditions, proto.CloneOf(cond))
		}
		st.Placements = append(st.Placements, sum)
	}
	tally.of(st.GetCurrentRevision()) // it is judged also when nobody has it
	counts := place.Count(w.GetSpec(), st.GetCurrentRevision(), specs)
	st.DesiredReplicas, st.UnplacedReplicas = int32(counts.Desired), int32(counts.Unplaced)
	if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		st.DesiredReplicas = st.Replicas
	}
	if carried && st.UnplacedReplicas == 0 {
		st.ObservedGeneration = w.GetGeneration()
	} else {
		st.ObservedGeneration = max(w.GetGeneration()-1, 0)
	}
	if err := j.rollout(w.GetName(), st); err != nil {
		return err
	}
	acc, err := j.accepted("workload", w)
	st.Conditions = append(workloadConditions(w, st, tally), acc...)
	for _, c := range st.Conditions {
		c.ObservedGeneration = st.ObservedGeneration
	}
	w.Status = st
	return err
}

// rollout adds how the change to the newest template goes.
func (j *joiner) rollout(name string, st *portolanv1.WorkloadStatus) error {
	if j.rollouts == nil {
		j.rollouts = map[string]*portolanv1.RolloutStatus{}
		opts := store.ListOptions{Prefix: j.scope}
		if j.scope == "" {
			opts.Tenants = j.c.filter()
		}
		for rec, err := range j.r.List(store.Rollout, opts) {
			if err != nil {
				return err
			}
			if r, ok := rec.Message.(*storev1.Rollout); ok {
				j.rollouts[rec.Name] = r.GetStatus()
			}
		}
	}
	if r := j.rollouts[name]; r.GetTarget() == st.GetCurrentRevision() {
		st.Rollout = proto.CloneOf(r)
	}
	return nil
}

// revisionTally counts the replicas of a workload by revision.
type revisionTally map[string]*revisionCount

type revisionCount struct{ placed, have, ready int32 }

func (t revisionTally) of(revision string) *revisionCount {
	if t[revision] == nil {
		t[revision] = &revisionCount{}
	}
	return t[revision]
}

// workloadConditions judges the workload as a whole: each type stands once. What
// single clusters say is with their placements.
func workloadConditions(w *portolanv1.Workload, st *portolanv1.WorkloadStatus, tally revisionTally) []*portolanv1.Condition {
	placed := condition("Placed", w, st.GetUnplacedReplicas() == 0, "Placed", "every replica has a cluster")
	if st.GetUnplacedReplicas() > 0 {
		placed.Reason = "Unplaced"
		placed.Message = fmt.Sprintf("%d of %d replicas have no cluster: explain says why", st.GetUnplacedReplicas(), st.GetDesiredReplicas())
		if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
			placed.Message = "no cluster has it, so that it does not run: explain says why"
		}
	}
	out := []*portolanv1.Condition{placed}
	if w.GetSpec().GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		out = append(out, available(w, st, tally))
	}
	return append(out, rollUp(w, st)...)
}

// available is whether every revision that is to serve has all its replicas
// ready: the current one as many as the spec says, and each that placements name
// as many as they say. Ready replicas of one say nothing about another.
func available(w *portolanv1.Workload, st *portolanv1.WorkloadStatus, tally revisionTally) *portolanv1.Condition {
	var short []string
	for _, rev := range slices.Sorted(maps.Keys(tally)) {
		t := tally[rev]
		want := t.placed
		switch {
		case w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
			want = t.have
		case rev == st.GetCurrentRevision():
			want = max(want, st.GetDesiredReplicas())
		}
		if t.ready < want {
			short = append(short, fmt.Sprintf("%d of %d replicas of revision %s are ready", t.ready, want, rev))
		}
	}
	if len(st.GetPlacements()) == 0 {
		short = []string{"it is in no cluster"}
	}
	if len(short) == 0 {
		return condition("Available", w, true, "Ready", "every replica is ready")
	}
	return condition("Available", w, false, "NotReady", strings.Join(short, "; "))
}

// rollUp gives what clusters say of their parts as one condition per type: what is
// so for the workload when it is so for all of its parts, and the rest, when it is
// so for any. Available is judged over all clusters, not from theirs.
func rollUp(w *portolanv1.Workload, st *portolanv1.WorkloadStatus) []*portolanv1.Condition {
	said := map[string]map[bool][]string{}
	reasons := map[string]map[bool]string{}
	for _, p := range st.GetPlacements() {
		for _, c := range p.GetConditions() {
			typ, is := c.GetType(), c.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE
			if typ == "Available" {
				continue
			}
			if said[typ] == nil {
				said[typ], reasons[typ] = map[bool][]string{}, map[bool]string{}
			}
			said[typ][is] = append(said[typ][is], p.GetCluster()+": "+c.GetMessage())
			reasons[typ][is] = cmp.Or(reasons[typ][is], c.GetReason())
		}
	}
	var out []*portolanv1.Condition
	for _, typ := range slices.Sorted(maps.Keys(said)) {
		is := len(said[typ][true]) > 0
		switch typ {
		case "Complete":
			is = len(said[typ][true]) == len(st.GetPlacements())
		case "Scheduled":
			is = len(said[typ][false]) == 0
		}
		who := said[typ][is]
		if len(who) == 0 { // one cluster is complete, and the others have said nothing yet
			out = append(out, condition(typ, w, false, "Running", "not every cluster has said so"))
			continue
		}
		msg := strings.Join(who[:min(len(who), maxNamed)], "; ")
		if len(who) > maxNamed {
			msg += fmt.Sprintf("; and %d more", len(who)-maxNamed)
		}
		out = append(out, condition(typ, w, is, reasons[typ][is], msg))
	}
	return out
}

// maxNamed is how many clusters or consumers one condition names.
const maxNamed = 5

func condition(typ string, o object, ok bool, reason, message string) *portolanv1.Condition {
	state := portolanv1.ConditionState_CONDITION_STATE_FALSE
	if ok {
		state = portolanv1.ConditionState_CONDITION_STATE_TRUE
	}
	return &portolanv1.Condition{Type: typ, State: state, Reason: reason, Message: message, ObservedGeneration: o.GetGeneration()}
}

func (j *joiner) cluster(cl *portolanv1.Cluster) error {
	if !j.loaded.clusters {
		j.clusters = map[string]*storev1.ClusterStatusRecord{}
		for rec, err := range j.r.List(store.ClusterStatus, store.ListOptions{}) {
			if err != nil {
				return err
			}
			if m, ok := rec.Message.(*storev1.ClusterStatusRecord); ok {
				j.clusters[rec.Name] = m
			}
		}
		j.loaded.clusters = true
	}
	st := proto.CloneOf(j.clusters[cl.GetName()].GetStatus())
	if st == nil {
		st = &portolanv1.ClusterStatus{}
	}
	if st.GetState() == portolanv1.ClusterState_CLUSTER_STATE_UNSPECIFIED {
		st.State = portolanv1.ClusterState_CLUSTER_STATE_PENDING
	}
	// Without a status the row is of an earlier cluster of this name.
	if h, ok := j.heard[lastID(cl.GetName())]; ok && j.clusters[cl.GetName()] != nil {
		st.AppliedRevision = max(st.GetAppliedRevision(), h.applied)
		if h.at.After(st.GetLastSeenTime().AsTime()) {
			st.LastSeenTime = timestamppb.New(h.at)
		}
	}
	if !j.c.fleet {
		// Capacity, nodes and laggards speak of other tenants too.
		st = &portolanv1.ClusterStatus{State: st.GetState(), LastSeenTime: st.GetLastSeenTime(), IngressAddresses: st.GetIngressAddresses()}
	}
	cl.Status = st
	return nil
}

// intentResource is the name under which an object travels to clusters.
func intentResource(kind string, o object) string {
	if kind == "policy" {
		return "policy/" + o.GetName()
	}
	return kind + "/" + api.TenantOf(o.GetName()) + "/" + lastID(o.GetName())
}

// accepted says whether some consumer refuses the object, and which.
func (j *joiner) accepted(kind string, o object) ([]*portolanv1.Condition, error) {
	if !j.loaded.nacks {
		j.nacks = map[string][]*storev1.NackRecord{}
		for rec, err := range j.r.List(store.Nack, store.ListOptions{}) {
			if err != nil {
				return nil, err
			}
			if n, ok := rec.Message.(*storev1.NackRecord); ok {
				j.nacks[n.GetResource()] = append(j.nacks[n.GetResource()], n)
			}
		}
		j.loaded.nacks = true
	}
	nacks := j.nacks[intentResource(kind, o)]
	if len(nacks) == 0 {
		return []*portolanv1.Condition{condition("Accepted", o, true, "Accepted", "no consumer refuses it")}, nil
	}
	var who []string
	for _, n := range nacks[:min(len(nacks), maxNamed)] {
		consumer := n.GetConsumer()
		if !j.c.fleet {
			consumer = withoutNode(consumer)
		}
		who = append(who, consumer+": "+n.GetMessage())
	}
	slices.Sort(who)
	msg := strings.Join(who, "; ")
	if len(nacks) > len(who) {
		msg += fmt.Sprintf("; and %d more", len(nacks)-len(who))
	}
	return []*portolanv1.Condition{condition("Accepted", o, false, "Rejected", msg)}, nil
}

// withoutNode takes "/nodes/{n}" out of a consumer's name: nodes are no tenant's business.
func withoutNode(consumer string) string {
	seg := strings.Split(consumer, "/")
	for i := 0; i+1 < len(seg); i++ {
		if seg[i] == "nodes" {
			return strings.Join(slices.Delete(seg, i, i+2), "/")
		}
	}
	return consumer
}

// nackedObject is intentResource backwards; empty for what users do not write.
func nackedObject(resource string) map[store.Kind]string {
	kind, rest, _ := strings.Cut(resource, "/")
	if kind == "policy" {
		return map[store.Kind]string{store.PolicyBundle: rest}
	}
	tenant, id, ok := strings.Cut(rest, "/")
	if !ok {
		return nil
	}
	switch kind {
	case "workload":
		return map[store.Kind]string{store.Workload: api.WorkloadName(tenant, id)}
	case "service":
		return map[store.Kind]string{store.Service: api.ServiceName(tenant, id)}
	case "route":
		return map[store.Kind]string{store.Route: api.RouteName(tenant, id)}
	}
	return nil
}

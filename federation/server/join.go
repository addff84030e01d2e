package server

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
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
	return j.reported[p.GetName()].GetStatus()
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
	current := w.GetStatus().GetCurrentRevision()
	st := &portolanv1.WorkloadStatus{CurrentRevision: current}
	placed, carried := int32(0), len(j.placements[w.GetName()]) > 0
	for _, p := range j.placements[w.GetName()] {
		sum := &portolanv1.PlacementSummary{Cluster: lastID(p.GetName())}
		for _, rev := range p.GetSpec().GetRevisions() {
			if rev.GetRevision() == current {
				placed += rev.GetReplicas()
			}
		}
		got := j.reported[p.GetName()]
		carried = carried && got.GetEpoch() >= p.GetSpec().GetEpoch()
		for _, rev := range got.GetStatus().GetRevisions() {
			sum.Revisions = append(sum.Revisions, proto.CloneOf(rev))
			sum.ReadyReplicas += rev.GetReadyReplicas()
			st.Replicas += rev.GetReplicas()
			st.ReadyReplicas += rev.GetReadyReplicas()
		}
		for _, cond := range got.GetStatus().GetConditions() {
			c := proto.CloneOf(cond)
			c.Message = fmt.Sprintf("%s: %s", sum.GetCluster(), c.GetMessage())
			st.Conditions = append(st.Conditions, c)
		}
		st.Placements = append(st.Placements, sum)
	}
	st.DesiredReplicas = desired(w, st.Replicas)
	st.UnplacedReplicas = unplaced(w, placed)
	if carried && st.UnplacedReplicas == 0 {
		st.ObservedGeneration = w.GetGeneration()
	} else {
		st.ObservedGeneration = max(w.GetGeneration()-1, 0)
	}
	acc, err := j.accepted("workload", w)
	st.Conditions = append(workloadConditions(w, st), append(st.Conditions, acc...)...)
	w.Status = st
	return err
}

// desired is how many replicas there should be at a time; a daemon's number is
// known only by those that have it.
func desired(w *portolanv1.Workload, have int32) int32 {
	switch w.GetSpec().GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		return have
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		return w.GetSpec().GetJob().GetParallelism()
	default:
		return w.GetSpec().GetReplicas()
	}
}

func unplaced(w *portolanv1.Workload, placed int32) int32 {
	if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		return 0
	}
	return max(desired(w, 0)-placed, 0)
}

func workloadConditions(w *portolanv1.Workload, st *portolanv1.WorkloadStatus) []*portolanv1.Condition {
	placed := condition("Placed", w, st.GetUnplacedReplicas() == 0, "Placed", "every replica has a cluster")
	if st.GetUnplacedReplicas() > 0 {
		placed.Reason = "Unplaced"
		placed.Message = fmt.Sprintf("%d of %d replicas have no cluster: explain says why", st.GetUnplacedReplicas(), st.GetDesiredReplicas())
	}
	ready := condition("Available", w, st.GetReadyReplicas() >= st.GetDesiredReplicas() && len(st.GetPlacements()) > 0, "Ready", "every replica is ready")
	if ready.GetState() != portolanv1.ConditionState_CONDITION_STATE_TRUE {
		ready.Reason = "NotReady"
		ready.Message = fmt.Sprintf("%d of %d replicas are ready", st.GetReadyReplicas(), st.GetDesiredReplicas())
	}
	if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		return []*portolanv1.Condition{placed}
	}
	return []*portolanv1.Condition{placed, ready}
}

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
	for _, n := range nacks[:min(len(nacks), 5)] {
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

package control

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/rollout"
	"github.com/portolan-io/portolan/federation/store"
)

// haltCodes are the reasons for which a cluster halts an update that going back
// can help against.
var haltCodes = []string{"NoProgress", "FailingChecks"}

// rollsOut says that a change of the template exchanges replicas. A job is run
// again instead.
func rollsOut(w *portolanv1.Workload) bool {
	switch w.GetSpec().GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, portolanv1.WorkloadKind_WORKLOAD_KIND_CRON:
		return false
	default:
		return true
	}
}

// stepRollout asks rollout how the change to the newest template goes. The record
// is nil when the workload has none; changed says that it is to be stored.
func stepRollout(s source, name string, w *portolanv1.Workload, now time.Time) (next *storev1.Rollout, d rollout.Decision, changed bool) {
	current := currentRevision(w)
	if !rollsOut(w) {
		return nil, rollout.Decision{Revisions: []string{current}}, false
	}
	var prev *storev1.Rollout
	if rec, ok := s.get(store.Rollout, name); ok {
		prev = message[*storev1.Rollout](rec)
	}
	next, d = rollout.Step(prev, rollout.Input{
		Now: now, UID: w.GetUid(), Generation: w.GetGeneration(), Target: current, Update: w.GetSpec().GetUpdate(),
		Exists: func(rev string) bool {
			_, ok := s.get(store.Revision, name+"/revisions/"+rev)
			return ok || rev == current
		},
		Clusters: reportsOf(s, name),
	})
	return next, d, next != prev
}

// reportsOf gathers what clusters say of their part.
func reportsOf(s source, name string) []rollout.Cluster {
	var out []rollout.Cluster
	for _, rec := range s.under(store.Placement, name+"/placements/") {
		p := message[*portolanv1.Placement](rec).GetSpec()
		c := rollout.Cluster{ID: lastID(rec.Name), Want: map[string]int{}, Available: map[string]int{}, Running: map[string]int{}}
		var status *storev1.PlacementStatusRecord
		if st, ok := s.get(store.PlacementStatus, rec.Name); ok {
			status = message[*storev1.PlacementStatusRecord](st)
		}
		c.Current = status != nil && status.GetEpoch() >= p.GetEpoch() && heard(s, c.ID)
		for _, r := range status.GetStatus().GetRevisions() {
			c.Available[r.GetRevision()], c.Running[r.GetRevision()] = available(r), int(r.GetReplicas())
		}
		for _, r := range p.GetRevisions() {
			c.Want[r.GetRevision()] = wanted(p, r, c.Running[r.GetRevision()])
		}
		for _, cond := range status.GetStatus().GetConditions() {
			if cond.GetType() == "Halted" && cond.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE && slices.Contains(haltCodes, cond.GetReason()) && len(p.GetRevisions()) > 0 {
				// A report of the present placement halts what that brings out: the first.
				c.Halted, c.Why = p.GetRevisions()[0].GetRevision(), cond.GetMessage()
			}
			if p.GetDaemon() && cond.GetType() == "Progressing" && cond.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE {
				c.Incomplete = true
			}
		}
		out = append(out, c)
	}
	return out
}

// wanted is how many replicas of a revision make it whole in a cluster: what the
// placement says, or as many as the cluster scaled it to.
func wanted(p *portolanv1.PlacementSpec, r *portolanv1.RevisionReplicas, running int) int {
	switch {
	case p.GetDaemon():
		return 0
	case r.GetMaxReplicas() > 0:
		return max(int(r.GetMinReplicas()), running)
	}
	return int(r.GetReplicas())
}

// available is how many replicas count for an update.
func available(r *portolanv1.RevisionReplicas) int {
	if r.AvailableReplicas == nil {
		return int(r.GetReadyReplicas())
	}
	return int(r.GetAvailableReplicas())
}

func heard(s source, cluster string) bool {
	st, ok := s.get(store.ClusterStatus, "clusters/"+cluster)
	return ok && message[*storev1.ClusterStatusRecord](st).GetStatus().GetState() == portolanv1.ClusterState_CLUSTER_STATE_READY
}

// moving says that reports of clusters may change what comes next.
func moving(r *storev1.Rollout) bool {
	switch r.GetStatus().GetState() {
	case portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, portolanv1.RolloutState_ROLLOUT_STATE_WAITING, portolanv1.RolloutState_ROLLOUT_STATE_HALTED:
		return true
	default:
		return false
	}
}

// writeRollout stores or deletes the record in the transaction of the decision.
func (l *loop) writeRollout(tx store.Tx, d decision) error {
	switch {
	case d.rollout != nil:
		r := proto.CloneOf(d.rollout)
		r.WriterEpoch = l.lease.Epoch
		return tx.Put(store.Rollout, d.workload, r)
	case d.dropRollout:
		return tx.Delete(store.Rollout, d.workload)
	}
	return nil
}

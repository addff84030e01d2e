package control

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// report has a cluster say that it has carried out its placement: every replica is
// ready, or the update is halted.
func (r *rig) report(id, cluster, halted string) {
	r.t.Helper()
	name := api.WorkloadName("t", id) + "/placements/" + cluster
	r.update(func(tx store.Tx) error {
		rec, err := tx.Get(store.Placement, name)
		if err != nil {
			return err
		}
		p := rec.Message.(*portolanv1.Placement).GetSpec()
		st := &portolanv1.PlacementStatus{}
		for _, rev := range p.GetRevisions() {
			n := rev.GetReplicas()
			if halted != "" {
				n = 0
			}
			st.Revisions = append(st.Revisions, &portolanv1.RevisionReplicas{Revision: rev.GetRevision(), Replicas: rev.GetReplicas(), ReadyReplicas: n})
		}
		if halted != "" {
			st.Conditions = []*portolanv1.Condition{{Type: "Halted", State: portolanv1.ConditionState_CONDITION_STATE_TRUE, Reason: halted, Message: "told by a test"}}
		}
		return tx.Put(store.PlacementStatus, name, &storev1.PlacementStatusRecord{Status: st, Epoch: p.GetEpoch()})
	})
}

func (r *rig) rollout(id string) *portolanv1.RolloutStatus {
	r.t.Helper()
	var out *portolanv1.RolloutStatus
	if _, err := r.s.View(r.t.Context(), func(rd store.Reader) error {
		rec, err := rd.Get(store.Rollout, api.WorkloadName("t", id))
		if api.KindOf(err) == api.NotFound {
			return nil
		}
		out = rec.Message.(*storev1.Rollout).GetStatus()
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *rig) wantRollout(when, id string, state portolanv1.RolloutState) {
	r.t.Helper()
	synctest.Wait()
	if got := r.rollout(id); got.GetState() != state {
		r.t.Errorf("%s: the rollout is %v, want %v\n%s", when, got, state, r.log.String())
	}
}

// A template that a cluster halts is taken back everywhere, and stays back until
// there is another one.
func TestRollsBack(t *testing.T) {
	run(t, func(r *rig) {
		r.cluster("eu", "eu", 100)
		r.cluster("us", "us", 100)
		r.start("a", r.s)
		s := spec(4)
		r.workload("w", "v1", s)
		r.want("first", "w@eu v1×2, w@us v1×2")
		r.report("w", "eu", "")
		r.wantRollout("one cluster is not all", "w", portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING)
		r.report("w", "us", "")
		r.wantRollout("all reported", "w", portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE)

		r.workload("w", "v2", s)
		r.want("the second", "w@eu v2×2, w@us v2×2")
		r.report("w", "eu", "")
		r.report("w", "us", "StaleIntent")
		r.wantRollout("a halt that going back does not help", "w", portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING)
		r.report("w", "us", "FailingChecks")
		r.wantRollout("halted", "w", portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK)
		r.want("back", "w@eu v1×2, w@us v1×2")
		if why := r.rollout("w").GetReason().GetMessage(); !strings.Contains(why, "us") || !strings.Contains(why, "told by a test") {
			t.Errorf("the reason names neither who nor why: %s", why)
		}
		r.report("w", "eu", "")
		r.report("w", "us", "")
		r.want("and stays", "w@eu v1×2, w@us v1×2")

		r.workload("w", "v3", s)
		r.want("another try", "w@eu v3×2, w@us v3×2")
		r.update(func(tx store.Tx) error { return tx.Delete(store.Workload, api.WorkloadName("t", "w")) })
		r.want("gone", "")
		if r.rollout("w") != nil {
			t.Error("the rollout outlives its workload")
		}
	})
}

// What is ready and not yet for min_ready completes nothing and is not switched to.
func TestReadyIsNotAvailable(t *testing.T) {
	for _, kind := range []portolanv1.UpdateType{portolanv1.UpdateType_UPDATE_TYPE_ROLLING, portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN} {
		t.Run(kind.String(), func(t *testing.T) {
			run(t, func(r *rig) {
				r.cluster("eu", "eu", 100)
				r.start("a", r.s)
				s := spec(2)
				s.Update = &portolanv1.WorkloadSpec_UpdateStrategy{Type: kind, MinReady: durationpb.New(time.Minute), BlueGreen: &portolanv1.WorkloadSpec_BlueGreen{Active: "v2"}}
				available := func(n int32) {
					t.Helper()
					r.update(func(tx store.Tx) error {
						name := api.PlacementName("t", "w", "eu")
						rec, err := tx.Get(store.Placement, name)
						if err != nil {
							return err
						}
						p, st := rec.Message.(*portolanv1.Placement).GetSpec(), &portolanv1.PlacementStatus{}
						for _, rev := range p.GetRevisions() {
							st.Revisions = append(st.Revisions, &portolanv1.RevisionReplicas{Revision: rev.GetRevision(), Replicas: 2, ReadyReplicas: 2, AvailableReplicas: &n})
						}
						return tx.Put(store.PlacementStatus, name, &storev1.PlacementStatusRecord{Status: st, Epoch: p.GetEpoch()})
					})
				}
				for _, rev := range []string{"v1", "v2"} {
					r.workload("w", rev, s)
					available(1)
					r.wantRollout("ready", "w", portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING)
					if active := r.rollout("w").GetActive(); rev == "v2" && active == "v2" {
						t.Errorf("%s serves before it is available", active)
					}
					available(2)
					r.wantRollout("available", "w", portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE)
				}
			})
		})
	}
}

// A daemon's update that halts goes back too, although the cluster, which alone
// knows on how many nodes it runs, says at the same time that it is not through.
func TestDaemonRollsBack(t *testing.T) {
	run(t, func(r *rig) {
		r.cluster("eu", "eu", 100)
		r.start("a", r.s)
		say := func(conditions ...*portolanv1.Condition) {
			t.Helper()
			name := api.WorkloadName("t", "w") + "/placements/eu"
			r.update(func(tx store.Tx) error {
				rec, err := tx.Get(store.Placement, name)
				if err != nil {
					return err
				}
				p := rec.Message.(*portolanv1.Placement).GetSpec()
				return tx.Put(store.PlacementStatus, name, &storev1.PlacementStatusRecord{Status: &portolanv1.PlacementStatus{Conditions: conditions}, Epoch: p.GetEpoch()})
			})
		}
		holds := func(typ, reason string) *portolanv1.Condition {
			return &portolanv1.Condition{Type: typ, State: portolanv1.ConditionState_CONDITION_STATE_TRUE, Reason: reason}
		}
		s := spec(0)
		s.Kind, s.Replicas = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, nil
		r.workload("w", "v1", s)
		say(holds("Progressing", "Updating"))
		r.wantRollout("not everywhere", "w", portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING)
		say()
		r.wantRollout("on every node", "w", portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE)
		r.workload("w", "v2", s)
		say(holds("Halted", "NoProgress"), holds("Progressing", "Updating"))
		r.wantRollout("halted", "w", portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK)
		r.want("back", "w@eu v1×0")
	})
}

// Blue-green runs both, serves one, and switches when told, and back.
func TestBlueGreen(t *testing.T) {
	run(t, func(r *rig) {
		r.cluster("eu", "eu", 100)
		r.start("a", r.s)
		s := spec(2)
		s.Update = &portolanv1.WorkloadSpec_UpdateStrategy{Type: portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN, BlueGreen: &portolanv1.WorkloadSpec_BlueGreen{KeepOld: durationpb.New(time.Minute)}}
		active := func(when, want string) {
			t.Helper()
			synctest.Wait()
			if _, err := r.s.View(t.Context(), func(rd store.Reader) error {
				rec, err := rd.Get(store.Placement, api.PlacementName("t", "w", "eu"))
				if err == nil && rec.Message.(*portolanv1.Placement).GetSpec().GetActiveRevision() != want {
					t.Errorf("%s: %s serves, want %s", when, rec.Message.(*portolanv1.Placement).GetSpec().GetActiveRevision(), want)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		r.workload("w", "v1", s)
		r.report("w", "eu", "")
		active("the first", "v1")
		r.workload("w", "v2", s)
		r.want("both run", "w@eu v2×2 v1×2")
		active("not yet", "v1")
		r.report("w", "eu", "")
		r.wantRollout("whole", "w", portolanv1.RolloutState_ROLLOUT_STATE_WAITING)
		active("it waits", "v1")

		to := func(rev string) *portolanv1.WorkloadSpec {
			c := proto.CloneOf(s)
			c.Update.BlueGreen.Active = rev
			return c
		}
		r.workload("w", "v2", to("v2"))
		active("switched", "v2")
		r.want("both stay", "w@eu v2×2 v1×2")
		r.workload("w", "v2", to("v1"))
		active("back at once, whatever the cluster says", "v1")
		r.report("w", "eu", "")
		r.workload("w", "v2", to("v2"))
		active("forth", "v2")
		time.Sleep(time.Minute + time.Second)
		r.want("the old one went", "w@eu v2×2")
		active("alone", "v2")
	})
}

// What plan says is what then happens.
func TestPlanForetells(t *testing.T) {
	run(t, func(r *rig) {
		r.cluster("eu", "eu", 10)
		r.cluster("us", "us", 10)
		c := r.start("a", r.s)
		s := spec(4)
		s.Placement.Failover = &portolanv1.WorkloadSpec_Failover{After: durationpb.New(time.Second)}
		r.workload("w", "v1", s)
		r.want("placed", "w@eu v1×2, w@us v1×2")
		plan := func(what api.WhatIf) *portolanv1.PlanResponse {
			t.Helper()
			var out *portolanv1.PlanResponse
			if _, err := r.s.View(t.Context(), func(rd store.Reader) error {
				var err error
				out, err = c.Plan(rd, what)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return out
		}
		text := func(p *portolanv1.PlanResponse) string {
			var out []string
			for _, w := range p.GetWorkloads() {
				for _, x := range w.GetPlacements() {
					if x.GetReplicasAfter() > 0 {
						out = append(out, x.GetCluster())
					}
				}
			}
			return strings.Join(out, " ")
		}
		lostEU := plan(api.WhatIf{Cluster: &portolanv1.ClusterChange{Kind: portolanv1.ClusterChange_KIND_LOST, Cluster: &portolanv1.Cluster{Name: "clusters/eu"}}})
		if len(lostEU.GetWorkloads()) != 1 || lostEU.GetWorkloads()[0].GetPlacements()[1].GetReplicasAfter() != 4 {
			t.Errorf("losing eu: %v", lostEU)
		}
		drained := plan(api.WhatIf{Cluster: &portolanv1.ClusterChange{Kind: portolanv1.ClusterChange_KIND_DRAINED, Cluster: &portolanv1.Cluster{Name: "clusters/eu"}}})
		if text(drained) != "us" {
			t.Errorf("draining eu: %v", drained)
		}
		more := proto.CloneOf(s)
		more.Replicas = proto.Int32(40)
		grown := plan(api.WhatIf{Workload: &portolanv1.Workload{Name: api.WorkloadName("t", "w"), Spec: more, Status: &portolanv1.WorkloadStatus{CurrentRevision: "v1"}}})
		if w := grown.GetWorkloads()[0]; w.GetUnplacedReplicas() != 20 {
			t.Errorf("growing beyond the fleet: %v", w)
		}
		r.want("nothing was changed", "w@eu v1×2, w@us v1×2")
		r.state("eu", lost, 10)
		time.Sleep(2 * time.Second)
		r.want("as it was foretold", "w@eu v1×2, w@us v1×4 (2 standing in)")
		if _, err := r.s.View(t.Context(), func(rd store.Reader) error {
			_, err := c.Plan(rd, api.WhatIf{Deleted: api.WorkloadName("t", "w")})
			return err
		}); err != nil {
			t.Error(errors.Unwrap(err))
		}
	})
}

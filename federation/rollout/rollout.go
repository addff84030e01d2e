// Package rollout decides how the change to a workload's newest template goes
// over the fleet: which revisions run, which one serves, when the change is
// complete, and when it goes back. It owns the rules of halting, rollback and the
// blue-green switch; it never says how many replicas run where, and nothing of it
// happens inside one cluster: there cluster/reconcile exchanges replicas, halts
// its own part and reports.
//
// Missing news hold: a cluster that is lost or has not caught up neither completes
// a rollout nor halts it.
//
// Concurrency: pure functions; the input is only read.
package rollout

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
)

// Codes of reasons, stable.
const (
	Started      = "Started"      // a new template is brought out
	Updating     = "Updating"     // replicas are exchanged
	Complete     = "Complete"     // all clusters run it, available
	Halted       = "Halted"       // a cluster halted its part
	RolledBack   = "RolledBack"   // back to the last good revision
	NothingGood  = "NothingGood"  // halted, and no revision was ever good
	AwaitsSwitch = "AwaitsSwitch" // blue-green: whole, not serving
	Switched     = "Switched"     // blue-green: serving
	SwitchedBack = "SwitchedBack" // blue-green: the old one serves again
)

// defaultKeepOld is how long blue-green keeps the old revision after a switch.
const defaultKeepOld = 10 * time.Minute

// Cluster is what one cluster that has a placement of the workload reports.
type Cluster struct {
	ID string
	// Current says that the report speaks of the present placement, from a cluster
	// that is not lost. Otherwise the rest counts for nothing.
	Current bool
	// Want is how many replicas the placement asks for, by revision; one that it
	// names with none is there with 0.
	Want map[string]int
	// Available and Running replicas that it has, by revision.
	Available, Running map[string]int
	// Incomplete says that the cluster itself still sees replicas to bring out or to
	// take away, where Want cannot tell: how many daemons make one is known only there.
	Incomplete bool
	// Halted is the revision whose update it halted, and Why; empty when none.
	Halted, Why string
}

// Input is everything that a step follows from.
type Input struct {
	Now        time.Time
	UID        string
	Generation int64
	// Target is the revision that the spec stands for.
	Target string
	Update *portolanv1.WorkloadSpec_UpdateStrategy
	// Exists says which revisions there still are.
	Exists func(revision string) bool
	// Clusters in any order.
	Clusters []Cluster
}

// Decision is what follows for placement.
type Decision struct {
	// Revisions that run, the one to bring out first. Never empty.
	Revisions []string
	// Active is the one that serves; empty: all that run.
	Active string
	// Again is when time alone changes the answer; zero when it does not.
	Again time.Time
}

// Step takes the rollout one step on. prev is the stored record, nil when there is
// none; it is not changed. The result is prev itself when nothing changed.
func Step(prev *storev1.Rollout, in Input) (*storev1.Rollout, Decision) {
	s := stepper{in: in, r: begin(prev, in)}
	if in.Update.GetType() == portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN {
		s.blueGreen()
	} else {
		s.rolling()
	}
	if prev != nil && same(prev, s.r) {
		s.r = prev
	}
	return s.r, s.d
}

// same compares but for who wrote.
func same(a, b *storev1.Rollout) bool {
	x := proto.CloneOf(b)
	x.WriterEpoch = a.GetWriterEpoch()
	return proto.Equal(a, x)
}

// begin gives the record to work on: a copy of the stored one, a new one when the
// workload is another or its template changed.
func begin(prev *storev1.Rollout, in Input) *storev1.Rollout {
	if prev == nil || prev.GetUid() != in.UID {
		r := &storev1.Rollout{Uid: in.UID, Generation: in.Generation, Status: &portolanv1.RolloutStatus{Target: in.Target}}
		enter(r, in.Now, portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Started, fmt.Sprintf("revision %s is brought out", in.Target))
		return r
	}
	r := proto.CloneOf(prev)
	if r.GetStatus().GetTarget() == in.Target {
		return r
	}
	r.Generation = in.Generation
	r.Status.Target = in.Target
	// What an earlier switch kept is no longer a way back to anything.
	r.Keep, r.KeepUntil = "", nil
	enter(r, in.Now, portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Started, fmt.Sprintf("revision %s is brought out", in.Target))
	return r
}

// enter notes a state; the time stays while state and reason do.
func enter(r *storev1.Rollout, now time.Time, state portolanv1.RolloutState, code, message string) {
	st := r.GetStatus()
	if st.GetState() == state && st.GetReason().GetCode() == code {
		st.Reason.Message = message
		return
	}
	st.State, st.Reason, st.StateTime = state, &portolanv1.Reason{Code: code, Message: message}, timestamppb.New(now)
}

type stepper struct {
	in Input
	r  *storev1.Rollout
	d  Decision
}

func (s *stepper) state() portolanv1.RolloutState { return s.r.GetStatus().GetState() }

func (s *stepper) enter(state portolanv1.RolloutState, code, format string, args ...any) {
	enter(s.r, s.in.Now, state, code, fmt.Sprintf(format, args...))
}

// wakeAt notes when time alone changes the answer.
func (s *stepper) wakeAt(t time.Time) {
	if t.After(s.in.Now) && (s.d.Again.IsZero() || t.Before(s.d.Again)) {
		s.d.Again = t
	}
}

// good is the last revision that was complete, if it is another one than the
// target and still there.
func (s *stepper) good() string {
	stable := s.r.GetStatus().GetStable()
	if stable == "" || stable == s.in.Target || !s.in.Exists(stable) {
		return ""
	}
	return stable
}

// halted gives the first cluster that halted the target.
func (s *stepper) halted() (Cluster, bool) {
	var out Cluster
	for _, c := range s.in.Clusters {
		if c.Current && c.Halted == s.in.Target && (out.ID == "" || c.ID < out.ID) {
			out = c
		}
	}
	return out, out.ID != ""
}

// whole says whether every cluster has all replicas of the target available. How many
// there are is in the placements' status, not here: as part of the record each
// replica would make a revision.
func (s *stepper) whole() bool {
	for _, c := range s.in.Clusters {
		// A placement that does not name it yet asks for none of it.
		want, told := c.Want[s.in.Target]
		if !c.Current || c.Incomplete || !told || c.Available[s.in.Target] < want {
			return false
		}
	}
	return len(s.in.Clusters) > 0
}

// alone says whether no cluster runs another revision than those given.
func (s *stepper) alone(revisions ...string) bool {
	for _, c := range s.in.Clusters {
		if !c.Current {
			return false
		}
		for rev, n := range c.Running {
			if n > 0 && !slices.Contains(revisions, rev) {
				return false
			}
		}
	}
	return true
}

// rolling brings the target out in place of what runs.
func (s *stepper) rolling() {
	st := s.r.GetStatus()
	st.Active = ""
	s.r.Keep, s.r.KeepUntil = "", nil
	switch s.state() {
	case portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK:
		if s.good() != "" {
			s.d.Revisions = []string{s.good()}
			return
		}
		// What was gone back to is no more: the target is all there is.
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Started, "revision %s is brought out again: there is no other", s.in.Target)
	case portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE:
		s.d.Revisions = []string{s.in.Target}
		return
	default:
	}
	if c, yes := s.halted(); yes {
		s.halt(c)
		return
	}
	s.d.Revisions = []string{s.in.Target}
	if s.whole() && s.alone(append(s.named(), s.in.Target)...) {
		st.Stable = s.in.Target
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE, Complete, "every replica is of revision %s and available", s.in.Target)
		return
	}
	s.enter(portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Updating, "replicas are exchanged for those of revision %s", s.in.Target)
}

// named are revisions that placements ask for beside the target: routes hold them.
func (s *stepper) named() []string {
	var out []string
	for _, c := range s.in.Clusters {
		for rev, n := range c.Want {
			if n > 0 && !slices.Contains(out, rev) {
				out = append(out, rev)
			}
		}
	}
	slices.Sort(out)
	return out
}

// halt goes back, or stays where it is.
func (s *stepper) halt(c Cluster) {
	auto := s.in.Update.AutoRollback == nil || s.in.Update.GetAutoRollback()
	good := s.good()
	switch {
	case auto && good != "":
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK, RolledBack, "back to revision %s: %s halted revision %s: %s", good, c.ID, s.in.Target, c.Why)
		s.d.Revisions = []string{good}
		return
	case auto:
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_HALTED, NothingGood, "%s halted revision %s, and there is none to go back to: %s", c.ID, s.in.Target, c.Why)
	default:
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_HALTED, Halted, "%s halted revision %s: %s", c.ID, s.in.Target, c.Why)
	}
	s.d.Revisions = []string{s.in.Target}
}

// blueGreen brings the target up beside the old revision, which serves until the
// switch.
func (s *stepper) blueGreen() {
	st := s.r.GetStatus()
	old := s.old()
	if old == "" {
		// Nothing serves yet: there is nothing to keep apart.
		s.rolling()
		st.Active = s.in.Target
		s.d.Active = s.in.Target
		return
	}
	if !slices.Contains([]string{old, s.in.Target}, st.GetActive()) {
		st.Active = old
	}
	if s.settled(old) {
		return
	}
	if c, yes := s.halted(); yes && st.GetActive() == old {
		s.haltBlueGreen(c, old)
		return
	}
	s.switchOver(old)
	if k := s.r.GetKeepUntil(); k != nil {
		s.wakeAt(k.AsTime())
	}
	s.d.Active = st.GetActive()
	s.d.Revisions = []string{s.in.Target, old}
}

// old is the revision beside the target: the one kept after a switch, else the
// last good one.
func (s *stepper) old() string {
	if k := s.r.GetKeep(); k != "" && s.in.Exists(k) && k != s.in.Target {
		return k
	}
	if s.state() == portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE {
		return ""
	}
	return s.good()
}

// settled says that only one of the two runs: the target was given up, or the time
// after a switch is over. A target that was given up because a cluster halted it
// never comes back by itself; one that was switched away from does when it is
// asked for.
func (s *stepper) settled(old string) bool {
	st := s.r.GetStatus()
	if s.state() == portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK && st.GetReason().GetCode() == RolledBack {
		s.only(old)
		return true
	}
	if s.r.GetKeepUntil() == nil {
		return false
	}
	if s.in.Now.Before(s.r.GetKeepUntil().AsTime()) {
		return false
	}
	if st.GetActive() == s.in.Target {
		s.r.Keep, s.r.KeepUntil = "", nil
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE, Complete, "revision %s serves alone", s.in.Target)
		s.only(s.in.Target)
		return true
	}
	if s.in.Update.GetBlueGreen().GetActive() == s.in.Target {
		s.r.KeepUntil = nil
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Started, "revision %s is brought out again", s.in.Target)
		return false
	}
	s.only(old)
	return true
}

func (s *stepper) only(revision string) {
	s.r.Status.Active = revision
	s.d.Revisions, s.d.Active = []string{revision}, revision
}

func (s *stepper) haltBlueGreen(c Cluster, old string) {
	s.halt(c)
	s.d.Active = old
	if s.state() == portolanv1.RolloutState_ROLLOUT_STATE_HALTED {
		s.d.Revisions = []string{s.in.Target, old}
	}
}

// switchOver decides which of the two serves.
func (s *stepper) switchOver(old string) {
	st, bg := s.r.GetStatus(), s.in.Update.GetBlueGreen()
	if st.GetActive() == s.in.Target {
		if bg.GetActive() == old {
			s.back(old)
		}
		return
	}
	if s.state() == portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK && bg.GetActive() != s.in.Target {
		return
	}
	if !s.whole() {
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_PROGRESSING, Updating, "revision %s comes up beside %s", s.in.Target, old)
		return
	}
	now := bg.GetActive() == s.in.Target
	if s.state() != portolanv1.RolloutState_ROLLOUT_STATE_WAITING {
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_WAITING, AwaitsSwitch, "revision %s is whole; %s serves", s.in.Target, old)
	}
	if bg.GetActive() == "" && bg.GetSwitchAfter() != nil {
		due := st.GetStateTime().AsTime().Add(bg.GetSwitchAfter().AsDuration())
		now = !s.in.Now.Before(due)
		s.wakeAt(due)
	}
	if now {
		st.Active, st.Stable = s.in.Target, s.in.Target
		s.keep(old)
		s.enter(portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE, Switched, "revision %s serves; %s is kept until %s", s.in.Target, old, until(s.r))
	}
}

// back has the old revision serve again.
func (s *stepper) back(old string) {
	st := s.r.GetStatus()
	st.Active, st.Stable = old, old
	s.keep(old)
	s.enter(portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK, SwitchedBack, "revision %s serves again; %s is kept until %s", old, s.in.Target, until(s.r))
}

// keep has both revisions stay for the time that the spec gives.
func (s *stepper) keep(old string) {
	d := defaultKeepOld
	if k := s.in.Update.GetBlueGreen().GetKeepOld(); k != nil {
		d = k.AsDuration()
	}
	s.r.Keep, s.r.KeepUntil = old, timestamppb.New(s.in.Now.Add(d))
}

func until(r *storev1.Rollout) string { return r.GetKeepUntil().AsTime().UTC().Format(time.RFC3339) }

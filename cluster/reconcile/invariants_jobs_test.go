package reconcile

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// jobTally is how far one job is, with what a plan finishes.
type jobTally struct{ live, failed, succeeded int }

func (m *model) jobTally(k Key, run int64, p Plan) jobTally {
	final := map[string]portolanv1.ReplicaState{}
	removed := map[string]bool{}
	for _, s := range p.Steps {
		if s.Kind == Finish {
			final[s.Allocation] = s.Final.GetState()
		}
		removed[s.Allocation] = removed[s.Allocation] || s.Kind == Remove
	}
	var t jobTally
	done := map[int32]bool{}
	w := m.workloads[k]
	for id, a := range m.allocs {
		if a.GetWorkload() != k.Workload || a.GetRun() != run {
			continue
		}
		counts := a.GetUid() == w.Intent.GetUid() && (run != 0 || a.GetRevision() == w.Intent.GetCurrentRevision())
		st := a.GetFinal().GetState()
		if f, ok := final[id]; ok {
			st = f
		}
		switch {
		case st == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED:
			done[a.GetIndex()] = done[a.GetIndex()] || counts
		case st == portolanv1.ReplicaState_REPLICA_STATE_FAILED:
			if counts {
				t.failed++
			}
		case !m.nodes[a.GetNode()].lost() && !removed[id] && !m.goneNow(a):
			t.live++
		}
	}
	for _, d := range done {
		if d {
			t.succeeded++
		}
	}
	return t
}

// goneNow says that a stopped replica is known to be gone, its record apart.
func (m *model) goneNow(a *clusterv1.Allocation) bool {
	in := m.input()
	n := in.Nodes[a.GetNode()]
	return in.isGone(n, &replica{Allocation: a, status: n.Allocations[a.GetAllocation()]})
}

func (m *model) checkJob(p Plan) error {
	t := m.tally(sumKey, p)
	if t.intent == nil || len(t.creates) == 0 {
		return nil
	}
	return checkJobCreates("sum", m.jobTally(sumKey, 0, p), t, len(t.creates))
}

func checkJobCreates(name string, j jobTally, t *tally, creates int) error {
	spec := t.spec.GetJob()
	switch {
	case j.live+creates > int(spec.GetParallelism()):
		return fmt.Errorf("%s: %d may run and %d are to begin: more than %d", name, j.live, creates, spec.GetParallelism())
	case j.failed > int(spec.GetMaxRetries()):
		return fmt.Errorf("%s: a replica begins after %d failures, %d retries are allowed", name, j.failed, spec.GetMaxRetries())
	case j.succeeded+creates > t.total:
		return fmt.Errorf("%s: %d begin after %d of %d succeeded", name, creates, j.succeeded, t.total)
	}
	return nil
}

// asBegun is the tally of a cron workload as one of its runs sees it: a run goes on
// by the template that its first replica was made from.
func (m *model) asBegun(t *tally, run int64) *tally {
	var first *clusterv1.Allocation
	for _, id := range slices.Sorted(maps.Keys(m.allocs)) {
		a := m.allocs[id]
		if a.GetWorkload() == tickKey.Workload && a.GetUid() == t.intent.GetUid() && a.GetRun() == run && (first == nil || a.GetBound().AsTime().Before(first.GetBound().AsTime())) {
			first = a
		}
	}
	out := *t
	if first != nil {
		out.spec, out.total = first.GetSpec(), int(first.GetSpec().GetJob().GetCompletions())
	}
	return &out
}

func (m *model) checkCron(p Plan) error {
	t := m.tally(tickKey, p)
	if t.intent == nil {
		return nil
	}
	spec := t.spec.GetCron()
	byRun := map[int64]int{}
	for _, s := range t.creates {
		byRun[s.Run]++
	}
	for run, n := range byRun {
		at := m.asBegun(t, run)
		began, otherLive, otherOpen := false, false, false
		for _, a := range m.allocs {
			if a.GetWorkload() != tickKey.Workload || a.GetUid() != t.intent.GetUid() {
				continue
			}
			if a.GetRun() == run {
				began = true
				continue
			}
			j, other := m.jobTally(tickKey, a.GetRun(), p), m.asBegun(t, a.GetRun())
			otherLive = otherLive || j.live > 0
			// One that is being forgotten is over.
			otherOpen = otherOpen || (!a.GetStop() && j.succeeded < other.total && j.failed <= int(other.spec.GetJob().GetMaxRetries()))
		}
		if err := checkJobCreates(fmt.Sprintf("tick %d", run), m.jobTally(tickKey, run, p), at, n); err != nil {
			return err
		}
		if began {
			continue
		}
		m.reach["run"]++
		switch late := m.now.Sub(time.Unix(run, 0)); {
		case spec.GetSuspended():
			return fmt.Errorf("tick: run %d begins while suspended", run)
		case run <= m.states[tickKey].GetLastRun() && m.states[tickKey].GetUid() == t.intent.GetUid():
			return fmt.Errorf("tick: run %d begins although %d was dealt with", run, m.states[tickKey].GetLastRun())
		case late > spec.GetStartingDeadline().AsDuration() || late < 0:
			return fmt.Errorf("tick: run %d begins %v late", run, late)
		case spec.GetConcurrency() == portolanv1.CronConcurrency_CRON_CONCURRENCY_FORBID && (otherLive || otherOpen):
			return fmt.Errorf("tick: run %d begins beside another one", run)
		case spec.GetConcurrency() == portolanv1.CronConcurrency_CRON_CONCURRENCY_REPLACE && otherLive:
			return fmt.Errorf("tick: run %d begins before the one that it replaces is gone", run)
		}
	}
	return nil
}

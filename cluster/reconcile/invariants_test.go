package reconcile

import (
	"fmt"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

// tally is what a plan does to one workload, told without the planner's words.
type tally struct {
	records, live, ready        int // before, the removed ones left out
	creates                     []Step
	stopped, disrupted, mustGo  int // ready ones: by an update, by a disruption, at the end of a drain
	perHour                     int
	intent                      *linkv1.WorkloadIntent
	spec                        *portolanv1.WorkloadSpec
	total, surge, down, crashes int
	others                      bool
	current                     int // ready ones of the current revision
}

func (m *model) isReady(a *clusterv1.Allocation) bool {
	n := m.nodes[a.GetNode()]
	return !n.lost() && n.Observed && !a.GetStop() && a.GetFinal() == nil && n.Allocations[a.GetAllocation()].GetReady()
}

func (m *model) tally(k Key, p Plan) *tally {
	t := &tally{intent: m.workloads[k].Intent}
	going := map[string]bool{}
	for _, s := range p.Steps {
		if s.Kind == Remove || s.Kind == Finish {
			going[s.Allocation] = true
		}
	}
	for _, r := range t.intent.GetRevisions() {
		n := int(r.GetReplicas())
		if scale := m.states[k].GetScale(); r.GetMaxReplicas() > 0 && scale != nil && m.states[k].GetUid() == t.intent.GetUid() {
			n = min(max(int(scale.GetReplicas()), int(r.GetMinReplicas())), int(r.GetMaxReplicas()))
		}
		t.total += n
		if r.GetRevision() == t.intent.GetCurrentRevision() {
			t.spec = r.GetSpec()
		} else if n > 0 {
			t.others = true
		}
	}
	t.surge, t.down = int(t.spec.GetUpdate().GetMaxSurge()), int(t.spec.GetUpdate().GetMaxUnavailable())
	if t.surge == 0 && t.down == 0 {
		t.surge = 1
	}
	if k == lockKey || k == dbKey {
		t.surge, t.down = 0, max(1, t.down)
	}
	for id, a := range m.allocs {
		if a.GetTenant() != k.Tenant || a.GetWorkload() != k.Workload || a.GetFinal() != nil || going[id] {
			continue
		}
		t.records++
		n := m.nodes[a.GetNode()]
		if !n.lost() {
			t.live++
		}
		if m.isReady(a) {
			t.ready++
		}
		if n.lost() || a.GetStop() || a.GetUid() != t.intent.GetUid() {
			continue
		}
		if a.GetRevision() != t.intent.GetCurrentRevision() {
			t.others = true
			continue
		}
		t.current += off(m.isReady(a))
		st := n.Allocations[id]
		for _, c := range st.GetContainers() {
			if at := st.GetTimeline().GetReady(); n.Observed && (at == nil || c.GetLastExitTime().AsTime().Before(at.AsTime())) {
				t.crashes += int(c.GetRestarts())
			}
		}
	}
	for _, s := range p.Steps {
		if s.Key != k {
			continue
		}
		switch {
		case s.Kind == Create:
			t.creates = append(t.creates, s)
		case s.Kind == Stop && s.Disrupt:
			ready := m.isReady(m.allocs[s.Allocation])
			t.perHour += off(ready || !m.nodes[m.allocs[s.Allocation].GetNode()].Observed)
			switch {
			case s.Code == DrainDeadline:
				t.mustGo++
			case ready:
				t.disrupted++
			}
		case s.Kind == Stop && m.isReady(m.allocs[s.Allocation]):
			t.stopped++
		}
	}
	return t
}

// check holds a plan against the invariants.
func (m *model) check(p Plan) error {
	if err := m.checkSteps(p); err != nil {
		return err
	}
	for _, c := range []func(Plan) error{m.checkService, m.checkBudgets, m.checkStateful, m.checkJob, m.checkCron, m.checkDaemon, m.checkEvictions, m.checkMoves, m.checkVolumes} {
		if err := c(p); err != nil {
			return err
		}
	}
	return nil
}

func (m *model) checkSteps(p Plan) error {
	stops, names := map[string]bool{}, map[string]bool{}
	for _, s := range p.Steps {
		switch s.Kind {
		case Stop, Remove, Finish, Renew, Update:
			if m.allocs[s.Allocation] == nil {
				return fmt.Errorf("%s of %s, which there is not", s.Kind, s.Allocation)
			}
		case Create:
			if names[s.Name] && s.Name != "" {
				return fmt.Errorf("two replicas of the name %s", s.Name)
			}
			names[s.Name] = true
		default:
		}
		if s.Kind == Stop {
			if stops[s.Allocation] || m.allocs[s.Allocation].GetStop() {
				return fmt.Errorf("%s is stopped twice", s.Allocation)
			}
			stops[s.Allocation] = true
		}
		if n := m.nodes[m.allocs[s.Allocation].GetNode()]; s.Kind == Remove && !n.lost() && n.Allocations[s.Allocation] != nil {
			return fmt.Errorf("the record of %s goes while its node knows it", s.Allocation)
		}
	}
	return nil
}

// Invariants 1 and 2.
func (m *model) checkService(p Plan) error {
	for _, k := range []Key{web, lockKey} {
		t := m.tally(k, p)
		if t.intent == nil {
			continue
		}
		if n := len(t.creates); n > 0 && t.live+n > t.total+t.surge {
			return fmt.Errorf("%s: %d live and %d to create are more than %d + %d", k, t.live, n, t.total, t.surge)
		}
		if n := len(t.creates); k == lockKey && n > 0 && t.records+n > 1 {
			return fmt.Errorf("%s: %d may live in the world, and %d are to begin", k, t.records, n)
		}
		if t.stopped > 0 && t.ready-t.stopped < t.total-t.down {
			return fmt.Errorf("%s: %d of %d ready ones are stopped: fewer than %d - %d stay", k, t.stopped, t.ready, t.total, t.down)
		}
		if t.others && t.current < m.wantedOfCurrent(k) && t.crashes > int(t.spec.GetUpdate().GetMaxFailures()) {
			m.reach["halted"]++
			for _, s := range p.Steps {
				if s.Key == k && (s.Code == NewRevision || (s.Code == RevisionReplaced && m.isReady(m.allocs[s.Allocation]) && m.allocs[s.Allocation].GetUid() == t.intent.GetUid() && !m.otherTemplate(k, s.Allocation))) {
					return fmt.Errorf("%s: %s of %s (%s) although the new revision crashed %d times", k, s.Kind, s.Allocation, s.Code, t.crashes)
				}
			}
		}
	}
	return nil
}

func (m *model) wantedOfCurrent(k Key) int {
	in := m.input()
	return int(in.desiredOf(k, m.workloads[k]).current.GetReplicas())
}

// otherTemplate says that a replica's revision is listed with another template.
func (m *model) otherTemplate(k Key, id string) bool {
	for _, r := range m.workloads[k].Intent.GetRevisions() {
		if r.GetRevision() == m.allocs[id].GetRevision() && needsRestart(m.allocs[id].GetSpec(), r.GetSpec()) {
			return true
		}
	}
	return false
}

// Disruption budgets, told by the letter of their proto.
func (m *model) checkBudgets(p Plan) error {
	for _, k := range []Key{web, lockKey, dbKey, gwKey} {
		t := m.tally(k, p)
		if t.intent == nil || t.perHour == 0 {
			continue
		}
		b, after := t.spec.GetDisruption(), t.ready-t.disrupted
		if k == gwKey {
			continue // its total is the number of nodes
		}
		bad := func(what string) error {
			return fmt.Errorf("%s: %d of %d ready ones are disrupted, %d are wanted: %s", k, t.disrupted, t.ready, t.total, what)
		}
		if t.disrupted > 0 && t.mustGo == 0 {
			m.reach["disrupted"]++
			switch {
			case b.GetMaxUnavailable() == 0 && b.GetMinAvailable() == 0 && b.GetMaxUnavailablePercent() == 0 && b.GetMaxPerHour() == 0 &&
				(b == nil || (b.MaxUnavailable == nil && b.MinAvailable == nil && b.MaxUnavailablePercent == nil)):
				if t.total-after > 1 || 2*after < t.total {
					return bad("without a budget one may be, and half must stay")
				}
			case b.MaxUnavailable != nil && t.total-after > int(b.GetMaxUnavailable()):
				return bad(fmt.Sprintf("max_unavailable is %d", b.GetMaxUnavailable()))
			case b.MinAvailable != nil && after < int(b.GetMinAvailable()):
				return bad(fmt.Sprintf("min_available is %d", b.GetMinAvailable()))
			case b.MaxUnavailablePercent != nil && (t.total-after-1)*100 >= t.total*int(b.GetMaxUnavailablePercent()) && t.total-after > 0:
				return bad(fmt.Sprintf("max_unavailable_percent is %d", b.GetMaxUnavailablePercent()))
			}
			if ws, err := timetable.WindowsOf(b.GetWindows()); err != nil || len(ws) > 0 && !slices.ContainsFunc(ws, func(w timetable.Window) bool { return w.Contains(m.now) }) {
				return bad("no window is open")
			}
			if err := m.checkReplacementFirst(k, t, p); err != nil {
				return err
			}
		}
		if b != nil && b.MaxPerHour != nil && t.mustGo == 0 {
			recent := 0
			for _, at := range m.states[k].GetDisruptions() {
				if m.states[k].GetUid() == t.intent.GetUid() && at.AsTime().Add(time.Hour).After(m.now) {
					recent++
				}
			}
			if recent+t.perHour > int(b.GetMaxPerHour()) {
				return fmt.Errorf("%s: %d disruptions after %d within the hour, max_per_hour is %d", k, t.perHour, recent, b.GetMaxPerHour())
			}
		}
	}
	return nil
}

// Where a replacement can be had it is available before its replica goes.
func (m *model) checkReplacementFirst(k Key, t *tally, p Plan) error {
	if k != web || t.surge == 0 || len(m.pending[k]) > 0 {
		return nil
	}
	for _, s := range p.Steps {
		if s.Key != k || s.Kind != Stop || !s.Disrupt || s.Code == Displaced || !m.isReady(m.allocs[s.Allocation]) {
			continue
		}
		if by := m.allocs[m.allocs[s.Allocation].GetReplacedBy()]; (by == nil || !m.isReady(by)) && t.ready-t.disrupted < t.total {
			return fmt.Errorf("%s: %s goes (%s) before its replacement is there", k, s.Allocation, s.Code)
		}
	}
	return nil
}

// Stateful replicas: one record per index, in order, at their volumes.
func (m *model) checkStateful(p Plan) error {
	t := m.tally(dbKey, p)
	if t.intent == nil {
		return nil
	}
	at := map[int32]*clusterv1.Allocation{}
	for _, a := range m.allocs {
		if a.GetWorkload() == dbKey.Workload {
			at[a.GetIndex()] = a
		}
	}
	if len(t.creates) > 1 {
		return fmt.Errorf("db: %d begin at once", len(t.creates))
	}
	for _, s := range t.creates {
		if at[s.Index] != nil {
			return fmt.Errorf("db: a second replica of index %d", s.Index)
		}
		for i := range s.Index {
			if at[i] == nil || !m.isReady(at[i]) {
				return fmt.Errorf("db: index %d begins before index %d is ready", s.Index, i)
			}
		}
		if v := m.volumes[VolumeID(dbKey, s.Index, "data")]; v != nil && (v.GetUid() != t.intent.GetUid() || s.Node != v.GetNode() || m.nodes[v.GetNode()].lost()) {
			return fmt.Errorf("db: index %d begins without its volume", s.Index)
		}
	}
	for _, s := range p.Steps {
		a := m.allocs[s.Allocation]
		if s.Key != dbKey || s.Kind != Stop || s.Code != ScaleDown {
			continue
		}
		for i, higher := range at {
			if i > a.GetIndex() && higher.GetUid() == a.GetUid() && !m.nodes[higher.GetNode()].lost() && !m.confirmed(p, higher) {
				return fmt.Errorf("db: index %d is stopped while index %d is there", a.GetIndex(), i)
			}
		}
	}
	if t.stopped > 0 && t.ready-t.stopped < t.total-t.down && !m.shrinks(p, at, t) {
		return fmt.Errorf("db: %d of %d ready ones are stopped by an update, %d are wanted", t.stopped, t.ready, t.total)
	}
	return nil
}

// confirmed says that a plan removes the record of an allocation.
func (m *model) confirmed(p Plan, a *clusterv1.Allocation) bool {
	return slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Kind == Remove && s.Allocation == a.GetAllocation() })
}

// shrinks says that what is stopped has no place, or belongs to an earlier one.
func (m *model) shrinks(p Plan, at map[int32]*clusterv1.Allocation, t *tally) bool {
	return slices.ContainsFunc(p.Steps, func(s Step) bool {
		a := m.allocs[s.Allocation]
		return s.Kind == Stop && s.Key == dbKey && (int(a.GetIndex()) >= t.total || a.GetUid() != t.intent.GetUid())
	})
}

// Volumes go only with their workload.
func (m *model) checkVolumes(p Plan) error {
	for _, s := range p.Steps {
		if s.Kind != PutVolume && s.Kind != DeleteVolume {
			continue
		}
		if w, ok := m.workloads[s.Key]; ok && w.Intent.GetUid() == s.Volume.GetUid() {
			return fmt.Errorf("volume %s goes while its workload is wanted", s.Volume.GetVolume())
		}
		for _, a := range m.allocs {
			if slices.Contains(a.GetVolumes(), s.Volume.GetVolume()) && a.GetUid() == s.Volume.GetUid() {
				return fmt.Errorf("volume %s goes before %s", s.Volume.GetVolume(), a.GetAllocation())
			}
		}
		m.reach["volume gone"]++
	}
	return nil
}

// Invariant 3, as far as it is decided here.
func (m *model) checkDaemon(p Plan) error {
	t := m.tally(gwKey, p)
	for _, s := range t.creates {
		n := m.nodes[s.Node]
		if n == nil || n.lost() || n.Record.GetMode() != 0 || m.admit(n.Record, s.Revision.GetSpec()) != Admitted {
			return fmt.Errorf("gw: begins on %q, which does not admit it", s.Node)
		}
		for _, a := range m.allocs {
			if a.GetWorkload() == gwKey.Workload && a.GetNode() == s.Node && !m.confirmed(p, a) {
				return fmt.Errorf("gw: a second one on %s", s.Node)
			}
		}
	}
	return nil
}

// Invariant 6.
func (m *model) checkEvictions(p Plan) error {
	lost, live := 0, 0
	zone, zoneLost := map[string]int{}, map[string]int{}
	for _, n := range m.nodes {
		z := n.Record.GetFacts().GetLabels()["zone"]
		zone[z]++
		if n.lost() {
			lost++
			zoneLost[z]++
		}
	}
	for _, a := range m.allocs {
		if a.GetReplacedBy() == "" {
			live++
		}
	}
	if lost == len(m.nodes) {
		m.reach["all dark"]++
		if len(p.Steps) > 0 {
			return fmt.Errorf("%d steps while everything is dark", len(p.Steps))
		}
	}
	// One that is gone again is not remembered by anyone.
	evicted, more := 0, 0
	for _, a := range m.allocs {
		by := m.allocs[a.GetReplacedBy()]
		evicted += off(by != nil && !a.GetDisrupted() && by.GetBound().AsTime().Add(evictWindow).After(m.now))
	}
	for _, s := range p.Steps {
		if s.Kind != Create || s.Code != NodeLost {
			continue
		}
		m.reach["evicted"]++
		z := m.nodes[m.allocs[s.Allocation].GetNode()].Record.GetFacts().GetLabels()["zone"]
		if zone[z] >= 3 && zoneLost[z] == zone[z] {
			return fmt.Errorf("%s is replaced while all of its zone is dark", s.Allocation)
		}
		// What finds no node is tried again, and counts only when it is there.
		more += off(m.node(s) != "")
	}
	// Those that were replaced within the window counted when they were.
	if limit := max(evictMin, (live+evicted)/evictShare); more > 0 && evicted+more > limit {
		return fmt.Errorf("%d replicas of lost nodes are replaced within %v, %d are allowed", evicted+more, evictWindow, limit)
	}
	return nil
}

// Moves for a gain in any hour.
func (m *model) checkMoves(p Plan) error {
	m.moved = slices.DeleteFunc(m.moved, func(at time.Time) bool { return !at.Add(time.Hour).After(m.now) })
	for _, s := range p.Steps {
		if s.Code == Rebalance && (s.Kind == Stop || (s.Kind == Create && m.node(s) != "")) {
			m.moved = append(m.moved, m.now)
			m.reach["moved"]++
		}
	}
	if n := int(m.rebalance.GetMaxMovesPerHour()); len(m.moved) > max(n, 0) && slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Code == Rebalance }) {
		return fmt.Errorf("%d moves within the hour, %d are allowed", len(m.moved), n)
	}
	return nil
}

// checkSettled holds that a world without faults is as it is wanted.
func (m *model) checkSettled() error {
	p := Reconcile(m.input())
	for k, n := range p.Halted {
		if k != sumKey && k != tickKey {
			return fmt.Errorf("%s is halted: %s", k, n.Message)
		}
	}
	for _, k := range []Key{web, lockKey, dbKey} {
		t := m.tally(k, p)
		if t.intent == nil {
			continue
		}
		if t.ready != t.total || t.live != t.total || len(t.creates)+t.stopped+t.disrupted > 0 {
			return fmt.Errorf("%s: %d ready and %d live of %d, %d to create, %d to stop", k, t.ready, t.live, t.total, len(t.creates), t.stopped+t.disrupted)
		}
	}
	if t := m.tally(gwKey, p); t.ready != len(m.nodes) {
		return fmt.Errorf("gw: %d ready on %d nodes", t.ready, len(m.nodes))
	}
	return nil
}

package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/timetable"
)

const (
	disruptionSpan = time.Hour
	// maxDisruptions is what a state remembers, and so the highest rate.
	maxDisruptions = 1000
)

// budget is how many more available replicas of a workload may be disrupted.
type budget struct {
	left int
	// barred: nothing may be disrupted now, whatever is available.
	barred bool
	// note says what binds it.
	note Note
	// change is when time alone may give more; zero when it does not.
	change time.Time
}

// bound lowers the budget to n.
func (b *budget) bound(n int, code, format string, args ...any) {
	if n < b.left {
		b.left, b.note = n, Note{code, fmt.Sprintf(format, args...)}
	}
}

// budgetOf applies a workload's budget to how many replicas it should have and
// how many are available.
func (in Input) budgetOf(k Key, uid string, spec *portolanv1.DisruptionBudget, total, available int) *budget {
	b := &budget{left: max(0, available)}
	b.note = Note{BudgetExhausted, "no replica is available"}
	down := total - available
	if spec == nil || (spec.MaxUnavailable == nil && spec.MaxUnavailablePercent == nil && spec.MinAvailable == nil && spec.MaxPerHour == nil) {
		b.bound(1-down, BudgetExhausted, "%d of %d replicas are not available, and without a budget one may be", max(0, down), total)
		b.bound(available-(total+1)/2, BudgetExhausted, "%d of %d replicas are available, and without a budget half must stay so", available, total)
	}
	if spec != nil && spec.MaxUnavailable != nil {
		b.bound(int(spec.GetMaxUnavailable())-down, BudgetExhausted, "%d of %d replicas are not available, max_unavailable is %d", max(0, down), total, spec.GetMaxUnavailable())
	}
	if spec != nil && spec.MaxUnavailablePercent != nil {
		// Rounded up, as the field does: a budget that is more than nothing lets one go.
		limit := (total*int(spec.GetMaxUnavailablePercent()) + 99) / 100
		b.bound(limit-down, BudgetExhausted, "%d of %d replicas are not available, max_unavailable_percent allows %d", max(0, down), total, limit)
	}
	if spec != nil && spec.MinAvailable != nil {
		b.bound(available-int(spec.GetMinAvailable()), BudgetExhausted, "%d replicas are available, min_available is %d", available, spec.GetMinAvailable())
	}
	in.boundRate(b, k, uid, spec)
	in.boundWindows(b, spec)
	if in.faults.budgetIgnored {
		b.left, b.barred = available, false
	}
	return b
}

func (in Input) boundRate(b *budget, k Key, uid string, spec *portolanv1.DisruptionBudget) {
	if spec == nil || spec.MaxPerHour == nil || in.faults.rateIgnored {
		return
	}
	recent := recentDisruptions(in.stateOf(k, uid), in.Now)
	limit := min(int(spec.GetMaxPerHour()), maxDisruptions)
	b.bound(limit-len(recent), BudgetPerHour, "%d replicas were disrupted within the hour, max_per_hour is %d", len(recent), limit)
	if limit <= len(recent) {
		b.barred = true
		if len(recent) > 0 {
			b.change = recent[0].AsTime().Add(disruptionSpan)
		}
	}
}

func (in Input) boundWindows(b *budget, spec *portolanv1.DisruptionBudget) {
	if len(spec.GetWindows()) == 0 || in.faults.windowIgnored {
		return
	}
	ws, err := timetable.WindowsOf(spec.GetWindows())
	if err != nil {
		b.barred = true
		b.bound(0, BudgetInvalid, "its budget's windows are not understood: %v", err)
		return
	}
	open, change := timetable.Open(ws, in.Now)
	if !open {
		b.barred = true
		b.bound(0, BudgetWindow, "none of its budget's windows is open before %s", change.UTC().Format(time.RFC3339))
		b.change = later(b.change, change)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// recentDisruptions are those of the last hour, oldest first.
func recentDisruptions(st *clusterv1.WorkloadState, now time.Time) []*timestamppb.Timestamp {
	all := st.GetDisruptions()
	i := slices.IndexFunc(all, func(t *timestamppb.Timestamp) bool { return t.AsTime().Add(disruptionSpan).After(now) })
	if i < 0 {
		return nil
	}
	return all[i:]
}

// stateOf is the state of a workload, nil when it is an earlier one's.
func (in Input) stateOf(k Key, uid string) *clusterv1.WorkloadState {
	if st := in.States[k]; st.GetUid() == uid {
		return st
	}
	return nil
}

// newState is a copy of a workload's state for changing, with what is too old
// left out.
func (in Input) newState(k Key, uid string) *clusterv1.WorkloadState {
	st := &clusterv1.WorkloadState{Tenant: k.Tenant, Workload: k.Workload, Uid: uid}
	if old := in.stateOf(k, uid); old != nil {
		st.Scale, st.LastRun, st.Profile = old.GetScale(), old.GetLastRun(), old.GetProfile()
		st.Disruptions = slices.Clone(recentDisruptions(old, in.Now))
	}
	return st
}

// addDisruptions notes n of them at a time.
func addDisruptions(st *clusterv1.WorkloadState, n int, now time.Time) {
	for range n {
		st.Disruptions = append(st.Disruptions, timestamp(now))
	}
	st.Disruptions = st.Disruptions[max(0, len(st.Disruptions)-maxDisruptions):]
}

// Displace adds to a plan the orderly stop of replicas that the scheduler chose as
// victims of a preemption, as far as the plan's allowances go, and takes them off
// the allowances. It gives the new plan, and the victims that are refused: the
// choice was made on an older state. The input is that of the plan.
func Displace(in Input, plan Plan, victims []Move) (out Plan, refused []string) {
	out = plan
	out.Steps = slices.Clone(plan.Steps)
	out.Allowances = make(map[Key]int, len(plan.Allowances))
	maps.Copy(out.Allowances, plan.Allowances)
	going := map[string]bool{}
	for _, s := range out.Steps {
		if s.Kind == Stop || s.Kind == Remove || s.Kind == Finish {
			going[s.Allocation] = true
		}
	}
	sorted := slices.Clone(victims)
	slices.SortStableFunc(sorted, func(a, b Move) int { return cmp.Compare(a.Allocation, b.Allocation) })
	count := map[Key]int{}
	for _, v := range sorted {
		a := in.Allocations[v.Allocation]
		k := Key{a.GetTenant(), a.GetWorkload()}
		if a == nil || a.GetStop() || a.GetFinal() != nil || going[v.Allocation] || out.Allowances[k] <= 0 {
			refused = append(refused, v.Allocation)
			continue
		}
		going[v.Allocation] = true
		out.Allowances[k]--
		count[k]++
		out.Steps = append(out.Steps, Step{Kind: Stop, Key: k, Code: cmp.Or(v.Code, Displaced), Reason: v.Reason, Allocation: v.Allocation, Disrupt: true})
	}
	for i, s := range out.Steps {
		if s.Kind == PutState && count[s.Key] > 0 {
			out.Steps[i].State = proto.CloneOf(s.State)
			addDisruptions(out.Steps[i].State, count[s.Key], in.Now)
			delete(count, s.Key)
		}
	}
	for _, k := range sortedKeys(count) {
		st := in.newState(k, in.Workloads[k].Intent.GetUid())
		addDisruptions(st, count[k], in.Now)
		out.Steps = append(out.Steps, Step{Kind: PutState, Key: k, Code: Disrupted, Reason: fmt.Sprintf("%d replicas are disrupted on purpose", count[k]), State: st})
	}
	return out, refused
}

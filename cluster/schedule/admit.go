package schedule

import (
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const noExecute = portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE

// Admit says whether replicas of a workload may begin and stay on a node. Selector
// and required affinity bind only who begins.
func Admit(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) Admission {
	s := spec.GetScheduling()
	a := Admission{Begin: true, Stay: true}
	no := func(c Code) {
		a.Begin = false
		a.Code |= c
	}
	if spec.GetKind() != portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		if c := modeCode(n.GetMode()); c != 0 {
			no(c)
		}
	}
	labels := n.GetFacts().GetLabels()
	for k, v := range s.GetNodeSelector() {
		if got, ok := labels[k]; !ok || got != v {
			no(SelectorMismatch)
		}
	}
	if !affine(s.GetNodeAffinity(), labels) {
		no(AffinityMismatch)
	}
	for _, t := range n.GetFacts().GetTaints() {
		admitTaint(&a, n, t, s.GetTolerations())
	}
	return a
}

func admitTaint(a *Admission, n *clusterv1.Node, t *portolanv1.Taint, by []*portolanv1.Toleration) {
	if t.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE {
		return
	}
	stay, ok := tolerated(t, by)
	if ok {
		return
	}
	a.Begin = false
	a.Code |= TaintNotTolerated
	if t.GetEffect() != noExecute {
		return
	}
	came := n.GetTaintTimes()[t.GetKey()+"="+t.GetValue()]
	if stay < 0 {
		a.Stay = false
	}
	// A taint whose time is not noted yet has only just come.
	if stay < 0 || came == nil {
		return
	}
	if until := came.AsTime().Add(stay); a.Until.IsZero() || until.Before(a.Until) {
		a.Until = until
	}
}

func modeCode(m portolanv1.NodeMode) Code {
	switch m {
	case portolanv1.NodeMode_NODE_MODE_CORDONED:
		return NodeCordoned
	case portolanv1.NodeMode_NODE_MODE_DRAINING:
		return NodeDraining
	default:
		return 0
	}
}

func affine(terms []*portolanv1.RequirementTerm, labels map[string]string) bool {
	for _, t := range terms {
		ok := true
		for _, r := range requirementsOf(t) {
			ok = ok && r.holdsIn(labels)
		}
		if ok {
			return true
		}
	}
	return len(terms) == 0
}

// tolerated says whether a taint is accepted for ever, and otherwise for how long
// who runs may stay; less than 0 when not at all. A replica does not begin where it
// could only stay for a while.
func tolerated(t *portolanv1.Taint, by []*portolanv1.Toleration) (stay time.Duration, ok bool) {
	stay = -1
	for _, o := range by {
		effect := o.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED || o.GetEffect() == t.GetEffect()
		if o.GetKey() != t.GetKey() || !effect || (o.GetValue() != "" && o.GetValue() != t.GetValue()) {
			continue
		}
		if o.GetStay() == nil || t.GetEffect() != noExecute {
			return 0, true
		}
		stay = max(stay, o.GetStay().AsDuration())
	}
	return stay, false
}

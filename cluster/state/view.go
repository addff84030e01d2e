package state

import (
	"strings"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Input is the snapshot as reconcile reads it, at a time. reconcile.Summarize of
// it is what the federation is told of workloads.
func (s *Snapshot) Input(now time.Time) reconcile.Input {
	in := reconcile.Input{
		Now: now, Workloads: map[reconcile.Key]reconcile.Workload{}, Nodes: make(map[string]reconcile.Node, len(s.Nodes)),
		Allocations: s.Allocations, Modified: s.Modified, Admit: admit, Pending: make(map[reconcile.Key][]*portolanv1.Reason, len(s.Pending)),
	}
	for name, i := range s.Intents {
		if w := i.GetWorkload(); w != nil {
			in.Workloads[reconcile.Key{Tenant: w.GetTenant(), Workload: w.GetWorkload()}] = reconcile.Workload{Intent: w, Revision: i.GetRevision(), Committed: s.IntentTimes[name]}
		}
	}
	for id, n := range s.Nodes {
		node := reconcile.Node{Record: n}
		if st := s.NodeStatus[id]; st != nil && st.Session != 0 {
			node.Observed, node.Applied, node.Allocations = true, st.Applied.GetGeneration(), st.Allocations
		}
		in.Nodes[id] = node
	}
	for key, reasons := range s.Pending {
		tenant, workload, _ := strings.Cut(key, "/")
		k := reconcile.Key{Tenant: tenant, Workload: workload}
		for _, r := range reasons {
			in.Pending[k] = append(in.Pending[k], &portolanv1.Reason{Code: r.Code, Message: r.Message, Count: int32(r.Count)})
		}
	}
	return in
}

// admit asks the scheduler's rules.
func admit(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) reconcile.Admission {
	a := schedule.Admit(n, spec)
	switch {
	case a.Begin:
		return reconcile.Admitted
	case a.Stay:
		return reconcile.Stay
	}
	return reconcile.Refused
}

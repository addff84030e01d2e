package fleet

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// This file is the pure part of taking status: which records must change so that
// they say what a cluster reported.

// Bounds of what one cluster may report.
const (
	maxReported    = 50_000 // workloads, and exports
	maxNacks       = 100
	maxGateways    = 64
	maxExportPorts = 1024
	maxConditions  = 32
)

// reported is what a cluster has said in one session.
type reported struct {
	summary   *linkv1.ClusterSummary
	workloads map[string]*linkv1.WorkloadStatusReport // "tenant/workload"
	exports   map[string]*linkv1.ServiceExport        // "tenant/service"
	nacks     map[string]*linkv1.Nack                 // resource
}

func newReported() *reported {
	return &reported{summary: &linkv1.ClusterSummary{}, workloads: map[string]*linkv1.WorkloadStatusReport{}, exports: map[string]*linkv1.ServiceExport{}, nacks: map[string]*linkv1.Nack{}}
}

// clone is shallow: messages are replaced, never changed.
func (r *reported) clone() *reported {
	return &reported{summary: r.summary, workloads: maps.Clone(r.workloads), exports: maps.Clone(r.exports), nacks: maps.Clone(r.nacks)}
}

// apply takes one report over. It fails when the cluster says more than it may.
func (r *reported) apply(m *linkv1.StatusReport) error {
	if m.GetCluster() != nil {
		api.Bound(m.GetCluster(), api.MaxTextBytes, api.MaxListItems)
		r.summary = m.GetCluster()
	}
	for _, w := range m.GetWorkloads() {
		if len(w.GetConditions()) > maxConditions {
			return fmt.Errorf("workload %s/%s has %d conditions", w.GetTenant(), w.GetWorkload(), len(w.GetConditions()))
		}
		api.Bound(w, api.MaxTextBytes, api.MaxListItems)
		r.workloads[w.GetTenant()+"/"+w.GetWorkload()] = w
	}
	for _, k := range m.GetRemovedWorkloads() {
		delete(r.workloads, k)
	}
	for _, e := range m.GetExports() {
		if len(e.GetGateways()) > maxGateways || len(e.GetPorts()) > maxExportPorts {
			return fmt.Errorf("export of %s/%s is too great", e.GetTenant(), e.GetService())
		}
		api.Bound(e, api.MaxTextBytes, maxExportPorts)
		r.exports[e.GetTenant()+"/"+e.GetService()] = e
	}
	for _, k := range m.GetRemovedExports() {
		delete(r.exports, k)
	}
	r.nacks = map[string]*linkv1.Nack{}
	for _, n := range m.GetNacks() {
		if len(r.nacks) < maxNacks && r.nacks[n.GetResource()] == nil {
			r.nacks[n.GetResource()] = n
		}
	}
	if len(r.workloads) > maxReported || len(r.exports) > maxReported {
		return fmt.Errorf("more than %d workloads or exports", maxReported)
	}
	return nil
}

// write is one record to be put, or deleted when message is nil.
type write struct {
	kind    store.Kind
	name    string
	message proto.Message
}

// statusWrites compares what a cluster reported with the records of the model.
// confirmed says of a workload ("tenant/workload") that is placed no more and not
// reported, that the cluster knows of its end. alarms are reports about what is
// not the sender's; they are dropped. Nothing is written of a cluster that is not
// in the fleet, nor while records of an earlier life of its name are there.
func statusWrites(m *model, cluster string, session int64, r *reported, confirmed func(workload string) bool, now time.Time) (out []write, alarms []string) {
	if departed(m.view.Get, cluster) {
		return nil, nil
	}
	out = append(out, clusterWrite(m.view, cluster, session, r.summary, now)...)
	known := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(m.tenants)) {
		t := m.tenants[id]
		if !t.here(cluster) && !t.exporters[cluster] {
			continue
		}
		placed, unknown := placementWrites(m.view, t, cluster, session, r, known, confirmed)
		out, alarms = append(out, placed...), append(alarms, unknown...)
		out = append(out, exportWrites(m.view, t, cluster, r, known)...)
	}
	for _, k := range slices.Sorted(maps.Keys(r.exports)) {
		if !known["export "+k] {
			alarms = append(alarms, "export of "+k+", which is not placed there")
		}
	}
	for _, k := range slices.Sorted(maps.Keys(r.workloads)) {
		if !known["workload "+k] {
			alarms = append(alarms, "status of "+k+", which is not placed there")
		}
	}
	nacks, foreign := nackWrites(m, cluster, session, r)
	return append(out, nacks...), append(alarms, foreign...)
}

func clusterWrite(v *store.View, cluster string, session int64, s *linkv1.ClusterSummary, now time.Time) []write {
	name := api.ClusterName(cluster)
	c, ok := store.One[*portolanv1.Cluster](v, store.Cluster, name)
	if !ok {
		return nil
	}
	have, _ := store.One[*storev1.ClusterStatusRecord](v, store.ClusterStatus, name)
	want := &storev1.ClusterStatusRecord{
		Status: &portolanv1.ClusterStatus{
			State: portolanv1.ClusterState_CLUSTER_STATE_READY, CpuMilli: s.GetCpuMilli(), MemoryBytes: s.GetMemoryBytes(),
			Nodes: s.GetNodes(), NodesReady: s.GetNodesReady(), Pools: s.GetPools(), Session: session, IngressAddresses: s.GetIngressAddresses(),
			LastSeenTime: have.GetStatus().GetLastSeenTime(), Conditions: have.GetStatus().GetConditions(),
		},
		GatewayAddresses: s.GetGatewayAddresses(), Uid: c.GetUid(),
	}
	if have.GetStatus().GetState() != portolanv1.ClusterState_CLUSTER_STATE_READY {
		want.Status.Conditions = []*portolanv1.Condition{condition(portolanv1.ConditionState_CONDITION_STATE_TRUE, "Reporting", "the cluster reports", now)}
	}
	if proto.Equal(have, want) {
		return nil
	}
	// Not before the comparison: that time alone is no reason to write.
	want.Status.LastSeenTime = timestamppb.New(now)
	return []write{{store.ClusterStatus, name, want}}
}

func condition(state portolanv1.ConditionState, reason, message string, now time.Time) *portolanv1.Condition {
	return &portolanv1.Condition{Type: "Ready", State: state, Reason: reason, Message: message, LastTransitionTime: timestamppb.New(now)}
}

// placementWrites holds a status record for every placement, from the first pass
// on, until the cluster confirmed the stop: permits follow from that.
func placementWrites(v *store.View, t *tenantView, cluster string, session int64, r *reported, known map[string]bool, confirmed func(string) bool) (out []write, alarms []string) {
	all := map[string]bool{}
	for w := range t.placed[cluster] {
		all[w] = true
	}
	for w := range t.going[cluster] {
		all[w] = true
	}
	for _, w := range slices.Sorted(maps.Keys(all)) {
		key := t.id + "/" + w
		known["workload "+key] = true
		name := api.PlacementName(t.id, w, cluster)
		have, _ := t.going[cluster][w].Message.(*storev1.PlacementStatusRecord)
		p, _ := t.placed[cluster][w].Message.(*portolanv1.Placement)
		rep := r.workloads[key]
		if rep == nil {
			switch {
			case p == nil && have != nil && confirmed(key):
				out = append(out, write{store.PlacementStatus, name, nil})
			case p != nil && have == nil:
				out = append(out, write{store.PlacementStatus, name, &storev1.PlacementStatusRecord{Status: &portolanv1.PlacementStatus{}}})
			}
			continue
		}
		revisions, unknown := believed(v, t.id, w, p, have, rep)
		for _, rev := range unknown {
			if p != nil { // of a workload that is gone nobody knows the revisions any more
				alarms = append(alarms, "revision "+rev+" of "+key+", which does not exist")
			}
		}
		want := &storev1.PlacementStatusRecord{Session: session, Epoch: rep.GetEpoch(), Status: &portolanv1.PlacementStatus{
			Revisions: revisions, Conditions: rep.GetConditions(), ObservedGeneration: have.GetStatus().GetObservedGeneration(),
		}}
		if p != nil && p.GetSpec().GetEpoch() == rep.GetEpoch() {
			want.Status.ObservedGeneration = p.GetGeneration()
		}
		if have.GetEpoch() > rep.GetEpoch() {
			continue // an older decision's echo
		}
		if !samePlacementStatus(have, want) {
			out = append(out, write{store.PlacementStatus, name, want})
		}
	}
	return out, alarms
}

// believed gives what is reported of revisions that the placement names, or that
// it named before: they exist, or were reported then. Of each one count.
func believed(v *store.View, tenant, w string, p *portolanv1.Placement, have *storev1.PlacementStatusRecord, rep *linkv1.WorkloadStatusReport) (out []*portolanv1.RevisionReplicas, unknown []string) {
	known := map[string]bool{}
	for _, list := range [][]*portolanv1.RevisionReplicas{p.GetSpec().GetRevisions(), have.GetStatus().GetRevisions()} {
		for _, r := range list {
			known[r.GetRevision()] = true
		}
	}
	for _, r := range rep.GetRevisions() {
		id := r.GetRevision()
		seen := slices.ContainsFunc(out, func(o *portolanv1.RevisionReplicas) bool { return o.GetRevision() == id })
		if _, exists := v.Get(store.Revision, api.RevisionName(tenant, w, id)); !known[id] && !exists || seen || r.GetReplicas() < 0 || r.GetReadyReplicas() < 0 || r.GetAvailableReplicas() < 0 {
			unknown = append(unknown, id)
			continue
		}
		out = append(out, r)
	}
	return out, unknown
}

// samePlacementStatus leaves out who said it.
func samePlacementStatus(a, b *storev1.PlacementStatusRecord) bool {
	return a != nil && a.GetEpoch() == b.GetEpoch() && proto.Equal(a.GetStatus(), b.GetStatus())
}

// ExportName is the name of the record of a service's export by a cluster.
func ExportName(tenant, service, cluster string) string {
	return api.ServiceName(tenant, service) + "/exports/" + cluster
}

func exportWrites(v *store.View, t *tenantView, cluster string, r *reported, known map[string]bool) (out []write) {
	region := ""
	if c, ok := store.One[*portolanv1.Cluster](v, store.Cluster, api.ClusterName(cluster)); ok {
		region = c.GetSpec().GetRegion()
	}
	prefix := api.TenantName(t.id) + "/"
	have := map[string]*linkv1.ServiceExport{}
	for name, e := range store.Under[*linkv1.ServiceExport](v, store.ServiceExport, prefix) {
		if e.GetCluster() == cluster {
			have[strings.TrimSuffix(strings.TrimPrefix(name, prefix+"services/"), "/exports/"+cluster)] = e
		}
	}
	for _, s := range t.shared {
		svc := s.intent.GetService()
		if svc == nil || !slices.Contains(svc.GetClusters(), cluster) {
			continue
		}
		id := svc.GetService()
		key := t.id + "/" + id
		known["export "+key] = true
		old := have[id]
		delete(have, id)
		var want *linkv1.ServiceExport
		if rep := r.exports[key]; rep != nil {
			want = &linkv1.ServiceExport{Cluster: cluster, Tenant: t.id, Service: id, Region: region, Gateways: rep.GetGateways(), Ports: rep.GetPorts(), Healthy: rep.GetHealthy()}
		} else if old != nil {
			want = silenced(old)
		}
		if want != nil && (old == nil || !proto.Equal(old, want)) {
			out = append(out, write{store.ServiceExport, ExportName(t.id, id, cluster), want})
		}
	}
	// What is left is of services that are no more, or no longer there.
	for _, id := range slices.Sorted(maps.Keys(have)) {
		out = append(out, write{store.ServiceExport, ExportName(t.id, id, cluster), nil})
	}
	return out
}

// silenced is the export of a cluster that does not vouch for it now: unhealthy,
// never gone.
func silenced(e *linkv1.ServiceExport) *linkv1.ServiceExport {
	e = proto.CloneOf(e)
	e.Healthy = false
	return e
}

// told says whether a resource is one that a cluster is told. What it names of its
// own making, towards its nodes, is no object of anybody's.
func (m *model) told(cluster, resource string) bool {
	kind, rest, _ := strings.Cut(resource, "/")
	tenant, _, _ := strings.Cut(rest, "/")
	switch kind {
	case "workload", "service", "route", "tenant", "permit":
	case "export":
		_, rest, _ = strings.Cut(rest, "/")
		tenant, _, _ = strings.Cut(rest, "/")
	case "policy":
		tenant = api.TenantOf(rest)
	case "bundle":
		tenant = fleetUnit
	default:
		return true
	}
	all := m.shared
	if tenant != fleetUnit {
		all = nil
		if t := m.tenants[tenant]; t != nil {
			all = t.forCluster(cluster, m.gateways[cluster])
		}
	}
	return slices.ContainsFunc(all, func(n named) bool { return n.name == resource })
}

func nackWrites(m *model, cluster string, session int64, r *reported) (out []write, alarms []string) {
	suffix, self := "@"+cluster, api.ClusterName(cluster)
	have := map[string]*storev1.NackRecord{}
	for name, n := range store.All[*storev1.NackRecord](m.view, store.Nack) {
		if strings.HasSuffix(name, suffix) {
			have[n.GetResource()] = n
		}
	}
	for _, res := range slices.Sorted(maps.Keys(r.nacks)) {
		if res == "" || len(res) > api.MaxTextBytes {
			continue
		}
		n, old := r.nacks[res], have[res]
		if !m.told(cluster, res) {
			if old == nil { // else it was told, and is being taken back
				alarms = append(alarms, "refusal of "+res+", which the cluster is not told")
			}
			continue
		}
		delete(have, res)
		want := &storev1.NackRecord{Resource: res, Cluster: cluster, Consumer: self, Message: api.Clip(n.GetMessage(), api.MaxTextBytes), Revision: n.GetRevision(), Session: session}
		if c := n.GetConsumer(); strings.HasPrefix(c, self+"/") {
			want.Consumer = api.Clip(c, api.MaxTextBytes)
		}
		if old == nil || old.GetConsumer() != want.GetConsumer() || old.GetMessage() != want.GetMessage() || old.GetRevision() != want.GetRevision() {
			out = append(out, write{store.Nack, res + suffix, want})
		}
	}
	for _, res := range slices.Sorted(maps.Keys(have)) {
		out = append(out, write{store.Nack, res + suffix, nil})
	}
	return out, alarms
}

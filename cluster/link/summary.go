package link

import (
	"cmp"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// This file is the pure part of reporting: what a snapshot says upward.

// Ports of gateways, on their nodes' addresses. The same as nodeagent/network's.
const (
	eastWestPort = 15443
	ingressPort  = 8080
)

// content is all that is reported.
type content struct {
	summary   *linkv1.ClusterSummary
	workloads map[string]*linkv1.WorkloadStatusReport // "tenant/workload"
	exports   map[string]*linkv1.ServiceExport        // "tenant/service"
	nacks     []*linkv1.Nack
}

// summarize makes the content of a snapshot.
func summarize(s *state.Snapshot, cluster string, nacks []*linkv1.Nack, now time.Time) *content {
	c := &content{summary: clusterSummary(s), workloads: map[string]*linkv1.WorkloadStatusReport{}, nacks: nacks}
	for _, w := range reconcile.Summarize(s.Input(now)) {
		c.workloads[w.GetTenant()+"/"+w.GetWorkload()] = w
	}
	c.exports = exports(s, cluster, c.summary.GetGatewayAddresses())
	return c
}

func clusterSummary(s *state.Snapshot) *linkv1.ClusterSummary {
	out := &linkv1.ClusterSummary{Nodes: int32(len(s.Nodes)), AppliedRevision: s.Applied()}
	out.Pools = s.PoolStatuses()
	for _, p := range out.GetPools() {
		out.NodesReady += p.GetNodesReady()
		out.CpuMilli += p.GetCpuMilli()
		out.MemoryBytes += p.GetMemoryBytes()
	}
	out.GatewayAddresses = gateways(s, portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST, eastWestPort)
	out.IngressAddresses = gateways(s, portolanv1.GatewayKind_GATEWAY_KIND_INGRESS, ingressPort)
	return out
}

// gateways lists host:port of the running gateways of a kind, in order.
func gateways(s *state.Snapshot, kind portolanv1.GatewayKind, port int) []string {
	var out []string
	for _, a := range s.Allocations {
		if a.GetTenant() != api.SystemTenant || a.GetSpec().GetGateway() != kind || a.GetStop() || !ready(s, a) {
			continue
		}
		host := cmp.Or(a.GetAddress(), s.Nodes[a.GetNode()].GetFacts().GetAddress())
		out = append(out, net.JoinHostPort(host, strconv.Itoa(port)))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// observed is what the allocation's own node says of it; nil when it says nothing
// or is lost.
func observed(s *state.Snapshot, a *clusterv1.Allocation) *nodev1.AllocationStatus {
	n, st := s.Nodes[a.GetNode()], s.NodeStatus[a.GetNode()]
	if n == nil || n.GetLostTime() != nil || st == nil {
		return nil
	}
	return st.Allocations[a.GetAllocation()]
}

func ready(s *state.Snapshot, a *clusterv1.Allocation) bool {
	o := observed(s, a)
	return o.GetReady() && o.GetState() == portolanv1.ReplicaState_REPLICA_STATE_RUNNING
}

// exports says for each service whose workload is here how it is reached from
// other clusters: never without a ready replica and a running gateway.
func exports(s *state.Snapshot, cluster string, gateways []string) map[string]*linkv1.ServiceExport {
	count := map[string]map[string]int32{} // "tenant/workload" → revision → ready
	for _, a := range s.Allocations {
		k := a.GetTenant() + "/" + a.GetWorkload()
		if count[k] == nil {
			count[k] = map[string]int32{}
		}
		if !a.GetStop() && ready(s, a) {
			count[k][a.GetRevision()]++
		}
	}
	region := s.Intents["cluster"].GetCluster().GetSpec().GetRegion()
	out := map[string]*linkv1.ServiceExport{}
	for _, i := range s.Intents {
		svc := i.GetService()
		if svc == nil {
			continue
		}
		workload := svc.GetTenant() + "/" + cmp.Or(svc.GetSpec().GetWorkload(), svc.GetService())
		byRevision, here := count[workload]
		if s.Intents["workload/"+workload] == nil && !here {
			continue
		}
		e := &linkv1.ServiceExport{Cluster: cluster, Tenant: svc.GetTenant(), Service: svc.GetService(), Region: region, Gateways: gateways}
		// A revision that does not serve is only reached by back ends that name it.
		active := s.Intents["workload/"+workload].GetWorkload().GetActiveRevision()
		all := byRevision[active]
		if active == "" || all == 0 {
			all = 0
			for _, n := range byRevision {
				all += n
			}
		}
		for _, p := range svc.GetSpec().GetPorts() {
			name := cmp.Or(p.GetName(), "http")
			e.Ports = append(e.Ports, &linkv1.ExportedPort{Port: name, ReadyReplicas: all})
			for _, r := range slices.Sorted(maps.Keys(byRevision)) {
				e.Ports = append(e.Ports, &linkv1.ExportedPort{Port: name, Revision: r, ReadyReplicas: byRevision[r]})
			}
		}
		e.Healthy = all > 0 && len(gateways) > 0
		out[svc.GetTenant()+"/"+svc.GetService()] = e
	}
	return out
}

// delta is the report that leads from before to after; with before nil it is
// full.
func delta(before, after *content) *linkv1.StatusReport {
	m := &linkv1.StatusReport{Nacks: after.nacks}
	if before == nil {
		before = &content{}
		m.Full = true
	}
	if m.Full || !proto.Equal(before.summary, after.summary) {
		m.Cluster = after.summary
	}
	m.Workloads, m.RemovedWorkloads = differ(before.workloads, after.workloads)
	m.Exports, m.RemovedExports = differ(before.exports, after.exports)
	return m
}

func differ[M proto.Message](before, after map[string]M) (changed []M, removed []string) {
	for _, k := range slices.Sorted(maps.Keys(after)) {
		if old, ok := before[k]; !ok || !proto.Equal(old, after[k]) {
			changed = append(changed, after[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(before)) {
		if _, ok := after[k]; !ok {
			removed = append(removed, k)
		}
	}
	return changed, removed
}

// says tells whether a delta must be sent before the next keepalive.
func says(m *linkv1.StatusReport, before *content) bool {
	return m.GetFull() || m.GetCluster() != nil || len(m.GetWorkloads())+len(m.GetRemovedWorkloads())+len(m.GetExports())+len(m.GetRemovedExports()) > 0 ||
		!slices.EqualFunc(m.GetNacks(), before.nacks, func(a, b *linkv1.Nack) bool { return proto.Equal(a, b) })
}

func compareNacks(a, b *linkv1.Nack) int {
	return cmp.Or(cmp.Compare(a.GetResource(), b.GetResource()), cmp.Compare(a.GetConsumer(), b.GetConsumer()), cmp.Compare(a.GetMessage(), b.GetMessage()))
}

package dispatch

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
)

// This file is the pure part of serving nodes: what each node is told, as a
// function of one snapshot. What several nodes are told alike is made once
// (newWorld) and picked per node (of).

// Facts are what a cluster knows of itself beside its snapshot.
type Facts struct {
	Cluster string
	// Fleet is the fleet's trust domain.
	Fleet      string
	VirtualIPs string // CIDR
}

// item is a directive under its name. When source is the same message as before,
// so is the directive.
type item struct {
	name      string
	source    proto.Message
	directive *nodev1.Directive
}

// world is a snapshot, resolved. Never changed after it was made.
type world struct {
	s         *state.Snapshot
	facts     Facts
	onNode    map[string][]*clusterv1.Allocation
	workloads map[string][]*clusterv1.Allocation // "tenant/workload"
	remote    map[string][]*linkv1.ServiceExport // "tenant/service"
	services  map[string]service                 // "tenant/service"
	routes    map[string][]item                  // by tenant
	policies  map[string][]item                  // by tenant; "" are the guardrails
	permits   map[string][]item                  // by tenant
	bundles   []item
	peers     []item
	removals  map[string][]item // by node: volumes that are to go
	// ingress are the routes with host names at the ingress, and the services that
	// they lead to.
	ingress         []item
	ingressServices map[string]bool
}

type service struct {
	tenant    string
	service   item
	endpoints item
	// local says whether its workload has any allocation here.
	local bool
}

func newWorld(s *state.Snapshot, f Facts) *world {
	w := &world{
		s: s, facts: f, onNode: map[string][]*clusterv1.Allocation{}, workloads: map[string][]*clusterv1.Allocation{},
		remote: map[string][]*linkv1.ServiceExport{}, services: map[string]service{}, routes: map[string][]item{},
		policies: map[string][]item{}, permits: map[string][]item{}, ingressServices: map[string]bool{},
		removals: map[string][]item{},
	}
	for _, id := range slices.Sorted(maps.Keys(s.Allocations)) {
		a := s.Allocations[id]
		w.onNode[a.GetNode()] = append(w.onNode[a.GetNode()], a)
		k := a.GetTenant() + "/" + a.GetWorkload()
		w.workloads[k] = append(w.workloads[k], a)
	}
	for _, id := range slices.Sorted(maps.Keys(s.Volumes)) {
		if v := s.Volumes[id]; v.GetDelete() {
			d := &nodev1.Directive{Body: &nodev1.Directive_VolumeRemoval{VolumeRemoval: &nodev1.VolumeRemoval{Volume: id}}}
			w.removals[v.GetNode()] = append(w.removals[v.GetNode()], item{"volume/" + id, v, d})
		}
	}
	names := slices.Sorted(maps.Keys(s.Intents))
	for _, name := range names {
		if e := s.Intents[name].GetExport(); e != nil && e.GetCluster() != f.Cluster {
			k := e.GetTenant() + "/" + e.GetService()
			w.remote[k] = append(w.remote[k], e)
		}
	}
	for _, name := range names {
		w.add(name, s.Intents[name])
	}
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[id]
		w.peers = append(w.peers, item{"peer/" + id, nil, &nodev1.Directive{Body: &nodev1.Directive_Peer{Peer: &nodev1.NodePeer{
			Node: id, Address: n.GetFacts().GetAddress(), ReplicaCidr: n.GetReplicaCidr(),
		}}}})
	}
	return w
}

// add turns one intent into what nodes are told of it.
func (w *world) add(name string, i *linkv1.Intent) {
	d := &nodev1.Directive{Revision: i.GetRevision()}
	it := item{name, i, d}
	switch b := i.GetBody().(type) {
	case *linkv1.Intent_Service:
		w.addService(b.Service, it)
	case *linkv1.Intent_Route:
		d.Body = &nodev1.Directive_Route{Route: &nodev1.MeshRoute{Tenant: b.Route.GetTenant(), Route: b.Route.GetRoute(), Spec: b.Route.GetSpec()}}
		w.routes[b.Route.GetTenant()] = append(w.routes[b.Route.GetTenant()], it)
		w.addIngress(b.Route, it)
	case *linkv1.Intent_Policy:
		d.Body = &nodev1.Directive_Policy{Policy: b.Policy}
		t := api.TenantOf(b.Policy.GetName())
		w.policies[t] = append(w.policies[t], it)
	case *linkv1.Intent_Bundle:
		d.Body = &nodev1.Directive_Bundle{Bundle: b.Bundle}
		w.bundles = append(w.bundles, it)
	case *linkv1.Intent_Permit:
		d.Body = &nodev1.Directive_Permit{Permit: b.Permit}
		w.permits[b.Permit.GetTenant()] = append(w.permits[b.Permit.GetTenant()], it)
	}
}

func (w *world) addService(i *linkv1.ServiceIntent, it item) {
	workload := cmp.Or(i.GetSpec().GetWorkload(), i.GetService())
	it.directive.Body = &nodev1.Directive_Service{Service: &nodev1.MeshService{
		Tenant: i.GetTenant(), Service: i.GetService(), Workload: workload, Ports: i.GetSpec().GetPorts(), VirtualIp: i.GetVirtualIp(), Clusters: i.GetClusters(),
	}}
	k := i.GetTenant() + "/" + i.GetService()
	e := &nodev1.MeshEndpoints{Tenant: i.GetTenant(), Service: i.GetService(), Remote: w.remote[k]}
	e.Endpoints = w.endpoints(i.GetTenant()+"/"+workload, e.Remote)
	standby(e.Endpoints, w.s.Intents["workload/"+i.GetTenant()+"/"+workload].GetWorkload().GetActiveRevision())
	w.services[k] = service{
		tenant: i.GetTenant(), service: it, local: len(w.workloads[i.GetTenant()+"/"+workload]) > 0,
		endpoints: item{"endpoints/" + k, nil, &nodev1.Directive{Revision: it.directive.GetRevision(), Body: &nodev1.Directive_Endpoints{Endpoints: e}}},
	}
}

// addIngress notes a route at the ingress and where it leads.
func (w *world) addIngress(r *linkv1.RouteIntent, it item) {
	if len(r.GetSpec().GetIngressHosts()) == 0 {
		return
	}
	w.ingress = append(w.ingress, it)
	if own := r.GetSpec().GetService(); own != "" {
		w.ingressServices[r.GetTenant()+"/"+own] = true
	}
	for _, rule := range r.GetSpec().GetRules() {
		for _, b := range rule.GetBackends() {
			w.ingressServices[r.GetTenant()+"/"+cmp.Or(b.GetService(), r.GetSpec().GetService())] = true
		}
	}
}

// endpoints are the ready replicas of a workload, and those that drain. Replicas
// on lost nodes leave as soon as anything else can answer, but their silence alone
// never empties the set.
func (w *world) endpoints(workload string, remote []*linkv1.ServiceExport) []*nodev1.Endpoint {
	var live, silent []*nodev1.Endpoint
	answers := slices.ContainsFunc(remote, (*linkv1.ServiceExport).GetHealthy)
	for _, a := range w.workloads[workload] {
		n, st := w.s.Nodes[a.GetNode()], w.s.NodeStatus[a.GetNode()]
		if n == nil || st == nil || !within(n.GetReplicaCidr(), a.GetAddress()) {
			continue
		}
		o := st.Allocations[a.GetAllocation()]
		running := o.GetState() == portolanv1.ReplicaState_REPLICA_STATE_RUNNING && o.GetReady()
		stopping := o.GetState() == portolanv1.ReplicaState_REPLICA_STATE_STOPPING
		if !running && !stopping {
			continue
		}
		e := &nodev1.Endpoint{
			Allocation: a.GetAllocation(), Address: a.GetAddress(), Revision: a.GetRevision(), Node: a.GetNode(),
			Zone: w.zone(n), Draining: stopping || a.GetStop(),
		}
		switch {
		case n.GetLostTime() == nil:
			answers = answers || !e.Draining
			live = append(live, e)
		case running:
			e.Draining = false
			silent = append(silent, e)
		}
	}
	if !answers {
		live = append(live, silent...)
		slices.SortFunc(live, func(a, b *nodev1.Endpoint) int { return cmp.Compare(a.GetAllocation(), b.GetAllocation()) })
	}
	return live
}

// standby marks the replicas of revisions that do not serve. While none of the
// active one can answer, all do: a switch never empties the set.
func standby(all []*nodev1.Endpoint, active string) {
	serves := func(e *nodev1.Endpoint) bool { return e.GetRevision() == active && !e.GetDraining() }
	if active == "" || !slices.ContainsFunc(all, serves) {
		return
	}
	for _, e := range all {
		e.Standby = e.GetRevision() != active
	}
}

// within says whether the address lies in the range.
func within(cidr, address string) bool {
	p, err := netip.ParsePrefix(cidr)
	if err != nil {
		return false
	}
	a, err := netip.ParseAddr(address)
	return err == nil && p.Contains(a)
}

func (w *world) zone(n *clusterv1.Node) string {
	return cmp.Or(n.GetFacts().GetLabels()["zone"], w.s.Intents["cluster"].GetCluster().GetSpec().GetZone())
}

// of gives what one node is told, in the order in which it is sent: what is
// referred to comes first. The watermark is not in it.
func (w *world) of(node string) []item {
	n := w.s.Nodes[node]
	if n == nil {
		return nil
	}
	spec := w.s.Intents["cluster"].GetCluster().GetSpec()
	out := []item{{"config", nil, &nodev1.Directive{Body: &nodev1.Directive_Config{Config: &nodev1.NodeConfig{
		Cluster: w.facts.Cluster, Region: spec.GetRegion(), Zone: w.zone(n), Fleet: w.facts.Fleet,
		TrustDomain: identity.ClusterDomain(w.facts.Fleet, w.facts.Cluster), ReplicaCidr: n.GetReplicaCidr(), VirtualIpCidr: w.facts.VirtualIPs,
	}}}}}
	for _, p := range w.peers {
		if p.name != "peer/"+node {
			out = append(out, p)
		}
	}
	tenants, ingress, eastWest := w.concerns(node)
	out = append(out, w.bundles...)
	out = append(out, w.policies[""]...)
	for _, t := range tenants {
		out = append(out, w.permits[t]...)
		out = append(out, w.policies[t]...)
	}
	if len(tenants) > 0 && !slices.Contains(tenants, api.SystemTenant) {
		// Gateways of other clusters call whoever it is.
		out = append(out, w.permits[api.SystemTenant]...)
	}
	for _, k := range slices.Sorted(maps.Keys(w.services)) {
		s := w.services[k]
		if slices.Contains(tenants, s.tenant) || ingress && w.ingressServices[k] || eastWest && s.local {
			out = append(out, s.service, s.endpoints)
		}
	}
	for _, t := range tenants {
		out = append(out, w.routes[t]...)
	}
	if ingress {
		for _, r := range w.ingress {
			if !slices.Contains(tenants, r.directive.GetRoute().GetTenant()) {
				out = append(out, r)
			}
		}
	}
	for _, a := range w.onNode[node] {
		out = append(out, w.assignment(a))
	}
	return append(out, w.removals[node]...)
}

// concerns says whose mesh a node takes part in: tenants with allocations there,
// and the gateways that it has.
func (w *world) concerns(node string) (tenants []string, ingress, eastWest bool) {
	seen := map[string]bool{}
	for _, a := range w.onNode[node] {
		seen[a.GetTenant()] = true
		switch a.GetSpec().GetGateway() {
		case portolanv1.GatewayKind_GATEWAY_KIND_INGRESS:
			ingress = true
		case portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST:
			eastWest = true
		case portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED:
		}
	}
	return slices.Sorted(maps.Keys(seen)), ingress, eastWest
}

func (w *world) assignment(a *clusterv1.Allocation) item {
	var volumes []*nodev1.AssignedVolume
	for _, id := range a.GetVolumes() {
		v := w.s.Volumes[id]
		volumes = append(volumes, &nodev1.AssignedVolume{Volume: id, Name: v.GetName(), SizeBytes: v.GetSizeBytes()})
	}
	return item{"assignment/" + a.GetAllocation(), a, &nodev1.Directive{Revision: a.GetFederationRevision(), Body: &nodev1.Directive_Assignment{Assignment: &nodev1.Assignment{
		Allocation: a.GetAllocation(), Tenant: a.GetTenant(), Workload: a.GetWorkload(), Revision: a.GetRevision(), Epoch: a.GetEpoch(),
		Spec: a.GetSpec(), Address: a.GetAddress(), Stop: a.GetStop(), StopReason: a.GetStopReason(), AtCluster: a.GetAtCluster(), Bound: a.GetBound(),
		Index: a.GetIndex(), Volumes: volumes, Devices: a.GetDevices(),
	}}}}
}

func watermark(revision, generation int64) item {
	return item{api.WatermarkName, nil, &nodev1.Directive{Revision: revision, Body: &nodev1.Directive_Watermark{Watermark: &nodev1.Watermark{Revision: revision, Generation: generation}}}}
}

// Directives gives all that a node is told at a snapshot, by resource name, the
// watermark included.
func Directives(s *state.Snapshot, f Facts, node string) map[string]*nodev1.Directive {
	out := map[string]*nodev1.Directive{}
	for _, it := range newWorld(s, f).of(node) {
		out[it.name] = it.directive
	}
	if len(out) > 0 {
		out[api.WatermarkName] = watermark(s.Settled, s.Generation).directive
	}
	return out
}

// owner is the node of an allocation that a caller names; "" when there is none.
func owner(s *state.Snapshot, allocation string) string { return s.Allocations[allocation].GetNode() }

// replicaName splits tenants/{t}/workloads/{w}/replicas/{r} and finds it.
func replicaName(s *state.Snapshot, name string) (*clusterv1.Allocation, error) {
	// The allocation ID is longer than an ID may be, so the name is taken apart here.
	parent, id, ok := strings.Cut(name, "/replicas/")
	a := s.Allocations[id]
	if !ok || a == nil || parent != api.WorkloadName(a.GetTenant(), a.GetWorkload()) {
		return nil, api.E(api.NotFound, "find replica", "there is no replica %q in this cluster", name)
	}
	return a, nil
}

package warden

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/xds/distribute"
	"github.com/portolan-io/portolan/xds/model"
)

// world is one generation, indexed for those who ask. It is immutable; a new
// generation makes a new one.
type world struct {
	watermark *nodev1.Watermark
	input     model.Input
	policies  []*linkv1.PolicyIntent

	replicas  map[string]*nodev1.Assignment
	byAddress map[netip.Addr]*nodev1.Assignment
	services  map[serviceKey]*nodev1.MeshService
	tenants   map[string]bool
	permits   map[permitKey]bool
	// domains are the trust domains whose roots are known.
	domains map[string]bool

	authorizer policy.Authorizer
	// faults are bundles that did not compile, by name.
	faults map[string]string
}

type serviceKey struct{ tenant, service string }

type permitKey struct{ tenant, workload, cluster string }

// parsed remembers directives of the generation before, so that a change costs
// only what changed.
type parsed struct {
	version   string
	directive *nodev1.Directive
}

// parseDirectives reads all resources of a generation; known is of the one before.
func parseDirectives(g distribute.Generation, known map[string]parsed) (map[string]parsed, *nodev1.Watermark, error) {
	out := make(map[string]parsed, len(g.Resources))
	for name, r := range g.Resources {
		if k, ok := known[name]; ok && k.version == r.Version {
			out[name] = k
			continue
		}
		d, err := parseDirective(r)
		if err != nil {
			return nil, nil, err
		}
		out[name] = parsed{version: r.Version, directive: d}
	}
	if g.Watermark == nil {
		return out, nil, nil
	}
	d, err := parseDirective(g.Watermark)
	if err != nil {
		return nil, nil, err
	}
	return out, d.GetWatermark(), nil
}

func parseDirective(r *distribute.Resource) (*nodev1.Directive, error) {
	d := &nodev1.Directive{}
	if err := proto.Unmarshal(r.Body.GetValue(), d); err != nil {
		return nil, fmt.Errorf("parse directive %s: %w", r.Name, err)
	}
	return d, nil
}

// newWorld sorts directives by what they say. Order is by name, so that equal
// generations make equal worlds.
func newWorld(directives map[string]parsed, watermark *nodev1.Watermark) *world {
	w := &world{
		watermark: watermark,
		replicas:  map[string]*nodev1.Assignment{}, byAddress: map[netip.Addr]*nodev1.Assignment{},
		services: map[serviceKey]*nodev1.MeshService{}, tenants: map[string]bool{},
		permits: map[permitKey]bool{}, domains: map[string]bool{}, faults: map[string]string{},
	}
	names := make([]string, 0, len(directives))
	for n := range directives {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		w.add(directives[n].directive)
	}
	if w.input.Config == nil {
		w.input.Config = &nodev1.NodeConfig{}
	}
	return w
}

func (w *world) add(d *nodev1.Directive) {
	switch b := d.GetBody().(type) {
	case *nodev1.Directive_Assignment:
		w.addAssignment(b.Assignment)
	case *nodev1.Directive_Service:
		w.input.Services = append(w.input.Services, b.Service)
		w.services[serviceKey{b.Service.GetTenant(), b.Service.GetService()}] = b.Service
		w.tenants[b.Service.GetTenant()] = true
	case *nodev1.Directive_Endpoints:
		w.input.Endpoints = append(w.input.Endpoints, b.Endpoints)
	case *nodev1.Directive_Route:
		w.input.Routes = append(w.input.Routes, b.Route)
	case *nodev1.Directive_Policy:
		if b.Policy.GetSpec().GetKind() == portolanv1.PolicyKind_POLICY_KIND_NETWORK {
			w.policies = append(w.policies, b.Policy)
		}
	case *nodev1.Directive_Bundle:
		w.input.Bundles = append(w.input.Bundles, b.Bundle)
		w.domains[b.Bundle.GetTrustDomain()] = true
	case *nodev1.Directive_Permit:
		w.input.Permits = append(w.input.Permits, b.Permit)
		w.permits[permitKey{b.Permit.GetTenant(), b.Permit.GetWorkload(), b.Permit.GetCluster()}] = true
	case *nodev1.Directive_Config:
		w.input.Config = b.Config
	}
}

func (w *world) addAssignment(a *nodev1.Assignment) {
	w.input.Assignments = append(w.input.Assignments, a)
	w.replicas[a.GetAllocation()] = a
	w.tenants[a.GetTenant()] = true
	if isGateway(a) {
		return
	}
	if addr, err := netip.ParseAddr(a.GetAddress()); err == nil {
		w.byAddress[addr] = a
	}
}

func isGateway(a *nodev1.Assignment) bool {
	return a.GetSpec().GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED
}

// identityOf is whom the replica is.
func (w *world) identityOf(a *nodev1.Assignment) identity.ID {
	id := identity.ID{TrustDomain: w.input.Config.GetTrustDomain()}
	if isGateway(a) {
		id.Kind, id.Name = identity.Gateway, a.GetWorkload()
		return id
	}
	id.Kind, id.Tenant, id.Workload = identity.Workload, a.GetTenant(), a.GetWorkload()
	return id
}

// served finds the service and port of a replica behind a target port; the first
// by name when there are several.
func (w *world) served(a *nodev1.Assignment, target int) (string, *portolanv1.ServicePort) {
	best := ""
	var port *portolanv1.ServicePort
	for key, s := range w.services {
		if key.tenant != a.GetTenant() || s.GetWorkload() != a.GetWorkload() || (best != "" && key.service >= best) {
			continue
		}
		for _, p := range s.GetPorts() {
			if targetPort(p) == target {
				best, port = key.service, p
				break
			}
		}
	}
	return best, port
}

func targetPort(p *portolanv1.ServicePort) int {
	if p.GetTargetPort() != 0 {
		return int(p.GetTargetPort())
	}
	return int(p.GetPort())
}

// peer checks that a caller of this identity is accepted at all, before any
// policy is asked: a workload or gateway of a known trust domain, of the own
// cluster or one with a permit. The second result says why not.
func (w *world) peer(principal string) (identity.ID, string) {
	id, err := identity.Parse(principal)
	if err != nil {
		return identity.ID{}, "the peer has no identity of the fleet"
	}
	if !w.domains[id.TrustDomain] {
		return id, "trust domain " + id.TrustDomain + " is not known here"
	}
	tenant, workload := id.Tenant, id.Workload
	switch id.Kind {
	case identity.Workload:
	case identity.Gateway:
		tenant, workload = api.SystemTenant, id.Name
	case identity.Control, identity.User, identity.Node:
		return id, "only workloads and gateways may call workloads"
	}
	if id.TrustDomain == w.input.Config.GetTrustDomain() {
		return id, ""
	}
	cluster, ok := identity.ClusterOf(w.input.Config.GetFleet(), id.TrustDomain)
	if !ok {
		return id, "trust domain " + id.TrustDomain + " is no cluster of the fleet"
	}
	if !w.permits[permitKey{tenant, workload, cluster}] {
		return id, fmt.Sprintf("no permit for %s of tenant %s in cluster %s", workload, tenant, cluster)
	}
	return id, ""
}

// clusterOf is the cluster of an identity; empty for one outside clusters.
func (w *world) clusterOf(id identity.ID) string {
	c, _ := identity.ClusterOf(w.input.Config.GetFleet(), id.TrustDomain)
	return c
}

// lookup finds a mesh name as the replica may see it.
func (w *world) lookup(asking *nodev1.Assignment, name string) (found bool, vip netip.Addr) {
	labels := strings.Split(name, ".")
	switch len(labels) {
	case 1: // mesh
		return true, netip.Addr{}
	case 2: // <tenant>.mesh
		return labels[0] == asking.GetTenant(), netip.Addr{}
	case 3:
		if labels[1] != asking.GetTenant() && !w.shares(asking) {
			return false, netip.Addr{}
		}
		s := w.services[serviceKey{tenant: labels[1], service: labels[0]}]
		if s == nil {
			return false, netip.Addr{}
		}
		addr, err := netip.ParseAddr(s.GetVirtualIp())
		if err != nil {
			return true, netip.Addr{}
		}
		return true, addr
	default:
		return false, netip.Addr{}
	}
}

// shares says whether the replica sees services of other tenants: only the
// system tenant's do, since no grants exist.
func (w *world) shares(asking *nodev1.Assignment) bool { return asking.GetTenant() == api.SystemTenant }

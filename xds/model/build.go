package model

import (
	"cmp"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
)

// Build resolves a generation. It never fails as a whole: what is faulty is left
// out and named in the problems, which are sorted.
func Build(in Input) (*Graph, []Problem) {
	b := &builder{in: in, g: &Graph{byKey: map[Key]*Service{}, serving: map[Key][]Served{}}}
	c := in.Config
	b.g.Cluster, b.g.Region, b.g.Zone = c.GetCluster(), c.GetRegion(), c.GetZone()
	b.g.Fleet, b.g.TrustDomain = c.GetFleet(), c.GetTrustDomain()
	b.services()
	b.endpoints()
	b.routes()
	b.domains()
	b.peers()
	b.allocations()
	b.served()
	slices.SortFunc(b.problems, func(x, y Problem) int {
		return cmp.Or(cmp.Compare(x.Resource, y.Resource), cmp.Compare(x.Field, y.Field), cmp.Compare(x.Message, y.Message))
	})
	return b.g, b.problems
}

type builder struct {
	in       Input
	g        *Graph
	problems []Problem
}

func (b *builder) problem(resource, field, format string, args ...any) {
	b.problems = append(b.problems, Problem{Resource: resource, Field: field, Message: fmt.Sprintf(format, args...)})
}

// sorted gives a copy of xs in the order of key; the input's own order decides
// nothing.
func sorted[T any](xs []T, key func(T) Key) []T {
	out := slices.Clone(xs)
	slices.SortStableFunc(out, func(x, y T) int { return key(x).compare(key(y)) })
	return out
}

func (b *builder) services() {
	vips := map[netip.Addr]Key{}
	for _, m := range sorted(b.in.Services, func(m *nodev1.MeshService) Key { return Key{m.GetTenant(), m.GetService()} }) {
		key := Key{m.GetTenant(), m.GetService()}
		resource := "service/" + key.String()
		if _, ok := b.g.byKey[key]; ok {
			b.problem(resource, "", "is there twice; the first one counts")
			continue
		}
		s := &Service{Key: key, Workload: cmp.Or(m.GetWorkload(), m.GetService())}
		if !b.vip(s, m, vips) || !b.ports(s, m) {
			continue
		}
		for _, c := range m.GetClusters() {
			s.Identities = append(s.Identities, b.callee(s, c))
		}
		if len(m.GetClusters()) == 0 {
			s.Identities = []string{b.callee(s, b.g.Cluster)}
		}
		slices.Sort(s.Identities)
		s.Identities = slices.Compact(s.Identities)
		b.g.byKey[key] = s
		b.g.Services = append(b.g.Services, s)
	}
}

// callee is the identity of the service's workload in a cluster.
func (b *builder) callee(s *Service, cluster string) string {
	domain := identity.ClusterDomain(b.g.Fleet, cluster)
	if cluster == b.g.Cluster && b.g.TrustDomain != "" {
		domain = b.g.TrustDomain
	}
	return identity.ID{Kind: identity.Workload, TrustDomain: domain, Tenant: s.Tenant, Workload: s.Workload}.String()
}

func (b *builder) vip(s *Service, m *nodev1.MeshService, vips map[netip.Addr]Key) bool {
	if m.GetVirtualIp() == "" {
		return true
	}
	resource := "service/" + s.String()
	a, err := netip.ParseAddr(m.GetVirtualIp())
	if err != nil || !a.Is4() {
		b.problem(resource, "virtual_ip", "%q is no IPv4 address", m.GetVirtualIp())
		return false
	}
	if other, ok := vips[a]; ok {
		b.problem(resource, "virtual_ip", "%s belongs to service %s already", a, other)
		return false
	}
	vips[a] = s.Key
	s.VIP = a
	return true
}

func (b *builder) ports(s *Service, m *nodev1.MeshService) bool {
	resource := "service/" + s.String()
	for i, p := range m.GetPorts() {
		field := fmt.Sprintf("ports[%d]", i)
		port := Port{
			Name: cmp.Or(p.GetName(), "http"), Port: uint16(p.GetPort()), Target: uint16(cmp.Or(p.GetTargetPort(), p.GetPort())),
			HTTP: p.GetProtocol() != portolanv1.PortProtocol_PORT_PROTOCOL_TCP,
		}
		if p.GetPort() < 1 || p.GetPort() > 65535 || p.GetTargetPort() < 0 || p.GetTargetPort() > 65535 {
			b.problem(resource, field, "port %d to %d is out of range", p.GetPort(), p.GetTargetPort())
			return false
		}
		for _, other := range s.Ports {
			if other.Name == port.Name || other.Port == port.Port {
				b.problem(resource, field, "port %d %q is declared twice", port.Port, port.Name)
				return false
			}
		}
		s.Ports = append(s.Ports, port)
	}
	if len(s.Ports) == 0 {
		b.problem(resource, "ports", "must have at least one")
		return false
	}
	return true
}

func (b *builder) endpoints() {
	seen := map[Key]bool{}
	for _, m := range sorted(b.in.Endpoints, func(m *nodev1.MeshEndpoints) Key { return Key{m.GetTenant(), m.GetService()} }) {
		key := Key{m.GetTenant(), m.GetService()}
		resource := "endpoints/" + key.String()
		s, ok := b.g.byKey[key]
		if !ok {
			b.problem(resource, "service", "there is no such service")
			continue
		}
		if seen[key] {
			b.problem(resource, "", "is there twice; the first one counts")
			continue
		}
		seen[key] = true
		for i, e := range m.GetEndpoints() {
			a, err := netip.ParseAddr(e.GetAddress())
			if err != nil {
				b.problem(resource, fmt.Sprintf("endpoints[%d].address", i), "%q is no IP address", e.GetAddress())
				continue
			}
			s.Endpoints = append(s.Endpoints, Endpoint{
				Allocation: e.GetAllocation(), Address: a, Revision: e.GetRevision(), Node: e.GetNode(), Zone: e.GetZone(), Draining: e.GetDraining(), Standby: e.GetStandby(),
			})
		}
		slices.SortFunc(s.Endpoints, func(x, y Endpoint) int {
			return cmp.Or(cmp.Compare(x.Allocation, y.Allocation), x.Address.Compare(y.Address))
		})
		s.Endpoints = slices.CompactFunc(s.Endpoints, func(x, y Endpoint) bool { return x.Address == y.Address })
		b.remotes(s, m, resource)
	}
}

func (b *builder) remotes(s *Service, m *nodev1.MeshEndpoints, resource string) {
	for i, x := range m.GetRemote() {
		field := fmt.Sprintf("remote[%d]", i)
		if x.GetTenant() != s.Tenant || x.GetService() != s.Name || x.GetCluster() == "" || x.GetCluster() == b.g.Cluster {
			b.problem(resource, field, "export of %s/%s by cluster %q does not belong here", x.GetTenant(), x.GetService(), x.GetCluster())
			continue
		}
		r := Remote{Cluster: x.GetCluster(), Region: x.GetRegion(), Healthy: x.GetHealthy(), Ready: map[PortRevision]int{}}
		for j, gw := range x.GetGateways() {
			a, err := netip.ParseAddrPort(gw)
			if err != nil {
				b.problem(resource, fmt.Sprintf("%s.gateways[%d]", field, j), "%q is no address with port", gw)
				continue
			}
			r.Gateways = append(r.Gateways, a)
		}
		slices.SortFunc(r.Gateways, netip.AddrPort.Compare)
		r.Gateways = slices.Compact(r.Gateways)
		for _, p := range x.GetPorts() {
			r.Ready[PortRevision{p.GetPort(), p.GetRevision()}] += int(p.GetReadyReplicas())
		}
		s.Remotes = append(s.Remotes, r)
	}
	slices.SortStableFunc(s.Remotes, func(x, y Remote) int { return cmp.Compare(x.Cluster, y.Cluster) })
	n := len(s.Remotes)
	s.Remotes = slices.CompactFunc(s.Remotes, func(x, y Remote) bool { return x.Cluster == y.Cluster })
	if len(s.Remotes) != n {
		b.problem(resource, "remote", "a cluster exports it twice; the first one counts")
	}
}

func (b *builder) domains() {
	seen := map[string]bool{}
	for _, m := range sorted(b.in.Bundles, func(m *linkv1.TrustBundle) Key { return Key{"", m.GetTrustDomain()} }) {
		resource := "bundle/" + m.GetTrustDomain()
		switch block, _ := pem.Decode(m.GetX509Roots()); {
		case m.GetTrustDomain() == "":
			b.problem(resource, "trust_domain", "must not be empty")
		case seen[m.GetTrustDomain()]:
			b.problem(resource, "", "is there twice; the first one counts")
		case block == nil || block.Type != "CERTIFICATE":
			b.problem(resource, "x509_roots", "holds no PEM certificate")
		default:
			seen[m.GetTrustDomain()] = true
			b.g.Domains = append(b.g.Domains, Domain{Name: m.GetTrustDomain(), Roots: m.GetX509Roots()})
		}
	}
}

// peers resolves permits; those of tenant "system" are for gateways.
func (b *builder) peers() {
	for _, m := range b.in.Permits {
		if m.GetCluster() == b.g.Cluster {
			continue
		}
		id := identity.ID{
			Kind: identity.Workload, TrustDomain: identity.ClusterDomain(b.g.Fleet, m.GetCluster()), Tenant: m.GetTenant(), Workload: m.GetWorkload(),
		}
		if m.GetTenant() == api.SystemTenant {
			id = identity.ID{Kind: identity.Gateway, TrustDomain: id.TrustDomain, Name: m.GetWorkload()}
		}
		if _, err := id.SPIFFE(); err != nil || m.GetCluster() == "" || m.GetWorkload() == "" || m.GetTenant() == "" {
			name := strings.Join([]string{"permit", m.GetTenant(), m.GetWorkload(), m.GetCluster()}, "/")
			b.problem(name, "", "does not name an identity")
			continue
		}
		b.g.Peers = append(b.g.Peers, id.String())
	}
	slices.Sort(b.g.Peers)
	b.g.Peers = slices.Compact(b.g.Peers)
}

func (b *builder) allocations() {
	for _, m := range b.in.Assignments {
		a, err := netip.ParseAddr(m.GetAddress())
		if err != nil {
			b.problem("assignment/"+m.GetAllocation(), "address", "%q is no IP address", m.GetAddress())
			continue
		}
		b.g.Allocations = append(b.g.Allocations, Allocation{
			ID: m.GetAllocation(), Tenant: m.GetTenant(), Workload: m.GetWorkload(), Revision: m.GetRevision(), Address: a,
		})
	}
	slices.SortFunc(b.g.Allocations, func(x, y Allocation) int { return cmp.Compare(x.ID, y.ID) })
}

// served gathers for each workload the replica ports that services lead to.
func (b *builder) served() {
	for _, s := range b.g.Services {
		key := Key{s.Tenant, s.Workload}
		for i, p := range s.Ports {
			list := b.g.serving[key]
			j := slices.IndexFunc(list, func(x Served) bool { return x.Target == p.Target })
			if j < 0 {
				list = append(list, Served{Target: p.Target, HTTP: p.HTTP})
				j = len(list) - 1
			}
			if list[j].HTTP != p.HTTP {
				b.problem("service/"+s.String(), fmt.Sprintf("ports[%d].protocol", i),
					"target port %d of workload %s is served with another protocol by service %s", p.Target, s.Workload, list[j].For[0].Service)
				continue
			}
			list[j].For = append(list[j].For, ServedFor{Service: s.Name, Port: p.Name})
			b.g.serving[key] = list
		}
	}
	for _, list := range b.g.serving {
		slices.SortFunc(list, func(x, y Served) int { return cmp.Compare(x.Target, y.Target) })
	}
}

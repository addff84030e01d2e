package model

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func config() *nodev1.NodeConfig {
	return &nodev1.NodeConfig{Cluster: "eu", Region: "eu-west", Fleet: "portolan.internal", TrustDomain: "eu.portolan.internal"}
}

func TestIdentitiesAndPeers(t *testing.T) {
	g, problems := Build(Input{
		Config: config(),
		Services: []*nodev1.MeshService{
			{Tenant: "shop", Service: "a", Workload: "w", Clusters: []string{"us", "eu", "us"}, Ports: []*portolanv1.ServicePort{{Port: 80}}},
			{Tenant: "shop", Service: "b", Ports: []*portolanv1.ServicePort{{Port: 81, TargetPort: 82, Protocol: portolanv1.PortProtocol_PORT_PROTOCOL_TCP}}},
		},
		Permits: []*linkv1.PeerPermit{
			{Tenant: "shop", Workload: "w", Cluster: "us"},
			{Tenant: "shop", Workload: "w", Cluster: "us"},
			{Tenant: "shop", Workload: "w", Cluster: "eu"}, // its own domain needs none
			{Tenant: "system", Workload: "ingress", Cluster: "us"},
		},
	})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	a, _ := g.Service("shop", "a")
	if want := []string{"spiffe://eu.portolan.internal/tenant/shop/workload/w", "spiffe://us.portolan.internal/tenant/shop/workload/w"}; !cmp.Equal(a.Identities, want) {
		t.Errorf("identities of a: %v", a.Identities)
	}
	b, _ := g.Service("shop", "b")
	if want := []string{"spiffe://eu.portolan.internal/tenant/shop/workload/b"}; !cmp.Equal(b.Identities, want) {
		t.Errorf("identities of b: %v", b.Identities)
	}
	if want := []Port{{Name: "http", Port: 81, Target: 82}}; !cmp.Equal(b.Ports, want) {
		t.Errorf("ports of b: %v", b.Ports)
	}
	if want := []string{"spiffe://us.portolan.internal/gateway/ingress", "spiffe://us.portolan.internal/tenant/shop/workload/w"}; !cmp.Equal(g.Peers, want) {
		t.Errorf("peers: %v", g.Peers)
	}
	if want := []Served{{Target: 80, HTTP: true, For: []ServedFor{{"a", "http"}}}}; !cmp.Equal(g.Serves("shop", "w"), want) {
		t.Errorf("w serves %v", g.Serves("shop", "w"))
	}
}

// TestClosedAndDeterministic: whatever the input, every reference in the graph
// exists, no two services share a virtual IP, every rule can answer, and the
// order of the input changes nothing.
func TestClosedAndDeterministic(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := drawInput(rt)
		g, problems := Build(in)
		closed(rt, g)
		shuffled := in
		shuffled.Services = rapid.Permutation(in.Services).Draw(rt, "services")
		shuffled.Routes = rapid.Permutation(in.Routes).Draw(rt, "routes")
		shuffled.Endpoints = rapid.Permutation(in.Endpoints).Draw(rt, "endpoints")
		again, problemsAgain := Build(shuffled)
		opts := cmp.Options{
			cmp.AllowUnexported(Graph{}), cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}),
			cmp.Comparer(func(a, b Backend) bool {
				return a.Service.Key == b.Service.Key && a.Port == b.Port && a.Revision == b.Revision && a.Weight == b.Weight
			}),
		}
		if diff := cmp.Diff(g, again, opts); diff != "" {
			rt.Fatal(diff)
		}
		if diff := cmp.Diff(problems, problemsAgain); diff != "" {
			rt.Fatal(diff)
		}
	})
}

func closed(rt *rapid.T, g *Graph) {
	vips := map[netip.Addr]bool{}
	check := func(r *Route) {
		for _, rule := range r.Rules {
			if !rule.Broken && len(rule.Backends) == 0 {
				rt.Fatalf("route %s has a rule that leads nowhere", r.Key)
			}
			for _, b := range rule.Backends {
				if s, ok := g.Service(b.Service.Tenant, b.Service.Name); !ok || s != b.Service {
					rt.Fatalf("route %s leads to a service that is not there", r.Key)
				}
				if _, ok := b.Service.Port(b.Port); b.Port != "" && !ok {
					rt.Fatalf("route %s leads to port %q that is not there", r.Key, b.Port)
				}
				if b.Revision != "" && !slices.Contains(b.Service.Revisions, b.Revision) {
					rt.Fatalf("revision %q of %s is not listed", b.Revision, b.Service.Key)
				}
			}
		}
	}
	for _, s := range g.Services {
		if s.VIP.IsValid() && vips[s.VIP] {
			rt.Fatalf("%s belongs to two services", s.VIP)
		}
		vips[s.VIP] = true
		if s.Route != nil {
			check(s.Route)
		}
	}
	for _, h := range g.Hosts {
		check(h.Route)
	}
}

func drawInput(rt *rapid.T) Input {
	in := Input{Config: config()}
	name := rapid.SampledFrom([]string{"a", "b", "c"})
	// Names are drawn without repetition, since of two with one name the first of
	// the input counts.
	for _, n := range rapid.SliceOfDistinct(name, rapid.ID[string]).Draw(rt, "services") {
		s := &nodev1.MeshService{Tenant: "t", Service: n, VirtualIp: rapid.SampledFrom([]string{"", "10.0.0.1", "10.0.0.2", "x"}).Draw(rt, "vip")}
		for range rapid.IntRange(0, 3).Draw(rt, "ports") {
			s.Ports = append(s.Ports, &portolanv1.ServicePort{
				Name: rapid.SampledFrom([]string{"", "p", "q"}).Draw(rt, "port"), Port: rapid.Int32Range(-1, 4).Draw(rt, "number"),
				Protocol: portolanv1.PortProtocol(rapid.IntRange(0, 2).Draw(rt, "protocol")),
			})
		}
		in.Services = append(in.Services, s)
	}
	for _, n := range rapid.SliceOfDistinct(name, rapid.ID[string]).Draw(rt, "endpoints") {
		in.Endpoints = append(in.Endpoints, &nodev1.MeshEndpoints{Tenant: "t", Service: n, Endpoints: []*nodev1.Endpoint{{Allocation: n, Address: "10.0.0.9"}}})
	}
	for i := range rapid.IntRange(0, 4).Draw(rt, "routes") {
		spec := &portolanv1.RouteSpec{Service: rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "service")}
		spec.IngressHosts = rapid.SliceOfDistinct(rapid.SampledFrom([]string{"x", "y"}), rapid.ID[string]).Draw(rt, "hosts")
		for range rapid.IntRange(0, 2).Draw(rt, "rules") {
			rule := &portolanv1.RouteRule{}
			for range rapid.IntRange(0, 3).Draw(rt, "backends") {
				rule.Backends = append(rule.Backends, &portolanv1.RouteBackend{
					Service: rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(rt, "backend"), Port: rapid.SampledFrom([]string{"", "p", "q"}).Draw(rt, "to"),
					Revision: rapid.SampledFrom([]string{"", "v1", "v2"}).Draw(rt, "revision"), Weight: rapid.Int32Range(-1, 100).Draw(rt, "weight"),
				})
			}
			spec.Rules = append(spec.Rules, rule)
		}
		in.Routes = append(in.Routes, &nodev1.MeshRoute{Tenant: "t", Route: fmt.Sprint("r", i), Spec: spec})
	}
	return in
}

package translate

import (
	"cmp"
	"fmt"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/portolan-io/portolan/xds/model"
)

// Translator translates for the proxies of one graph. What proxies of a tenant
// have in common is made once.
type Translator struct {
	g *model.Graph

	mu      sync.Mutex
	tenants map[string]*outbound
	trust   *secrets
}

// New makes a Translator of a graph.
func New(g *model.Graph) *Translator {
	return &Translator{g: g, tenants: map[string]*outbound{}}
}

// Proxy makes the resources of one proxy. Problems name what could not be
// translated; everything else is there.
func (t *Translator) Proxy(p Proxy) (Resources, []model.Problem) {
	if !p.Address.IsValid() && p.Role != Sidecar {
		return empty(), []model.Problem{{Resource: "proxy/" + p.ID, Field: "address", Message: "a gateway needs one"}}
	}
	if p.AuthzSocket == "" && p.Role == Sidecar {
		return empty(), []model.Problem{{Resource: "proxy/" + p.ID, Field: "authz_socket", Message: "a sidecar needs one: without an authorizer it would serve nothing"}}
	}
	switch p.Role {
	case Sidecar:
		return t.sidecar(p)
	case Ingress:
		return t.ingress(p)
	case EastWest:
		return t.eastWest(p)
	default:
		return empty(), []model.Problem{{Resource: "proxy/" + p.ID, Field: "role", Message: fmt.Sprintf("%q is no role of a proxy", p.Role)}}
	}
}

func empty() Resources {
	return Resources{ClusterType: nil, EndpointType: nil, ListenerType: nil, RouteType: nil, SecretType: nil}
}

func (r Resources) add(typeURL, name string, m proto.Message) {
	r[typeURL] = append(r[typeURL], &Resource{Name: name, Message: m})
}

func (r Resources) sort() {
	for _, list := range r {
		slices.SortFunc(list, func(a, b *Resource) int { return cmp.Compare(a.Name, b.Name) })
	}
}

// outbound is what every proxy of a tenant needs to call its services.
type outbound struct {
	shared   Resources // clusters, endpoints, routes and the outbound listener
	problems []model.Problem
}

// outbound makes the common part of a tenant once.
func (t *Translator) outbound(tenant string) *outbound {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o, ok := t.tenants[tenant]; ok {
		return o
	}
	o := &outbound{shared: empty()}
	for _, s := range t.g.Tenant(tenant) {
		for _, port := range s.Ports {
			addClusters(o.shared, t.g, s, port)
			if port.HTTP {
				name := routeName(s, port)
				o.shared.add(RouteType, name, serviceRoutes(name, s, port))
			}
		}
	}
	l, problems := outboundListener(t.g.Tenant(tenant))
	o.problems = problems
	o.shared.add(ListenerType, l.GetName(), l)
	o.shared.sort()
	t.tenants[tenant] = o
	return o
}

func (t *Translator) sidecar(p Proxy) (Resources, []model.Problem) {
	o := t.outbound(p.Tenant)
	own := empty()
	serves := t.g.Serves(p.Tenant, p.Workload)
	own.add(ClusterType, authorizerCluster, authorizer(p.AuthzSocket))
	for _, s := range serves {
		own.add(ClusterType, inboundName(s), inboundCluster(s))
		if s.HTTP {
			own.add(RouteType, inboundName(s), inboundRoutes(p, s))
		}
	}
	own.add(ListenerType, "inbound", inboundListener(p, serves))
	return join(own, o.shared, t.secrets().both), o.problems
}

// join merges parts; the shared ones stay as they are.
func join(parts ...Resources) Resources {
	out := empty()
	for typeURL := range out {
		n := 0
		for _, part := range parts {
			n += len(part[typeURL])
		}
		list := make([]*Resource, 0, n)
		for _, part := range parts {
			list = append(list, part[typeURL]...)
		}
		out[typeURL] = list
	}
	out.sort()
	return out
}

func routeName(s *model.Service, port model.Port) string {
	return "outbound/" + s.Tenant + "/" + s.Name + "/" + port.Name
}

func clusterName(s *model.Service, port, revision string) string {
	return "outbound/" + s.Tenant + "/" + s.Name + "/" + port + "/" + cmp.Or(revision, "all")
}

// pack is anypb.New, but the same bytes for the same message.
func pack(m proto.Message) *anypb.Any {
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // only for invalid UTF-8 in a message that we made
	}
	return a
}

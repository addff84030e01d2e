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
	proxies map[Proxy]*inbound
	// before is the generation before, whose unchanged resources are used again.
	before generation
}

// generation is what a Translator hands on to the next.
type generation struct {
	tenants map[string]*outbound
	trust   *secrets
	proxies map[Proxy]*inbound
}

// inbound is what a sidecar has for itself.
type inbound struct {
	print print
	own   Resources // sorted
}

// New makes a Translator of a graph.
func New(g *model.Graph) *Translator {
	return &Translator{g: g, tenants: map[string]*outbound{}, proxies: map[Proxy]*inbound{}}
}

// Next makes a Translator of the graph that follows. Resources of services that
// did not change are the same pointers, so that they are neither made nor
// marshalled again.
func (t *Translator) Next(g *model.Graph) *Translator {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := New(g)
	next.before = generation{tenants: t.tenants, trust: t.trust, proxies: t.proxies}
	return next
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
	shared   Resources // clusters, endpoints, routes and the outbound listener, sorted
	problems []model.Problem
	parts    map[model.Key]*part
	listener print
}

// part is what one service makes, with prints of all that it was made of.
type part struct {
	clusterPrint, endpointPrint, routePrint print
	clusters, endpoints, routes             []*Resource
}

// outbound makes the common part of a tenant once.
func (t *Translator) outbound(tenant string) *outbound {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o, ok := t.tenants[tenant]; ok {
		return o
	}
	services := t.g.Tenant(tenant)
	before := t.before.tenants[tenant]
	if before == nil {
		before = &outbound{}
	}
	o := &outbound{shared: empty(), parts: make(map[model.Key]*part, len(services)), listener: listenerPrint(services)}
	for _, s := range services {
		p := makePart(t.g, s, before.parts[s.Key])
		o.parts[s.Key] = p
		o.shared[ClusterType] = append(o.shared[ClusterType], p.clusters...)
		o.shared[EndpointType] = append(o.shared[EndpointType], p.endpoints...)
		o.shared[RouteType] = append(o.shared[RouteType], p.routes...)
	}
	if before.listener != "" && o.listener == before.listener {
		o.shared[ListenerType], o.problems = before.shared[ListenerType], before.problems
	} else {
		l, problems := outboundListener(services)
		o.problems = problems
		o.shared.add(ListenerType, l.GetName(), l)
	}
	o.shared.sort()
	t.tenants[tenant] = o
	return o
}

// makePart makes the resources of a service, or takes those of before where what
// they were made of is the same.
func makePart(g *model.Graph, s *model.Service, before *part) *part {
	p := &part{clusterPrint: clusterPrint(s), endpointPrint: endpointPrint(g, s), routePrint: routePrint(s)}
	if before == nil {
		before = &part{}
	}
	p.clusters, p.endpoints, p.routes = before.clusters, before.endpoints, before.routes
	fresh := empty()
	if p.clusterPrint != before.clusterPrint || p.endpointPrint != before.endpointPrint {
		for _, port := range s.Ports {
			addClusters(fresh, g, s, port)
		}
	}
	if p.clusterPrint != before.clusterPrint {
		p.clusters = fresh[ClusterType]
	}
	if p.endpointPrint != before.endpointPrint {
		p.endpoints = fresh[EndpointType]
	}
	if p.routePrint != before.routePrint {
		p.routes = nil
		for _, port := range s.Ports {
			if port.HTTP {
				name := routeName(s, port)
				p.routes = append(p.routes, &Resource{Name: name, Message: serviceRoutes(name, s, port)})
			}
		}
	}
	return p
}

func (t *Translator) sidecar(p Proxy) (Resources, []model.Problem) {
	o := t.outbound(p.Tenant)
	return join(t.inbound(p).own, o.shared, t.secrets().both), o.problems
}

// inbound makes what a sidecar has for itself, or takes that of before.
func (t *Translator) inbound(p Proxy) *inbound {
	t.mu.Lock()
	defer t.mu.Unlock()
	if in, ok := t.proxies[p]; ok {
		return in
	}
	serves := t.g.Serves(p.Tenant, p.Workload)
	in := &inbound{print: servedPrint(serves)}
	if before, ok := t.before.proxies[p]; ok && before.print == in.print {
		in.own = before.own
	} else {
		in.own = makeInbound(p, serves)
	}
	t.proxies[p] = in
	return in
}

func makeInbound(p Proxy, serves []model.Served) Resources {
	own := empty()
	own.add(ClusterType, authorizerCluster, authorizer(p.AuthzSocket))
	for _, s := range serves {
		own.add(ClusterType, inboundName(s), inboundCluster(s))
		if s.HTTP {
			own.add(RouteType, inboundName(s), inboundRoutes(p, s))
		}
	}
	own.add(ListenerType, "inbound", inboundListener(p, serves))
	own.sort()
	return own
}

// join merges parts that are sorted, and leaves them as they are.
func join(parts ...Resources) Resources {
	out := empty()
	for _, part := range parts {
		for typeURL, list := range part {
			out[typeURL] = merge(out[typeURL], list)
		}
	}
	return out
}

func merge(a, b []*Resource) []*Resource {
	if len(a) == 0 {
		return slices.Clip(b)
	}
	if len(b) == 0 {
		return a
	}
	out := make([]*Resource, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].Name <= b[0].Name {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
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

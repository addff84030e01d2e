package translate

import (
	"cmp"
	"fmt"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/health_check/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/xds/model"
)

// ingress routes by host name to services of all tenants, as the gateway's own
// identity. Unknown hosts get 404.
func (t *Translator) ingress(p Proxy) (Resources, []model.Problem) {
	own := empty()
	var problems []model.Problem
	var hosts []*routev3.VirtualHost
	needed := map[*model.Service]bool{}
	for _, h := range t.g.Hosts {
		called, problem := ingressPort(h)
		if problem != nil {
			problems = append(problems, *problem)
		}
		for _, rule := range h.Route.Rules {
			for _, b := range rule.Backends {
				needed[b.Service] = true
			}
		}
		hosts = append(hosts, &routev3.VirtualHost{Name: h.Name, Domains: []string{h.Name}, Routes: routes(h.Route, called)})
	}
	for _, s := range t.g.Services {
		if !needed[s] {
			continue
		}
		for _, port := range s.Ports {
			addClusters(own, t.g, s, port)
		}
	}
	config := routeConfig("ingress", hosts...)
	config.IgnorePortInHostMatching = true
	own.add(RouteType, "ingress", config)
	own.add(ListenerType, "ingress", ingressListener(p))
	own.sort()
	return join(own, t.secrets().trust), problems
}

// ingressPort is the port for back ends that name none: the first of HTTP.
func ingressPort(h *model.Host) (string, *model.Problem) {
	for _, rule := range h.Route.Rules {
		for _, b := range rule.Backends {
			if b.Port != "" {
				continue
			}
			for _, port := range b.Service.Ports {
				if port.HTTP {
					return port.Name, nil
				}
			}
			return "", &model.Problem{
				Resource: "route/" + h.Route.String(), Field: "spec.ingress_hosts", Message: "service " + b.Service.Name + " has no HTTP port for " + h.Name,
			}
		}
	}
	return "", nil
}

func ingressListener(p Proxy) *listenerv3.Listener {
	l := listener("ingress", p.Address.String(), IngressPort, corev3.TrafficDirection_INBOUND)
	hcm := connectionManager("ingress", "ingress", inboundIdle, httpFilter("envoy.filters.http.health_check", &healthv3.HealthCheck{
		PassThroughMode: wrapperspb.Bool(false), Headers: []*routev3.HeaderMatcher{header(":path", HealthPath)},
	}))
	// The peer is outside: its address is the client's, what it says of others
	// counts for nothing.
	hcm.UseRemoteAddress = wrapperspb.Bool(true)
	l.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{filter("envoy.filters.network.http_connection_manager", hcm)}}}
	return l
}

// eastWest passes TLS of other clusters' callers on to replicas of this one, by
// SNI and without a key of its own. Each name has a chain: a gateway that took
// the cluster from the SNI would let an outsider name any.
func (t *Translator) eastWest(p Proxy) (Resources, []model.Problem) {
	out := empty()
	l := listener("east-west", p.Address.String(), EastWestPort, corev3.TrafficDirection_INBOUND, tlsInspector())
	for _, s := range t.g.Services {
		if len(s.Endpoints) == 0 {
			continue
		}
		for _, port := range s.Ports {
			for _, revision := range localRevisions(s) {
				name := fmt.Sprintf("east-west/%s/%s/%s/%s", s.Tenant, s.Name, port.Name, cmp.Or(revision, "all"))
				out.add(ClusterType, name, edsCluster(name))
				set := assignment(name)
				set.Endpoints = localEndpoints(t.g, s, port, revision)
				out.add(EndpointType, name, set)
				l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
					Name: name,
					FilterChainMatch: &listenerv3.FilterChainMatch{
						TransportProtocol: "tls", ServerNames: []string{api.SNI(port.Name, revision, s.Name, s.Tenant)},
					},
					Filters: []*listenerv3.Filter{filter("envoy.filters.network.tcp_proxy", tcpProxy("east-west", name))},
				})
			}
		}
	}
	neverEmpty(l)
	out.add(ListenerType, l.GetName(), l)
	out.sort()
	return out, nil
}

// localRevisions are "" for all, and each that has a replica here.
func localRevisions(s *model.Service) []string {
	out := []string{""}
	for _, e := range s.Endpoints {
		if e.Revision != "" {
			out = append(out, e.Revision)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

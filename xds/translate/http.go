package translate

import (
	"fmt"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	authzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/xds/model"
)

const (
	defaultTimeout = 15 * time.Second
	defaultRetryOn = "connect-failure,refused-stream,reset-before-request"
	defaultRetries = 2

	authzFilter = "envoy.filters.http.ext_authz"
)

// connectionManager is what every HTTP listener has: canonical paths, no
// ambiguous headers, bounds on everything, the router last.
func connectionManager(stat, route string, idle time.Duration, filters ...*hcmv3.HttpFilter) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		StatPrefix:     stat,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: ads(), RouteConfigName: route}},
		HttpFilters:    append(filters, httpFilter("envoy.filters.http.router", &routerv3.Router{SuppressEnvoyHeaders: true})),
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout: durationpb.New(idle), MaxHeadersCount: wrapperspb.UInt32(100),
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST,
		},
		Http2ProtocolOptions:         http2Options(),
		MaxRequestHeadersKb:          wrapperspb.UInt32(60),
		StreamIdleTimeout:            durationpb.New(5 * time.Minute),
		RequestHeadersTimeout:        durationpb.New(10 * time.Second),
		NormalizePath:                wrapperspb.Bool(true),
		MergeSlashes:                 true,
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_REJECT_REQUEST,
		UpgradeConfigs:               []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
	}
}

func httpFilter(name string, config proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(config)}}
}

// serviceRoutes answer for the name and virtual IP of a service.
func serviceRoutes(name string, s *model.Service, port model.Port) *routev3.RouteConfiguration {
	host := &routev3.VirtualHost{Name: api.Hostname(s.Tenant, s.Name), Domains: []string{"*"}}
	if s.Route == nil {
		host.Routes = []*routev3.Route{plainRoute(clusterName(s, port.Name, ""))}
	} else {
		host.Routes = routes(s.Route, port.Name)
	}
	return routeConfig(name, host)
}

func routeConfig(name string, hosts ...*routev3.VirtualHost) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{Name: name, VirtualHosts: hosts}
}

func plainRoute(cluster string) *routev3.Route {
	a := action(model.RuleSpec{})
	a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: cluster}
	return &routev3.Route{Match: anything(), Action: &routev3.Route_Route{Route: a}}
}

func anything() *routev3.RouteMatch {
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
}

// routes are a route's rules in order, one for each match. called is the port by
// which the service was called, for back ends that do not name one.
func routes(r *model.Route, called string) []*routev3.Route {
	var out []*routev3.Route
	for i, rule := range r.Rules {
		matches := []*routev3.RouteMatch{anything()}
		if len(rule.Matches) > 0 {
			matches = matches[:0]
			for _, m := range rule.Matches {
				matches = append(matches, routeMatch(m))
			}
		}
		for j, m := range matches {
			route := &routev3.Route{Name: fmt.Sprintf("%s/%d/%d", r.Name, i, j), Match: m}
			if rule.Broken {
				route.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
					Status: 503, Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "route " + r.Name + " has a back end that does not exist\n"}},
				}}
			} else {
				route.Action = &routev3.Route_Route{Route: backends(rule, called)}
			}
			out = append(out, route)
		}
	}
	return out
}

func backends(rule model.Rule, called string) *routev3.RouteAction {
	a := action(rule.Spec)
	weights := weighted(rule.Backends, called)
	if len(weights) == 1 {
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: weights[0].cluster}
		return a
	}
	wc := &routev3.WeightedCluster{}
	for _, w := range weights {
		wc.Clusters = append(wc.Clusters, &routev3.WeightedCluster_ClusterWeight{Name: w.cluster, Weight: wrapperspb.UInt32(w.weight)})
	}
	a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: wc}
	return a
}

type share struct {
	cluster string
	weight  uint32
}

// weighted gives clusters with weights; a cluster that is named twice has the sum.
func weighted(backends []model.Backend, called string) []share {
	var out []share
next:
	for _, b := range backends {
		port := b.Port
		if port == "" {
			port = called
		}
		name := clusterName(b.Service, port, b.Revision)
		for i := range out {
			if out[i].cluster == name {
				out[i].weight += b.Weight
				continue next
			}
		}
		out = append(out, share{name, b.Weight})
	}
	return out
}

func action(spec model.RuleSpec) *routev3.RouteAction {
	timeout := spec.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	return &routev3.RouteAction{Timeout: durationpb.New(timeout), RetryPolicy: retry(spec.Retry)}
}

// retry goes to another host; by default only for what never reached an
// application.
func retry(r *model.Retry) *routev3.RetryPolicy {
	p := &routev3.RetryPolicy{
		RetryOn: defaultRetryOn, NumRetries: wrapperspb.UInt32(defaultRetries), HostSelectionRetryMaxAttempts: 5,
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name:       "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: pack(&previoushostsv3.PreviousHostsPredicate{})},
		}},
	}
	if r == nil {
		return p
	}
	if r.Attempts <= 0 {
		return nil
	}
	p.NumRetries = wrapperspb.UInt32(uint32(r.Attempts))
	if r.PerTryTimeout > 0 {
		p.PerTryTimeout = durationpb.New(r.PerTryTimeout)
	}
	if len(r.On) > 0 {
		p.RetryOn = strings.Join(r.On, ",")
	}
	return p
}

func routeMatch(m model.Match) *routev3.RouteMatch {
	out := anything()
	switch {
	case m.PathExact != "":
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.PathExact}
	case m.PathPrefix != "" && strings.HasSuffix(m.PathPrefix, "/"):
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: m.PathPrefix}
	case m.PathPrefix != "": // "/api" is a whole segment, not the beginning of "/apis"
		out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: m.PathPrefix}
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, header(":method", m.Method))
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, header(strings.ToLower(h.Name), h.Value))
	}
	return out
}

func header(name, value string) *routev3.HeaderMatcher {
	if value == "" {
		return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	}
	return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: exact(value)}}
}

// inboundRoutes lead to the application and tell the authorizer which service
// and port is called. They travel by RDS, so that a change of what is allowed
// acts on live connections.
func inboundRoutes(p Proxy, s model.Served) *routev3.RouteConfiguration {
	return routeConfig(inboundName(s), &routev3.VirtualHost{
		Name: inboundName(s), Domains: []string{"*"},
		Routes: []*routev3.Route{{
			Match: anything(),
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{
				// The caller's side bounds the request; 0 here is no second bound.
				ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: inboundName(s)}, Timeout: durationpb.New(0),
				// The application may close an idle connection at the moment of use.
				RetryPolicy: &routev3.RetryPolicy{RetryOn: "connect-failure,refused-stream,reset-before-request", NumRetries: wrapperspb.UInt32(1)},
			}},
		}},
		TypedPerFilterConfig: map[string]*anypb.Any{authzFilter: pack(&authzv3.ExtAuthzPerRoute{
			Override: &authzv3.ExtAuthzPerRoute_CheckSettings{CheckSettings: &authzv3.CheckSettings{ContextExtensions: extensions(p, s)}},
		})},
	})
}

func extensions(p Proxy, s model.Served) map[string]string {
	return map[string]string{
		ExtTenant: p.Tenant, ExtWorkload: p.Workload, ExtService: s.For[0].Service,
		ExtPort: fmt.Sprint(s.Target), ExtProtocol: protocol(s),
	}
}

func protocol(s model.Served) string {
	if s.HTTP {
		return "http"
	}
	return "tcp"
}

package translate

import (
	"cmp"
	"maps"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	authzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	netauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/xds/model"
)

const (
	outboundIdle = 15 * time.Minute
	tcpIdle      = time.Hour
	// authzTimeout ends in a refusal; a decision takes far less.
	authzTimeout = 2 * time.Second
	// Requests wait for an authorizer that restarts, about a second with full
	// jitter, and are refused when it stays away.
	authzRetries    = 16
	authzBackoff    = 25 * time.Millisecond
	authzMaxBackoff = 150 * time.Millisecond
)

func listener(name, address string, port uint16, direction corev3.TrafficDirection, filters ...*listenerv3.ListenerFilter) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name: name, Address: socket(address, port), TrafficDirection: direction, ListenerFilters: filters,
		ListenerFiltersTimeout:        durationpb.New(5 * time.Second),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(256 << 10),
	}
}

func originalDst() *listenerv3.ListenerFilter {
	return listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{})
}

func tlsInspector() *listenerv3.ListenerFilter {
	return listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectorv3.TlsInspector{})
}

func listenerFilter(name string, config proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(config)}}
}

func filter(name string, config proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(config)}}
}

// outboundListener takes what nftables captured: a chain for each virtual IP and
// port. What matches none is closed.
func outboundListener(services []*model.Service) (*listenerv3.Listener, []model.Problem) {
	l := listener("outbound", "0.0.0.0", OutboundPort, corev3.TrafficDirection_OUTBOUND, originalDst())
	var problems []model.Problem
	for _, s := range services {
		if !s.VIP.IsValid() {
			problems = append(problems, model.Problem{Resource: "service/" + s.String(), Field: "virtual_ip", Message: "has none, and cannot be called by name"})
			continue
		}
		for _, port := range s.Ports {
			f := filter("envoy.filters.network.http_connection_manager", connectionManager("outbound", routeName(s, port), outboundIdle))
			if !port.HTTP {
				tcp, bad := tcpRoute(s, port)
				problems = append(problems, bad...)
				if tcp == nil {
					continue
				}
				f = filter("envoy.filters.network.tcp_proxy", tcp)
			}
			l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
				Name: routeName(s, port),
				FilterChainMatch: &listenerv3.FilterChainMatch{
					DestinationPort: wrapperspb.UInt32(uint32(port.Port)),
					PrefixRanges:    []*corev3.CidrRange{{AddressPrefix: s.VIP.String(), PrefixLen: wrapperspb.UInt32(32)}},
				},
				Filters: []*listenerv3.Filter{f},
			})
		}
	}
	slices.SortFunc(l.FilterChains, func(a, b *listenerv3.FilterChain) int { return cmp.Compare(a.GetName(), b.GetName()) })
	neverEmpty(l)
	return l, problems
}

// neverEmpty adds a chain that closes what it gets: Envoy refuses a listener
// without chains.
func neverEmpty(l *listenerv3.Listener) {
	if len(l.GetFilterChains()) == 0 {
		l.FilterChains = []*listenerv3.FilterChain{{Name: "closed"}}
	}
}

// tcpRoute takes the first rule without conditions: TCP has nothing to match on.
// nil: connections are to be closed, since a back end does not exist.
func tcpRoute(s *model.Service, port model.Port) (*tcpv3.TcpProxy, []model.Problem) {
	name := clusterName(s, port.Name, "")
	out := tcpProxy("outbound", name)
	if s.Route == nil {
		return out, nil
	}
	i := slices.IndexFunc(s.Route.Rules, func(r model.Rule) bool { return len(r.Matches) == 0 })
	if i < 0 {
		return out, []model.Problem{{
			Resource: "route/" + s.Route.String(), Field: "spec.rules", Message: "port " + port.Name + " is TCP, and no rule is without matches: it goes to all revisions",
		}}
	}
	rule := s.Route.Rules[i]
	if rule.Broken {
		return nil, nil
	}
	weights := weighted(rule.Backends, port.Name)
	if len(weights) == 1 {
		out.ClusterSpecifier = &tcpv3.TcpProxy_Cluster{Cluster: weights[0].cluster}
		return out, nil
	}
	wc := &tcpv3.TcpProxy_WeightedCluster{}
	for _, w := range weights {
		wc.Clusters = append(wc.Clusters, &tcpv3.TcpProxy_WeightedCluster_ClusterWeight{Name: w.cluster, Weight: w.weight})
	}
	out.ClusterSpecifier = &tcpv3.TcpProxy_WeightedClusters{WeightedClusters: wc}
	return out, nil
}

func tcpProxy(stat, cluster string) *tcpv3.TcpProxy {
	return &tcpv3.TcpProxy{
		StatPrefix: stat, ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: cluster},
		IdleTimeout: durationpb.New(tcpIdle), MaxConnectAttempts: wrapperspb.UInt32(3),
	}
}

// inboundListener takes what comes to the replica's own ports, in mutual TLS
// only: plaintext matches no chain and is closed. Every request or connection is
// put to the authorizer first.
func inboundListener(p Proxy, serves []model.Served) *listenerv3.Listener {
	l := listener("inbound", "0.0.0.0", InboundPort, corev3.TrafficDirection_INBOUND, originalDst(), tlsInspector())
	for _, s := range serves {
		chain := &listenerv3.FilterChain{
			Name:             inboundName(s),
			FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(uint32(s.Target)), TransportProtocol: "tls"},
		}
		if s.HTTP {
			chain.TransportSocket = calleeTLS("h2", "http/1.1")
			chain.Filters = []*listenerv3.Filter{filter("envoy.filters.network.http_connection_manager", inboundHTTP(p, s))}
		} else {
			chain.TransportSocket = calleeTLS()
			chain.Filters = []*listenerv3.Filter{
				filter("envoy.filters.network.ext_authz", &netauthzv3.ExtAuthz{
					StatPrefix: "inbound", GrpcService: authorizerService(p, s), IncludePeerCertificate: true, TransportApiVersion: corev3.ApiVersion_V3,
				}),
				filter("envoy.filters.network.tcp_proxy", tcpProxy("inbound", inboundName(s))),
			}
		}
		l.FilterChains = append(l.FilterChains, chain)
	}
	neverEmpty(l)
	return l
}

// inboundHTTP hands the caller's identity to the application in
// X-Forwarded-Client-Cert, which nobody else can set.
func inboundHTTP(p Proxy, s model.Served) *hcmv3.HttpConnectionManager {
	hcm := connectionManager("inbound", inboundName(s), inboundIdle, httpFilter(authzFilter, &authzv3.ExtAuthz{
		Services:            &authzv3.ExtAuthz_GrpcService{GrpcService: authorizerService(p, s)},
		TransportApiVersion: corev3.ApiVersion_V3, IncludePeerCertificate: true,
		StatusOnError: &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden},
	}))
	hcm.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE_SET
	hcm.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Uri: true}
	return hcm
}

func authorizerService(p Proxy, s model.Served) *corev3.GrpcService {
	out := &corev3.GrpcService{
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: authorizerCluster}},
		Timeout:         durationpb.New(authzTimeout),
		RetryPolicy: &corev3.RetryPolicy{
			RetryOn:      "connect-failure,reset,refused-stream,unavailable,cancelled",
			NumRetries:   wrapperspb.UInt32(authzRetries),
			RetryBackOff: &corev3.BackoffStrategy{BaseInterval: durationpb.New(authzBackoff), MaxInterval: durationpb.New(authzMaxBackoff)},
		},
	}
	ext := extensions(p, s)
	for _, k := range slices.Sorted(maps.Keys(ext)) {
		out.InitialMetadata = append(out.InitialMetadata, &corev3.HeaderValue{Key: MetaPrefix + k, Value: ext[k]})
	}
	return out
}

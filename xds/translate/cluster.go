package translate

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/xds/model"
)

const (
	authorizerCluster = "authorizer"
	httpOptionsName   = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

	connectTimeout = 2 * time.Second
	// upstreamIdle is shorter than inboundIdle, so that the caller's side closes
	// first and no request meets a connection that is being closed.
	upstreamIdle = 60 * time.Second
	inboundIdle  = 300 * time.Second
	// appIdle is shorter than the keep-alive of the usual servers (Node: 5 s).
	appIdle = 4 * time.Second
)

// addClusters makes the clusters and endpoint sets of one service port: all
// revisions, and each that a route names.
func addClusters(r Resources, g *model.Graph, s *model.Service, port model.Port) {
	for _, revision := range append([]string{""}, s.Revisions...) {
		name := clusterName(s, port.Name, revision)
		r.add(ClusterType, name, outboundCluster(name, s, port, revision))
		r.add(EndpointType, name, outboundEndpoints(name, g, s, port, revision))
	}
}

func outboundCluster(name string, s *model.Service, port model.Port, revision string) *clusterv3.Cluster {
	c := edsCluster(name)
	c.TransportSocket = callerTLS(api.SNI(port.Name, revision, s.Name, s.Tenant), s.Identities)
	if port.HTTP {
		c.TypedExtensionProtocolOptions = httpOptions(&httpv3.HttpProtocolOptions{
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(upstreamIdle)},
			UpstreamProtocolOptions:   sameProtocol(true),
		})
	}
	return c
}

// edsCluster is what clusters with endpoint sets have in common. Panic routing is
// off: it would send to draining endpoints. Retries are bounded by a budget,
// because Envoy's default of three at a time overflows as soon as one endpoint
// is lost. Outlier detection looks at connections only: whether an answer of
// status 5xx is a fault of the endpoint is the application's affair. It never
// takes more than half: readiness is the cluster's word, and with panic routing
// off an ejection of all would outlast the fault.
func edsCluster(name string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		CommonLbConfig:       &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: wrapperspb.UInt32(10_000), MaxPendingRequests: wrapperspb.UInt32(10_000), MaxRequests: wrapperspb.UInt32(10_000), MaxRetries: wrapperspb.UInt32(10_000),
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent: &typev3.Percent{Value: 25}, MinRetryConcurrency: wrapperspb.UInt32(64),
			},
		}}},
		OutlierDetection: &clusterv3.OutlierDetection{
			SplitExternalLocalOriginErrors: true, ConsecutiveLocalOriginFailure: wrapperspb.UInt32(5),
			Interval: durationpb.New(time.Second), BaseEjectionTime: durationpb.New(2 * time.Second), MaxEjectionTime: durationpb.New(20 * time.Second),
			MaxEjectionPercent: wrapperspb.UInt32(50), EnforcingConsecutive_5Xx: wrapperspb.UInt32(0), EnforcingSuccessRate: wrapperspb.UInt32(0),
			EnforcingConsecutiveGatewayFailure: wrapperspb.UInt32(0), EnforcingLocalOriginSuccessRate: wrapperspb.UInt32(0),
		},
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: &corev3.TcpKeepalive{
			KeepaliveTime: wrapperspb.UInt32(10), KeepaliveInterval: wrapperspb.UInt32(5), KeepaliveProbes: wrapperspb.UInt32(3),
		}},
		IgnoreHealthOnHostRemoval: true,
	}
}

// outboundEndpoints are the replicas of this cluster first, then gateways of
// other clusters: those of this region, those of others, and last those of
// clusters that the federation does not hear.
func outboundEndpoints(name string, g *model.Graph, s *model.Service, port model.Port, revision string) *endpointv3.ClusterLoadAssignment {
	out := assignment(name)
	if local := localEndpoints(g, s, port, revision); len(local) > 0 {
		out.Endpoints = local
	}
	tiers := [3][]model.Remote{}
	for _, r := range s.Remotes {
		switch {
		case r.Ready[model.PortRevision{Port: port.Name, Revision: revision}] <= 0 || len(r.Gateways) == 0:
		case !r.Healthy:
			tiers[2] = append(tiers[2], r)
		case r.Region == g.Region:
			tiers[0] = append(tiers[0], r)
		default:
			tiers[1] = append(tiers[1], r)
		}
	}
	priority := uint32(min(len(out.GetEndpoints()), 1))
	for _, tier := range tiers {
		for _, r := range tier {
			ready := r.Ready[model.PortRevision{Port: port.Name, Revision: revision}]
			l := &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: r.Region, SubZone: r.Cluster}, Priority: priority}
			for _, gw := range r.Gateways {
				e := endpoint(gw, corev3.HealthStatus_HEALTHY)
				e.LoadBalancingWeight = wrapperspb.UInt32(uint32(max(ready*10/len(r.Gateways), 1)))
				l.LbEndpoints = append(l.LbEndpoints, e)
			}
			out.Endpoints = append(out.Endpoints, l)
		}
		if len(tier) > 0 {
			priority++
		}
	}
	return out
}

// assignment is an endpoint set that prefers a priority as long as a hundredth
// of it is healthy: endpoints that drain during an update must not send traffic
// to another region.
func assignment(name string) *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{
		ClusterName: name,
		Policy:      &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: wrapperspb.UInt32(10_000)},
	}
}

// localEndpoints are the replicas of this cluster by zone, at priority 0.
func localEndpoints(g *model.Graph, s *model.Service, port model.Port, revision string) []*endpointv3.LocalityLbEndpoints {
	var out []*endpointv3.LocalityLbEndpoints
	for _, e := range s.Endpoints {
		if revision != "" && e.Revision != revision || revision == "" && e.Standby {
			continue
		}
		zone := cmp.Or(e.Zone, g.Zone)
		i := slices.IndexFunc(out, func(l *endpointv3.LocalityLbEndpoints) bool { return l.GetLocality().GetZone() == zone })
		if i < 0 {
			i = len(out)
			out = append(out, &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: g.Region, Zone: zone}})
		}
		health := corev3.HealthStatus_HEALTHY
		if e.Draining {
			health = corev3.HealthStatus_DRAINING
		}
		out[i].LbEndpoints = append(out[i].LbEndpoints, endpoint(netip.AddrPortFrom(e.Address, port.Target), health))
	}
	slices.SortFunc(out, func(a, b *endpointv3.LocalityLbEndpoints) int {
		return cmp.Compare(a.GetLocality().GetZone(), b.GetLocality().GetZone())
	})
	return out
}

func endpoint(a netip.AddrPort, health corev3.HealthStatus) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socket(a.Addr().String(), a.Port())}},
		HealthStatus:   health,
	}
}

func inboundName(s model.Served) string { return fmt.Sprintf("inbound/%d", s.Target) }

// inboundCluster leads to the application over lo.
func inboundCluster(s model.Served) *clusterv3.Cluster {
	name := inboundName(s)
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{endpoint(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.Target), corev3.HealthStatus_UNKNOWN)},
		}}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: wrapperspb.UInt32(10_000), MaxPendingRequests: wrapperspb.UInt32(10_000), MaxRequests: wrapperspb.UInt32(10_000),
			MaxRetries: wrapperspb.UInt32(100),
		}}},
	}
	if s.HTTP {
		c.TypedExtensionProtocolOptions = httpOptions(&httpv3.HttpProtocolOptions{
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(appIdle)},
			UpstreamProtocolOptions:   sameProtocol(false),
		})
	}
	return c
}

// authorizer is the warden on its Unix socket.
func authorizer(path string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 authorizerCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: authorizerCluster, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}},
			}}}},
		}}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxPendingRequests: wrapperspb.UInt32(10_000), MaxRequests: wrapperspb.UInt32(10_000), MaxRetries: wrapperspb.UInt32(10_000),
		}}},
		TypedExtensionProtocolOptions: httpOptions(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
			}},
		}),
	}
}

// sameProtocol speaks upstream what the downstream spoke, so that HTTP/1.1 and
// gRPC applications are both reached as they expect. A ping finds dead HTTP/2
// connections to other machines.
func sameProtocol(ping bool) *httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig {
	h2 := http2Options()
	if ping {
		h2.ConnectionKeepalive = &corev3.KeepaliveSettings{Interval: durationpb.New(10 * time.Second), Timeout: durationpb.New(5 * time.Second)}
	}
	return &httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{UseDownstreamProtocolConfig: &httpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
		HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: h2,
	}}
}

func http2Options() *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		MaxConcurrentStreams: wrapperspb.UInt32(1000), InitialStreamWindowSize: wrapperspb.UInt32(256 << 10), InitialConnectionWindowSize: wrapperspb.UInt32(1 << 20),
	}
}

func httpOptions(o *httpv3.HttpProtocolOptions) map[string]*anypb.Any {
	return map[string]*anypb.Any{httpOptionsName: pack(o)}
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func socket(address string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}

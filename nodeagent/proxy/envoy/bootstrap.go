package envoy

import (
	"fmt"
	"path/filepath"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	downstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	heapv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/fixed_heap/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/portolan-io/portolan/nodeagent/proxy"
)

// WardenCluster is the static cluster of the warden's socket: discovery and
// authorization go there.
const WardenCluster = "warden"

// Bounds of one proxy.
const (
	maxHeapBytes   = 512 << 20
	maxConnections = 20_000
)

// bootstrap is the whole static configuration: where the warden is, who the
// proxy is, what it may use. Paths are relative to the proxy's directory, which
// is its working directory, because a socket's path is short.
func bootstrap(s proxy.Spec) ([]byte, error) {
	meta, err := structpb.NewStruct(map[string]any{
		"role": s.Role, "tenant": s.Tenant, "workload": s.Workload, "revision": s.Revision, "cluster": s.Cluster, "node": s.Node,
	})
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	warden, err := wardenCluster(socketPath(s))
	if err != nil {
		return nil, err
	}
	overload, err := overloadManager()
	if err != nil {
		return nil, err
	}
	ads := &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
		// Not live before it is configured, however long that takes.
		InitialFetchTimeout: durationpb.New(0),
	}
	b := &bootstrapv3.Bootstrap{
		Node: &corev3.Node{
			Id: s.ID, Cluster: s.Workload + "." + s.Tenant, Metadata: meta,
			Locality: &corev3.Locality{Region: s.Region, Zone: s.Zone, SubZone: s.Cluster},
		},
		Admin: &bootstrapv3.Admin{Address: pipe(proxy.AdminSocketFile, 0o600)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: &corev3.ApiConfigSource{
				ApiType: corev3.ApiConfigSource_DELTA_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
				SetNodeOnFirstMessageOnly: true,
				GrpcServices:              []*corev3.GrpcService{wardenService()},
			},
			CdsConfig: ads, LdsConfig: proto.CloneOf(ads),
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{warden}},
		OverloadManager: overload,
	}
	out, err := protojson.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("marshal bootstrap: %w", err)
	}
	return out, nil
}

// socketPath is relative when the socket lies in the proxy's directory.
func socketPath(s proxy.Spec) string {
	if filepath.Dir(s.XDSSocket) == filepath.Clean(s.Dir) {
		return filepath.Base(s.XDSSocket)
	}
	return s.XDSSocket
}

func wardenService() *corev3.GrpcService {
	return &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{
		ClusterName: WardenCluster,
		// After an outage of the warden the default backs off for many seconds.
		RetryPolicy: &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{
			BaseInterval: durationpb.New(100 * time.Millisecond), MaxInterval: durationpb.New(time.Second),
		}},
	}}}
}

func wardenCluster(path string) (*clusterv3.Cluster, error) {
	options, err := anypb.New(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
				// A warden that hangs is noticed; one that is gone resets at once.
				ConnectionKeepalive: &corev3.KeepaliveSettings{Interval: durationpb.New(5 * time.Second), Timeout: durationpb.New(2 * time.Second)},
			}},
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("options of the warden's cluster: %w", err)
	}
	return &clusterv3.Cluster{
		Name:                 WardenCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(time.Second),
		// The threshold keeps thousands of parked authorizations from being refused.
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxRequests: wrapperspb.UInt32(16384), MaxPendingRequests: wrapperspb.UInt32(16384),
		}}},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: WardenCluster,
			Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: pipe(path, 0)}},
			}}}},
		},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
	}, nil
}

func overloadManager() (*overloadv3.OverloadManager, error) {
	heap, err := anypb.New(&heapv3.FixedHeapConfig{MaxHeapSizeBytes: maxHeapBytes})
	if err != nil {
		return nil, fmt.Errorf("heap monitor: %w", err)
	}
	conns, err := anypb.New(&downstreamv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: maxConnections})
	if err != nil {
		return nil, fmt.Errorf("connection monitor: %w", err)
	}
	at := func(value float64) []*overloadv3.Trigger {
		return []*overloadv3.Trigger{{
			Name:         "envoy.resource_monitors.fixed_heap",
			TriggerOneof: &overloadv3.Trigger_Threshold{Threshold: &overloadv3.ThresholdTrigger{Value: value}},
		}}
	}
	return &overloadv3.OverloadManager{
		RefreshInterval: durationpb.New(250 * time.Millisecond),
		ResourceMonitors: []*overloadv3.ResourceMonitor{
			{Name: "envoy.resource_monitors.fixed_heap", ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: heap}},
			{Name: "envoy.resource_monitors.global_downstream_max_connections", ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: conns}},
		},
		Actions: []*overloadv3.OverloadAction{
			{Name: "envoy.overload_actions.shrink_heap", Triggers: at(0.90)},
			{Name: "envoy.overload_actions.stop_accepting_requests", Triggers: at(0.98)},
		},
	}, nil
}

func pipe(path string, mode uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: mode}}}
}

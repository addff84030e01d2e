package proxytest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Harness is what the suite needs of one implementation.
type Harness struct {
	Proxies proxy.Proxies
	// Spec of a proxy by ID, complete but for nothing.
	Spec func(id string) proxy.Spec
	// Listen opens the socket that the spec names.
	Listen func(t *testing.T, spec proxy.Spec) net.Listener
}

// Run checks what every proxy.Proxies promises. open gives a fresh one.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	t.Helper()
	t.Run("live once configured, and active is what was served", func(t *testing.T) { testConfigured(t, open(t)) })
	t.Run("not live before it is configured", func(t *testing.T) { testUnconfigured(t, open(t)) })
	t.Run("start is idempotent", func(t *testing.T) { testIdempotent(t, open(t)) })
	t.Run("a refused resource leaves the last good one active", func(t *testing.T) { testRefused(t, open(t)) })
	t.Run("configuration survives an outage of its server", func(t *testing.T) { testOutage(t, open(t)) })
	t.Run("drain keeps the process", func(t *testing.T) { testDrain(t, open(t)) })
	t.Run("requests are counted from zero", func(t *testing.T) { testRequests(t, open(t)) })
	t.Run("unknown and impossible", func(t *testing.T) { testUnknown(t, open(t)) })
}

func testConfigured(t *testing.T, h Harness) {
	s := start(t, h)
	s.configure("v1")
	s.live()
	s.active(RouteType, "routes")
	before := s.served[RouteType]["routes"].version
	s.configure("v2")
	if s.served[RouteType]["routes"].version == before {
		t.Fatal("the suite serves the same version twice")
	}
	s.active(RouteType, "routes")
	s.active(ClusterType, "upstream")
	s.active(ListenerType, "inbound")
	s.remove(ListenerType, "inbound")
	s.eventually("the removed listener is gone", func() bool {
		a, err := h.Proxies.Active(t.Context(), "web-1")
		return err == nil && a[ListenerType]["inbound"] == ""
	})
}

func testUnconfigured(t *testing.T, h Harness) {
	s := start(t, h)
	s.eventually("it runs and has asked", func() bool {
		st, err := h.Proxies.Status(t.Context(), "web-1")
		return err == nil && st.Running && s.asked()
	})
	if st, err := h.Proxies.Status(t.Context(), "web-1"); err != nil || st.Live {
		t.Fatalf("status %+v, error %v: live without configuration", st, err)
	}
	s.configure("v1")
	s.live()
}

func testIdempotent(t *testing.T, h Harness) {
	s := start(t, h)
	s.configure("v1")
	s.live()
	first, err := h.Proxies.Status(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Proxies.Start(t.Context(), h.Spec("web-1")); err != nil {
		t.Fatal(err)
	}
	second, err := h.Proxies.Status(t.Context(), "web-1")
	if err != nil || second.Pid != first.Pid || second.Restarts != 0 {
		t.Fatalf("after the second start %+v, before %+v, error %v", second, first, err)
	}
	if ids, err := h.Proxies.List(t.Context()); err != nil || !slices.Equal(ids, []string{"web-1"}) {
		t.Fatalf("list is %q, error %v", ids, err)
	}
	for range 2 {
		if err := h.Proxies.Stop(t.Context(), "web-1"); err != nil {
			t.Fatal(err)
		}
	}
	if ids, err := h.Proxies.List(t.Context()); err != nil || len(ids) != 0 {
		t.Fatalf("after the stop the list is %q, error %v", ids, err)
	}
}

func testRefused(t *testing.T, h Harness) {
	s := start(t, h)
	s.configure("v1")
	s.live()
	s.active(ListenerType, "inbound")
	good := s.served[ListenerType]["inbound"].version
	// A listener without an address can be parsed, but never taken.
	if f, ok := h.Proxies.(*Fake); ok {
		if err := f.Refuse("web-1", func(_, name string) string {
			if name == "inbound" {
				return "it has no address"
			}
			return ""
		}); err != nil {
			t.Fatal(err)
		}
	}
	s.put(ListenerType, "inbound", &listenerv3.Listener{Name: "inbound"})
	s.eventually("the refusal is reported", func() bool { return s.refusals() > 0 })
	a, err := h.Proxies.Active(t.Context(), "web-1")
	if err != nil || a[ListenerType]["inbound"] != good {
		t.Fatalf("active listener is %q, want %q, error %v", a[ListenerType]["inbound"], good, err)
	}
}

func testOutage(t *testing.T, h Harness) {
	s := start(t, h)
	s.configure("v1")
	s.live()
	s.active(RouteType, "routes")
	s.stop()
	if a, err := h.Proxies.Active(t.Context(), "web-1"); err != nil || a[RouteType]["routes"] == "" {
		t.Fatalf("active is %v, error %v", a, err)
	}
	s.listen()
	s.configure("v2")
	s.active(RouteType, "routes")
	if !s.resumed() {
		t.Error("it did not say what it knows")
	}
}

func testDrain(t *testing.T, h Harness) {
	s := start(t, h)
	s.configure("v1")
	s.live()
	before, err := h.Proxies.Status(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Proxies.Drain(t.Context(), "web-1"); err != nil {
		t.Fatal(err)
	}
	after, err := h.Proxies.Status(t.Context(), "web-1")
	if err != nil || after.Pid != before.Pid || !after.Running {
		t.Fatalf("after draining %+v, before %+v, error %v", after, before, err)
	}
	if err := h.Proxies.Drain(t.Context(), "nobody"); err != nil {
		t.Errorf("draining what does not run: %v", err)
	}
}

func testRequests(t *testing.T, h Harness) {
	m, ok := h.Proxies.(proxy.Meter)
	if !ok {
		t.Skip("these proxies do not count requests")
	}
	s := start(t, h)
	s.configure("v1")
	s.live()
	if n, err := m.Requests(t.Context(), "web-1"); err != nil || n != 0 {
		t.Errorf("a proxy that nobody called took %d requests, %v", n, err)
	}
	if _, err := m.Requests(t.Context(), "nobody"); api.KindOf(err) != api.Unavailable {
		t.Errorf("requests of nobody: %v, want Unavailable", err)
	}
}

func testUnknown(t *testing.T, h Harness) {
	if _, err := h.Proxies.Status(t.Context(), "nobody"); api.KindOf(err) != api.NotFound {
		t.Errorf("status of nobody: %v, want NotFound", err)
	}
	if _, err := h.Proxies.Active(t.Context(), "nobody"); api.KindOf(err) != api.Unavailable {
		t.Errorf("active of nobody: %v, want Unavailable", err)
	}
	if err := h.Proxies.Stop(t.Context(), "nobody"); err != nil {
		t.Errorf("stop of nobody: %v", err)
	}
	if err := h.Proxies.Start(t.Context(), proxy.Spec{}); api.KindOf(err) != api.Invalid {
		t.Errorf("start without an ID: %v, want Invalid", err)
	}
}

// source serves one proxy; it is a small server of the protocol, apart from the
// product's.
type source struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	t    *testing.T
	h    Harness
	spec proxy.Spec
	grpc *grpc.Server
	done chan struct{}

	mu      sync.Mutex
	served  map[string]map[string]resource
	changed chan struct{}
	nacks   int
	asks    int
	knew    bool
}

type resource struct {
	version string
	body    *anypb.Any
}

// start runs the proxy web-1 against a source that has nothing yet.
func start(t *testing.T, h Harness) *source {
	t.Helper()
	const id = "web-1"
	s := &source{t: t, h: h, spec: h.Spec(id), served: map[string]map[string]resource{}, changed: make(chan struct{})}
	s.listen()
	t.Cleanup(s.stop)
	t.Cleanup(func() {
		if err := h.Proxies.Stop(context.Background(), id); err != nil {
			t.Error(err)
		}
	})
	if err := h.Proxies.Start(t.Context(), s.spec); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *source) listen() {
	l := s.h.Listen(s.t, s.spec)
	g, done := grpc.NewServer(), make(chan struct{})
	discovery.RegisterAggregatedDiscoveryServiceServer(g, s)
	s.grpc, s.done = g, done
	go func() { defer close(done); _ = g.Serve(l) }()
}

func (s *source) stop() {
	s.grpc.Stop()
	<-s.done
}

// configure serves a listener, its routes and a cluster; tag tells versions of
// the routes apart.
func (s *source) configure(tag string) {
	s.t.Helper()
	router := packed(s.t, &routerv3.Router{})
	hcm := &hcmv3.HttpConnectionManager{
		StatPrefix: "test",
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: "routes", ConfigSource: &corev3.ConfigSource{
			ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}, ResourceApiVersion: corev3.ApiVersion_V3,
		}}},
		HttpFilters: []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: router}}},
	}
	s.put(ClusterType, "upstream", &clusterv3.Cluster{
		Name: "upstream", ConnectTimeout: durationpb.New(time.Second),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: "upstream", Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address(9)}}}},
		}}},
	})
	s.put(ListenerType, "inbound", &listenerv3.Listener{
		Name: "inbound", Address: address(0),
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
			Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed(s.t, hcm)},
		}}}},
	})
	s.put(RouteType, "routes", &routev3.RouteConfiguration{Name: "routes", VirtualHosts: []*routev3.VirtualHost{{
		Name: tag, Domains: []string{"*"},
		Routes: []*routev3.Route{{
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "upstream"}}},
		}},
	}}})
}

func address(port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func packed(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (s *source) put(typeURL, name string, m proto.Message) {
	s.t.Helper()
	a := packed(s.t, m)
	version, err := distribute.VersionOf(m)
	if err != nil {
		s.t.Fatal(err)
	}
	s.change(func() {
		if s.served[typeURL] == nil {
			s.served[typeURL] = map[string]resource{}
		}
		s.served[typeURL][name] = resource{version: version, body: a}
	})
}

func (s *source) remove(typeURL, name string) {
	s.change(func() { delete(s.served[typeURL], name) })
}

func (s *source) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *source) asked() bool   { s.mu.Lock(); defer s.mu.Unlock(); return s.asks > 0 }
func (s *source) refusals() int { s.mu.Lock(); defer s.mu.Unlock(); return s.nacks }
func (s *source) resumed() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.knew }

func (s *source) live() {
	s.t.Helper()
	s.eventually("it is live", func() bool {
		st, err := s.h.Proxies.Status(s.t.Context(), s.spec.ID)
		return err == nil && st.Running && st.Live && st.Pid != 0
	})
}

// active waits until what is served is active.
func (s *source) active(typeURL, name string) {
	s.t.Helper()
	s.mu.Lock()
	want := s.served[typeURL][name].version
	s.mu.Unlock()
	s.eventually(fmt.Sprintf("%s is active at %s", name, want), func() bool {
		a, err := s.h.Proxies.Active(s.t.Context(), s.spec.ID)
		return err == nil && a[typeURL][name] == want
	})
}

func (s *source) eventually(what string, ok func() bool) {
	s.t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			s.t.Fatalf("not in time: %s", what)
		case <-tick.C:
		}
	}
}

// DeltaAggregatedResources serves types in Envoy's order of need, each time
// something changed.
func (s *source) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	requests := make(chan *discovery.DeltaDiscoveryRequest)
	ended := make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- r:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	known := map[string]map[string]string{}
	for nonce := 1; ; nonce++ {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		for _, t := range order {
			resp := s.response(t, known)
			if resp == nil {
				continue
			}
			resp.Nonce = fmt.Sprintf("%s/%d", t, nonce)
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		select {
		case err := <-ended:
			return err
		case <-changed:
		case r := <-requests:
			s.request(r, known)
		}
	}
}

func (s *source) request(r *discovery.DeltaDiscoveryRequest, known map[string]map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asks++
	if r.GetErrorDetail() != nil {
		s.nacks++
	}
	if known[r.GetTypeUrl()] == nil {
		known[r.GetTypeUrl()] = map[string]string{}
		maps.Copy(known[r.GetTypeUrl()], r.GetInitialResourceVersions())
		s.knew = s.knew || len(r.GetInitialResourceVersions()) > 0
	}
}

// response is what the proxy does not know of one type; nil when nothing, or
// when it did not ask, or when the source has nothing at all yet.
func (s *source) response(t string, known map[string]map[string]string) *discovery.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known[t] == nil || s.served[t] == nil {
		return nil
	}
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: t}
	for name, r := range s.served[t] {
		if known[t][name] != r.version {
			resp.Resources = append(resp.Resources, &discovery.Resource{Name: name, Version: r.version, Resource: r.body})
			known[t][name] = r.version
		}
	}
	for name := range known[t] {
		if _, ok := s.served[t][name]; !ok {
			resp.RemovedResources = append(resp.RemovedResources, name)
			delete(known[t], name)
		}
	}
	if len(resp.GetResources())+len(resp.GetRemovedResources()) == 0 {
		return nil
	}
	return resp
}

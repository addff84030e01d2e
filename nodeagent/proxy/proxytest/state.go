package proxytest

import (
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs, in the order in which Envoy asks for them.
const (
	prefix       = "type.googleapis.com/"
	ClusterType  = prefix + "envoy.config.cluster.v3.Cluster"
	EndpointType = prefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType = prefix + "envoy.config.listener.v3.Listener"
	RouteType    = prefix + "envoy.config.route.v3.RouteConfiguration"
	SecretType   = prefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
)

var order = []string{ClusterType, EndpointType, ListenerType, RouteType, SecretType}

// accepted is a resource that was taken.
type accepted struct {
	version string
	message proto.Message
}

// state is what one life of a proxy knows. Under its instance's mu.
type state struct {
	// have is what was accepted, by type and name.
	have map[string]map[string]accepted
	// active are listeners and clusters that took over; the other types are active
	// as soon as they are accepted.
	active map[string]map[string]accepted
	// answered are types whose first response came.
	answered map[string]bool
}

func newState() *state {
	s := &state{have: map[string]map[string]accepted{}, active: map[string]map[string]accepted{}, answered: map[string]bool{}}
	for _, t := range order {
		s.have[t] = map[string]accepted{}
	}
	s.active[ClusterType], s.active[ListenerType] = map[string]accepted{}, map[string]accepted{}
	return s
}

// parse makes the message of a resource; an error is a reason to refuse.
func parse(typeURL string, r *discovery.Resource) (proto.Message, error) {
	var m proto.Message
	switch typeURL {
	case ClusterType:
		m = &clusterv3.Cluster{}
	case EndpointType:
		m = &endpointv3.ClusterLoadAssignment{}
	case ListenerType:
		m = &listenerv3.Listener{}
	case RouteType:
		m = &routev3.RouteConfiguration{}
	case SecretType:
		m = &tlsv3.Secret{}
	}
	return m, proto.Unmarshal(r.GetResource().GetValue(), m)
}

// settle lets take over what has all it needs. Resources that wait keep the one
// before active, like Envoy's warming does.
func (s *state) settle(warming bool) {
	for _, t := range []string{ClusterType, ListenerType} {
		for name := range s.active[t] {
			if _, ok := s.have[t][name]; !ok {
				delete(s.active[t], name)
			}
		}
		if warming {
			continue
		}
		for name, a := range s.have[t] {
			if s.complete(a.message) {
				s.active[t][name] = a
			}
		}
	}
}

// complete says that everything a listener or cluster refers to has arrived.
func (s *state) complete(m proto.Message) bool {
	for t, names := range references(m) {
		for _, n := range names {
			if _, ok := s.have[t][n]; !ok {
				return false
			}
		}
	}
	return true
}

// wanted are the names to subscribe to, by type; listeners and clusters are
// taken whole.
func (s *state) wanted() map[string][]string {
	sets := map[string]map[string]bool{EndpointType: {}, RouteType: {}, SecretType: {}}
	for _, t := range []string{ClusterType, ListenerType} {
		for _, a := range s.have[t] {
			for rt, names := range references(a.message) {
				for _, n := range names {
					sets[rt][n] = true
				}
			}
		}
	}
	out := map[string][]string{ClusterType: {"*"}, ListenerType: {"*"}}
	for t, set := range sets {
		out[t] = slices.Sorted(maps.Keys(set))
	}
	return out
}

// live says that the initial configuration is there and active.
func (s *state) live() bool {
	return s.answered[ClusterType] && s.answered[ListenerType] &&
		len(s.active[ClusterType]) == len(s.have[ClusterType]) && len(s.active[ListenerType]) == len(s.have[ListenerType])
}

func (s *state) versions() map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, t := range order {
		out[t] = map[string]string{}
		source := s.have[t]
		if active, ok := s.active[t]; ok {
			source = active
		}
		for name, a := range source {
			out[t][name] = a.version
		}
	}
	return out
}

// references are the names of other resources in a cluster or listener.
func references(m proto.Message) map[string][]string {
	out := map[string][]string{}
	switch x := m.(type) {
	case *clusterv3.Cluster:
		if x.GetType() == clusterv3.Cluster_EDS {
			name := x.GetEdsClusterConfig().GetServiceName()
			if name == "" {
				name = x.GetName()
			}
			out[EndpointType] = append(out[EndpointType], name)
		}
		if up := (&tlsv3.UpstreamTlsContext{}); unpack(x.GetTransportSocket().GetTypedConfig(), up) {
			out[SecretType] = append(out[SecretType], secretNames(up.GetCommonTlsContext())...)
		}
	case *listenerv3.Listener:
		for _, c := range x.GetFilterChains() {
			if down := (&tlsv3.DownstreamTlsContext{}); unpack(c.GetTransportSocket().GetTypedConfig(), down) {
				out[SecretType] = append(out[SecretType], secretNames(down.GetCommonTlsContext())...)
			}
			for _, f := range c.GetFilters() {
				if hcm := (&hcmv3.HttpConnectionManager{}); unpack(f.GetTypedConfig(), hcm) && hcm.GetRds() != nil {
					out[RouteType] = append(out[RouteType], hcm.GetRds().GetRouteConfigName())
				}
			}
		}
	}
	return out
}

func secretNames(c *tlsv3.CommonTlsContext) []string {
	var out []string
	for _, s := range c.GetTlsCertificateSdsSecretConfigs() {
		out = append(out, s.GetName())
	}
	if s := c.GetValidationContextSdsSecretConfig(); s != nil {
		out = append(out, s.GetName())
	}
	if s := c.GetCombinedValidationContext().GetValidationContextSdsSecretConfig(); s != nil {
		out = append(out, s.GetName())
	}
	return out
}

func unpack(a *anypb.Any, m proto.Message) bool {
	return a != nil && a.MessageIs(m) && a.UnmarshalTo(m) == nil
}

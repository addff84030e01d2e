package proxytest

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

// Request is a call as the application makes it.
type Request struct {
	// To is the virtual IP and port; for an ingress any address.
	To      netip.AddrPort
	Host    string
	Method  string // empty: a TCP connection, or GET where the listener is HTTP
	Path    string
	Headers map[string]string
	// Pick decides between weights, and Turn between endpoints: [0,1) each. Equal
	// values give equal answers.
	Pick, Turn float64
}

// choice is where a listener sends a request.
type choice struct {
	status   int // of a direct answer; 0: go on to the endpoint
	cluster  string
	endpoint netip.AddrPort
	sni      string
	accepts  []string // identities of the callee
	http     bool
}

// outbound evaluates the listener of that name.
func (s *state) outbound(listener string, r Request, sni string) choice {
	l, ok := s.active[ListenerType][listener].message.(*listenerv3.Listener)
	if !ok {
		return choice{status: 503}
	}
	for _, c := range l.GetFilterChains() {
		if !chainMatches(c.GetFilterChainMatch(), r.To, sni) {
			continue
		}
		for _, f := range c.GetFilters() {
			hcm, tcp := &hcmv3.HttpConnectionManager{}, &tcpv3.TcpProxy{}
			if unpack(f.GetTypedConfig(), hcm) {
				out := s.route(hcm, r)
				out.http = true
				return out
			}
			if unpack(f.GetTypedConfig(), tcp) {
				return s.pick(tcpCluster(tcp, r.Pick), r)
			}
		}
	}
	return choice{status: 503}
}

func chainMatches(m *listenerv3.FilterChainMatch, to netip.AddrPort, sni string) bool {
	if p := m.GetDestinationPort(); p != nil && p.GetValue() != uint32(to.Port()) {
		return false
	}
	if len(m.GetPrefixRanges()) > 0 && !slices.ContainsFunc(m.GetPrefixRanges(), func(c *corev3.CidrRange) bool {
		a, err := netip.ParseAddr(c.GetAddressPrefix())
		return err == nil && netip.PrefixFrom(a, int(c.GetPrefixLen().GetValue())).Contains(to.Addr())
	}) {
		return false
	}
	if names := m.GetServerNames(); len(names) > 0 && !slices.Contains(names, sni) {
		return false
	}
	return m.GetTransportProtocol() != "tls" || sni != ""
}

func tcpCluster(t *tcpv3.TcpProxy, pick float64) string {
	wc := t.GetWeightedClusters().GetClusters()
	if len(wc) == 0 {
		return t.GetCluster()
	}
	weights := make([]uint32, len(wc))
	for i, c := range wc {
		weights[i] = c.GetWeight()
	}
	return wc[weighted(weights, pick)].GetName()
}

// weighted gives the index on which a value in [0,1) falls.
func weighted(weights []uint32, pick float64) int {
	var total uint64
	for _, w := range weights {
		total += uint64(w)
	}
	point := uint64(pick * float64(total))
	for i, w := range weights {
		if point < uint64(w) {
			return i
		}
		point -= uint64(w)
	}
	return len(weights) - 1
}

func (s *state) route(hcm *hcmv3.HttpConnectionManager, r Request) choice {
	rc, ok := s.have[RouteType][hcm.GetRds().GetRouteConfigName()].message.(*routev3.RouteConfiguration)
	if !ok {
		return choice{status: 404}
	}
	host := virtualHost(rc, r.Host)
	for _, route := range host.GetRoutes() {
		if !routeMatches(route.GetMatch(), r) {
			continue
		}
		if d := route.GetDirectResponse(); d != nil {
			return choice{status: int(d.GetStatus())}
		}
		a := route.GetRoute()
		cluster := a.GetCluster()
		if wc := a.GetWeightedClusters().GetClusters(); len(wc) > 0 {
			weights := make([]uint32, len(wc))
			for i, c := range wc {
				weights[i] = c.GetWeight().GetValue()
			}
			cluster = wc[weighted(weights, r.Pick)].GetName()
		}
		return s.pick(cluster, r)
	}
	return choice{status: 404}
}

// virtualHost prefers an exact name over "*". A port in the name is ignored.
func virtualHost(rc *routev3.RouteConfiguration, host string) *routev3.VirtualHost {
	bare, _, _ := strings.Cut(strings.ToLower(host), ":")
	var fallback *routev3.VirtualHost
	for _, v := range rc.GetVirtualHosts() {
		for _, d := range v.GetDomains() {
			name, _, _ := strings.Cut(strings.ToLower(d), ":")
			if name == bare && bare != "" {
				return v
			}
			if d == "*" {
				fallback = v
			}
		}
	}
	return fallback
}

func routeMatches(m *routev3.RouteMatch, r Request) bool {
	path, _, _ := strings.Cut(cmp.Or(r.Path, "/"), "?")
	switch p := m.GetPathSpecifier().(type) {
	case *routev3.RouteMatch_Prefix:
		if !strings.HasPrefix(path, p.Prefix) {
			return false
		}
	case *routev3.RouteMatch_Path:
		if path != p.Path {
			return false
		}
	case *routev3.RouteMatch_PathSeparatedPrefix:
		if path != p.PathSeparatedPrefix && !strings.HasPrefix(path, p.PathSeparatedPrefix+"/") {
			return false
		}
	}
	for _, h := range m.GetHeaders() {
		value, present := headerOf(r, h.GetName())
		if !present {
			return false
		}
		if sm := h.GetStringMatch(); sm != nil && sm.GetExact() != value {
			return false
		}
	}
	return true
}

func headerOf(r Request, name string) (string, bool) {
	switch name {
	case ":method":
		return cmp.Or(r.Method, "GET"), true
	case ":path":
		return cmp.Or(r.Path, "/"), true
	case ":authority":
		return r.Host, true
	}
	for k, v := range r.Headers {
		if strings.EqualFold(k, name) {
			return v, true
		}
	}
	return "", false
}

// pick takes an endpoint of the cluster: healthy ones of the best priority.
func (s *state) pick(cluster string, r Request) choice {
	c, ok := s.active[ClusterType][cluster].message.(*clusterv3.Cluster)
	if !ok {
		return choice{status: 503, cluster: cluster}
	}
	out := choice{cluster: cluster}
	if up := (&tlsv3.UpstreamTlsContext{}); unpack(c.GetTransportSocket().GetTypedConfig(), up) {
		out.sni = up.GetSni()
		for _, m := range up.GetCommonTlsContext().GetCombinedValidationContext().GetDefaultValidationContext().GetMatchTypedSubjectAltNames() {
			out.accepts = append(out.accepts, m.GetMatcher().GetExact())
		}
	}
	set := c.GetLoadAssignment()
	if c.GetType() == clusterv3.Cluster_EDS {
		set, _ = s.have[EndpointType][cmp.Or(c.GetEdsClusterConfig().GetServiceName(), cluster)].message.(*endpointv3.ClusterLoadAssignment)
	}
	usable := endpoints(set)
	if len(usable) == 0 {
		out.status = 503
		return out
	}
	out.endpoint = usable[min(int(r.Turn*float64(len(usable))), len(usable)-1)]
	return out
}

func endpoints(set *endpointv3.ClusterLoadAssignment) []netip.AddrPort {
	byPriority := map[uint32][]netip.AddrPort{}
	best, found := uint32(0), false
	for _, l := range set.GetEndpoints() {
		for _, e := range l.GetLbEndpoints() {
			if h := e.GetHealthStatus(); h != corev3.HealthStatus_UNKNOWN && h != corev3.HealthStatus_HEALTHY {
				continue
			}
			sa := e.GetEndpoint().GetAddress().GetSocketAddress()
			a, err := netip.ParseAddr(sa.GetAddress())
			if err != nil {
				continue
			}
			byPriority[l.GetPriority()] = append(byPriority[l.GetPriority()], netip.AddrPortFrom(a, uint16(sa.GetPortValue())))
			if !found || l.GetPriority() < best {
				best, found = l.GetPriority(), true
			}
		}
	}
	out := byPriority[best]
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}

package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
	"github.com/portolan-io/portolan/xds/distribute"
)

// maxDump bounds what is read of a configuration dump.
const maxDump = 64 << 20

// admin speaks to the admin interface on a Unix socket.
type admin struct{ path string }

func (a admin) do(ctx context.Context, method, target string) ([]byte, int, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return socket.Dial(ctx, a.path) },
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy"+target, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("admin %s: %w", target, err)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("admin %s: %w", target, err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxDump+1))
	if err != nil {
		return nil, 0, fmt.Errorf("admin %s: %w", target, err)
	}
	if len(body) > maxDump {
		return nil, 0, fmt.Errorf("admin %s: answer is larger than %d bytes", target, maxDump)
	}
	return body, res.StatusCode, nil
}

// ready says whether the proxy is live: it has its initial configuration.
func (a admin) ready(ctx context.Context) bool {
	_, code, err := a.do(ctx, http.MethodGet, "/ready")
	return err == nil && code == http.StatusOK
}

// drain makes the listeners leave gracefully; the process stays.
func (a admin) drain(ctx context.Context) error {
	body, code, err := a.do(ctx, http.MethodPost, "/drain_listeners?graceful&skip_exit")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("admin drain: status %d: %s", code, strings.TrimSpace(string(body)))
	}
	return nil
}

// Counters of xds/translate's inbound listener, over all ports.
const (
	inboundRequests = "http.inbound.downstream_rq_total"
	inboundActive   = "http.inbound.downstream_rq_active"
)

// requests reads how many there were, and how many are in flight; 0 while the proxy
// has no HTTP port.
func (a admin) requests(ctx context.Context) (total, active uint64, err error) {
	body, code, err := a.do(ctx, http.MethodGet, "/stats?filter=^http%5C.inbound%5C.downstream_rq_%28total%7Cactive%29$")
	if err != nil {
		return 0, 0, err
	}
	if code != http.StatusOK {
		return 0, 0, fmt.Errorf("admin stats: status %d", code)
	}
	for line := range strings.Lines(string(body)) {
		name, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch name {
		case inboundRequests:
			total, err = strconv.ParseUint(v, 10, 64)
		case inboundActive:
			active, err = strconv.ParseUint(v, 10, 64)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("admin stats: %w", err)
		}
	}
	return total, active, nil
}

// Callers that have not heard of the withdrawal yet still send; the workload is told
// to end when nothing was in flight and nothing new came for quietFor, or after
// quietBound: a stream that never ends may not hold it up.
const (
	quietFor   = 500 * time.Millisecond
	quietStep  = 100 * time.Millisecond
	quietBound = 5 * time.Second
)

// quiet returns when the inbound side has been idle for quietFor.
func (a admin) quiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, quietBound)
	defer cancel()
	tick := time.NewTicker(quietStep)
	defer tick.Stop()
	before, idle := uint64(0), time.Duration(0)
	for first := true; idle < quietFor; first = false {
		total, active, err := a.requests(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		idle += quietStep
		if first || active > 0 || total != before {
			idle = 0
		}
		before = total
		if total == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	return nil
}

func (a admin) active(ctx context.Context) (map[string]map[string]string, error) {
	body, code, err := a.do(ctx, http.MethodGet, "/config_dump?include_eds")
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("admin config dump: status %d", code)
	}
	return parseDump(body)
}

// The parts of envoy.admin.v3.ConfigDump that tell what is active. Warming and
// draining states are left out on purpose.
type configDump struct {
	Configs []struct {
		Type            string      `json:"@type"`
		Clusters        []dumped    `json:"dynamic_active_clusters"`
		Listeners       []dumpedLDS `json:"dynamic_listeners"`
		RouteConfigs    []dumped    `json:"dynamic_route_configs"`
		EndpointConfigs []dumped    `json:"dynamic_endpoint_configs"`
		Secrets         []dumped    `json:"dynamic_active_secrets"`
	} `json:"configs"`
}

type dumped struct {
	Name     string    `json:"name"`
	Version  string    `json:"version_info"`
	Cluster  dumpedRef `json:"cluster"`
	Route    dumpedRef `json:"route_config"`
	Endpoint dumpedRef `json:"endpoint_config"`
}

type dumpedRef struct {
	Name        string `json:"name"`
	ClusterName string `json:"cluster_name"`
}

type dumpedLDS struct {
	Name   string `json:"name"`
	Active *struct {
		Version  string          `json:"version_info"`
		Listener json.RawMessage `json:"listener"`
	} `json:"active_state"`
}

// version of a listener is that of its content: an update of filter chains in
// place leaves version_info as it was (seen in Envoy 1.40). What cannot be read
// here, for example an extension unknown to this binary, keeps version_info.
func (l dumpedLDS) version() string {
	m := &listenerv3.Listener{}
	// Envoy dumps an Any, which carries its own type.
	var raw map[string]json.RawMessage
	if json.Unmarshal(l.Active.Listener, &raw) != nil {
		return l.Active.Version
	}
	delete(raw, "@type")
	b, err := json.Marshal(raw)
	if err != nil || protojson.Unmarshal(b, m) != nil {
		return l.Active.Version
	}
	v, err := distribute.VersionOf(m)
	if err != nil {
		return l.Active.Version
	}
	return v
}

// Type URLs of the resources that Envoy takes.
const (
	typePrefix   = "type.googleapis.com/"
	clusterType  = typePrefix + "envoy.config.cluster.v3.Cluster"
	listenerType = typePrefix + "envoy.config.listener.v3.Listener"
	routeType    = typePrefix + "envoy.config.route.v3.RouteConfiguration"
	endpointType = typePrefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	secretType   = typePrefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
)

func parseDump(body []byte) (map[string]map[string]string, error) {
	var d configDump
	if err := json.Unmarshal(body, &d); err != nil {
		return nil, fmt.Errorf("parse config dump: %w", err)
	}
	if len(d.Configs) == 0 {
		return nil, errors.New("parse config dump: it is empty")
	}
	out := map[string]map[string]string{clusterType: {}, listenerType: {}, routeType: {}, secretType: {}}
	put := func(typeURL, name, version string) {
		if name == "" || version == "" {
			return
		}
		if out[typeURL] == nil {
			out[typeURL] = map[string]string{}
		}
		out[typeURL][name] = version
	}
	for _, c := range d.Configs {
		for _, x := range c.Clusters {
			put(clusterType, x.Cluster.Name, x.Version)
		}
		for _, x := range c.Listeners {
			if x.Active != nil {
				put(listenerType, x.Name, x.version())
			}
		}
		for _, x := range c.RouteConfigs {
			put(routeType, x.Route.Name, x.Version)
		}
		for _, x := range c.EndpointConfigs {
			put(endpointType, x.Endpoint.ClusterName, x.Version)
		}
		for _, x := range c.Secrets {
			put(secretType, x.Name, x.Version)
		}
	}
	return out, nil
}

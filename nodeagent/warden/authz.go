package warden

import (
	"context"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/policy"
)

// decideWithin bounds one decision; late means no.
const decideWithin = 1500 * time.Millisecond

// call is what is asked: who calls which port of which replica, and how.
type call struct {
	allocation string
	principal  string
	source     netip.AddrPort
	port       int
	// attributes of the request in opa-envoy-plugin's shape.
	attributes map[string]any
	http       bool
	request    string // method and path, for people
	path       string
}

// decide answers a call over one generation. It never says yes when anything is
// missing.
func (w *world) decide(ctx context.Context, c call) policy.Decision {
	replica := w.replicas[c.allocation]
	if replica == nil {
		return deny("portolan.replica", "replica "+c.allocation+" is not assigned to this node")
	}
	id, why := w.peer(c.principal)
	if why != "" {
		return deny("portolan.peer", why)
	}
	if w.authorizer == nil {
		return deny("portolan.policy", "no policy allows anything")
	}
	ctx, cancel := context.WithTimeout(ctx, decideWithin)
	defer cancel()
	d := w.authorizer.Authorize(ctx, w.networkInput(c, id, replica))
	if ctx.Err() != nil && d.Allowed {
		return deny("portolan.policy", "the decision came too late")
	}
	return d
}

func deny(rule, message string) policy.Decision {
	return policy.Decision{Denials: []policy.Denial{{Rule: rule, Message: message}}}
}

func (w *world) networkInput(c call, source identity.ID, replica *nodev1.Assignment) policy.Network {
	service, port := w.served(replica, c.port)
	in := policy.Network{
		Attributes: c.attributes, Service: service, Port: c.port, Protocol: "tcp",
		Source: policy.Peer{
			SPIFFEID: c.principal, Cluster: w.clusterOf(source), Tenant: source.Tenant, Workload: source.Workload,
			Address: c.source.Addr().String(),
		},
	}
	if source.Kind == identity.Gateway {
		in.Source.Tenant, in.Source.Workload = "system", source.Name
	}
	if port != nil {
		in.Port = int(port.GetPort())
	}
	own := w.identityOf(replica)
	in.Destination = policy.Peer{
		SPIFFEID: own.String(), Cluster: w.clusterOf(own), Tenant: replica.GetTenant(), Workload: replica.GetWorkload(),
		Address: replica.GetAddress(),
	}
	if c.http {
		in.Protocol = "http"
		in.ParsedPath, in.ParsedQuery = parsePath(c.path)
	}
	return in
}

// parsePath splits like opa-envoy-plugin: "/a/b?c=d" is ["a","b"], {c: [d]}.
func parsePath(raw string) ([]string, map[string][]string) {
	path, query, _ := strings.Cut(raw, "?")
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for i, s := range segments {
		if u, err := url.PathUnescape(s); err == nil {
			segments[i] = u
		}
	}
	values, err := url.ParseQuery(query)
	if err != nil || values == nil {
		values = url.Values{}
	}
	return segments, values
}

// Check implements envoy.service.auth.v3.Authorization for requests and for
// connections.
func (w *Warden) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	allocation, ok := allocationOf(ctx)
	if !ok {
		return denied(deny("portolan.replica", "the question came on no replica's socket"), false), nil
	}
	c := callOf(allocation, req.GetAttributes())
	for {
		wd := w.world.Load()
		if wd == nil {
			return denied(deny("portolan.policy", "no generation is loaded"), c.http), nil
		}
		d := wd.decide(ctx, c)
		if d.Allowed && !c.http {
			if !w.conns.add(c) {
				d = deny("portolan.limit", "too many open connections to this replica")
			} else if w.world.Load() != wd {
				// The generation changed meanwhile, and may not have seen this connection.
				w.conns.drop(c)
				continue
			}
		}
		w.decisions.note(wd, c, d)
		if d.Allowed {
			return allowed(c.http), nil
		}
		return denied(d, c.http), nil
	}
}

func callOf(allocation string, a *authv3.AttributeContext) call {
	c := call{allocation: allocation, principal: a.GetSource().GetPrincipal(), source: addrPort(a.GetSource())}
	c.port = int(a.GetDestination().GetAddress().GetSocketAddress().GetPortValue())
	c.attributes = map[string]any{
		"source": peerAttributes(a.GetSource()), "destination": peerAttributes(a.GetDestination()),
		"contextExtensions": stringMap(a.GetContextExtensions()),
	}
	h := a.GetRequest().GetHttp()
	if h == nil || h.GetMethod() == "" {
		return c
	}
	c.http, c.path = true, h.GetPath()
	path, _, _ := strings.Cut(c.path, "?")
	c.request = h.GetMethod() + " " + path
	request := map[string]any{"http": map[string]any{
		"id": h.GetId(), "method": h.GetMethod(), "headers": stringMap(h.GetHeaders()), "path": h.GetPath(), "host": h.GetHost(),
		"scheme": h.GetScheme(), "protocol": h.GetProtocol(), "size": strconv.FormatInt(h.GetSize(), 10), "body": h.GetBody(),
	}}
	if t := a.GetRequest().GetTime(); t != nil {
		request["time"] = t.AsTime().Format(time.RFC3339Nano)
	}
	c.attributes["request"] = request
	return c
}

func peerAttributes(p *authv3.AttributeContext_Peer) map[string]any {
	s := p.GetAddress().GetSocketAddress()
	return map[string]any{
		"address":   map[string]any{"socketAddress": map[string]any{"address": s.GetAddress(), "portValue": int(s.GetPortValue())}},
		"principal": p.GetPrincipal(),
	}
}

func stringMap(m map[string]string) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

func addrPort(p *authv3.AttributeContext_Peer) netip.AddrPort {
	s := p.GetAddress().GetSocketAddress()
	a, err := netip.ParseAddr(s.GetAddress())
	if err != nil || s.GetPortValue() > 65535 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(s.GetPortValue()))
}

func allowed(http bool) *authv3.CheckResponse {
	r := &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.OK)}}
	if http {
		r.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}
	}
	return r
}

// denied gives the policy's own answer when it set one. Reasons stay here: the
// caller learns that it was refused, the callee's owner reads why.
func denied(d policy.Decision, http bool) *authv3.CheckResponse {
	r := &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.PermissionDenied)}}
	if !http {
		return r
	}
	code := typev3.StatusCode_Forbidden
	if d.HTTPStatus >= 400 && d.HTTPStatus < 600 {
		code = typev3.StatusCode(d.HTTPStatus)
	}
	body := d.Body
	if body == "" {
		body = "denied by policy\n"
	}
	out := &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: code}, Body: body}
	for k, v := range d.Headers {
		out.Headers = append(out.Headers, &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: k, Value: v}})
	}
	r.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: out}
	return r
}

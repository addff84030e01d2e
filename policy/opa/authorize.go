package opa

import (
	"context"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/portolan-io/portolan/policy"
)

const (
	networkRule = "data.portolan.network.allow"

	defaultStatus = 403
	maxHeaders    = 32
	maxHeader     = 4 << 10
	maxBody       = 16 << 10
)

// Authorize asks every guardrail bundle and every bundle of the callee's tenant;
// all must allow. A guardrail only takes away: where the callee's tenant has no
// bundle the answer is no. The first that refuses says with what status, headers
// and body.
func (s *Set) Authorize(ctx context.Context, in policy.Network) policy.Decision {
	guardrails, own := s.network[""], s.network[in.Destination.Tenant]
	if in.Destination.Tenant == "" {
		own = nil
	}
	late := policy.Denial{Rule: networkRule}
	switch {
	case len(guardrails) > 0:
		late.Bundle = guardrails[0].name
	case len(own) > 0:
		late.Bundle = own[0].name
	default:
		late.Message = "no network policy applies"
		return policy.Decision{Denials: []policy.Denial{late}, HTTPStatus: defaultStatus}
	}
	input, err := networkInput(in)
	if err != nil {
		late.Message = "encode the input: " + err.Error()
		return policy.Decision{Denials: []policy.Denial{late}, HTTPStatus: defaultStatus}
	}
	d := s.bounded(ctx, late, func(c topdown.Cancel) policy.Decision {
		for _, programs := range [2][]*program{guardrails, own} {
			for _, p := range programs {
				if d := p.authorize(ctx, input, c); !d.Allowed {
					return d
				}
			}
		}
		if len(own) == 0 {
			return policy.Decision{Denials: []policy.Denial{{Rule: networkRule, Message: "no network policy of the callee's tenant applies"}}}
		}
		return policy.Decision{Allowed: true}
	})
	if !d.Allowed && d.HTTPStatus == 0 {
		d.HTTPStatus = defaultStatus
	}
	return d
}

func (p *program) authorize(ctx context.Context, input *ast.Term, cancel topdown.Cancel) policy.Decision {
	if p.broken != "" {
		return policy.Decision{Denials: []policy.Denial{{Rule: networkRule, Bundle: p.name, Message: p.broken}}}
	}
	d := policy.Denial{Rule: networkRule, Bundle: p.name, Location: *p.allow}
	v, ok, err := p.eval(ctx, p.allowQuery, input, cancel, false)
	switch {
	case err != nil:
		return policy.Decision{Denials: []policy.Denial{p.failed(networkRule, *p.allow, err)}}
	case !ok:
		d.Message = "no allow rule applies"
		return policy.Decision{Denials: []policy.Denial{d}}
	}
	switch v := v.(type) {
	case ast.Boolean:
		if v {
			return policy.Decision{Allowed: true}
		}
		d.Message = "allow is false"
		return policy.Decision{Denials: []policy.Denial{d}}
	case ast.Object:
		return answer(v, d)
	}
	d.Message = "allow is neither a boolean nor an object"
	return policy.Decision{Denials: []policy.Denial{d}}
}

// answer reads opa-envoy-plugin's object: allowed, headers, http_status, body;
// and msg, the reason for the log.
func answer(o ast.Object, d policy.Denial) policy.Decision {
	if a := o.Get(ast.StringTerm("allowed")); a != nil && a.Value.Compare(ast.Boolean(true)) == 0 {
		return policy.Decision{Allowed: true}
	}
	if d.Message = text(o, "msg"); d.Message == "" {
		d.Message = "allow.allowed is not true"
	}
	out := policy.Decision{Denials: []policy.Denial{d}, Headers: headers(o)}
	if t := o.Get(ast.StringTerm("http_status")); t != nil {
		if n, ok := t.Value.(ast.Number); ok {
			if i, ok := n.Int(); ok && i >= 300 && i <= 599 {
				out.HTTPStatus = i
			}
		}
	}
	if out.Body = text(o, "body"); len(out.Body) > maxBody {
		out.Body = out.Body[:maxBody]
	}
	return out
}

// headers takes strings and arrays of strings; what cannot be a header is left
// out.
func headers(o ast.Object) map[string]string {
	t := o.Get(ast.StringTerm("headers"))
	if t == nil {
		return nil
	}
	h, ok := t.Value.(ast.Object)
	if !ok {
		return nil
	}
	out := map[string]string{}
	h.Foreach(func(k, v *ast.Term) {
		name, ok := k.Value.(ast.String)
		if !ok || len(out) == maxHeaders {
			return
		}
		var value string
		switch v := v.Value.(type) {
		case ast.String:
			value = string(v)
		case *ast.Array:
			var parts []string
			v.Foreach(func(e *ast.Term) {
				if s, ok := e.Value.(ast.String); ok {
					parts = append(parts, string(s))
				}
			})
			value = strings.Join(parts, ", ")
		default:
			return
		}
		if name == "" || len(name)+len(value) > maxHeader || strings.ContainsAny(string(name), "\r\n\x00: ") || strings.ContainsAny(value, "\r\n\x00") {
			return
		}
		out[strings.ToLower(string(name))] = value
	})
	return out
}

// The keys of the input are made once: they are half of its terms. They are never
// changed.
var (
	keyAttributes  = ast.StringTerm("attributes")
	keyParsedPath  = ast.StringTerm("parsed_path")
	keyParsedQuery = ast.StringTerm("parsed_query")
	keySource      = ast.StringTerm("source")
	keyDestination = ast.StringTerm("destination")
	keyService     = ast.StringTerm("service")
	keyProtocol    = ast.StringTerm("protocol")
	keyPort        = ast.StringTerm("port")
	keySPIFFEID    = ast.StringTerm("spiffe_id")
	keyCluster     = ast.StringTerm("cluster")
	keyTenant      = ast.StringTerm("tenant")
	keyWorkload    = ast.StringTerm("workload")
	keyAddress     = ast.StringTerm("address")
)

// networkInput builds the term by hand: a detour over JSON would cost more than
// the decision.
func networkInput(in policy.Network) (*ast.Term, error) {
	attributes := ast.Value(ast.NewObject())
	if in.Attributes != nil {
		v, err := ast.InterfaceToValue(in.Attributes)
		if err != nil {
			return nil, err
		}
		attributes = v
	}
	query := make([][2]*ast.Term, 0, len(in.ParsedQuery))
	for k, vs := range in.ParsedQuery {
		query = append(query, [2]*ast.Term{ast.StringTerm(k), stringArray(vs)})
	}
	return ast.ObjectTerm(
		[2]*ast.Term{keyAttributes, ast.NewTerm(attributes)},
		[2]*ast.Term{keyParsedPath, stringArray(in.ParsedPath)},
		[2]*ast.Term{keyParsedQuery, ast.ObjectTerm(query...)},
		[2]*ast.Term{keySource, peerTerm(in.Source)},
		[2]*ast.Term{keyDestination, peerTerm(in.Destination)},
		[2]*ast.Term{keyService, ast.StringTerm(in.Service)},
		[2]*ast.Term{keyProtocol, ast.StringTerm(in.Protocol)},
		[2]*ast.Term{keyPort, ast.IntNumberTerm(in.Port)},
	), nil
}

func stringArray(vs []string) *ast.Term {
	terms := make([]*ast.Term, len(vs))
	for i, v := range vs {
		terms[i] = ast.StringTerm(v)
	}
	return ast.ArrayTerm(terms...)
}

func peerTerm(p policy.Peer) *ast.Term {
	pairs := [][2]*ast.Term{
		{keySPIFFEID, ast.StringTerm(p.SPIFFEID)},
		{keyCluster, ast.StringTerm(p.Cluster)},
		{keyTenant, ast.StringTerm(p.Tenant)},
		{keyWorkload, ast.StringTerm(p.Workload)},
	}
	if p.Address != "" {
		pairs = append(pairs, [2]*ast.Term{keyAddress, ast.StringTerm(p.Address)})
	}
	return ast.ObjectTerm(pairs...)
}

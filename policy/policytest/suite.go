// Package policytest holds the suite that every policy.Authorizer must pass, and a
// differential check of two of them on the same inputs. It owns no engine and
// never prints.
//
// Concurrency: functions only, safe for concurrent use.
package policytest

import (
	"context"
	"testing"

	"github.com/portolan-io/portolan/policy"
)

// Open makes the authorizer under test from network bundles.
type Open func(t *testing.T, bundles []policy.Bundle) policy.Authorizer

func network(name, body string) policy.Bundle {
	return policy.Bundle{Name: name, Kind: "network", Files: map[string]string{"policy.rego": "package portolan.network\n\n" + body}}
}

// Call is an HTTP request of one workload to another, as the warden describes it.
func Call(source, destination policy.Peer, method, path string) policy.Network {
	return policy.Network{
		Attributes: map[string]any{
			"source":      map[string]any{"principal": source.SPIFFEID},
			"destination": map[string]any{"principal": destination.SPIFFEID},
			"request":     map[string]any{"http": map[string]any{"method": method, "path": path, "headers": map[string]any{":method": method, ":path": path}}},
		},
		ParsedPath: segments(path), ParsedQuery: map[string][]string{},
		Source: source, Destination: destination, Service: destination.Workload, Protocol: "http", Port: 8080,
	}
}

// Peer is a workload of a cluster of the local fleet.
func Peer(cluster, tenant, workload string) policy.Peer {
	return policy.Peer{
		SPIFFEID: "spiffe://" + cluster + ".portolan.internal/tenant/" + tenant + "/workload/" + workload,
		Cluster:  cluster, Tenant: tenant, Workload: workload,
	}
}

func segments(path string) []string {
	var out []string
	for start := 1; start <= len(path); {
		end := start
		for end < len(path) && path[end] != '/' {
			end++
		}
		out = append(out, path[start:end])
		start = end + 1
	}
	return out
}

type authorizerCase struct {
	name    string
	bundles []policy.Bundle
	in      policy.Network
	allowed bool
	status  int
	bundle  string // that refused
}

func authorizerCases() []authorizerCase {
	web, cart := Peer("eu-west", "shop", "web"), Peer("eu-west", "shop", "cart")
	call := Call(web, cart, "GET", "/items/7")
	const (
		all   = "default allow := true"
		none  = "default allow := false"
		fromW = "allow if input.source.workload == \"web\""
	)
	return []authorizerCase{
		{name: "no bundle denies", in: call, status: 403},
		{name: "guardrail alone does not allow", bundles: []policy.Bundle{network("policyBundles/g", all)}, in: call, status: 403},
		{name: "guardrail and another tenant's bundle do not allow", bundles: []policy.Bundle{network("policyBundles/g", all), network("tenants/other/policyBundles/n", all)}, in: call, status: 403},
		{name: "guardrail and tenant allow", bundles: []policy.Bundle{network("policyBundles/g", all), network("tenants/shop/policyBundles/n", fromW)}, in: call, allowed: true},
		{name: "tenant alone allows", bundles: []policy.Bundle{network("tenants/shop/policyBundles/n", fromW)}, in: call, allowed: true},
		{name: "undefined denies", bundles: []policy.Bundle{network("policyBundles/g", fromW)}, in: Call(cart, web, "GET", "/"), status: 403, bundle: "policyBundles/g"},
		{name: "guardrail denies over tenant", bundles: []policy.Bundle{network("policyBundles/g", none), network("tenants/shop/policyBundles/n", all)}, in: call, status: 403, bundle: "policyBundles/g"},
		{name: "tenant denies under guardrail", bundles: []policy.Bundle{network("policyBundles/g", all), network("tenants/shop/policyBundles/n", none)}, in: call, status: 403, bundle: "tenants/shop/policyBundles/n"},
		{name: "all of a tenant's bundles must allow", bundles: []policy.Bundle{network("tenants/shop/policyBundles/a", all), network("tenants/shop/policyBundles/b", none)}, in: call, status: 403, bundle: "tenants/shop/policyBundles/b"},
		{name: "the caller's tenant is not asked", bundles: []policy.Bundle{network("tenants/other/policyBundles/n", none), network("tenants/shop/policyBundles/n", all)}, in: Call(Peer("eu-west", "other", "spy"), cart, "GET", "/"), allowed: true},
		{name: "another tenant's bundle does not allow", bundles: []policy.Bundle{network("tenants/other/policyBundles/n", all)}, in: call, status: 403},
		{
			name: "object allows", in: call, allowed: true,
			bundles: []policy.Bundle{network("tenants/shop/policyBundles/n", "allow := {\"allowed\": true}")},
		},
		{
			name: "object denies with its status", in: call, status: 429, bundle: "policyBundles/g",
			bundles: []policy.Bundle{network("policyBundles/g", "allow := {\"allowed\": false, \"http_status\": 429, \"body\": \"later\", \"headers\": {\"Retry-After\": \"3\"}}")},
		},
		{name: "a string is no decision", bundles: []policy.Bundle{network("policyBundles/g", "allow := \"true\"")}, in: call, status: 403, bundle: "policyBundles/g"},
		{
			name: "attributes as in opa-envoy-plugin", in: call, allowed: true,
			bundles: []policy.Bundle{network("tenants/shop/policyBundles/n", "import input.attributes.request.http as http_request\nallow if {\n\thttp_request.method == \"GET\"\n\tinput.parsed_path[0] == \"items\"\n}")},
		},
		{name: "tcp has no request", bundles: []policy.Bundle{network("policyBundles/g", "allow if input.attributes.request.http.method == \"GET\"")}, in: policy.Network{Source: web, Destination: cart, Protocol: "tcp", Port: 6379}, status: 403, bundle: "policyBundles/g"},
		{name: "tcp by port", bundles: []policy.Bundle{network("tenants/shop/policyBundles/n", "allow if {\n\tinput.protocol == \"tcp\"\n\tinput.port == 6379\n}")}, in: policy.Network{Source: web, Destination: cart, Protocol: "tcp", Port: 6379}, allowed: true},
	}
}

// Authorizer is the suite that every authorizer over Rego bundles must pass.
func Authorizer(t *testing.T, open Open) {
	for _, c := range authorizerCases() {
		t.Run(c.name, func(t *testing.T) {
			d := open(t, c.bundles).Authorize(t.Context(), c.in)
			if d.Allowed != c.allowed {
				t.Fatalf("allowed = %v, want %v: %+v", d.Allowed, c.allowed, d.Denials)
			}
			if d.Allowed {
				if len(d.Denials) > 0 {
					t.Errorf("allowed, and yet: %+v", d.Denials)
				}
				return
			}
			if len(d.Denials) == 0 || d.Denials[0].Message == "" {
				t.Fatalf("a refusal must say why: %+v", d)
			}
			if d.HTTPStatus != c.status {
				t.Errorf("status %d, want %d", d.HTTPStatus, c.status)
			}
			if c.bundle != "" && d.Denials[0].Bundle != c.bundle {
				t.Errorf("refused by %q, want %q", d.Denials[0].Bundle, c.bundle)
			}
		})
	}
}

// Differ asks both authorizers every input and reports where they do not agree.
// It is how a second implementation of the same bundles is held to the first.
func Differ(ctx context.Context, t *testing.T, want, got policy.Authorizer, inputs []policy.Network) {
	t.Helper()
	for i, in := range inputs {
		w, g := want.Authorize(ctx, in), got.Authorize(ctx, in)
		if w.Allowed != g.Allowed {
			t.Errorf("input %d (%s → %s %v): allowed %v, the reference says %v: %+v %+v", i, in.Source.SPIFFEID, in.Destination.SPIFFEID, in.ParsedPath, g.Allowed, w.Allowed, g.Denials, w.Denials)
		}
	}
}

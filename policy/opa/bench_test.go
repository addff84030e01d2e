package opa

import (
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/policy"
)

const benchGuardrail = `default allow := false

allow if {
	input.source.tenant == input.destination.tenant
	not blocked
}

blocked if input.source.workload in {"legacy", "scratch"}
`

const benchTenant = `import input.attributes.request.http as request

default allow := false

allow if {
	input.source.workload == "web"
	input.destination.workload == "cart"
	request.method in {"GET", "POST"}
	input.parsed_path[0] == "v1"
}

allow if {
	input.source.workload == "cart"
	input.destination.workload == "payments"
	startswith(request.path, "/charge")
}
`

func benchInput() policy.Network {
	return policy.Network{
		Attributes: map[string]any{
			"source":      map[string]any{"address": map[string]any{"socketAddress": map[string]any{"address": "10.1.2.3", "portValue": 43210}}, "principal": "spiffe://eu-west.portolan.internal/tenant/shop/workload/web"},
			"destination": map[string]any{"address": map[string]any{"socketAddress": map[string]any{"address": "10.1.2.4", "portValue": 8080}}, "principal": "spiffe://eu-west.portolan.internal/tenant/shop/workload/cart"},
			"request": map[string]any{"http": map[string]any{
				"id": "1", "method": "GET", "path": "/v1/items/7?full=1", "host": "cart.shop.mesh", "scheme": "http", "protocol": "HTTP/1.1",
				"headers": map[string]any{":authority": "cart.shop.mesh", ":method": "GET", ":path": "/v1/items/7?full=1", "accept": "*/*", "user-agent": "bench", "x-request-id": "0f2a", "x-forwarded-proto": "http"},
			}},
		},
		ParsedPath: []string{"v1", "items", "7"}, ParsedQuery: map[string][]string{"full": {"1"}},
		Source:      policy.Peer{SPIFFEID: "spiffe://eu-west.portolan.internal/tenant/shop/workload/web", Cluster: "eu-west", Tenant: "shop", Workload: "web"},
		Destination: policy.Peer{SPIFFEID: "spiffe://eu-west.portolan.internal/tenant/shop/workload/cart", Cluster: "eu-west", Tenant: "shop", Workload: "cart"},
		Service:     "cart", Protocol: "http", Port: 8080,
	}
}

// BenchmarkT12_NetworkDecision is one ext_authz decision without Envoy and gRPC:
// one guardrail and one tenant bundle, an HTTP request with seven headers. Each
// decision is fresh: nothing is remembered between two. ns-cpu/decision counts
// all threads of the process, the collector's too.
func BenchmarkT12_NetworkDecision(b *testing.B) {
	s := mustCompile(b, Limits{Deadline: 10 * time.Second}, network("policyBundles/g", benchGuardrail), network("tenants/shop/policyBundles/n", benchTenant))
	in := benchInput()
	// With -benchtime 1x too there are enough decisions for a figure.
	const batch = 2000
	if d := s.Authorize(b.Context(), in); !d.Allowed {
		b.Fatalf("%+v", d)
	}
	b.ReportAllocs()
	before, start := cpu(b), time.Now()
	b.ResetTimer()
	for range b.N {
		for range batch {
			if !s.Authorize(b.Context(), in).Allowed {
				b.Fatal("denied")
			}
		}
	}
	n := float64(b.N) * batch
	b.ReportMetric(float64(cpu(b)-before)/n, "ns-cpu/decision")
	b.ReportMetric(float64(time.Since(start))/n, "ns/decision")
}

func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

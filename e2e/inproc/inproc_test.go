package inproc

import (
	"fmt"
	"testing"
	"time"
)

const tenant = `
{kind: Tenant, name: shop, spec: {display_name: Shop, ingress_suffixes: [shop.localhost]}}
---
kind: PolicyBundle
name: guardrail
spec:
  kind: network
  files:
    guardrail.rego: |
      package portolan.network

      default allow := false

      allow if input.source.tenant == input.destination.tenant

      allow if input.source.workload == "ingress"
---
`

// workload is a service of n replicas with its mesh name.
func workload(name string, n int, more string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: %s
spec:
  replicas: %d
  containers:
  - image: %s/shop/%s:v1
    limits: {cpu: 500m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
%s
---
{kind: Service, tenant: shop, name: %s, spec: {ports: [{port: 80, target_port: 8080}]}}
---
`, name, n, registry, name, more, name)
}

func TestApplyToRunning(t *testing.T) {
	Run(t, func(t *testing.T, f *Fleet) {
		t.Log("up at", time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)))
		f.Apply(tenant + workload("catalog", 1, ""))
		t.Log("running after", f.Settled(10*time.Second, "catalog", 1))
		t.Log("converged after", f.WaitConverged())
		t.Log(f.Running("catalog"), f.Replicas("catalog"))
	})
}

package link

import (
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/xds/distribute"
)

func TestCheckNamesTheField(t *testing.T) {
	spec := &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Requests: &portolanv1.ResourceList{Cpu: "1"}}}}
	workload := func(change func(*linkv1.WorkloadIntent)) *linkv1.Intent {
		w := &linkv1.WorkloadIntent{Tenant: "shop", Workload: "web", Revisions: []*linkv1.RevisionIntent{{Revision: "r1", Spec: spec}}}
		change(w)
		return &linkv1.Intent{Body: &linkv1.Intent_Workload{Workload: w}}
	}
	bundle := func(cluster, domain, roots string) *linkv1.Intent {
		return &linkv1.Intent{Body: &linkv1.Intent_Bundle{Bundle: &linkv1.TrustBundle{Cluster: cluster, TrustDomain: domain, X509Roots: []byte(roots)}}}
	}
	for _, c := range []struct {
		name   string
		intent *linkv1.Intent
		want   string // "" is accepted
	}{
		{"workload/shop/web", workload(func(*linkv1.WorkloadIntent) {}), ""},
		{"workload/shop/db", workload(func(*linkv1.WorkloadIntent) {}), "name: "},
		{"workload/shop/web", workload(func(w *linkv1.WorkloadIntent) { w.Revisions = nil }), "workload.revisions: "},
		{"workload/shop/web", workload(func(w *linkv1.WorkloadIntent) { w.Revisions[0].Spec = nil }), "workload.revisions[0].spec: "},
		{"workload/shop/web", workload(func(w *linkv1.WorkloadIntent) { w.Revisions[0].Replicas = -1 }), "workload.revisions[0].replicas: "},
		{"workload/shop/web", workload(func(w *linkv1.WorkloadIntent) { w.Revisions = append(w.Revisions, w.Revisions[0]) }), "workload.revisions[1].revision: "},
		{"workload/shop/web", workload(func(w *linkv1.WorkloadIntent) {
			w.Revisions[0].Spec = &portolanv1.WorkloadSpec{Containers: []*portolanv1.Container{{Requests: &portolanv1.ResourceList{Cpu: "much"}}}}
		}), "workload.revisions[0].spec.containers[0].requests.cpu: "},
		{"workload/../web", workload(func(w *linkv1.WorkloadIntent) { w.Tenant = ".." }), "workload: "},
		{"bundle/portolan.internal", bundle("", "portolan.internal", "x"), ""},
		{"bundle/us.portolan.internal", bundle("us", "us.portolan.internal", "x"), ""},
		{"bundle/us.portolan.internal", bundle("eu", "us.portolan.internal", "x"), "bundle.trust_domain: "},
		{"bundle/evil.example", bundle("", "evil.example", "x"), "bundle.trust_domain: "},
		{"bundle/us.portolan.internal", bundle("us", "us.portolan.internal", ""), "bundle.x509_roots: "},
		{"policy/policyBundles/a/b", &linkv1.Intent{Body: &linkv1.Intent_Policy{Policy: &linkv1.PolicyIntent{Name: "policyBundles/a/b"}}}, "policy.name: "},
		{"cluster", &linkv1.Intent{Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{}}}, "cluster.spec: "},
		{"route/shop/web", &linkv1.Intent{Body: &linkv1.Intent_Route{Route: &linkv1.RouteIntent{Tenant: "shop", Route: "web"}}}, "route.spec: "},
		{"watermark", &linkv1.Intent{Body: &linkv1.Intent_Watermark{Watermark: &linkv1.Watermark{Revision: -1}}}, "watermark.revision: "},
		{"nothing", &linkv1.Intent{}, "body: "},
		{"policy/policyBundles/a", &linkv1.Intent{Body: &linkv1.Intent_Policy{Policy: &linkv1.PolicyIntent{Name: "policyBundles/a", Digest: strings.Repeat("x", maxIntentBytes)}}}, "body: "},
	} {
		r, err := distribute.NewResource(api.IntentTypeURL, c.name, c.intent)
		if err != nil {
			t.Fatal(err)
		}
		_, err = decode(r, "portolan.internal")
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s refused: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

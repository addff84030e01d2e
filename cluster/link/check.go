package link

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/xds/distribute"
)

// maxIntentBytes bounds one resource.
const maxIntentBytes = 2 * api.MaxObjectBytes

// decode reads an intent and refuses what this cluster cannot hold: the error
// names the field. A refused resource is quarantined alone.
func decode(r *distribute.Resource, fleet string) (*linkv1.Intent, error) {
	if n := len(r.Body.GetValue()); n > maxIntentBytes {
		return nil, fmt.Errorf("body: %d bytes are more than %d", n, maxIntentBytes)
	}
	i := &linkv1.Intent{}
	if err := proto.Unmarshal(r.Body.GetValue(), i); err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	want, err := nameOf(i, fleet)
	if err != nil {
		return nil, err
	}
	if r.Name != want {
		return nil, fmt.Errorf("name: %q stands for another resource than its body, %q", r.Name, want)
	}
	return i, nil
}

// nameOf checks the body and gives the name that belongs to it.
func nameOf(i *linkv1.Intent, fleet string) (string, error) {
	switch b := i.GetBody().(type) {
	case *linkv1.Intent_Workload:
		return workloadName(b.Workload)
	case *linkv1.Intent_Service:
		if len(b.Service.GetSpec().GetPorts()) == 0 {
			return "", fmt.Errorf("service.spec.ports: must not be empty")
		}
		return join("service", b.Service.GetTenant(), b.Service.GetService())
	case *linkv1.Intent_Route:
		if b.Route.GetSpec() == nil {
			return "", fmt.Errorf("route.spec: must be present")
		}
		return join("route", b.Route.GetTenant(), b.Route.GetRoute())
	case *linkv1.Intent_Policy:
		if _, err := api.ParseName(b.Policy.GetName(), api.FleetPolicyPattern, api.TenantPolicyPattern); err != nil {
			return "", fmt.Errorf("policy.name: %w", err)
		}
		return "policy/" + b.Policy.GetName(), nil
	case *linkv1.Intent_Bundle:
		return bundleName(b.Bundle, fleet)
	case *linkv1.Intent_Export:
		return join("export", b.Export.GetCluster(), b.Export.GetTenant(), b.Export.GetService())
	case *linkv1.Intent_Permit:
		return join("permit", b.Permit.GetTenant(), b.Permit.GetWorkload(), b.Permit.GetCluster())
	case *linkv1.Intent_Tenant:
		return join("tenant", b.Tenant.GetTenant())
	case *linkv1.Intent_Cluster:
		if b.Cluster.GetSpec() == nil {
			return "", fmt.Errorf("cluster.spec: must be present")
		}
		return "cluster", nil
	case *linkv1.Intent_Watermark:
		if b.Watermark.GetRevision() < 0 {
			return "", fmt.Errorf("watermark.revision: must not be negative")
		}
		return api.WatermarkName, nil
	}
	return "", fmt.Errorf("body: is of a kind that this version does not know")
}

func workloadName(w *linkv1.WorkloadIntent) (string, error) {
	if len(w.GetRevisions()) == 0 {
		return "", fmt.Errorf("workload.revisions: must not be empty")
	}
	seen := map[string]bool{}
	for n, r := range w.GetRevisions() {
		switch {
		case r.GetSpec() == nil:
			return "", fmt.Errorf("workload.revisions[%d].spec: must be present", n)
		case r.GetReplicas() < 0:
			return "", fmt.Errorf("workload.revisions[%d].replicas: must not be negative", n)
		case r.GetRevision() == "" || seen[r.GetRevision()]:
			return "", fmt.Errorf("workload.revisions[%d].revision: %q is empty or there twice", n, r.GetRevision())
		}
		if _, err := api.RequestsOf(r.GetSpec()); err != nil {
			return "", fmt.Errorf("workload.revisions[%d].%w", n, err)
		}
		seen[r.GetRevision()] = true
	}
	return join("workload", w.GetTenant(), w.GetWorkload())
}

func bundleName(b *linkv1.TrustBundle, fleet string) (string, error) {
	want := fleet
	if b.GetCluster() != "" {
		want = identity.ClusterDomain(fleet, b.GetCluster())
	}
	if b.GetTrustDomain() != want {
		return "", fmt.Errorf("bundle.trust_domain: %q is not %q", b.GetTrustDomain(), want)
	}
	if len(b.GetX509Roots()) == 0 {
		return "", fmt.Errorf("bundle.x509_roots: must not be empty")
	}
	return "bundle/" + b.GetTrustDomain(), nil
}

// join makes a name of IDs, each of which must parse.
func join(kind string, ids ...string) (string, error) {
	for _, id := range ids {
		if _, err := api.ParseID(id); err != nil {
			return "", fmt.Errorf("%s: %w", kind, err)
		}
	}
	return kind + "/" + strings.Join(ids, "/"), nil
}

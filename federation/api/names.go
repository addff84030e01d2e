package api

import (
	"fmt"
	"regexp"
	"strings"
)

// ID is one segment of a resource name: an RFC 1123 label of at most 40
// characters, so that "<port>.<revision>.<service>.<tenant>.mesh" stays a valid
// DNS name.
type ID string

var idPattern = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$`)

// ParseID checks one segment.
func ParseID(s string) (ID, error) {
	if !idPattern.MatchString(s) {
		return "", fmt.Errorf("%q is no valid ID: use 1 to 40 characters a-z, 0-9 and '-', beginning with a letter and not ending with '-'", clip(s))
	}
	return ID(s), nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// Patterns of all resource names; "*" stands for an ID.
const (
	TenantPattern       = "tenants/*"
	ClusterPattern      = "clusters/*"
	NodePattern         = "clusters/*/nodes/*"
	RoleBindingPattern  = "roleBindings/*"
	WorkloadPattern     = "tenants/*/workloads/*"
	RevisionPattern     = "tenants/*/workloads/*/revisions/*"
	PlacementPattern    = "tenants/*/workloads/*/placements/*"
	ReplicaPattern      = "tenants/*/workloads/*/replicas/*"
	ServicePattern      = "tenants/*/services/*"
	RoutePattern        = "tenants/*/routes/*"
	FleetPolicyPattern  = "policyBundles/*"
	TenantPolicyPattern = "tenants/*/policyBundles/*"
)

// ParseName parses name against one of the patterns, and refuses what is not
// canonical. It returns the IDs in order.
func ParseName(name string, patterns ...string) ([]string, error) {
	segs := strings.Split(name, "/")
	for _, p := range patterns {
		want := strings.Split(p, "/")
		if len(want) != len(segs) {
			continue
		}
		var ids []string
		ok := true
		for i := range want {
			if want[i] == "*" {
				ids = append(ids, segs[i])
			} else if want[i] != segs[i] {
				ok = false
				break
			}
		}
		if !ok {
			continue
		}
		for _, id := range ids {
			if _, err := ParseID(id); err != nil {
				return nil, fmt.Errorf("name %q: %w", clip(name), err)
			}
		}
		return ids, nil
	}
	return nil, fmt.Errorf("name %q does not match %s", clip(name), strings.Join(patterns, " or "))
}

// TenantOf is the tenant ID in a resource name; empty for the fleet's own.
func TenantOf(name string) string {
	rest, ok := strings.CutPrefix(name, "tenants/")
	if !ok {
		return ""
	}
	t, _, _ := strings.Cut(rest, "/")
	return t
}

// The makers of names take IDs that were parsed before.

// TenantName names a tenant.
func TenantName(t string) string { return "tenants/" + t }

// ClusterName names a cluster.
func ClusterName(c string) string { return "clusters/" + c }

// WorkloadName names a workload.
func WorkloadName(t, w string) string { return "tenants/" + t + "/workloads/" + w }

// ServiceName names a service.
func ServiceName(t, s string) string { return "tenants/" + t + "/services/" + s }

// RouteName names a route.
func RouteName(t, r string) string { return "tenants/" + t + "/routes/" + r }

// RevisionName names a revision of a workload.
func RevisionName(t, w, r string) string {
	return WorkloadName(t, w) + "/revisions/" + r
}

// PlacementName names a workload's placement on a cluster.
func PlacementName(t, w, cluster string) string {
	return WorkloadName(t, w) + "/placements/" + cluster
}

// ReplicaName names a workload's replica.
func ReplicaName(t, w, allocation string) string {
	return WorkloadName(t, w) + "/replicas/" + allocation
}

// Hostname is the mesh name of a service.
func Hostname(tenant, service string) string { return service + "." + tenant + ".mesh" }

// SNI names a port and a revision of a service at the east-west gateway; an empty
// revision stands for all of them and is written "all".
func SNI(port, revision, service, tenant string) string {
	if revision == "" {
		revision = "all"
	}
	return port + "." + revision + "." + Hostname(tenant, service)
}

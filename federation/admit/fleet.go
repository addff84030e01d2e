package admit

import (
	"path"
	"slices"
	"strings"
	"unicode"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
)

func (c *checker) tenant(t *portolanv1.Tenant) {
	s := t.GetSpec()
	if n := s.GetDisplayName(); len(n) > 128 || strings.ContainsFunc(n, unicode.IsControl) {
		c.add("spec.display_name", "use at most 128 bytes, without control characters")
	}
	c.uniqueIDs("spec.allowed_regions", s.GetAllowedRegions())
	if p := s.GetMaxPriority(); p < -1000 || p > 1000 {
		c.add("spec.max_priority", "%d is not between -1000 and 1000", p)
	}
	if w := s.GetWeight(); w < 0 || w > 1_000_000 {
		c.add("spec.weight", "%d is not between 1 and 1000000", w)
	}
	for i, suffix := range s.GetIngressSuffixes() {
		f := at("spec.ingress_suffixes", i)
		if !c.dns(f, suffix) {
			continue
		}
		switch {
		case suffix == "mesh" || strings.HasSuffix(suffix, ".mesh"):
			c.add(f, "names under \"mesh\" are inside the mesh")
		case slices.Contains(s.GetIngressSuffixes()[:i], suffix):
			c.add(f, "%q is there twice", suffix)
		}
	}
}

func (c *checker) cluster(cl *portolanv1.Cluster) {
	s := cl.GetSpec()
	c.id("spec.region", s.GetRegion())
	if s.GetZone() != "" {
		c.id("spec.zone", s.GetZone())
	}
	if p := s.GetProvider(); len(p) > 63 || strings.ContainsFunc(p, unicode.IsControl) {
		c.add("spec.provider", "use at most 63 bytes, without control characters")
	}
	if s.GetCpuCoreHourMicros() < 0 {
		c.add("spec.cpu_core_hour_micros", "a price is not negative")
	}
	if s.GetMemoryGibHourMicros() < 0 {
		c.add("spec.memory_gib_hour_micros", "a price is not negative")
	}
	if len(s.GetPools()) > 64 {
		c.add("spec.pools", "has %d entries; at most 64 are allowed", len(s.GetPools()))
	} else {
		c.pools(s.GetPools())
	}
	for _, r := range keys(s.GetRttMillis()) {
		c.id(key("spec.rtt_millis", r), r)
		if v := s.GetRttMillis()[r]; v < 0 || v > 60_000 {
			c.add(key("spec.rtt_millis", r), "%d ms is not between 0 and 60000", v)
		}
	}
	if r := s.GetRebalance(); r.GetMaxMovesPerHour() < 0 || r.GetMinGainPercent() < 0 || r.GetMinGainPercent() > 100 {
		c.add("spec.rebalance", "moves per hour are not negative, and the gain is between 0 and 100 percent")
	}
	type taint struct {
		key    string
		effect portolanv1.TaintEffect
	}
	seen := map[taint]bool{}
	for i, t := range s.GetTaints() {
		f := at("spec.taints", i)
		c.labelKey(f+".key", t.GetKey())
		c.labelValue(f+".value", t.GetValue())
		if _, ok := portolanv1.TaintEffect_name[int32(t.GetEffect())]; !ok || t.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED {
			c.add(f+".effect", "is required")
		}
		if k := (taint{t.GetKey(), t.GetEffect()}); seen[k] {
			c.add(f+".key", "%q is there twice with the same effect", clip(t.GetKey()))
		} else {
			seen[k] = true
		}
	}
}

func (c *checker) roleBinding(b *portolanv1.RoleBinding) {
	s := b.GetSpec()
	who, err := identity.Parse(s.GetSubject())
	switch {
	case err != nil:
		c.add("spec.subject", "%q is no SPIFFE ID of this fleet: write spiffe://%s/user/<name>", clip(s.GetSubject()), c.snap.Fleet)
	case who.Kind != identity.User || who.TrustDomain != c.snap.Fleet:
		c.add("spec.subject", "%q is no user of this fleet: write spiffe://%s/user/<name>", clip(s.GetSubject()), c.snap.Fleet)
	}
	switch s.GetRole() {
	case portolanv1.Role_ROLE_FLEET_ADMIN:
		if s.GetTenant() != "" {
			c.add("spec.tenant", "a fleet admin has no tenant: leave it out")
		}
	case portolanv1.Role_ROLE_TENANT_ADMIN:
		switch {
		case s.GetTenant() == "":
			c.add("spec.tenant", "is required for ROLE_TENANT_ADMIN")
		case !c.snap.Tenants[s.GetTenant()]:
			c.add("spec.tenant", "tenant %q does not exist", clip(s.GetTenant()))
		}
	default:
		c.add("spec.role", "is required: ROLE_FLEET_ADMIN or ROLE_TENANT_ADMIN")
	}
}

func (c *checker) policyBundle(b *portolanv1.PolicyBundle) {
	s := b.GetSpec()
	if s.GetKind() == portolanv1.PolicyKind_POLICY_KIND_ADMISSION && api.TenantOf(b.GetName()) != "" {
		c.add("spec.kind", "admission is decided by the fleet's bundles: name it policyBundles/%s", id(b))
	}
	if len(s.GetFiles()) == 0 {
		c.add("spec.files", "at least one file is required")
	}
	for _, f := range keys(s.GetFiles()) {
		if len(f) > 200 || path.IsAbs(f) || path.Clean(f) != f || strings.HasPrefix(f, "../") || !strings.HasSuffix(f, ".rego") || strings.ContainsFunc(f, unicode.IsControl) {
			c.add(key("spec.files", f), "%q is no canonical relative path of a .rego file", clip(f))
		}
	}
}

package server

import (
	"context"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
)

// bootstrapMethod stands in audit rows for what no RPC wrote.
const bootstrapMethod = "portolan-federation/bootstrap"

// Bootstrap writes what a fleet needs before anybody can call its API: the tenant
// of the gateways, the baseline admission bundle, and a fleet admin. What exists
// stays as it is, so it may be repeated.
func (s *Server) Bootstrap(ctx context.Context, admin string) error {
	const doing = "bootstrap"
	if _, err := api.ParseID(admin); err != nil {
		return api.E(api.Invalid, doing, "name of the admin: %w", err)
	}
	base, err := Baseline()
	if err != nil {
		return err
	}
	subject := identity.ID{Kind: identity.User, TrustDomain: s.cfg.Fleet, Name: admin}.String()
	wanted := []struct {
		kind store.Kind
		o    object
	}{
		{store.Tenant, &portolanv1.Tenant{Name: api.TenantName(api.SystemTenant), Spec: &portolanv1.TenantSpec{DisplayName: "Gateways of the fleet"}}},
		{store.PolicyBundle, &portolanv1.PolicyBundle{Name: BaselineName, Spec: base}},
		{store.RoleBinding, &portolanv1.RoleBinding{Name: "roleBindings/" + admin, Spec: &portolanv1.RoleBindingSpec{Subject: subject, Role: portolanv1.Role_ROLE_FLEET_ADMIN}}},
	}
	if b, ok := wanted[1].o.(*portolanv1.PolicyBundle); ok {
		if err := api.InvalidFields(doing, s.cfg.Policies.Check(ctx, policyBundle(b))); err != nil {
			return err
		}
	}
	c := &caller{actor: "spiffe://" + s.cfg.Fleet + "/control", fleet: true, method: bootstrapMethod}
	now := time.Now()
	_, err = s.cfg.Store.Update(ctx, func(tx store.Tx) error {
		for _, w := range wanted {
			k := s.kinds[w.kind]
			old, err := k.get(tx, w.o.GetName())
			if err != nil {
				return err
			}
			if old != nil {
				continue
			}
			ch := &change{k: k, c: c, op: opCreate, doing: doing, name: w.o.GetName()}
			if _, err := s.apply(tx, ch, &decision{op: opCreate, next: cloneObject(w.o)}, now, s.cfg.NewUID()); err != nil {
				return err
			}
			if _, err := s.audit(tx, newEntry(c, now, w.o.GetName(), api.TenantOf(w.o.GetName()))); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

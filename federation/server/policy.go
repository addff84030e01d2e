package server

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
)

// BaselineName is the fleet's admission bundle that bootstrap stores.
const BaselineName = "policyBundles/baseline"

//go:embed baseline
var baseline embed.FS

// Baseline gives the built-in admission bundle, its tests included.
func Baseline() (*portolanv1.PolicyBundleSpec, error) {
	sub, err := fs.Sub(baseline, "baseline")
	if err != nil {
		return nil, api.E(api.Internal, "read the baseline bundle", "%w", err)
	}
	files, err := bundle.Load(sub, bundle.Limits{})
	if err != nil {
		return nil, err
	}
	return &portolanv1.PolicyBundleSpec{Kind: portolanv1.PolicyKind_POLICY_KIND_ADMISSION, Files: files}, nil
}

func policyBundle(b *portolanv1.PolicyBundle) policy.Bundle {
	kind := "network"
	if b.GetSpec().GetKind() == portolanv1.PolicyKind_POLICY_KIND_ADMISSION {
		kind = "admission"
	}
	return policy.Bundle{Name: b.GetName(), Kind: kind, Files: b.GetSpec().GetFiles()}
}

// bundleSet is the fleet's admission bundles of one snapshot. Key changes with
// any of them.
type bundleSet struct {
	bundles []policy.Bundle
	key     string
}

func admissionBundles(r store.Reader) (bundleSet, error) {
	var set bundleSet
	for rec, err := range r.List(store.PolicyBundle, store.ListOptions{Prefix: "policyBundles/"}) {
		if err != nil {
			return bundleSet{}, err
		}
		b, ok := rec.Message.(*portolanv1.PolicyBundle)
		if !ok || b.GetSpec().GetKind() != portolanv1.PolicyKind_POLICY_KIND_ADMISSION {
			continue
		}
		set.bundles = append(set.bundles, policyBundle(b))
		set.key += fmt.Sprintf("%s@%d\n", rec.Name, rec.Revision)
	}
	return set, nil
}

// admissionCache holds the compiled set that was asked for last.
type admissionCache struct {
	mu       sync.Mutex
	key      string
	admitter policy.Admitter
}

// admitter gives the compiled form of a set. One compilation at a time; callers
// of the same set wait for it.
func (s *Server) admitter(ctx context.Context, set bundleSet) (policy.Admitter, error) {
	a := &s.admission
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.admitter != nil && a.key == set.key {
		return a.admitter, nil
	}
	ad, err := s.cfg.Admission.CompileAdmission(ctx, set.bundles)
	if err != nil {
		return nil, api.E(api.Internal, "compile the admission bundles", "%w", err)
	}
	a.key, a.admitter = set.key, ad
	return ad, nil
}

// askPolicy lets the fleet's Rego decide. What it refuses is Denied, and names
// field, rule, file and line.
func (s *Server) askPolicy(ctx context.Context, ch *change, d *decision, set bundleSet) error {
	if !ch.k.admitted {
		return nil
	}
	if len(set.bundles) == 0 {
		return api.E(api.Denied, ch.doing, "the fleet has no admission bundle, and without one nothing is admitted: apply %s", BaselineName)
	}
	in, err := s.admissionInput(ctx, ch, d)
	if err != nil {
		return err
	}
	ad, err := s.admitter(ctx, set)
	if err != nil {
		return err
	}
	got := ad.Admit(ctx, in)
	if got.Allowed {
		return nil
	}
	e := &api.Error{Kind: api.Denied, Doing: ch.doing}
	for _, dn := range got.Denials {
		e.Violations = append(e.Violations, api.Violation{
			Field: dn.Field, Message: dn.Message, Rule: dn.Rule, File: dn.Bundle + "/" + dn.Location.File, Line: dn.Location.Row,
		})
	}
	if len(e.Violations) == 0 {
		e.Message = "admission policy refused without a reason"
	}
	return e
}

func (s *Server) admissionInput(ctx context.Context, ch *change, d *decision) (policy.Admission, error) {
	in := policy.Admission{
		Operation: string(d.op), Kind: string(ch.k.kind), Actor: ch.c.actor, Roles: ch.c.roles(),
		Facts: map[string]any{"registries": toAny(s.cfg.Registries), "fleet": s.cfg.Fleet},
	}
	var err error
	if d.next != nil {
		if in.Object, err = asJSON(d.next); err != nil {
			return in, err
		}
	}
	if d.old != nil {
		if in.OldObject, err = asJSON(d.old); err != nil {
			return in, err
		}
	}
	if w, ok := d.next.(*portolanv1.Workload); ok {
		in.Facts["images"] = imageFacts(w)
	}
	t := api.TenantOf(ch.name)
	if t == "" {
		return in, nil
	}
	_, err = s.cfg.Store.View(ctx, func(r store.Reader) error {
		rec, err := r.Get(store.Tenant, api.TenantName(t))
		if err != nil {
			if api.KindOf(err) == api.NotFound {
				return nil // the object is the tenant itself
			}
			return err
		}
		in.Tenant, err = asJSON(rec.Message)
		return err
	})
	return in, err
}

// asJSON gives the JSON form with the protos' own field names, as Rego sees it.
func asJSON(m proto.Message) (map[string]any, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, api.E(api.Internal, "encode for policy", "%w", err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, api.E(api.Internal, "encode for policy", "%w", err)
	}
	return out, nil
}

func toAny(list []string) []any {
	out := make([]any, len(list))
	for i, v := range list {
		out[i] = v
	}
	return out
}

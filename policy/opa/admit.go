package opa

import (
	"cmp"
	"context"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/policy"
)

const (
	denyRule  = "data.portolan.admission.deny"
	allowRule = "data.portolan.admission.allow"
	// maxDenials bounds an answer.
	maxDenials = 64
)

// Admit asks every guardrail bundle and every bundle of the tenant whose object
// it is. One reason of one bundle is enough to refuse; all are given. Without any
// bundle the answer is no.
func (s *Set) Admit(ctx context.Context, in policy.Admission) policy.Decision {
	programs := slices.Clip(s.admission[""])
	if t := tenantOf(in); t != "" {
		programs = append(programs, s.admission[t]...)
	}
	if len(programs) == 0 {
		return policy.Decision{Denials: []policy.Denial{{Rule: denyRule, Message: "no admission policy applies"}}}
	}
	late := policy.Denial{Rule: denyRule, Bundle: programs[0].name}
	input, err := admissionInput(in)
	if err != nil {
		late.Message = "encode the input: " + err.Error()
		return policy.Decision{Denials: []policy.Denial{late}}
	}
	return s.bounded(ctx, late, func(c topdown.Cancel) policy.Decision {
		var denials []policy.Denial
		for _, p := range programs {
			denials = append(denials, p.admit(ctx, input, c)...)
		}
		if len(denials) > maxDenials {
			denials = denials[:maxDenials]
		}
		return policy.Decision{Allowed: len(denials) == 0, Denials: denials}
	})
}

// tenantOf is the tenant whose object is admitted: the name says it, not the
// record that came along.
func tenantOf(in policy.Admission) string {
	for _, o := range []map[string]any{in.Object, in.OldObject, in.Tenant} {
		if name, ok := o["name"].(string); ok {
			if t := api.TenantOf(name); t != "" {
				return t
			}
		}
	}
	return ""
}

// admissionInput leaves out what there is not, so that policies find it
// undefined and not null.
func admissionInput(in policy.Admission) (*ast.Term, error) {
	m := map[string]any{"operation": in.Operation, "kind": in.Kind, "actor": in.Actor, "roles": in.Roles}
	if in.Roles == nil {
		m["roles"] = []string{}
	}
	for k, v := range map[string]map[string]any{"tenant": in.Tenant, "object": in.Object, "old_object": in.OldObject, "facts": in.Facts} {
		if v != nil {
			m[k] = v
		}
	}
	v, err := ast.InterfaceToValue(m)
	if err != nil {
		return nil, err
	}
	return ast.NewTerm(v), nil
}

// admit gives the reasons of one bundle. Errors of built-ins are reasons too: a
// deny rule that failed half-way must not pass for one that found nothing.
func (p *program) admit(ctx context.Context, input *ast.Term, cancel topdown.Cancel) []policy.Denial {
	if p.broken != "" {
		return []policy.Denial{{Rule: denyRule, Bundle: p.name, Message: p.broken}}
	}
	var denials []policy.Denial
	if p.denyQuery != nil {
		v, ok, err := p.eval(ctx, p.denyQuery, input, cancel, true)
		set, isSet := v.(ast.Set)
		switch {
		case err != nil:
			return []policy.Denial{p.failed(denyRule, p.denies[0], err)}
		case !ok || !isSet:
			return []policy.Denial{{Rule: denyRule, Bundle: p.name, Location: p.denies[0], Message: "the decision is undefined"}}
		}
		set.Foreach(func(t *ast.Term) { denials = append(denials, p.reason(t)) })
		slices.SortFunc(denials, func(a, b policy.Denial) int {
			return cmp.Or(cmp.Compare(a.Location.File, b.Location.File), cmp.Compare(a.Location.Row, b.Location.Row),
				cmp.Compare(a.Field, b.Field), cmp.Compare(a.Message, b.Message))
		})
	}
	if p.allowQuery == nil {
		return denials
	}
	v, ok, err := p.eval(ctx, p.allowQuery, input, cancel, true)
	switch {
	case err != nil:
		return append(denials, p.failed(allowRule, *p.allow, err))
	case !ok:
		return append(denials, policy.Denial{Rule: allowRule, Bundle: p.name, Location: *p.allow, Message: "no allow rule applies"})
	case v != ast.Boolean(true):
		return append(denials, policy.Denial{Rule: allowRule, Bundle: p.name, Location: *p.allow, Message: "allow is not true"})
	}
	return denials
}

// reason reads an element of the located deny set.
func (p *program) reason(t *ast.Term) policy.Denial {
	d := policy.Denial{Rule: denyRule, Bundle: p.name}
	o, ok := t.Value.(ast.Object)
	if !ok {
		d.Message = "denied"
		return d
	}
	if at := o.Get(ast.StringTerm("at")); at != nil {
		if n, ok := at.Value.(ast.Number); ok {
			if i, ok := n.Int(); ok && i >= 0 && i < len(p.denies) {
				d.Location = p.denies[i]
			}
		}
	}
	switch v := o.Get(ast.StringTerm("value")).Value.(type) {
	case ast.String:
		d.Message = string(v)
	case ast.Object:
		d.Message, d.Field = text(v, "msg"), text(v, "field")
		if d.Message == "" {
			d.Message = text(v, "message")
		}
	}
	if d.Message == "" {
		d.Message = "denied (the rule gives neither a string nor an object with msg)"
	}
	return d
}

func text(o ast.Object, key string) string {
	t := o.Get(ast.StringTerm(key))
	if t == nil {
		return ""
	}
	s, _ := t.Value.(ast.String)
	return string(s)
}

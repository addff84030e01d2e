package opa

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
)

// The kinds of bundles, which are also the last part of their package.
const (
	KindAdmission = "admission"
	KindNetwork   = "network"
)

const (
	// locatedDeny is a rule that the compiler adds beside each deny rule; see locate.
	locatedDeny = "__portolan_deny"
	reserved    = "__portolan"
	testSuffix  = "_test.rego"
	maxErrors   = 20
)

// program is one compiled bundle. It is immutable.
type program struct {
	name, kind string
	// key is digest, kind and name: what it was compiled from.
	key      string
	compiler *ast.Compiler
	store    storage.Store
	// denies locates the deny rules of an admission bundle by their number.
	denies []policy.Location
	// allow locates the first allow rule; nil when there is none.
	allow *policy.Location
	// Compiled queries; nil when the bundle has no such rule.
	denyQuery, allowQuery ast.Body
	// broken says why nothing of it can be evaluated; all is denied then.
	broken string
}

// EntryPackage is the Rego package that a bundle of the kind must have.
func EntryPackage(kind string) string { return "portolan." + kind }

// modules is a parsed bundle.
type modules struct {
	all    map[string]*ast.Module
	served []string // paths without tests, in order
}

// parse checks paths and sizes, and parses every file.
func parse(b policy.Bundle, l Limits) (modules, []api.Violation) {
	vs := bundle.Validate(b.Files, l.Bundle)
	if b.Kind != KindAdmission && b.Kind != KindNetwork {
		vs = append(vs, api.Violation{Field: "spec.kind", Message: fmt.Sprintf("%q is no kind of policy: use %q or %q", b.Kind, KindAdmission, KindNetwork)})
	}
	if len(vs) > 0 {
		return modules{}, vs
	}
	m := modules{all: map[string]*ast.Module{}}
	opts := ast.ParserOptions{Capabilities: capabilities(), RegoVersion: ast.RegoV1}
	for _, p := range slices.Sorted(maps.Keys(b.Files)) {
		mod, err := ast.ParseModuleWithOpts(p, b.Files[p], opts)
		if err != nil {
			vs = append(vs, violations(err, p)...)
			continue
		}
		m.all[p] = mod
		if !strings.HasSuffix(p, testSuffix) {
			m.served = append(m.served, p)
		}
	}
	if len(vs) > maxErrors {
		vs = vs[:maxErrors]
	}
	return m, vs
}

// compile makes a program of what is served, or says why not.
func compile(b policy.Bundle, m modules) (*program, []api.Violation) {
	entry := ast.MustParseRef("data." + EntryPackage(b.Kind))
	vs := checkShape(b.Kind, entry, m)
	if len(vs) > 0 {
		return nil, vs
	}
	p := &program{name: b.Name, kind: b.Kind, key: programKey(b), store: inmem.New()}
	served := make(map[string]*ast.Module, len(m.served))
	for _, path := range m.served {
		mod := m.all[path].Copy()
		if mod.Package.Path.Equal(entry) {
			p.locate(mod)
		}
		served[path] = mod
	}
	p.compiler = ast.NewCompiler().WithCapabilities(capabilities()).WithDefaultRegoVersion(ast.RegoV1).WithEnablePrintStatements(false)
	p.compiler.SetErrorLimit(2 * maxErrors) // each deny rule is there twice
	if p.compiler.Compile(served); p.compiler.Failed() {
		return nil, violations(p.compiler.Errors, "")
	}
	var err error
	if len(p.denies) > 0 {
		p.denyQuery, err = p.query(entry, locatedDeny)
	}
	if p.allow != nil && err == nil {
		p.allowQuery, err = p.query(entry, "allow")
	}
	if err != nil {
		return nil, violations(err, "")
	}
	return p, nil
}

// query compiles "<entry>.<rule> = result".
func (p *program) query(entry ast.Ref, rule string) (ast.Body, error) {
	ref := entry.Append(ast.StringTerm(rule))
	return p.compiler.QueryCompiler().Compile(ast.NewBody(ast.Equality.Expr(ast.NewTerm(ref), ast.NewTerm(resultVar))))
}

const resultVar = ast.Var("result")

// locate notes where the deny and allow rules are, and adds for the i-th rule
//
//	deny contains x if { body }
//
// the rule
//
//	__portolan_deny contains {"at": i, "value": x} if { body }
//
// so that one query gives every reason together with the rule that gave it,
// without tracing. Both sets have the same values, because they have the same
// bodies; rules that read deny go on reading the author's.
func (p *program) locate(mod *ast.Module) {
	var added []*ast.Rule
	for _, r := range mod.Rules {
		switch r.Head.Name {
		case "deny":
			c := r.Copy()
			key := ast.ObjectTerm(
				[2]*ast.Term{ast.StringTerm("at"), ast.IntNumberTerm(len(p.denies))},
				[2]*ast.Term{ast.StringTerm("value"), c.Head.Key},
			).SetLocation(c.Head.Key.Location)
			c.Head.Name, c.Head.Reference, c.Head.Key = locatedDeny, ast.Ref{ast.VarTerm(locatedDeny)}, key
			c.Module = mod
			added = append(added, c)
			p.denies = append(p.denies, location(r.Location))
		case "allow":
			if at := location(r.Location); p.allow == nil {
				p.allow = &at
			}
		}
	}
	mod.Rules = append(mod.Rules, added...)
}

func location(l *ast.Location) policy.Location {
	if l == nil {
		return policy.Location{}
	}
	return policy.Location{File: l.File, Row: l.Row, Col: l.Col}
}

// checkShape refuses bundles whose decision would be missing or not what it
// looks like.
func checkShape(kind string, entry ast.Ref, m modules) []api.Violation {
	var vs []api.Violation
	add := func(l *ast.Location, format string, args ...any) {
		vs = append(vs, violation(l, fmt.Sprintf(format, args...)))
	}
	decides := false
	for _, path := range slices.Sorted(maps.Keys(m.all)) {
		mod := m.all[path]
		test := strings.HasSuffix(path, testSuffix)
		if msg := checkPackage(kind, mod.Package.Path); msg != "" {
			add(mod.Package.Location, "%s", msg)
		}
		for _, r := range mod.Rules {
			name := string(r.Head.Name)
			if len(r.Head.Reference) > 0 {
				name = string(r.Head.Reference[0].Value.(ast.Var))
			}
			if strings.HasPrefix(name, reserved) {
				add(r.Location, "names that begin with %s are reserved", reserved)
			}
			if !mod.Package.Path.Equal(entry) || (name != "deny" && name != "allow") {
				continue
			}
			if test {
				add(r.Location, "%s in a file that is not served: move it out of %s", name, path)
				continue
			}
			if msg := checkDecision(kind, name, r); msg != "" {
				add(r.Location, "%s", msg)
				continue
			}
			decides = true
		}
	}
	if !decides && len(vs) == 0 {
		want := "allow"
		if kind == KindAdmission {
			want = "deny (or allow)"
		}
		vs = append(vs, api.Violation{Field: "spec.files", Message: fmt.Sprintf("no rule %s in package %s: nothing would be decided", want, EntryPackage(kind))})
	}
	return vs
}

// checkPackage keeps the reserved packages for what they are for.
func checkPackage(kind string, path ast.Ref) string {
	seg := func(i int) string {
		if i >= len(path) {
			return ""
		}
		s, _ := path[i].Value.(ast.String)
		return string(s)
	}
	switch {
	case seg(1) == "system":
		return "package system is reserved"
	case seg(1) == "portolan" && seg(2) != kind && seg(2) != kind+"_test":
		return fmt.Sprintf("package %s in a bundle of kind %s: it would never be asked; use package %s", strings.TrimPrefix(path.String(), "data."), kind, EntryPackage(kind))
	}
	return ""
}

func checkDecision(kind, name string, r *ast.Rule) string {
	switch {
	case name == "deny" && kind == KindNetwork:
		return "network policies decide by allow alone: make deny a condition of allow, under another name"
	case name == "deny" && (r.Head.RuleKind() != ast.MultiValue || len(r.Head.Reference) != 1 || len(r.Head.Args) > 0):
		return "deny must be a set of reasons: write deny contains reason if { … }"
	case name == "allow" && (r.Head.RuleKind() != ast.SingleValue || len(r.Head.Reference) != 1 || len(r.Head.Args) > 0):
		return "allow must be one value: write allow if { … }"
	}
	return ""
}

func programKey(b policy.Bundle) string {
	return b.Kind + "\n" + b.Name + "\n" + bundle.Digest(b.Files)
}

// violations turns a parser's or compiler's errors into violations with file and
// line.
func violations(err error, file string) []api.Violation {
	var list ast.Errors
	if one, ok := errors.AsType[*ast.Error](err); ok {
		list = ast.Errors{one}
	} else if !errors.As(err, &list) {
		return []api.Violation{{Field: "spec.files", Message: err.Error(), File: file}}
	}
	var vs []api.Violation
	for _, e := range list {
		msg := e.Message
		if name, ok := forbidden(msg); ok {
			msg = fmt.Sprintf("built-in %s is not available to policies", name)
		}
		if v := violation(e.Location, msg); !slices.Contains(vs, v) {
			vs = append(vs, v)
		}
	}
	if len(vs) > maxErrors {
		vs = vs[:maxErrors]
	}
	return vs
}

// violation puts file and line into the message too, because not every reader
// shows the fields.
func violation(l *ast.Location, message string) api.Violation {
	if l == nil || l.File == "" {
		return api.Violation{Field: "spec.files", Message: message}
	}
	row := max(1, l.Row) // an empty file has no line
	return api.Violation{Field: bundle.Field(l.File), Message: fmt.Sprintf("%s:%d: %s", l.File, row, message), File: l.File, Line: row}
}

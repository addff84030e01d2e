// Package opa decides with Rego v1, through Open Policy Agent. It owns what a
// bundle must look like, what a policy may call, and how long a decision may
// take. It never fetches anything, never logs, and never remembers a decision.
//
// The rule is default deny: a decision that is missing, undefined, of the wrong
// type, late or failed is a denial, and says so. Bundles are compiled apart, so
// that none can see, extend or break another's rules.
//
// A deadline stops an evaluation between two steps of it; a single call of a
// built-in cannot be stopped. Those that could run long are not available, and
// should one run all the same, the caller is answered with a denial in time while
// a bounded number of such evaluations ends by itself.
//
// Concurrency: a Set is immutable and safe for concurrent use.
package opa

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/bundle"
)

// Limits of bundles and decisions. Zero fields have defaults.
type Limits struct {
	// Bundle bounds files and bytes of each bundle.
	Bundle bundle.Limits
	// Deadline of one decision over all bundles that it asks; 50 ms. Time in which
	// the whole process was not running does not count, up to ten times as much.
	Deadline time.Duration
	// Concurrent evaluations at most, those that overran their deadline and have
	// not ended included; 8 per CPU, at least 32. More are refused.
	Concurrent int
	// Test bounds one test of a bundle, and Tests all of them; 5 s and 30 s.
	Test, Tests time.Duration
}

func (l Limits) withDefaults() Limits {
	if l.Deadline == 0 {
		l.Deadline = 50 * time.Millisecond
	}
	if l.Concurrent == 0 {
		l.Concurrent = max(32, 8*runtime.GOMAXPROCS(0))
	}
	if l.Test == 0 {
		l.Test = 5 * time.Second
	}
	if l.Tests == 0 {
		l.Tests = 30 * time.Second
	}
	return l
}

// Set is a set of compiled bundles. It is a policy.Admitter and a
// policy.Authorizer.
type Set struct {
	limits Limits
	// slots holds one token per evaluation under way; Update hands it on.
	slots chan struct{}
	// By tenant; "" are the guardrails.
	admission, network map[string][]*program
	programs           map[string]*program // by name
}

var (
	_ policy.Admitter   = (*Set)(nil)
	_ policy.Authorizer = (*Set)(nil)
)

// Fault says why a bundle cannot be used.
type Fault struct {
	// Bundle is its resource name.
	Bundle     string
	Violations []api.Violation
	// KeptFormer says that its former version goes on deciding. Otherwise the
	// bundle denies everything that it is asked.
	KeptFormer bool
}

// Error gives all violations.
func (f Fault) Error() string {
	return api.InvalidFields("compile "+f.Bundle, f.Violations).Error()
}

// Compile compiles all bundles, or fails with api.Invalid and the violations of
// all that are broken. Tests are not run; see Check.
func Compile(bundles []policy.Bundle, l Limits) (*Set, error) {
	s, faults := Update(nil, bundles, l)
	var vs []api.Violation
	for _, f := range faults {
		for _, v := range f.Violations {
			v.Message = f.Bundle + ": " + v.Message
			vs = append(vs, v)
		}
	}
	if err := api.InvalidFields("compile policy bundles", vs); err != nil {
		return nil, err
	}
	return s, nil
}

// Update makes the set that follows prev (nil for none). Bundles that did not
// change are not compiled again. A broken bundle keeps its former version; a
// broken one without a former version denies everything. So a Set always comes
// back, and it is never laxer than its bundles.
func Update(prev *Set, bundles []policy.Bundle, l Limits) (*Set, []Fault) {
	l = l.withDefaults()
	s := &Set{limits: l, admission: map[string][]*program{}, network: map[string][]*program{}, programs: make(map[string]*program, len(bundles))}
	if prev != nil && cap(prev.slots) == l.Concurrent {
		s.slots = prev.slots
	} else {
		s.slots = make(chan struct{}, l.Concurrent)
	}
	var faults []Fault
	sorted := slices.SortedFunc(slices.Values(bundles), func(a, b policy.Bundle) int { return strings.Compare(a.Name, b.Name) })
	for _, b := range sorted {
		p, fault := s.next(prev, b)
		if fault != nil {
			faults = append(faults, *fault)
		}
		s.programs[b.Name] = p
		tenant := api.TenantOf(b.Name)
		switch p.kind {
		case KindAdmission:
			s.admission[tenant] = append(s.admission[tenant], p)
		case KindNetwork:
			s.network[tenant] = append(s.network[tenant], p)
		}
	}
	return s, faults
}

// next gives the program of a bundle.
func (s *Set) next(prev *Set, b policy.Bundle) (*program, *Fault) {
	if _, ok := s.programs[b.Name]; ok {
		vs := []api.Violation{{Field: "name", Message: "two bundles of this name"}}
		return broken(b, vs), &Fault{Bundle: b.Name, Violations: vs}
	}
	var former *program
	if prev != nil {
		former = prev.programs[b.Name]
	}
	if former != nil && former.key == programKey(b) {
		return former, nil
	}
	p, vs := compileBundle(b, s.limits)
	switch {
	case len(vs) == 0:
		return p, nil
	case former != nil && former.kind == b.Kind && former.broken == "":
		return former, &Fault{Bundle: b.Name, Violations: vs, KeptFormer: true}
	default:
		return broken(b, vs), &Fault{Bundle: b.Name, Violations: vs}
	}
}

func compileBundle(b policy.Bundle, l Limits) (*program, []api.Violation) {
	if _, err := api.ParseName(b.Name, api.FleetPolicyPattern, api.TenantPolicyPattern); err != nil {
		return nil, []api.Violation{{Field: "name", Message: err.Error()}}
	}
	m, vs := parse(b, l)
	if len(vs) > 0 {
		return nil, vs
	}
	return compile(b, m)
}

// broken is a program that denies whatever it is asked. One of an unknown kind is
// asked nothing.
func broken(b policy.Bundle, vs []api.Violation) *program {
	return &program{name: b.Name, kind: b.Kind, broken: fmt.Sprintf("the bundle is broken: %s", vs[0])}
}

// Bundles lists the names of the bundles of a kind, in order.
func (s *Set) Bundles(kind string) []string {
	var names []string
	for _, p := range s.programs {
		if p.kind == kind {
			names = append(names, p.name)
		}
	}
	slices.Sort(names)
	return names
}

package opa

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/portolan-io/portolan/policy"
)

func admission(name string, files ...string) policy.Bundle {
	b := policy.Bundle{Name: name, Kind: KindAdmission, Files: map[string]string{}}
	for i := 0; i < len(files); i += 2 {
		b.Files[files[i]] = files[i+1]
	}
	return b
}

func network(name, body string) policy.Bundle {
	return policy.Bundle{Name: name, Kind: KindNetwork, Files: map[string]string{"n.rego": "package portolan.network\n\n" + body}}
}

func mustCompile(t testing.TB, l Limits, bundles ...policy.Bundle) *Set {
	t.Helper()
	s, err := Compile(bundles, l)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const limitsRego = `package portolan.admission

# every container says what it may use
deny contains {"msg": msg, "field": field} if {
	some i, c in input.object.spec.containers
	not c.limits.memory
	msg := sprintf("container %s has no memory limit", [c.name])
	field := sprintf("spec.containers[%d].limits.memory", [i])
}

deny contains "mutable tag" if {
	some c in input.object.spec.containers
	endswith(c.image, ":latest")
}

deny contains msg if {
	input.operation == "DELETE"
	input.old_object.labels.keep == "true"
	msg := "kept objects are not deleted"
}
`

func workload(name string, containers ...any) policy.Admission {
	return policy.Admission{Operation: "CREATE", Kind: "Workload", Actor: "spiffe://portolan.internal/user/ann", Object: map[string]any{
		"name": name, "spec": map[string]any{"containers": containers},
	}}
}

func TestDenialsNameRuleFileAndLine(t *testing.T) {
	s := mustCompile(t, Limits{}, admission("policyBundles/limits", "limits.rego", limitsRego))
	d := s.Admit(t.Context(), workload("tenants/shop/workloads/web",
		map[string]any{"name": "a", "image": "r/a:latest", "limits": map[string]any{"memory": "1Gi"}},
		map[string]any{"name": "b", "image": "r/b:v1"}))
	want := []policy.Denial{
		{Rule: denyRule, Message: "container b has no memory limit", Field: "spec.containers[1].limits.memory", Location: policy.Location{File: "limits.rego", Row: 4, Col: 1}, Bundle: "policyBundles/limits"},
		{Rule: denyRule, Message: "mutable tag", Location: policy.Location{File: "limits.rego", Row: 11, Col: 1}, Bundle: "policyBundles/limits"},
	}
	if d.Allowed {
		t.Error("allowed")
	}
	if diff := cmp.Diff(want, d.Denials); diff != "" {
		t.Error(diff)
	}
	if d := s.Admit(t.Context(), workload("tenants/shop/workloads/web", map[string]any{"name": "a", "image": "r/a:v1", "limits": map[string]any{"memory": "1Gi"}})); !d.Allowed || len(d.Denials) > 0 {
		t.Errorf("refused: %+v", d.Denials)
	}
}

func TestSameReasonOfTwoRulesIsTwoDenials(t *testing.T) {
	s := mustCompile(t, Limits{}, admission("policyBundles/b", "a.rego", "package portolan.admission\n\ndeny contains \"no\" if input.kind == \"Workload\"\n\ndeny contains \"no\" if input.operation == \"CREATE\"\n",
		"b.rego", "package portolan.admission\n\ndeny contains \"no\"\n"))
	var at []string
	for _, d := range s.Admit(t.Context(), workload("tenants/t/workloads/w")).Denials {
		at = append(at, fmt.Sprintf("%s:%d", d.Location.File, d.Location.Row))
	}
	if diff := cmp.Diff([]string{"a.rego:3", "a.rego:5", "b.rego:3"}, at); diff != "" {
		t.Error(diff)
	}
}

func TestAdmission(t *testing.T) {
	const pkg = "package portolan.admission\n\n"
	in := workload("tenants/shop/workloads/web")
	for _, c := range []struct {
		name    string
		bundles []policy.Bundle
		want    []string // "bundle: message"; empty is allowed
	}{
		{name: "nothing to ask", want: []string{": no admission policy applies"}},
		{name: "guardrail and tenant both speak", bundles: []policy.Bundle{
			admission("policyBundles/g", "g.rego", pkg+`deny contains "g"`), admission("tenants/shop/policyBundles/t", "t.rego", pkg+`deny contains "t"`),
		}, want: []string{"policyBundles/g: g", "tenants/shop/policyBundles/t: t"}},
		{name: "another tenant's bundle is not asked", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+"allow := true"), admission("tenants/other/policyBundles/t", "t.rego", pkg+`deny contains "t"`)}},
		{name: "allow undefined", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`allow if input.kind == "Nothing"`)}, want: []string{"policyBundles/g: no allow rule applies"}},
		{name: "allow true", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`allow if input.kind == "Workload"`)}},
		{name: "allow not a boolean", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`allow := "true"`)}, want: []string{"policyBundles/g: allow is not true"}},
		{name: "deny beats allow", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+"allow := true\ndeny contains \"no\"")}, want: []string{"policyBundles/g: no"}},
		{name: "allow may read deny", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+"allow if count(deny) == 0\ndeny contains \"no\"")}, want: []string{"policyBundles/g: no", "policyBundles/g: no allow rule applies"}},
		{name: "a number is still a denial", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`deny contains 7`)}, want: []string{"policyBundles/g: denied (the rule gives neither a string nor an object with msg)"}},
		{name: "false is still a denial", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`deny contains false`)}, want: []string{"policyBundles/g: denied (the rule gives neither a string nor an object with msg)"}},
		{name: "an error of a built-in denies", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+`deny contains "big" if units.parse_bytes(input.kind) > 1`)}, want: []string{"policyBundles/g: evaluation failed: units.parse_bytes: units.parse_bytes: no byte amount provided"}},
		{name: "a conflict denies", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+"allow := input.kind\nallow := input.operation")}, want: []string{"policyBundles/g: evaluation failed: rule data.portolan.admission.allow produced conflicting values:\n  \"Workload\" at g.rego:3\n  \"CREATE\" at g.rego:4"}},
		{name: "bundles do not see each other", bundles: []policy.Bundle{
			admission("policyBundles/a", "a.rego", pkg+"deny contains \"seen\" if data.lib.x\ndeny contains \"seen\" if data.portolan.admission.secret"),
			admission("policyBundles/b", "b.rego", pkg+"secret := true\ndeny contains \"b\" if input.kind == \"Nothing\"", "lib.rego", "package lib\n\nx := true"),
		}},
		{name: "facts and roles arrive", bundles: []policy.Bundle{admission("policyBundles/g", "g.rego", pkg+"allow if {\n\tinput.facts.digest == \"sha256:1\"\n\t\"fleet-admin\" in input.roles\n\tnot input.old_object\n}")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := in
			in.Facts, in.Roles = map[string]any{"digest": "sha256:1"}, []string{"fleet-admin"}
			d := mustCompile(t, Limits{}, c.bundles...).Admit(t.Context(), in)
			var got []string
			for _, r := range d.Denials {
				got = append(got, r.Bundle+": "+r.Message)
			}
			if diff := cmp.Diff(c.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
			if d.Allowed != (len(c.want) == 0) {
				t.Errorf("allowed = %v", d.Allowed)
			}
		})
	}
}

func TestBadBundles(t *testing.T) {
	const pkg = "package portolan.admission\n\n"
	for _, c := range []struct {
		name, rego string
		kind       string
		path       string
		want       string // a violation must contain it
	}{
		{name: "http.send", rego: pkg + "deny contains \"x\" if {\n\tr := http.send({\"url\": \"http://a\", \"method\": \"get\"})\n\tr.status_code == 200\n}", want: "a.rego:4: built-in http.send is not available to policies"},
		{name: "net", rego: pkg + "deny contains \"x\" if net.cidr_contains(\"10.0.0.0/8\", input.x)", want: "a.rego:3: built-in net.cidr_contains is not available to policies"},
		{name: "runtime", rego: pkg + "deny contains \"x\" if opa.runtime().env.HOME", want: "a.rego:3: built-in opa.runtime is not available to policies"},
		{name: "shift", rego: pkg + "deny contains \"x\" if bits.lsh(1, 64000000) > 0", want: "a.rego:3: built-in bits.lsh is not available to policies"},
		{name: "range", rego: pkg + "deny contains \"x\" if count(numbers.range(1, 1000000000)) > 0", want: "a.rego:3: built-in numbers.range is not available to policies"},
		{name: "clock", rego: pkg + "deny contains \"x\" if time.now_ns() > 0", want: "a.rego:3: built-in time.now_ns is not available to policies"},
		{name: "random", rego: pkg + "deny contains \"x\" if rand.intn(\"a\", 2) > 0", want: "a.rego:3: built-in rand.intn is not available to policies"},
		{name: "syntax", rego: pkg + "deny contains if {", want: "a.rego:3: "},
		{name: "version 0", rego: pkg + "deny[msg] { msg := \"x\" }", want: "a.rego:3: "},
		{name: "type", rego: pkg + "deny contains \"x\" if count(1) == 2", want: "a.rego:3: count: invalid argument(s)"},
		{name: "unsafe variable", rego: pkg + "deny contains x if input.y", want: "a.rego:3: var x is unsafe"},
		{name: "recursion", rego: pkg + "deny contains \"x\" if p\np if q\nq if p", want: "recursive"},
		{name: "wrong package", rego: "package portolan.network\n\nallow := true", want: "a.rego:1: package portolan.network in a bundle of kind admission"},
		{name: "no decision", rego: pkg + "denny contains \"x\"", want: "no rule deny (or allow) in package portolan.admission"},
		{name: "deny as value", rego: pkg + "deny := true", want: "a.rego:3: deny must be a set of reasons"},
		{name: "deny as object", rego: pkg + "deny[x] := true if x := input.y", want: "a.rego:3: deny must be a set of reasons"},
		{name: "deny as function", rego: pkg + "deny(x) := x", want: "a.rego:3: deny must be a set of reasons"},
		{name: "deny below", rego: pkg + "deny.a contains \"x\"", want: "a.rego:3: deny must be a set of reasons"},
		{name: "allow as set", rego: pkg + "allow contains \"x\"", want: "a.rego:3: allow must be one value"},
		{name: "reserved name", rego: pkg + "deny contains \"x\" if input.y\n__portolan_deny contains {\"at\": 0}", want: "a.rego:4: names that begin with __portolan are reserved"},
		{name: "system package", rego: "package system.x\n\ndeny := true", want: "a.rego:1: package system is reserved"},
		{name: "network with deny", kind: KindNetwork, rego: "package portolan.network\n\ndeny contains \"x\"\nallow := true", want: "a.rego:3: network policies decide by allow alone"},
		{name: "unknown kind", kind: "placement", rego: pkg + "deny contains \"x\"", want: `"placement" is no kind of policy`},
		{name: "path", path: "../a.rego", rego: pkg + "deny contains \"x\"", want: "not a canonical relative path"},
		{name: "not rego", path: "data.json", rego: "{}", want: "only .rego files"},
		{name: "empty", rego: "", want: "a.rego:1: empty module"},
		{name: "decision in a test file", path: "a_test.rego", rego: pkg + "deny contains \"x\"", want: "deny in a file that is not served"},
		{name: "too big", rego: pkg + "deny contains \"x\"\n#" + strings.Repeat("x", 256<<10), want: "at most 262144"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.path == "" {
				c.path = "a.rego"
			}
			if c.kind == "" {
				c.kind = KindAdmission
			}
			b := policy.Bundle{Name: "policyBundles/b", Kind: c.kind, Files: map[string]string{c.path: c.rego}}
			var all []string
			for _, v := range Check(t.Context(), b) {
				all = append(all, v.Field+" | "+v.Message)
			}
			if !strings.Contains(strings.Join(all, "\n"), c.want) {
				t.Errorf("want %q in:\n%s", c.want, strings.Join(all, "\n"))
			}
			seen := map[string]bool{}
			for _, m := range all {
				if seen[m] {
					t.Errorf("twice: %s", m)
				}
				seen[m] = true
			}
			if _, err := Compile([]policy.Bundle{b}, Limits{}); err == nil {
				t.Error("Compile accepted it")
			}
		})
	}
}

// slow makes 60^6 combinations: far longer than any deadline here.
const slow = `allow if {
	s := "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefgh"
	xs := split(s, "")
	some a in xs
	some b in xs
	some c in xs
	some d in xs
	some e in xs
	some f in xs
	concat("", [a, b, c, d, e, f]) == input.service
}`

func TestLateIsDenied(t *testing.T) {
	s := mustCompile(t, Limits{Deadline: 20 * time.Millisecond}, network("policyBundles/slow", slow))
	start := time.Now()
	d := s.Authorize(t.Context(), policy.Network{Service: "none"})
	if d.Allowed || !strings.Contains(d.Denials[0].Message, "no decision within 20ms") {
		t.Errorf("%+v", d)
	}
	if d.HTTPStatus != 403 || d.Denials[0].Bundle != "policyBundles/slow" {
		t.Errorf("%+v", d)
	}
	// Well under the hours that it would take; the bound allows for a busy machine.
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	// Every slot comes back: evaluations are stopped, not only abandoned.
	give := time.After(30 * time.Second)
	for range cap(s.slots) {
		select {
		case s.slots <- struct{}{}:
		case <-give:
			t.Fatal("the evaluation goes on after its deadline")
		}
	}
	for range cap(s.slots) {
		<-s.slots
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if d := s.Authorize(ctx, policy.Network{Service: "none"}); d.Allowed || !strings.Contains(d.Denials[0].Message, "gave up") {
		t.Errorf("%+v", d)
	}
}

func TestTooManyEvaluationsAreDenied(t *testing.T) {
	s := mustCompile(t, Limits{Concurrent: 2}, network("tenants/shop/policyBundles/g", "allow := true"))
	in := policy.Network{Destination: policy.Peer{Tenant: "shop"}}
	s.slots <- struct{}{}
	s.slots <- struct{}{}
	if d := s.Authorize(t.Context(), in); d.Allowed || !strings.Contains(d.Denials[0].Message, "too many") {
		t.Errorf("%+v", d)
	}
	<-s.slots
	if d := s.Authorize(t.Context(), in); !d.Allowed {
		t.Errorf("%+v", d)
	}
}

func TestUpdateKeepsTheLastGood(t *testing.T) {
	good, bad := network("tenants/shop/policyBundles/g", "allow := true"), network("tenants/shop/policyBundles/g", "allow := nonsense(")
	in := policy.Network{Destination: policy.Peer{Tenant: "shop"}}
	s, faults := Update(nil, []policy.Bundle{good}, Limits{})
	if len(faults) > 0 || !s.Authorize(t.Context(), in).Allowed {
		t.Fatalf("%v", faults)
	}
	kept := s.programs[good.Name]
	s, faults = Update(s, []policy.Bundle{bad}, Limits{})
	if len(faults) != 1 || !faults[0].KeptFormer || !strings.Contains(faults[0].Error(), "n.rego:3") {
		t.Errorf("%+v", faults)
	}
	if !s.Authorize(t.Context(), in).Allowed || s.programs[good.Name] != kept {
		t.Error("the former version does not decide")
	}
	// A broken bundle that never was good denies, whatever the others say.
	s, faults = Update(s, []policy.Bundle{good, {Name: "tenants/shop/policyBundles/x", Kind: KindNetwork, Files: bad.Files}}, Limits{})
	if len(faults) != 1 || faults[0].KeptFormer {
		t.Errorf("%+v", faults)
	}
	if d := s.Authorize(t.Context(), in); d.Allowed || !strings.Contains(d.Denials[0].Message, "the bundle is broken") {
		t.Errorf("%+v", d)
	}
	if s.programs[good.Name] != kept {
		t.Error("an unchanged bundle was compiled again")
	}
	// Removed is removed.
	s, _ = Update(s, nil, Limits{})
	if d := s.Authorize(t.Context(), in); d.Allowed {
		t.Error("allowed without any bundle")
	}
	// A name given twice is nobody's.
	s, faults = Update(nil, []policy.Bundle{good, good}, Limits{})
	if len(faults) != 1 || s.Authorize(t.Context(), in).Allowed {
		t.Errorf("%+v", faults)
	}
}

func TestHeadersOfADenial(t *testing.T) {
	s := mustCompile(t, Limits{}, network("policyBundles/g", `allow := {"allowed": false, "http_status": 302, "msg": "log in", "body": "go",
	"headers": {"Location": "https://login", "X-Many": ["a", "b"], "X-Bad": "a\r\nSet-Cookie: b", "x y": "z", "X-Num": 7}}`))
	d := s.Authorize(t.Context(), policy.Network{})
	want := policy.Decision{
		Denials: []policy.Denial{{Rule: networkRule, Message: "log in", Location: policy.Location{File: "n.rego", Row: 3, Col: 1}, Bundle: "policyBundles/g"}},
		Headers: map[string]string{"location": "https://login", "x-many": "a, b"}, HTTPStatus: 302, Body: "go",
	}
	if diff := cmp.Diff(want, d, cmpopts.IgnoreFields(policy.Decision{}, "Took")); diff != "" {
		t.Error(diff)
	}
}

func TestConcurrentDecisions(t *testing.T) {
	s := mustCompile(t, Limits{Deadline: 10 * time.Second, Concurrent: 1000}, admission("policyBundles/limits", "limits.rego", limitsRego),
		network("tenants/shop/policyBundles/n", `allow if input.source.workload == "web"`))
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 20 {
				from := []string{"web", "spy"}[i%2]
				if d := s.Authorize(t.Context(), policy.Network{Source: policy.Peer{Workload: from}, Destination: policy.Peer{Tenant: "shop"}}); d.Allowed != (from == "web") {
					t.Errorf("%s: %+v", from, d)
				}
				if d := s.Admit(t.Context(), workload("tenants/a/workloads/b", map[string]any{"name": "x", "image": "i"})); len(d.Denials) != 1 {
					t.Errorf("%+v", d)
				}
			}
		})
	}
	wg.Wait()
}

// Package portolan holds the tests that keep the repository honest: the import
// layers as a table, one importer per third-party library, a comment on every
// package, and what each binary may link.
package portolan

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"sort"
	"strings"
	"testing"
)

const module = "github.com/portolan-io/portolan"

// layers assigns every folder its layer. The longest matching prefix counts. A
// package may import packages of a lower layer, and of its own layer only when
// it is below them in the tree or named in sideways.
var layers = map[string]int{
	"federation/api": 0, "policy": 0, "identity": 0,
	"federation/admit": 1, "federation/place": 1,
	"cluster/reconcile": 1, "cluster/schedule": 1,
	"xds/model": 1, "xds/translate": 1, "nodeagent/task": 1,
	"federation/store": 2, "federation/client": 2, "nodeagent/engine": 2,
	"policy/opa": 2, "policy/bundle": 2, "policy/policytest": 2,
	"identity/ca": 2, "identity/trust": 2, "identity/attest": 2, "identity/workloadapi": 2, "identity/source": 2,
	"cluster/state": 3, "xds/distribute": 3, "nodeagent/network": 3, "nodeagent/proxy": 3,
	"federation/control": 4, "federation/fleet": 4, "federation/server": 4, "federation/cli": 4, "federation/localfleet": 4,
	"cluster/link": 4, "cluster/dispatch": 4, "cluster/manager": 4,
	"nodeagent/agent": 4, "nodeagent/warden": 4,
	"federation/cmd": 5, "cluster/cmd": 5, "nodeagent/cmd": 5, "e2e": 6,
}

// sideways lists the edges inside one layer, each with its reason.
var sideways = map[string]string{
	"identity/ca -> identity/attest":          "tokens are minted over the authority's root",
	"identity/source -> identity/trust":       "a source gives the certificate that trust puts into TLS",
	"policy/opa -> policy/bundle":             "the engine digests what it compiles",
	"nodeagent/proxy -> xds/distribute":       "what the version of a resource is",
	"xds/translate -> xds/model":              "translation reads the resolved graph",
	"federation/cli -> federation/localfleet": "up, down and local are verbs of the CLI",
}

// confined names for each third-party library the folders that may import it.
// Test files count too; e2e may import anything.
var confined = map[string][]string{
	"github.com/jackc/pgx":                       {"federation/store/cockroach", "federation/store/storetest"},
	"github.com/cockroachdb/cockroach-go":        {"federation/store/cockroach"},
	"github.com/pressly/goose":                   {"federation/store/cockroach"},
	"github.com/containerd/":                     {"nodeagent/engine/containerd"},
	"github.com/open-policy-agent/opa":           {"policy/opa"},
	"go.etcd.io/etcd":                            {"cluster/state/etcd"},
	"github.com/vishvananda/":                    {"nodeagent/network", "federation/localfleet"},
	"github.com/google/nftables":                 {"nodeagent/network", "federation/localfleet"},
	"github.com/miekg/dns":                       {"nodeagent/warden"},
	"github.com/envoyproxy/go-control-plane/pkg": {"xds/distribute"},
	"github.com/google/go-containerregistry":     {"federation/server", "federation/localfleet", "nodeagent/engine"},
	"github.com/spf13/cobra":                     {"federation/cli", "federation/cmd", "cluster/cmd", "nodeagent/cmd"},
	"charm.land/":                                {"federation/cli", "federation/cmd"},
	"github.com/spiffe/go-spiffe":                {"identity"},
	"go.yaml.in/yaml":                            {"federation/cli"},
	"go.einride.tech/aip":                        {"federation/server"},
	"buf.build/go/protovalidate":                 {"federation/server"},
}

// budgets says what a binary must not link, and why.
var budgets = map[string]map[string]string{
	"nodeagent/cmd/portolan-node": {
		"github.com/jackc/pgx": "a node never speaks to the federation's store", "go.etcd.io/etcd/server": "nor holds a cluster's",
	},
	"federation/cmd/portolan": {
		"github.com/containerd/containerd/v2": "the CLI runs no containers", "github.com/jackc/pgx": "the CLI speaks to the API", "go.etcd.io/etcd": "the CLI holds no state",
	},
	"federation/cmd/portolan-federation": {"github.com/containerd/containerd/v2": "nothing runs here", "go.etcd.io/etcd": "its store is SQL"},
	"cluster/cmd/portolan-cluster":       {"github.com/jackc/pgx": "its store is etcd", "github.com/containerd/containerd/v2": "nothing runs here"},
}

type pkg struct {
	ImportPath   string
	Dir          string
	Doc          string
	Name         string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
	GoFiles      []string
}

func load(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,Name,Imports,TestImports,XTestImports,Deps,GoFiles", "./...").Output()
	if err != nil {
		if ee, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("go list: %v\n%s", err, ee.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func rel(importPath string) (string, bool) {
	if importPath == module {
		return "", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

// unit gives the folder of the table that a package belongs to.
func unit(dir string) (string, int, bool) {
	for d := dir; d != "." && d != ""; d = path.Dir(d) {
		if l, ok := layers[d]; ok {
			return d, l, true
		}
	}
	return "", 0, false
}

func plane(dir string) string {
	top, _, _ := strings.Cut(dir, "/")
	switch top {
	case "federation", "cluster", "nodeagent":
		return top
	}
	return ""
}

// edge says why a package may not import another; empty when it may.
func edge(from, to string) string {
	fu, fl, ok := unit(from)
	if !ok {
		return fmt.Sprintf("%s is in no layer: add it to the table", from)
	}
	tu, tl, ok := unit(to)
	if !ok {
		return fmt.Sprintf("%s is in no layer: add it to the table", to)
	}
	if fu == tu || strings.HasPrefix(tu, fu+"/") && fl <= tl && fl >= 5 {
		return ""
	}
	if fp, tp := plane(from), plane(to); fp != "" && tp != "" && fp != tp && tl > 0 {
		return fmt.Sprintf("%s imports %s: a plane never imports another above L0", from, to)
	}
	if fl > tl {
		return ""
	}
	if _, ok := sideways[fu+" -> "+tu]; ok && fl == tl {
		return ""
	}
	return fmt.Sprintf("%s (L%d) imports %s (L%d): imports go down", from, fl, to, tl)
}

func TestImportLayers(t *testing.T) {
	for _, p := range load(t) {
		from, ok := rel(p.ImportPath)
		if !ok || from == "" {
			continue
		}
		for _, imp := range p.Imports {
			if to, ok := rel(imp); ok {
				if why := edge(from, to); why != "" {
					t.Error(why)
				}
			}
		}
	}
}

func TestEdgeRules(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"federation/server", "federation/store", true},
		{"federation/server", "federation/control", false},
		{"cluster/link", "federation/fleet", false},
		{"cluster/link", "federation/api/linkv1", true},
		{"nodeagent/task", "nodeagent/engine", false},
		{"nodeagent/agent", "nodeagent/task", true},
		{"federation/store/mem", "federation/store", true},
		{"xds/translate", "xds/model", true},
		{"xds/model", "xds/translate", false},
		{"nowhere", "federation/api", false},
	} {
		if got := edge(c.from, c.to) == ""; got != c.ok {
			t.Errorf("edge(%s, %s) allowed = %v, want %v", c.from, c.to, got, c.ok)
		}
	}
}

// TestTablesAreCurrent: a row whose folder or edge is gone would allow what
// nobody decided.
func TestTablesAreCurrent(t *testing.T) {
	edges := map[string]bool{}
	folders := map[string]bool{}
	for _, p := range load(t) {
		from, _ := rel(p.ImportPath)
		fu, _, _ := unit(from)
		for dir := from; dir != "." && dir != ""; dir = path.Dir(dir) {
			folders[dir] = true
		}
		for _, imp := range p.Imports {
			if to, ok := rel(imp); ok {
				tu, _, _ := unit(to)
				edges[fu+" -> "+tu] = true
			}
		}
	}
	for dir := range layers {
		if !folders[dir] {
			t.Errorf("layers: there is no package in %s", dir)
		}
	}
	for e := range sideways {
		if !edges[e] {
			t.Errorf("sideways: nothing needs %s", e)
		}
	}
	for lib, homes := range confined {
		for _, h := range homes {
			if !folders[h] {
				t.Errorf("confined: %s belongs to %s, which is gone", lib, h)
			}
		}
	}
}

func TestThirdPartyIsConfined(t *testing.T) {
	for _, p := range load(t) {
		from, _ := rel(p.ImportPath)
		if from == "" || strings.HasPrefix(from, "e2e") {
			continue
		}
		imports := append(append(append([]string{}, p.Imports...), p.TestImports...), p.XTestImports...)
		for _, imp := range imports {
			for lib, homes := range confined {
				if !strings.HasPrefix(imp, lib) {
					continue
				}
				home := false
				for _, h := range homes {
					home = home || from == h || strings.HasPrefix(from, h+"/")
				}
				if !home {
					t.Errorf("%s imports %s, which belongs to %s", from, imp, strings.Join(homes, ", "))
				}
			}
		}
	}
}

func TestEveryPackageHasAComment(t *testing.T) {
	for _, p := range load(t) {
		if from, _ := rel(p.ImportPath); p.Doc == "" && len(p.GoFiles) > 0 && !generated(from) {
			t.Errorf("%s has no package comment", from)
		}
	}
}

func generated(dir string) bool {
	return strings.HasPrefix(dir, "federation/api/") && strings.HasSuffix(dir, "v1")
}

func TestDependencyBudgets(t *testing.T) {
	found := map[string]bool{}
	for _, p := range load(t) {
		from, _ := rel(p.ImportPath)
		budget, ok := budgets[from]
		if !ok {
			continue
		}
		found[from] = true
		for _, dep := range p.Deps {
			for lib, why := range budget {
				if strings.HasPrefix(dep, lib) {
					t.Errorf("%s links %s: %s", from, dep, why)
				}
			}
		}
	}
	for b := range budgets {
		if !found[b] {
			t.Errorf("binary %s is gone; mend the table", b)
		}
	}
}

// required must be direct requirements of go.mod, each used for what it is for.
var required = []string{
	"github.com/envoyproxy/go-control-plane", "google.golang.org/grpc", "github.com/cockroachdb/cockroach-go/v2",
	"github.com/containerd/containerd/v2", "github.com/open-policy-agent/opa", "github.com/spiffe/go-spiffe/v2",
}

func TestGoModIsClean(t *testing.T) {
	out, err := exec.Command("go", "mod", "edit", "-json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
		Replace []any
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	if len(mod.Replace) > 0 {
		t.Error("go.mod has replace directives")
	}
	direct := map[string]bool{}
	for _, r := range mod.Require {
		direct[r.Path] = !r.Indirect
	}
	sort.Strings(required)
	for _, r := range required {
		if !direct[r] {
			t.Errorf("go.mod does not require %s directly", r)
		}
	}
}

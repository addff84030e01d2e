package translate

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/xds/model"
)

// TestGolden runs the stories in testdata. "graph" builds the mesh of a node from
// YAML; "sidecar", "ingress" and "east-west" print what a proxy gets, narrowed by
// type= and name= (a substring). Each proxy's whole configuration is also put to
// the real Envoy, when there is one.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			var g *model.Graph
			datadriven.RunTest(t, file, func(t *testing.T, d *datadriven.TestData) string {
				if d.Cmd == "graph" {
					in := parseInput(t, d.Input)
					var problems []model.Problem
					g, problems = model.Build(in)
					return describe(g, problems)
				}
				p := proxyArgs(t, d)
				res, problems := New(g).Proxy(p)
				acceptedByEnvoy(t, d.Pos, res)
				var typ, name string
				d.MaybeScanArgs(t, "type", &typ)
				d.MaybeScanArgs(t, "name", &name)
				return printProblems(problems) + printResources(t, res, typ, name)
			})
		})
	}
}

func proxyArgs(t *testing.T, d *datadriven.TestData) Proxy {
	roles := map[string]Role{"sidecar": Sidecar, "ingress": Ingress, "east-west": EastWest}
	p := Proxy{Role: roles[d.Cmd], Address: netip.MustParseAddr("10.1.1.1"), AuthzSocket: "/run/portolan/n1/proxies/x/xds.sock"}
	if p.Role == "" {
		d.Fatalf(t, "unknown command %q", d.Cmd)
	}
	d.MaybeScanArgs(t, "tenant", &p.Tenant)
	d.MaybeScanArgs(t, "workload", &p.Workload)
	p.ID = cmp.Or(p.Workload, d.Cmd) + "-abcde"
	return p
}

// parseInput reads a model.Input whose lists hold messages in protojson's form.
func parseInput(t *testing.T, text string) model.Input {
	t.Helper()
	var raw struct {
		Config                                                  json.RawMessage
		Services, Endpoints, Routes, Bundles, Permits, Assigned []json.RawMessage
	}
	if err := yaml.UnmarshalStrict([]byte(text), &raw); err != nil {
		t.Fatal(err)
	}
	in := model.Input{Config: &nodev1.NodeConfig{}}
	if err := protojson.Unmarshal(raw.Config, in.Config); err != nil {
		t.Fatal(err)
	}
	in.Services = parseAll[nodev1.MeshService](t, raw.Services)
	in.Endpoints = parseAll[nodev1.MeshEndpoints](t, raw.Endpoints)
	in.Routes = parseAll[nodev1.MeshRoute](t, raw.Routes)
	in.Permits = parseAll[linkv1.PeerPermit](t, raw.Permits)
	in.Assignments = parseAll[nodev1.Assignment](t, raw.Assigned)
	in.Bundles = parseAll[linkv1.TrustBundle](t, raw.Bundles)
	for _, b := range in.Bundles {
		b.X509Roots = []byte(testRoot)
	}
	return in
}

func parseAll[M any, P interface {
	*M
	proto.Message
}](t *testing.T, raw []json.RawMessage,
) []*M {
	t.Helper()
	var out []*M
	for _, r := range raw {
		m := P(new(M))
		if err := protojson.Unmarshal(r, m); err != nil {
			t.Fatalf("%s: %v", r, err)
		}
		out = append(out, (*M)(m))
	}
	return out
}

// describe prints a graph shortly.
func describe(g *model.Graph, problems []model.Problem) string {
	var b strings.Builder
	for _, s := range g.Services {
		fmt.Fprintf(&b, "service %s vip=%s workload=%s revisions=%v endpoints=%d remotes=%d", s.Key, s.VIP, s.Workload, s.Revisions, len(s.Endpoints), len(s.Remotes))
		if s.Route != nil {
			fmt.Fprintf(&b, " route=%s", s.Route.Name)
		}
		b.WriteByte('\n')
	}
	for _, h := range g.Hosts {
		fmt.Fprintf(&b, "host %s route=%s\n", h.Name, h.Route.Key)
	}
	for _, id := range g.Peers {
		fmt.Fprintf(&b, "peer %s\n", id)
	}
	return b.String() + printProblems(problems)
}

func printProblems(problems []model.Problem) string {
	var b strings.Builder
	for _, p := range problems {
		fmt.Fprintf(&b, "PROBLEM %s\n", p)
	}
	return b.String()
}

func printResources(t *testing.T, r Resources, typ, name string) string {
	t.Helper()
	var b strings.Builder
	for _, typeURL := range []string{ClusterType, EndpointType, ListenerType, RouteType, SecretType} {
		short := typeURL[strings.LastIndex(typeURL, ".")+1:]
		if typ != "" && !strings.EqualFold(typ, short) {
			continue
		}
		for _, res := range r[typeURL] {
			if !strings.Contains(res.Name, name) {
				continue
			}
			fmt.Fprintf(&b, "--- %s %s\n%s", short, res.Name, toYAML(t, res.Message))
		}
	}
	return b.String()
}

func toYAML(t *testing.T, m proto.Message) string {
	t.Helper()
	j, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	y, err := yaml.JSONToYAML(j)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(y), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.TrimSpace(l) == "" })
	for i, l := range lines { // roots are long and say nothing
		if before, _, ok := strings.Cut(l, "inline_bytes:"); ok {
			lines[i] = before + "inline_bytes: (roots)"
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

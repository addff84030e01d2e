package translate

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/xds/model"
)

// bigMesh is n services of one tenant, each with two replicas, an export and a
// canary route on every tenth.
func bigMesh(n int) model.Input {
	in := model.Input{
		Config:  &nodev1.NodeConfig{Cluster: "eu-west", Region: "eu", Zone: "eu-a", Fleet: "portolan.internal", TrustDomain: "eu-west.portolan.internal"},
		Bundles: []*linkv1.TrustBundle{{TrustDomain: "eu-west.portolan.internal", X509Roots: []byte(testRoot)}},
	}
	for i := range n {
		name := fmt.Sprintf("svc-%03d", i)
		in.Services = append(in.Services, &nodev1.MeshService{
			Tenant: "shop", Service: name, Workload: name, VirtualIp: fmt.Sprintf("10.68.%d.%d", i/250, i%250+1),
			Ports: []*portolanv1.ServicePort{{Name: "http", Port: 80, TargetPort: 8080}}, Clusters: []string{"eu-west", "us-east"},
		})
		in.Endpoints = append(in.Endpoints, &nodev1.MeshEndpoints{
			Tenant: "shop", Service: name,
			Endpoints: []*nodev1.Endpoint{
				{Allocation: name + "-aaaaa", Address: fmt.Sprintf("10.1.%d.%d", i/250, i%250+1), Revision: "v1", Zone: "eu-a"},
				{Allocation: name + "-bbbbb", Address: fmt.Sprintf("10.2.%d.%d", i/250, i%250+1), Revision: "v2", Zone: "eu-b"},
			},
			Remote: []*linkv1.ServiceExport{{
				Cluster: "us-east", Tenant: "shop", Service: name, Region: "us", Healthy: true, Gateways: []string{"192.0.2.1:15443"},
				Ports: []*linkv1.ExportedPort{{Port: "http", ReadyReplicas: 2}},
			}},
		})
		if i%10 == 0 {
			in.Routes = append(in.Routes, &nodev1.MeshRoute{Tenant: "shop", Route: name, Spec: &portolanv1.RouteSpec{
				Service: name, Rules: []*portolanv1.RouteRule{{Backends: []*portolanv1.RouteBackend{{Revision: "v1", Weight: 90}, {Revision: "v2", Weight: 10}}}},
			}})
		}
	}
	return in
}

func sidecarOf(i int) Proxy {
	return Proxy{
		ID: fmt.Sprintf("svc-%03d-aaaaa", i), Tenant: "shop", Workload: fmt.Sprintf("svc-%03d", i), Role: Sidecar,
		Address: netip.MustParseAddr("10.1.0.1"), AuthzSocket: "/run/xds.sock",
	}
}

// marshalled gives every resource's bytes by type and name.
func marshalled(t testing.TB, r Resources) map[string]string {
	t.Helper()
	out := map[string]string{}
	for typeURL, list := range r {
		for _, res := range list {
			b, err := proto.MarshalOptions{Deterministic: true}.Marshal(res.Message)
			if err != nil {
				t.Fatal(err)
			}
			key := typeURL + " " + res.Name
			if _, ok := out[key]; ok {
				t.Errorf("%s is there twice", key)
			}
			out[key] = string(b)
		}
	}
	return out
}

// TestUnchangedInputSameBytes: the order of the input and a second run change
// nothing, so that nothing is pushed.
func TestUnchangedInputSameBytes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := bigMesh(12)
		g, _ := model.Build(in)
		want := marshalled(t, must2(New(g).Proxy(sidecarOf(0))))
		in.Services = rapid.Permutation(in.Services).Draw(rt, "services")
		in.Endpoints = rapid.Permutation(in.Endpoints).Draw(rt, "endpoints")
		in.Routes = rapid.Permutation(in.Routes).Draw(rt, "routes")
		g, problems := model.Build(in)
		if len(problems) > 0 {
			rt.Fatal(problems)
		}
		got := marshalled(t, must2(New(g).Proxy(sidecarOf(0))))
		if diff := cmp.Diff(want, got); diff != "" {
			rt.Fatal(diff)
		}
	})
}

func must2(r Resources, problems []model.Problem) Resources {
	if len(problems) > 0 {
		panic(fmt.Sprint(problems))
	}
	return r
}

// TestOneEndpointChangesOneSet: an endpoint change touches endpoint sets of its
// service and nothing else.
func TestOneEndpointChangesOneSet(t *testing.T) {
	in := bigMesh(12)
	g, _ := model.Build(in)
	before := marshalled(t, must2(New(g).Proxy(sidecarOf(0))))
	in.Endpoints[5].Endpoints[0].Draining = true
	g, _ = model.Build(in)
	after := marshalled(t, must2(New(g).Proxy(sidecarOf(0))))
	var changed []string
	for k, v := range after {
		if before[k] != v {
			changed = append(changed, k)
		}
	}
	if want := []string{EndpointType + " outbound/shop/svc-005/http/all"}; !cmp.Equal(changed, want) {
		t.Errorf("changed %v, want %v", changed, want)
	}
}

// TestSharedBetweenProxies: what sidecars of a tenant have in common is one
// pointer, so that it is marshalled once.
func TestSharedBetweenProxies(t *testing.T) {
	g, _ := model.Build(bigMesh(12))
	tr := New(g)
	a, b := must2(tr.Proxy(sidecarOf(0))), must2(tr.Proxy(sidecarOf(1)))
	shared := map[*Resource]bool{}
	for _, r := range a[ClusterType] {
		shared[r] = true
	}
	n := 0
	for _, r := range b[ClusterType] {
		if shared[r] {
			n++
		}
	}
	if n < 12 {
		t.Errorf("%d clusters are shared between two sidecars of a tenant, want all of the outbound ones", n)
	}
}

// TestEnvoyRefuses shows that the goldens' check by Envoy can fail.
func TestEnvoyRefuses(t *testing.T) {
	if envoyPath() == "" {
		t.Skip("missing: envoy (set ENVOY or put it on PATH)")
	}
	file := filepath.Join(t.TempDir(), "b.json")
	if err := os.WriteFile(file, []byte(`{"static_resources":{"clusters":[{"name":"x","connect_timeout":"-1s"}]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(envoyPath(), "--mode", "validate", "-c", file, "--disable-hot-restart").CombinedOutput(); err == nil {
		t.Errorf("a negative timeout was accepted: %s", out)
	}
	// And one of ours, broken on purpose.
	g, _ := model.Build(bigMesh(1))
	res := must2(New(g).Proxy(sidecarOf(0)))
	c := proto.Clone(res[ClusterType][0].Message).(*clusterv3.Cluster)
	c.ConnectTimeout.Seconds = -1
	res[ClusterType][0] = &Resource{Name: c.GetName(), Message: c}
	if err := envoyValidates(t, res); err == nil {
		t.Error("a broken cluster was accepted")
	}
}

// TestNextIsLikeNew: after any change, what is made on top of the generation
// before is what would be made from nothing.
func TestNextIsLikeNew(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		in := bigMesh(6)
		g, _ := model.Build(in)
		tr := New(g)
		must2(tr.Proxy(sidecarOf(0)))
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			i := rapid.IntRange(0, 5).Draw(rt, "service")
			change(rt, &in, i)
			g, _ := model.Build(in)
			tr = tr.Next(g)
			got, _ := tr.Proxy(sidecarOf(0))
			want, _ := New(g).Proxy(sidecarOf(0))
			if diff := cmp.Diff(marshalled(t, want), marshalled(t, got)); diff != "" {
				rt.Fatal(diff)
			}
		}
	})
}

// change changes one thing of service i.
func change(rt *rapid.T, in *model.Input, i int) {
	s, e := in.Services[i], in.Endpoints[i]
	r := in.Routes[0].GetSpec().GetRules()[0]
	n := rapid.IntRange(1, 5).Draw(rt, "n")
	word := fmt.Sprint("w", n)
	switch rapid.IntRange(0, 19).Draw(rt, "what") {
	case 0:
		s.VirtualIp = fmt.Sprintf("10.68.9.%d", n*10+i)
	case 1:
		s.Ports[0].Port = int32(80 + n)
	case 2:
		s.Ports[0].TargetPort = int32(8080 + n)
	case 3:
		s.Ports[0].Protocol = portolanv1.PortProtocol(n%2 + 1)
	case 4:
		s.Clusters = append(s.Clusters[:1], word)
	case 5:
		s.Workload = word
	case 6:
		e.Endpoints[0].Address = fmt.Sprintf("10.9.9.%d", n)
	case 7:
		e.Endpoints[1].Draining = !e.Endpoints[1].GetDraining()
	case 8:
		e.Endpoints[0].Revision, e.Endpoints[0].Zone = word, word
	case 9:
		e.Remote[0].Healthy = !e.Remote[0].GetHealthy()
	case 10:
		e.Remote[0].Gateways = []string{fmt.Sprintf("192.0.2.%d:15443", n)}
	case 11:
		e.Remote[0].Ports[0].ReadyReplicas = int32(n - 1)
	case 12:
		e.Remote[0].Region = word
	case 13:
		r.Backends[0].Weight, r.Backends[1].Weight = int32(n), int32(100-n)
	case 14:
		r.Backends[0].Revision = word
	case 15:
		r.Timeout = durationpb.New(time.Duration(n) * time.Second)
		r.Retry = &portolanv1.RetryPolicy{Attempts: int32(n)}
	case 16:
		r.Matches = []*portolanv1.RouteMatch{{PathPrefix: "/" + word, Method: "GET", Headers: []*portolanv1.HeaderMatch{{Name: word}}}}
	case 17:
		in.Permits = append(in.Permits, &linkv1.PeerPermit{Tenant: "shop", Workload: word, Cluster: "us-east"})
	case 18:
		in.Bundles = append(in.Bundles[:1], &linkv1.TrustBundle{TrustDomain: word + ".portolan.internal", X509Roots: []byte(testRoot)})
	case 19:
		r.Backends[1].Service = fmt.Sprintf("svc-%03d", n+3) // perhaps one that is not there
	}
}

// BenchmarkT9_SidecarConfig: what the configuration of a sidecar costs a node
// with 100 services and 20 sidecars, graph and marshalling included, and its
// size. whole: from nothing; change: after one endpoint changed.
func BenchmarkT9_SidecarConfig(b *testing.B) {
	b.Run("whole", func(b *testing.B) {
		benchmarkSidecars(b, func(_ *Translator, g *model.Graph) *Translator { return New(g) })
	})
	b.Run("change", func(b *testing.B) { benchmarkSidecars(b, (*Translator).Next) })
}

func benchmarkSidecars(b *testing.B, next func(*Translator, *model.Graph) *Translator) {
	const services, sidecars = 100, 20
	in := bigMesh(services)
	size, round := 0, 0
	g, _ := model.Build(in)
	tr := New(g)
	done := map[*Resource][]byte{}
	start := cpuTime()
	for b.Loop() {
		round++
		in.Endpoints[7].Endpoints[0].Address = fmt.Sprintf("10.3.0.%d", round%250)
		g, _ := model.Build(in)
		tr = next(tr, g)
		before := done
		done = make(map[*Resource][]byte, len(before))
		size = 0
		for i := range sidecars {
			res, _ := tr.Proxy(sidecarOf(i))
			for _, list := range res {
				for _, r := range list {
					if known, ok := before[r]; ok {
						done[r] = known
					} else if _, ok := done[r]; !ok {
						done[r] = must(proto.MarshalOptions{Deterministic: true}.Marshal(r.Message))
					}
					size += len(done[r])
				}
			}
		}
	}
	cpu := cpuTime() - start
	b.ReportMetric(float64(cpu)/float64(time.Millisecond)/float64(b.N*sidecars), "cpu-ms/sidecar")
	b.ReportMetric(float64(size)/sidecars/1024, "KB/sidecar")
}

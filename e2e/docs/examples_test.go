// Package docs holds the documentation to its word: every example of a constraint
// is decided by the product's own cores, and says what comes of it.
package docs

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
	"github.com/portolan-io/portolan/federation/place"
)

var (
	rewrite = flag.Bool("rewrite", false, "write the results into the pages")
	fence   = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```|^## .*?$")
)

// page runs the examples of one page: blocks "nodes" or "clusters" say what there
// is, "yaml" what is asked for, "result" what comes of it. A heading begins anew.
func page(t *testing.T, file string, world func() decider) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text, w, examples := string(b), world(), 0
	var out strings.Builder
	last, decided := 0, ""
	for _, m := range fence.FindAllStringSubmatchIndex(text, -1) {
		if m[2] < 0 { // a heading
			w = world()
			continue
		}
		lang, body := text[m[2]:m[3]], text[m[4]:m[5]]
		switch lang {
		case "nodes", "clusters":
			w.there(t, body)
		case "yaml":
			decided = w.decide(t, file, body)
		case "result":
			examples++
			if *rewrite {
				out.WriteString(text[last:m[4]] + decided)
				last = m[5]
			} else if body != decided {
				t.Errorf("%s:%d: the page says\n%sit is\n%s", file, 1+strings.Count(text[:m[4]], "\n"), body, decided)
			}
		}
	}
	if examples < 8 {
		t.Errorf("%s: only %d examples have a result", file, examples)
	}
	if *rewrite {
		if err := os.WriteFile(file, []byte(out.String()+text[last:]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// decider is a small world that an example is decided in.
type decider interface {
	there(t *testing.T, text string)
	decide(t *testing.T, file, yaml string) string
}

func TestScheduling(t *testing.T) {
	page(t, "../../docs/scheduling.md", func() decider { return &nodes{table: schedule.NewTable(1)} })
}

func TestPlacement(t *testing.T) {
	page(t, "../../docs/placement.md", func() decider { return &clusters{} })
}

// admitted parses a manifest and completes it as the server does.
func admitted(t *testing.T, file, yaml string, tenant *portolanv1.Tenant) []*portolanv1.Workload {
	t.Helper()
	objs, err := manifest.Parse(file, []byte(yaml))
	if err != nil {
		t.Fatalf("%s: %v\n%s", file, err, yaml)
	}
	var out []*portolanv1.Workload
	for _, o := range objs {
		w, ok := o.Message.(*portolanv1.Workload)
		if !ok {
			continue
		}
		if cleared != "" { // to see what it does
			clearField(w.GetSpec().GetPlacement().ProtoReflect(), cleared)
			clearField(w.GetSpec().GetScheduling().ProtoReflect(), cleared)
		}
		snap := &admit.Snapshot{Tenant: tenant}
		admit.Defaults(w, snap)
		for _, v := range admit.Validate(admit.Input{Object: w, Snapshot: snap}) {
			if cleared == "" {
				t.Errorf("%s: %s: %s\n%s", file, v.Field, v.Message, yaml)
			}
		}
		out = append(out, w)
	}
	return out
}

// fields of a line "name key=value …".
func fields(t *testing.T, line string) (string, [][2]string) {
	t.Helper()
	words := strings.Fields(line)
	var out [][2]string
	for _, w := range words[1:] {
		k, v, ok := strings.Cut(w, "=")
		if !ok {
			t.Fatalf("%q: write key=value", line)
		}
		out = append(out, [2]string{k, v})
	}
	return words[0], out
}

func amount(t *testing.T, s string, parse func(string) (int64, error)) int64 {
	t.Helper()
	n, err := parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func taintOf(t *testing.T, s string) *portolanv1.Taint {
	t.Helper()
	kv, effect, _ := strings.Cut(s, ":")
	k, v, _ := strings.Cut(kv, "/")
	e, ok := portolanv1.TaintEffect_value["TAINT_EFFECT_"+effect]
	if !ok {
		t.Fatalf("taint %q: write key/value:NO_SCHEDULE", s)
	}
	return &portolanv1.Taint{Key: k, Value: v, Effect: portolanv1.TaintEffect(e)}
}

// nodes is a cluster as the scheduler sees it.
type nodes struct {
	table *schedule.Table
	pools []*portolanv1.NodePool
	bound int
}

// there takes lines: "n1 cpu=4 memory=8Gi disk=ssd gpu=A100 taint=k/v:NO_SCHEDULE
// runs=web*2", and "pool spot scoring=PACK cpuOvercommit=150 cpuPrice=0.02".
func (w *nodes) there(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		name, fs := fields(t, strings.Replace(strings.TrimSpace(line), "pool ", "pool:", 1))
		if p, ok := strings.CutPrefix(name, "pool:"); ok {
			w.pool(t, p, fs)
			continue
		}
		f := &nodev1.NodeFacts{CpuMilli: 4000, MemoryBytes: 8 << 30, StorageBytes: 100 << 30, Labels: map[string]string{}}
		n := schedule.Node{ID: name, Facts: f, Addresses: 250}
		var runs []string
		for _, kv := range fs {
			switch k, v := kv[0], kv[1]; k {
			case "cpu":
				f.CpuMilli = amount(t, v, api.ParseCPU)
			case "memory":
				f.MemoryBytes = amount(t, v, api.ParseBytes)
			case "storage":
				f.StorageBytes = amount(t, v, api.ParseBytes)
			case "gpu":
				for i, m := range strings.Split(v, ",") {
					f.Devices = append(f.Devices, &nodev1.Device{Kind: "gpu", Model: m, Index: int32(i)})
				}
			case "image":
				f.Images = append(f.Images, v)
			case "taint":
				f.Taints = append(f.Taints, taintOf(t, v))
			case "mode":
				n.Mode = portolanv1.NodeMode(portolanv1.NodeMode_value["NODE_MODE_"+v])
			case "runs":
				runs = strings.Split(v, ",")
			default:
				f.Labels[k] = v
			}
		}
		w.table.PutNode(n)
		for _, r := range runs {
			workload, count, _ := strings.Cut(r, "*")
			w.run(t, name, workload, count)
		}
	}
}

func (w *nodes) pool(t *testing.T, name string, fs [][2]string) {
	t.Helper()
	p := &portolanv1.NodePool{Name: name}
	number := func(s string, scale float64) int64 {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil {
			t.Fatal(err)
		}
		return int64(v * scale)
	}
	for _, kv := range fs {
		switch k, v := kv[0], kv[1]; k {
		case "scoring":
			p.Scoring = portolanv1.Scoring(portolanv1.Scoring_value["SCORING_"+v])
		case "cpuOvercommit":
			p.CpuOvercommitPercent = int32(number(v, 1))
		case "cpuPrice":
			p.CpuCoreHourMicros = number(v, 1e6)
		case "spot":
			p.Spot = v == "true"
		case "reservedCpu":
			p.Reserved = &portolanv1.ResourceList{Cpu: v}
		default:
			t.Fatalf("pool field %q is not known", k)
		}
	}
	w.pools = append(w.pools, p)
	w.table.SetPools(schedule.Pools{Pools: w.pools, CPUCoreHourMicros: 50_000, MemGiBHourMicros: 5_000})
}

// run binds small replicas of a neighbour: half a core, priority 0.
func (w *nodes) run(t *testing.T, node, workload, count string) {
	t.Helper()
	n, err := strconv.Atoi(count)
	if err != nil {
		t.Fatal(err)
	}
	c, err := schedule.Compile(&portolanv1.WorkloadSpec{
		Kind:       portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE,
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "500m", Memory: "512Mi"}}},
	}, schedule.Options{Owner: schedule.Owner{Tenant: "shop", Workload: workload, Revision: "r1"}})
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		w.bound++
		w.table.PutReplica(schedule.Replica{ID: fmt.Sprintf("%s-%d", workload, w.bound), Class: c, Node: node, Bound: int64(w.bound)})
	}
}

// decide schedules the workloads of an example, in order, and keeps what was bound.
func (w *nodes) decide(t *testing.T, file, yaml string) string {
	t.Helper()
	var b strings.Builder
	ws := admitted(t, file, yaml, &portolanv1.Tenant{Spec: &portolanv1.TenantSpec{}})
	for _, wl := range ws {
		id := wl.GetName()[strings.LastIndexByte(wl.GetName(), '/')+1:]
		if len(ws) > 1 {
			fmt.Fprintf(&b, "%s:\n", id)
		}
		c, err := schedule.Compile(wl.GetSpec(), schedule.Options{Owner: schedule.Owner{Tenant: "shop", Workload: id, Revision: "r1"}})
		if err != nil {
			t.Fatal(err)
		}
		n := int(wl.GetSpec().GetReplicas())
		if n == 0 {
			n = 1
		}
		allow := map[string]int{}
		for _, o := range []string{"web", "batch", "cache"} {
			allow["shop/"+o] = 1
		}
		p := schedule.Schedule(w.table, schedule.Batch{Groups: []schedule.Group{{Key: id, Class: c, Count: n}}, Allowance: allow}).Placed[0]
		b.WriteString(tell(p))
		for _, bind := range p.Bindings {
			w.bound++
			w.table.PutReplica(schedule.Replica{ID: fmt.Sprintf("%s-%d", id, w.bound), Class: c, Node: bind.Node, Devices: slices.Clone(bind.Devices), Bound: int64(w.bound)})
		}
	}
	return b.String()
}

func tell(p schedule.Placed) string {
	var b strings.Builder
	on := map[string]int{}
	devices := map[string][]string{}
	for _, x := range p.Bindings {
		on[x.Node]++
		for _, d := range x.Devices {
			devices[x.Node] = append(devices[x.Node], fmt.Sprintf("%s %d: %d/1000", d.Kind, d.Index, d.Milli))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(on)) {
		fmt.Fprintf(&b, "%s: %d", id, on[id])
		if len(devices[id]) > 0 {
			fmt.Fprintf(&b, " (%s)", strings.Join(devices[id], ", "))
		}
		b.WriteString("\n")
	}
	for _, n := range p.Nominations {
		fmt.Fprintf(&b, "%s: room is made, %s leaves\n", n.Node, strings.Join(n.Victims, ", "))
	}
	if p.Missing == 0 || p.Refusal == nil {
		return b.String()
	}
	fmt.Fprintf(&b, "%d find no node:\n", p.Missing)
	for _, r := range p.Refusal.Reasons {
		fmt.Fprintf(&b, "  %s: %s\n", r.Code, r.Message)
	}
	for _, r := range p.Refusal.Remedies {
		fmt.Fprintf(&b, "  would fit: %s\n", r.Message)
	}
	return b.String()
}

// clusters is a fleet as placement sees it.
type clusters struct {
	world  place.World
	tenant portolanv1.TenantSpec
	now    time.Time
}

// there takes lines: "eu-1 region=eu zone=a provider=p cpu=100 price=0.05 rtt=us:90
// taint=k/v:NO_SCHEDULE spot=40@0.01 state=lost label.k=v".
func (w *clusters) there(t *testing.T, text string) {
	t.Helper()
	w.now = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	for line := range strings.Lines(text) {
		name, fs := fields(t, strings.TrimSpace(line))
		if name == "tenant" {
			for _, kv := range fs {
				w.tenant.AllowedRegions = strings.Split(kv[1], ",")
			}
			continue
		}
		c := place.Cluster{
			ID: name, Labels: map[string]string{}, Spec: &portolanv1.ClusterSpec{Region: name, CpuCoreHourMicros: 50_000, RttMillis: map[string]int32{}},
			State: portolanv1.ClusterState_CLUSTER_STATE_READY, LastSeen: w.now, Nodes: 10, Free: api.Resources{CPUMilli: 100_000, MemoryBytes: 1 << 40},
		}
		for _, kv := range fs {
			w.field(t, &c, kv[0], kv[1])
		}
		if i := slices.IndexFunc(w.world.Clusters, func(o place.Cluster) bool { return o.ID == name }); i >= 0 {
			w.world.Clusters[i] = c // it has changed
			continue
		}
		w.world.Clusters = append(w.world.Clusters, c)
	}
}

func (w *clusters) field(t *testing.T, c *place.Cluster, k, v string) {
	t.Helper()
	price := func(s string) int64 {
		f, err := strconv.ParseFloat(s, 64)
		if err != nil {
			t.Fatal(err)
		}
		return int64(f * 1e6)
	}
	switch k {
	case "region":
		c.Spec.Region = v
	case "zone":
		c.Spec.Zone = v
	case "provider":
		c.Spec.Provider = v
	case "cpu":
		c.Free.CPUMilli = amount(t, v, api.ParseCPU)
	case "price":
		c.Spec.CpuCoreHourMicros = price(v)
	case "taint":
		c.Spec.Taints = append(c.Spec.Taints, taintOf(t, v))
	case "rtt":
		for r := range strings.SplitSeq(v, ",") {
			region, ms, _ := strings.Cut(r, ":")
			n, err := strconv.Atoi(ms)
			if err != nil {
				t.Fatal(err)
			}
			c.Spec.RttMillis[region] = int32(n)
		}
	case "spot":
		cores, at, _ := strings.Cut(v, "@")
		n := amount(t, cores, api.ParseCPU)
		c.Spot = api.Resources{CPUMilli: n, MemoryBytes: 1 << 40}
		c.Pools = append(c.Pools, &portolanv1.PoolStatus{Pool: "spot", Spot: true, CpuMilli: n, MemoryBytes: 1 << 40, CpuCoreHourMicros: price(at)})
	case "since":
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatal(err)
		}
		c.Changed = w.now.Add(-d)
	case "state":
		c.State = portolanv1.ClusterState(portolanv1.ClusterState_value["CLUSTER_STATE_"+strings.ToUpper(v)])
		c.LastSeen = w.now.Add(-time.Hour)
	default:
		c.Labels[k] = v
	}
}

// decide places the workloads of an example together, on what earlier ones of the
// section left, and keeps it.
func (w *clusters) decide(t *testing.T, file, yaml string) string {
	t.Helper()
	ws := admitted(t, file, yaml, &portolanv1.Tenant{Spec: &w.tenant})
	for _, wl := range ws {
		id := wl.GetName()[strings.LastIndexByte(wl.GetName(), '/')+1:]
		rev, err := place.NewRevision("r1", wl.GetSpec())
		if err != nil {
			t.Fatal(err)
		}
		item := place.Item{Name: wl.GetName(), Tenant: "shop", Workload: place.Workload{ID: id, Spec: proto.CloneOf(wl.GetSpec()), Residency: w.tenant.GetAllowedRegions(), Revisions: []place.Revision{rev}}}
		if i := slices.IndexFunc(w.world.Workloads, func(o place.Item) bool { return o.Name == item.Name }); i >= 0 {
			item.Held = w.world.Workloads[i].Held
			w.world.Workloads[i] = item
		} else {
			w.world.Workloads = append(w.world.Workloads, item)
		}
	}
	w.world.Verdicts = true
	plans := place.PlaceAll(w.world, w.now)
	var b strings.Builder
	for i := range w.world.Workloads {
		it := &w.world.Workloads[i]
		if slices.ContainsFunc(ws, func(x *portolanv1.Workload) bool { return x.GetName() == it.Name }) {
			if len(ws) > 1 {
				fmt.Fprintf(&b, "%s:\n", it.Workload.ID)
			}
			b.WriteString(tellPlan(plans[i]))
			b.WriteString(w.tellOverrides(it.Workload.Spec, plans[i]))
		}
		it.Held = nil
		for _, a := range plans[i].Assignments {
			it.Held = append(it.Held, place.Held{Cluster: a.Cluster, Previous: place.Previous{Present: true, Declared: max(a.Replicas, a.Max) - a.Failover, Failover: a.Failover, Claim: a.Claim, Basis: plans[i].Basis}})
		}
	}
	return b.String()
}

// tellOverrides says what containers are like where they differ from the template.
func (w *clusters) tellOverrides(spec *portolanv1.WorkloadSpec, p place.Plan) string {
	var b strings.Builder
	for _, a := range p.Assignments {
		i := slices.IndexFunc(w.world.Clusters, func(c place.Cluster) bool { return c.ID == a.Cluster })
		c := w.world.Clusters[i]
		o := place.Override(spec, c.ID, c.Spec, c.Labels)
		if o == spec {
			continue
		}
		for _, k := range o.GetContainers() {
			fmt.Fprintf(&b, "in %s: %s has args %v, env %v, requests %s CPU, is limited to %s CPU\n",
				c.ID, k.GetName(), k.GetArgs(), k.GetEnv(), k.GetRequests().GetCpu(), k.GetLimits().GetCpu())
		}
	}
	return b.String()
}

func tellPlan(p place.Plan) string {
	var b strings.Builder
	for _, a := range p.Assignments {
		fmt.Fprintf(&b, "%s: %d", a.Cluster, a.Replicas)
		if a.Max > 0 {
			fmt.Fprintf(&b, ", scales between %d and %d", a.Min, a.Max)
		}
		if a.Failover > 0 {
			fmt.Fprintf(&b, ", %d of them for a lost cluster", a.Failover)
		}
		b.WriteString("\n")
	}
	for _, v := range p.Verdicts {
		if v.Feasible || v.Replicas > 0 {
			continue
		}
		for _, r := range v.Reasons {
			fmt.Fprintf(&b, "not %s: %s: %s\n", v.Cluster, r.Code, r.Message)
		}
	}
	if p.Unplaced > 0 {
		fmt.Fprintf(&b, "%d find no cluster\n", p.Unplaced)
	}
	for _, d := range p.Displaced {
		fmt.Fprintf(&b, "%s loses %d in %s\n", d.Workload[strings.LastIndexByte(d.Workload, '/')+1:], d.Replicas, d.Cluster)
	}
	return b.String()
}

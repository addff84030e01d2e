package schedule

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// The stories in testdata/stories. Commands:
//
//	node n1 [cpu=4000] [memory=8192] [storage=100] [addresses=9] [labels=(zone:a)] [taints=(key:value:Effect)] [mode=cordoned] [down=NodeLost] [gpus=(A,A)] [images=(sha256:x)]
//	lose n1                       the node is deleted
//	pools                         a ClusterSpec in prototext, of which pools and prices count
//	spec web [priority=…]         a WorkloadSpec in prototext; cpu and memory when it has no containers
//	place web n=3 [revision=r1] [on=n1] [there] [not=n1] [allow=(web:1)] [calm]
//	                              what is bound or nominated is put
//	bind id web n1 [tenant=t] [revision=r1] [since=5] [leaving]
//	gone id …                     replicas are gone
//	fits id …; misfits; moves n=2 [gain=10]
//	wait web [n=2] [tenant=t] [since=5]; take n=9 [weights=(a:2)]; refuse web code …; wake event [n1]; expired now=…
//
// One that is named in a command is what was said of it last.
func TestStories(t *testing.T) {
	told := 0
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		told++
		s := &story{t: NewTable(1), q: NewQueue(4), specs: map[string]*portolanv1.WorkloadSpec{}, classes: map[string]*Class{}}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			s.test, s.d = t, d
			tell, ok := tellers[d.Cmd]
			if !ok {
				t.Fatalf("command %s is not known", d.Cmd)
			}
			return tell(s)
		})
	})
	if told == 0 {
		t.Error("no story was told")
	}
}

type story struct {
	test    *testing.T
	d       *datadriven.TestData
	t       *Table
	q       *Queue
	specs   map[string]*portolanv1.WorkloadSpec
	classes map[string]*Class
	n       int
}

var tellers = map[string]func(*story) string{
	"node": (*story).node, "lose": (*story).lose, "pools": (*story).pools, "spec": (*story).spec, "place": (*story).place, "bind": (*story).bind, "gone": (*story).gone,
	"fits": (*story).fits, "misfits": (*story).misfits, "moves": (*story).moves, "wait": (*story).wait, "take": (*story).take, "refuse": (*story).refuse,
	"wake": (*story).wake, "expired": (*story).expired,
}

func (s *story) arg(key, otherwise string) string {
	for _, a := range s.d.CmdArgs {
		if a.Key == key && len(a.Vals) > 0 {
			return a.Vals[0]
		}
	}
	return otherwise
}

func (s *story) has(key string) bool {
	return slices.ContainsFunc(s.d.CmdArgs, func(a datadriven.CmdArg) bool { return a.Key == key })
}

func (s *story) list(key string) []string {
	for _, a := range s.d.CmdArgs {
		if a.Key == key {
			return a.Vals
		}
	}
	return nil
}

func (s *story) number(key string, otherwise int64) int64 {
	n, err := strconv.ParseInt(s.arg(key, strconv.FormatInt(otherwise, 10)), 10, 64)
	if err != nil {
		s.test.Fatal(err)
	}
	return n
}

// words are the arguments without a value.
func (s *story) words() []string {
	var out []string
	for _, a := range s.d.CmdArgs {
		if len(a.Vals) == 0 {
			out = append(out, a.Key)
		}
	}
	return out
}

func (s *story) node() string {
	f := &nodev1.NodeFacts{CpuMilli: s.number("cpu", 4000), MemoryBytes: s.number("memory", 8192) << 20, StorageBytes: s.number("storage", 100) << 20, Labels: map[string]string{}, Images: s.list("images")}
	for _, l := range s.list("labels") {
		k, v, _ := strings.Cut(l, ":")
		f.Labels[k] = v
	}
	for _, x := range s.list("taints") {
		p := strings.Split(x, ":")
		f.Taints = append(f.Taints, &portolanv1.Taint{Key: p[0], Value: p[1], Effect: effects[p[2]]})
	}
	for k, m := range s.list("gpus") {
		f.Devices = append(f.Devices, &nodev1.Device{Kind: "gpu", Model: m, Index: int32(k)})
	}
	n := Node{ID: s.words()[0], Facts: f, Addresses: int(s.number("addresses", 253))}
	n.Mode = map[string]portolanv1.NodeMode{"cordoned": portolanv1.NodeMode_NODE_MODE_CORDONED, "draining": portolanv1.NodeMode_NODE_MODE_DRAINING}[s.arg("mode", "")]
	n.Down = map[string]Code{"NodeLost": NodeLost, "NodeNotReady": NodeNotReady}[s.arg("down", "")]
	s.t.PutNode(n)
	return ""
}

func (s *story) lose() string {
	s.t.DeleteNode(s.words()[0])
	return ""
}

func (s *story) pools() string {
	var c portolanv1.ClusterSpec
	if err := prototext.Unmarshal([]byte(s.d.Input), &c); err != nil {
		s.test.Fatal(err)
	}
	s.t.SetPools(Pools{Pools: c.GetPools(), CPUCoreHourMicros: c.GetCpuCoreHourMicros(), MemGiBHourMicros: c.GetMemoryGibHourMicros()})
	return ""
}

func (s *story) spec() string {
	spec := &portolanv1.WorkloadSpec{}
	if err := prototext.Unmarshal([]byte(s.d.Input), spec); err != nil {
		s.test.Fatal(err)
	}
	if len(spec.GetContainers()) == 0 {
		spec.Containers = []*portolanv1.Container{{}}
	}
	if spec.GetContainers()[0].GetRequests() == nil {
		spec.Containers[0].Requests = &portolanv1.ResourceList{Cpu: s.arg("cpu", "500") + "m", Memory: s.arg("memory", "256") + "Mi", Storage: s.arg("storage", "0") + "Mi"}
	}
	s.specs[s.words()[0]] = spec
	s.classes = map[string]*Class{}
	return ""
}

func (s *story) class(name, tenant, revision string) *Class {
	k := tenant + "/" + name + "/" + revision
	if c, ok := s.classes[k]; ok {
		return c
	}
	spec, ok := s.specs[name]
	if !ok {
		s.test.Fatalf("there is no spec %s", name)
	}
	o := Options{Owner: Owner{tenant, name, revision}, Overhead: api.Resources{}}
	if spec.GetGateway() != 0 {
		o.Ports = []int32{443}
	}
	c, err := Compile(spec, o)
	if err != nil {
		s.test.Fatal(err)
	}
	s.classes[k] = c
	return c
}

func (s *story) place() string {
	name := s.words()[0]
	c := s.class(name, "t", s.arg("revision", "r1"))
	g := Group{Key: "t/" + name, Class: c, Count: int(s.number("n", 1)), Node: s.arg("on", ""), VolumesThere: s.has("there"), NotOn: s.arg("not", "")}
	b := Batch{Groups: []Group{g}, Allowance: map[string]int{}, NoPreemption: s.has("calm")}
	for _, a := range s.list("allow") {
		k, v, _ := strings.Cut(a, ":")
		n, _ := strconv.Atoi(v)
		b.Allowance["t/"+k] = n
	}
	s.t.Observe(c, g.Count)
	p := copyResult(Schedule(s.t, b))[0]
	out := tell(p)
	for _, bd := range p.Bindings {
		s.n++
		if bd.Kept {
			s.t.Withdraw(g.Key, bd.Node)
		}
		s.t.PutReplica(Replica{ID: fmt.Sprintf("%s-%d", name, s.n), Class: c, Node: bd.Node, Devices: bd.Devices})
	}
	for _, node := range p.Unkept {
		s.t.Withdraw(g.Key, node)
	}
	for _, n := range p.Nominations {
		for _, id := range n.Victims {
			r := s.t.replicas[id].Replica
			r.Leaving = true
			s.t.PutReplica(r)
		}
		for _, k := range n.Withdrawn {
			s.t.Withdraw(k, n.Node)
		}
		s.t.Nominate(g.Key, c, n.Node)
	}
	return out
}

func tell(p Placed) string {
	var b strings.Builder
	for _, line := range tellBindings(p.Bindings) {
		b.WriteString(line)
	}
	for _, node := range p.Unkept {
		fmt.Fprintf(&b, "no room is kept on %s any more\n", node)
	}
	for _, n := range p.Nominations {
		fmt.Fprintf(&b, "nominated for %s", n.Node)
		if len(n.Victims) > 0 {
			fmt.Fprintf(&b, " in place of %s", strings.Join(n.Victims, ", "))
		}
		if len(n.Withdrawn) > 0 {
			fmt.Fprintf(&b, ", which is no longer kept for %s", strings.Join(n.Withdrawn, ", "))
		}
		b.WriteString("\n")
	}
	if p.Missing > 0 {
		fmt.Fprintf(&b, "missing: %d\n", p.Missing)
	}
	if p.Refusal != nil {
		for _, r := range p.Refusal.Reasons {
			fmt.Fprintf(&b, "  %v: %s\n", r.Code, r.Message)
		}
		if p.Refusal.Nearest != "" {
			fmt.Fprintf(&b, "  nearest is %s: %s\n", p.Refusal.Nearest, p.Refusal.NearestReason)
		}
		for _, r := range p.Refusal.Remedies {
			fmt.Fprintf(&b, "  or: %s\n", r.Message)
		}
	}
	return b.String()
}

func tellBindings(list []Binding) []string {
	lines := map[string]int{}
	for _, bd := range list {
		line := bd.Node
		for _, d := range bd.Devices {
			line += fmt.Sprintf(" %s%d:%d", d.Kind, d.Index, d.Milli)
		}
		if bd.Kept {
			line += " (kept)"
		}
		lines[line]++
	}
	var out []string
	for _, l := range sortedKeys(lines) {
		out = append(out, fmt.Sprintf("%s: %d\n", l, lines[l]))
	}
	return out
}

func (s *story) bind() string {
	w := s.words()
	s.t.PutReplica(Replica{ID: w[0], Class: s.class(w[1], s.arg("tenant", "t"), s.arg("revision", "r1")), Node: w[2], Bound: s.number("since", 0), Leaving: s.has("leaving")})
	return ""
}

func (s *story) gone() string {
	for _, id := range s.words() {
		s.t.DeleteReplica(id)
	}
	return ""
}

func (s *story) fits() string {
	var b strings.Builder
	for _, id := range s.words() {
		if m, ok := Fits(s.t, id); !ok {
			fmt.Fprintf(&b, "%s: %v: %s\n", id, m.Code, m.Message)
		}
	}
	return b.String()
}

func (s *story) misfits() string {
	var b strings.Builder
	for _, m := range Misfits(s.t) {
		fmt.Fprintf(&b, "%s: %v: %s\n", m.Replica, m.Code, m.Message)
	}
	return b.String()
}

func (s *story) moves() string {
	var b strings.Builder
	for _, m := range Moves(s.t, int(s.number("n", 1)), int(s.number("gain", 10))) {
		fmt.Fprintf(&b, "%s: %s to %s: %s\n", m.Replica, m.From, m.To, m.Message)
	}
	return b.String()
}

var epoch = time.Unix(0, 0)

func (s *story) wait() string {
	name, tenant := s.words()[0], s.arg("tenant", "t")
	dropped := s.q.Put(Waiting{Key: tenant + "/" + name, Class: s.class(name, tenant, "r1"), Count: int(s.number("n", 1)), Since: epoch.Add(time.Duration(s.number("since", 0)) * time.Second)})
	if dropped != "" {
		return "full: " + dropped + " is dropped\n"
	}
	return ""
}

func (s *story) take() string {
	weights := map[string]int32{}
	for _, w := range s.list("weights") {
		k, v, _ := strings.Cut(w, ":")
		n, _ := strconv.Atoi(v)
		weights[k] = int32(n)
	}
	return strings.Join(s.q.Take(s.t, weights, int(s.number("n", 9))), "\n")
}

func (s *story) refuse() string {
	w := s.words()
	codes := Code(0)
	for k, name := range codeNames {
		if slices.Contains(w[1:], name) {
			codes |= 1 << k
		}
	}
	s.q.Refuse(w[0], codes)
	return ""
}

func (s *story) wake() string {
	w := append(s.words(), "")
	e := map[string]Event{"NodeBetter": NodeBetter, "RoomFreed": RoomFreed, "ReplicaBound": ReplicaBound, "PoolsChanged": PoolsChanged, "BudgetFreed": BudgetFreed}[w[0]]
	s.q.Wake(s.t, e, w[1])
	return strings.Join(s.q.Take(s.t, nil, 9), "\n")
}

func (s *story) expired() string {
	keys, next := s.q.Expired(epoch.Add(time.Duration(s.number("now", 0)) * time.Second))
	out := strings.Join(keys, "\n")
	if !next.IsZero() {
		out += fmt.Sprintf("\nnext at %d", next.Unix())
	}
	return strings.TrimSpace(out)
}

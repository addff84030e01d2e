package schedule

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Class is what replicas of one revision ask of a node, made ready once. It is not
// changed, and good for any table. Two with the same constraints share in a table
// what was worked out for them.
type Class struct {
	owner Owner
	ask   ask
	// volumes is the size of the volumes that each replica brings.
	volumes  int64
	static   static
	spreads  []spread
	affinity []affinity
	priority int32
	// displaces: it may, where nothing else helps.
	displaces bool
	gang      bool
	deadline  time.Duration
	overhead  api.Resources
}

// ask is what one replica takes from its node.
type ask struct {
	cpu, memory, storage int64
	address              bool
	ports                []int32
	devices              []deviceAsk
	signature            string
}

// deviceAsk is for whole devices (count) or for a share of one (milli).
type deviceAsk struct {
	kind         string
	count, milli int32
	models       []string
}

// static is what only node facts answer.
type static struct {
	selector    []requirement
	terms       [][]requirement
	preferred   []preferred
	tolerations []*portolanv1.Toleration
	capacity    portolanv1.CapacityType
	// topology keys that a node must have a value for.
	topology []string
	devices  []deviceAsk
	images   []string
	// anyMode: a daemon's, which cordons and pools' kinds do not stop.
	anyMode   bool
	signature string
}

type preferred struct {
	weight uint32
	term   []requirement
}

// spread over the values of a key; skew 0 sets no bound.
type spread struct {
	key    string
	skew   int32
	prefer bool
}

func (s spread) must() bool { return s.skew > 0 && !s.prefer }

type affinity struct {
	workload     string
	key          string
	anti, prefer bool
	weight       uint32
}

// Priority of its replicas.
func (c *Class) Priority() int32 { return c.priority }

// Gang says that all replicas of a group are bound at once or not at all.
func (c *Class) Gang() bool { return c.gang }

// Deadline of a gang; 0 for none.
func (c *Class) Deadline() time.Duration { return c.deadline }

// Owner is whose replicas they are.
func (c *Class) Owner() Owner { return c.owner }

// Request is the CPU and memory of one replica.
func (c *Class) Request() api.Resources {
	return api.Resources{CPUMilli: c.ask.cpu, MemoryBytes: c.ask.memory}
}

// Compile makes a class of a spec. The error names the field.
func Compile(spec *portolanv1.WorkloadSpec, o Options) (*Class, error) {
	r, err := Requests(spec, o.Overhead)
	if err != nil {
		return nil, err
	}
	storage, err := storageOf(spec)
	if err != nil {
		return nil, err
	}
	s := spec.GetScheduling()
	c := &Class{
		owner: o.Owner, overhead: o.Overhead, priority: spec.GetPriority(), displaces: !spec.GetNeverPreempt(), gang: s.GetGang() != nil, deadline: s.GetGang().GetDeadline().AsDuration(),
		ask: ask{
			cpu: r.CPUMilli, memory: r.MemoryBytes, storage: storage, ports: slices.Sorted(slices.Values(o.Ports)),
			address: spec.GetGateway() == portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED, devices: devicesOf(s),
		},
	}
	for i, v := range spec.GetVolumes() {
		size, err := api.ParseBytes(v.GetSize())
		if err != nil {
			return nil, fmt.Errorf("spec.volumes[%d].size: %w", i, err)
		}
		c.volumes += size
	}
	c.spreads = spreadsOf(s)
	for _, a := range s.GetAffinity() {
		c.affinity = append(c.affinity, affinity{
			workload: a.GetWorkload(), key: a.GetTopologyKey(), anti: a.GetAnti(), prefer: a.GetPrefer(), weight: uint32(max(a.GetWeight(), 1)),
		})
	}
	c.static = staticOf(spec, c)
	c.ask.sign(c.volumes)
	return c, nil
}

func (a *ask) sign(volumes int64) {
	a.signature = fmt.Sprintf("%d %d %d %v %v %v", a.cpu, a.memory, a.storage+volumes, a.address, a.ports, a.devices)
}

// storageOf is the scratch space of a replica.
func storageOf(spec *portolanv1.WorkloadSpec) (int64, error) {
	one := func(c *portolanv1.Container) (int64, error) {
		text := c.GetRequests().GetStorage()
		if text == "" {
			text = c.GetLimits().GetStorage()
		}
		return api.ParseBytes(text)
	}
	var sum int64
	for i, c := range spec.GetContainers() {
		n, err := one(c)
		if err != nil {
			return 0, fmt.Errorf("spec.containers[%d].requests.storage: %w", i, err)
		}
		sum += n
	}
	for i, c := range spec.GetInitContainers() {
		n, err := one(c)
		if err != nil {
			return 0, fmt.Errorf("spec.init_containers[%d].requests.storage: %w", i, err)
		}
		sum = max(sum, n)
	}
	return sum, nil
}

func devicesOf(s *portolanv1.WorkloadSpec_Scheduling) []deviceAsk {
	var out []deviceAsk
	for _, d := range s.GetDevices() {
		if d.GetCount() == 0 && d.GetShareMilli() == 0 {
			continue
		}
		a := deviceAsk{kind: d.GetKind(), count: d.GetCount(), models: slices.Sorted(slices.Values(d.GetModels()))}
		if a.kind == "" {
			a.kind = "gpu"
		}
		if a.count == 0 {
			a.milli = d.GetShareMilli()
		}
		out = append(out, a)
	}
	return out
}

func spreadsOf(s *portolanv1.WorkloadSpec_Scheduling) []spread {
	var out []spread
	if k := s.GetSpreadKey(); k != "" {
		out = append(out, spread{key: k, skew: s.GetMaxSkew()})
	}
	for _, p := range s.GetSpreads() {
		out = append(out, spread{key: p.GetTopologyKey(), skew: max(p.GetMaxSkew(), 1), prefer: p.GetPrefer()})
	}
	return out
}

func staticOf(spec *portolanv1.WorkloadSpec, c *Class) static {
	s := spec.GetScheduling()
	st := static{
		tolerations: s.GetTolerations(), capacity: spec.GetPlacement().GetCapacity(), devices: c.ask.devices,
		anyMode: spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON,
	}
	for _, k := range slices.Sorted(maps.Keys(s.GetNodeSelector())) {
		st.selector = append(st.selector, requirement{key: k, op: portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN, values: []string{s.GetNodeSelector()[k]}})
	}
	for _, t := range s.GetNodeAffinity() {
		st.terms = append(st.terms, requirementsOf(t))
	}
	for _, p := range s.GetPreferredNodes() {
		st.preferred = append(st.preferred, preferred{weight: uint32(p.GetWeight()), term: requirementsOf(p.GetTerm())})
	}
	st.topology = c.topologyKeys()
	for _, ct := range append(slices.Clone(spec.GetContainers()), spec.GetInitContainers()...) {
		if _, digest, ok := strings.Cut(ct.GetResolvedImage(), "@"); ok {
			st.images = append(st.images, digest)
		}
	}
	slices.Sort(st.images)
	st.images = slices.Compact(st.images)
	st.signature = st.sign()
	return st
}

// topologyKeys are the labels that a node must have.
func (c *Class) topologyKeys() []string {
	var out []string
	for _, s := range c.spreads {
		if s.must() && s.key != NodeKey {
			out = append(out, s.key)
		}
	}
	for _, a := range c.affinity {
		if !a.anti && !a.prefer && a.key != NodeKey {
			out = append(out, a.key)
		}
	}
	return out
}

func requirementsOf(t *portolanv1.RequirementTerm) []requirement {
	var out []requirement
	for _, r := range t.GetRequirements() {
		out = append(out, requirement{key: r.GetKey(), op: r.GetOperator(), values: slices.Sorted(slices.Values(r.GetValues()))})
	}
	return out
}

// sign names all that the answer follows from.
func (s *static) sign() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v%v", s.selector, s.terms)
	for _, p := range s.preferred {
		fmt.Fprintf(&b, "+%d%v", p.weight, p.term)
	}
	for _, o := range s.tolerations {
		fmt.Fprintf(&b, "|%q=%q:%d", o.GetKey(), o.GetValue(), o.GetEffect())
		if o.GetStay() != nil {
			b.WriteByte('~')
		}
	}
	fmt.Fprintf(&b, "/%d%v%q%q%q", s.capacity, s.anyMode, s.topology, s.devices, s.images)
	return b.String()
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

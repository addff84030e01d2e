package schedule

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// world is the dumb form of a Table: records in maps, every question answered by
// looking at all of them.
type world struct {
	nodes    map[string]Node
	pools    Pools
	replicas map[string]*guest
	volumes  map[string]volume
	asked    []asked
	learned  *fragments // nil when the cost of fragmentation is any
}

// guest is a bound replica. promised: it waits for its victims, whose room is
// counted too.
type guest struct {
	Replica
	spec     *portolanv1.WorkloadSpec
	owner    Owner
	overhead api.Resources
	ports    []int32
	promised bool
}

// wanted is a group as the world sees it.
type wanted struct {
	spec         *portolanv1.WorkloadSpec
	owner        Owner
	overhead     api.Resources
	ports        []int32
	node, notOn  string
	volumesThere bool
}

func (w *world) pool(n Node) *portolanv1.NodePool {
	name, ok := n.Facts.GetLabels()["pool"]
	if !ok {
		name = "default"
	}
	for _, p := range w.pools.Pools {
		if p.GetName() == name {
			return p
		}
	}
	return &portolanv1.NodePool{Name: name}
}

func percent(n, p int64) int64 {
	if p == 0 {
		p = 100
	}
	return max(n, 0) * p / 100
}

type room struct{ cpu, memory, storage, addresses int64 }

func (w *world) capacity(n Node) room {
	p := w.pool(n)
	cpu, _ := api.ParseCPU(p.GetReserved().GetCpu())
	memory, _ := api.ParseBytes(p.GetReserved().GetMemory())
	storage, _ := api.ParseBytes(p.GetReserved().GetStorage())
	return room{
		percent(n.Facts.GetCpuMilli()-cpu, int64(p.GetCpuOvercommitPercent())), percent(n.Facts.GetMemoryBytes()-memory, int64(p.GetMemoryOvercommitPercent())),
		max(n.Facts.GetStorageBytes()-storage, 0), int64(n.Addresses),
	}
}

func askOf(spec *portolanv1.WorkloadSpec, overhead api.Resources) room {
	r, _ := api.RequestsOf(spec)
	r = r.Add(overhead)
	out := room{cpu: r.CPUMilli, memory: r.MemoryBytes}
	for _, c := range spec.GetContainers() {
		n, _ := api.ParseBytes(cmp.Or(c.GetRequests().GetStorage(), c.GetLimits().GetStorage()))
		out.storage += n
	}
	if spec.GetGateway() == 0 {
		out.addresses = 1
	}
	return out
}

func volumesOf(spec *portolanv1.WorkloadSpec) (sum int64) {
	for _, v := range spec.GetVolumes() {
		n, _ := api.ParseBytes(v.GetSize())
		sum += n
	}
	return sum
}

// free is what a node has left, when the replicas of without have left.
func (w *world) free(n Node, without map[string]bool) (free room, ports map[int32]bool, devices map[Share]int32) {
	free, ports, devices = w.capacity(n), map[int32]bool{}, map[Share]int32{}
	for _, d := range n.Facts.GetDevices() {
		devices[Share{Kind: d.GetKind(), Index: d.GetIndex()}] = 1000
	}
	for id, g := range w.replicas {
		if g.Node != n.ID || without[id] {
			continue
		}
		a := askOf(g.spec, g.overhead)
		free.addresses -= a.addresses
		if g.Ended {
			continue
		}
		free.cpu, free.memory, free.storage = free.cpu-a.cpu, free.memory-a.memory, free.storage-a.storage
		for _, p := range g.ports {
			ports[p] = true
		}
		for _, s := range g.Devices {
			k := Share{Kind: s.Kind, Index: s.Index}
			if _, ok := devices[k]; ok {
				devices[k] -= s.Milli
			}
		}
	}
	for _, v := range w.volumes {
		if v.node == n.ID {
			free.storage -= v.bytes
		}
	}
	return free, ports, devices
}

// unit is what one device has to give.
type unit struct {
	ask   *portolanv1.DeviceRequest
	milli int32
}

func unitsOf(asks []*portolanv1.DeviceRequest) (units []unit) {
	for _, a := range asks {
		if a.GetCount() > 0 {
			for range a.GetCount() {
				units = append(units, unit{a, whole})
			}
		} else if a.GetShareMilli() > 0 {
			units = append(units, unit{a, a.GetShareMilli()})
		}
	}
	return units
}

// waysToGive are all ways of giving devices to requests: those first that give what
// is left with least.
func waysToGive(n Node, free map[Share]int32, units []unit) [][]Share {
	if len(units) == 0 {
		return [][]Share{nil}
	}
	var keys []Share
	for _, d := range n.Facts.GetDevices() {
		key := Share{Kind: d.GetKind(), Index: d.GetIndex()}
		if free[key] >= units[0].milli && accepts(units[0].ask, d.GetKind(), d.GetModel()) {
			keys = append(keys, key)
		}
	}
	slices.SortStableFunc(keys, func(a, b Share) int {
		return cmp.Or(cmp.Compare(free[a], free[b]), cmp.Compare(a.Index, b.Index))
	})
	var out [][]Share
	for _, key := range keys {
		free[key] -= units[0].milli
		for _, more := range waysToGive(n, free, units[1:]) {
			out = append(out, append([]Share{{key.Kind, key.Index, units[0].milli}}, more...))
		}
		free[key] += units[0].milli
	}
	return out
}

// mayHold says that the devices of a binding are what is asked for, and free.
func (w *world) mayHold(q *wanted, bd Binding) bool {
	n := w.nodes[bd.Node]
	_, _, free := w.free(n, nil)
	inOrder := func(a, b Share) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), cmp.Compare(a.Index, b.Index), cmp.Compare(a.Milli, b.Milli))
	}
	got := slices.SortedFunc(slices.Values(bd.Devices), inOrder)
	return slices.ContainsFunc(waysToGive(n, free, unitsOf(q.spec.GetScheduling().GetDevices())), func(way []Share) bool {
		return slices.Equal(got, slices.SortedFunc(slices.Values(way), inOrder))
	})
}

func accepts(a *portolanv1.DeviceRequest, kind, model string) bool {
	return cmp.Or(a.GetKind(), "gpu") == kind && (len(a.GetModels()) == 0 || slices.Contains(a.GetModels(), model))
}

func meets(r *portolanv1.Requirement, labels map[string]string) bool {
	v, ok := labels[r.GetKey()]
	number := func(s string) (int64, bool) {
		n, err := strconv.ParseInt(s, 10, 64)
		return n, err == nil
	}
	switch r.GetOperator() {
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN:
		return ok && slices.Contains(r.GetValues(), v)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_IN:
		return !ok || !slices.Contains(r.GetValues(), v)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS:
		return ok
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_EXISTS:
		return !ok
	}
	a, okA := number(v)
	b, okB := number(r.GetValues()[0])
	if !ok || !okA || !okB {
		return false
	}
	if r.GetOperator() == portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_GREATER {
		return a > b
	}
	return a < b
}

func meetsTerm(t *portolanv1.RequirementTerm, labels map[string]string) bool {
	for _, r := range t.GetRequirements() {
		if !meets(r, labels) {
			return false
		}
	}
	return true
}

// fixed are the reasons that follow from a node's facts, and the weight of unmet
// wishes.
func (w *world) fixed(q *wanted, n Node) (codes Code, wish float64) {
	s, labels := q.spec.GetScheduling(), n.Facts.GetLabels()
	daemon := q.spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
	codes |= n.Down
	if !daemon {
		switch n.Mode {
		case portolanv1.NodeMode_NODE_MODE_CORDONED:
			codes |= NodeCordoned
		case portolanv1.NodeMode_NODE_MODE_DRAINING:
			codes |= NodeDraining
		}
	}
	for k, v := range s.GetNodeSelector() {
		if got, ok := labels[k]; !ok || got != v {
			codes |= SelectorMismatch
		}
	}
	if len(s.GetNodeAffinity()) > 0 && !slices.ContainsFunc(s.GetNodeAffinity(), func(t *portolanv1.RequirementTerm) bool { return meetsTerm(t, labels) }) {
		codes |= AffinityMismatch
	}
	for _, p := range s.GetPreferredNodes() {
		if !meetsTerm(p.GetTerm(), labels) {
			wish += float64(p.GetWeight())
		}
	}
	for _, taint := range n.Facts.GetTaints() {
		if slices.ContainsFunc(s.GetTolerations(), func(o *portolanv1.Toleration) bool {
			return o.GetKey() == taint.GetKey() && (o.GetValue() == "" || o.GetValue() == taint.GetValue()) && (o.GetEffect() == 0 || o.GetEffect() == taint.GetEffect()) &&
				(o.GetStay() == nil || taint.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE)
		}) {
			continue
		}
		if taint.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE {
			wish += 100
		} else {
			codes |= TaintNotTolerated
		}
	}
	if !daemon {
		spot := w.pool(n).GetSpot()
		switch q.spec.GetPlacement().GetCapacity() {
		case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
			if !spot {
				codes |= CapacityTypeMismatch
			}
		case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
			if !spot {
				wish += 100
			}
		default:
			if spot {
				codes |= CapacityTypeMismatch
			}
		}
	}
	for _, key := range mustKeys(s) {
		if _, ok := labels[key]; !ok {
			codes |= NoTopologyLabel
		}
	}
	for _, a := range s.GetDevices() {
		if a.GetCount() == 0 && a.GetShareMilli() == 0 {
			continue
		}
		have := int32(0)
		for _, d := range n.Facts.GetDevices() {
			if accepts(a, d.GetKind(), d.GetModel()) {
				have++
			}
		}
		if have < max(a.GetCount(), 1) {
			codes |= DeviceModelMismatch
		}
	}
	return codes, wish
}

func mustKeys(s *portolanv1.WorkloadSpec_Scheduling) []string {
	var out []string
	for _, sp := range allSpreads(s) {
		if sp.must() && sp.key != "node" {
			out = append(out, sp.key)
		}
	}
	for _, a := range s.GetAffinity() {
		if !a.GetAnti() && !a.GetPrefer() && a.GetTopologyKey() != "node" {
			out = append(out, a.GetTopologyKey())
		}
	}
	return out
}

func allSpreads(s *portolanv1.WorkloadSpec_Scheduling) []spread {
	var out []spread
	if s.GetSpreadKey() != "" {
		out = append(out, spread{key: s.GetSpreadKey(), skew: s.GetMaxSkew()})
	}
	for _, p := range s.GetSpreads() {
		out = append(out, spread{p.GetTopologyKey(), max(p.GetMaxSkew(), 1), p.GetPrefer()})
	}
	return out
}

// domainOf is a node's value of a key; false when it has none.
func domainOf(n Node, key string) (string, bool) {
	if key == "node" {
		return n.ID, true
	}
	v, ok := n.Facts.GetLabels()[key]
	return v, ok
}

// inDomain counts the replicas that a filter accepts in the domain of a node.
func (w *world) inDomain(n Node, key string, without map[string]bool, accept func(*guest) bool) int {
	d, ok := domainOf(n, key)
	count := 0
	for id, g := range w.replicas {
		home, there := w.nodes[g.Node]
		if !there || g.Leaving || g.Ended || without[id] || !accept(g) {
			continue
		}
		if o, has := domainOf(home, key); o == d && has == ok {
			count++
		}
	}
	return count
}

// cost is how the world compares nodes: unmet wishes, replicas to spread from, own
// replicas, load.
type cost struct {
	wish, spread, own, load float64
}

// against gives everything that is against one more replica on a node.
func (w *world) against(q *wanted, n Node, without map[string]bool) (codes Code, c cost) {
	codes, c.wish = w.fixed(q, n)
	if q.node != "" && n.ID != q.node || q.notOn == n.ID {
		codes |= OtherNode
	}
	a := askOf(q.spec, q.overhead)
	if !q.volumesThere {
		a.storage += volumesOf(q.spec)
	}
	free, ports, devices := w.free(n, without)
	for _, x := range []struct {
		code       Code
		need, have int64
	}{{InsufficientCPU, a.cpu, free.cpu}, {InsufficientMemory, a.memory, free.memory}, {InsufficientStorage, a.storage, free.storage}, {NoFreeAddress, a.addresses, free.addresses}} {
		if x.need > 0 && x.need > x.have {
			codes |= x.code
		}
	}
	for _, p := range q.ports {
		if ports[p] {
			codes |= PortTaken
		}
	}
	if codes&DeviceModelMismatch == 0 && len(waysToGive(n, devices, unitsOf(q.spec.GetScheduling().GetDevices()))) == 0 {
		codes |= InsufficientDevices
	}
	codes |= w.related(q, n, without, &c)
	c.load = w.loadOf(q, n, free, a, devices)
	if cmp.Or(w.pool(n).GetScoring(), portolanv1.Scoring_SCORING_SPREAD) == portolanv1.Scoring_SCORING_SPREAD || slices.ContainsFunc(allSpreads(q.spec.GetScheduling()), func(s spread) bool { return s.key == "node" }) {
		c.own = float64(w.inDomain(n, "node", without, q.sameRevision))
	}
	return codes, c
}

func (q *wanted) sameRevision(g *guest) bool { return g.owner == q.owner }

func (q *wanted) of(workload string) func(*guest) bool {
	return func(g *guest) bool { return g.owner.Tenant == q.owner.Tenant && g.owner.Workload == workload }
}

// related are the reasons and wishes about other replicas.
func (w *world) related(q *wanted, n Node, without map[string]bool, c *cost) (codes Code) {
	s := q.spec.GetScheduling()
	for _, sp := range allSpreads(s) {
		here := w.inDomain(n, sp.key, without, q.sameRevision)
		if sp.key != "node" {
			c.spread += float64(here)
		}
		if !sp.must() {
			continue
		}
		least := math.MaxInt
		for _, o := range w.nodes {
			if bad, _ := w.fixed(q, o); bad == 0 {
				least = min(least, w.inDomain(o, sp.key, without, q.sameRevision))
			}
		}
		if least < math.MaxInt && here+1-least > int(sp.skew) {
			codes |= SpreadSkew
		}
	}
	for _, a := range s.GetAffinity() {
		all, near := 0, 0
		for id, g := range w.replicas {
			if _, there := w.nodes[g.Node]; there && !g.Leaving && !g.Ended && !without[id] && q.of(a.GetWorkload())(g) {
				all++
			}
		}
		if _, ok := domainOf(n, a.GetTopologyKey()); ok {
			near = w.inDomain(n, a.GetTopologyKey(), without, q.of(a.GetWorkload()))
		}
		first := a.GetWorkload() == q.owner.Workload && all == 0
		switch met := (near > 0) != a.GetAnti(); {
		case met:
		case a.GetPrefer():
			c.wish += float64(max(a.GetWeight(), 1))
		case a.GetAnti():
			codes |= WorkloadAntiAffinity
		case !first:
			codes |= WorkloadAffinity
		}
	}
	for _, g := range w.replicas {
		home, there := w.nodes[g.Node]
		if !there || g.Leaving || g.Ended || without[g.ID] || g.owner.Tenant != q.owner.Tenant {
			continue
		}
		for _, a := range g.spec.GetScheduling().GetAffinity() {
			if !a.GetAnti() || a.GetPrefer() || a.GetWorkload() != q.owner.Workload {
				continue
			}
			d, ok := domainOf(n, a.GetTopologyKey())
			if o, has := domainOf(home, a.GetTopologyKey()); ok && has && o == d {
				codes |= WorkloadAntiAffinity
			}
		}
	}
	return codes
}

func (w *world) loadOf(q *wanted, n Node, free, a room, devices map[Share]int32) float64 {
	c := w.capacity(n)
	share := func(free, ask, capacity int64) float64 {
		if capacity <= 0 {
			return 0
		}
		return 1 - float64(free-ask)/float64(capacity)
	}
	load := min(max(share(free.cpu, a.cpu, c.cpu), share(free.memory, a.memory, c.memory), 0), 1)
	p, extra := w.pool(n), 0.0
	switch p.GetScoring() {
	case portolanv1.Scoring_SCORING_PACK:
		load = 1 - load
	case portolanv1.Scoring_SCORING_LEAST_FRAGMENTATION:
		if w.learned == nil {
			return 0
		}
		load = w.fragmentLoad(q, n, free, a, devices, 1-load)
		extra = w.modelPrice(q, n)
	case portolanv1.Scoring_SCORING_PRICE:
		dearest := 0.0
		for _, o := range w.nodes {
			dearest = max(dearest, w.price(w.pool(o), a))
		}
		for _, o := range w.pools.Pools {
			dearest = max(dearest, w.price(o, a))
		}
		dearest = max(dearest, w.price(&portolanv1.NodePool{}, a))
		if dearest == 0 {
			load = (1 - load) / 1024
		} else {
			load = math.Floor(w.price(p, a)/dearest*1022)/1024 + (1-load)/1024
		}
	}
	images := map[string]bool{}
	for _, ct := range q.spec.GetContainers() {
		if _, d, ok := strings.Cut(ct.GetResolvedImage(), "@"); ok {
			images[d] = slices.Contains(n.Facts.GetImages(), d)
		}
	}
	if len(images) == 0 {
		return min(load+extra, 1)
	}
	absent := 0
	for _, there := range images {
		if !there {
			absent++
		}
	}
	return min(load*0.9+0.1*float64(absent*255/len(images))/255+extra, 1)
}

// price is per hour, in micro-units: whole cores and GiB at the pool's price, or the
// cluster's.
func (w *world) price(p *portolanv1.NodePool, a room) float64 {
	cpu, memory := p.GetCpuCoreHourMicros(), p.GetMemoryGibHourMicros()
	if cpu == 0 && memory == 0 {
		cpu, memory = w.pools.CPUCoreHourMicros, w.pools.MemGiBHourMicros
	}
	return float64(a.cpu)*(float64(cpu)/1000) + float64(a.memory)*(float64(memory)/(1<<30))
}

// scoreBound is how far from the best a chosen node may be in the load's range of 0
// to 1: keys hold 24 bits of it.
const scoreBound = 2.0 / (1 << loadBits)

func (c cost) compare(o cost) int {
	if x := cmp.Or(cmp.Compare(c.wish, o.wish), cmp.Compare(c.spread, o.spread), cmp.Compare(c.own, o.own)); x != 0 {
		return x
	}
	if math.Abs(c.load-o.load) <= scoreBound {
		return 0
	}
	return cmp.Compare(c.load, o.load)
}

// takers are the nodes that would take one more replica.
func (w *world) takers(q *wanted) []Node {
	var out []Node
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		if codes, _ := w.against(q, w.nodes[id], nil); codes == 0 {
			out = append(out, w.nodes[id])
		}
	}
	return out
}

// add binds a replica.
func (w *world) add(id string, q *wanted, b Binding) *guest {
	g := &guest{Replica: Replica{ID: id, Node: b.Node, Devices: b.Devices}, spec: q.spec, owner: q.owner, overhead: q.overhead, ports: q.ports}
	w.replicas[id] = g
	if !q.volumesThere {
		if v := volumesOf(q.spec); v > 0 {
			w.volumes[id] = volume{b.Node, v}
		}
	}
	return g
}

func (w *world) drop(id string) {
	delete(w.replicas, id)
	delete(w.volumes, id)
}

// most tries all ways to place n replicas, and says whether there is one.
func (w *world) most(q *wanted, n int, seen map[string]bool) bool {
	if n == 0 {
		return true
	}
	var state []string
	for _, g := range w.replicas {
		if strings.HasPrefix(g.ID, "try") {
			state = append(state, fmt.Sprint(g.Node, g.Devices))
		}
	}
	slices.Sort(state)
	sign := strings.Join(state, " ")
	if seen[sign] {
		return false
	}
	seen[sign] = true
	for _, node := range w.takers(q) {
		_, _, free := w.free(node, nil)
		for _, devices := range waysToGive(node, free, unitsOf(q.spec.GetScheduling().GetDevices())) {
			id := "try" + strconv.Itoa(n)
			w.add(id, q, Binding{Node: node.ID, Devices: devices})
			ok := w.most(q, n-1, seen)
			w.drop(id)
			if ok {
				return true
			}
		}
	}
	return false
}

// give hands devices out: shares on the fullest that has room.
func (w *world) give(q *wanted, n Node) []Share {
	_, _, free := w.free(n, nil)
	if ways := waysToGive(n, free, unitsOf(q.spec.GetScheduling().GetDevices())); len(ways) > 0 {
		return ways[0]
	}
	return nil
}

// leavingOn are those that leave a node anyway.
func (w *world) leavingOn(node string) map[string]bool {
	out := map[string]bool{}
	for id, g := range w.replicas {
		if g.Node == node && g.Leaving && !g.Ended {
			out[id] = true
		}
	}
	return out
}

// cheapest tries every set of victims on every node; victims that are leaving
// already are free, and who was only just placed is none.
func (w *world) cheapest(q *wanted, allowance map[string]int) (best toll, found bool) {
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		n := w.nodes[id]
		leaving := w.leavingOn(id)
		var may []*guest
		for rid, g := range w.replicas {
			switch {
			case g.Node != id || g.Ended || g.promised || g.Leaving:
			case strings.HasPrefix(rid, "b") && g.spec.GetPriority() < q.spec.GetPriority():
				may = append(may, g)
			}
		}
		for set := range 1 << len(may) {
			c := toll{victims: bits.OnesCount(uint(set)), highest: -1 << 31, began: 1<<63 - 1}
			without := maps.Clone(leaving)
			spent := map[string]int{}
			for k, g := range may {
				if set>>k&1 != 0 {
					without[g.ID] = true
					spent[g.owner.key()]++
					c.highest, c.sum, c.began = max(c.highest, g.spec.GetPriority()), c.sum+int64(g.spec.GetPriority()), min(c.began, g.Bound)
				}
			}
			ok := true
			for k, n := range spent {
				ok = ok && n <= allowance[k]
			}
			if codes, _ := w.against(q, n, without); !ok || codes != 0 {
				continue
			}
			if !found || compareWorth(c, best) < 0 {
				best, found = c, true
			}
		}
	}
	return best, found
}

func compareWorth(a, b toll) int {
	return cmp.Or(cmp.Compare(a.victims, b.victims), cmp.Compare(a.highest, b.highest), cmp.Compare(a.sum, b.sum), cmp.Compare(b.began, a.began))
}

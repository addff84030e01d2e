package schedule

import (
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strings"
)

// explain says why nodes took no more replicas of a group: one look at each node,
// and a bounded number of questions what would be if.
func (t *Table) explain(u *run, missing, nominated int) *Refusal {
	f := &Refusal{}
	if nominated > 0 {
		f.Codes |= Nominated
		f.Reasons = append(f.Reasons, Reason{Code: Nominated, Message: fmt.Sprintf("room is kept for %s until who leaves it is gone", replicas(nominated))})
	}
	if missing <= 0 {
		return f
	}
	if t.work.batch.Brief {
		f.Codes |= codesEnd - 1
		return f
	}
	s := survey{u: u, near: map[Code]*near{}}
	s.look()
	s.reasons(f)
	s.nearest(f)
	if missing == 1 || !u.g.Class.gang {
		f.Remedies = s.remedies(t, 1)
	}
	return f
}

// refuseGang takes back what was placed of a gang and says why it is not all.
func (t *Table) refuseGang(u *run, p *Placed, start, waiting int) {
	n := t.placedSince(start)
	all := u.g.Count
	f := t.explain(u, all-n-waiting, waiting)
	t.undo(start)
	p.Missing, p.Refusal = all-waiting, f
	if t.work.batch.Brief {
		return
	}
	t.begin(u, u.g, u.r)
	u.finish()
	f.Codes |= GangIncomplete
	f.Reasons = append([]Reason{{Code: GangIncomplete, Message: fmt.Sprintf("%d of %d replicas have room, and all are needed at once", n+waiting, all)}}, f.Reasons...)
	if n == all-1 && waiting == 0 && u.musts() == 0 {
		f.Remedies = keepNodeRemedies(f.Remedies)
	} else {
		f.Remedies = nil
	}
	s := survey{u: u, near: map[Code]*near{}}
	s.look()
	f.Remedies = append(f.Remedies, s.classRemedies(t, all)...)
	if n > 0 && waiting == 0 {
		f.Remedies = append(f.Remedies, Remedy{Kind: FewerReplicas, Amount: int64(n), Message: fmt.Sprintf("ask for at most %s at once", replicas(n))})
	}
}

func keepNodeRemedies(list []Remedy) []Remedy {
	return slices.DeleteFunc(list, func(r Remedy) bool { return r.Node == "" || r.Kind == LabelNode || r.Kind == FreePort })
}

func several(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func replicas(n int) string { return several(n, "replica", "replicas") }

func nodes(n int) string { return several(n, "node", "nodes") }

// survey is what every node says to one more replica.
type survey struct {
	u      *run
	counts [32]int
	total  int
	// most that is free on nodes that count under the code.
	mostCPU, mostMemory, mostStorage int64
	// near holds, for a code, the node that would take it but for that.
	near map[Code]*near
	// emptied is a node that would take it if nothing were on it.
	emptied int32
	closest int32
	lack    Code
	short   float64
}

// near is a node with only one reason, and how far off it is; less is nearer.
type near struct {
	node int32
	off  float64
	all  []int32 // of DeviceModelMismatch, the first few
}

const maxNear = 8

func (s *survey) look() {
	u, t := s.u, s.u.t
	s.emptied, s.closest = -1, -1
	for i := range int32(len(t.ids)) {
		if t.ids[i] == "" || (u.g.Node != "" && t.ids[i] != u.g.Node) {
			continue
		}
		s.total++
		codes := u.check(i)
		if codes == 0 {
			continue
		}
		s.counts[codes.first().index()]++
		s.most(i, codes)
		s.noteEmpty(i, codes)
		n := ones(codes)
		if n > 1 && s.closest >= 0 && n > ones(s.lack) {
			continue
		}
		off := s.off(i, codes)
		if n == 1 {
			s.note(codes, i, off)
		}
		if s.closest < 0 || ones(codes) < ones(s.lack) || (ones(codes) == ones(s.lack) && (off < s.short || (off == s.short && t.before(i, s.closest)))) {
			s.closest, s.lack, s.short = i, codes, off
		}
	}
}

func ones(c Code) int { return bits.OnesCount32(uint32(c)) }

func (s *survey) most(i int32, codes Code) {
	t := s.u.t
	switch codes.first() {
	case InsufficientCPU:
		s.mostCPU = max(s.mostCPU, t.freeCPU[i])
	case InsufficientMemory:
		s.mostMemory = max(s.mostMemory, t.freeMemory[i])
	case InsufficientStorage:
		s.mostStorage = max(s.mostStorage, t.freeStorage[i])
	default:
	}
}

func (s *survey) note(c Code, i int32, off float64) {
	t := s.u.t
	n := s.near[c]
	if n == nil {
		n = &near{node: i, off: off}
		s.near[c] = n
	}
	if off < n.off || (off == n.off && t.before(i, n.node)) {
		n.node, n.off = i, off
	}
	if c != DeviceModelMismatch {
		return
	}
	n.all = append(n.all, i)
	slices.SortFunc(n.all, func(a, b int32) int {
		if t.before(a, b) {
			return -1
		}
		return 1
	})
	n.all = n.all[:min(len(n.all), maxNear)]
}

// noteEmpty remembers the cheapest node whose like, empty, would do.
func (s *survey) noteEmpty(i int32, codes Code) {
	u, t := s.u, s.u.t
	const used = InsufficientCPU | InsufficientMemory | InsufficientStorage | InsufficientDevices | NoFreeAddress | PortTaken | NodeLost | NodeNotReady | NodeDraining | NodeCordoned
	if codes &^= used; codes&^(WorkloadAntiAffinity|WorkloadAffinity|SpreadSkew) != 0 || s.u.g.Node != "" {
		return
	}
	a := &u.r.c.ask
	price := t.pools[t.pool[i]].costs(a)
	if s.emptied >= 0 {
		if least := t.pools[t.pool[s.emptied]].costs(a); price > least || (price == least && !t.before(i, s.emptied)) {
			return
		}
	}
	// A new node has nothing on it: of the terms about others only what works by
	// label counts.
	codes &^= WorkloadAntiAffinity | WorkloadAffinity | SpreadSkew
	if u.related() {
		c, _, _ := u.verdict(u.valuesOf(i))
		codes |= c
	}
	if u.mustBeOnOneNode() {
		codes |= WorkloadAffinity
	}
	if codes == 0 && t.fitsEmpty(i, a, u.volumes()) {
		s.emptied = i
	}
}

// mustBeOnOneNode says that a node with nothing on it will not do.
func (u *run) mustBeOnOneNode() bool {
	return slices.ContainsFunc(u.r.affinity, func(a affinityIn) bool {
		return a.column == nil && !a.anti && !a.prefer && (a.scope != u.r.work || a.scope.total > 0)
	})
}

// fitsEmpty says whether a node would have room if nothing were on it.
func (t *Table) fitsEmpty(i int32, a *ask, volumes int64) bool {
	if a.cpu > t.capCPU[i] || a.memory > t.capMemory[i] || a.storage+volumes > t.capStorage[i] || (a.address && t.addresses[i] <= 0) {
		return false
	}
	if len(a.devices) == 0 {
		return true
	}
	if len(a.devices) == 1 {
		return t.hasDevices(i, &a.devices[0])
	}
	held := slices.Clone(t.devices[i])
	for k := range t.devices[i] {
		t.devices[i][k].free, t.devices[i][k].kept = whole, 0
	}
	ok := t.fitsDevices(i, a.devices)
	copy(t.devices[i], held)
	return ok
}

// off is how far a node is from fitting, in parts of what is asked for.
func (s *survey) off(i int32, codes Code) float64 {
	t, a := s.u.t, &s.u.r.c.ask
	lack := 0.0
	if codes&InsufficientCPU != 0 {
		lack += float64(a.cpu-t.freeCPU[i]) / float64(a.cpu)
	}
	if codes&InsufficientMemory != 0 {
		lack += float64(a.memory-t.freeMemory[i]) / float64(a.memory)
	}
	if codes&InsufficientStorage != 0 {
		need := a.storage + s.u.volumes()
		lack += float64(need-t.freeStorage[i]) / float64(need)
	}
	if codes&NoFreeAddress != 0 {
		lack += float64(-t.freeAddress[i])
	}
	if codes&InsufficientDevices != 0 && len(a.devices) == 1 {
		need, free := a.devices[0].lack(t.devices[i])
		lack += 1 - float64(free)/float64(need)
	}
	for rest := codes & (SelectorMismatch | TaintNotTolerated | PortTaken | SpreadSkew | NoTopologyLabel); rest != 0; rest &= rest - 1 {
		lack += float64(s.tooMany(rest.first(), i))
	}
	return math.Max(lack, 0)
}

// lack is what an ask needs of a node's devices, and the most that it could have.
func (a *deviceAsk) lack(devices []device) (need, free int32) {
	milli, count := a.amount()
	need = count
	if milli < whole {
		need = milli
	}
	for k := range devices {
		d := &devices[k]
		if d.kept != 0 || !a.takes(d) {
			continue
		}
		if milli < whole {
			free = max(free, d.free)
		} else if d.free >= whole {
			free++
		}
	}
	return need, free
}

// tooMany is how many single changes a code needs on a node, beyond one; of
// SpreadSkew, by how much max_skew would have to rise beyond one.
func (s *survey) tooMany(c Code, i int32) int {
	u, t := s.u, s.u.t
	n := 0
	switch c {
	case SelectorMismatch:
		n = len(u.unmet(i))
	case TaintNotTolerated:
		n = len(u.untolerated(i))
	case PortTaken:
		for _, p := range t.ports[i] {
			if slices.Contains(u.r.c.ask.ports, p) {
				n++
			}
		}
	case NoTopologyLabel:
		n = len(u.unlabelled(i))
	case SpreadSkew:
		for k := range u.r.spreads {
			n += int(max(u.skew(k, i)-u.r.spreads[k].skew, 0))
		}
	default:
	}
	return max(n-1, 0)
}

func (s *survey) reasons(f *Refusal) {
	if s.total == 0 {
		f.Codes |= NoNode
		m := "there is no node"
		if s.u.g.Node != "" {
			m = "node " + s.u.g.Node + ", where it must be, is not there"
		}
		f.Reasons = append(f.Reasons, Reason{Code: NoNode, Message: m})
		return
	}
	var out []Reason
	for k, n := range s.counts {
		if n > 0 {
			c := Code(1) << k
			f.Codes |= c
			out = append(out, Reason{Code: c, Nodes: n, Message: s.message(c, n)})
		}
	}
	slices.SortStableFunc(out, func(a, b Reason) int { return b.Nodes - a.Nodes })
	f.Reasons = append(f.Reasons, out...)
}

func (s *survey) nearest(f *Refusal) {
	if s.closest < 0 {
		return
	}
	f.Nearest, f.NearestLacks = s.u.t.ids[s.closest], s.lack
	// Everything that it lacks may be what something else helps first.
	f.Codes |= s.lack
	var words []string
	for c := s.lack; c != 0; c &= c - 1 {
		words = append(words, s.detail(c.first(), s.closest))
	}
	f.NearestReason = strings.Join(words, "; ")
}

func (s *survey) message(c Code, n int) string {
	a := &s.u.r.c.ask
	switch c {
	case InsufficientCPU:
		return fmt.Sprintf("%s: %dm of CPU are asked for, at most %dm are free", nodes(n), a.cpu, max(s.mostCPU, 0))
	case InsufficientMemory:
		return fmt.Sprintf("%s: %s of memory are asked for, at most %s are free", nodes(n), mib(a.memory), mib(max(s.mostMemory, 0)))
	case InsufficientStorage:
		return fmt.Sprintf("%s: %s of storage are asked for, at most %s are free", nodes(n), mib(a.storage+s.u.volumes()), mib(max(s.mostStorage, 0)))
	default:
		return nodes(n) + ": " + s.words(c)
	}
}

func mib(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

// words say what a code means to the group at hand.
func (s *survey) words(c Code) string {
	u := s.u
	switch c {
	case NodeLost:
		return "silent"
	case NodeNotReady:
		return "not ready"
	case NodeDraining:
		return "draining"
	case NodeCordoned:
		return "cordoned"
	case OtherNode:
		return "not the node where it must be"
	case SelectorMismatch:
		return "labels do not match the node selector"
	case AffinityMismatch:
		return "labels match no term of the node affinity"
	case TaintNotTolerated:
		return "a taint that is not tolerated"
	case CapacityTypeMismatch:
		return "the pool's capacity type is not the workload's"
	case NoTopologyLabel:
		return "no label " + strings.Join(u.r.c.static.topology, " or ") + " to go by"
	case DeviceModelMismatch:
		return "not enough devices of the kind and models asked for"
	case InsufficientDevices:
		return "devices are in use"
	case NoFreeAddress:
		return "no free address for a replica"
	case PortTaken:
		return "a port of the node is taken"
	case WorkloadAffinity:
		return "not near the workload that it must be near"
	case WorkloadAntiAffinity:
		return "near a workload that it, or that, must keep away from"
	case SpreadSkew:
		return "one more there would exceed max_skew over " + u.skewed()
	default:
		return c.String()
	}
}

func (u *run) skewed() string {
	var keys []string
	for k := range u.r.spreads {
		if s := &u.r.spreads[k]; s.must() {
			keys = append(keys, s.key)
		}
	}
	return strings.Join(keys, " or ")
}

// detail is what one node lacks.
func (s *survey) detail(c Code, i int32) string {
	t, a := s.u.t, &s.u.r.c.ask
	switch c {
	case InsufficientCPU:
		return fmt.Sprintf("%dm of CPU more", a.cpu-t.freeCPU[i])
	case InsufficientMemory:
		return fmt.Sprintf("%s of memory more", mib(a.memory-t.freeMemory[i]+1<<20-1))
	case InsufficientStorage:
		return fmt.Sprintf("%s of storage more", mib(a.storage+s.u.volumes()-t.freeStorage[i]+1<<20-1))
	default:
		return s.words(c)
	}
}

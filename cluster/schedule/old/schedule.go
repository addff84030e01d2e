// Package old finds nodes for replicas. It owns filtering, scoring and
// spreading; it never decides how many replicas there should be, and knows
// nothing of addresses but how many are free.
//
// A group is a number of identical replicas. The nodes that may take it go into a
// heap once, and each placement costs one look at its top.
//
// Concurrency: pure functions; the input is only read.
package old

import (
	"fmt"
	"math"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Reason codes of refusals.
const (
	NodeLost           = "NodeLost"
	NodeNotReady       = "NodeNotReady"
	SelectorMismatch   = "SelectorMismatch"
	TaintNotTolerated  = "TaintNotTolerated"
	NoSpreadLabel      = "NoSpreadLabel"
	InsufficientCPU    = "InsufficientCPU"
	InsufficientMemory = "InsufficientMemory"
	NoFreeAddress      = "NoFreeAddress"
	SpreadSkew         = "SpreadSkew"
)

// NodeKey is the spread key under which every node is a domain of its own.
const NodeKey = "node"

// Node is what the scheduler knows of a machine.
type Node struct {
	ID       string
	Capacity api.Resources
	Used     api.Resources
	// Addresses that are free for replicas.
	Addresses int
	Labels    map[string]string
	Taints    []*portolanv1.Taint
	// NotReady is the code why it takes nothing now; empty when it does.
	NotReady string
}

// Group is a number of identical replicas that need a node.
type Group struct {
	// Key tells groups apart and breaks ties: "tenant/workload/revision".
	Key     string
	Count   int
	Request api.Resources
	// Node, when set, is the only one that will do.
	Node        string
	Selector    map[string]string
	Tolerations []*portolanv1.Toleration
	// SpreadKey is the label over whose values replicas are spread; empty spreads
	// over nodes. MaxSkew bounds the difference between two values; 0 does not.
	SpreadKey string
	MaxSkew   int
	// Pack fills nodes up instead of spreading.
	Pack bool
	// Address says that each replica takes one of the node's addresses.
	Address bool
	// Running counts the replicas of the group that are there, by node.
	Running map[string]int
}

// Input is everything that a decision follows from: the same input gives the
// same result.
type Input struct {
	Nodes []Node
	// Groups in the order in which they are served.
	Groups []Group
	Seed   uint64
}

// Refusal is why nodes took no more replicas of a group.
type Refusal struct {
	Code    string
	Message string
	// Nodes is over how many it was counted.
	Nodes int
}

// Placed is the result for one group.
type Placed struct {
	// Nodes are indexes into Input.Nodes, one for each replica that was placed.
	Nodes []int32
	// Missing replicas found no node, and Refusals say why; most frequent first.
	Missing  int
	Refusals []Refusal
}

// Schedule serves the groups one after the other. Result i is of group i.
func Schedule(in Input) []Placed {
	t := newTable(in.Nodes, in.Seed)
	out := make([]Placed, len(in.Groups))
	for i := range in.Groups {
		out[i] = t.place(&in.Groups[i])
	}
	return out
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func tolerated(t *portolanv1.Taint, by []*portolanv1.Toleration) bool {
	for _, o := range by {
		effect := o.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED || o.GetEffect() == t.GetEffect()
		if o.GetKey() == t.GetKey() && effect && (o.GetValue() == "" || o.GetValue() == t.GetValue()) {
			return true
		}
	}
	return false
}

// verdict is why a node is out for a group, capacity apart.
type verdict uint8

const (
	fit verdict = iota
	prefersNot
	lost
	notReady
	mismatch
	tainted
	unlabelled
	shortCPU
	shortMemory
	noAddress
	skewed
	verdicts
)

var codes = [verdicts]string{
	lost: NodeLost, notReady: NodeNotReady, mismatch: SelectorMismatch, tainted: TaintNotTolerated, unlabelled: NoSpreadLabel,
	shortCPU: InsufficientCPU, shortMemory: InsufficientMemory, noAddress: NoFreeAddress, skewed: SpreadSkew,
}

func (t *table) judge(i int, g *Group) verdict {
	n := &t.nodes[i]
	switch {
	case n.NotReady == NodeLost:
		return lost
	case n.NotReady != "":
		return notReady
	case !selects(g.Selector, n.Labels):
		return mismatch
	}
	v := fit
	for _, taint := range n.Taints {
		if tolerated(taint, g.Tolerations) {
			continue
		}
		if taint.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE {
			return tainted
		}
		v = prefersNot
	}
	if g.SpreadKey != "" && g.SpreadKey != NodeKey && g.MaxSkew > 0 {
		if _, ok := n.Labels[g.SpreadKey]; !ok {
			return unlabelled
		}
	}
	return v
}

// signature names what judge looks at.
func (g *Group) signature() string {
	var b strings.Builder
	for _, k := range sortedKeys(g.Selector) {
		fmt.Fprintf(&b, "%q=%q,", k, g.Selector[k])
	}
	for _, o := range g.Tolerations {
		fmt.Fprintf(&b, "|%q=%q:%d", o.GetKey(), o.GetValue(), o.GetEffect())
	}
	if g.MaxSkew > 0 {
		fmt.Fprintf(&b, "/%q", g.SpreadKey)
	}
	return b.String()
}

// short gives the resource that a node lacks for one replica of a group.
func (t *table) short(i int32, g *Group) verdict {
	switch {
	case g.Request.CPUMilli > t.freeCPU[i]:
		return shortCPU
	case g.Request.MemoryBytes > t.freeMemory[i]:
		return shortMemory
	case g.Address && t.freeAddresses[i] <= 0:
		return noAddress
	}
	return fit
}

const (
	loadBits  = 24
	tieBits   = 16
	countBits = 63 - loadBits - tieBits
)

// score is how a node compares for the next replica; lower is better. From the
// highest bit: whether the node would rather not, replicas of the group that it
// has, how full it would be, a seeded coin.
func (t *table) score(i int32, g *Group, v verdict) uint64 {
	cpu := loadOf(t.freeCPU[i]-g.Request.CPUMilli, t.capCPU[i])
	memory := loadOf(t.freeMemory[i]-g.Request.MemoryBytes, t.capMemory[i])
	load := max(cpu, memory)
	count := uint64(t.count[i])
	if g.Pack {
		load, count = 1<<loadBits-1-load, 0
	}
	key := min(count, 1<<countBits-1)<<(loadBits+tieBits) | load<<tieBits | uint64(t.tie[i])
	if v == prefersNot {
		key |= 1 << 63
	}
	return key
}

func loadOf(free, capacity int64) uint64 {
	if capacity <= 0 {
		return 0
	}
	f := 1 - float64(free)/float64(capacity)
	return uint64(math.Round(min(max(f, 0), 1) * (1<<loadBits - 1)))
}

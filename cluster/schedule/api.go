// Package schedule finds nodes for replicas. It owns filtering, scoring,
// spreading, displacement and the order in which groups wait; it never decides
// how many replicas there should be, and names no addresses.
//
// A Table holds the nodes and what is bound to them, column by column. Its owner
// feeds it changes and never builds it anew. Schedule reads it, decides, and leaves
// it as it was: what the owner commits, it puts.
//
// Concurrency: a Table and a Queue belong to one goroutine. There is no clock and
// no randomness: the same content of a table, seed and batch give the same result,
// in whatever order the content came.
package schedule

import (
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Code is why a node does not take a replica, as a bit. Its String is the stable
// reason code.
type Code uint32

// Codes is a set of them.
type Codes = Code

// The codes, in the order in which a node is asked: it counts under the first.
const (
	NodeLost Code = 1 << iota
	NodeNotReady
	NodeDraining
	NodeCordoned
	// OtherNode: the replica's volumes are on another node.
	OtherNode
	SelectorMismatch
	AffinityMismatch
	TaintNotTolerated
	// CapacityTypeMismatch: the node's pool is spot and the workload may not be
	// there, or the other way round.
	CapacityTypeMismatch
	// NoTopologyLabel: the node has no value for a key to spread over or to keep near
	// to another workload by.
	NoTopologyLabel
	DeviceModelMismatch
	InsufficientCPU
	InsufficientMemory
	InsufficientStorage
	InsufficientDevices
	NoFreeAddress
	PortTaken
	WorkloadAffinity
	WorkloadAntiAffinity
	SpreadSkew
	// NoNode: there is none at all, or the only one that would do is gone.
	NoNode
	// GangIncomplete: there is room, but not for all at once.
	GangIncomplete
	// Nominated: room was made or is being made on a node, and kept for the replica.
	Nominated
	codesEnd
)

// Node is what a table knows of a machine.
type Node struct {
	ID string
	// Facts are only read, and not changed after they were put.
	Facts *nodev1.NodeFacts
	// Addresses for replicas on the whole; each replica with an address takes one.
	Addresses int
	Mode      portolanv1.NodeMode
	// Down is why it takes nothing now: 0, NodeLost or NodeNotReady.
	Down Code
}

// PoolKey is the label that says to which pool a node belongs; DefaultPool is the
// pool of one that has none. NodeKey is the topology key of which every node is a
// domain of its own.
const (
	PoolKey     = "pool"
	DefaultPool = "default"
	NodeKey     = "node"
)

// Pools say how nodes are used. The prices are the cluster's, for pools without
// one of their own: micro-units per core-hour and GiB-hour.
type Pools struct {
	Pools             []*portolanv1.NodePool
	CPUCoreHourMicros int64
	MemGiBHourMicros  int64
}

// Owner is whose replicas they are.
type Owner struct {
	Tenant, Workload, Revision string
}

// Options of Compile, beside the spec.
type Options struct {
	Owner Owner
	// Overhead of a replica beside its containers.
	Overhead api.Resources
	// Ports of the node's own network that a replica takes.
	Ports []int32
}

// Replica is one that is bound to a node, and counts there.
type Replica struct {
	// ID is unique in the table; putting it again replaces it.
	ID    string
	Class *Class
	Node  string
	// Devices that it holds.
	Devices []Share
	// Bound is when it began, in seconds; the later of two equal ones is displaced
	// first.
	Bound int64
	// Leaving: it was told to stop. It still takes its room, is not displaced again,
	// and counts for affinity no more.
	Leaving bool
	// Ended: it only holds its address until its node has cleared it away.
	Ended bool
}

// Share is what a replica has of one device of its node; 1000 is all of it.
type Share struct {
	Kind  string
	Index int32
	Milli int32
}

// Group is a number of identical replicas that need nodes.
type Group struct {
	// Key tells groups of a batch apart: "tenant/workload/revision", and what else its
	// owner needs. Nominations are kept by it.
	Key   string
	Class *Class
	Count int
	// Node, when set, is the only one that will do.
	Node string
	// VolumesThere: the volumes are on Node already, and counted by PutVolume.
	VolumesThere bool
	// NotOn is a node that will not do: the one that a replica leaves.
	NotOn string
}

// Batch is what is to be decided at once.
type Batch struct {
	// Groups in the order in which they are served (see Queue).
	Groups []Group
	// Allowance is how many replicas of a workload, by "tenant/workload", may be
	// displaced now under its disruption budget. One that is absent allows none.
	Allowance map[string]int
	// NoPreemption: nothing is displaced for anybody.
	NoPreemption bool
	// Brief: refusals are not explained, and could have any code. The explanation is
	// what Schedule says without it.
	Brief bool
}

// Binding is a node for one replica.
type Binding struct {
	Node    string
	Devices []Share
	// Kept: its room was kept by a nomination, which the owner withdraws.
	Kept bool
}

// Nomination is a node on which a replica will have room when its victims are
// gone. The owner stops them and calls Table.Nominate, which keeps the room.
type Nomination struct {
	Node string
	// Victims by ID; each of them is needed. None when others leave already.
	Victims []string
	// Withdrawn are groups of lower priority that give up the room kept for them on
	// Node: the owner withdraws it.
	Withdrawn []string
}

// Placed is the result for one group.
type Placed struct {
	Bindings []Binding
	// Nominations of replicas that displace others; they are not bound yet.
	Nominations []Nomination
	// Unkept are the nodes on which room that is kept for the group is of no use any
	// more, as they take nothing of it now: the owner withdraws it. Each stands once per
	// replica.
	Unkept []string
	// Missing replicas found no node, nominated ones apart.
	Missing int
	// Refusal is nil when all are bound.
	Refusal *Refusal
}

// Result of a batch: Placed[i] is of group i. It is the table's memory, valid until
// the next call of Schedule.
type Result struct {
	Placed []Placed
}

// Refusal is why nodes took no more replicas of a group.
type Refusal struct {
	// Codes of all reasons, for Queue.
	Codes Codes
	// Reasons count nodes, each under the first code that it gives; most nodes first.
	Reasons []Reason
	// Nearest is a node that lacks least, and everything that it lacks.
	Nearest       string
	NearestLacks  Codes
	NearestReason string
	// Remedies are the smallest single changes that help, each enough by itself for
	// one more replica (a gang: for all of it).
	Remedies []Remedy
}

// Reason is a refusal of a number of nodes.
type Reason struct {
	Code    Code
	Nodes   int
	Message string
}

// RemedyKind says what to change.
type RemedyKind uint8

// The kinds of remedies, and which fields of Remedy say more.
const (
	// Ask for at most Amount: millicores, bytes, bytes, thousandths of a device.
	AskLessCPU RemedyKind = iota + 1
	AskLessMemory
	AskLessStorage
	AskSmallerShare
	// AskFewerDevices: at most Amount of kind Key.
	AskFewerDevices
	// AllowModel: also model Value of kind Key.
	AllowModel
	// Free Amount more on Node: millicores, bytes, bytes, addresses.
	FreeCPU
	FreeMemory
	FreeStorage
	FreeAddress
	// FreePort Amount on Node.
	FreePort
	// Uncordon Node, which is cordoned or draining.
	Uncordon
	// Tolerate Taint.
	Tolerate
	// LabelNode Node with Key=Value.
	LabelNode
	// DropSelector Key.
	DropSelector
	// DropNodeAffinity: require no terms.
	DropNodeAffinity
	// PreferAffinity, PreferAntiAffinity: make it a wish, to workload Value over Key.
	PreferAffinity
	PreferAntiAffinity
	// RaiseSkew over Key to Amount.
	RaiseSkew
	// PreferSpread: make the spread over Key a wish.
	PreferSpread
	// AllowSpot: let it run on spot pools.
	AllowSpot
	// RaisePriority to Amount: it may then displace others.
	RaisePriority
	// FewerReplicas: a gang of Amount has room.
	FewerReplicas
	// AddNode: one more of pool Value, like Node but empty.
	AddNode
	// WaitForNode: Node is lost or not ready and would do.
	WaitForNode
)

// Remedy is one change.
type Remedy struct {
	Kind       RemedyKind
	Node       string
	Key, Value string
	Amount     int64
	Taint      *portolanv1.Taint
	// Message is the change in words.
	Message string
}

// Misfit is a bound replica that no longer has its place.
type Misfit struct {
	Replica, Node string
	Code          Code
	Message       string
}

// Move is a proposal of the rebalancer.
type Move struct {
	Replica, From, To string
	// GainPercent of the pool's score, which runs from 0 to 100.
	GainPercent int
	Message     string
}

// Admission is what a node's labels, taints and mode say to replicas of a
// workload; capacity apart.
type Admission struct {
	// Begin: new ones may begin there. Stay: those that run may stay, until Until
	// unless that is zero.
	Begin, Stay bool
	Until       time.Time
	// Code is why not; 0 when Begin and Stay hold for ever.
	Code Code
}

// DefaultOverhead is what a replica's Envoy takes, beside the replica.
var DefaultOverhead = api.Resources{CPUMilli: 50, MemoryBytes: 50 << 20}

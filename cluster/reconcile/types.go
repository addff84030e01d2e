package reconcile

import (
	"cmp"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Key names a workload.
type Key struct{ Tenant, Workload string }

func (k Key) String() string { return k.Tenant + "/" + k.Workload }

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Workload, b.Workload))
}

// Input is everything that a decision follows from.
type Input struct {
	Now       time.Time
	Workloads map[Key]Workload
	// Nodes by ID, and allocations by ID.
	Nodes       map[string]Node
	Allocations map[string]*clusterv1.Allocation
	// Modified is the generation at which each allocation changed last.
	Modified map[string]int64
	// Volumes by ID.
	Volumes map[string]*clusterv1.Volume
	// States is what the cluster decided by itself, with the newest Scale in it.
	States map[Key]*clusterv1.WorkloadState
	// Admit says whether replicas may begin or stay on a node by its labels and
	// taints; where a taint is tolerated only for a time they may stay, or what is
	// made for those that leave would come back. Capacity, the node's mode, and
	// whether that time is over are apart.
	Admit func(*clusterv1.Node, *portolanv1.WorkloadSpec) Admission
	// Moves are proposals: what no longer fits its node, and the rebalancer's. They
	// are done as far as budgets allow.
	Moves []Move
	// Rebalance bounds the rebalancer's; absent: none.
	Rebalance *portolanv1.Rebalance
	// Pending holds the scheduler's refusals, by workload. Where there are any,
	// nothing waits for a replacement that finds no node.
	Pending map[Key][]*portolanv1.Reason

	faults faults
}

// Workload is what the federation wants of one.
type Workload struct {
	Intent *linkv1.WorkloadIntent
	// Revision is the federation's, Committed when it came to this cluster.
	Revision  int64
	Committed time.Time
}

// Node is one machine and what it reported.
type Node struct {
	Record *clusterv1.Node
	// Observed says that Allocations is complete, as of a session of this process.
	Observed bool
	// Applied is the generation that the node has taken over.
	Applied     int64
	Allocations map[string]*nodev1.AllocationStatus
}

func (n Node) lost() bool { return n.Record.GetLostTime() != nil }

// Move proposes that a replica leaves its node.
type Move struct {
	Allocation string
	// Node that it should go to; empty when any will do.
	Node string
	// Code is Rebalance for a gain, and the scheduler's for what no longer fits.
	Code, Reason string
}

// Admission is what a node allows.
type Admission int

// The admissions, from least to most.
const (
	Refused  Admission = iota // replicas must leave
	Stay                      // replicas may stay, not begin
	Admitted                  // replicas may begin
)

// Kind of a step.
type Kind int

// The kinds of steps.
const (
	// Create one replica of a revision; the scheduler finds the node.
	Create Kind = iota
	// Stop marks an allocation for an orderly stop.
	Stop
	// Remove deletes the record of an allocation that is gone.
	Remove
	// Finish keeps the end of a job's replica in its record.
	Finish
	// Renew writes the placement's newer epoch to an allocation.
	Renew
	// Update gives an allocation the name and spec of a revision that it can take
	// over without a restart.
	Update
	// PutState writes what the cluster decided by itself about a workload.
	PutState
	// DeleteState deletes it: the workload is gone.
	DeleteState
	// PutVolume writes a volume's record: it is to be deleted by its node. The first
	// one of a replica is made with its first bind, by who knows the node.
	PutVolume
	// DeleteVolume deletes the record of a volume whose node is gone for good.
	DeleteVolume
)

var kindNames = [...]string{"create", "stop", "remove", "finish", "renew", "update", "put-state", "delete-state", "put-volume", "delete-volume"}

func (k Kind) String() string { return kindNames[k] }

// Reason codes of steps.
const (
	ScaleUp          = "ScaleUp"
	NewRevision      = "NewRevision"
	NodeLost         = "NodeLost"
	NodeEligible     = "NodeEligible"
	JobReplica       = "JobReplica"
	JobRetry         = "JobRetry"
	StartInOrder     = "StartInOrder"
	ScaleDown        = "ScaleDown"
	RevisionReplaced = "RevisionReplaced"
	WorkloadRemoved  = "WorkloadRemoved"
	Surplus          = "SurplusAfterNodeReturned"
	NodeRefuses      = "NodeRefuses"
	NodeDraining     = "NodeDraining"
	DrainDeadline    = "DrainDeadline"
	StayOver         = "StayOver"
	Rebalance        = "Rebalance"
	Moved            = "Moved"
	Displaced        = "Displaced"
	JobComplete      = "JobComplete"
	JobFailed        = "JobFailed"
	HistoryLimit     = "HistoryLimit"
	Expired          = "Expired"
	RunBegan         = "RunBegan"
	RunMissed        = "RunMissed"
	RunSkipped       = "RunSkipped"
	RunReplaced      = "RunReplaced"
	FirstSeen        = "FirstSeen"
	Disrupted        = "Disrupted"
	StopConfirmed    = "StopConfirmed"
	NodeGone         = "NodeGone"
	ReplicaFinished  = "ReplicaFinished"
	NewerEpoch       = "NewerEpoch"
	NoRestartNeeded  = "NoRestartNeeded"
)

// Step is one thing to do, and why.
type Step struct {
	Kind   Kind
	Key    Key
	Code   string
	Reason string
	// Allocation that it concerns; for Create the one that is replaced, if any.
	Allocation string
	// Of Stop: on purpose and beside updates. Of Create: the replaced one is meant to
	// leave. Its record must keep it (Allocation.disrupted), or nobody would know which
	// of the two is too many, or that a run of a cron workload is to go on.
	Disrupt bool
	// Of Create and Update: what to create. Node is set when only that one will do,
	// Name when the replica must have this ID.
	Workload Workload
	Revision *linkv1.RevisionIntent
	Index    int32
	Run      int64
	Node     string
	Name     string
	// Of Finish.
	Final *nodev1.AllocationStatus
	// Of PutState, PutVolume and DeleteVolume: the whole record.
	State  *clusterv1.WorkloadState
	Volume *clusterv1.Volume
}

// Note is a fact with a stable code and a sentence.
type Note struct{ Code, Message string }

// Codes of notes.
const (
	// Of Halted.
	NoProgress      = "NoProgress"
	FailingChecks   = "FailingChecks"
	StaleIntent     = "StaleIntent"
	InvalidSchedule = "InvalidSchedule"
	// Of Waiting.
	VolumeNodeLost  = "VolumeNodeLost"
	VolumeNodeGone  = "VolumeNodeGone"
	ReplicaNodeLost = "ReplicaNodeLost"
	VolumeLeaving   = "EarlierVolumeLeaving"
	ZoneDark        = "ZoneDark"
	// Of Draining.
	Leaving          = "Leaving"
	BudgetExhausted  = "BudgetExhausted"
	BudgetPerHour    = "BudgetPerHour"
	BudgetWindow     = "OutsideBudgetWindows"
	BudgetInvalid    = "BudgetInvalid"
	ReplacementFirst = "ReplacementFirst"
)

// Plan is what to do now.
type Plan struct {
	Steps []Step
	// Next is when time alone changes the answer; zero when it does not.
	Next time.Time
	// Halted workloads do not progress, and why. The message names the revision.
	Halted map[Key]Note
	// Waiting workloads have replicas that nothing is done about for now, and why.
	Waiting map[Key]Note
	// Draining workloads have replicas that are to leave their nodes, and what they
	// wait for.
	Draining map[Key]Note
	// Allowances is how many replicas of each workload may still be displaced now.
	// What is not in it may not be.
	Allowances map[Key]int
	// Held says why nothing is done at all; empty when something may be.
	Held string
}

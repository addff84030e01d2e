// Package state is the port of a cluster's own state: last-good intents, nodes
// and allocations, durable; what nodes observe, in memory. Everything is read
// from immutable snapshots. The implementations are etcd (embedded or remote)
// and mem, in the sub-packages of those names; statetest is the suite that both
// pass.
//
// Concurrency: safe for concurrent use. A Snapshot and all that it holds is
// never changed after it was handed out; readers must not change it either.
package state

import (
	"context"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Snapshot is everything at one generation.
type Snapshot struct {
	// Generation grows with every change, observed ones included.
	Generation int64
	// IntentRevision is the watermark of the newest committed intents, 0 before
	// the first. Intents are by resource name.
	IntentRevision int64
	Intents        map[string]*linkv1.Intent
	// IntentTimes says for each intent when its present content was committed.
	IntentTimes map[string]time.Time
	// Degraded says why boot fell back to an older generation of intents; empty
	// when it did not, and again after the next commit of intents.
	Degraded    string
	Nodes       map[string]*clusterv1.Node
	Allocations map[string]*clusterv1.Allocation
	// Modified is the generation at which each allocation changed last.
	Modified map[string]int64
	// Volumes by ID, and States of workloads by "tenant/workload".
	Volumes map[string]*clusterv1.Volume
	States  map[string]*clusterv1.WorkloadState
	// Settled is the IntentRevision that the manager has fully looked past: all
	// that follows from it is in Allocations. Written by manager.
	Settled int64
	// NodeStatus is what each node reported, in memory.
	NodeStatus map[string]*NodeStatus
	// Pending says for replicas that found no node why, by workload key
	// "tenant/workload". Written by manager, in memory. Count is over nodes.
	Pending map[string][]PendingReason
	// Notes are what else the manager knows, in memory.
	Notes Notes
}

// Notes are the manager's findings that are nobody's record. Written by manager,
// read by dispatch and link.
type Notes struct {
	// Wishes say of which pools there should be more or fewer nodes.
	Wishes map[string]PoolWish
	// Blocked says of a node that is drained what still runs there, and why.
	Blocked map[string][]Blocked
	// Waiting says of workloads, by "tenant/workload", why nothing is done for now
	// about replicas that are missing.
	Waiting map[string]Blocked
	// Requests say of workloads, by "tenant/workload", what their replicas should
	// request. The messages are never changed.
	Requests map[string]*portolanv1.RequestAdvice
	// Scaling says of workloads that scale by themselves, by "tenant/workload", what
	// the last look at them came to. The messages are never changed.
	Scaling map[string]*portolanv1.ScaleVerdict
}

// PoolWish is how many nodes more (or fewer) a pool should have, and why.
type PoolWish struct {
	Nodes  int32
	Reason string
	// Going are the nodes that should go, when there should be fewer.
	Going []string
	// HourMicros is what that costs, or saves, negative.
	HourMicros int64
}

// Equal compares all of it.
func (w PoolWish) Equal(o PoolWish) bool {
	return w.Nodes == o.Nodes && w.Reason == o.Reason && w.HourMicros == o.HourMicros && slices.Equal(w.Going, o.Going)
}

// Blocked counts replicas that have not left a node, by reason.
type Blocked struct {
	Code, Message string
	Count         int
}

// PendingReason is a rolled-up refusal of the scheduler.
type PendingReason struct {
	// Replica is the revision that lacks replicas: they have no names before they
	// are bound. A code stands once per revision.
	Replica string
	Code    string
	Message string
	Count   int
	// Of the first reason of a revision: the node that comes nearest, what keeps from
	// it, and the smallest changes that would make it fit, each enough by itself.
	Nearest       string
	NearestReason string
	Remedies      []Remedy
}

// Remedy is a change that would make a replica fit.
type Remedy struct{ Code, Message string }

// Equal compares all of it.
func (p PendingReason) Equal(o PendingReason) bool {
	return p.Replica == o.Replica && p.Code == o.Code && p.Message == o.Message && p.Count == o.Count &&
		p.Nearest == o.Nearest && p.NearestReason == o.NearestReason && slices.Equal(p.Remedies, o.Remedies)
}

// NodeStatus is the observed side of a node.
type NodeStatus struct {
	Connected bool
	// LastSeen is when its last report or session sign of life came.
	LastSeen time.Time
	Session  int64
	Facts    *nodev1.NodeFacts
	// Applied by the agent and all its proxies.
	Applied     *nodev1.Watermark
	Allocations map[string]*nodev1.AllocationStatus
	Proxies     map[string]*nodev1.ProxyStatus
	// RemovedVolumes were told to go and are gone from the node.
	RemovedVolumes map[string]bool
}

// Store is the port.
type Store interface {
	Snapshot() *Snapshot
	// Wait blocks until the generation is greater than after.
	Wait(ctx context.Context, after int64) error
	// CommitIntents makes intents the newest last-good generation; at least five
	// are kept. An older revision than the newest is api.Conflict. Written by link.
	CommitIntents(ctx context.Context, revision int64, intents map[string]*linkv1.Intent, now time.Time) error
	// Commit writes the manager's change.
	Commit(ctx context.Context, c Change) error
	// Observe replaces what is known of a node's observed side; an older session
	// than the one seen is api.Conflict, a node that was not registered is
	// api.NotFound. Allocations must be complete: dispatch calls it first when the
	// session's full report is in, because a stopped allocation that is absent is
	// believed to be gone. s may not be changed afterwards. An observation that
	// says nothing new but LastSeen and the usage of replicas leaves the generation alone, unless the node is
	// marked as lost. Written by dispatch.
	Observe(node string, s *NodeStatus) error
	// SetPending replaces Pending. Written by manager.
	SetPending(map[string][]PendingReason)
	// SetNotes replaces Notes. Notes that differ in Scaling at most leave the
	// generation alone. Written by manager.
	SetNotes(Notes)

	// PutToken, Token and Tokens keep join tokens. Written by dispatch.
	PutToken(ctx context.Context, hash string, t *clusterv1.NodeToken) error
	Token(ctx context.Context, hash string) (*clusterv1.NodeToken, error)
	// LoadBlob and SaveBlob keep sealed bytes under a key, for identity/ca.
	// LoadBlob of an absent key is api.NotFound. SaveBlob with create fails with
	// api.Exists when present.
	LoadBlob(ctx context.Context, key string) ([]byte, error)
	SaveBlob(ctx context.Context, key string, data []byte, create bool) error

	Ping(ctx context.Context) error
	Close() error
}

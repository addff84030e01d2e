package state

import (
	"iter"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// Change is what the manager writes at once. A reader may see the part of it
// that concerns one node before the rest; Settled comes last. What is durable is
// visible, and the other way round.
type Change struct {
	// Base is the generation of the snapshot it was decided on; fails with
	// api.Conflict when a record that it touches changed since.
	Base              int64
	PutAllocations    []*clusterv1.Allocation
	DeleteAllocations []string
	PutNodes          []*clusterv1.Node
	DeleteNodes       []string
	PutVolumes        []*clusterv1.Volume
	DeleteVolumes     []string
	// States are by StateKey, "tenant/workload".
	PutStates    []*clusterv1.WorkloadState
	DeleteStates []string
	// Settled, when > 0, becomes Snapshot.Settled with the same generation.
	Settled int64
}

// Empty says that it touches no record.
func (c Change) Empty() bool {
	return len(c.PutAllocations)+len(c.DeleteAllocations)+len(c.PutNodes)+len(c.DeleteNodes)+
		len(c.PutVolumes)+len(c.DeleteVolumes)+len(c.PutStates)+len(c.DeleteStates) == 0
}

// StateKey is the key of a workload's state, "tenant/workload".
func StateKey(w *clusterv1.WorkloadState) string { return w.GetTenant() + "/" + w.GetWorkload() }

// recordKind is a kind of records that the manager writes.
type recordKind string

const (
	kindAllocation recordKind = "allocation"
	kindNode       recordKind = "node"
	kindVolume     recordKind = "volume"
	kindState      recordKind = "state of workload"
)

// recordKey names one record.
type recordKey struct {
	kind recordKind
	id   string
}

// touched gives the records that a change writes or deletes.
func (c Change) touched() iter.Seq[recordKey] {
	return func(yield func(recordKey) bool) {
		_ = keysOf(yield, kindAllocation, c.PutAllocations, (*clusterv1.Allocation).GetAllocation, c.DeleteAllocations) &&
			keysOf(yield, kindNode, c.PutNodes, (*clusterv1.Node).GetNode, c.DeleteNodes) &&
			keysOf(yield, kindVolume, c.PutVolumes, (*clusterv1.Volume).GetVolume, c.DeleteVolumes) &&
			keysOf(yield, kindState, c.PutStates, StateKey, c.DeleteStates)
	}
}

// keysOf yields the keys of one kind; false when no more are wanted.
func keysOf[M any](yield func(recordKey) bool, kind recordKind, put []M, id func(M) string, del []string) bool {
	for _, m := range put {
		if !yield(recordKey{kind, id(m)}) {
			return false
		}
	}
	for _, d := range del {
		if !yield(recordKey{kind, d}) {
			return false
		}
	}
	return true
}

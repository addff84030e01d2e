// Package store is the port of the federation's state: records in one total
// order of revisions, with snapshots, transactions and watches. Implementations
// are the sub-packages mem and cockroach (which speaks to CockroachDB and to
// PostgreSQL); storetest is the suite that both pass. Written through by
// federation/server, control and fleet, each its own kinds.
//
// Concurrency: every method is safe for concurrent use. Closures given to View
// and Update may run more than once and must have no outside effects.
package store

import (
	"context"
	"errors"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"
)

// Kind names a class of records: the short name of the proto message that they
// hold, "Workload", "PlacementStatusRecord".
type Kind string

// Kinds lists every kind with its message, in the order in which a snapshot
// sends them (what is referenced comes first).
var Kinds = kinds()

// Record is one stored object. Message is never nil and must not be changed by
// its reader.
type Record struct {
	Kind   Kind
	Name   string
	Tenant string // ID; empty for the fleet's own
	// Revision of the transaction that wrote it last.
	Revision int64
	Message  proto.Message
}

// Reader reads one snapshot.
type Reader interface {
	// Revision of the snapshot; in an Update the revision it will commit at.
	Revision() int64
	// Get gives one record, or an error of kind api.NotFound.
	Get(kind Kind, name string) (Record, error)
	// GetAll gives the records of those names that exist, by name, in one round trip
	// however many there are.
	GetAll(kind Kind, names []string) (map[string]Record, error)
	// List gives records in order of name.
	List(kind Kind, opts ListOptions) iter.Seq2[Record, error]
}

// ListOptions narrow a List. The zero value lists the kind.
type ListOptions struct {
	Tenant  string   // only this tenant's
	Tenants []string // only these tenants'; nil is no restriction
	Prefix  string   // names beginning with it
	After   string   // names greater than it
	Limit   int      // at most, when > 0
}

// Tx is the write side of one Update.
type Tx interface {
	Reader
	// Put stores the message under its kind and name and appends to the change
	// log. Messages with a revision field get the transaction's.
	Put(kind Kind, name string, m proto.Message) error
	// Delete removes the record and appends a tombstone; api.NotFound if absent.
	Delete(kind Kind, name string) error
	// CheckLease fails with api.Conflict unless the lease is held at that epoch.
	CheckLease(name string, epoch int64) error
}

// Change is one entry of the log. A deletion carries the last message.
type Change struct {
	Deleted bool
	Record  Record
}

// Batch is what a Watcher gives: all changes with revisions in (previous
// batch's Revision, Revision], in order.
type Batch struct {
	Revision int64
	Changes  []Change
}

// WatchFilter narrows a watch; revisions advance all the same.
type WatchFilter struct {
	Kinds   []Kind
	Tenants []string // nil is no restriction; records of the fleet have tenant ""
}

// Watcher follows the log.
type Watcher interface {
	// Next blocks for the next batch, which may hold no changes (a bookmark).
	// An error of kind api.Compacted means: start again from a snapshot.
	Next(ctx context.Context) (Batch, error)
	Close()
}

// Lease is the state of a lease row.
type Lease struct {
	Name    string
	Holder  string
	Epoch   int64
	Expires time.Time
	// Progress is a number that the holder stores with its renewals: the
	// revision up to which its loop has looked. It makes no revision of its own.
	Progress int64
	// Held says whether the asking holder has it.
	Held bool
}

// Store is the port.
type Store interface {
	// View runs fn on a consistent snapshot and returns its revision.
	View(ctx context.Context, fn func(Reader) error) (int64, error)
	// Update runs fn in a serializable transaction and returns the revision at
	// which it committed. When fn returns an error nothing is stored and that
	// error comes back (errors.Is and errors.As work). A transaction that wrote
	// nothing returns the snapshot's revision.
	Update(ctx context.Context, fn func(Tx) error) (int64, error)
	// Watch follows changes after revision from (exclusive).
	Watch(ctx context.Context, from int64, filter WatchFilter) (Watcher, error)
	// Acquire takes or renews the lease for ttl and stores progress. When another
	// holds it, Held is false and the present state comes back. The epoch grows
	// with every change of holder.
	Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (Lease, error)
	// Release gives a held lease up, so that another need not wait.
	Release(ctx context.Context, name, holder string) error
	// Leases lists all lease rows.
	Leases(ctx context.Context) ([]Lease, error)
	// Ping says whether the store answers.
	Ping(ctx context.Context) error
	Close() error
}

// ErrOutcomeUnknown marks an Update whose commit was cut off: it may have been
// stored or not. Only an update that may safely run again is tried again.
var ErrOutcomeUnknown = errors.New("the outcome of the commit is unknown")

package store

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api"
)

// tenantNamed are the kinds whose names all begin with "tenants/{t}/", so that a
// tenant's records are a range.
var tenantNamed = map[Kind]bool{Workload: true, Revision: true, Service: true, Route: true, Placement: true, PlacementStatus: true}

var infos = func() map[Kind]KindInfo {
	m := make(map[Kind]KindInfo, len(Kinds))
	for _, k := range Kinds {
		m[k.Kind] = k
	}
	return m
}()

// Info looks a kind up.
func Info(kind Kind) (KindInfo, bool) {
	i, ok := infos[kind]
	return i, ok
}

// NewRecord makes the record that a Put at a revision stores: a copy of the
// message with its revision set, and the tenant that owns it. A NackRecord keeps
// its own revision, which names the refused version. Used by implementations.
func NewRecord(kind Kind, name string, m proto.Message, revision int64) (Record, error) {
	doing := "put " + string(kind) + " " + name
	info, ok := infos[kind]
	if !ok || name == "" {
		return Record{}, api.E(api.Internal, doing, "unknown kind or empty name")
	}
	if m == nil || m.ProtoReflect().Descriptor() != info.New().ProtoReflect().Descriptor() {
		return Record{}, api.E(api.Internal, doing, "a record of this kind holds a %T", info.New())
	}
	c := proto.Clone(m)
	Stamp(kind, c, revision)
	return Record{Kind: kind, Name: name, Tenant: tenantOf(name, c), Revision: revision, Message: c}, nil
}

// Stamp sets the revision field of a message that has one. Used by
// implementations, on messages that they own.
func Stamp(kind Kind, m proto.Message, revision int64) {
	if kind == Nack {
		return
	}
	r := m.ProtoReflect()
	f := r.Descriptor().Fields().ByName("revision")
	if f != nil && f.Kind() == protoreflect.Int64Kind && !f.IsList() {
		r.Set(f, protoreflect.ValueOfInt64(revision))
	}
}

// tenantOf is the tenant in the name, or else the one in the message.
func tenantOf(name string, m proto.Message) string {
	if t := api.TenantOf(name); t != "" {
		return t
	}
	if h, ok := m.(interface{ GetTenant() string }); ok {
		return h.GetTenant()
	}
	return ""
}

// Pending collects the writes of one Update, so that each record shows once in
// the log, with its last state. Used by implementations.
type Pending struct {
	order []pendingKey
	ops   map[pendingKey]pendingOp
}

type pendingKey struct {
	kind Kind
	name string
}

type pendingOp struct {
	change Change
	void   bool // deleted, and not there before the transaction
	at     int  // place in order; of several only the last counts
}

// Put notes a write.
func (p *Pending) Put(r Record) { p.note(Change{Record: r}, false) }

// Delete notes a deletion of r; before says whether it was there before the
// transaction.
func (p *Pending) Delete(r Record, before bool) {
	p.note(Change{Deleted: true, Record: r}, !before)
}

func (p *Pending) note(c Change, void bool) {
	if p.ops == nil {
		p.ops = map[pendingKey]pendingOp{}
	}
	k := pendingKey{c.Record.Kind, c.Record.Name}
	p.ops[k] = pendingOp{change: c, void: void, at: len(p.order)}
	p.order = append(p.order, k)
}

// Changes gives what is left to store, in order. A record that was made and
// deleted in the same transaction is not in it.
func (p *Pending) Changes() []Change {
	var out []Change
	for i, k := range p.order {
		op := p.ops[k]
		if op.at != i || op.void {
			continue
		}
		out = append(out, op.change)
	}
	return out
}

// ContextError is the error of a context that ended, with its kind. Used by
// implementations.
func ContextError(doing string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return api.E(api.Timeout, doing, "%w", err)
	}
	return api.E(api.Canceled, doing, "%w", err)
}

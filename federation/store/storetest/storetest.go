// Package storetest is the suite that every implementation of the federation's
// store passes. It owns no store; it makes its own records in the empty ones it
// is given. It tests promises of the port only, so it reaches into no
// implementation.
package storetest

import (
	"context"
	"strconv"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// Replicas opens one more replica of the same store; a store in memory gives
// itself again. The opener closes what it opened at the end of the test.
type Replicas func() store.Store

// Compactor is what a store offers to shorten its change log.
type Compactor interface {
	Compact(ctx context.Context, floor int64) error
}

// timeout of one test; nothing waits for so long when all is well.
const timeout = 60 * time.Second

// Run runs the suite; fresh makes an empty store for each test.
func Run(t *testing.T, fresh func(t testing.TB) Replicas) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, *kit)
	}{
		{"Records", testRecords},
		{"Messages", testMessages},
		{"GetAll", testGetAll},
		{"List", testList},
		{"ListPages", testListPages},
		{"Revisions", testRevisions},
		{"ReadYourWrites", testReadYourWrites},
		{"Errors", testErrors},
		{"Contexts", testContexts},
		{"Snapshots", testSnapshots},
		{"LostUpdates", testLostUpdates},
		{"WriteSkew", testWriteSkew},
		{"ErrorsInAGroup", testErrorsInAGroup},
		{"IdempotentRequests", testIdempotentRequests},
		{"WatchOrder", testWatchOrder},
		{"WatchFromAnywhere", testWatchFromAnywhere},
		{"WatchFilter", testWatchFilter},
		{"WatchTombstones", testWatchTombstones},
		{"Compaction", testCompaction},
		{"Leases", testLeases},
		{"LeaseFences", testLeaseFences},
		{"LeaseHolders", testLeaseHolders},
		{"Close", testClose},
		{"Mirror", testMirror},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			t.Cleanup(cancel)
			open := fresh(t)
			c.run(t, &kit{t: t, ctx: ctx, open: open, s: open()})
		})
	}
}

// kit is what the tests say often.
type kit struct {
	t    *testing.T
	ctx  context.Context //nolint:containedctx // the test's
	open Replicas
	s    store.Store
}

// tenant makes a record with a text in it.
func tenant(id, text string) *portolanv1.Tenant {
	return &portolanv1.Tenant{Name: api.TenantName(id), Spec: &portolanv1.TenantSpec{DisplayName: text}}
}

func service(t, id string) *portolanv1.Service {
	return &portolanv1.Service{Name: api.ServiceName(t, id)}
}

func put(tx store.Tx, id, text string) error {
	return tx.Put(store.Tenant, api.TenantName(id), tenant(id, text))
}

// text reads such a record; "" when it is absent.
func text(r store.Reader, id string) (string, error) {
	rec, err := r.Get(store.Tenant, api.TenantName(id))
	if api.KindOf(err) == api.NotFound {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return rec.Message.(*portolanv1.Tenant).GetSpec().GetDisplayName(), nil
}

func number(r store.Reader, id string) (int, error) {
	s, err := text(r, id)
	if err != nil || s == "" {
		return 0, err
	}
	return strconv.Atoi(s)
}

func (k *kit) update(fn func(store.Tx) error) int64 {
	k.t.Helper()
	rev, err := k.s.Update(k.ctx, fn)
	if err != nil {
		k.t.Fatalf("update: %v", err)
	}
	return rev
}

func (k *kit) view(fn func(store.Reader) error) int64 {
	k.t.Helper()
	rev, err := k.s.View(k.ctx, fn)
	if err != nil {
		k.t.Fatalf("view: %v", err)
	}
	return rev
}

func (k *kit) text(id string) string {
	k.t.Helper()
	var s string
	k.view(func(r store.Reader) (err error) {
		s, err = text(r, id)
		return err
	})
	return s
}

// names lists a kind.
func (k *kit) names(r interface {
	List(store.Kind, store.ListOptions) iterSeq
}, kind store.Kind, opts store.ListOptions,
) []string {
	k.t.Helper()
	var out []string
	for rec, err := range r.List(kind, opts) {
		if err != nil {
			k.t.Fatalf("list %s: %v", kind, err)
		}
		out = append(out, rec.Name)
	}
	return out
}

// snapshot gives all records of some kinds by kind and name.
func (k *kit) snapshot(kinds ...store.Kind) (int64, map[string]proto.Message) {
	k.t.Helper()
	var out map[string]proto.Message
	rev := k.view(func(r store.Reader) error {
		out = map[string]proto.Message{}
		for _, kind := range kinds {
			for rec, err := range r.List(kind, store.ListOptions{}) {
				if err != nil {
					return err
				}
				out[string(kind)+" "+rec.Name] = rec.Message
			}
		}
		return nil
	})
	return rev, out
}

func wantKind(t *testing.T, what string, err error, kind api.Kind) {
	t.Helper()
	if err == nil || api.KindOf(err) != kind {
		t.Errorf("%s: error %v, want one of kind %v", what, err, kind.Code())
	}
}

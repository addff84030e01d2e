package storetest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

type iterSeq = iter.Seq2[store.Record, error]

func testRecords(t *testing.T, k *kit) {
	k.view(func(r store.Reader) error {
		_, err := r.Get(store.Tenant, "tenants/a")
		wantKind(t, "get what is absent", err, api.NotFound)
		return nil
	})
	rev := k.update(func(tx store.Tx) error { return put(tx, "a", "one") })
	k.view(func(r store.Reader) error {
		rec, err := r.Get(store.Tenant, "tenants/a")
		if err != nil {
			return err
		}
		want := store.Record{Kind: store.Tenant, Name: "tenants/a", Tenant: "a", Revision: rev}
		if got := rec; got.Kind != want.Kind || got.Name != want.Name || got.Tenant != want.Tenant || got.Revision != want.Revision {
			t.Errorf("got %+v, want %+v", got, want)
		}
		return nil
	})
	next := k.update(func(tx store.Tx) error { return put(tx, "a", "two") })
	if got := k.text("a"); got != "two" || next <= rev {
		t.Errorf("after a second put: %q at %d after %d", got, next, rev)
	}
	k.update(func(tx store.Tx) error { return tx.Delete(store.Tenant, "tenants/a") })
	if got := k.text("a"); got != "" {
		t.Errorf("deleted record still reads %q", got)
	}
	_, err := k.s.Update(k.ctx, func(tx store.Tx) error { return tx.Delete(store.Tenant, "tenants/a") })
	wantKind(t, "delete what is absent", err, api.NotFound)
	_, err = k.s.Update(k.ctx, func(tx store.Tx) error { return tx.Put(store.Tenant, "tenants/a", service("a", "b")) })
	wantKind(t, "put a message of another kind", err, api.Internal)
	_, err = k.s.Update(k.ctx, func(tx store.Tx) error { return tx.Put("Nonsense", "tenants/a", service("a", "b")) })
	wantKind(t, "put an unknown kind", err, api.Internal)
}

// testGetAll: it gives what Get gives, in a view and over what an update wrote, read
// and deleted.
func testGetAll(t *testing.T, k *kit) {
	all := func(r store.Reader, ids ...string) map[string]string {
		names := make([]string, 0, len(ids))
		for _, id := range ids {
			names = append(names, "tenants/"+id)
		}
		got, err := r.GetAll(store.Tenant, names)
		if err != nil {
			t.Error(err)
		}
		out := map[string]string{}
		for name, rec := range got {
			if one, err := r.Get(store.Tenant, name); err != nil || rec.Name != name || one.Revision != rec.Revision || one.Tenant != rec.Tenant {
				t.Errorf("%s: all gives %+v, one %+v, %v", name, rec, one, err)
			}
			out[strings.TrimPrefix(name, "tenants/")] = rec.Message.(*portolanv1.Tenant).GetSpec().GetDisplayName()
		}
		return out
	}
	check := func(when string, got, want map[string]string) {
		if !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
	}
	k.update(func(tx store.Tx) error { return errors.Join(put(tx, "a", "1"), put(tx, "b", "2"), put(tx, "c", "3")) })
	k.view(func(r store.Reader) error {
		check("none asked for", all(r), map[string]string{})
		check("none there", all(r, "x", "y"), map[string]string{})
		check("some there, one twice", all(r, "a", "x", "c", "a"), map[string]string{"a": "1", "c": "3"})
		return nil
	})
	k.update(func(tx store.Tx) error {
		_, _ = tx.Get(store.Tenant, "tenants/x") // known to be absent
		if err := errors.Join(put(tx, "a", "new"), tx.Delete(store.Tenant, "tenants/b"), put(tx, "d", "new")); err != nil {
			return err
		}
		want := map[string]string{"a": "new", "c": "3", "d": "new"}
		check("in an update", all(tx, "a", "b", "c", "d", "x"), want)
		check("in an update, again", all(tx, "d", "c", "b", "a"), want)
		return nil
	})
}

// testMessages: what is stored is a copy, with its revision, and of its tenant.
func testMessages(t *testing.T, k *kit) {
	mine := tenant("a", "before")
	rev := k.update(func(tx store.Tx) error {
		if err := tx.Put(store.Tenant, mine.GetName(), mine); err != nil {
			return err
		}
		for _, err := range []error{
			tx.Put(store.Nack, "x@c", &storev1.NackRecord{Revision: 7}),
			tx.Put(store.AuditEntry, "auditEntries/1", &portolanv1.AuditEntry{Tenant: "b"}),
			tx.Put(store.ServiceExport, "c/a/s", &linkv1.ServiceExport{Tenant: "a"}),
			tx.Put(store.JoinToken, "ff", &storev1.JoinToken{}),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	mine.Spec.DisplayName = "after"
	if mine.GetRevision() != 0 {
		t.Errorf("the caller's message was written to: %v", mine)
	}
	k.view(func(r store.Reader) error {
		rec, err := r.Get(store.Tenant, "tenants/a")
		if err != nil {
			return err
		}
		if m := rec.Message.(*portolanv1.Tenant); m.GetSpec().GetDisplayName() != "before" || m.GetRevision() != rev {
			t.Errorf("stored %v, want the text at the put, and revision %d", m, rev)
		}
		rec, err = r.Get(store.Nack, "x@c")
		if err != nil {
			return err
		}
		if m := rec.Message.(*storev1.NackRecord); m.GetRevision() != 7 || rec.Revision != rev {
			t.Errorf("a nack's own revision is %d at %d, want 7 at %d", m.GetRevision(), rec.Revision, rev)
		}
		for kind, want := range map[store.Kind]string{store.AuditEntry: "b", store.ServiceExport: "a", store.JoinToken: ""} {
			for rec, err := range r.List(kind, store.ListOptions{}) {
				if err != nil {
					return err
				}
				if rec.Tenant != want {
					t.Errorf("%s belongs to %q, want %q", kind, rec.Tenant, want)
				}
			}
		}
		return nil
	})
}

func testList(t *testing.T, k *kit) {
	k.update(func(tx store.Tx) error {
		for _, n := range []string{"b/z", "a/x", "a/y", "a-b/x", "c/x"} {
			tn, s, _ := strings.Cut(n, "/")
			if err := tx.Put(store.Service, api.ServiceName(tn, s), service(tn, s)); err != nil {
				return err
			}
		}
		// Order is that of bytes, whatever the database's collation says.
		for _, n := range []string{"Zz", "_x", "aa", "Ab", "ä", "z-", "z0"} {
			if err := tx.Put(store.RequestResult, n, &storev1.RequestResult{}); err != nil {
				return err
			}
		}
		return nil
	})
	ax, ay, abx, bz, cx := "tenants/a/services/x", "tenants/a/services/y", "tenants/a-b/services/x", "tenants/b/services/z", "tenants/c/services/x"
	for _, c := range []struct {
		opts store.ListOptions
		want []string
	}{
		{store.ListOptions{}, []string{abx, ax, ay, bz, cx}},
		{store.ListOptions{Tenant: "a"}, []string{ax, ay}},
		{store.ListOptions{Tenant: "none"}, nil},
		{store.ListOptions{Tenants: []string{"b", "c"}}, []string{bz, cx}},
		{store.ListOptions{Tenants: []string{}}, nil},
		{store.ListOptions{Tenant: "a", Tenants: []string{"b"}}, nil},
		{store.ListOptions{Prefix: "tenants/a/"}, []string{ax, ay}},
		{store.ListOptions{Prefix: "tenants/a"}, []string{abx, ax, ay}},
		{store.ListOptions{After: ax}, []string{ay, bz, cx}},
		{store.ListOptions{After: "tenants/b"}, []string{bz, cx}},
		{store.ListOptions{Tenant: "a", After: ax}, []string{ay}},
		{store.ListOptions{Tenant: "a", After: ay}, nil},
		{store.ListOptions{Limit: 2}, []string{abx, ax}},
		{store.ListOptions{After: abx, Limit: 1}, []string{ax}},
		{store.ListOptions{Prefix: "tenants/a/", After: ax, Limit: 5}, []string{ay}},
	} {
		k.view(func(r store.Reader) error {
			if got := k.names(r, store.Service, c.opts); !slices.Equal(got, c.want) {
				t.Errorf("list %+v: got %v, want %v", c.opts, got, c.want)
			}
			return nil
		})
	}
	k.view(func(r store.Reader) error {
		if got, want := k.names(r, store.RequestResult, store.ListOptions{}), []string{"Ab", "Zz", "_x", "aa", "z-", "z0", "ä"}; !slices.Equal(got, want) {
			t.Errorf("order %v, want %v", got, want)
		}
		return nil
	})
}

// testListPages: long lists come whole, also while the caller reads more, in
// views and over what an update wrote.
func testListPages(t *testing.T, k *kit) {
	const n = 1100
	name := func(i int) string { return fmt.Sprintf("tenants/t%04d", i) }
	k.update(func(tx store.Tx) error {
		for i := range n {
			if i%2 == 0 {
				if err := tx.Put(store.Tenant, name(i), tenant("x", "")); err != nil {
					return err
				}
			}
		}
		return nil
	})
	k.view(func(r store.Reader) error {
		count := 0
		for rec, err := range r.List(store.Tenant, store.ListOptions{}) {
			if err != nil {
				return err
			}
			if rec.Name != name(2*count) {
				t.Fatalf("place %d holds %s", count, rec.Name)
			}
			if _, err := r.Get(store.Tenant, rec.Name); err != nil {
				return err
			}
			count++
		}
		if count != n/2 {
			t.Errorf("listed %d, want %d", count, n/2)
		}
		return nil
	})
	k.update(func(tx store.Tx) error {
		var want []string
		for i := range n {
			var err error
			switch {
			case i%2 == 1:
				err = tx.Put(store.Tenant, name(i), tenant("x", ""))
			case i%3 == 0:
				err = tx.Delete(store.Tenant, name(i))
			}
			if err != nil {
				return err
			}
			if i%2 == 1 || i%3 != 0 {
				want = append(want, name(i))
			}
		}
		if got := k.names(tx, store.Tenant, store.ListOptions{}); !slices.Equal(got, want) {
			t.Errorf("over its own writes an update lists %d, want %d: %s", len(got), len(want), cmp.Diff(got, want))
		}
		for _, limit := range []int{1, 7, 300} {
			if got := k.names(tx, store.Tenant, store.ListOptions{After: name(2), Limit: limit}); !slices.Equal(got, want[2:2+limit]) {
				t.Errorf("limit %d: %s", limit, cmp.Diff(got, want[2:2+limit]))
			}
		}
		// Deleting while walking is how ranges are emptied.
		for rec, err := range tx.List(store.Tenant, store.ListOptions{}) {
			if err != nil {
				return err
			}
			if err := tx.Delete(store.Tenant, rec.Name); err != nil {
				return err
			}
		}
		if got := k.names(tx, store.Tenant, store.ListOptions{}); len(got) != 0 {
			t.Errorf("%d left after deleting all", len(got))
		}
		return nil
	})
}

func testRevisions(t *testing.T, k *kit) {
	last := k.view(func(store.Reader) error { return nil })
	for i := range 5 {
		var during int64
		rev := k.update(func(tx store.Tx) error {
			during = tx.Revision()
			return put(tx, "a", fmt.Sprint(i))
		})
		if rev <= last || during != rev {
			t.Errorf("update %d: revision %d, inside %d, after %d", i, rev, during, last)
		}
		if seen := k.view(func(r store.Reader) error {
			if r.Revision() != rev {
				t.Errorf("a view's revision is %d after a commit at %d", r.Revision(), rev)
			}
			return nil
		}); seen != rev {
			t.Errorf("View returned %d after a commit at %d", seen, rev)
		}
		last = rev
	}
	if got := k.update(func(tx store.Tx) error { _, err := text(tx, "a"); return err }); got != last {
		t.Errorf("an update without writes returned %d, want the snapshot's %d", got, last)
	}
	if got := k.update(func(tx store.Tx) error {
		if err := put(tx, "fleeting", ""); err != nil {
			return err
		}
		return tx.Delete(store.Tenant, "tenants/fleeting")
	}); got != last {
		t.Errorf("making and deleting a record made revision %d after %d", got, last)
	}
}

func testReadYourWrites(t *testing.T, k *kit) {
	k.update(func(tx store.Tx) error { return errors.Join(put(tx, "a", "old"), put(tx, "b", "old")) })
	k.update(func(tx store.Tx) error {
		if err := errors.Join(put(tx, "a", "new"), tx.Delete(store.Tenant, "tenants/b"), put(tx, "c", "new")); err != nil {
			return err
		}
		for id, want := range map[string]string{"a": "new", "b": "", "c": "new"} {
			if got, err := text(tx, id); err != nil || got != want {
				t.Errorf("inside the update %s reads %q, %v, want %q", id, got, err, want)
			}
		}
		if got, want := k.names(tx, store.Tenant, store.ListOptions{}), []string{"tenants/a", "tenants/c"}; !slices.Equal(got, want) {
			t.Errorf("inside the update list gives %v, want %v", got, want)
		}
		rec, err := tx.Get(store.Tenant, "tenants/a")
		if err == nil && rec.Revision != tx.Revision() {
			t.Errorf("own write has revision %d, want %d", rec.Revision, tx.Revision())
		}
		return errors.Join(err, put(tx, "b", "again"))
	})
	if got := k.text("b"); got != "again" {
		t.Errorf("deleted and put again in one update: %q", got)
	}
	before := k.view(func(store.Reader) error { return nil })
	if rev := k.update(func(tx store.Tx) error {
		return errors.Join(put(tx, "b", "once more"), tx.Delete(store.Tenant, "tenants/b"))
	}); rev <= before || k.text("b") != "" {
		t.Errorf("put over a record and deleted in one update: %q at %d after %d", k.text("b"), rev, before)
	}
}

var errMine = errors.New("mine")

func testErrors(t *testing.T, k *kit) {
	before := k.update(func(tx store.Tx) error { return put(tx, "a", "kept") })
	_, err := k.s.Update(k.ctx, func(tx store.Tx) error {
		return errors.Join(put(tx, "a", "lost"), put(tx, "b", "lost"), fmt.Errorf("wrapped: %w", errMine))
	})
	if !errors.Is(err, errMine) {
		t.Errorf("the closure's error came back as %v", err)
	}
	_, err = k.s.Update(k.ctx, func(store.Tx) error { return api.E(api.Precondition, "test", "no") })
	wantKind(t, "a closure's kind", err, api.Precondition)
	_, err = k.s.View(k.ctx, func(store.Reader) error { return errMine })
	if !errors.Is(err, errMine) {
		t.Errorf("a view's error came back as %v", err)
	}
	if a, b := k.text("a"), k.text("b"); a != "kept" || b != "" {
		t.Errorf("a refused update left %q, %q", a, b)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a panic in a closure did not come back to its caller")
			}
		}()
		_, _ = k.s.Update(k.ctx, func(tx store.Tx) error {
			_ = put(tx, "a", "lost")
			panic("oh")
		})
	}()
	if got := k.update(func(tx store.Tx) error { return put(tx, "c", "") }); got != before+1 || k.text("a") != "kept" {
		t.Errorf("after refusals the next update is at %d, want %d", got, before+1)
	}
}

func testContexts(t *testing.T, k *kit) {
	ctx, cancel := context.WithCancel(k.ctx)
	cancel()
	_, err := k.s.Update(ctx, func(tx store.Tx) error { return put(tx, "a", "x") })
	wantKind(t, "update with an ended context", err, api.Canceled)
	_, err = k.s.View(ctx, func(store.Reader) error { return nil })
	wantKind(t, "view with an ended context", err, api.Canceled)
	w, err := k.s.Watch(k.ctx, 0, store.WatchFilter{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, err = w.Next(ctx)
	wantKind(t, "next with an ended context", err, api.Canceled)
	if err := k.s.Ping(k.ctx); err != nil {
		t.Errorf("ping: %v", err)
	}
	if got := k.text("a"); got != "" {
		t.Errorf("stored in spite of the context: %q", got)
	}
}

package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// replay applies a watch to what it began with, until a revision, and checks
// that it never goes back, repeats or reorders.
func (k *kit) replay(s store.Store, from, until int64, state map[string]proto.Message, filter store.WatchFilter) error {
	w, err := s.Watch(k.ctx, from, filter)
	if err != nil {
		return err
	}
	defer w.Close()
	for at := from; at < until; {
		b, err := w.Next(k.ctx)
		if err != nil {
			return fmt.Errorf("next after %d: %w", at, err)
		}
		if b.Revision <= at {
			return fmt.Errorf("batch %d after %d", b.Revision, at)
		}
		last := at
		touched := map[string]int64{}
		for _, c := range b.Changes {
			r := c.Record
			key := string(r.Kind) + " " + r.Name
			if r.Revision < last || r.Revision <= at || r.Revision > b.Revision || r.Message == nil {
				return fmt.Errorf("change of %s at %d after %d in batch (%d, %d]", key, r.Revision, last, at, b.Revision)
			}
			if touched[key] == r.Revision {
				return fmt.Errorf("%s changes twice at %d", key, r.Revision)
			}
			last, touched[key] = r.Revision, r.Revision
			if c.Deleted {
				if state[key] == nil {
					return fmt.Errorf("%s is deleted at %d and was not there", key, r.Revision)
				}
				delete(state, key)
			} else {
				state[key] = r.Message
			}
		}
		at = b.Revision
	}
	return nil
}

// churn writes and deletes records from many goroutines.
func (k *kit) churn() {
	k.crowd(func(s store.Store, i int) error {
		for j := range rounds {
			_, err := s.Update(k.ctx, func(tx store.Tx) error {
				id := fmt.Sprintf("t%d", (i*j)%11)
				has, err := text(tx, id)
				if err != nil {
					return err
				}
				if has != "" && j%3 == 0 {
					return tx.Delete(store.Tenant, api.TenantName(id))
				}
				return errors.Join(put(tx, id, strconv.Itoa(i*1000+j)), tx.Put(store.Service, api.ServiceName(id, "s"), service(id, "s")))
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// testWatchOrder: watchers of both replicas, running while there are writes, end
// with exactly what a snapshot shows.
func testWatchOrder(t *testing.T, k *kit) {
	const end = "tenants/the-end"
	other := k.open()
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	var g errgroup.Group
	states := make([]map[string]proto.Message, 4)
	for i := range states {
		states[i] = map[string]proto.Message{}
		s := []store.Store{k.s, other}[i%2]
		g.Go(func() error {
			w, err := s.Watch(ctx, 0, store.WatchFilter{})
			if err != nil {
				return err
			}
			defer w.Close()
			for at := int64(0); ; {
				b, err := w.Next(ctx)
				if err != nil {
					return err
				}
				if b.Revision <= at {
					return fmt.Errorf("batch %d after %d", b.Revision, at)
				}
				for _, c := range b.Changes {
					if c.Record.Revision <= at || c.Record.Revision > b.Revision {
						return fmt.Errorf("change at %d in batch (%d, %d]", c.Record.Revision, at, b.Revision)
					}
					key := string(c.Record.Kind) + " " + c.Record.Name
					if delete(states[i], key); !c.Deleted {
						states[i][key] = c.Record.Message
					}
					if c.Record.Name == end {
						return nil
					}
				}
				at = b.Revision
			}
		})
	}
	k.churn()
	k.update(func(tx store.Tx) error { return tx.Put(store.Tenant, end, tenant("the-end", "")) })
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	_, want := k.snapshot(store.Tenant, store.Service)
	for i, got := range states {
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("watcher %d ends elsewhere than the snapshot (-snapshot +watch):\n%s", i, d)
		}
	}
}

// testWatchFromAnywhere: a watch from any snapshot continues exactly there.
func testWatchFromAnywhere(t *testing.T, k *kit) {
	type point struct {
		revision int64
		state    map[string]proto.Message
	}
	var points []point
	for range 4 {
		k.churn()
		rev, state := k.snapshot(store.Tenant, store.Service)
		points = append(points, point{rev, state})
	}
	end, want := k.snapshot(store.Tenant, store.Service)
	// A replica that was opened later never saw these changes happen.
	for i, s := range []store.Store{k.s, k.open()} {
		for _, p := range append(points, point{0, nil}) {
			state := map[string]proto.Message{}
			maps.Copy(state, p.state)
			if err := k.replay(s, p.revision, end, state, store.WatchFilter{}); err != nil {
				t.Errorf("replica %d from %d: %v", i, p.revision, err)
				continue
			}
			if d := cmp.Diff(want, state, protocmp.Transform()); d != "" {
				t.Errorf("replica %d from %d (-snapshot +watch):\n%s", i, p.revision, d)
			}
		}
	}
}

func testWatchFilter(t *testing.T, k *kit) {
	var end int64
	for _, tn := range []string{"a", "b"} {
		end = k.update(func(tx store.Tx) error {
			return errors.Join(put(tx, tn, ""), tx.Put(store.Service, api.ServiceName(tn, "s"), service(tn, "s")),
				tx.Put(store.Cluster, "clusters/"+tn, &portolanv1.Cluster{}))
		})
	}
	end = max(end, k.update(func(tx store.Tx) error { return put(tx, "c", "") }))
	for _, c := range []struct {
		filter store.WatchFilter
		want   []string
	}{
		{store.WatchFilter{}, []string{"tenants/a", "tenants/a/services/s", "clusters/a", "tenants/b", "tenants/b/services/s", "clusters/b", "tenants/c"}},
		{store.WatchFilter{Kinds: []store.Kind{store.Service}}, []string{"tenants/a/services/s", "tenants/b/services/s"}},
		{store.WatchFilter{Tenants: []string{"b"}}, []string{"tenants/b", "tenants/b/services/s"}},
		{store.WatchFilter{Tenants: []string{"b", ""}}, []string{"clusters/a", "tenants/b", "tenants/b/services/s", "clusters/b"}},
		{store.WatchFilter{Tenants: []string{"b"}, Kinds: []store.Kind{store.Tenant, store.Cluster}}, []string{"tenants/b"}},
		{store.WatchFilter{Tenants: []string{}}, nil},
	} {
		for i, s := range []store.Store{k.s, k.open()} {
			var got []string
			w, err := s.Watch(k.ctx, 0, c.filter)
			if err != nil {
				t.Fatal(err)
			}
			for at := int64(0); at < end; {
				b, err := w.Next(k.ctx)
				if err != nil {
					t.Fatalf("next: %v", err)
				}
				for _, ch := range b.Changes {
					got = append(got, ch.Record.Name)
				}
				at = b.Revision
			}
			w.Close()
			if !slices.Equal(got, c.want) {
				t.Errorf("replica %d, filter %+v: got %v, want %v", i, c.filter, got, c.want)
			}
		}
	}
}

func testWatchTombstones(t *testing.T, k *kit) {
	from := k.update(func(tx store.Tx) error { return put(tx, "a", "last words") })
	rev := k.update(func(tx store.Tx) error { return tx.Delete(store.Tenant, "tenants/a") })
	w, err := k.s.Watch(k.ctx, from, store.WatchFilter{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	b, err := w.Next(k.ctx)
	if err != nil || len(b.Changes) != 1 {
		t.Fatalf("got %v, %v, want one change", b, err)
	}
	c := b.Changes[0]
	if !c.Deleted || c.Record.Revision != rev || c.Record.Tenant != "a" || c.Record.Message.(*portolanv1.Tenant).GetSpec().GetDisplayName() != "last words" {
		t.Errorf("tombstone %+v, want the last message at %d", c, rev)
	}
	// A closed watcher ends also when it waits.
	done := make(chan error)
	go func() {
		_, err := w.Next(k.ctx)
		done <- err
	}()
	w.Close()
	w.Close()
	if err := <-done; err == nil {
		t.Error("a closed watcher gave a batch")
	}
}

func testCompaction(t *testing.T, k *kit) {
	c, ok := k.s.(Compactor)
	if !ok {
		t.Fatalf("%T does not compact", k.s)
	}
	var revs []int64
	for i := range 6 {
		revs = append(revs, k.update(func(tx store.Tx) error { return put(tx, "a", strconv.Itoa(i)) }))
	}
	open, err := k.s.Watch(k.ctx, revs[0], store.WatchFilter{})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := c.Compact(k.ctx, revs[3]); err != nil {
		t.Fatal(err)
	}
	if err := c.Compact(k.ctx, revs[1]); err != nil {
		t.Fatalf("a lower floor: %v", err)
	}
	late := k.open()
	for _, from := range []int64{0, revs[0], revs[2], revs[5] + 100} {
		err := k.replay(late, from, revs[5]+101, map[string]proto.Message{}, store.WatchFilter{})
		wantKind(t, fmt.Sprintf("watch from %d with floor %d", from, revs[3]), err, api.Compacted)
	}
	for _, from := range []int64{revs[3], revs[4]} {
		if err := k.replay(late, from, revs[5], map[string]proto.Message{}, store.WatchFilter{}); err != nil {
			t.Errorf("watch from %d with floor %d: %v", from, revs[3], err)
		}
	}
	if got := k.text("a"); got != "5" {
		t.Errorf("compaction changed the record to %q", got)
	}
}

// testMirror: a mirror is at every moment some snapshot, and gets to the last.
func testMirror(t *testing.T, k *kit) {
	m := store.NewMirror(k.s, []store.Kind{store.Tenant})
	ctx, cancel := context.WithCancel(k.ctx)
	var g errgroup.Group
	g.Go(func() error { return m.Run(ctx) })
	first, err := m.Wait(k.ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	k.churn()
	if c, ok := k.s.(Compactor); ok {
		if err := c.Compact(k.ctx, first.Revision+3); err != nil {
			t.Fatal(err)
		}
	}
	k.churn()
	end, want := k.snapshot(store.Tenant)
	v, err := m.Wait(k.ctx, end)
	if err != nil {
		t.Fatalf("the mirror did not reach %d: %v (%v)", end, err, m.Err())
	}
	got := map[string]proto.Message{}
	for name, msg := range store.All[*portolanv1.Tenant](v, store.Tenant) {
		got["Tenant "+name] = msg
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("mirror (-store +mirror):\n%s", d)
	}
	if first.Len(store.Tenant) != 0 {
		t.Errorf("an old view changed: it holds %d records", first.Len(store.Tenant))
	}
	for name := range want {
		if _, ok := store.One[*portolanv1.Tenant](v, store.Tenant, name[len("Tenant "):]); !ok {
			t.Errorf("One does not find %s", name)
		}
	}
	cancel()
	if err := g.Wait(); err != nil {
		t.Errorf("Run after cancel: %v", err)
	}
}

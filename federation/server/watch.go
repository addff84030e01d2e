package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

const bookmarkEvery = time.Second

type watchService struct {
	portolanv1.UnimplementedWatchServiceServer
	s *Server
}

// watch is one stream. Objects are sent with their status as it is when they are
// sent; records that are joined make the object be sent again.
type watch struct {
	s      *Server
	c      *caller
	kinds  map[store.Kind]bool
	tenant string
	out    grpc.ServerStreamingServer[portolanv1.WatchResponse]
}

// Watch implements portolanv1.WatchServiceServer.
func (ws *watchService) Watch(req *portolanv1.WatchRequest, out grpc.ServerStreamingServer[portolanv1.WatchResponse]) error {
	const doing = "watch"
	c, err := callerOf(out.Context())
	if err != nil {
		return err
	}
	w := &watch{s: ws.s, c: c, kinds: map[store.Kind]bool{}, out: out}
	if err := w.scope(doing, req); err != nil {
		return err
	}
	from := req.GetFromRevision()
	said, err := w.heard(out.Context(), store.Cluster)
	if err != nil {
		return err
	}
	var snapshot []proto.Message
	now, err := w.s.cfg.Store.View(out.Context(), func(r store.Reader) error {
		snapshot = nil
		if from == 0 {
			snapshot, err = w.snapshot(r, said)
		}
		return err
	})
	if err != nil {
		return err
	}
	if from > now {
		return api.E(api.Compacted, doing, "revision %d is not in this fleet's history, which is at %d: begin with a snapshot", from, now)
	}
	start := from
	if from == 0 {
		start = now
	}
	follow, err := w.s.cfg.Store.Watch(out.Context(), start, w.filter())
	if err != nil {
		return err
	}
	defer follow.Close()
	if err := out.Send(&portolanv1.WatchResponse{Event: &portolanv1.WatchResponse_Established_{Established: &portolanv1.WatchResponse_Established{}}}); err != nil {
		return err
	}
	if from == 0 {
		if err := w.sendSnapshot(snapshot, now); err != nil {
			return err
		}
	}
	return w.follow(out.Context(), follow)
}

// scope reads what is asked for and refuses what is not the caller's.
func (w *watch) scope(doing string, req *portolanv1.WatchRequest) error {
	if err := w.s.checkRequest(doing, req); err != nil {
		return err
	}
	if req.GetFromRevision() < 0 {
		return api.InvalidFields(doing, []api.Violation{{Field: "from_revision", Message: "is negative"}})
	}
	for i, k := range req.GetKinds() {
		kind := store.Kind(k)
		if w.s.kinds[kind] == nil && kind != store.AuditEntry {
			return api.InvalidFields(doing, []api.Violation{{Field: fmt.Sprintf("kinds[%d]", i), Message: fmt.Sprintf("%q is no kind of object", clip(k))}})
		}
		w.kinds[kind] = true
	}
	if len(w.kinds) == 0 {
		for k := range w.s.kinds {
			w.kinds[k] = true
		}
	}
	if p := req.GetParent(); p != "" && p != "-" {
		ids, err := api.ParseName(p, api.TenantPattern)
		if err != nil {
			return api.InvalidFields(doing, []api.Violation{{Field: "parent", Message: err.Error()}})
		}
		if !w.c.owns(ids[0]) {
			return api.E(api.NotFound, doing, "no such tenant")
		}
		w.tenant = ids[0]
	}
	return nil
}

// joined says which kinds are sent again when a record changes that is joined to
// them.
var joined = map[store.Kind][]store.Kind{
	store.Placement:       {store.Workload},
	store.PlacementStatus: {store.Workload, store.Placement},
	store.ClusterStatus:   {store.Cluster},
	store.Nack:            {store.Workload, store.Service, store.Route, store.PolicyBundle},
}

func (w *watch) filter() store.WatchFilter {
	var f store.WatchFilter
	for k := range w.kinds {
		f.Kinds = append(f.Kinds, k)
	}
	for k, to := range joined {
		if !w.kinds[k] && slices.ContainsFunc(to, func(t store.Kind) bool { return w.kinds[t] }) {
			f.Kinds = append(f.Kinds, k)
		}
	}
	slices.Sort(f.Kinds)
	switch {
	case w.tenant != "":
		f.Tenants = []string{w.tenant}
	case !w.c.fleet:
		f.Tenants = slices.Clone(w.c.tenants)
	default:
		return f
	}
	// Nacks and clusters are the fleet's own records.
	f.Tenants = append(f.Tenants, "")
	return f
}

// mine says whether an object is in scope; the store's filter lets the fleet's
// own records pass for the sake of those that are joined.
func (w *watch) mine(kind store.Kind, tenant string) bool {
	if !w.kinds[kind] || w.tenant != "" && tenant != w.tenant {
		return false
	}
	if k := w.s.kinds[kind]; k != nil && k.fleetWide {
		return true
	}
	return w.c.owns(tenant)
}

// heard reads what a Get joins to clusters from lease rows, if clusters are among
// what is watched and kinds.
func (w *watch) heard(ctx context.Context, kinds ...store.Kind) (map[string]heard, error) {
	if !w.kinds[store.Cluster] || !slices.ContainsFunc(kinds, func(k store.Kind) bool { return k == store.Cluster || k == store.ClusterStatus }) {
		return nil, nil
	}
	return w.s.heard(ctx, w.s.kinds[store.Cluster])
}

func (w *watch) snapshot(r store.Reader, said map[string]heard) ([]proto.Message, error) {
	var out []proto.Message
	j := newJoiner(r, w.c, "")
	j.heard = said
	for _, info := range store.Kinds {
		if !w.kinds[info.Kind] {
			continue
		}
		opts := store.ListOptions{Tenant: w.tenant}
		k := w.s.kinds[info.Kind]
		if w.tenant == "" && (k == nil || !k.fleetWide) {
			opts.Tenants = w.c.filter()
		}
		for rec, err := range r.List(info.Kind, opts) {
			if err != nil {
				return nil, err
			}
			if !w.mine(info.Kind, rec.Tenant) {
				continue
			}
			m, err := w.present(j, k, rec.Message)
			if err != nil {
				return nil, err
			}
			out = append(out, m)
		}
	}
	return out, nil
}

func (w *watch) present(j *joiner, k *kindInfo, m proto.Message) (proto.Message, error) {
	o, ok := m.(object)
	if !ok || k == nil {
		return m, nil
	}
	return j.join(o)
}

func (w *watch) sendSnapshot(objects []proto.Message, revision int64) error {
	for _, m := range objects {
		if err := w.send(portolanv1.ChangeKind_CHANGE_KIND_PUT, m, revision); err != nil {
			return err
		}
	}
	return w.out.Send(&portolanv1.WatchResponse{Event: &portolanv1.WatchResponse_SnapshotEnd_{SnapshotEnd: &portolanv1.WatchResponse_SnapshotEnd{Revision: revision}}})
}

func (w *watch) send(kind portolanv1.ChangeKind, m proto.Message, revision int64) error {
	a, err := anypb.New(m)
	if err != nil {
		return api.E(api.Internal, "watch", "encode %T: %w", m, err)
	}
	return w.out.Send(&portolanv1.WatchResponse{Event: &portolanv1.WatchResponse_Change_{Change: &portolanv1.WatchResponse_Change{Kind: kind, Object: a, Revision: revision}}})
}

func (w *watch) follow(ctx context.Context, from store.Watcher) error {
	marked := time.Time{}
	for {
		// A bookmark is due even when nothing happens.
		wait, cancel := context.WithTimeout(ctx, bookmarkEvery)
		b, err := from.Next(wait)
		cancel()
		if err != nil && (ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded)) {
			return err
		}
		if err != nil {
			continue
		}
		n, err := w.batch(ctx, b)
		if err != nil {
			return err
		}
		if n == 0 && time.Since(marked) < bookmarkEvery {
			continue
		}
		marked = time.Now()
		if err := w.out.Send(&portolanv1.WatchResponse{Event: &portolanv1.WatchResponse_Bookmark_{Bookmark: &portolanv1.WatchResponse_Bookmark{Revision: b.Revision}}}); err != nil {
			return err
		}
	}
}

// message is a change that is ready to be sent.
type message struct {
	kind     portolanv1.ChangeKind
	m        proto.Message
	revision int64
}

// batch sends the changes of one batch, and says how many messages these were.
func (w *watch) batch(ctx context.Context, b store.Batch) (int, error) {
	if len(b.Changes) == 0 {
		return 0, nil
	}
	var kinds []store.Kind
	for _, ch := range b.Changes {
		kinds = append(kinds, ch.Record.Kind)
	}
	said, err := w.heard(ctx, kinds...)
	if err != nil {
		return 0, err
	}
	// Messages are made in the view and sent after it, so that a slow reader holds
	// no snapshot.
	var out []message
	_, err = w.s.cfg.Store.View(ctx, func(r store.Reader) error {
		a := &assembly{w: w, j: newJoiner(r, w.c, ""), sent: map[objectKey]bool{}}
		a.j.heard = said
		for _, ch := range b.Changes {
			if err := a.own(ch); err != nil {
				return err
			}
		}
		for _, ch := range b.Changes {
			for kind, name := range affected(ch.Record) {
				if err := a.again(objectKey{kind, name}, b.Revision); err != nil {
					return err
				}
			}
		}
		out = a.out
		return nil
	})
	if err != nil {
		return 0, err
	}
	for n, m := range out {
		if err := w.send(m.kind, m.m, m.revision); err != nil {
			return n, err
		}
	}
	return len(out), nil
}

type objectKey struct {
	kind store.Kind
	name string
}

// assembly makes the messages of one batch from one snapshot.
type assembly struct {
	w    *watch
	j    *joiner
	sent map[objectKey]bool
	out  []message
}

// own takes a change of an object in scope.
func (a *assembly) own(ch store.Change) error {
	rec := ch.Record
	if !a.w.mine(rec.Kind, rec.Tenant) {
		return nil
	}
	a.sent[objectKey{rec.Kind, rec.Name}] = true
	if ch.Deleted {
		a.out = append(a.out, message{portolanv1.ChangeKind_CHANGE_KIND_DELETE, rec.Message, rec.Revision})
		return nil
	}
	m, err := a.w.present(a.j, a.w.s.kinds[rec.Kind], rec.Message)
	a.out = append(a.out, message{portolanv1.ChangeKind_CHANGE_KIND_PUT, m, rec.Revision})
	return err
}

// again takes an object whose joined status changed, unless it goes out anyway
// or a newer one is still to come in order.
func (a *assembly) again(key objectKey, revision int64) error {
	if a.sent[key] || !a.w.mine(key.kind, api.TenantOf(key.name)) {
		return nil
	}
	a.sent[key] = true
	k := a.w.s.kinds[key.kind]
	o, err := k.get(a.j.r, key.name)
	if err != nil || o == nil || o.GetRevision() > revision {
		return err
	}
	m, err := a.w.present(a.j, k, o)
	a.out = append(a.out, message{portolanv1.ChangeKind_CHANGE_KIND_PUT, m, revision})
	return err
}

// affected names the objects to which a record is joined.
func affected(rec store.Record) map[store.Kind]string {
	switch rec.Kind {
	case store.Placement:
		return map[store.Kind]string{store.Workload: workloadOf(rec.Name)}
	case store.PlacementStatus:
		return map[store.Kind]string{store.Workload: workloadOf(rec.Name), store.Placement: rec.Name}
	case store.ClusterStatus:
		return map[store.Kind]string{store.Cluster: rec.Name}
	case store.Nack:
		n, ok := rec.Message.(*storev1.NackRecord)
		if !ok {
			return nil
		}
		return nackedObject(n.GetResource())
	default:
		return nil
	}
}

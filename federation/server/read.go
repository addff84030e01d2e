package server

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

const (
	defaultPage = 50
	maxPage     = 1000
	scanBatch   = 500 // records read at a time while a selector skips some
)

// getObject serves every Get.
func getObject[T object](ctx context.Context, s *Server, kind store.Kind, name string) (T, error) {
	var zero T
	k := s.kinds[kind]
	doing := "get " + clip(name)
	c, err := callerOf(ctx)
	if err != nil {
		return zero, err
	}
	if err := k.checkName(doing, "name", name); err != nil {
		return zero, err
	}
	if !k.fleetWide && !c.owns(api.TenantOf(name)) {
		return zero, k.absent(doing)
	}
	said, err := s.heard(ctx, k)
	if err != nil {
		return zero, err
	}
	var out T
	_, err = s.cfg.Store.View(ctx, func(r store.Reader) error {
		o, err := k.get(r, name)
		if err != nil {
			return err
		}
		if o == nil {
			return k.absent(doing)
		}
		j := newJoiner(r, c, name)
		j.heard = said
		out, err = as[T](j.join(o))
		return err
	})
	return out, err
}

// heard is what a cluster's lease row says of it.
type heard struct {
	applied int64
	at      time.Time
}

// heard reads what each cluster has applied, and when it reported last. That lies
// in lease rows, because it changes all the time and must make no revision.
func (s *Server) heard(ctx context.Context, k *kindInfo) (map[string]heard, error) {
	if k.kind != store.Cluster {
		return nil, nil
	}
	leases, err := s.cfg.Store.Leases(ctx)
	if err != nil {
		return nil, err
	}
	prefix := s.cfg.ClusterLease("")
	out := map[string]heard{}
	for _, l := range leases {
		if id, ok := strings.CutPrefix(l.Name, prefix); ok {
			out[id] = heard{applied: l.Progress, at: l.Expires.Add(-s.cfg.ClusterLeaseTTL)}
		}
	}
	return out, nil
}

func as[T object](o object, err error) (T, error) {
	var zero T
	if err != nil {
		return zero, err
	}
	t, ok := o.(T)
	if !ok {
		return zero, api.E(api.Internal, "read "+o.GetName(), "record holds a %T", o)
	}
	return t, nil
}

// listRequest is what all list requests have in common.
type listRequest interface {
	proto.Message
	GetPageSize() int32
	GetPageToken() string
	GetLabelSelector() map[string]string
}

// page is the result of a List.
type page[T any] struct {
	items    []T
	next     string
	revision int64
}

// listObjects serves every List of objects.
func listObjects[T object](ctx context.Context, s *Server, kind store.Kind, parent string, req listRequest) (page[T], error) {
	k := s.kinds[kind]
	c, err := callerOf(ctx)
	if err != nil {
		return page[T]{}, err
	}
	doing := "list " + k.title + "s"
	scope, err := k.scope(c, doing, parent)
	if err != nil {
		return page[T]{}, err
	}
	said, err := s.heard(ctx, k)
	if err != nil {
		return page[T]{}, err
	}
	selector := req.GetLabelSelector()
	var j *joiner
	return listRecords(ctx, s, listQuery{kind: kind, doing: doing, scope: scope, parent: parent, req: req}, func(r store.Reader, rec store.Record) (T, bool, error) {
		var zero T
		o, ok := rec.Message.(object)
		if !ok {
			return zero, false, api.E(api.Internal, doing, "record holds a %T", rec.Message)
		}
		for key, v := range selector {
			if got, ok := o.GetLabels()[key]; !ok || got != v {
				return zero, false, nil
			}
		}
		if j == nil || j.r != r {
			j = newJoiner(r, c, scope.opts.Prefix)
			j.heard = said
		}
		t, err := as[T](j.join(o))
		return t, err == nil, err
	})
}

// listScope is what of a kind a caller asked for and may read.
type listScope struct {
	opts store.ListOptions
	// tenant that must exist, when one was named.
	tenant string
}

// scope parses a parent: empty or "-" is all that the caller may read.
func (k *kindInfo) scope(c *caller, doing, parent string) (listScope, error) {
	sc := listScope{opts: store.ListOptions{Tenants: c.filter()}}
	if k.fleetWide {
		sc.opts.Tenants = nil
	}
	if parent == "" || parent == "-" || parent == "tenants/-" {
		return sc, nil
	}
	patterns := []string{api.TenantPattern}
	all := ""
	if k.underWorkload {
		patterns = append(patterns, api.WorkloadPattern)
		parent, all, _ = strings.Cut(parent, "/workloads/-")
	}
	ids, err := api.ParseName(parent, patterns...)
	if err != nil || all != "" {
		return sc, api.InvalidFields(doing, []api.Violation{{Field: "parent", Message: fmt.Sprintf("%q is no parent of a %s", clip(parent+all), k.title)}})
	}
	if !c.owns(ids[0]) {
		return sc, api.E(api.NotFound, doing, "no such tenant")
	}
	sc.tenant = ids[0]
	sc.opts = store.ListOptions{Tenant: ids[0], Prefix: parent + "/"}
	return sc, nil
}

// listQuery is one page that is asked for.
type listQuery struct {
	kind   store.Kind
	doing  string
	scope  listScope
	parent string
	req    listRequest
}

// listRecords reads one page: pick says which records are in it. Each page reads
// the snapshot of its own time.
func listRecords[T any](ctx context.Context, s *Server, q listQuery, pick func(store.Reader, store.Record) (T, bool, error)) (page[T], error) {
	size, after, err := s.pageOf(q)
	if err != nil {
		return page[T]{}, err
	}
	var out page[T]
	_, err = s.cfg.Store.View(ctx, func(r store.Reader) error {
		out = page[T]{revision: r.Revision()}
		if t := q.scope.tenant; t != "" {
			if _, err := r.Get(store.Tenant, api.TenantName(t)); err != nil {
				return api.E(api.KindOf(err), q.doing, "no such tenant")
			}
		}
		opts := q.scope.opts
		opts.After, opts.Limit = after, max(size+1, scanBatch)
		for {
			n, last := 0, ""
			for rec, err := range r.List(q.kind, opts) {
				if err != nil {
					return err
				}
				n++
				item, ok, err := pick(r, rec)
				if err != nil {
					return err
				}
				if ok && len(out.items) == size {
					out.next = s.pageToken(q, last)
					return nil
				}
				if ok {
					out.items = append(out.items, item)
				}
				last = rec.Name
			}
			if n < opts.Limit {
				return nil
			}
			opts.After = last
		}
	})
	return out, err
}

// token is what a page token holds: where to go on, and a check that binds it to
// the query.
type token struct {
	After string `json:"a"`
	Sum   []byte `json:"s"`
}

func (s *Server) tokenSum(q listQuery, after string) []byte {
	h := sha256.New()
	keys := make([]string, 0, len(q.req.GetLabelSelector()))
	for k, v := range q.req.GetLabelSelector() {
		keys = append(keys, fmt.Sprintf("%q=%q", k, v))
	}
	slices.Sort(keys)
	_, _ = fmt.Fprintf(h, "page token\x00%s\x00%s\x00%s\x00%q\x00%q", s.cfg.Fleet, q.req.ProtoReflect().Descriptor().FullName(), q.parent, keys, after)
	return h.Sum(nil)[:12]
}

func (s *Server) pageToken(q listQuery, after string) string {
	b, err := json.Marshal(token{After: after, Sum: s.tokenSum(q, after)})
	if err != nil {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func (s *Server) pageOf(q listQuery) (size int, after string, err error) {
	bad := func(field, msg string) error {
		return api.InvalidFields(q.doing, []api.Violation{{Field: field, Message: msg}})
	}
	switch n := q.req.GetPageSize(); {
	case n < 0:
		return 0, "", bad("page_size", "is negative")
	case n == 0:
		size = defaultPage
	default:
		size = min(int(n), maxPage)
	}
	if q.req.GetPageToken() == "" {
		return size, "", nil
	}
	var t token
	b, derr := base64.RawURLEncoding.DecodeString(q.req.GetPageToken())
	if derr == nil {
		derr = json.Unmarshal(b, &t)
	}
	if derr == nil && string(t.Sum) != string(s.tokenSum(q, t.After)) {
		derr = errors.New("of another query")
	}
	if derr != nil {
		return 0, "", bad("page_token", "is no token of this query: begin again without one")
	}
	return size, t.After, nil
}

// clip bounds what of a caller's text comes back or is stored.
func clip(s string) string {
	if len(s) > 256 {
		return strings.ToValidUTF8(s[:256], "") + "…"
	}
	return s
}

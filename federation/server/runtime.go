package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
	"github.com/portolan-io/portolan/federation/store"
)

const (
	maxReplicasListed = 10000
	replicaPage       = 1000 // at a time of one cluster
	maxEventsListed   = 1000
	defaultEvents     = 200
)

// runtimeService reads through to the clusters.
type runtimeService struct {
	portolanv1.UnimplementedRuntimeServiceServer
	s *Server
}

// fanOut asks several clusters at once, each for a bounded time. It gives what
// each answered and, sorted, who did not: who cannot be reached or is too slow. One
// that answers with an error is not silent; the first in order is the error.
func fanOut[T any](ctx context.Context, s *Server, clusters []string, call func(context.Context, string, grpc.ClientConnInterface) (T, error)) (map[string]T, []string, error) {
	var mu sync.Mutex
	out, silent, failed := map[string]T{}, []string{}, map[string]error{}
	var g errgroup.Group
	g.SetLimit(maxClusterCalls)
	for _, name := range clusters {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, clusterCallTimeout)
			defer cancel()
			var got T
			err := error(api.E(api.Unavailable, "call "+name, "it has no tunnel to this replica"))
			if s.cfg.Clusters != nil {
				if cc, ok := s.cfg.Clusters.Conn(name); ok {
					got, err = call(ctx, name, cc)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			switch kind := api.KindOf(err); {
			case err == nil:
				out[name] = got
			case kind == api.Unavailable || kind == api.Timeout:
				s.cfg.Log.Debug("a cluster is silent", "cluster", name, "error", err)
				silent = append(silent, name)
			default:
				s.cfg.Log.Warn("a cluster answered with an error", "cluster", name, "error", err)
				failed[name] = api.E(kind, "ask cluster "+name, "%w", err)
			}
			return nil
		})
	}
	_ = g.Wait()
	sort.Strings(silent)
	for _, name := range slices.Sorted(maps.Keys(failed)) {
		return out, silent, failed[name]
	}
	return out, silent, nil
}

// runtimeScope is where a runtime request is asked, and what of the answers is
// believed: nobody is, beyond their own.
type runtimeScope struct {
	clusters []string // sorted
	// placed says in which clusters each workload is, or has not yet confirmed to
	// have stopped.
	placed map[string]map[string]bool
}

// believes says whether a cluster may speak about an object.
func (sc *runtimeScope) believes(cluster, object string) bool {
	own := api.ClusterName(cluster)
	return object == own || strings.HasPrefix(object, own+"/") || sc.placed[workloadOf(object)][cluster]
}

// place notes a record of a workload in a cluster: its Placement, or its
// PlacementStatus, which stays until the cluster confirmed the stop.
func (sc *runtimeScope) place(placement string) {
	w := workloadOf(placement)
	if sc.placed[w] == nil {
		sc.placed[w] = map[string]bool{}
	}
	sc.placed[w][lastID(placement)] = true
}

// scopeOf lists where something of a workload or a tenant is; of the whole fleet
// it is every cluster, and placed is left empty.
func (s *Server) scopeOf(ctx context.Context, prefix string) (*runtimeScope, error) {
	var sc *runtimeScope
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		sc = &runtimeScope{placed: map[string]map[string]bool{}}
		if prefix == "" {
			names, err := namesUnder(r, store.Cluster, "")
			for _, n := range names {
				sc.clusters = append(sc.clusters, lastID(n))
			}
			return err
		}
		seen := map[string]bool{}
		for _, kind := range []store.Kind{store.Placement, store.PlacementStatus} {
			names, err := namesUnder(r, kind, prefix)
			if err != nil {
				return err
			}
			for _, n := range names {
				sc.place(n)
				seen[lastID(n)] = true
			}
		}
		sc.clusters = slices.Sorted(maps.Keys(seen))
		return nil
	})
	return sc, err
}

// weigh fills placed in for what clusters said about the whole fleet.
func (s *Server) weigh(ctx context.Context, sc *runtimeScope, answers map[string][]*portolanv1.Event) error {
	asked := map[string]bool{}
	for cluster, list := range answers {
		for _, e := range list {
			if ids, err := api.ParseName(e.GetObject(), api.WorkloadPattern, api.ReplicaPattern); err == nil {
				asked[api.PlacementName(ids[0], ids[1], cluster)] = true
			}
		}
	}
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		clear(sc.placed)
		for name := range asked {
			for _, kind := range []store.Kind{store.Placement, store.PlacementStatus} {
				if _, err := r.Get(kind, name); err == nil {
					sc.place(name)
				} else if api.KindOf(err) != api.NotFound {
					return err
				}
			}
		}
		return nil
	})
	return err
}

// runtimeScope of a request: what it is about, and in which clusters to ask.
func (s *Server) runtimeScope(ctx context.Context, doing, parent, cluster string, patterns ...string) (*runtimeScope, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	bad := func(field, msg string) error {
		return api.InvalidFields(doing, []api.Violation{{Field: field, Message: msg}})
	}
	prefix := ""
	if parent != "" {
		base, _ := strings.CutSuffix(parent, "/workloads/-")
		if base == parent || !slices.Contains(patterns, api.WorkloadPattern) {
			base = parent
		} else {
			patterns = []string{api.TenantPattern}
		}
		if _, err := api.ParseName(base, patterns...); err != nil {
			return nil, bad("parent", err.Error())
		}
		if !c.owns(api.TenantOf(base)) {
			return nil, api.E(api.NotFound, doing, "no such parent")
		}
		prefix = workloadOf(base) + "/"
	} else if !c.fleet {
		return nil, api.E(api.Denied, doing, "only fleet admins may leave out the parent")
	}
	if cluster != "" {
		if _, err := api.ParseID(cluster); err != nil {
			return nil, bad("cluster", err.Error())
		}
	}
	sc, err := s.scopeOf(ctx, prefix)
	if err != nil || cluster == "" {
		return sc, err
	}
	sc.clusters = slices.DeleteFunc(sc.clusters, func(c string) bool { return c != cluster })
	return sc, nil
}

// under says whether a name belongs to a parent as it is written in requests.
func under(name, parent string) bool {
	base, _ := strings.CutSuffix(parent, "/-")
	return base == "" || name == base || strings.HasPrefix(name, base+"/") || strings.HasSuffix(base, "/workloads") && strings.HasPrefix(name, base+"/")
}

// ListReplicas implements portolanv1.RuntimeServiceServer.
func (rs *runtimeService) ListReplicas(ctx context.Context, req *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	const doing = "list replicas"
	if req.GetParent() == "" {
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "parent", Message: "is required: tenants/{tenant}/workloads/{workload}, or - for all of a tenant"}})
	}
	scope, err := rs.s.runtimeScope(ctx, doing, req.GetParent(), req.GetCluster(), api.WorkloadPattern)
	if err != nil {
		return nil, err
	}
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	got, silent, err := rs.replicas(ctx, req.GetParent(), scope)
	if err != nil {
		return nil, err
	}
	if !c.fleet {
		for _, r := range got {
			r.Node = ""
		}
	}
	return &portolanv1.ListReplicasResponse{Replicas: got, SilentClusters: silent}, nil
}

// replicasOf reads all that a cluster has, page by page, up to what is listed.
func replicasOf(ctx context.Context, cluster, parent string, cc grpc.ClientConnInterface) ([]*portolanv1.Replica, error) {
	var out []*portolanv1.Replica
	req := &portolanv1.ListReplicasRequest{Parent: parent, Cluster: cluster, PageSize: replicaPage}
	for {
		resp, err := portolanv1.NewRuntimeServiceClient(cc).ListReplicas(ctx, req)
		if err != nil {
			return nil, err
		}
		out = append(out, resp.GetReplicas()...)
		if resp.GetNextPageToken() == "" || len(out) >= maxReplicasListed {
			return out[:min(len(out), maxReplicasListed)], nil
		}
		if resp.GetNextPageToken() <= req.GetPageToken() {
			return nil, api.E(api.Internal, "list replicas of cluster "+cluster, "its pages do not advance")
		}
		req.PageToken = resp.GetNextPageToken()
	}
}

// replicas asks the clusters in scope, and keeps what each may speak about, in
// order of name and cluster.
func (rs *runtimeService) replicas(ctx context.Context, parent string, scope *runtimeScope) ([]*portolanv1.Replica, []string, error) {
	answers, silent, err := fanOut(ctx, rs.s, scope.clusters, func(ctx context.Context, cluster string, cc grpc.ClientConnInterface) ([]*portolanv1.Replica, error) {
		return replicasOf(ctx, cluster, parent, cc)
	})
	var out []*portolanv1.Replica
	for _, cluster := range scope.clusters {
		dropped := 0
		for _, r := range answers[cluster] {
			if _, err := api.ParseName(r.GetName(), api.ReplicaPattern); err != nil || !under(r.GetName(), parent) || !scope.believes(cluster, r.GetName()) {
				dropped++
				continue
			}
			api.Bound(r, api.MaxTextBytes, api.MaxListItems)
			r.Cluster = cluster
			out = append(out, r)
		}
		if dropped > 0 {
			rs.s.cfg.Log.Error("replicas dropped", "alarm", true, "cluster", cluster, "replicas", dropped, "why", "they are not of what was asked for, or not placed there")
		}
	}
	slices.SortStableFunc(out, func(a, b *portolanv1.Replica) int {
		return cmp.Or(strings.Compare(a.GetName(), b.GetName()), strings.Compare(a.GetCluster(), b.GetCluster()))
	})
	out = slices.CompactFunc(out, func(a, b *portolanv1.Replica) bool {
		return a.GetName() == b.GetName() && a.GetCluster() == b.GetCluster()
	})
	return out[:min(len(out), maxReplicasListed)], silent, err
}

// ListEvents implements portolanv1.RuntimeServiceServer.
func (rs *runtimeService) ListEvents(ctx context.Context, req *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	const doing = "list events"
	limit := int(req.GetLimit())
	switch {
	case limit < 0:
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "limit", Message: "is negative"}})
	case limit == 0:
		limit = defaultEvents
	}
	limit = min(limit, maxEventsListed)
	scope, err := rs.s.runtimeScope(ctx, doing, req.GetParent(), req.GetCluster(), api.TenantPattern, api.WorkloadPattern, api.ReplicaPattern)
	if err != nil {
		return nil, err
	}
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	answers, silent, err := fanOut(ctx, rs.s, scope.clusters, func(ctx context.Context, cluster string, cc grpc.ClientConnInterface) ([]*portolanv1.Event, error) {
		resp, err := portolanv1.NewRuntimeServiceClient(cc).ListEvents(ctx, &portolanv1.ListEventsRequest{Parent: req.GetParent(), Cluster: cluster, Limit: int32(limit)})
		return resp.GetEvents()[:min(len(resp.GetEvents()), limit)], err
	})
	if err != nil {
		return nil, err
	}
	if req.GetParent() == "" {
		if err := rs.s.weigh(ctx, scope, answers); err != nil {
			return nil, err
		}
	}
	var out []*portolanv1.Event
	for _, cluster := range scope.clusters {
		for _, e := range answers[cluster] {
			// A workload that is gone leaves events behind: that is no lie, but nobody's
			// either.
			if !under(e.GetObject(), req.GetParent()) || !scope.believes(cluster, e.GetObject()) {
				continue
			}
			api.Bound(e, api.MaxTextBytes, api.MaxListItems)
			e.Cluster = cluster
			if !c.fleet {
				e.Node = "" // nodes are no tenant's business
			}
			out = append(out, e)
		}
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].GetTime().AsTime().Before(out[j].GetTime().AsTime()) })
	return &portolanv1.ListEventsResponse{Events: out[max(len(out)-limit, 0):], SilentClusters: silent}, nil
}

// find locates a replica: it answers which cluster has it. The access is audited,
// with what is to be done there, before anything is read.
func (rs *runtimeService) find(ctx context.Context, doing, replica, detail string) (grpc.ClientConnInterface, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	absent := api.E(api.NotFound, doing, "no such replica")
	if _, err := api.ParseName(replica, api.ReplicaPattern); err != nil {
		return nil, api.InvalidFields(doing, []api.Violation{{Field: "replica", Message: err.Error()}})
	}
	if !c.owns(api.TenantOf(replica)) {
		return nil, absent
	}
	scope, err := rs.s.scopeOf(ctx, workloadOf(replica)+"/")
	if err != nil {
		return nil, err
	}
	// By its name, so that it is found in however large a cluster.
	got, silent, err := rs.replicas(ctx, replica, scope)
	switch {
	case err != nil:
		return nil, err
	case len(got) > 1:
		rs.s.cfg.Log.Error("replica refused", "alarm", true, "replica", replica, "clusters", []string{got[0].GetCluster(), got[1].GetCluster()}, "why", "more than one cluster claims it")
		return nil, api.E(api.Precondition, doing, "clusters %s and %s both say that they have it", got[0].GetCluster(), got[1].GetCluster())
	case len(got) == 1:
		cc, ok := rs.s.cfg.Clusters.Conn(got[0].GetCluster())
		if !ok {
			return nil, api.E(api.Unavailable, doing, "cluster %s has no tunnel to this replica any more", got[0].GetCluster())
		}
		e := newEntry(c, time.Now(), replica, api.TenantOf(replica))
		e.Detail = detail
		return cc, rs.s.auditAlone(ctx, e)
	case len(silent) > 0:
		return nil, api.E(api.Unavailable, doing, "the replica was not found, and clusters %v do not answer", silent)
	}
	return nil, absent
}

// Logs implements portolanv1.RuntimeServiceServer.
func (rs *runtimeService) Logs(req *portolanv1.LogsRequest, out grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	ctx := out.Context()
	doing := "read logs of " + clip(req.GetReplica())
	err := rs.s.checkRequest(doing, req)
	if err != nil {
		return rs.refuse(ctx, req, err)
	}
	cc, err := rs.find(ctx, doing, req.GetReplica(), "")
	if err != nil {
		return rs.refuse(ctx, req, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, err := portolanv1.NewRuntimeServiceClient(cc).Logs(ctx, req)
	if err != nil {
		return err
	}
	return tunnel.Relay(in.Recv, out.Send)
}

// refuse audits a refusal of a stream, whose request the interceptor has not seen.
func (rs *runtimeService) refuse(ctx context.Context, req proto.Message, err error) error {
	if c, cerr := callerOf(ctx); cerr == nil {
		rs.s.refused(ctx, c, "/"+c.method, req, err)
	}
	return err
}

// Exec implements portolanv1.RuntimeServiceServer.
func (rs *runtimeService) Exec(out grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	const doing = "exec"
	first, err := out.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return api.InvalidFields(doing, []api.Violation{{Field: "start", Message: "the first message must be start"}})
	}
	ctx := out.Context()
	about := &portolanv1.LogsRequest{Replica: start.GetReplica()}
	if err := rs.s.checkRequest(doing, first); err != nil {
		return rs.refuse(ctx, about, err)
	}
	cc, err := rs.find(ctx, doing+" in "+clip(start.GetReplica()), start.GetReplica(), clip(fmt.Sprintf("%q", start.GetCommand())))
	if err != nil {
		return rs.refuse(ctx, about, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, err := portolanv1.NewRuntimeServiceClient(cc).Exec(ctx)
	if err != nil {
		return err
	}
	if err := in.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	// The input ends with the caller's half, or with the stream's context when the
	// answer is over.
	go func() {
		if err := tunnel.Relay(out.Recv, in.Send); err != nil && !errors.Is(err, io.EOF) {
			cancel()
			return
		}
		_ = in.CloseSend()
	}()
	return tunnel.Relay(in.Recv, out.Send)
}

package server

import (
	"context"
	"errors"
	"io"
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
	maxEventsListed   = 1000
	defaultEvents     = 200
)

// runtimeService reads through to the clusters.
type runtimeService struct {
	portolanv1.UnimplementedRuntimeServiceServer
	s *Server
}

// fanOut asks several clusters at once, each for a bounded time. It gives what
// each answered and, sorted, who did not.
func fanOut[T any](ctx context.Context, s *Server, clusters []string, call func(context.Context, string, grpc.ClientConnInterface) (T, error)) (map[string]T, []string) {
	var mu sync.Mutex
	out, silent := map[string]T{}, []string{}
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
			if err != nil {
				silent = append(silent, name)
				return nil
			}
			out[name] = got
			return nil
		})
	}
	_ = g.Wait()
	sort.Strings(silent)
	return out, silent
}

// clustersOf lists where something of a workload, a tenant or the fleet may run.
func (s *Server) clustersOf(ctx context.Context, prefix string) ([]string, error) {
	seen := map[string]bool{}
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		clear(seen)
		kind, opts := store.Placement, store.ListOptions{Prefix: prefix}
		if prefix == "" {
			kind, opts = store.Cluster, store.ListOptions{}
		}
		for rec, err := range r.List(kind, opts) {
			if err != nil {
				return err
			}
			seen[lastID(rec.Name)] = true
		}
		return nil
	})
	var out []string
	for c := range seen {
		out = append(out, c)
	}
	// A placement that went leaves replicas behind for a while.
	if s.cfg.Clusters != nil {
		for _, c := range s.cfg.Clusters.Connected() {
			if !seen[c] {
				out = append(out, c)
			}
		}
	}
	sort.Strings(out)
	return out, err
}

// place of a runtime request: what it is about, and in which clusters to ask.
func (s *Server) runtimeScope(ctx context.Context, doing, parent, cluster string, patterns ...string) ([]string, error) {
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
	if cluster == "" {
		return s.clustersOf(ctx, prefix)
	}
	if _, err := api.ParseID(cluster); err != nil {
		return nil, bad("cluster", err.Error())
	}
	return []string{cluster}, nil
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
	clusters, err := rs.s.runtimeScope(ctx, doing, req.GetParent(), req.GetCluster(), api.WorkloadPattern)
	if err != nil {
		return nil, err
	}
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	got, silent := rs.replicas(ctx, req.GetParent(), clusters)
	if !c.fleet {
		for _, r := range got {
			r.Node = ""
		}
	}
	return &portolanv1.ListReplicasResponse{Replicas: got, SilentClusters: silent}, nil
}

func (rs *runtimeService) replicas(ctx context.Context, parent string, clusters []string) ([]*portolanv1.Replica, []string) {
	answers, silent := fanOut(ctx, rs.s, clusters, func(ctx context.Context, cluster string, cc grpc.ClientConnInterface) ([]*portolanv1.Replica, error) {
		resp, err := portolanv1.NewRuntimeServiceClient(cc).ListReplicas(ctx, &portolanv1.ListReplicasRequest{Parent: parent, Cluster: cluster})
		return resp.GetReplicas(), err
	})
	var out []*portolanv1.Replica
	for cluster, list := range answers {
		for _, r := range list {
			// Nobody is believed beyond their own.
			if _, err := api.ParseName(r.GetName(), api.ReplicaPattern); err != nil || !under(r.GetName(), parent) || len(out) >= maxReplicasListed {
				continue
			}
			r.Cluster = cluster
			out = append(out, r)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].GetName() < out[j].GetName() })
	return out, silent
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
	clusters, err := rs.s.runtimeScope(ctx, doing, req.GetParent(), req.GetCluster(), api.TenantPattern, api.WorkloadPattern, api.ReplicaPattern)
	if err != nil {
		return nil, err
	}
	answers, silent := fanOut(ctx, rs.s, clusters, func(ctx context.Context, cluster string, cc grpc.ClientConnInterface) ([]*portolanv1.Event, error) {
		resp, err := portolanv1.NewRuntimeServiceClient(cc).ListEvents(ctx, &portolanv1.ListEventsRequest{Parent: req.GetParent(), Cluster: cluster, Limit: int32(limit)})
		return resp.GetEvents(), err
	})
	var out []*portolanv1.Event
	for cluster, list := range answers {
		for _, e := range list[:min(len(list), limit)] {
			if !under(e.GetObject(), req.GetParent()) {
				continue
			}
			e.Cluster = cluster
			out = append(out, e)
		}
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].GetTime().AsTime().Before(out[j].GetTime().AsTime()) })
	return &portolanv1.ListEventsResponse{Events: out[max(len(out)-limit, 0):], SilentClusters: silent}, nil
}

// find locates a replica: it answers which cluster has it. The access is audited
// before anything is read.
func (rs *runtimeService) find(ctx context.Context, doing, replica string) (grpc.ClientConnInterface, error) {
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
	workload := workloadOf(replica)
	clusters, err := rs.s.clustersOf(ctx, workload+"/")
	if err != nil {
		return nil, err
	}
	got, silent := rs.replicas(ctx, workload, clusters)
	for _, r := range got {
		if r.GetName() != replica {
			continue
		}
		cc, ok := rs.s.cfg.Clusters.Conn(r.GetCluster())
		if !ok {
			break
		}
		return cc, rs.s.auditAlone(ctx, newEntry(c, time.Now(), replica, api.TenantOf(replica)))
	}
	if len(silent) > 0 {
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
	cc, err := rs.find(ctx, doing, req.GetReplica())
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
	cc, err := rs.find(ctx, doing+" in "+clip(start.GetReplica()), start.GetReplica())
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

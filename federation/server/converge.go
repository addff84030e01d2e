package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

const (
	convergePoll    = 50 * time.Millisecond
	convergeReport  = time.Second
	convergeDefault = time.Minute
	convergeMost    = time.Hour
	maxLaggards     = 100
)

type convergenceService struct {
	portolanv1.UnimplementedConvergenceServiceServer
	s *Server
}

// barrier is one wait: first until every control loop has looked past the
// revision, then until every live cluster in scope has applied what followed.
type barrier struct {
	s       *Server
	c       *caller
	scope   []string // clusters that were named; nil is all live ones
	target  int64
	derived int64
	detail  []*portolanv1.Laggard // asked of the clusters, once a report
}

// WaitConverged implements portolanv1.ConvergenceServiceServer.
func (cs *convergenceService) WaitConverged(req *portolanv1.WaitConvergedRequest, out grpc.ServerStreamingServer[portolanv1.WaitConvergedResponse]) error {
	ctx := out.Context()
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	b := &barrier{s: cs.s, c: c, scope: req.GetClusters(), target: req.GetRevision()}
	wait, err := b.check(ctx, req)
	if err != nil {
		return err
	}
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	poll := time.NewTicker(convergePoll)
	defer poll.Stop()
	reported := time.Now()
	for {
		laggards, err := b.look(ctx)
		if err != nil {
			return err
		}
		if b.derived > 0 && len(laggards) == 0 {
			return out.Send(b.report(nil, true, true))
		}
		if time.Since(reported) >= convergeReport {
			reported = time.Now()
			b.ask(ctx, laggards)
			if err := out.Send(b.report(b.named(laggards), false, false)); err != nil {
				return err
			}
		}
		select {
		case <-poll.C:
		case <-deadline.C:
			b.ask(ctx, laggards)
			return out.Send(b.report(b.named(laggards), false, true))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// check validates the request and fixes the target.
func (b *barrier) check(ctx context.Context, req *portolanv1.WaitConvergedRequest) (time.Duration, error) {
	const doing = "wait for convergence"
	if err := b.s.checkRequest(doing, req); err != nil {
		return 0, err
	}
	wait := convergeDefault
	if d := req.GetTimeout(); d != nil {
		wait = d.AsDuration()
		if d.CheckValid() != nil || wait < 0 || wait > convergeMost {
			return 0, api.InvalidFields(doing, []api.Violation{{Field: "timeout", Message: fmt.Sprintf("is not between 0 and %v", convergeMost)}})
		}
	}
	_, err := b.s.cfg.Store.View(ctx, func(r store.Reader) error {
		switch now := r.Revision(); {
		case req.GetRevision() < 0 || req.GetRevision() > now:
			return api.InvalidFields(doing, []api.Violation{{Field: "revision", Message: fmt.Sprintf("%d is not in this fleet's history, which is at %d", req.GetRevision(), now)}})
		case req.GetRevision() == 0:
			b.target = now
		}
		for i, cl := range b.scope {
			if _, err := api.ParseID(cl); err != nil {
				return api.InvalidFields(doing, []api.Violation{{Field: fmt.Sprintf("clusters[%d]", i), Message: err.Error()}})
			}
			if o, err := b.s.kinds[store.Cluster].get(r, api.ClusterName(cl)); err != nil || o == nil {
				return orElse(err, api.E(api.NotFound, doing, "no such cluster as %s", cl))
			}
		}
		return nil
	})
	return wait, err
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// look says who holds the revision back now.
func (b *barrier) look(ctx context.Context) ([]*portolanv1.Laggard, error) {
	progress, err := b.s.progress(ctx)
	if err != nil {
		return nil, err
	}
	if b.derived == 0 {
		if behind := b.loops(progress); len(behind) > 0 {
			return behind, nil
		}
	}
	var out []*portolanv1.Laggard
	_, err = b.s.cfg.Store.View(ctx, func(r store.Reader) error {
		out = nil
		if b.derived == 0 {
			b.derived = r.Revision()
		}
		for rec, err := range r.List(store.Cluster, store.ListOptions{}) {
			if err != nil {
				return err
			}
			if lag, err := b.cluster(r, rec.Name, progress[b.s.cfg.ClusterLease(lastID(rec.Name))]); err != nil {
				return err
			} else if lag != nil {
				out = append(out, lag)
			}
		}
		return nil
	})
	return out, err
}

// loops are the control loops that have not looked past the target yet.
func (b *barrier) loops(progress map[string]int64) []*portolanv1.Laggard {
	var out []*portolanv1.Laggard
	for _, name := range b.s.cfg.ControlLoops {
		if progress[name] < b.target {
			out = append(out, &portolanv1.Laggard{Name: "loops/" + name, AppliedRevision: progress[name], Detail: "has not looked at the revision yet"})
		}
	}
	return out
}

// cluster says whether a cluster is in scope and behind. Lost and pending ones
// count only when they were named.
func (b *barrier) cluster(r store.Reader, name string, applied int64) (*portolanv1.Laggard, error) {
	named := slices.Contains(b.scope, lastID(name))
	if len(b.scope) > 0 && !named {
		return nil, nil
	}
	var st *portolanv1.ClusterStatus
	rec, err := r.Get(store.ClusterStatus, name)
	switch {
	case err == nil:
		if m, ok := rec.Message.(*storev1.ClusterStatusRecord); ok {
			st = m.GetStatus()
		}
	case api.KindOf(err) != api.NotFound:
		return nil, err
	}
	applied = max(applied, st.GetAppliedRevision())
	live := st.GetState() == portolanv1.ClusterState_CLUSTER_STATE_READY
	if !live && !named || live && applied >= b.derived {
		return nil, nil
	}
	lag := &portolanv1.Laggard{Name: name, AppliedRevision: applied}
	switch {
	case st.GetState() == portolanv1.ClusterState_CLUSTER_STATE_LOST:
		lag.Detail = "silent since " + st.GetLastSeenTime().AsTime().UTC().Format(time.RFC3339)
	case !live:
		lag.Detail = "has never joined"
	}
	return lag, nil
}

// ask reads through who inside the lagging clusters holds back.
func (b *barrier) ask(ctx context.Context, laggards []*portolanv1.Laggard) {
	b.detail = nil
	if b.s.cfg.Clusters == nil || b.derived == 0 {
		return
	}
	var clusters []string
	for _, l := range laggards {
		clusters = append(clusters, lastID(l.GetName()))
	}
	got, _, _ := fanOut(ctx, b.s, clusters, func(ctx context.Context, _ string, cc grpc.ClientConnInterface) ([]*portolanv1.Laggard, error) {
		resp, err := linkv1.NewClusterAdminServiceClient(cc).ListLaggards(ctx, &linkv1.ListLaggardsRequest{Revision: b.derived})
		return resp.GetLaggards(), err
	})
	for _, l := range laggards {
		for _, in := range got[lastID(l.GetName())] {
			// Nobody is believed beyond their own.
			if len(in.GetName()) > len(l.GetName()) && in.GetName()[:len(l.GetName())+1] == l.GetName()+"/" && len(b.detail) < maxLaggards {
				b.detail = append(b.detail, in)
			}
		}
	}
}

// named gives what the answer names: the consumers inside clusters where known,
// for fleet admins; for tenants the clusters alone.
func (b *barrier) named(laggards []*portolanv1.Laggard) []*portolanv1.Laggard {
	out := slices.Clone(laggards)
	if b.c.fleet {
		out = append(out, b.detail...)
	}
	return out[:min(len(out), maxLaggards)]
}

func (b *barrier) report(laggards []*portolanv1.Laggard, converged, final bool) *portolanv1.WaitConvergedResponse {
	resp := &portolanv1.WaitConvergedResponse{Revision: b.target, DerivedRevision: b.derived, Converged: converged, Final: final}
	for _, l := range laggards {
		resp.Laggards = append(resp.Laggards, proto.CloneOf(l))
	}
	return resp
}

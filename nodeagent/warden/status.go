package warden

import (
	"context"
	"maps"
	"sort"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// statusBoard wakes all who watch; what they then read is the newest.
type statusBoard struct {
	mu   sync.Mutex
	wake chan struct{}
}

func newStatusBoard() *statusBoard { return &statusBoard{wake: make(chan struct{})} }

// next gives a channel that is closed at the next change; take it before reading.
func (b *statusBoard) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wake
}

func (b *statusBoard) changed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.wake)
	b.wake = make(chan struct{})
}

// Status is the present state; see the proto for its parts.
func (w *Warden) Status() *nodev1.WardenStatus {
	out := &nodev1.WardenStatus{}
	out.Allowed, out.Denied = w.decisions.counts()
	w.mu.Lock()
	out.Degraded = w.degraded
	out.Problems = w.problems
	replicas := make([]*replica, 0, len(w.replicas))
	for _, r := range w.replicas {
		replicas = append(replicas, r)
	}
	views := make(map[string]replicaView, len(w.replicas))
	maps.Copy(views, w.views)
	w.mu.Unlock()
	if wd := w.world.Load(); wd != nil {
		out.Loaded = wd.watermark
		names := make([]string, 0, len(wd.faults))
		for n := range wd.faults {
			names = append(names, n)
		}
		sort.Strings(names)
		for _, n := range names {
			out.PolicyFaults = append(out.PolicyFaults, &nodev1.PolicyFault{Bundle: n, Message: wd.faults[n]})
		}
	}
	sort.Slice(replicas, func(i, j int) bool { return replicas[i].allocation < replicas[j].allocation })
	for _, r := range replicas {
		out.Proxies = append(out.Proxies, w.proxyStatus(r, views[r.allocation]))
	}
	return out
}

// replicaView is the loop's part of a replica's status, copied for readers.
type replicaView struct {
	serving  bool
	identity bool
	fault    string
}

func (w *Warden) proxyStatus(r *replica, v replicaView) *nodev1.WardenProxy {
	r.mu.Lock()
	p := &nodev1.WardenProxy{
		Status: &nodev1.ProxyStatus{Allocation: r.allocation, Applied: r.applied},
		Detail: r.detail, Serving: v.serving,
	}
	confirmed, revision := r.confirmed != "", r.want.watermark.GetRevision()
	r.mu.Unlock()
	if st, ok := w.cache.Status(r.allocation); ok {
		p.Connected = st.Connected
		for _, n := range st.Nacks {
			p.Status.Nacks = append(p.Status.Nacks, &linkv1.Nack{
				Resource: w.world.Load().origin(n.Type, n.Name), Consumer: r.allocation, Message: clip(n.Message), Revision: revision,
			})
		}
	}
	p.Ready = p.Connected && v.identity && confirmed
	if v.fault != "" {
		p.Detail = v.fault
	}
	return p
}

// wardenService is the agent's side.
type wardenService struct {
	nodev1.UnimplementedWardenServiceServer
	w *Warden
}

// Wake implements WardenService.
func (s wardenService) Wake(ctx context.Context, _ *nodev1.WakeRequest) (*nodev1.WakeResponse, error) {
	if err := s.w.Wake(ctx); err != nil {
		return nil, err
	}
	out := &nodev1.WakeResponse{}
	if wd := s.w.world.Load(); wd != nil {
		out.Loaded = wd.watermark
	}
	return out, nil
}

// WatchStatus implements WardenService.
func (s wardenService) WatchStatus(_ *nodev1.WatchStatusRequest, stream nodev1.WardenService_WatchStatusServer) error {
	var last *nodev1.WardenStatus
	for {
		next := s.w.status.next()
		now := s.w.Status()
		if last == nil || !proto.Equal(last, now) {
			if err := stream.Send(now); err != nil {
				return err
			}
			last = now
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-next:
		}
	}
}

// ListDecisions implements WardenService.
func (s wardenService) ListDecisions(_ context.Context, req *nodev1.ListDecisionsRequest) (*nodev1.ListDecisionsResponse, error) {
	limit := int(req.GetLimit())
	if limit <= 0 {
		limit = 100
	}
	return &nodev1.ListDecisionsResponse{Decisions: s.w.decisions.newest(limit, req.GetAllocation())}, nil
}

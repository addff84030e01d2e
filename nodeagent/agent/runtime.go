package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"sync"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// runtimeServer is the node's RuntimeService; who may call was decided above.
type runtimeServer struct {
	portolanv1.UnimplementedRuntimeServiceServer
	a *Agent
}

// RegisterRuntime serves the node's RuntimeService on another server too, for
// break-glass on a local socket.
func (a *Agent) RegisterRuntime(s grpc.ServiceRegistrar) {
	portolanv1.RegisterRuntimeServiceServer(s, &runtimeServer{a: a})
}

func execID() string { return "x" + strings.ToLower(rand.Text()[:12]) }

func under(parent, object string) bool {
	return parent == "" || object == parent || strings.HasPrefix(object, strings.TrimSuffix(parent, "-")+"/") ||
		strings.HasSuffix(parent, "/-") && strings.HasPrefix(object, strings.TrimSuffix(parent, "-"))
}

// ListReplicas gives the node's replicas of a workload or tenant.
func (s *runtimeServer) ListReplicas(_ context.Context, req *portolanv1.ListReplicasRequest) (*portolanv1.ListReplicasResponse, error) {
	s.a.mu.Lock()
	cfg := s.a.config
	s.a.mu.Unlock()
	out := &portolanv1.ListReplicasResponse{}
	for _, r := range s.a.board.all() {
		if p := s.a.replica(r, cfg); under(req.GetParent(), p.GetName()) {
			out.Replicas = append(out.Replicas, p)
		}
	}
	return out, nil
}

func (a *Agent) replica(r record, cfg *nodev1.NodeConfig) *portolanv1.Replica {
	as, st := r.assignment, r.status
	id := identity.ID{Kind: identity.Workload, TrustDomain: cfg.GetTrustDomain(), Tenant: as.GetTenant(), Workload: as.GetWorkload()}
	if task.IsGateway(as) {
		id = identity.ID{Kind: identity.Gateway, TrustDomain: cfg.GetTrustDomain(), Name: as.GetWorkload()}
	}
	return &portolanv1.Replica{
		Name: api.ReplicaName(as.GetTenant(), as.GetWorkload(), as.GetAllocation()), Cluster: cfg.GetCluster(), Node: a.cfg.Node,
		Revision: as.GetRevision(), State: st.GetState(), Ready: st.GetReady(), Address: as.GetAddress(), Reason: st.GetReason(),
		Containers: st.GetContainers(), Epoch: as.GetEpoch(), Timeline: st.GetTimeline(),
		ProxyAppliedRevision: a.board.proxyApplied(as.GetAllocation()), SpiffeId: id.String(),
	}
}

// ListEvents gives the node's newest events.
func (s *runtimeServer) ListEvents(_ context.Context, req *portolanv1.ListEventsRequest) (*portolanv1.ListEventsResponse, error) {
	limit := int(req.GetLimit())
	if limit <= 0 {
		limit = 200
	}
	return &portolanv1.ListEventsResponse{Events: s.a.board.eventsOf(func(o string) bool { return under(req.GetParent(), o) }, limit)}, nil
}

// target finds allocation and container of a request.
func (s *runtimeServer) target(doing, replica, container string) (record, string, error) {
	ids, err := api.ParseName(replica, api.ReplicaPattern)
	if err != nil {
		return record{}, "", api.E(api.Invalid, doing, "%w", err)
	}
	r, ok := s.a.board.get(ids[2])
	if !ok || r.assignment.GetTenant() != ids[0] || r.assignment.GetWorkload() != ids[1] {
		return record{}, "", api.E(api.NotFound, doing, "%s is not on this node", replica)
	}
	if container == "" {
		cs := r.assignment.GetSpec().GetContainers()
		if len(cs) == 0 {
			return record{}, "", api.E(api.Precondition, doing, "%s has no containers", replica)
		}
		container = task.ContainerName(cs[0])
	}
	if task.ContainerSpec(r.assignment, container) == nil {
		return record{}, "", api.E(api.NotFound, doing, "%s has no container %q", replica, container)
	}
	return r, container, nil
}

// Logs streams a container's log.
func (s *runtimeServer) Logs(req *portolanv1.LogsRequest, stream grpc.ServerStreamingServer[portolanv1.LogsResponse]) error {
	r, container, err := s.target("read logs", req.GetReplica(), req.GetContainer())
	if err != nil {
		return err
	}
	return s.a.readLogs(stream.Context(), r.assignment.GetAllocation(), container, req.GetPrevious(), req.GetFollow(), int(req.GetTailLines()),
		func(b []byte) error { return stream.Send(&portolanv1.LogsResponse{Data: append([]byte(nil), b...)}) })
}

// Exec runs a command beside a container's own.
func (s *runtimeServer) Exec(stream grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil || len(start.GetCommand()) == 0 {
		return api.E(api.Invalid, "exec", "the first message must be start, with a command")
	}
	r, container, err := s.target("exec", start.GetReplica(), start.GetContainer())
	if err != nil {
		return err
	}
	id, ok := s.a.liveID(r.assignment.GetAllocation(), container)
	if !ok {
		return api.E(api.Precondition, "exec", "container %s does not run", container)
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	stdin, feed := io.Pipe()
	defer func() { _ = stdin.Close() }()
	resize := make(chan engine.Size, 1)
	go receiveExec(ctx, stream, feed, resize)
	var mu sync.Mutex // stdout and stderr share the stream
	code, err := s.a.cfg.Engine.Exec(ctx, id, engine.ExecSpec{
		ID: execID(), Command: start.GetCommand(), TTY: start.GetTty(), Stdin: stdin, Resize: resize,
		Stdout: sender{&mu, func(b []byte) error {
			return stream.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_Stdout{Stdout: b}})
		}},
		Stderr: sender{&mu, func(b []byte) error {
			return stream.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_Stderr{Stderr: b}})
		}},
	})
	if err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	return stream.Send(&portolanv1.ExecResponse{Message: &portolanv1.ExecResponse_ExitCode{ExitCode: int32(code)}})
}

// receiveExec feeds stdin and sizes until the caller ends.
func receiveExec(ctx context.Context, stream grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse], feed *io.PipeWriter, resize chan engine.Size) {
	defer func() { _ = feed.Close() }()
	for {
		m, err := stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = feed.CloseWithError(err)
			}
			return
		}
		switch m := m.GetMessage().(type) {
		case *portolanv1.ExecRequest_Stdin:
			if _, err := feed.Write(m.Stdin); err != nil {
				return
			}
		case *portolanv1.ExecRequest_CloseStdin:
			_ = feed.Close()
		case *portolanv1.ExecRequest_Resize:
			select {
			case resize <- engine.Size{Rows: uint16(m.Resize.GetRows()), Columns: uint16(m.Resize.GetColumns())}:
			case <-ctx.Done():
				return
			}
		}
	}
}

type sender struct {
	mu   *sync.Mutex
	send func([]byte) error
}

func (s sender) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for rest := p; len(rest) > 0; {
		n := min(len(rest), 32<<10)
		if err := s.send(append([]byte(nil), rest[:n]...)); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}

// liveID is the engine's ID of the running instance.
func (a *Agent) liveID(allocation, container string) (string, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, in := range a.live {
		if in.r.id == allocation && in.container == container {
			return id, true
		}
	}
	return "", false
}

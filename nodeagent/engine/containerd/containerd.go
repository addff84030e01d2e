// Package containerd is the engine on containerd's v2 client. It needs no more
// of the daemon than version 1.6 has (no transfer, no sandbox service). It owns
// one containerd namespace, one runc root and one cgroup parent, so that several
// nodes fit on one machine; it never decides what runs.
//
// Concurrency: safe for concurrent use; calls that concern the same container
// are serialised by their caller.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

const (
	defaultSnapshotter  = "overlayfs"
	defaultCgroupParent = "/portolan"
	connectBound        = 2 * time.Second
	killBound           = 10 * time.Second
)

// Host says how to reach a registry.
type Host struct {
	// Address to dial instead of the name's own, "host:port"; the name still is
	// what TLS checks.
	Address string
	// CAFile holds PEM roots; empty: the system's.
	CAFile string
}

// Config of an Engine.
type Config struct {
	// Address of containerd's socket.
	Address string
	// Namespace in containerd; one per node.
	Namespace string
	// RuncRoot is runc's state directory. Two nodes of one machine must not share
	// it: runc would kill the other's containers. Empty: runc's default.
	RuncRoot string
	// Runc is the runtime's binary; empty: "runc" on the PATH of containerd.
	Runc string
	// CgroupParent under which containers are made; default "/portolan".
	CgroupParent string
	// Snapshotter; default overlayfs.
	Snapshotter string
	// Hosts by "host:port" of the image reference. Others are reached by HTTPS at
	// their own name, and by plain HTTP on loopback.
	Hosts map[string]Host
	// ReservedUIDs may not be an image's or a spec's user.
	ReservedUIDs []uint32
	Log          *slog.Logger
}

// Engine implements engine.Engine.
type Engine struct {
	cfg    Config
	client *client.Client

	pullMu  sync.Mutex
	pulling int
}

// New makes an engine; it connects when it is used.
func New(cfg Config) (*Engine, error) {
	if cfg.Address == "" || cfg.Namespace == "" || cfg.Log == nil {
		return nil, errors.New("containerd: Address, Namespace and Log are required")
	}
	if cfg.Snapshotter == "" {
		cfg.Snapshotter = defaultSnapshotter
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = defaultCgroupParent
	}
	// A restarted daemon is up again in 50 ms: be there soon after.
	params := grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: connectBound,
	}
	c, err := client.New(cfg.Address, client.WithDefaultNamespace(cfg.Namespace), client.WithExtraDialOpts([]grpc.DialOption{grpc.WithConnectParams(params)}))
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	return &Engine{cfg: cfg, client: c}, nil
}

// Close lets go of the connection; containers run on.
func (e *Engine) Close() error { return e.client.Close() }

func (e *Engine) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, e.cfg.Namespace)
}

// failed gives an error its kind.
func failed(doing string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	return api.E(kindOf(err), doing, "%w", err)
}

func kindOf(err error) api.Kind {
	switch {
	case errdefs.IsNotFound(err):
		return api.NotFound
	case errdefs.IsAlreadyExists(err):
		return api.Exists
	case errdefs.IsFailedPrecondition(err):
		return api.Precondition
	case errdefs.IsUnavailable(err):
		return api.Unavailable
	case errdefs.IsInvalidArgument(err):
		return api.Invalid
	case errors.Is(err, context.Canceled):
		return api.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return api.Timeout
	}
	return api.KindOf(err)
}

func is(err error, k api.Kind) bool { return err != nil && kindOf(err) == k }

// Ping implements engine.Engine.
func (e *Engine) Ping(ctx context.Context) error {
	_, err := e.client.Version(e.in(ctx))
	return failed("ping containerd", err)
}

// Create implements engine.Engine.
func (e *Engine) Create(ctx context.Context, spec engine.Spec) error {
	ctx = e.in(ctx)
	doing := "create container " + spec.ID
	if err := engine.CheckCapabilities(spec.AddCapabilities); err != nil {
		return failed(doing, err)
	}
	img, err := e.client.GetImage(ctx, spec.Image)
	if err != nil {
		return failed(doing, err)
	}
	cfg, err := imageConfig(ctx, img)
	if err != nil {
		return failed(doing, err)
	}
	c, err := e.client.NewContainer(ctx, spec.ID,
		client.WithImage(img),
		client.WithSnapshotter(e.cfg.Snapshotter),
		client.WithNewSnapshot(spec.ID, img),
		client.WithContainerLabels(spec.Labels),
		client.WithRuntime("io.containerd.runc.v2", e.runcOptions()),
		client.WithNewSpec(e.specOpts(spec, cfg)...),
	)
	if err != nil {
		if !is(err, api.Exists) {
			err = errors.Join(err, e.cleanRecord(ctx, spec.ID))
		}
		return failed(doing, err)
	}
	if _, err := c.NewTask(ctx, logTo(spec.LogPath)); err != nil {
		// A failed NewTask leaves container, snapshot and maybe a half-made shim.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), killBound)
		defer cancel()
		if derr := e.Delete(clean, spec.ID); derr != nil {
			e.cfg.Log.Warn("half-made container not cleaned up; List shows it", "id", spec.ID, "error", derr)
		}
		return failed(doing, err)
	}
	return nil
}

func logTo(path string) cio.Creator {
	if path == "" {
		return cio.NullIO
	}
	return cio.LogFile(path)
}

// Start implements engine.Engine.
func (e *Engine) Start(ctx context.Context, id string) (int, error) {
	ctx = e.in(ctx)
	r, err := e.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: id})
	if err != nil {
		return 0, failed("start container "+id, err)
	}
	return int(r.GetPid()), nil
}

// Signal implements engine.Engine.
func (e *Engine) Signal(ctx context.Context, id string, sig int, all bool) error {
	_, err := e.client.TaskService().Kill(e.in(ctx), &tasks.KillRequest{ContainerID: id, Signal: uint32(sig), All: all})
	return failed("signal container "+id, err)
}

// Wait implements engine.Engine. When containerd dies, an open wait ends with an
// error that says nothing of the container: it is asked again.
func (e *Engine) Wait(ctx context.Context, id string) (engine.Exit, error) {
	ctx = e.in(ctx)
	doing := "wait for container " + id
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		r, err := e.client.TaskService().Wait(ctx, &tasks.WaitRequest{ContainerID: id})
		if err == nil {
			return e.exit(ctx, id, r.GetExitStatus(), r.GetExitedAt().AsTime()), nil
		}
		if ctx.Err() != nil {
			return engine.Exit{}, api.E(api.Canceled, doing, "%w", ctx.Err())
		}
		if is(err, api.NotFound) {
			return engine.Exit{}, failed(doing, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// exit adds what the cgroup tells, before it goes with the task.
func (e *Engine) exit(ctx context.Context, id string, code uint32, at time.Time) engine.Exit {
	x := engine.Exit{Code: int(code), Time: at}
	if code != 128+uint32(syscall.SIGKILL) {
		return x
	}
	m, err := e.memoryOf(ctx, id)
	if err != nil {
		e.cfg.Log.Debug("no memory figures of an ended container", "id", id, "error", err)
		return x
	}
	if m.oomKills > 0 {
		x.OOM = true
		x.MemoryBytes = m.peak
		if m.peak == 0 || m.limit > 0 && m.peak > m.limit {
			x.MemoryBytes = m.limit
		}
	}
	return x
}

// Delete implements engine.Engine. It works from the raw services, because a
// daemon that was killed in the middle of a start leaves things that the client's
// own objects do not find.
func (e *Engine) Delete(ctx context.Context, id string) error {
	ctx = e.in(ctx)
	if err := e.deleteTask(ctx, id); err != nil {
		return failed("delete container "+id, err)
	}
	if err := e.cleanRecord(ctx, id); err != nil {
		return failed("delete container "+id, err)
	}
	e.removeCgroup(id)
	return nil
}

func (e *Engine) deleteTask(ctx context.Context, id string) error {
	svc := e.client.TaskService()
	deadline := time.Now().Add(killBound)
	for {
		_, err := svc.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
		if err == nil || is(err, api.NotFound) {
			return nil
		}
		if is(err, api.Unavailable) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		// It still runs, or was never started: end it, then try again.
		_, kerr := svc.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(syscall.SIGKILL), All: true})
		if kerr == nil {
			wctx, cancel := context.WithTimeout(ctx, time.Second)
			_, _ = svc.Wait(wctx, &tasks.WaitRequest{ContainerID: id})
			cancel()
			continue
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

func (e *Engine) cleanRecord(ctx context.Context, id string) error {
	if err := e.client.ContainerService().Delete(ctx, id); err != nil && !is(err, api.NotFound) {
		return err
	}
	if err := e.client.SnapshotService(e.cfg.Snapshotter).Remove(ctx, id); err != nil && !is(err, api.NotFound) {
		return err
	}
	return nil
}

// Get implements engine.Engine.
func (e *Engine) Get(ctx context.Context, id string) (engine.Container, error) {
	ctx = e.in(ctx)
	rec, err := e.client.ContainerService().Get(ctx, id)
	if err != nil {
		return engine.Container{}, failed("get container "+id, err)
	}
	r, err := e.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil && !is(err, api.NotFound) {
		return engine.Container{}, failed("get container "+id, err)
	}
	return e.view(ctx, rec, r.GetProcess()), nil
}

// List implements engine.Engine: containers with their tasks, and tasks whose
// container is gone.
func (e *Engine) List(ctx context.Context) ([]engine.Container, error) {
	ctx = e.in(ctx)
	recs, err := e.client.ContainerService().List(ctx)
	if err != nil {
		return nil, failed("list containers", err)
	}
	r, err := e.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, failed("list containers", err)
	}
	byID := map[string]*tasktypes.Process{}
	for _, p := range r.GetTasks() {
		// 1.6 gives the container's ID in ID, newer daemons in both.
		byID[p.GetID()] = p
	}
	out := make([]engine.Container, 0, len(recs))
	for _, rec := range recs {
		out = append(out, e.view(ctx, rec, byID[rec.ID]))
		delete(byID, rec.ID)
	}
	for id := range byID {
		out = append(out, engine.Container{ID: id, State: engine.Unknown})
	}
	return out, nil
}

func (e *Engine) view(ctx context.Context, rec containers.Container, p *tasktypes.Process) engine.Container {
	out := engine.Container{ID: rec.ID, Labels: rec.Labels, State: engine.Unknown, StartedAt: rec.CreatedAt}
	switch p.GetStatus() {
	case tasktypes.Status_CREATED:
		out.State = engine.Created
	case tasktypes.Status_RUNNING, tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
		out.State, out.Pid = engine.Running, int(p.GetPid())
	case tasktypes.Status_STOPPED:
		out.State = engine.Exited
		x := e.exit(ctx, rec.ID, p.GetExitStatus(), p.GetExitedAt().AsTime())
		out.Exit = &x
	default:
	}
	return out
}

func (e *Engine) cgroup(parent, id string) string {
	if parent == "" {
		parent = e.cfg.CgroupParent
	}
	return path.Join("/", parent, id)
}

var _ engine.Engine = (*Engine)(nil)

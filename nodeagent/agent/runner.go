package agent

import (
	"bytes"
	"context"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// runner is the one goroutine of one allocation: it alone calls task.Next and
// task.Observe on its state.
type runner struct {
	a        *Agent
	id       string
	wake     chan struct{} // capacity 1
	launched bool          // guarded by Agent.mu

	mu sync.Mutex
	// inbox is bounded by what is in flight: each action answers once.
	inbox []task.Observation
	next  *nodev1.Assignment

	netMu      sync.Mutex // held while the network is changed
	attachment network.Attachment
	netGone    bool

	// Owned by the goroutine.
	assignment *nodev1.Assignment
	state      *task.State
	found      []engine.Container
	cancels    map[string]context.CancelFunc
	written    []byte
}

// addRunner makes a runner; it is launched once the engine was asked what runs.
// found is what the engine has of it. Agent.mu is held.
func (a *Agent) addRunner(as *nodev1.Assignment, state *task.State, found []engine.Container) {
	r := &runner{
		a: a, id: as.GetAllocation(), wake: make(chan struct{}, 1), assignment: as, state: state, found: found,
		cancels: map[string]context.CancelFunc{},
	}
	if r.state == nil {
		r.state = task.New(as, time.Now())
	}
	a.runners[r.id] = r
	if p := a.serving[r.id]; p != nil {
		r.post(proxySeen(p))
	}
	if a.adopted {
		if cs := a.orphans[r.id]; cs != nil {
			r.found = cs
			delete(a.orphans, r.id)
		}
		a.launch(r)
	}
}

// launch starts the goroutine; Agent.mu is held.
func (a *Agent) launch(r *runner) {
	if r.launched {
		return
	}
	r.launched = true
	ctx := a.ctx
	a.group.Go(func() { r.run(ctx) })
}

func (r *runner) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *runner) post(o task.Observation) {
	r.mu.Lock()
	r.inbox = append(r.inbox, o)
	r.mu.Unlock()
	r.poke()
}

func (r *runner) assign(as *nodev1.Assignment) {
	r.mu.Lock()
	r.next = as
	r.mu.Unlock()
	r.poke()
}

// stop asks for an orderly end of what is assigned now.
func (r *runner) stop(why string) {
	r.mu.Lock()
	base := r.next
	if base == nil {
		base = r.assignment
	}
	if !base.GetStop() {
		as := proto.CloneOf(base)
		as.Stop, as.StopReason = true, why
		r.next = as
	}
	r.mu.Unlock()
	r.poke()
}

func (r *runner) object() string {
	return api.ReplicaName(r.assignment.GetTenant(), r.assignment.GetWorkload(), r.id)
}

func (r *runner) tell(events []task.Event, at time.Time) {
	for _, e := range events {
		r.a.board.event(r.object(), e.Type, e.Message, at)
		r.a.log.Info("replica", "allocation", r.id, "event", e.Type, "message", e.Message)
	}
}

func (r *runner) observe(o task.Observation, now time.Time) {
	r.tell(task.Observe(r.assignment, r.state, o, now), now)
}

func (r *runner) run(ctx context.Context) {
	r.takeUp(ctx)
	for {
		now := time.Now()
		r.drain(now)
		d := r.decide(ctx, now)
		r.a.board.publish(r.assignment, d.Status)
		r.persist()
		if d.Forget {
			r.forget()
			return
		}
		if !r.wait(ctx, d.Wake) {
			return
		}
	}
}

// takeUp makes the state fit what the engine has.
func (r *runner) takeUp(ctx context.Context) {
	newest, older := instances(r.found)
	r.found = nil
	for _, id := range older {
		if err := r.a.cfg.Engine.Delete(ctx, id); err != nil && ctx.Err() == nil {
			r.a.log.Error("older container not deleted", "id", id, "error", err)
		}
	}
	now := time.Now()
	r.observe(task.Adopted{Instances: newest}, now)
	for i := range r.state.Containers {
		if c := &r.state.Containers[i]; c.Phase == task.Up {
			r.watch(ctx, c.Name, c.Attempt)
		}
	}
}

func (r *runner) drain(now time.Time) {
	r.mu.Lock()
	inbox, next := r.inbox, r.next
	r.inbox, r.next = nil, nil
	r.mu.Unlock()
	if next != nil {
		if task.Accept(r.assignment, next) {
			r.mu.Lock()
			r.assignment = merge(r.assignment, next)
			r.mu.Unlock()
		} else {
			r.a.board.event(r.object(), "StaleEpochRefused", "an assignment of an older epoch came", now)
		}
		r.tell(task.Tick(r.assignment, r.state, now), now)
	}
	for _, o := range inbox {
		if f, ok := o.(task.Finished); ok {
			delete(r.cancels, f.Action.Container)
		}
		r.observe(o, now)
		if f, ok := o.(task.Finished); ok && f.Action.Kind == task.Start && f.Err == nil {
			r.watch(r.a.ctx, f.Action.Container, f.Action.Attempt)
		}
	}
}

// merge takes over what came. A stop is never taken back, and happens by the spec
// that is held. A spec with the same containers replaces it, be it that of another
// revision: the cluster sends it where nothing needs a restart.
func merge(held, came *nodev1.Assignment) *nodev1.Assignment {
	out := proto.CloneOf(came)
	if came.GetStop() || held.GetStop() || !sameContainers(held.GetSpec(), came.GetSpec()) {
		out.Spec, out.Volumes, out.Devices = held.GetSpec(), held.GetVolumes(), held.GetDevices()
	}
	if held.GetStop() && !came.GetStop() {
		out.Stop, out.StopReason = true, held.GetStopReason()
	}
	return out
}

func sameContainers(a, b *portolanv1.WorkloadSpec) bool {
	same := func(x, y *portolanv1.Container) bool { return proto.Equal(x, y) }
	return a.GetKind() == b.GetKind() && a.GetGateway() == b.GetGateway() &&
		slices.EqualFunc(a.GetInitContainers(), b.GetInitContainers(), same) && slices.EqualFunc(a.GetContainers(), b.GetContainers(), same)
}

// decide begins all that is to be begun now.
func (r *runner) decide(ctx context.Context, now time.Time) task.Decision {
	for {
		d := task.Next(r.assignment, r.state, now)
		if d.Action.Kind == task.None || ctx.Err() != nil {
			return d
		}
		r.observe(task.Began{Action: d.Action}, now)
		r.begin(ctx, d.Action)
	}
}

func (r *runner) begin(ctx context.Context, act task.Action) {
	if act.Kind == task.Cancel {
		if cancel := r.cancels[act.Container]; cancel != nil {
			cancel()
		}
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	if act.Kind != task.Probe {
		r.cancels[act.Container] = cancel
	}
	as := r.assignment
	r.a.group.Go(func() {
		defer cancel()
		f := r.execute(ctx, as, act)
		f.Action = act
		r.post(f)
	})
}

func (r *runner) wait(ctx context.Context, at time.Time) bool {
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(time.Until(at))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-r.wake:
	case <-timer:
	}
	return true
}

func (r *runner) persist() {
	b, err := encodeTask(r.assignment, r.state)
	if err == nil && !bytes.Equal(b, r.written) {
		err = writeFile(r.a.taskPath(r.id), b, false)
	}
	if err != nil {
		r.a.log.Error("task not written", "allocation", r.id, "error", err)
		return
	}
	r.written = b
}

// forget is the end: the files go, the cluster hears.
func (r *runner) forget() {
	_ = os.RemoveAll(r.a.path("logs", r.id))
	if err := os.Remove(r.a.taskPath(r.id)); err != nil {
		r.a.log.Error("task file not removed", "allocation", r.id, "error", err)
	}
	r.a.mu.Lock()
	if r.a.runners[r.id] == r {
		delete(r.a.runners, r.id)
	}
	r.a.mu.Unlock()
	r.a.board.event(r.object(), "Removed", "nothing of it is left on the node", time.Now())
	r.a.board.forget(r.id)
}

// watch waits for the end of an instance, across crashes of the engine.
func (r *runner) watch(ctx context.Context, container string, attempt int) {
	id := engineID(r.id, container, attempt)
	r.a.mu.Lock()
	r.a.live[id] = liveInstance{r, container, attempt}
	r.a.mu.Unlock()
	r.a.group.Go(func() {
		defer func() {
			r.a.mu.Lock()
			delete(r.a.live, id)
			r.a.mu.Unlock()
		}()
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			x, err := r.a.cfg.Engine.Wait(ctx, id)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				r.post(task.Ended{Container: container, Attempt: attempt, Exit: *exitOf(&x)})
				return
			case api.KindOf(err) == api.NotFound:
				r.post(task.Ended{Container: container, Attempt: attempt, Exit: task.Exit{Code: 255, Time: time.Now()}, Lost: true})
				return
			}
			r.a.log.Warn("waiting for a container failed; trying again", "id", id, "error", err)
			if !sleep(ctx, wait) {
				return
			}
		}
	})
}

// reassert brings the replica's network about again.
func (r *runner) reassert(ctx context.Context) {
	r.mu.Lock()
	as := r.assignment
	r.mu.Unlock()
	r.netMu.Lock()
	defer r.netMu.Unlock()
	if r.netGone || r.attachment.NetNS == "" || as.GetStop() {
		return
	}
	if _, err := r.a.cfg.Network.Ensure(ctx, replicaOf(as)); err != nil && ctx.Err() == nil {
		r.a.log.Error("network of replica not re-asserted", "allocation", r.id, "error", err)
	}
}

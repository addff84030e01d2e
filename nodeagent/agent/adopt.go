package agent

import (
	"context"
	"strconv"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// Labels that containers carry, so that they can be told apart after a crash of
// the agent.
const (
	labelAllocation = "portolan.io/allocation"
	labelContainer  = "portolan.io/container"
	labelAttempt    = "portolan.io/attempt"
	labelTenant     = "portolan.io/tenant"
	labelWorkload   = "portolan.io/workload"
)

// adoptLoop asks the engine, until it answers, what runs; then the runners go.
func (a *Agent) adoptLoop(ctx context.Context) error {
	for wait := 100 * time.Millisecond; ; wait = min(wait*2, 5*time.Second) {
		all, err := a.cfg.Engine.List(ctx)
		if err == nil {
			a.adopt(ctx, all)
			return nil
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to end
		}
		a.log.Warn("engine is away", "error", err)
		if !sleep(ctx, a.jittered(wait)) {
			return nil
		}
	}
}

func (a *Agent) adopt(ctx context.Context, all []engine.Container) {
	by := map[string][]engine.Container{}
	for _, c := range all {
		by[c.Labels[labelAllocation]] = append(by[c.Labels[labelAllocation]], c)
	}
	// What carries no allocation cannot be anybody's.
	for _, c := range by[""] {
		if err := a.cfg.Engine.Delete(ctx, c.ID); err != nil {
			a.log.Error("leftover container not deleted", "id", c.ID, "error", err)
		}
	}
	delete(by, "")
	a.mu.Lock()
	defer a.mu.Unlock()
	a.adopted = true
	for id, cs := range by {
		if r := a.runners[id]; r != nil {
			r.found = cs
		} else {
			a.orphans[id] = cs
		}
	}
	for _, r := range a.runners {
		a.launch(r)
	}
	if a.fresh {
		a.adoptOrphans()
	}
	a.log.Info("took over what runs", "allocations", len(by), "tasks", len(a.runners), "orphans", len(a.orphans))
}

// adoptOrphans ends, in order, what the engine or an earlier agent left of
// allocations that nobody assigned; the lock is held and the generation is fresh.
func (a *Agent) adoptOrphans() {
	if !a.adopted {
		return
	}
	for id, cs := range a.orphans {
		as := &nodev1.Assignment{
			Allocation: id, Tenant: cs[0].Labels[labelTenant], Workload: cs[0].Labels[labelWorkload],
			Stop: true, StopReason: "no longer assigned to this node", Spec: &portolanv1.WorkloadSpec{},
		}
		seen := map[string]bool{}
		for _, c := range cs {
			if name := c.Labels[labelContainer]; !seen[name] {
				seen[name] = true
				as.Spec.Containers = append(as.Spec.Containers, &portolanv1.Container{Name: name})
			}
		}
		delete(a.orphans, id)
		a.addRunner(as, nil, cs)
	}
	ctx := a.ctx
	a.group.Go(func() { a.sweep(ctx) })
}

// sweep removes namespaces and proxies that belong to no allocation here.
func (a *Agent) sweep(ctx context.Context) {
	nets, err := a.cfg.Network.List(ctx)
	if err != nil {
		a.log.Error("replica networks cannot be listed", "error", err)
	}
	for _, id := range nets {
		if !a.known(id) {
			if err := a.cfg.Network.Remove(ctx, id); err != nil {
				a.log.Error("leftover network not removed", "allocation", id, "error", err)
			}
		}
	}
	proxies, err := a.cfg.Proxies.List(ctx)
	if err != nil {
		a.log.Error("proxies cannot be listed", "error", err)
	}
	for _, id := range proxies {
		if !a.known(id) {
			if err := a.cfg.Proxies.Stop(ctx, id); err != nil {
				a.log.Error("leftover proxy not stopped", "allocation", id, "error", err)
			}
		}
	}
}

func (a *Agent) known(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.runners[id] != nil
}

// instances gives the newest of each container, and those that are older.
func instances(found []engine.Container) (newest []task.Instance, older []string) {
	best := map[string]engine.Container{}
	for _, c := range found {
		name := c.Labels[labelContainer]
		b, ok := best[name]
		if ok && attemptOf(b) >= attemptOf(c) {
			older = append(older, c.ID)
			continue
		}
		if ok {
			older = append(older, b.ID)
		}
		best[name] = c
	}
	for name, c := range best {
		in := task.Instance{Container: name, Attempt: attemptOf(c), Pid: c.Pid, StartedAt: c.StartedAt}
		switch c.State {
		case engine.Running:
		case engine.Exited:
			in.Exit = exitOf(c.Exit)
		default:
			// Half-made: it never ran.
			older = append(older, c.ID)
			continue
		}
		newest = append(newest, in)
	}
	return newest, older
}

func attemptOf(c engine.Container) int {
	n, _ := strconv.Atoi(c.Labels[labelAttempt])
	return n
}

func exitOf(x *engine.Exit) *task.Exit {
	if x == nil {
		return &task.Exit{Code: 255}
	}
	return &task.Exit{Code: x.Code, Time: x.Time, OOM: x.OOM, MemoryBytes: x.MemoryBytes}
}

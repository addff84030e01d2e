package agent

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/task"
)

const (
	shortAction = 30 * time.Second // bound of anything but a pull
	longAction  = 15 * time.Minute
	drainBound  = 10 * time.Second
	defaultPids = 1024
	tmpfsBytes  = 64 << 20
)

func engineID(allocation, container string, attempt int) string {
	return allocation + "." + container + "." + strconv.Itoa(attempt)
}

// execute carries out one action; it may take its time.
func (r *runner) execute(ctx context.Context, as *nodev1.Assignment, act task.Action) task.Finished {
	bound := shortAction
	switch act.Kind {
	case task.Pull:
		bound = longAction
	case task.PreStop:
		bound = task.Grace(as) + drainBound
	case task.Drain:
		bound = drainBound
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	f, err := r.do(ctx, as, act)
	if err != nil {
		f.Err = faultOf(ctx, err)
		if act.Kind != task.Probe {
			r.a.log.Warn("action failed", "allocation", r.id, "action", string(act.Kind), "container", act.Container, "error", err)
		}
	}
	return f
}

func faultOf(ctx context.Context, err error) *task.Fault {
	kind := api.KindOf(err)
	if context.Cause(ctx) == context.Canceled { //nolint:errorlint // Cause gives it bare
		kind = api.Canceled
	}
	msg := err.Error()
	if len(msg) > 512 {
		msg = msg[:512] + "…"
	}
	return &task.Fault{Kind: kind, Message: msg}
}

func (r *runner) do(ctx context.Context, as *nodev1.Assignment, act task.Action) (f task.Finished, err error) {
	eng := r.a.cfg.Engine
	c := task.ContainerSpec(as, act.Container)
	id := engineID(r.id, act.Container, act.Attempt)
	switch act.Kind {
	case task.Sign:
		f.RenewAt, err = r.a.sign(ctx, r.id)
	case task.Network:
		err = r.ensureNetwork(ctx, as)
	case task.Proxy:
		err = r.startProxy(ctx, as)
	case task.Pull:
		_, err = eng.Pull(ctx, imageOf(c))
	case task.Start:
		f.Pid, f.At, err = r.start(ctx, as, c, act)
	case task.Probe:
		p := task.ProbeSpec(c, act.Probe)
		pctx, cancel := context.WithTimeout(ctx, task.ProbeTimeout(p))
		defer cancel()
		err = r.probe(pctx, id, p)
	case task.PreStop:
		err = r.preStop(ctx, id, c.GetPreStop())
	case task.Signal:
		err = eng.Signal(ctx, id, act.Signal, act.Signal == 9)
		if k := api.KindOf(err); err != nil && (k == api.NotFound || k == api.Precondition) {
			err = nil // it ended meanwhile; Wait tells
		}
	case task.Delete:
		err = eng.Delete(ctx, id)
	case task.Drain:
		err = r.a.cfg.Proxies.Drain(ctx, r.id)
	case task.StopProx:
		err = r.a.cfg.Proxies.Stop(ctx, r.id)
	case task.Remove:
		err = r.remove(ctx, as)
	default: // Cancel begins nothing
	}
	return f, err
}

func replicaOf(as *nodev1.Assignment) network.Replica {
	addr, _ := netip.ParseAddr(as.GetAddress()) // checked when it came
	return network.Replica{Allocation: as.GetAllocation(), Tenant: as.GetTenant(), Address: addr, Capture: true}
}

func (r *runner) ensureNetwork(ctx context.Context, as *nodev1.Assignment) error {
	r.netMu.Lock()
	defer r.netMu.Unlock()
	at, err := r.a.cfg.Network.Ensure(ctx, replicaOf(as))
	if err == nil {
		r.attachment = at
	}
	return err
}

func (r *runner) attached() network.Attachment {
	r.netMu.Lock()
	defer r.netMu.Unlock()
	return r.attachment
}

func (r *runner) startProxy(ctx context.Context, as *nodev1.Assignment) error {
	dir := r.a.runPath("proxies", r.id)
	role := "sidecar"
	switch as.GetSpec().GetGateway() {
	case portolanv1.GatewayKind_GATEWAY_KIND_INGRESS:
		role = "ingress"
	case portolanv1.GatewayKind_GATEWAY_KIND_EAST_WEST:
		role = "eastwest"
	case portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED:
	}
	r.a.mu.Lock()
	cfg := r.a.config
	r.a.mu.Unlock()
	if cfg == nil {
		// With other metadata a proxy that runs would be restarted: wait.
		return api.E(api.Unavailable, "start proxy "+r.id, "the cluster's configuration of this node has not come yet")
	}
	return r.a.cfg.Proxies.Start(ctx, proxy.Spec{
		ID: r.id, NetNS: r.attached().NetNS, XDSSocket: filepath.Join(dir, "xds.sock"), Dir: dir, Role: role,
		Cluster: cfg.GetCluster(), Region: cfg.GetRegion(), Zone: cfg.GetZone(), Node: r.a.cfg.Node,
		Tenant: as.GetTenant(), Workload: as.GetWorkload(), Revision: as.GetRevision(),
	})
}

// start makes and starts one instance.
func (r *runner) start(ctx context.Context, as *nodev1.Assignment, c *portolanv1.Container, act task.Action) (int, time.Time, error) {
	spec, err := r.spec(as, c, act.Attempt)
	if err != nil {
		return 0, time.Time{}, err
	}
	if err := r.pruneLogs(act.Container, act.Attempt); err != nil {
		return 0, time.Time{}, err
	}
	eng := r.a.cfg.Engine
	err = eng.Create(ctx, spec)
	if err != nil && api.KindOf(err) == api.Exists {
		// An earlier agent died in the middle of this very start.
		if err = eng.Delete(ctx, spec.ID); err == nil {
			err = eng.Create(ctx, spec)
		}
	}
	if err != nil {
		return 0, time.Time{}, err
	}
	pid, err := eng.Start(ctx, spec.ID)
	return pid, time.Now(), err
}

// limits of a container.
type limits struct {
	cpu, request, memory, pids int64
}

func limitsOf(c *portolanv1.Container) (limits, error) {
	var l limits
	var err error
	if l.cpu, err = api.ParseCPU(c.GetLimits().GetCpu()); err != nil {
		return l, fmt.Errorf("limits.cpu: %w", err)
	}
	if l.request, err = api.ParseCPU(c.GetRequests().GetCpu()); err != nil {
		return l, fmt.Errorf("requests.cpu: %w", err)
	}
	if l.request == 0 {
		l.request = l.cpu
	}
	if l.memory, err = api.ParseBytes(c.GetLimits().GetMemory()); err != nil {
		return l, fmt.Errorf("limits.memory: %w", err)
	}
	if l.pids = int64(c.GetLimits().GetPids()); l.pids == 0 {
		l.pids = defaultPids
	}
	return l, nil
}

func (r *runner) spec(as *nodev1.Assignment, c *portolanv1.Container, attempt int) (engine.Spec, error) {
	name := task.ContainerName(c)
	l, err := limitsOf(c)
	if err != nil {
		return engine.Spec{}, api.E(api.Invalid, "start container "+name, "%w", err)
	}
	at := r.attached()
	spec := engine.Spec{
		ID: engineID(r.id, name, attempt), Image: imageOf(c),
		Labels: map[string]string{
			labelAllocation: r.id, labelContainer: name, labelAttempt: strconv.Itoa(attempt),
			labelTenant: as.GetTenant(), labelWorkload: as.GetWorkload(),
		},
		Command: c.GetCommand(), Args: c.GetArgs(), Env: r.env(as, c), WorkingDir: c.GetWorkingDir(), Hostname: r.id,
		NetNS: at.NetNS, Mounts: r.mounts(at), Tmpfs: c.GetTmpfs(), TmpfsBytes: tmpfsBytes,
		CPUMilli: l.cpu, CPURequest: l.request, MemoryBytes: l.memory, Pids: l.pids,
		CgroupParent: r.a.cfg.CgroupParent, LogPath: r.a.logPath(r.id, name, attempt), Group: r.id,
		AddCapabilities: capabilities(c),
	}
	if u := c.GetRunAsUser(); u != 0 {
		uid, gid := uint32(u), uint32(c.GetRunAsGroup())
		if gid == 0 {
			gid = uid
		}
		spec.UID, spec.GID = &uid, &gid
	}
	return spec, nil
}

// capabilities in the kernel's names.
func capabilities(c *portolanv1.Container) []string {
	var out []string
	for _, name := range c.GetAddCapabilities() {
		out = append(out, "CAP_"+strings.TrimPrefix(name, "CAP_"))
	}
	return out
}

// env is the user's, and before it what every replica is told of itself.
func (r *runner) env(as *nodev1.Assignment, c *portolanv1.Container) []string {
	r.a.mu.Lock()
	cfg := r.a.config
	r.a.mu.Unlock()
	env := []string{
		"PORTOLAN_TENANT=" + as.GetTenant(), "PORTOLAN_WORKLOAD=" + as.GetWorkload(), "PORTOLAN_REVISION=" + as.GetRevision(),
		"PORTOLAN_REPLICA=" + r.id, "PORTOLAN_CLUSTER=" + cfg.GetCluster(), "PORTOLAN_REGION=" + cfg.GetRegion(),
		"PORTOLAN_ZONE=" + cfg.GetZone(), "SPIFFE_ENDPOINT_SOCKET=unix:///run/spiffe/workload.sock",
	}
	for _, k := range slices.Sorted(maps.Keys(c.GetEnv())) {
		env = append(env, k+"="+c.GetEnv()[k])
	}
	return env
}

func (r *runner) mounts(at network.Attachment) []engine.Mount {
	dir := r.a.runPath("workload", r.id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.a.log.Error("directory of the workload socket not made", "allocation", r.id, "error", err)
	}
	out := []engine.Mount{{Source: dir, Target: "/run/spiffe", ReadOnly: true}}
	if at.Dir != "" {
		out = append(out,
			engine.Mount{Source: filepath.Join(at.Dir, "resolv.conf"), Target: "/etc/resolv.conf", ReadOnly: true},
			engine.Mount{Source: filepath.Join(at.Dir, "hosts"), Target: "/etc/hosts", ReadOnly: true})
	}
	return out
}

// remove takes away namespace, identity and sockets.
func (r *runner) remove(ctx context.Context, as *nodev1.Assignment) error {
	r.netMu.Lock()
	defer r.netMu.Unlock()
	r.netGone = true
	if !task.IsGateway(as) {
		if err := r.a.cfg.Network.Remove(ctx, r.id); err != nil {
			return err
		}
	}
	for _, d := range []string{r.a.runPath("identity", r.id), r.a.runPath("workload", r.id), r.a.runPath("proxies", r.id)} {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	r.a.pokeWarden()
	return nil
}

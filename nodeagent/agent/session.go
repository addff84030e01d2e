package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/task"
	"github.com/portolan-io/portolan/xds/distribute"
)

// generation is what of a generation concerns the agent.
type generation struct {
	watermark   *nodev1.Watermark
	config      *nodev1.NodeConfig
	peers       []*nodev1.NodePeer
	assignments map[string]*nodev1.Assignment
}

// decode reads a generation. The error joins what did not parse; the rest is
// usable.
func decode(g distribute.Generation) (generation, error) {
	out := generation{assignments: map[string]*nodev1.Assignment{}}
	var errs []error
	for name, r := range g.Resources {
		d := &nodev1.Directive{}
		if err := r.Body.UnmarshalTo(d); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		switch b := d.GetBody().(type) {
		case *nodev1.Directive_Assignment:
			out.assignments[b.Assignment.GetAllocation()] = b.Assignment
		case *nodev1.Directive_Config:
			out.config = b.Config
		case *nodev1.Directive_Peer:
			out.peers = append(out.peers, b.Peer)
		}
	}
	slices.SortFunc(out.peers, func(x, y *nodev1.NodePeer) int { return strings.Compare(x.GetNode(), y.GetNode()) })
	if g.Watermark != nil {
		d := &nodev1.Directive{}
		if err := g.Watermark.Body.UnmarshalTo(d); err != nil {
			errs = append(errs, fmt.Errorf("watermark: %w", err))
		}
		out.watermark = d.GetWatermark()
	}
	return out, errors.Join(errs...)
}

var (
	allocationPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	imagePattern      = regexp.MustCompile(`^[^\s@]+@sha256:[0-9a-f]{64}$`)
)

// check is what the agent accepts from the cluster: what is refused here is
// quarantined alone, and the cluster hears the field.
func check(r *distribute.Resource) error {
	d := &nodev1.Directive{}
	if err := r.Body.UnmarshalTo(d); err != nil {
		return fmt.Errorf("body: %w", err)
	}
	switch b := d.GetBody().(type) {
	case *nodev1.Directive_Assignment:
		if r.Name != "assignment/"+b.Assignment.GetAllocation() {
			return fmt.Errorf("assignment.allocation: %q does not match the name", b.Assignment.GetAllocation())
		}
		return checkAssignment(b.Assignment)
	case *nodev1.Directive_Peer:
		if _, err := route(b.Peer); err != nil {
			return err
		}
	}
	return nil
}

func checkAssignment(a *nodev1.Assignment) error {
	// It becomes part of paths.
	if !allocationPattern.MatchString(a.GetAllocation()) {
		return fmt.Errorf("assignment.allocation: %q is no allocation ID", a.GetAllocation())
	}
	for field, v := range map[string]string{"tenant": a.GetTenant(), "workload": a.GetWorkload()} {
		if _, err := api.ParseID(v); err != nil {
			return fmt.Errorf("assignment.%s: %w", field, err)
		}
	}
	if a.GetSpec() == nil {
		return errors.New("assignment.spec: is missing")
	}
	if task.IsGateway(a) {
		if a.GetTenant() != api.SystemTenant {
			return fmt.Errorf("assignment.spec.gateway: only tenant %q has gateways", api.SystemTenant)
		}
		return nil
	}
	if _, err := netip.ParseAddr(a.GetAddress()); err != nil {
		return fmt.Errorf("assignment.address: %w", err)
	}
	if len(a.GetSpec().GetContainers()) == 0 {
		return errors.New("assignment.spec.containers: there is none")
	}
	seen := map[string]bool{}
	for _, c := range slices.Concat(a.GetSpec().GetInitContainers(), a.GetSpec().GetContainers()) {
		if err := checkContainer(c, seen); err != nil {
			return fmt.Errorf("assignment.spec container %q: %w", task.ContainerName(c), err)
		}
	}
	return nil
}

func checkContainer(c *portolanv1.Container, seen map[string]bool) error {
	name := task.ContainerName(c)
	if !allocationPattern.MatchString(name) || seen[name] {
		return errors.New("name: not valid or not unique")
	}
	seen[name] = true
	if !imagePattern.MatchString(imageOf(c)) {
		return fmt.Errorf("resolved_image: %q has no digest", imageOf(c))
	}
	if c.GetRunAsUser() == network.ProxyUID || c.GetRunAsGroup() == network.ProxyGID {
		return fmt.Errorf("run_as_user: %d is reserved for proxies", network.ProxyUID)
	}
	if err := engine.CheckCapabilities(capabilities(c)); err != nil {
		return fmt.Errorf("add_capabilities: %w", err)
	}
	if _, err := limitsOf(c); err != nil {
		return err
	}
	return nil
}

func imageOf(c *portolanv1.Container) string {
	if c.GetResolvedImage() != "" {
		return c.GetResolvedImage()
	}
	return c.GetImage()
}

// commit makes a generation durable, then takes it over. The warden reads the
// same disk.
func (a *Agent) commit(good *distribute.LastGood, g distribute.Generation) error {
	gen, err := decode(g)
	if err != nil {
		return err
	}
	if err := good.Save(g, nil); err != nil {
		return err
	}
	a.pokeWarden()
	a.takeOver(gen, true)
	return nil
}

// takeOver makes the runners follow a generation. Only a generation that came
// from the cluster in this process may end what it does not name.
func (a *Agent) takeOver(gen generation, fresh bool) {
	a.mu.Lock()
	a.config, a.peers = gen.config, gen.peers
	for id, as := range gen.assignments {
		switch r := a.runners[id]; {
		case r != nil:
			r.assign(as)
		case as.GetStop() && a.adopted && !a.holds(id):
			// It ended before; the cluster has not heard yet.
			a.board.forget(id)
		default:
			a.addRunner(as, nil, nil)
		}
	}
	if fresh {
		a.fresh = true
		for id, r := range a.runners {
			if gen.assignments[id] == nil {
				r.stop("no longer assigned to this node")
			}
		}
		a.adoptOrphans()
	}
	ctx := a.ctx
	a.mu.Unlock()
	if fresh {
		a.routes(ctx)
	}
	if gen.watermark != nil {
		a.board.setOwn(gen.watermark)
	}
}

// holds says whether the engine has something of an allocation that has no
// runner; the lock is held.
func (a *Agent) holds(id string) bool { return len(a.orphans[id]) > 0 }

func route(p *nodev1.NodePeer) (network.Route, error) {
	cidr, err := netip.ParsePrefix(p.GetReplicaCidr())
	if err != nil {
		return network.Route{}, fmt.Errorf("peer.replica_cidr: %w", err)
	}
	via, err := netip.ParseAddr(p.GetAddress())
	if err != nil {
		return network.Route{}, fmt.Errorf("peer.address: %w", err)
	}
	return network.Route{CIDR: cidr, Via: via}, nil
}

// routes brings about the routes to peers, once something is known of them.
func (a *Agent) routes(ctx context.Context) {
	a.mu.Lock()
	peers, known := a.peers, a.config != nil
	a.mu.Unlock()
	if !known {
		return
	}
	var out []network.Route
	for _, p := range peers {
		if r, err := route(p); err == nil && p.GetNode() != a.cfg.Node {
			out = append(out, r)
		}
	}
	if err := a.cfg.Network.Routes(ctx, out); err != nil && ctx.Err() == nil {
		a.log.Error("routes to peers failed", "error", err)
	}
}

// upward gets the node an identity, then holds session and link.
func (a *Agent) upward(ctx context.Context, good *distribute.LastGood, known *distribute.Generation) error {
	if err := a.enroll(ctx); err != nil {
		return err
	}
	consumer, err := distribute.NewConsumer(distribute.ConsumerConfig{
		NodeID: a.cfg.Node, TypeURL: api.DirectiveTypeURL, Known: known, Log: a.log, Rand: a.cfg.Rand,
		Dial: func(ctx context.Context) (distribute.Conn, error) {
			return a.cfg.Upstream.Dial(ctx, a.credentials())
		},
		Check:  check,
		Commit: func(_ context.Context, g distribute.Generation) error { return a.commit(good, g) },
	})
	if err != nil {
		return err
	}
	a.group.Go(func() { a.linkLoop(ctx) })
	a.group.Go(func() { _ = a.self.Run(ctx) }) // nil when ctx ends, and only then
	return consumer.Run(ctx)
}

// Package manager is the cluster's one loop: wake, snapshot, node leases, autoscale,
// reconcile, schedule, commit. It owns the records of nodes, allocations, volumes and
// what the cluster decides about workloads, the ranges of addresses and the ring of
// events; it never speaks to a node or to the
// federation.
//
// Concurrency: Run is one goroutine and the only writer of allocations.
// RegisterNode, RenewNode, SetMode, DeleteNode, Events and AddEvents may be called
// from any goroutine.
package manager

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// Waits of the loop.
const (
	// settleGrace is added to the node timeout after a restart, and after all nodes
	// were silent, before a node is called lost: nodes reconnect with backoff.
	settleGrace = 3 * time.Second
	retryMin    = 50 * time.Millisecond
	retryMax    = 5 * time.Second
	// maxPause bounds the rest between two passes that come one after the other.
	maxPause = 100 * time.Millisecond
)

// Config of a Manager.
type Config struct {
	Store state.Store
	// Cluster is the ID of the cluster.
	Cluster string
	// CIDR from which a /24 is cut for each node, beginning with the second.
	CIDR string
	// NodeTimeout is how long a node may be silent; 3 s when 0.
	NodeTimeout time.Duration
	// Overhead of a replica beside its containers; schedule.DefaultOverhead when nil.
	Overhead *api.Resources
	// MaxEvents bounds the ring of events; 2,000 when 0.
	MaxEvents int
	// Now gives the time; time.Now when nil.
	Now func() time.Time
	// Seed of names and of ties between nodes.
	Seed uint64
	// Log is where decisions are written; discarded when nil.
	Log *slog.Logger
}

// SetDefaults fills in what is absent.
func (c *Config) SetDefaults() {
	if c.NodeTimeout == 0 {
		c.NodeTimeout = 3 * time.Second
	}
	if c.Overhead == nil {
		o := schedule.DefaultOverhead
		c.Overhead = &o
	}
	if c.MaxEvents == 0 {
		c.MaxEvents = 2000
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate says all that is wrong.
func (c *Config) Validate() error {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("a store is required"))
	}
	if _, err := api.ParseID(c.Cluster); err != nil {
		errs = append(errs, fmt.Errorf("cluster: %w", err))
	}
	if c.NodeTimeout < 0 || c.MaxEvents < 0 {
		errs = append(errs, errors.New("node timeout and number of events must not be negative"))
	}
	if p, err := netip.ParsePrefix(c.CIDR); err != nil {
		errs = append(errs, fmt.Errorf("cidr: %w", err))
	} else if !p.Addr().Is4() || p.Bits() > 23 {
		errs = append(errs, fmt.Errorf("cidr %s: an IPv4 range of at least two /24 is required", c.CIDR))
	}
	return errors.Join(errs...)
}

// Manager implements the loop.
type Manager struct {
	cfg    Config
	cidr   netip.Prefix
	events *ring

	// register serialises the choice of address ranges.
	register sync.Mutex

	// What follows belongs to Run.
	rand *rand.Rand
	// start is when Run began, and graceUntil before when no node is judged.
	start, graceUntil time.Time
	// dark says that every node is silent.
	dark bool
	// mirror is the scheduler's table; waiting are the groups that need nodes, by key.
	mirror  *mirror
	waiting map[string]*waiting
	// allowances are how many replicas might be displaced at the last pass.
	allowances map[reconcile.Key]int
	// misfits no longer have their place, as of the last change of nodes or pools.
	misfits       []reconcile.Move
	nextRebalance time.Time
	wanted        map[string]state.PoolWish
	nextGrowth    time.Time
	scaled        map[reconcile.Key]scaling
	learnt        learnt
	halted        map[reconcile.Key]reconcile.Note
	pending       map[string]bool
}

// streamOf makes clusters draw different names, also from the same seed: a
// replica's name is asked for over the whole fleet.
func streamOf(cluster string) uint64 {
	h := fnv.New64a()
	_, _ = io.WriteString(h, cluster)
	return h.Sum64()
}

// New makes a manager; Run starts it.
func New(cfg Config) (*Manager, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, api.E(api.Invalid, "configure the manager", "%w", err)
	}
	return &Manager{
		cfg: cfg, cidr: netip.MustParsePrefix(cfg.CIDR).Masked(), events: newRing(cfg.MaxEvents), rand: rand.New(rand.NewPCG(cfg.Seed, streamOf(cfg.Cluster))),
		mirror: newMirror(cfg.Seed, *cfg.Overhead), waiting: map[string]*waiting{}, scaled: map[reconcile.Key]scaling{}, learnt: learnt{profiles: map[reconcile.Key]*profile{}},
		halted: map[reconcile.Key]reconcile.Note{}, pending: map[string]bool{},
	}, nil
}

// Run blocks until ctx is done or the store is closed.
func (m *Manager) Run(ctx context.Context) error {
	m.start = m.cfg.Now()
	m.graceUntil = m.start.Add(m.cfg.NodeTimeout + settleGrace)
	backoff := retryMin
	for ctx.Err() == nil {
		began := time.Now()
		s := m.cfg.Store.Snapshot()
		next, err := m.pass(ctx, s)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // Run ends with nil when its context does
		case err == nil:
			backoff = retryMin
		case api.KindOf(err) == api.Conflict && m.cfg.Store.Snapshot() != s:
			continue // decided on what is no longer so
		default:
			if m.cfg.Store.Ping(ctx) != nil {
				m.cfg.Log.Error("state cannot be written", "error", err)
			} else {
				m.cfg.Log.Warn("pass failed", "error", err)
			}
			m.sleep(ctx, backoff/2+time.Duration(m.rand.Int64N(int64(backoff/2)+1)))
			backoff = min(2*backoff, retryMax)
			continue
		}
		// As much rest as work: a flood of reports cannot take the whole machine.
		m.sleep(ctx, min(time.Since(began), maxPause))
		if err := m.wait(ctx, s.Generation, next); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// wait returns at the next change or at a time, nil in both cases and when ctx
// is done.
func (m *Manager) wait(ctx context.Context, after int64, next time.Time) error {
	until := ctx
	if !next.IsZero() {
		var cancel context.CancelFunc
		until, cancel = context.WithTimeout(ctx, max(next.Sub(m.cfg.Now()), time.Millisecond))
		defer cancel()
	}
	err := m.cfg.Store.Wait(until, after)
	if err != nil && until.Err() == nil {
		return err
	}
	return nil
}

// pass does what is to do on one snapshot, and says when time alone calls for
// the next.
func (m *Manager) pass(ctx context.Context, s *state.Snapshot) (time.Time, error) {
	now := m.cfg.Now()
	leases := m.leases(s, now)
	if len(leases.put) > 0 {
		if err := m.cfg.Store.Commit(ctx, state.Change{Base: s.Generation, PutNodes: leases.put}); err != nil {
			return time.Time{}, err
		}
		m.AddEvents(leases.events...)
		return now, nil // its own commit wakes the next pass
	}
	m.noteDark(leases.dark, now)
	if m.dark {
		// A mere sign of life wakes nobody: look for it.
		return now.Add(m.cfg.NodeTimeout / 10), nil
	}
	next, err := m.plan(ctx, s, now)
	return earlier(leases.next, next), err
}

// plan decides what should run and where, and writes it.
func (m *Manager) plan(ctx context.Context, s *state.Snapshot, now time.Time) (time.Time, error) {
	begins := m.mirror.last == nil
	m.mirror.follow(s, func(n *clusterv1.Node) schedule.Code { return m.notReady(s, n, now) })
	if begins {
		m.mirror.observeBound()
	}
	in := s.Input(now)
	scale := m.scale(s, &in, now)
	m.learn(s, &in, now, &scale)
	in.Moves = m.moves(s, now)
	plan := reconcile.Reconcile(in)
	d := m.decide(s, plan, scale.states, now)
	if d.change.Settled = s.IntentRevision; !d.change.Empty() || s.Settled < s.IntentRevision {
		if err := m.cfg.Store.Commit(ctx, d.change); err != nil {
			// What was decided is not so: whoever waits is looked at again.
			m.mirror.queue = schedule.NewQueue(maxWaiting)
			return time.Time{}, err
		}
	}
	for _, do := range d.committed {
		do()
	}
	m.scaled = scale.looked
	for _, p := range scale.saved {
		p.saved = now
	}
	m.mirror.sweep(m.waiting)
	pending := m.pendingNow()
	m.cfg.Store.SetPending(pending)
	m.cfg.Store.SetNotes(state.Notes{Wishes: m.wishes(s, now), Blocked: blocked(s, plan.Draining), Waiting: waitingNotes(plan.Waiting), Requests: m.learnt.advice, Scaling: scalingNotes(m.scaled)})
	m.AddEvents(scale.events...)
	m.AddEvents(d.events...)
	m.noteHalted(plan.Halted, now)
	m.notePending(pending, now)
	next := earlier(earlier(scale.next, plan.Next), d.next)
	return earlier(next, earlier(m.nextRebalance, earlier(m.nextGrowth, m.learnt.next))), nil
}

// earlier gives the earlier of two times; zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// Package control decides where workloads run: it follows the store, asks
// federation/place, checks the answer again and commits it. It is the one writer
// of Placement records with the reservations in them and of Rollout records; it
// writes nothing else and speaks to no cluster.
//
// Any number of replicas may run; the one that holds the lease decides, under an
// epoch that each of its transactions checks. The others follow and take over
// when the lease expires.
//
// Concurrency: Run is called once and owns all state; Explain is safe from
// anywhere.
package control

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// PlaceLease is the lease of the placing loop. Its progress is the revision that
// the loop has looked past: what followed from it is committed.
const PlaceLease = "control/place"

// Config of a Control.
type Config struct {
	// Store holds everything. Required.
	Store store.Store
	// Holder names this replica in the lease; a mark of this life is added to it.
	// Required.
	Holder string
	// Log gets what no record shows. Required.
	Log *slog.Logger
	// LeaseTTL is how long a silent holder keeps the lease; 3 s when 0. It is
	// renewed every third of that.
	LeaseTTL time.Duration
	// MaxBatch is how many workloads are committed in one transaction; 200 when 0.
	MaxBatch int
}

// SetDefaults fills what is absent.
func (c *Config) SetDefaults() {
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 3 * time.Second
	}
	if c.MaxBatch == 0 {
		c.MaxBatch = 200
	}
}

// Validate returns all faults.
func (c *Config) Validate() error {
	var errs []error
	check := func(ok bool, message string) {
		if !ok {
			errs = append(errs, errors.New("control: "+message))
		}
	}
	check(c.Store != nil, "a store is required")
	check(c.Holder != "", "a holder is required")
	check(c.Log != nil, "a log is required")
	check(c.LeaseTTL > 0, "the lease's time to live must be positive")
	check(c.MaxBatch > 0, "the batch must be positive")
	return errors.Join(errs...)
}

// mirrored are the kinds that decisions depend on.
var mirrored = []store.Kind{
	store.Tenant, store.Cluster, store.Workload, store.Revision, store.Service, store.Route, store.Placement, store.Rollout, store.ClusterStatus, store.PlacementStatus,
}

// Control runs the loop.
type Control struct {
	cfg    Config
	mirror *store.Mirror
}

// New makes a Control; Run starts it.
func New(cfg Config) (*Control, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	// A successor of the same name must not be taken for its predecessor.
	cfg.Holder += "/" + uuid.NewString()[:8]
	return &Control{cfg: cfg, mirror: store.NewMirror(cfg.Store, mirrored)}, nil
}

// Run decides until ctx ends, and then gives the lease up and returns nil.
func (c *Control) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.mirror.Run(ctx) })
	g.Go(func() error {
		l := &loop{cfg: c.cfg, log: c.cfg.Log, mirror: c.mirror}
		l.reset()
		l.run(ctx)
		l.release(ctx)
		return nil
	})
	return g.Wait()
}

// callTimeout bounds one call of the store by the loop, so that a lease that was
// lost meanwhile is noticed.
func (l *loop) callTimeout() time.Duration { return max(l.cfg.LeaseTTL, 2*time.Second) }

// loop is the state of the placing loop, owned by its one goroutine.
type loop struct {
	cfg    Config
	log    *slog.Logger
	mirror *store.Mirror

	lease store.Lease
	renew time.Time // next renewal
	retry time.Time // next attempt after a failure; zero when there was none
	fails int

	// whatIf is what decisions read instead of the view when they are only thought of.
	whatIf source
	// view is what was taken in last; looked is the revision that is dealt with.
	view   *store.View
	looked int64
	all    bool // take everything in anew
	// frozen says that the last decision found everything dead.
	frozen bool
	dirty  map[string]bool
	ledger *ledger
	near   relations
	// short workloads wait for room; standing ones have replicas that stand in
	// for lost clusters; rolling ones are on the way to another template; due ones
	// are decided again at a time.
	short, standing, rolling map[string]bool
	due                      map[string]time.Time
}

func (l *loop) reset() {
	l.view, l.looked, l.all = nil, 0, true
	l.dirty, l.short, l.standing, l.rolling, l.due = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]time.Time{}
	l.ledger, l.near = newLedger(), newRelations()
}

// run wakes for new revisions, for the lease, for what is due, and after a
// failure; each time it looks at everything that may have changed.
func (l *loop) run(ctx context.Context) {
	for ctx.Err() == nil {
		_, changed := l.mirror.Next()
		l.step(ctx)
		wait := time.NewTimer(time.Until(l.nextWake()))
		select {
		case <-l.wakeOn(changed):
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

// wakeOn switches changes off for who is not to act on them.
func (l *loop) wakeOn(changed <-chan struct{}) <-chan struct{} {
	if !l.lease.Held || !l.retry.IsZero() {
		return nil
	}
	return changed
}

func (l *loop) nextWake() time.Time {
	at := l.renew
	if !l.lease.Held {
		return at
	}
	if !l.retry.IsZero() {
		return earlier(at, l.retry)
	}
	if len(l.dirty) > 0 {
		return time.Time{}
	}
	for _, t := range l.due {
		at = earlier(at, t)
	}
	return at
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// step is one turn: keep the lease, take in what is new, decide, tell how far.
func (l *loop) step(ctx context.Context) {
	now := time.Now()
	if !now.Before(l.renew) && !l.keepLease(ctx, now) || !l.lease.Held {
		return
	}
	if !l.retry.IsZero() && now.Before(l.retry) {
		return
	}
	v := l.mirror.Snapshot()
	if v.Revision < 0 {
		return
	}
	l.absorb(v)
	for name, t := range l.due {
		if !now.Before(t) {
			delete(l.due, name)
			l.dirty[name] = true
		}
	}
	if err := l.settle(ctx, now); err != nil {
		l.failed(ctx, err)
		return
	}
	l.retry, l.fails = time.Time{}, 0
	// A decision may have made room that others wait for; they come first.
	if len(l.dirty) == 0 && v.Revision > l.looked {
		l.looked = v.Revision
		l.keepLease(ctx, time.Now())
	}
}

// failed schedules another attempt, and forgets what was derived: it is read
// anew.
func (l *loop) failed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	if api.KindOf(err) == api.Conflict {
		l.log.Info("decision overtaken; deciding again", "error", err)
	} else {
		l.log.Warn("placement not stored", "error", err)
	}
	l.all = true
	l.fails = min(l.fails+1, 6)
	l.retry = time.Now().Add(10 * time.Millisecond << l.fails)
	l.renew = time.Now() // an epoch that is over shows there
}

// keepLease takes or renews the lease and tells the progress. It says whether
// the loop may go on.
func (l *loop) keepLease(ctx context.Context, now time.Time) bool {
	l.renew = now.Add(l.cfg.LeaseTTL / 3)
	cctx, cancel := context.WithTimeout(ctx, l.callTimeout())
	defer cancel()
	got, err := l.cfg.Store.Acquire(cctx, PlaceLease, l.cfg.Holder, l.cfg.LeaseTTL, l.looked)
	if err != nil {
		if ctx.Err() == nil {
			l.log.Warn("lease not renewed", "lease", PlaceLease, "error", err)
		}
		// Transactions check the epoch, so a holder may go on until the end.
		l.lease.Held = l.lease.Held && now.Before(l.lease.Expires)
		return l.lease.Held
	}
	before := l.lease
	l.lease = got
	switch {
	case !got.Held:
		if before.Held {
			l.log.Warn("lease lost", "lease", PlaceLease, "holder", got.Holder, "epoch", got.Epoch)
			l.reset()
		}
		return false
	case !before.Held || before.Epoch != got.Epoch:
		l.log.Info("lease taken", "lease", PlaceLease, "epoch", got.Epoch)
		l.reset()
		return l.catchUp(cctx)
	}
	return true
}

// catchUp waits until the mirror shows all that earlier holders committed. None
// of theirs can follow, because their epoch is over.
func (l *loop) catchUp(ctx context.Context) bool {
	rev, err := l.cfg.Store.View(ctx, func(store.Reader) error { return nil })
	if err == nil {
		_, err = l.mirror.Wait(ctx, rev)
	}
	if err != nil {
		l.log.Warn("the present state could not be read", "error", err)
		l.lease.Held = false // the next turn takes the lease in anew
		l.renew = time.Now().Add(100 * time.Millisecond)
		return false
	}
	return true
}

// release gives the lease up, so that another need not wait for its end.
func (l *loop) release(ctx context.Context) {
	if !l.lease.Held {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := l.cfg.Store.Release(ctx, PlaceLease, l.cfg.Holder); err != nil {
		l.log.Info("lease not given up; it expires by itself", "error", err)
	}
}

// Package link is a cluster's side towards the federation: it consumes intents
// and makes them the cluster's last good ones, reports a summary upward, and
// keeps a tunnel to every federation replica through which the cluster's own
// services are called. It dials; nothing of it listens. It decides nothing: the
// manager reads the intents from the state, the federation reads the reports.
//
// Concurrency: Run is called once and starts everything; Nacks are gathered from
// anywhere.
package link

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Pace of reports and reconnects.
const (
	DefaultNodeTimeout = 3 * time.Second
	keepalive          = 500 * time.Millisecond
	coalesce           = 10 * time.Millisecond
	ackTimeout         = 1500 * time.Millisecond
	minBackoff         = 50 * time.Millisecond
	maxBackoff         = time.Second
	maxNacks           = 100
)

// Config configures a Link.
type Config struct {
	State state.Store
	// Cluster is this cluster's ID, Fleet the fleet's trust domain.
	Cluster, Fleet string
	// Session fences older processes of this cluster: its start, in nanoseconds.
	Session int64
	// Addresses of the federation's replicas, in order of preference.
	Addresses []string
	// Dial opens a connection to one of them; Link closes it.
	Dial func(ctx context.Context, address string) (distribute.Conn, error)
	// Serve is what the federation may call through the tunnels; nil opens none.
	Serve *grpc.Server
	// Nacks gives refusals that others in this process know of, beside those in the
	// state; may be nil.
	Nacks func() []*linkv1.Nack
	// NodeTimeout bounds how long, after the start, the first full report waits for
	// the nodes to report; 3 s when 0.
	NodeTimeout time.Duration
	Log         *slog.Logger
	// Rand gives numbers in [0,1) for the jitter.
	Rand func() float64
}

// SetDefaults fills what was left out.
func (c *Config) SetDefaults() {
	if c.NodeTimeout <= 0 {
		c.NodeTimeout = DefaultNodeTimeout
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Rand == nil {
		c.Rand = rand.Float64
	}
	if c.Nacks == nil {
		c.Nacks = func() []*linkv1.Nack { return nil }
	}
}

// Validate names every fault.
func (c *Config) Validate() error {
	var errs []error
	for _, f := range []struct {
		missing bool
		name    string
	}{
		{c.State == nil, "State"},
		{c.Cluster == "", "Cluster"},
		{c.Fleet == "", "Fleet"},
		{c.Session <= 0, "Session"},
		{len(c.Addresses) == 0, "Addresses"},
		{c.Dial == nil, "Dial"},
	} {
		if f.missing {
			errs = append(errs, errors.New(f.name+" is required"))
		}
	}
	return errors.Join(errs...)
}

// Link keeps a cluster connected.
type Link struct {
	cfg      Config
	log      *slog.Logger
	replicas *replicas

	mu sync.Mutex
	// decoded intents of the working set, by name. Bounded like the set.
	decoded map[string]decoded
	refused map[string]*linkv1.Nack
}

type decoded struct {
	version string
	intent  *linkv1.Intent
}

// New makes a Link; Run starts it.
func New(cfg Config) (*Link, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, api.E(api.Invalid, "configure link", "%w", err)
	}
	return &Link{
		cfg: cfg, log: cfg.Log, replicas: &replicas{cfg: &cfg},
		decoded: map[string]decoded{}, refused: map[string]*linkv1.Nack{},
	}, nil
}

// Run keeps the cluster connected until ctx ends. That the federation is gone is
// no error.
func (l *Link) Run(ctx context.Context) error {
	known, err := l.known()
	if err != nil {
		return err
	}
	consumer, err := distribute.NewConsumer(distribute.ConsumerConfig{
		NodeID: l.cfg.Cluster, TypeURL: api.IntentTypeURL, Dial: l.replicas.dialForIntents, Known: known,
		Check: l.check, Commit: l.commit, OnState: l.onState, Log: l.log,
		MinBackoff: minBackoff, MaxBackoff: maxBackoff, Rand: l.cfg.Rand,
	})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return consumer.Run(ctx) })
	g.Go(func() error { return l.report(ctx) })
	if l.cfg.Serve != nil {
		for _, a := range l.cfg.Addresses {
			g.Go(func() error { return l.tunnel(ctx, a) })
		}
	}
	return g.Wait()
}

// known makes the last good intents what the consumer begins with.
func (l *Link) known() (*distribute.Generation, error) {
	s := l.cfg.State.Snapshot()
	if s.IntentRevision == 0 {
		return nil, nil
	}
	g := &distribute.Generation{Resources: make(map[string]*distribute.Resource, len(s.Intents))}
	for name, i := range s.Intents {
		r, err := distribute.NewResource(api.IntentTypeURL, name, i)
		if err != nil {
			return nil, err
		}
		g.Resources[name] = r
		l.decoded[name] = decoded{r.Version, i}
	}
	w, err := distribute.NewResource(api.IntentTypeURL, api.WatermarkName, &linkv1.Intent{
		Revision: s.IntentRevision, Body: &linkv1.Intent_Watermark{Watermark: &linkv1.Watermark{Revision: s.IntentRevision}},
	})
	if err != nil {
		return nil, err
	}
	g.Watermark = w
	return g, nil
}

// check judges one resource, and remembers what it refused.
func (l *Link) check(r *distribute.Resource) error {
	i, err := decode(r, l.cfg.Fleet)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if len(l.refused) < maxNacks {
			l.refused[r.Name] = &linkv1.Nack{Resource: r.Name, Consumer: api.ClusterName(l.cfg.Cluster), Message: err.Error()}
		}
		return err
	}
	delete(l.refused, r.Name)
	l.decoded[r.Name] = decoded{r.Version, i}
	return nil
}

// commit makes a generation the newest last-good one.
func (l *Link) commit(ctx context.Context, g distribute.Generation) error {
	w, err := decode(g.Watermark, l.cfg.Fleet)
	if err != nil {
		return err
	}
	revision := w.GetWatermark().GetRevision()
	if newest := l.cfg.State.Snapshot().IntentRevision; revision < newest {
		// Another replica was further. A cluster never goes back: what differs comes
		// again when this one has caught up.
		l.log.Info("older intents passed over", "revision", revision, "newest", newest)
		return nil
	}
	intents, err := l.intents(g)
	if err != nil {
		return err
	}
	err = l.cfg.State.CommitIntents(ctx, revision, intents, time.Now())
	if api.KindOf(err) == api.Conflict {
		return nil // the same, seen at the commit
	}
	return err
}

// intents gives the decoded set, and forgets what is no longer in it.
func (l *Link) intents(g distribute.Generation) (map[string]*linkv1.Intent, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[string]*linkv1.Intent, len(g.Resources))
	next := make(map[string]decoded, len(g.Resources))
	for name, r := range g.Resources {
		d, ok := l.decoded[name]
		if !ok || d.version != r.Version {
			i, err := decode(r, l.cfg.Fleet)
			if err != nil {
				return nil, err
			}
			d = decoded{r.Version, i}
		}
		out[name], next[name] = d.intent, d
	}
	l.decoded = next
	return out, nil
}

func (l *Link) onState(connected bool, err error) {
	if connected && err == nil {
		// The server sends again what was refused; what it has taken back, it does not.
		l.mu.Lock()
		clear(l.refused)
		l.mu.Unlock()
		return
	}
	if !connected {
		l.replicas.failedIntents()
	}
}

// nacks are all refusals in this cluster, by resource, bounded.
func (l *Link) nacks(s *state.Snapshot) []*linkv1.Nack {
	l.mu.Lock()
	var all []*linkv1.Nack
	for _, n := range l.refused {
		all = append(all, n)
	}
	l.mu.Unlock()
	all = append(all, l.cfg.Nacks()...)
	for _, node := range s.Live() {
		st := s.NodeStatus[node]
		if st == nil {
			continue
		}
		for id, p := range st.Proxies {
			for _, n := range p.GetNacks() {
				all = append(all, &linkv1.Nack{
					Resource: n.GetResource(), Message: n.GetMessage(), Revision: n.GetRevision(),
					Consumer: api.ClusterName(l.cfg.Cluster) + "/nodes/" + node + "/proxies/" + id,
				})
			}
		}
	}
	slices.SortFunc(all, compareNacks)
	all = slices.CompactFunc(all, func(a, b *linkv1.Nack) bool { return a.GetResource() == b.GetResource() })
	return all[:min(len(all), maxNacks)]
}

// backoff is full jitter: uniform in [0, min(max, min·2^attempt)).
func (l *Link) backoff(ctx context.Context, attempt int) bool {
	ceiling := min(minBackoff<<min(attempt, 10), maxBackoff)
	t := time.NewTimer(time.Duration(l.cfg.Rand() * float64(ceiling)))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

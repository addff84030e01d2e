package distribute

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/portolan-io/portolan/federation/api"
)

// Defaults of ConsumerConfig.
const (
	DefaultMinBackoff   = 100 * time.Millisecond
	DefaultMaxBackoff   = 5 * time.Second
	defaultMaxResources = DefaultMaxResourcesPerView
)

// ConsumerConfig configures a Consumer.
type ConsumerConfig struct {
	NodeID  string
	TypeURL string
	Dial    Dialer
	// Known is the last good generation; nil is none. Its versions are offered at
	// the first connection, so that only what changed is sent.
	Known *Generation
	// Check judges one resource. Its error is sent as a NACK that names the
	// resource; the last good version of it stays.
	Check func(*Resource) error
	// Commit takes over a generation at each watermark. The server gets its
	// acknowledgement after it returned nil; on an error it is called again after a
	// backoff, and OnState hears of it. It must not keep the maps for writing.
	Commit func(ctx context.Context, g Generation) error
	// OnState hears of connections and faults. It must return at once.
	OnState                func(connected bool, err error)
	Log                    *slog.Logger
	MinBackoff, MaxBackoff time.Duration
	// MaxResources bounds the set; a server that sends more is refused.
	MaxResources int
	// Rand gives numbers in [0,1) for the jitter.
	Rand func() float64
}

// Consumer holds a session to the server of the hop above.
type Consumer struct {
	cfg ConsumerConfig

	// Owned by the goroutine of Run.
	set       map[string]*Resource
	watermark *Resource
	changed   map[string]struct{}
	removed   map[string]struct{}
	committed bool
}

// NewConsumer checks the configuration and does no I/O.
func NewConsumer(cfg ConsumerConfig) (*Consumer, error) {
	if cfg.TypeURL == "" || cfg.Dial == nil || cfg.Commit == nil {
		return nil, api.E(api.Invalid, "make consumer", "TypeURL, Dial and Commit are required")
	}
	if cfg.Check == nil {
		cfg.Check = func(*Resource) error { return nil }
	}
	if cfg.OnState == nil {
		cfg.OnState = func(bool, error) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MinBackoff <= 0 {
		cfg.MinBackoff = DefaultMinBackoff
	}
	cfg.MaxBackoff = max(cfg.MaxBackoff, cfg.MinBackoff)
	if cfg.MaxBackoff == cfg.MinBackoff {
		cfg.MaxBackoff = max(DefaultMaxBackoff, cfg.MinBackoff)
	}
	if cfg.MaxResources <= 0 {
		cfg.MaxResources = defaultMaxResources
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Float64
	}
	c := &Consumer{cfg: cfg, set: map[string]*Resource{}, changed: map[string]struct{}{}, removed: map[string]struct{}{}}
	if cfg.Known != nil {
		maps.Copy(c.set, cfg.Known.Resources)
		c.watermark = cfg.Known.Watermark
	}
	return c, nil
}

// Run connects, and reconnects for ever; nil when ctx ends.
func (c *Consumer) Run(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		accepted, err := c.session(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // Run ends with nil when its context does
		}
		c.cfg.OnState(false, err)
		if accepted {
			attempt = 0
		}
		wait := c.backoff(attempt)
		c.cfg.Log.Warn("discovery session ended", "node", c.cfg.NodeID, "error", err, "retry_in", wait)
		if !sleep(ctx, wait) {
			return nil
		}
	}
}

// backoff is full jitter: uniform in [0, min(max, min·2^attempt)).
func (c *Consumer) backoff(attempt int) time.Duration {
	ceiling := c.cfg.MaxBackoff
	if shift := min(attempt, 30); c.cfg.MinBackoff<<shift < ceiling && c.cfg.MinBackoff<<shift > 0 {
		ceiling = c.cfg.MinBackoff << shift
	}
	return time.Duration(c.cfg.Rand() * float64(ceiling))
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

type deltaStream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// session is one connection, to its end. accepted: the server took us.
func (c *Consumer) session(ctx context.Context) (accepted bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		return false, fmt.Errorf("dial: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(api.MaxMessageBytes))
	if err != nil {
		return false, fmt.Errorf("open stream: %w", err)
	}
	if err := stream.Send(c.first()); err != nil {
		return false, receiveError(stream, err)
	}
	// The server sends its header once it knows us, also when it has nothing else
	// to send; a stream that ends without one was refused.
	header, err := stream.Header()
	if err == nil && header == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		return false, fmt.Errorf("wait for acceptance: %w", err)
	}
	c.cfg.OnState(true, nil)
	c.cfg.Log.Info("discovery session open", "node", c.cfg.NodeID)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return true, fmt.Errorf("receive: %w", err)
		}
		if err := c.handle(ctx, stream, resp); err != nil {
			return true, err
		}
	}
}

// first subscribes to everything and offers what is known.
func (c *Consumer) first() *discovery.DeltaDiscoveryRequest {
	versions := make(map[string]string, len(c.set)+1)
	for name, r := range c.set {
		versions[name] = r.Version
	}
	if c.watermark != nil {
		versions[c.watermark.Name] = c.watermark.Version
	}
	return &discovery.DeltaDiscoveryRequest{
		Node: NodeOf(c.cfg.NodeID), TypeUrl: c.cfg.TypeURL, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: versions,
	}
}

// receiveError gets the server's reason after a failed send.
func receiveError(stream deltaStream, sent error) error {
	if errors.Is(sent, io.EOF) {
		if _, err := stream.Recv(); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return fmt.Errorf("send: %w", sent)
}

func (c *Consumer) handle(ctx context.Context, stream deltaStream, resp *discovery.DeltaDiscoveryResponse) error {
	reply := &discovery.DeltaDiscoveryRequest{TypeUrl: c.cfg.TypeURL, ResponseNonce: resp.GetNonce()}
	refused, watermark := c.apply(resp)
	if watermark != nil {
		if err := c.commit(ctx, watermark); err != nil {
			return err
		}
	}
	if len(refused) > 0 {
		reply.ErrorDetail = nackDetail(refused)
		c.cfg.Log.Warn("resources refused", "node", c.cfg.NodeID, "message", reply.ErrorDetail.GetMessage())
	}
	if err := stream.Send(reply); err != nil {
		return receiveError(stream, err)
	}
	return nil
}

type refusal struct{ name, why string }

// apply takes what passes into the working set.
func (c *Consumer) apply(resp *discovery.DeltaDiscoveryResponse) (refused []refusal, watermark *Resource) {
	for _, name := range resp.GetRemovedResources() {
		if _, ok := c.set[name]; ok {
			delete(c.set, name)
			delete(c.changed, name)
			c.removed[name] = struct{}{}
		}
	}
	for _, m := range resp.GetResources() {
		r := &Resource{Type: c.cfg.TypeURL, Name: m.GetName(), Version: m.GetVersion(), Body: m.GetResource(), wire: m}
		if err := c.check(r); err != nil {
			refused = append(refused, refusal{r.Name, err.Error()})
			continue
		}
		if r.Name == api.WatermarkName {
			watermark = r
			continue
		}
		c.set[r.Name] = r
		delete(c.removed, r.Name)
		c.changed[r.Name] = struct{}{}
	}
	return refused, watermark
}

func (c *Consumer) check(r *Resource) error {
	if r.Name == "" {
		return errors.New("name: must not be empty")
	}
	if got := r.Body.GetTypeUrl(); got != c.cfg.TypeURL {
		return fmt.Errorf("type_url: is %q, not %q", got, c.cfg.TypeURL)
	}
	if _, ok := c.set[r.Name]; !ok && len(c.set) >= c.cfg.MaxResources {
		return fmt.Errorf("set: more than %d resources", c.cfg.MaxResources)
	}
	return c.cfg.Check(r)
}

// commit hands over a generation, again and again until it is taken or ctx ends.
func (c *Consumer) commit(ctx context.Context, watermark *Resource) error {
	g := Generation{Watermark: watermark, Resources: maps.Clone(c.set), Removed: slices.Sorted(maps.Keys(c.removed))}
	if c.committed {
		g.Changed = slices.Sorted(maps.Keys(c.changed))
	} else {
		g.Changed = slices.Sorted(maps.Keys(c.set))
	}
	for attempt := 0; ; attempt++ {
		err := c.cfg.Commit(ctx, g)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.cfg.OnState(true, fmt.Errorf("commit generation: %w", err))
		c.cfg.Log.Error("generation not committed", "node", c.cfg.NodeID, "error", err)
		if !sleep(ctx, c.backoff(attempt)) {
			return ctx.Err()
		}
	}
	c.committed, c.watermark = true, watermark
	clear(c.changed)
	clear(c.removed)
	return nil
}

func nackDetail(refused []refusal) *rpcstatus.Status {
	bad := &errdetails.BadRequest{}
	words := make([]string, 0, len(refused))
	for _, r := range refused {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: r.name, Description: clip(r.why)})
		words = append(words, r.name+": "+r.why)
	}
	s := &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: clip(strings.Join(words, "; "))}
	if a, err := anypb.New(bad); err == nil {
		s.Details = []*anypb.Any{a}
	}
	return s
}

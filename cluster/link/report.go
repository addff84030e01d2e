package link

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/tunnel"
)

// report keeps a report stream open until ctx ends.
func (l *Link) report(ctx context.Context) error {
	deadline := time.Now().Add(l.cfg.NodeTimeout)
	for attempt := 0; ; attempt++ {
		address, at := l.replicas.pick()
		began := time.Now()
		err := l.reportTo(ctx, address, at, deadline)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // Run ends with nil when its context does
		}
		l.replicas.failed(at)
		if time.Since(began) > ackTimeout {
			attempt = 0
		}
		level := slog.LevelDebug // said once; nobody need be told every second
		if attempt == 0 {
			level = slog.LevelWarn
		}
		l.log.Log(ctx, level, "report stream ended", "address", address, "error", err)
		if !l.backoff(ctx, attempt) {
			return nil
		}
	}
}

// reporter is one report stream. One goroutine owns it.
type reporter struct {
	l        *Link
	stream   grpc.BidiStreamingClient[linkv1.StatusReport, linkv1.ReportAck]
	deadline time.Time // after which the nodes are no longer waited for
	sequence int64
	acked    int64
	sent     *content // nil: the next report is full
	lastSend time.Time
	// waiting since when an answer is due; zero when none is.
	waiting time.Time
}

// errSilent ends a stream whose reports are not answered.
var errSilent = errors.New("reports are not answered")

func (l *Link) reportTo(ctx context.Context, address string, at int, deadline time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := l.cfg.Dial(ctx, address)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	stream, err := linkv1.NewLinkServiceClient(conn).Report(ctx, grpc.MaxCallSendMsgSize(api.MaxMessageBytes))
	if err != nil {
		return err
	}
	r := &reporter{l: l, stream: stream, deadline: deadline}
	err = r.run(ctx)
	if errors.Is(err, errSilent) {
		l.replicas.abandon(at)
	}
	return err
}

func (r *reporter) run(ctx context.Context) error {
	acks, failed := make(chan *linkv1.ReportAck), make(chan error, 1)
	go func() {
		for {
			m, err := r.stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case acks <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	changed := r.follow(ctx)
	tick := time.NewTicker(keepalive / 2)
	defer tick.Stop()
	if err := r.send(true); err != nil {
		return err
	}
	// settle is armed while a change waits for more to come with it.
	var settle <-chan time.Time
	for {
		select {
		case <-changed:
			if settle == nil {
				settle = time.After(max(0, coalesce-time.Since(r.lastSend)))
			}
			continue
		case <-settle:
			settle = nil
			if err := r.send(false); err != nil {
				return err
			}
		case <-tick.C:
			if !r.waiting.IsZero() && time.Since(r.waiting) > ackTimeout {
				return errSilent
			}
			if err := r.send(time.Since(r.lastSend) >= keepalive-keepalive/4); err != nil {
				return err
			}
		case a := <-acks:
			if err := r.answered(a); err != nil {
				return err
			}
		case err := <-failed:
			return err
		case <-ctx.Done():
			_ = r.stream.CloseSend()
			return ctx.Err()
		}
	}
}

// follow wakes for each change of the state, until ctx ends.
func (r *reporter) follow(ctx context.Context) <-chan struct{} {
	ch := make(chan struct{}, 1)
	go func() {
		seen := int64(-1)
		for {
			if err := r.l.cfg.State.Wait(ctx, seen); err != nil {
				if ctx.Err() != nil || !r.l.backoff(ctx, 4) {
					return
				}
				continue
			}
			seen = r.l.cfg.State.Snapshot().Generation
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}()
	return ch
}

// answered takes an answer; a resync makes the next report full, and at once.
func (r *reporter) answered(a *linkv1.ReportAck) error {
	r.acked = a.GetSequence()
	r.waiting = time.Time{}
	if r.acked < r.sequence {
		r.waiting = r.lastSend
	}
	if a.GetResync() && r.sent != nil {
		r.sent = nil
		return r.send(false)
	}
	return nil
}

// send reports what changed; with always also nothing, as a sign of life. Until
// every node was heard (or waited for), only signs of life are sent: what is known
// then is a part, and a full report would take it for the whole.
func (r *reporter) send(always bool) error {
	s := r.l.cfg.State.Snapshot()
	m := &linkv1.StatusReport{}
	if r.sent != nil || r.heard(s) {
		c := summarize(s, r.l.cfg.Cluster, r.l.nacks(s), time.Now())
		m = delta(r.sent, c)
		if !always && !says(m, r.sent) {
			return nil
		}
		r.sent = c
	} else if !always {
		return nil
	}
	r.sequence++
	m.Session, m.Sequence = r.l.cfg.Session, r.sequence
	r.lastSend = time.Now()
	if r.waiting.IsZero() {
		r.waiting = r.lastSend
	}
	return r.stream.Send(m)
}

func (r *reporter) heard(s *state.Snapshot) bool { return s.Heard() || !time.Now().Before(r.deadline) }

// tunnel keeps a tunnel to one replica open until ctx ends.
func (l *Link) tunnel(ctx context.Context, address string) error {
	for attempt := 0; ; attempt++ {
		began := time.Now()
		err := l.tunnelTo(ctx, address)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // Run ends with nil when its context does
		}
		l.log.Debug("tunnel ended", "address", address, "error", err)
		if time.Since(began) > ackTimeout {
			attempt = 0
		}
		if !l.backoff(ctx, attempt) {
			return nil
		}
	}
}

func (l *Link) tunnelTo(ctx context.Context, address string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := l.cfg.Dial(ctx, address)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	stream, err := linkv1.NewLinkServiceClient(conn).Tunnel(ctx)
	if err != nil {
		return err
	}
	return tunnel.Serve(ctx, stream, l.cfg.Serve)
}

package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api"
)

// Methods that others on the same port authorise themselves.
const (
	healthPrefix = "/grpc.health.v1.Health/"
	linkPrefix   = "/portolan.link.v1.LinkService/"
	adsPrefix    = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"
)

func foreign(method string) bool {
	return strings.HasPrefix(method, healthPrefix) || strings.HasPrefix(method, linkPrefix) || strings.HasPrefix(method, adsPrefix)
}

// UnaryInterceptor authorises, limits, bounds in time, audits refusals and keeps
// internals out of answers.
func (s *Server) UnaryInterceptor(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() { err = s.answer(info.FullMethod, err, recover()) }()
	if foreign(info.FullMethod) {
		return next(ctx, req)
	}
	c, err := s.identify(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	// Before anything is read for them: who has no role counts too.
	release, err := s.limits.take(c.actor, false)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := s.authorize(ctx, c); err != nil {
		s.refused(ctx, c, info.FullMethod, req, err)
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, callerKey{}, c), unaryTimeout)
	defer cancel()
	resp, err = next(ctx, req)
	if err != nil {
		s.refused(ctx, c, info.FullMethod, req, err)
		return nil, err
	}
	return resp, nil
}

// StreamInterceptor is the same for streams, which have no deadline of their own.
func (s *Server) StreamInterceptor(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() { err = s.answer(info.FullMethod, err, recover()) }()
	if foreign(info.FullMethod) {
		return next(srv, ss)
	}
	c, err := s.identify(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	release, err := s.limits.take(c.actor, true)
	if err != nil {
		return err
	}
	defer release()
	if err := s.authorize(ss.Context(), c); err != nil {
		s.refused(ss.Context(), c, info.FullMethod, nil, err)
		return err
	}
	ctx, cancel := context.WithCancelCause(context.WithValue(ss.Context(), callerKey{}, c))
	defer cancel(nil)
	go s.watchRoles(ctx, cancel, c, info.FullMethod == watchMethod)
	err = next(srv, &callerStream{ServerStream: ss, ctx: ctx})
	if e, ok := errors.AsType[*api.Error](context.Cause(ctx)); ok {
		return e
	}
	return err
}

// How a long stream's caller is looked at again.
const (
	recheckEvery = 10 * time.Second
	// maxUnchecked looks may fail before the stream ends: without the store nobody
	// knows who the caller is.
	maxUnchecked = 3
	watchMethod  = "/portolan.v1.WatchService/Watch"
)

// watchRoles ends a stream, with the reason, when its caller lost a role that they
// began it with. exact ends it also when they got one, because what they see was
// chosen at the beginning.
func (s *Server) watchRoles(ctx context.Context, end context.CancelCauseFunc, c *caller, exact bool) {
	t := time.NewTicker(recheckEvery)
	defer t.Stop()
	for failed := 0; ; {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		now := &caller{actor: c.actor, method: c.method}
		look, cancel := context.WithTimeout(ctx, recheckEvery/2)
		err := s.loadRoles(look, now)
		cancel()
		if err != nil {
			if failed++; failed >= maxUnchecked {
				end(api.E(api.Unavailable, "", "the roles of %s cannot be read", c.actor))
				return
			}
			continue
		}
		failed = 0
		if c.lost(now) || exact && now.lost(c) {
			end(api.E(api.Denied, "", "the roles of %s have changed: begin again", c.actor))
			return
		}
	}
}

// lost says whether a caller had a role that they have no longer.
func (c *caller) lost(now *caller) bool {
	return c.fleet && !now.fleet || slices.ContainsFunc(c.tenants, func(t string) bool { return !slices.Contains(now.tenants, t) })
}

// callerStream is a stream that ends with its caller's rights: nothing is read
// from or sent to who has lost them.
type callerStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a stream's context is its own, grpc-go's interface asks for it
}

func (c *callerStream) Context() context.Context { return c.ctx }

// SendMsg implements grpc.ServerStream.
func (c *callerStream) SendMsg(m any) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	return c.ServerStream.SendMsg(m)
}

// RecvMsg implements grpc.ServerStream.
func (c *callerStream) RecvMsg(m any) error {
	if err := c.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	return nil
}

// answer maps an error to what the caller may see. Everything that is no
// decision is logged under a reference, and the caller gets the reference.
func (s *Server) answer(method string, err error, panicked any) error {
	if panicked != nil {
		err = fmt.Errorf("panic: %v", panicked)
		s.cfg.Log.Error("a handler panicked", "method", method, "error", err, "stack", string(debug.Stack()))
	}
	if err == nil || foreign(method) && panicked == nil {
		return err
	}
	var e *api.Error
	switch {
	case errors.As(err, &e) && e.Kind != api.Internal:
		return e
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller gave up")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the time for this request is over")
	}
	if st, ok := status.FromError(err); ok && e == nil && passes(st.Code()) {
		return err
	}
	ref := uuid.NewString()
	s.cfg.Log.Error("request failed", "method", method, "reference", ref, "error", err)
	return status.Errorf(codes.Internal, "internal error, reference %s", ref)
}

// passes says which codes of a lower plane, or of grpc-go itself, are answers.
func passes(c codes.Code) bool {
	switch c {
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return false
	default:
		return true
	}
}

// limiter bounds what one caller has under way, and how many refusals of theirs
// are audited.
type limiter struct {
	mu      *sync.Mutex
	callers map[string]*callerLimit
}

type callerLimit struct {
	unary, streams int
	refusals       *rate.Limiter
	used           time.Time
}

func newLimiter() limiter {
	return limiter{mu: &sync.Mutex{}, callers: map[string]*callerLimit{}}
}

// of finds a caller's entry. The map is bounded: idle entries go first, and when
// everybody is busy nobody new is let in.
func (l limiter) of(actor string) (*callerLimit, error) {
	if c, ok := l.callers[actor]; ok {
		c.used = time.Now()
		return c, nil
	}
	if len(l.callers) >= maxCallers {
		oldest, found := "", false
		for a, c := range l.callers {
			if c.unary+c.streams == 0 && (!found || c.used.Before(l.callers[oldest].used)) {
				oldest, found = a, true
			}
		}
		if !found {
			return nil, api.E(api.Exhausted, "", "too many callers at once; try again later")
		}
		delete(l.callers, oldest)
	}
	c := &callerLimit{refusals: rate.NewLimiter(5, 20), used: time.Now()}
	l.callers[actor] = c
	return c, nil
}

// take counts one call; the returned function ends it.
func (l limiter) take(actor string, stream bool) (func(), error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, err := l.of(actor)
	if err != nil {
		return nil, err
	}
	n, most := &c.unary, maxUnaryPerCaller
	if stream {
		n, most = &c.streams, maxStreamsPerCaller
	}
	if *n >= most {
		return nil, api.E(api.Exhausted, "", "%d calls are under way already; try again when one has ended", *n)
	}
	*n++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		*n--
	}, nil
}

// mayAudit says whether another refusal of this caller is written.
func (l limiter) mayAudit(actor string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, err := l.of(actor)
	return err == nil && c.refusals.Allow()
}

// target finds what a request is about: the name of its object, or its name.
func target(req any) string {
	m, ok := req.(proto.Message)
	if !ok || m == nil {
		return ""
	}
	if n, ok := m.(interface{ GetName() string }); ok {
		return n.GetName()
	}
	if n, ok := m.(interface{ GetReplica() string }); ok {
		return n.GetReplica()
	}
	out := ""
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() != nil && !f.IsMap() && !f.IsList() {
			if o, ok := v.Message().Interface().(object); ok {
				out = o.GetName()
				return false
			}
		}
		return true
	})
	if c, ok := m.(interface{ GetCluster() string }); ok && out == "" {
		out = c.GetCluster()
	}
	return out
}

package source

import (
	"bytes"
	"context"
	"log/slog"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

const (
	minBackoff   = time.Second
	maxBackoff   = time.Minute
	fetchTimeout = 30 * time.Second
)

// Load reads the identity from the directory; api.NotFound when there is none.
func (s *Source) Load() error {
	if s.cfg.Dir == "" {
		return api.E(api.NotFound, "load the identity", "it is kept in memory only")
	}
	id, err := ReadDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	if cur, ok := s.Current(); ok && same(cur, id) {
		return nil
	}
	s.set(id)
	return nil
}

func same(a, b *Identity) bool {
	return a.Chain[0].Equal(b.Chain[0]) && bytes.Equal(a.Bundle, b.Bundle)
}

// Ensure returns when there is an identity that has not expired: the one on disk,
// or one that it fetched. It tries once; the caller repeats.
func (s *Source) Ensure(ctx context.Context) (*Identity, error) {
	if cur, ok := s.Current(); ok && s.cfg.Now().Before(cur.NotAfter()) {
		return cur, nil
	}
	err := s.Load()
	if cur, ok := s.Current(); ok && s.cfg.Now().Before(cur.NotAfter()) {
		return cur, nil
	}
	if s.cfg.Fetch == nil {
		if err == nil {
			err = api.E(api.Unavailable, "load the identity", "what %s holds has expired", s.cfg.Dir)
		}
		return nil, err
	}
	if err := s.Renew(ctx); err != nil {
		return nil, err
	}
	cur, _ := s.Current()
	return cur, nil
}

// Renew fetches a certificate for a new key now.
func (s *Source) Renew(ctx context.Context) error {
	if s.cfg.Fetch == nil {
		return api.E(api.Precondition, "renew the identity", "this source only reads %s", s.cfg.Dir)
	}
	select {
	case s.renewing <- struct{}{}:
		defer func() { <-s.renewing }()
	case <-ctx.Done():
		return api.E(api.Canceled, "renew the identity", "%w", context.Cause(ctx))
	}
	key, csr, err := NewCSR()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	chain, bundle, err := s.cfg.Fetch(ctx, csr)
	if err != nil {
		return api.E(api.KindOf(err), "renew the identity", "%w", err)
	}
	id, err := NewIdentity(key, chain, bundle)
	if err != nil {
		return api.E(api.Internal, "renew the identity", "the answer does not fit: %w", err)
	}
	if !s.cfg.Now().Before(id.NotAfter()) {
		return api.E(api.Internal, "renew the identity", "the answer has expired at %s: is a clock wrong?", id.NotAfter().Format(time.RFC3339))
	}
	return s.Install(id)
}

// Run keeps the identity current until ctx ends: it loads or fetches one, then
// renews it; failures are tried again with full-jitter backoff, and the old
// identity is kept meanwhile.
func (s *Source) Run(ctx context.Context) error {
	if s.cfg.Fetch == nil {
		return s.follow(ctx)
	}
	if err := s.Load(); err != nil && api.KindOf(err) != api.NotFound {
		s.cfg.Log.Warn("stored identity is unusable", slog.Any("error", err))
	}
	failures := 0
	for {
		wait := s.untilRenewal()
		if failures > 0 {
			wait = max(time.Duration(float64(min(minBackoff<<min(failures-1, 10), maxBackoff))*s.cfg.Rand()), 10*time.Millisecond)
		}
		changed := s.Changed()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			// Installed from outside: count anew.
			timer.Stop()
			failures = 0
			continue
		case <-timer.C:
		}
		err := s.Renew(ctx)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // Run ends with nil when its context does
		case err != nil:
			failures++
			s.cfg.Log.Warn("identity not renewed", slog.Any("error", err), slog.Int("failures", failures))
		default:
			failures = 0
			cur, _ := s.Current()
			s.cfg.Log.Info("identity renewed", slog.String("id", cur.ID.String()), slog.Time("expires", cur.NotAfter()))
		}
	}
}

// untilRenewal is 0 when there is no identity.
func (s *Source) untilRenewal() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur == nil {
		return 0
	}
	return max(0, s.renewAt.Sub(s.cfg.Now()))
}

// follow re-reads the directory.
func (s *Source) follow(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.Poll)
	defer tick.Stop()
	faulty := false
	for {
		err := s.Load()
		if bad := err != nil && api.KindOf(err) != api.NotFound; bad != faulty {
			faulty = bad
			if bad {
				s.cfg.Log.Warn("stored identity is unusable", slog.Any("error", err))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

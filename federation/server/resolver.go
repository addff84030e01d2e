package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/portolan-io/portolan/federation/api"
)

// RegistryHost says how a registry is reached.
type RegistryHost struct {
	// Address to dial instead of the registry's own name.
	Address string
	// Roots that it is verified against; the system's when nil.
	Roots *x509.CertPool
}

// ResolverConfig of a RegistryResolver.
type ResolverConfig struct {
	// Allow lists the registries, host or host:port. No other host is ever dialled,
	// whatever a registry's answer redirects to.
	Allow []string
	// Hosts by registry, where they need more than their name.
	Hosts map[string]RegistryHost
	// Timeout of one resolution; 5 s when 0.
	Timeout time.Duration
	// CacheFor is how long the digest of a tag is believed; 5 s when 0.
	CacheFor time.Duration
	// Parallel resolutions at most; 8 when 0.
	Parallel int
}

const maxCachedTags = 1024

// RegistryResolver asks registries for digests, over TLS only. Safe for
// concurrent use.
type RegistryResolver struct {
	cfg   ResolverConfig
	trip  http.RoundTripper
	slots chan struct{}

	mu    sync.Mutex
	cache map[string]cachedTag
}

type cachedTag struct {
	resolved string
	until    time.Time
}

// NewRegistryResolver makes a resolver. It does no I/O.
func NewRegistryResolver(cfg ResolverConfig) *RegistryResolver {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.CacheFor <= 0 {
		cfg.CacheFor = 5 * time.Second
	}
	if cfg.Parallel <= 0 {
		cfg.Parallel = 8
	}
	return &RegistryResolver{
		cfg: cfg, slots: make(chan struct{}, cfg.Parallel), cache: map[string]cachedTag{}, trip: newRegistryTransport(cfg),
	}
}

// Resolve implements Resolver.
func (r *RegistryResolver) Resolve(ctx context.Context, image string) (string, error) {
	doing := "resolve image " + clip(image)
	ref, err := name.ParseReference(image)
	if err != nil {
		return "", api.E(api.Invalid, doing, "%w", err)
	}
	if d, ok := ref.(name.Digest); ok {
		return d.Name(), nil
	}
	if got, ok := r.cached(ref.Name()); ok {
		return got, nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return "", api.E(api.Unavailable, doing, "too many images are being resolved; try again")
	}
	desc, err := remote.Head(ref, remote.WithContext(ctx), remote.WithTransport(r.trip), remote.WithRetryBackoff(remote.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Steps: 2}))
	if err != nil {
		var te *transport.Error
		if errors.As(err, &te) && te.StatusCode == http.StatusNotFound {
			return "", api.E(api.NotFound, doing, "the registry does not have it")
		}
		return "", api.E(api.Unavailable, doing, "registry %s does not answer as it should: %w", ref.Context().RegistryStr(), err)
	}
	resolved := ref.Context().Digest(desc.Digest.String()).Name()
	r.keep(ref.Name(), resolved)
	return resolved, nil
}

func (r *RegistryResolver) cached(tag string) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.cache[tag]
	if !ok || time.Now().After(c.until) {
		delete(r.cache, tag)
		return "", false
	}
	return c.resolved, true
}

func (r *RegistryResolver) keep(tag, resolved string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cache) >= maxCachedTags {
		clear(r.cache)
	}
	r.cache[tag] = cachedTag{resolved, time.Now().Add(r.cfg.CacheFor)}
}

// registryTransport dials only what the list allows, with each registry's own
// address and roots.
type registryTransport struct {
	hosts map[string]*http.Transport
}

func newRegistryTransport(cfg ResolverConfig) *registryTransport {
	t := &registryTransport{hosts: map[string]*http.Transport{}}
	for _, reg := range cfg.Allow {
		h := cfg.Hosts[reg]
		host := reg
		if bare, _, err := net.SplitHostPort(reg); err == nil {
			host = bare
		}
		dialer := &net.Dialer{Timeout: 3 * time.Second}
		t.hosts[reg] = &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if h.Address != "" {
					addr = h.Address
				}
				return dialer.DialContext(ctx, network, addr)
			},
			TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: h.Roots, ServerName: host},
			TLSHandshakeTimeout:   3 * time.Second,
			ResponseHeaderTimeout: cfg.Timeout,
			MaxIdleConnsPerHost:   4,
			IdleConnTimeout:       30 * time.Second,
			ForceAttemptHTTP2:     true,
		}
	}
	return t
}

// RoundTrip implements http.RoundTripper.
func (t *registryTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	h, ok := t.hosts[req.URL.Host]
	if !ok {
		return nil, fmt.Errorf("%s is not on the fleet's list of registries", req.URL.Host)
	}
	if req.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s is asked for without TLS", req.URL.Host)
	}
	return h.RoundTrip(req)
}

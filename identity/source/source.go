// Package source keeps a process's own X.509 identity: it reads it from disk,
// asks for it when there is none, renews it at half life with jitter, and gives
// the current certificate to TLS. It owns the files key.pem, chain.pem and
// bundle.pem of a directory. It never signs anything and never decides what the
// identity is: that is what Fetch's server does.
//
// Concurrency: safe for concurrent use. One process writes a directory, any
// number read it.
package source

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/trust"
)

// FetchFunc has a DER certificate request signed. It returns DER certificates,
// leaf first, and the PEM roots of the trust domain.
type FetchFunc func(ctx context.Context, csrDER []byte) (chain [][]byte, bundlePEM []byte, err error)

// Config of a Source.
type Config struct {
	// Dir holds the identity between runs; empty keeps it in memory.
	Dir string
	// Fetch gets and renews it. Nil makes the source a reader of Dir, which
	// another process writes.
	Fetch FetchFunc
	// RenewAt is the share of the certificate's life after which it is renewed,
	// less up to Jitter of the life; 0.5 and 0.1 when zero.
	RenewAt, Jitter float64
	// Poll is how often a reader looks at Dir; 1 s when zero.
	Poll time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// Rand gives numbers in [0,1); math/rand/v2 when nil.
	Rand func() float64
	// Log may be nil.
	Log *slog.Logger
}

// SetDefaults fills what is zero.
func (c *Config) SetDefaults() {
	if c.RenewAt == 0 {
		c.RenewAt = 0.5
	}
	if c.Jitter == 0 {
		c.Jitter = 0.1
	}
	if c.Poll == 0 {
		c.Poll = time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Rand == nil {
		c.Rand = mathrand.Float64
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate says what is wrong.
func (c *Config) Validate() error {
	switch {
	case c.Dir == "" && c.Fetch == nil:
		return api.E(api.Invalid, "configure an identity source", "neither a directory to read nor a way to fetch")
	case c.RenewAt <= 0 || c.RenewAt >= 1 || c.Jitter < 0 || c.Jitter >= c.RenewAt:
		return api.E(api.Invalid, "configure an identity source", "need 0 <= jitter (%v) < renew at (%v) < 1", c.Jitter, c.RenewAt)
	}
	return nil
}

// Identity is a key, its certificate and the roots of its trust domain. It must
// not be changed.
type Identity struct {
	ID     identity.ID
	Key    crypto.Signer
	Chain  []*x509.Certificate // leaf first
	Bundle []byte              // PEM
	tls    *tls.Certificate
}

// NewIdentity checks that the parts fit together: the chain is the key's, has an
// identity, and the bundle holds roots (it may be empty).
func NewIdentity(key crypto.Signer, chain [][]byte, bundlePEM []byte) (*Identity, error) {
	const doing = "take an identity"
	certs := make([]*x509.Certificate, 0, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, api.E(api.Invalid, doing, "certificate %d: %w", i, err)
		}
		certs = append(certs, c)
	}
	id, err := trust.LeafID(certs)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(certs[0].PublicKey) {
		return nil, errMismatch
	}
	if len(bundlePEM) > 0 {
		if _, err := trust.ParseBundle(bundlePEM); err != nil {
			return nil, api.E(api.Invalid, doing, "%w", err)
		}
	}
	return &Identity{
		ID: id, Key: key, Chain: certs, Bundle: bundlePEM,
		tls: &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: certs[0]},
	}, nil
}

var errMismatch = api.E(api.Invalid, "take an identity", "the certificate is not of this key")

// NotAfter is when it expires.
func (i *Identity) NotAfter() time.Time { return i.Chain[0].NotAfter }

// After is the moment when a share of the certificate's life is over.
func (i *Identity) After(share float64) time.Time {
	leaf := i.Chain[0]
	return leaf.NotBefore.Add(time.Duration(float64(leaf.NotAfter.Sub(leaf.NotBefore)) * share))
}

// TLS gives the form that crypto/tls takes.
func (i *Identity) TLS() *tls.Certificate { return i.tls }

// RawChain gives the chain as DER.
func (i *Identity) RawChain() [][]byte { return i.tls.Certificate }

// NewCSR makes a P-256 key and a certificate request for it, without names.
func NewCSR() (key crypto.Signer, csrDER []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, api.E(api.Internal, "make a key", "%w", err)
	}
	csrDER, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		return nil, nil, api.E(api.Internal, "make a certificate request", "%w", err)
	}
	return k, csrDER, nil
}

// Source is a process's identity over time.
type Source struct {
	cfg Config
	// renewing is held during a fetch, so that two callers make one request.
	renewing chan struct{}

	mu      sync.Mutex
	cur     *Identity
	changed chan struct{} // closed at the next change
	renewAt time.Time
}

// New checks the configuration; it reads nothing.
func New(cfg Config) (*Source, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Source{cfg: cfg, changed: make(chan struct{}), renewing: make(chan struct{}, 1)}, nil
}

// Certificate is a trust.CertFunc. Without an identity, or with one that has
// expired, the error is api.Unavailable.
func (s *Source) Certificate() (*tls.Certificate, error) {
	cur, ok := s.Current()
	if !ok {
		return nil, api.E(api.Unavailable, "present an identity", "there is none yet")
	}
	if s.cfg.Now().After(cur.NotAfter()) {
		return nil, api.E(api.Unavailable, "present an identity", "%s expired at %s and was not renewed", cur.ID, cur.NotAfter().Format(time.RFC3339))
	}
	return cur.tls, nil
}

// GetCertificate fits tls.Config.GetCertificate.
func (s *Source) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.Certificate()
}

// Current gives the identity, expired or not; false when there is none.
func (s *Source) Current() (*Identity, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur, s.cur != nil
}

// Changed gives a channel that is closed at the next change. Take it before
// Current, so that no change is missed.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Wait blocks until there is an identity.
func (s *Source) Wait(ctx context.Context) (*Identity, error) {
	for {
		changed := s.Changed()
		if cur, ok := s.Current(); ok {
			return cur, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, api.E(api.Canceled, "wait for an identity", "%w", context.Cause(ctx))
		}
	}
}

// Install makes an identity that was got by other means the current one, and
// stores it.
func (s *Source) Install(id *Identity) error {
	if s.cfg.Dir != "" && s.cfg.Fetch != nil {
		if err := WriteDir(s.cfg.Dir, id); err != nil {
			return err
		}
	}
	s.set(id)
	return nil
}

func (s *Source) set(id *Identity) {
	share := s.cfg.RenewAt - s.cfg.Jitter*s.cfg.Rand()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cur = id
	s.renewAt = id.After(share)
	close(s.changed)
	s.changed = make(chan struct{})
}

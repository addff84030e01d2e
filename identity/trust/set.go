// Package trust decides whom a TLS peer may be. It owns the set of trusted roots
// per trust domain and the TLS configurations of every hop between planes. It
// never pools roots: an identity of domain A that was signed by B's root is
// refused, as SPIFFE asks. It does no I/O and never issues anything.
//
// Concurrency: a Set is safe for concurrent use; readers never wait. The TLS
// configurations look at the Set at each handshake, so a change of roots acts on
// the next connection.
package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/portolan-io/portolan/federation/api"
)

// maxRoots bounds the roots of one domain: one active, one prepared, and some
// that still have unexpired certificates.
const maxRoots = 16

// Set maps trust domains to their roots. The zero value trusts nobody.
type Set struct {
	mu  sync.Mutex // writers
	cur atomic.Pointer[map[string]*domain]
}

// domain is never changed after it was stored.
type domain struct {
	pem   []byte
	roots []*x509.Certificate
	pool  *x509.CertPool
}

// NewSet makes an empty set.
func NewSet() *Set { return &Set{} }

// Put replaces the roots of one trust domain by PEM certificates. Faulty ones
// are refused as a whole (api.Invalid), and the former roots stay.
func (s *Set) Put(trustDomain string, rootsPEM []byte) error {
	d, err := parseDomain(trustDomain, rootsPEM)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.load()
	if old := m[trustDomain]; old != nil && bytes.Equal(old.pem, d.pem) {
		return nil
	}
	next := maps.Clone(m)
	if next == nil {
		next = map[string]*domain{}
	}
	next[trustDomain] = d
	s.cur.Store(&next)
	return nil
}

// Delete trusts a domain no more.
func (s *Set) Delete(trustDomain string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(s.load())
	delete(next, trustDomain)
	s.cur.Store(&next)
}

// Replace makes the set hold exactly these bundles, at once. A faulty bundle
// leaves the set as it was.
func (s *Set) Replace(bundles map[string][]byte) error {
	next := make(map[string]*domain, len(bundles))
	for td, p := range bundles {
		d, err := parseDomain(td, p)
		if err != nil {
			return err
		}
		next[td] = d
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cur.Store(&next)
	return nil
}

// Domains lists the trusted domains in order.
func (s *Set) Domains() []string {
	return slices.Sorted(maps.Keys(s.load()))
}

// Bundle gives the roots of a domain as PEM.
func (s *Set) Bundle(trustDomain string) ([]byte, bool) {
	d, ok := s.load()[trustDomain]
	if !ok {
		return nil, false
	}
	return bytes.Clone(d.pem), true
}

func (s *Set) load() map[string]*domain {
	if m := s.cur.Load(); m != nil {
		return *m
	}
	return nil
}

func parseDomain(trustDomain string, rootsPEM []byte) (*domain, error) {
	doing := "trust the roots of " + trustDomain
	if trustDomain == "" {
		return nil, api.E(api.Invalid, doing, "no trust domain")
	}
	roots, err := ParseBundle(rootsPEM)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	d := &domain{pem: bytes.Clone(rootsPEM), roots: roots, pool: x509.NewCertPool()}
	for _, c := range roots {
		for _, u := range c.URIs {
			if u.Scheme == "spiffe" && u.Host != trustDomain {
				return nil, api.E(api.Invalid, doing, "a root says that it is of %q", u.Host)
			}
		}
		d.pool.AddCert(c)
	}
	return d, nil
}

// ParseBundle reads PEM certificates, all of which must be authorities.
func ParseBundle(bundlePEM []byte) ([]*x509.Certificate, error) {
	const doing = "parse a bundle"
	var roots []*x509.Certificate
	for rest := bytes.TrimSpace(bundlePEM); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, api.E(api.Invalid, doing, "what follows certificate %d is no PEM", len(roots))
		}
		if block.Type != "CERTIFICATE" {
			return nil, api.E(api.Invalid, doing, "it holds a %s", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, api.E(api.Invalid, doing, "certificate %d: %w", len(roots), err)
		}
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, api.E(api.Invalid, doing, "certificate %d is no authority's", len(roots))
		}
		if roots = append(roots, c); len(roots) > maxRoots {
			return nil, api.E(api.Invalid, doing, "more than %d roots", maxRoots)
		}
	}
	if len(roots) == 0 {
		return nil, api.E(api.Invalid, doing, "it holds no certificate")
	}
	return roots, nil
}

// BundleHas says whether the bundle holds the root with that SHA-256 of its DER
// form: a joiner checks the bundle it is given against its token.
func BundleHas(bundlePEM []byte, rootHash [32]byte) bool {
	roots, err := ParseBundle(bundlePEM)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(roots, func(c *x509.Certificate) bool { return sha256.Sum256(c.Raw) == rootHash })
}

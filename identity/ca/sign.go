package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
)

const (
	minRSABits = 2048
	maxRSABits = 4096 // larger ones cost the verifier more than they protect
	maxCSR     = 16 << 10
)

// Request says what to put into a certificate.
type Request struct {
	// ID becomes the one URI SAN. Its trust domain must be the authority's.
	ID identity.ID
	// DNSNames of a server; each must lie in the trust domain.
	DNSNames []string
	// TTL; DefaultTTL when zero.
	TTL time.Duration
	// IncludeRoot appends the root to the chain. Servers that a joiner may dial
	// need it: the joiner knows the root's hash only.
	IncludeRoot bool
}

// SignCSR signs the key of a DER certificate request. Only the key is taken from
// it. The chain comes as DER, leaf first. Kinds of errors: Invalid for a request
// that can never be signed, Precondition when the root has expired.
func (a *Authority) SignCSR(_ context.Context, csrDER []byte, req Request) (chain [][]byte, err error) {
	doing := "sign a certificate for " + req.ID.String()
	if len(csrDER) > maxCSR {
		return nil, api.E(api.Invalid, doing, "the request has %d bytes; at most %d", len(csrDER), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "parse the request: %w", err)
	}
	// Proof of possession: who does not hold the key cannot have it certified.
	if err := csr.CheckSignature(); err != nil {
		return nil, api.E(api.Invalid, doing, "the request is not signed by its own key: %w", err)
	}
	return a.sign(doing, csr.PublicKey, req)
}

func (a *Authority) sign(doing string, pub crypto.PublicKey, req Request) ([][]byte, error) {
	if err := checkKey(pub); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	uri, err := a.checkRequest(req)
	if err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	now := a.now()
	if now.After(a.root.NotAfter) {
		return nil, api.E(api.Precondition, doing, "the root expired at %s", a.root.NotAfter.Format(time.RFC3339))
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = DefaultTTL
	}
	notBefore, notAfter := now.Add(-backdate), now.Add(ttl)
	if notAfter.After(a.root.NotAfter) {
		notAfter = a.root.NotAfter
	}
	if notBefore.Before(a.root.NotBefore) {
		notBefore = a.root.NotBefore
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"Portolan"}},
		URIs:                  []*url.URL{uri},
		DNSNames:              req.DNSNames,
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	leaf, err := x509.CreateCertificate(rand.Reader, tmpl, a.root, pub, a.key)
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	chain := [][]byte{leaf}
	if req.IncludeRoot {
		chain = append(chain, bytes.Clone(a.root.Raw))
	}
	return chain, nil
}

// checkRequest refuses what this authority may not or should not sign.
func (a *Authority) checkRequest(req Request) (*url.URL, error) {
	canonical, err := identity.Parse(req.ID.String())
	if err != nil {
		return nil, err
	}
	if canonical != req.ID {
		return nil, api.E(api.Invalid, "", "%+v is no canonical identity", req.ID)
	}
	if req.ID.TrustDomain != a.domain.Name() {
		return nil, api.E(api.Invalid, "", "the identity is of trust domain %q, this authority of %q", req.ID.TrustDomain, a.domain.Name())
	}
	maximum := MaxWorkloadTTL
	if req.ID.Kind == identity.Control || req.ID.Kind == identity.User {
		maximum = MaxTTL
	}
	if req.TTL < 0 || req.TTL > maximum {
		return nil, api.E(api.Invalid, "", "a life of %s is not between 0 and %s", req.TTL, maximum)
	}
	for _, n := range req.DNSNames {
		if n != a.domain.Name() && !strings.HasSuffix(n, "."+a.domain.Name()) {
			return nil, api.E(api.Invalid, "", "DNS name %q is not in %s", n, a.domain.Name())
		}
	}
	id, err := req.ID.SPIFFE()
	if err != nil {
		return nil, err
	}
	return id.URL(), nil
}

func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return api.E(api.Invalid, "", "ECDSA key on %s: use P-256", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return api.E(api.Invalid, "", "RSA key of %d bits: use %d to %d", n, minRSABits, maxRSABits)
		}
	default:
		return api.E(api.Invalid, "", "key of type %T: use ECDSA P-256, Ed25519 or RSA", pub)
	}
	return nil
}

// KeyPair is a key and its certificate.
type KeyPair struct {
	Key crypto.Signer
	// Chain is DER, leaf first.
	Chain [][]byte
	// Bundle is the PEM of the authority's roots.
	Bundle []byte
	// NotAfter is when it expires.
	NotAfter time.Time
}

// Issue makes a P-256 key and signs it, for identities of the authority's own
// process and for operators' files.
func (a *Authority) Issue(_ context.Context, req Request) (*KeyPair, error) {
	doing := "issue a key pair for " + req.ID.String()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	chain, err := a.sign(doing, &key.PublicKey, req)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	return &KeyPair{Key: key, Chain: chain, Bundle: a.Bundle(), NotAfter: leaf.NotAfter}, nil
}

// IssueServer makes key and certificate of a server of this domain's control
// plane: identity /control, the DNS names, and the root in the chain.
func (a *Authority) IssueServer(ctx context.Context, ttl time.Duration, dnsNames ...string) (*KeyPair, error) {
	return a.Issue(ctx, Request{
		ID:       identity.ID{Kind: identity.Control, TrustDomain: a.domain.Name()},
		DNSNames: dnsNames, TTL: ttl, IncludeRoot: true,
	})
}

// TLS gives the form that crypto/tls takes.
func (p *KeyPair) TLS() *tls.Certificate {
	return &tls.Certificate{Certificate: p.Chain, PrivateKey: p.Key}
}

// ChainPEM gives the chain as PEM, leaf first.
func (p *KeyPair) ChainPEM() []byte {
	var out bytes.Buffer
	for _, c := range p.Chain {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c}))
	}
	return out.Bytes()
}

// KeyPEM gives the key as PKCS #8 PEM.
func (p *KeyPair) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.Key)
	if err != nil {
		return nil, api.E(api.Internal, "encode a key", "%w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// WriteFiles writes key.pem, cert.pem and bundle.pem into dir with mode 0600, for
// operators and for software of others. Use identity/source for identities that
// rotate.
func (p *KeyPair) WriteFiles(dir string) error {
	doing := "write key and certificate to " + dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	key, err := p.KeyPEM()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{"key.pem", key}, {"cert.pem", p.ChainPEM()}, {"bundle.pem", p.Bundle}} {
		if err := writeFile(filepath.Join(dir, f.name), f.data, false); err != nil {
			return api.E(api.Internal, doing, "%w", err)
		}
	}
	return nil
}

// Package ca is the certificate authority of one trust domain. It owns the root
// key, sealed at rest, and signs X.509 SVIDs and server certificates. It never
// decides who may have an identity: its callers attest the requester and name
// the ID; whatever a certificate request says about names is ignored.
//
// The root key is sealed with AES-256-GCM under a key that lies outside the
// store, authenticated by trust domain and version, so that a blob that was
// moved to another domain or rolled to another version does not open.
//
// Concurrency: an Authority is immutable after Open and safe for concurrent use.
// Several processes may Open the same storage at once; all get the same root.
package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity/attest"
)

const (
	// DefaultTTL is the life of a certificate when the request names none.
	DefaultTTL = 48 * time.Hour
	// MaxWorkloadTTL bounds certificates of workloads, gateways and nodes.
	MaxWorkloadTTL = 7 * 24 * time.Hour
	// MaxTTL bounds certificates of users and control planes.
	MaxTTL = 398 * 24 * time.Hour

	rootTTL  = 10 * 365 * 24 * time.Hour
	backdate = time.Minute
)

// Config of an Authority.
type Config struct {
	// TrustDomain in full, "eu-west.portolan.internal".
	TrustDomain string
	// Storage keeps the sealed root.
	Storage Storage
	// SealKey is 32 bytes; see LoadOrCreateSealKey.
	SealKey []byte
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Authority signs for one trust domain.
type Authority struct {
	domain spiffeid.TrustDomain
	root   *x509.Certificate
	key    crypto.Signer
	bundle []byte
	now    func() time.Time
}

// record is what lies in the storage.
type record struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	Root        []byte `json:"root"`   // DER
	Sealed      []byte `json:"sealed"` // PKCS #8 of the key
}

const recordVersion = 1

// Open loads the authority of a trust domain, or makes it when there is none.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	doing := "open authority of " + cfg.TrustDomain
	domain, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil || domain.Name() != cfg.TrustDomain {
		return nil, api.E(api.Invalid, doing, "%q is no trust domain", cfg.TrustDomain)
	}
	if len(cfg.SealKey) != sealKeyLen {
		return nil, api.E(api.Invalid, doing, "the sealing key has %d bytes, not %d", len(cfg.SealKey), sealKeyLen)
	}
	if cfg.Storage == nil {
		return nil, api.E(api.Invalid, doing, "no storage")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	key := "authority/" + cfg.TrustDomain
	blob, err := cfg.Storage.LoadBlob(ctx, key)
	if err != nil && api.KindOf(err) == api.NotFound {
		if blob, err = create(domain, cfg); err != nil {
			return nil, api.E(api.Internal, doing, "make a root: %w", err)
		}
		err = cfg.Storage.SaveBlob(ctx, key, blob, true)
		if err != nil && api.KindOf(err) == api.Exists {
			blob, err = cfg.Storage.LoadBlob(ctx, key)
		}
	}
	if err != nil {
		return nil, api.E(api.KindOf(err), doing, "%w", err)
	}
	return load(doing, domain, cfg, blob)
}

func load(doing string, domain spiffeid.TrustDomain, cfg Config, blob []byte) (*Authority, error) {
	var rec record
	if err := json.Unmarshal(blob, &rec); err != nil {
		return nil, api.E(api.Internal, doing, "parse the stored record: %w", err)
	}
	if rec.Version != recordVersion {
		return nil, api.E(api.Precondition, doing, "the stored record has version %d; this program knows %d", rec.Version, recordVersion)
	}
	if rec.TrustDomain != domain.Name() {
		return nil, api.E(api.Precondition, doing, "the stored record is of trust domain %q", rec.TrustDomain)
	}
	root, err := x509.ParseCertificate(rec.Root)
	if err != nil {
		return nil, api.E(api.Internal, doing, "parse the stored root: %w", err)
	}
	pkcs8, err := unseal(cfg.SealKey, rec.Sealed, aad(domain.Name(), rec.Version, rec.Root))
	if err != nil {
		return nil, api.E(api.Precondition, doing, "the sealing key does not open the stored root: wrong key file, or the record was changed")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, api.E(api.Internal, doing, "parse the stored key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(root.PublicKey) {
		return nil, api.E(api.Internal, doing, "the stored key is not the root's")
	}
	bundle := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})
	return &Authority{domain: domain, root: root, key: key, bundle: bundle, now: cfg.Now}, nil
}

// create makes a self-signed root and seals its key.
func create(domain spiffeid.TrustDomain, cfg Config) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(pub)
	now := cfg.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"Portolan"}, CommonName: domain.Name()},
		SubjectKeyId:          id[:20],
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: domain.Name()}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootTTL),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		// A verifier that pools the roots of several domains still cannot be
		// shown an identity of another domain by this key.
		PermittedURIDomains:         []string{domain.Name()},
		PermittedDNSDomains:         []string{domain.Name()},
		PermittedDNSDomainsCritical: true,
	}
	root, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	sealed, err := seal(cfg.SealKey, pkcs8, aad(domain.Name(), recordVersion, root))
	if err != nil {
		return nil, err
	}
	return json.Marshal(record{Version: recordVersion, TrustDomain: domain.Name(), Root: root, Sealed: sealed})
}

// TrustDomain in full.
func (a *Authority) TrustDomain() string { return a.domain.Name() }

// Bundle gives the roots of the domain as PEM.
func (a *Authority) Bundle() []byte { return append([]byte(nil), a.bundle...) }

// Root gives the root that signs now. It must not be changed.
func (a *Authority) Root() *x509.Certificate { return a.root }

// Prove signs SHA-256(token || bundle) with the root's key, for a join.
func (a *Authority) Prove(token string) (proof []byte, err error) {
	return attest.MakeProof(a.key, token, a.bundle)
}

// NewToken mints a join token that carries this authority's root.
func (a *Authority) NewToken() (token, hash string) { return attest.NewToken(a.root.Raw) }

// serial is 127 random bits, more than RFC 5280 and CA/B ask for.
func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[0] &= 0x7f
	n := new(big.Int).SetBytes(b)
	return n.Add(n, big.NewInt(1)) // never zero
}

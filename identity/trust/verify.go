package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
)

// maxChain bounds what a peer may present.
const maxChain = 8

// Verify checks a presented chain, leaf first, as the X.509 SVID standard says:
// the leaf has exactly one URI SAN, an identity of this fleet's form; it is no
// authority; and it chains to a root of its own trust domain, at this time. All
// errors are api.Unknown.
func (s *Set) Verify(chain []*x509.Certificate, now time.Time) (identity.ID, error) {
	const doing = "verify a peer's identity"
	id, err := LeafID(chain)
	if err != nil {
		return identity.ID{}, err
	}
	d, ok := s.load()[id.TrustDomain]
	if !ok {
		return identity.ID{}, api.E(api.Unknown, doing, "%s: trust domain %q is not trusted here", id, id.TrustDomain)
	}
	if err := verifyChain(chain, d.pool, now); err != nil {
		return identity.ID{}, api.E(api.Unknown, doing, "%s: %w", id, err)
	}
	return id, nil
}

// LeafID checks the form of the leaf, not who signed it, and gives its identity.
func LeafID(chain []*x509.Certificate) (identity.ID, error) {
	const doing = "read a peer's identity"
	if len(chain) == 0 {
		return identity.ID{}, api.E(api.Unknown, doing, "no certificate was presented")
	}
	if len(chain) > maxChain {
		return identity.ID{}, api.E(api.Unknown, doing, "%d certificates were presented, at most %d", len(chain), maxChain)
	}
	leaf := chain[0]
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return identity.ID{}, api.E(api.Unknown, doing, "the certificate is an authority's, not a workload's")
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return identity.ID{}, api.E(api.Unknown, doing, "the certificate may not sign")
	}
	if len(leaf.URIs) != 1 {
		return identity.ID{}, api.E(api.Unknown, doing, "the certificate has %d URI names, not one", len(leaf.URIs))
	}
	id, err := identity.Parse(leaf.URIs[0].String())
	if err != nil {
		return identity.ID{}, api.E(api.Unknown, doing, "%w", err)
	}
	return id, nil
}

func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) error {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now,
		// Both usages are in every certificate of the fleet; which one matters is
		// the identity's business.
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err
}

// PeerID gives the identity of the caller of an RPC. It trusts that the
// connection was accepted with a configuration of this package, which verified
// it. Without a client certificate (a joiner's connection, a socket without TLS)
// the error is api.Unknown.
func PeerID(ctx context.Context) (identity.ID, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return identity.ID{}, api.E(api.Unknown, "identify the caller", "no connection")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return identity.ID{}, api.E(api.Unknown, "identify the caller", "the connection has no TLS")
	}
	return ConnectionID(info.State)
}

// ConnectionID is PeerID for a bare TLS connection.
func ConnectionID(state tls.ConnectionState) (identity.ID, error) {
	return LeafID(state.PeerCertificates)
}

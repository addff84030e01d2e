package trust

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
)

// CertFunc gives the certificate to present now. (*source.Source).Certificate is
// one; Static makes one.
type CertFunc func() (*tls.Certificate, error)

// Static always gives the same certificate.
func Static(c *tls.Certificate) CertFunc {
	return func() (*tls.Certificate, error) { return c, nil }
}

// Options of TLS configurations. The zero value is strict.
type Options struct {
	// OptionalClientCert lets clients without a certificate in, for Join. One that
	// is presented must be good all the same. Servers only.
	OptionalClientCert bool
	// Allow may refuse a verified peer; nil accepts all.
	Allow func(identity.ID) error
	// NextProtos of ALPN; "h2" when nil.
	NextProtos []string
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

func (o Options) withDefaults() Options {
	if o.NextProtos == nil {
		o.NextProtos = []string{"h2"}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// base is common to all: TLS 1.3, and no resumption, because a resumed session
// would not be checked against today's roots.
func (o Options) base() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: o.NextProtos, SessionTicketsDisabled: true, Time: o.Now}
}

// ServerTLS is the configuration of a server: it presents cert and accepts
// clients whose identity verifies in set.
func ServerTLS(cert CertFunc, set *Set, o Options) *tls.Config {
	o = o.withDefaults()
	c := o.base()
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert() }
	// The standard verification would pool all roots: ours runs in
	// VerifyConnection, which no handshake skips.
	c.ClientAuth = tls.RequireAnyClientCert
	if o.OptionalClientCert {
		c.ClientAuth = tls.RequestClientCert
	}
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 && o.OptionalClientCert {
			return nil
		}
		_, err := set.verifyPeer(cs, o)
		return err
	}
	return c
}

// ClientTLS is the configuration of a client: it presents cert (nil for none) and
// accepts only a server whose identity verifies in set, is want, and whose
// certificate is for serverName. An empty serverName leaves the name unchecked
// and sends no SNI; a zero want accepts any trusted identity that Allow accepts.
func ClientTLS(cert CertFunc, set *Set, serverName string, want identity.ID, o Options) *tls.Config {
	o = o.withDefaults()
	c := o.base()
	c.ServerName = serverName
	// Names and chains are verified in VerifyConnection, per trust domain.
	c.InsecureSkipVerify = true
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert() }
	}
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		id, err := set.verifyPeer(cs, o)
		if err != nil {
			return err
		}
		if want != (identity.ID{}) && id != want {
			return api.E(api.Unknown, "verify the server", "it is %s, not %s", id, want)
		}
		if serverName == "" {
			return nil
		}
		if err := cs.PeerCertificates[0].VerifyHostname(serverName); err != nil {
			return api.E(api.Unknown, "verify the server", "%s: %w", id, err)
		}
		return nil
	}
	return c
}

func (s *Set) verifyPeer(cs tls.ConnectionState, o Options) (identity.ID, error) {
	id, err := s.Verify(cs.PeerCertificates, o.Now())
	if err != nil {
		return id, err
	}
	if o.Allow != nil {
		if err := o.Allow(id); err != nil {
			return id, api.E(api.Denied, "accept "+id.String(), "%w", err)
		}
	}
	return id, nil
}

// JoinTLS is the configuration of a joiner that knows nothing but its token: the
// server must present a root whose SHA-256 is rootHash, chain to it, be a control
// plane, and have serverName in its certificate. No client certificate is sent.
func JoinTLS(rootHash [32]byte, serverName string, o Options) *tls.Config {
	o = o.withDefaults()
	c := o.base()
	c.ServerName = serverName
	// The only root is the one that the token names; see VerifyConnection.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		return verifyPinned(cs.PeerCertificates, rootHash, serverName, o.Now())
	}
	return c
}

func verifyPinned(chain []*x509.Certificate, rootHash [32]byte, serverName string, now time.Time) error {
	doing := "verify " + serverName + " by the token's root"
	id, err := LeafID(chain)
	if err != nil {
		return err
	}
	var root *x509.Certificate
	for _, c := range chain[1:] {
		if sha256.Sum256(c.Raw) == rootHash {
			root = c
		}
	}
	if root == nil {
		return api.E(api.Unknown, doing, "the server did not present that root: is the token of this server?")
	}
	if len(root.URIs) != 1 || root.URIs[0].Scheme != "spiffe" || root.URIs[0].Host != id.TrustDomain {
		return api.E(api.Unknown, doing, "the root is not of trust domain %q", id.TrustDomain)
	}
	if id.Kind != identity.Control {
		return api.E(api.Unknown, doing, "%s is no control plane", id)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if err := verifyChain(chain, pool, now); err != nil {
		return api.E(api.Unknown, doing, "%w", err)
	}
	if serverName == "" {
		return api.E(api.Invalid, doing, "no server name")
	}
	if err := chain[0].VerifyHostname(serverName); err != nil {
		return api.E(api.Unknown, doing, "%w", err)
	}
	return nil
}

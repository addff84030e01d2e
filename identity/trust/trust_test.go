package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
)

const (
	eu = "eu-west.portolan.internal"
	us = "us-east.portolan.internal"
)

// authority signs whatever the test asks for; no constraint of identity/ca helps
// the verifier here.
type authority struct {
	domain string
	cert   *x509.Certificate
	key    crypto.Signer
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func uris(t testing.TB, ss ...string) []*url.URL {
	t.Helper()
	var out []*url.URL
	for _, s := range ss {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, u)
	}
	return out
}

func newAuthority(t testing.TB, domain string) *authority {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the same name everywhere"}, URIs: uris(t, "spiffe://"+domain),
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{domain: domain, cert: c, key: key}
}

func (a *authority) bundle() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue makes a good certificate of the URI, after change had its way.
func (a *authority) issue(t testing.TB, uri string, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: uris(t, uri), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key, Leaf: leaf}
}

func set(t testing.TB, as ...*authority) *Set {
	t.Helper()
	s := NewSet()
	for _, a := range as {
		if err := s.Put(a.domain, a.bundle()); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// handshake runs both ends and gives their errors.
func handshake(t testing.TB, server, client *tls.Config) (s, c tls.ConnectionState, err error) {
	t.Helper()
	sp, cp := net.Pipe()
	ss, cs := tls.Server(sp, server), tls.Client(cp, client)
	serr := make(chan error, 1)
	go func() {
		err := ss.HandshakeContext(t.Context())
		if err != nil {
			_ = sp.Close()
		} else {
			// In TLS 1.3 the client learns of a refusal when it reads.
			_, err = ss.Write([]byte("x"))
		}
		serr <- err
	}()
	cerr := cs.HandshakeContext(t.Context())
	if cerr == nil {
		_, cerr = cs.Read(make([]byte, 1))
	} else {
		_ = cp.Close()
	}
	err = errors.Join(cerr, <-serr)
	s, c = ss.ConnectionState(), cs.ConnectionState()
	_ = cp.Close()
	_ = sp.Close()
	return s, c, err
}

func TestVerify(t *testing.T) {
	a, b := newAuthority(t, eu), newAuthority(t, us)
	trusted := set(t, a, b)
	const web = "spiffe://" + eu + "/tenant/shop/workload/web"
	now := time.Now()
	chain := func(c *tls.Certificate) []*x509.Certificate {
		var out []*x509.Certificate
		for _, der := range c.Certificate {
			p, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p)
		}
		return out
	}
	good := chain(a.issue(t, web, nil))
	if id, err := trusted.Verify(good, now); err != nil || id.String() != web {
		t.Fatalf("%s %v", id, err)
	}
	// A workload that uses its certificate as an authority.
	middle := a.issue(t, web, nil)
	confused := (&authority{domain: eu, cert: middle.Leaf, key: middle.PrivateKey.(crypto.Signer)}).issue(t, "spiffe://"+eu+"/control", nil)
	confused.Certificate = append(confused.Certificate, a.cert.Raw)
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		at    time.Time
		want  string
	}{
		"identity of A signed by B":   {chain(b.issue(t, web, nil)), now, "unknown authority"},
		"identity of B signed by A":   {chain(a.issue(t, "spiffe://"+us+"/control", nil)), now, "unknown authority"},
		"an unknown domain":           {chain(newAuthority(t, "evil.internal").issue(t, "spiffe://evil.internal/control", nil)), now, "is not trusted here"},
		"a stranger with A's name":    {chain(newAuthority(t, eu).issue(t, web, nil)), now, "unknown authority"},
		"expired":                     {good, now.Add(2 * time.Hour), "expired"},
		"not yet valid":               {good, now.Add(-2 * time.Hour), "expired or is not yet valid"},
		"two URI names":               {chain(a.issue(t, web, func(c *x509.Certificate) { c.URIs = uris(t, web, "spiffe://"+eu+"/control") })), now, "2 URI names"},
		"no URI name":                 {chain(a.issue(t, web, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"x"} })), now, "0 URI names"},
		"not SPIFFE":                  {chain(a.issue(t, "https://"+eu+"/control", nil)), now, "scheme"},
		"a path of no meaning":        {chain(a.issue(t, "spiffe://"+eu+"/admin", nil)), now, "stands for nothing"},
		"an authority as leaf":        {[]*x509.Certificate{a.cert}, now, "authority's"},
		"a leaf that is an authority": {chain(a.issue(t, web, func(c *x509.Certificate) { c.IsCA = true })), now, "authority's"},
		"a leaf that may sign":        {chain(a.issue(t, web, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign; c.IsCA = true })), now, "authority's"},
		"a leaf without signing":      {chain(a.issue(t, web, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })), now, "may not sign"},
		"a workload's cert as middle": {chain(confused), now, ""},
		"nothing":                     {nil, now, "no certificate"},
		"a very long chain":           {slices.Repeat(good, 10), now, "at most"},
		"another cert in front":       {append([]*x509.Certificate{b.cert}, good...), now, "authority's"},
		"unhandled critical extension": {chain(a.issue(t, web, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		})), now, "critical extension"},
	} {
		id, err := trusted.Verify(c.chain, c.at)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s %v", name, id, err)
			continue
		}
		if api.KindOf(err) != api.Unknown || id != (identity.ID{}) {
			t.Errorf("%s: kind %v, identity %s", name, api.KindOf(err), id)
		}
	}
}

func TestHandshakes(t *testing.T) {
	a, b := newAuthority(t, eu), newAuthority(t, us)
	both := set(t, a, b)
	control := identity.ID{Kind: identity.Control, TrustDomain: eu}
	server := Static(a.issue(t, control.String(), func(c *x509.Certificate) { c.DNSNames = []string{"cluster." + eu} }))
	node := Static(a.issue(t, "spiffe://"+eu+"/node/n1", nil))
	forged := Static(b.issue(t, "spiffe://"+eu+"/node/n1", nil))
	expired := Static(a.issue(t, "spiffe://"+eu+"/node/n1", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }))
	nodesOnly := Options{Allow: func(id identity.ID) error {
		if id.Kind != identity.Node {
			return errors.New("only nodes")
		}
		return nil
	}}
	optional := Options{OptionalClientCert: true}
	for name, c := range map[string]struct {
		server *tls.Config
		client *tls.Config
		want   string // part of the error; empty is success
	}{
		"good":                        {ServerTLS(server, both, Options{}), ClientTLS(node, both, "cluster."+eu, control, Options{}), ""},
		"good, any server":            {ServerTLS(server, both, Options{}), ClientTLS(node, both, "", identity.ID{}, Options{}), ""},
		"good, allowed":               {ServerTLS(server, both, nodesOnly), ClientTLS(node, both, "cluster."+eu, control, Options{}), ""},
		"good, joiner":                {ServerTLS(server, both, optional), JoinTLS(sha256.Sum256(a.cert.Raw), "cluster."+eu, Options{}), ""},
		"good, optional and given":    {ServerTLS(server, both, optional), ClientTLS(node, both, "cluster."+eu, control, Options{}), ""},
		"client not allowed":          {ServerTLS(server, both, nodesOnly), ClientTLS(server, both, "cluster."+eu, control, Options{}), "only nodes"},
		"no client certificate":       {ServerTLS(server, both, Options{}), ClientTLS(nil, both, "cluster."+eu, control, Options{}), "client didn't provide a certificate"},
		"client forged":               {ServerTLS(server, both, Options{}), ClientTLS(forged, both, "cluster."+eu, control, Options{}), "unknown authority"},
		"client forged, optional":     {ServerTLS(server, both, optional), ClientTLS(forged, both, "cluster."+eu, control, Options{}), "unknown authority"},
		"client expired":              {ServerTLS(server, both, Options{}), ClientTLS(expired, both, "cluster."+eu, control, Options{}), "expired"},
		"client of no trusted domain": {ServerTLS(server, set(t, b), Options{}), ClientTLS(node, both, "cluster."+eu, control, Options{}), "is not trusted here"},
		"server has another name":     {ServerTLS(server, both, Options{}), ClientTLS(node, both, "federation.portolan.internal", control, Options{}), "not federation.portolan.internal"},
		"server is another":           {ServerTLS(node, both, Options{}), ClientTLS(node, both, "", control, Options{}), "it is spiffe://" + eu + "/node/n1"},
		"server not trusted":          {ServerTLS(server, both, Options{}), ClientTLS(node, set(t, b), "cluster."+eu, control, Options{}), "is not trusted here"},
		"TLS 1.2":                     {ServerTLS(server, both, optional), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "protocol version"},
		"joiner, another root":        {ServerTLS(server, both, optional), JoinTLS(sha256.Sum256(b.cert.Raw), "cluster."+eu, Options{}), "did not present that root"},
		"joiner, another name":        {ServerTLS(server, both, optional), JoinTLS(sha256.Sum256(a.cert.Raw), "cluster."+us, Options{}), "not cluster." + us},
		"joiner, not a control plane": {ServerTLS(node, both, optional), JoinTLS(sha256.Sum256(a.cert.Raw), "cluster."+eu, Options{}), "is no control plane"},
	} {
		t.Run(name, func(t *testing.T) {
			s, cl, err := handshake(t, c.server, c.client)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if s.Version != tls.VersionTLS13 || cl.DidResume || cl.NegotiatedProtocol != "h2" {
					t.Errorf("%+v", cl)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// A server presents the true root beside a chain of its own making.
func TestJoinIsNotFooledByAPresentedRoot(t *testing.T) {
	a, evil := newAuthority(t, eu), newAuthority(t, eu)
	forged := evil.issue(t, "spiffe://"+eu+"/control", func(c *x509.Certificate) { c.DNSNames = []string{"cluster." + eu} })
	forged.Certificate = append(forged.Certificate, a.cert.Raw)
	_, _, err := handshake(t, ServerTLS(Static(forged), set(t, a), Options{OptionalClientCert: true}), JoinTLS(sha256.Sum256(a.cert.Raw), "cluster."+eu, Options{}))
	if err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("%v", err)
	}
}

func TestChangesActOnTheNextHandshake(t *testing.T) {
	a := newAuthority(t, eu)
	trusted := set(t, a)
	server, client := Static(a.issue(t, "spiffe://"+eu+"/control", nil)), Static(a.issue(t, "spiffe://"+eu+"/node/n1", nil))
	sc, cc := ServerTLS(server, trusted, Options{}), ClientTLS(client, set(t, a), "", identity.ID{}, Options{})
	// A client with a cache of sessions gets none to resume.
	cc.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	cc.ServerName = "x"
	for range 2 {
		if _, c, err := handshake(t, sc, cc); err != nil || c.DidResume {
			t.Fatalf("%v, resumed %v", err, c.DidResume)
		}
	}
	trusted.Delete(eu)
	if _, _, err := handshake(t, sc, cc); err == nil {
		t.Error("accepted after its roots were removed")
	}
	if err := trusted.Put(eu, a.bundle()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := handshake(t, sc, cc); err != nil {
		t.Error(err)
	}
}

func TestExpiryInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, eu)
		server, client := Static(a.issue(t, "spiffe://"+eu+"/control", nil)), Static(a.issue(t, "spiffe://"+eu+"/node/n1", nil))
		sc, cc := ServerTLS(server, set(t, a), Options{}), ClientTLS(client, set(t, a), "", identity.ID{}, Options{})
		if _, _, err := handshake(t, sc, cc); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * time.Hour)
		if _, _, err := handshake(t, sc, cc); err == nil {
			t.Error("accepted after expiry")
		}
	})
}

func TestSet(t *testing.T) {
	a, b := newAuthority(t, eu), newAuthority(t, us)
	s := set(t, a)
	for name, p := range map[string][]byte{
		"empty": nil, "no PEM": []byte("x"), "PEM and more": append(a.bundle(), 'x'), "another domain's root": b.bundle(),
		"a leaf":     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.issue(t, "spiffe://"+eu+"/control", nil).Certificate[0]}),
		"a key":      pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
		"too many":   bytes.Repeat(a.bundle(), 17),
		"no content": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}),
	} {
		if err := s.Put(eu, p); api.KindOf(err) != api.Invalid {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.Replace(map[string][]byte{us: b.bundle(), eu: p}); err == nil {
			t.Errorf("%s: replaced", name)
		}
	}
	if got, ok := s.Bundle(eu); !ok || !bytes.Equal(got, a.bundle()) || !slices.Equal(s.Domains(), []string{eu}) {
		t.Error("a refused bundle changed the set")
	}
	if err := s.Replace(map[string][]byte{us: b.bundle()}); err != nil || !slices.Equal(s.Domains(), []string{us}) {
		t.Errorf("%v %v", s.Domains(), err)
	}
	if !BundleHas(append(b.bundle(), a.bundle()...), sha256.Sum256(a.cert.Raw)) || BundleHas(b.bundle(), sha256.Sum256(a.cert.Raw)) || BundleHas(nil, [32]byte{}) {
		t.Error("BundleHas")
	}
	var zero Set
	if len(zero.Domains()) > 0 {
		t.Error("the zero set trusts")
	}
	zero.Delete(eu)
}

func TestPeerID(t *testing.T) {
	a := newAuthority(t, eu)
	leaf := a.issue(t, "spiffe://"+eu+"/node/n1", nil).Leaf
	with := func(info credentials.AuthInfo) (identity.ID, error) {
		return PeerID(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: info}))
	}
	if id, err := with(credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}}); err != nil || id != (identity.ID{Kind: identity.Node, TrustDomain: eu, Name: "n1"}) {
		t.Errorf("%s %v", id, err)
	}
	for name, err := range map[string]error{
		"no peer": func() error { _, err := PeerID(t.Context()); return err }(),
		"no TLS":  func() error { _, err := with(nil); return err }(),
		"no cert": func() error { _, err := with(credentials.TLSInfo{}); return err }(),
	} {
		if api.KindOf(err) != api.Unknown {
			t.Errorf("%s: %v", name, err)
		}
	}
}

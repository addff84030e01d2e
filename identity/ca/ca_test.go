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
	"crypto/x509"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
)

const domain = "eu-west.portolan.internal"

var web = identity.ID{Kind: identity.Workload, TrustDomain: domain, Tenant: "shop", Workload: "web"}

func open(t testing.TB, td string, st Storage, now func() time.Time) *Authority {
	t.Helper()
	a, err := Open(t.Context(), Config{TrustDomain: td, Storage: st, SealKey: bytes.Repeat([]byte{7}, 32), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func csr(t testing.TB, key crypto.Signer, tmpl *x509.CertificateRequest) []byte {
	t.Helper()
	if tmpl == nil {
		tmpl = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func p256(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSignedCertificate(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	a := open(t, domain, DirStorage(t.TempDir()), func() time.Time { return now })
	key := p256(t)
	u, _ := url.Parse("spiffe://" + domain + "/control")
	// What the request says about names counts for nothing.
	chain, err := a.SignCSR(t.Context(), csr(t, key, &x509.CertificateRequest{URIs: []*url.URL{u}, DNSNames: []string{"evil.example"}}), Request{ID: web})
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 {
		t.Fatalf("%d certificates", len(chain))
	}
	c, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != web.String() || len(c.DNSNames) != 0 || len(c.IPAddresses) != 0 || len(c.EmailAddresses) != 0 || c.Subject.CommonName != "" {
		t.Errorf("names %v %v %v", c.URIs, c.DNSNames, c.Subject)
	}
	if c.IsCA || !c.BasicConstraintsValid || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.ExtKeyUsage) != 2 {
		t.Errorf("usage: CA %v, %v, %v", c.IsCA, c.KeyUsage, c.ExtKeyUsage)
	}
	if !c.NotBefore.Equal(now.Add(-backdate)) && !c.NotBefore.Equal(a.root.NotBefore) {
		t.Errorf("not before %s", c.NotBefore)
	}
	if !c.NotAfter.Equal(now.Add(48 * time.Hour)) {
		t.Errorf("not after %s", c.NotAfter)
	}
	if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() < 64 {
		t.Errorf("serial %s", c.SerialNumber)
	}
	// The judge of others: go-spiffe accepts it as an X.509 SVID of its domain.
	b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(domain), a.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.ParseAndVerify(chain, b, x509svid.WithTime(now))
	if err != nil || id.String() != web.String() {
		t.Errorf("go-spiffe: %s %v", id, err)
	}
}

func TestRootIsConstrained(t *testing.T) {
	a := open(t, domain, DirStorage(t.TempDir()), nil)
	if !a.root.IsCA || !a.root.MaxPathLenZero || a.root.MaxPathLen != 0 {
		t.Error("the root may sign authorities")
	}
	// A stolen key: it signs an identity of another domain. A verifier that pools
	// roots refuses all the same.
	forge := func(uri string, dns ...string) error {
		u, _ := url.Parse(uri)
		key := p256(t)
		tmpl := &x509.Certificate{
			SerialNumber: serial(), URIs: []*url.URL{u}, DNSNames: dns, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, a.root, key.Public(), a.key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(a.root)
		_, err = c.Verify(x509.VerifyOptions{Roots: pool})
		return err
	}
	if err := forge("spiffe://"+domain+"/control", "cluster."+domain); err != nil {
		t.Errorf("its own: %v", err)
	}
	for _, uri := range []string{"spiffe://us-east.portolan.internal/control", "spiffe://portolan.internal/control"} {
		if err := forge(uri); err == nil {
			t.Errorf("%s is accepted", uri)
		}
	}
	if err := forge("spiffe://"+domain+"/control", "federation.portolan.internal"); err == nil {
		t.Error("a DNS name of another domain is accepted")
	}
}

func TestRefusedRequests(t *testing.T) {
	a := open(t, domain, DirStorage(t.TempDir()), nil)
	good := csr(t, p256(t), nil)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GODEBUG", "rsa1024min=0")
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	tampered := bytes.Clone(good)
	tampered[len(tampered)-1] ^= 1
	for name, c := range map[string]struct {
		csr []byte
		req Request
	}{
		"another domain":          {good, Request{ID: identity.ID{Kind: identity.Control, TrustDomain: "us-east.portolan.internal"}}},
		"the fleet's domain":      {good, Request{ID: identity.ID{Kind: identity.User, TrustDomain: "portolan.internal", Name: "root"}}},
		"no identity":             {good, Request{}},
		"a path in a name":        {good, Request{ID: identity.ID{Kind: identity.Node, TrustDomain: domain, Name: "n/../../control"}}},
		"an empty name":           {good, Request{ID: identity.ID{Kind: identity.Node, TrustDomain: domain}}},
		"superfluous fields":      {good, Request{ID: identity.ID{Kind: identity.Control, TrustDomain: domain, Name: "x"}}},
		"too long a life":         {good, Request{ID: web, TTL: MaxWorkloadTTL + 1}},
		"a negative life":         {good, Request{ID: web, TTL: -1}},
		"a DNS name elsewhere":    {good, Request{ID: web, DNSNames: []string{"federation.portolan.internal"}}},
		"a DNS name that ends so": {good, Request{ID: web, DNSNames: []string{"evil" + domain}}},
		"P-384":                   {csr(t, p384, nil), Request{ID: web}},
		"RSA 1024":                {csr(t, weak, nil), Request{ID: web}},
		"a wrong signature":       {tampered, Request{ID: web}},
		"no request":              {nil, Request{ID: web}},
		"a huge request":          {make([]byte, 1<<20), Request{ID: web}},
	} {
		if chain, err := a.SignCSR(t.Context(), c.csr, c.req); err == nil || chain != nil || api.KindOf(err) != api.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"ed25519": ed, "rsa 2048": strong} {
		if _, err := a.SignCSR(t.Context(), csr(t, key, nil), Request{ID: web}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReopenAndMisuse(t *testing.T) {
	dir := t.TempDir()
	st := DirStorage(dir)
	a := open(t, domain, st, nil)
	if b := open(t, domain, st, nil); !bytes.Equal(a.Bundle(), b.Bundle()) {
		t.Error("another root after reopening")
	}
	if other := open(t, "us-east.portolan.internal", st, nil); bytes.Equal(a.Bundle(), other.Bundle()) {
		t.Error("two domains share a root")
	}
	blob, err := st.LoadBlob(t.Context(), "authority/"+domain)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(blob, der) {
		t.Error("the key lies there in clear")
	}
	try := func(name string, cfg Config, want string) {
		t.Helper()
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	key := bytes.Repeat([]byte{7}, 32)
	try("another sealing key", Config{TrustDomain: domain, Storage: st, SealKey: bytes.Repeat([]byte{8}, 32)}, "does not open")
	try("a short sealing key", Config{TrustDomain: domain, Storage: st, SealKey: key[:16]}, "16 bytes")
	try("no domain", Config{Storage: st, SealKey: key}, "is no trust domain")
	try("upper case", Config{TrustDomain: "EU.portolan.internal", Storage: st, SealKey: key}, "is no trust domain")
	// A blob moved to another domain's place must not open there.
	moved := DirStorage(t.TempDir())
	if err := moved.SaveBlob(t.Context(), "authority/us-east.portolan.internal", blob, true); err != nil {
		t.Fatal(err)
	}
	try("a moved blob", Config{TrustDomain: "us-east.portolan.internal", Storage: moved, SealKey: key}, `is of trust domain "eu-west.portolan.internal"`)
	renamed := bytes.ReplaceAll(blob, []byte(`"trust_domain":"eu-west.`), []byte(`"trust_domain":"us-east.`))
	if err := moved.SaveBlob(t.Context(), "authority/us-east.portolan.internal", renamed, false); err != nil {
		t.Fatal(err)
	}
	try("a renamed blob", Config{TrustDomain: "us-east.portolan.internal", Storage: moved, SealKey: key}, "does not open")
	info, err := os.Stat(filepath.Join(dir, "authority_2F"+domain+".sealed"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
}

// A folder can become a Secret whose keys are its files' names; one from before
// that still opens, and is not made anew beside.
func TestFileNamesAreKeysOfASecret(t *testing.T) {
	dir := t.TempDir()
	st := DirStorage(dir)
	a := open(t, domain, st, time.Now)
	legal := regexp.MustCompile(`^[-._a-zA-Z0-9]+$`)
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || !legal.MatchString(files[0].Name()) {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, key := range []string{"a/b", "a_2Fb", "a.b", "ä%"} {
		if err := st.SaveBlob(t.Context(), key, []byte(key), true); err != nil {
			t.Errorf("%q collides: %v", key, err)
		}
	}
	if err := os.Rename(filepath.Join(dir, files[0].Name()), filepath.Join(dir, "authority%2F"+domain+".sealed")); err != nil {
		t.Fatal(err)
	}
	if b := open(t, domain, st, time.Now); !bytes.Equal(a.Bundle(), b.Bundle()) {
		t.Error("the authority under its old name was not taken")
	}
	if err := st.SaveBlob(t.Context(), "authority/"+domain, []byte("x"), true); api.KindOf(err) != api.Exists {
		t.Errorf("made beside the old one: %v", err)
	}
}

// Two replicas that open an empty storage at once get one root.
func TestConcurrentCreation(t *testing.T) {
	st := DirStorage(t.TempDir())
	bundles := make([][]byte, 8)
	var wg sync.WaitGroup
	for i := range bundles {
		wg.Go(func() {
			a, err := Open(context.Background(), Config{TrustDomain: domain, Storage: st, SealKey: bytes.Repeat([]byte{7}, 32)})
			if err != nil {
				t.Error(err)
				return
			}
			bundles[i] = a.Bundle()
		})
	}
	wg.Wait()
	for _, b := range bundles[1:] {
		if !bytes.Equal(b, bundles[0]) {
			t.Fatal("two roots")
		}
	}
}

func TestSealKeyFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys", "seal.key")
	a, err := LoadOrCreateSealKey(file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadOrCreateSealKey(file)
	if err != nil || !bytes.Equal(a, b) || len(a) != 32 {
		t.Errorf("%x %x %v", a, b, err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateSealKey(file); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a readable key file: %v", err)
	}
	// What a kubelet makes of a Secret's file of mode 0400 in a pod with an fsGroup.
	if err := os.Chmod(file, 0o440); err != nil {
		t.Fatal(err)
	}
	if b, err := LoadOrCreateSealKey(file); err != nil || !bytes.Equal(a, b) {
		t.Errorf("a key file for our group: %v", err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(file, 0, 54321); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOrCreateSealKey(file); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("a key file for a foreign group: %v", err)
		}
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateSealKey(file); err == nil {
		t.Error("accepted a short key")
	}
}

func TestRootBoundsWhatItSigns(t *testing.T) {
	now := time.Now()
	a := open(t, domain, DirStorage(t.TempDir()), func() time.Time { return now })
	now = a.root.NotAfter.Add(-time.Hour)
	p, err := a.Issue(t.Context(), Request{ID: web})
	if err != nil || p.NotAfter.After(a.root.NotAfter) {
		t.Errorf("outlives the root: %v", err)
	}
	now = a.root.NotAfter.Add(time.Second)
	if _, err := a.Issue(t.Context(), Request{ID: web}); api.KindOf(err) != api.Precondition {
		t.Errorf("an expired root signs: %v", err)
	}
}

func TestServerPairAndProof(t *testing.T) {
	a := open(t, domain, DirStorage(t.TempDir()), nil)
	p, err := a.IssueServer(t.Context(), time.Hour, "cluster."+domain)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Chain) != 2 || !bytes.Equal(p.Chain[1], a.root.Raw) {
		t.Error("a server's chain must bring the root for joiners")
	}
	dir := filepath.Join(t.TempDir(), "out")
	if err := p.WriteFiles(dir); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"key.pem", "cert.pem", "bundle.pem"} {
		if info, err := os.Stat(filepath.Join(dir, f)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, info, err)
		}
	}
	token, _ := a.NewToken()
	proof, err := a.Prove(token)
	if err != nil {
		t.Fatal(err)
	}
	if err := attest.VerifyProof(token, a.Bundle(), proof); err != nil {
		t.Error(err)
	}
}

// BenchmarkT14_Sign is one workload certificate from a request: parse, check the
// proof of possession, sign. The peer is the signing alone, by the standard library.
func BenchmarkT14_Sign(b *testing.B) {
	a := open(b, domain, DirStorage(b.TempDir()), nil)
	der := csr(b, p256(b), nil)
	benchmarkSign(b, func() error {
		_, err := a.SignCSR(b.Context(), der, Request{ID: web})
		return err
	})
}

func BenchmarkT14_Sign_Peer_CreateCertificate(b *testing.B) {
	key, leaf := p256(b), p256(b)
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true}
	benchmarkSign(b, func() error {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/web"}}}
		_, err := x509.CreateCertificate(rand.Reader, tmpl, parent, leaf.Public(), key)
		return err
	})
}

func benchmarkSign(b *testing.B, sign func() error) {
	b.Helper()
	cpu := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	// With -benchtime 1x too there are enough certificates for a figure.
	const batch = 500
	start := cpu()
	for b.Loop() {
		for range batch {
			if err := sign(); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.N)*batch/(cpu()-start).Seconds(), "svids/cpu-s")
}

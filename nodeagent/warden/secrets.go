package warden

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/identity/workloadapi"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
	"github.com/portolan-io/portolan/xds/distribute"
	"github.com/portolan-io/portolan/xds/translate"
)

// keypair is a replica's identity as read from disk.
type keypair struct {
	chainPEM, keyPEM []byte
	cert             *tls.Certificate
	// id is the SPIFFE URI in the leaf.
	id string
	// stamp tells one state of the files from another.
	stamp string
}

// identityStamp is cheap to ask for often; empty when there is no certificate.
// Every rotation replaces the chain once, when its key is there already.
func identityStamp(dir string) string {
	st, err := os.Stat(filepath.Join(dir, "chain.pem"))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%d/%d/%d", st.ModTime().UnixNano(), st.Size(), socket.InodeOf(st))
}

// readIdentity reads key and chain as the agent stored them, a rotation that it
// did not live to finish included.
func readIdentity(dir, want string) (*keypair, error) {
	stamp := identityStamp(dir)
	id, err := source.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if id.ID.String() != want {
		return nil, fmt.Errorf("read identity: it is %s, not %s", id.ID, want)
	}
	der, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	k := &keypair{cert: id.TLS(), id: want, stamp: stamp, keyPEM: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}
	for _, c := range id.RawChain() {
		k.chainPEM = append(k.chainPEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	return k, nil
}

// secret is the identity in the form that Envoy takes by SDS. Roots and accepted
// peers are made by translation.
func (k *keypair) secret() (*distribute.Resource, error) {
	r, err := distribute.NewResource(distribute.SecretType, translate.SecretIdentity, &tlsv3.Secret{
		Name: translate.SecretIdentity,
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(k.chainPEM), PrivateKey: inline(k.keyPEM),
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("make identity secret: %w", err)
	}
	return r, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// workloadSource feeds one replica's Workload API.
type workloadSource struct {
	mu      sync.Mutex
	update  workloadapi.Update
	have    bool
	changed chan struct{}
}

func newWorkloadSource() *workloadSource { return &workloadSource{changed: make(chan struct{})} }

// Current implements workloadapi.Source.
func (s *workloadSource) Current() (workloadapi.Update, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.update, s.have
}

// Changed implements workloadapi.Source.
func (s *workloadSource) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *workloadSource) set(u workloadapi.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.update, s.have = u, true
	close(s.changed)
	s.changed = make(chan struct{})
}

// workloadUpdate is the same identity for the workload itself. An identity that
// ran out is withheld.
func workloadUpdate(k *keypair, ownDomain string, bundles []*linkv1.TrustBundle, now time.Time) (workloadapi.Update, error) {
	u := workloadapi.Update{TrustDomain: ownDomain, Bundles: map[string][]*x509.Certificate{}}
	for _, b := range bundles {
		roots, err := parseRoots(b.GetX509Roots())
		if err != nil {
			return u, fmt.Errorf("bundle of %s: %w", b.GetTrustDomain(), err)
		}
		u.Bundles[b.GetTrustDomain()] = roots
	}
	signer, ok := k.cert.PrivateKey.(crypto.Signer)
	if !ok {
		return u, fmt.Errorf("the key of %s cannot sign", k.id)
	}
	if now.Before(k.cert.Leaf.NotAfter) {
		u.SVIDs = []workloadapi.SVID{{ID: k.id, Chain: k.cert.Certificate, Key: signer}}
	}
	return u, nil
}

func parseRoots(b []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return out, nil
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
}

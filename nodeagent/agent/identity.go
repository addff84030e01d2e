package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// pair is a key with its certificate chain.
type pair struct {
	key   *ecdsa.PrivateKey
	chain [][]byte // DER, leaf first
	leaf  *x509.Certificate
}

func newKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func newCSR(key *ecdsa.PrivateKey, name string) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
}

// makePair checks that the chain is for the key.
func makePair(key *ecdsa.PrivateKey, chain [][]byte) (*pair, error) {
	if len(chain) == 0 {
		return nil, errors.New("the chain is empty")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("parse leaf: %w", err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("the certificate is for another key")
	}
	return &pair{key, chain, leaf}, nil
}

func (p *pair) write(dir string, sync bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return err
	}
	var chain bytes.Buffer
	for _, c := range p.chain {
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c}); err != nil {
			return err
		}
	}
	err = writeFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), sync)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "chain.pem"), chain.Bytes(), sync)
}

func readPair(dir string) (*pair, error) {
	kb, err := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err != nil {
		return nil, err
	}
	cb, err := os.ReadFile(filepath.Join(dir, "chain.pem"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(kb)
	if block == nil {
		return nil, errors.New("key.pem: no PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key.pem: %w", err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("key.pem: not an ECDSA key")
	}
	var chain [][]byte
	for block, rest := pem.Decode(cb); block != nil; block, rest = pem.Decode(rest) {
		chain = append(chain, block.Bytes)
	}
	return makePair(key, chain)
}

// renewAt is half of the life, less up to a tenth of it, so that what was made
// together is not renewed together.
func (p *pair) renewAt(random float64) time.Time {
	life := p.leaf.NotAfter.Sub(p.leaf.NotBefore)
	return p.leaf.NotBefore.Add(life/2 - time.Duration(random*float64(life)/10))
}

func (p *pair) valid(now time.Time) bool {
	return now.After(p.leaf.NotBefore.Add(-time.Minute)) && now.Before(p.leaf.NotAfter)
}

// sign brings about the identity of an allocation, and says when to do so again.
// The key is made here and never leaves.
func (a *Agent) sign(ctx context.Context, allocation string) (time.Time, error) {
	dir := a.runPath("identity", allocation)
	now := time.Now()
	held, _ := readPair(dir) // absent or broken: made anew
	if held != nil && held.valid(now) {
		if at := held.renewAt(a.cfg.Rand()); at.After(now) {
			return at, nil
		}
	}
	p, err := a.signNew(ctx, allocation)
	if err != nil {
		if held != nil && held.valid(now) {
			a.log.Warn("identity not renewed; the present one is still valid", "allocation", allocation, "expires", held.leaf.NotAfter, "error", err)
			return now.Add(a.jittered(30 * time.Second)), nil
		}
		return time.Time{}, err
	}
	if err := p.write(dir, false); err != nil {
		return time.Time{}, err
	}
	a.pokeWarden()
	return p.renewAt(a.cfg.Rand()), nil
}

func (a *Agent) signNew(ctx context.Context, allocation string) (*pair, error) {
	doing := "sign identity of " + allocation
	a.mu.Lock()
	link := a.link
	a.mu.Unlock()
	if link == nil {
		return nil, api.E(api.Unavailable, doing, "the cluster is away")
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	csr, err := newCSR(key, allocation)
	if err != nil {
		return nil, err
	}
	resp, err := nodev1.NewNodeServiceClient(link).SignWorkload(ctx, &nodev1.SignWorkloadRequest{Allocation: allocation, Csr: csr})
	if err != nil {
		return nil, api.E(api.KindOf(err), doing, "%w", err)
	}
	p, err := makePair(key, resp.GetChain())
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	return p, nil
}

// self is the node's own identity, in memory and on disk.
type self struct {
	node, dir string

	mu          sync.Mutex
	pair        *pair
	bundle      []byte
	trustDomain string
}

func newSelf(node, dir string) *self { return &self{node: node, dir: dir} }

func (s *self) credentials() Credentials {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := Credentials{Bundle: s.bundle, TrustDomain: s.trustDomain}
	if s.pair != nil {
		c.Certificate = tls.Certificate{Certificate: s.pair.chain, PrivateKey: s.pair.key, Leaf: s.pair.leaf}
	}
	return c
}

func (s *self) setTrustDomain(td string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if td != "" {
		s.trustDomain = td
	}
}

// load reads the identity; an error when there is none that is valid.
func (s *self) load(now time.Time) error {
	p, err := readPair(s.dir)
	if err != nil {
		return err
	}
	bundle, err := os.ReadFile(filepath.Join(s.dir, "bundle.pem"))
	if err != nil {
		return err
	}
	if !p.valid(now) {
		return fmt.Errorf("the node's certificate ended at %s", p.leaf.NotAfter)
	}
	td := ""
	if len(p.leaf.URIs) > 0 {
		td = p.leaf.URIs[0].Host
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pair, s.bundle, s.trustDomain = p, bundle, td
	return nil
}

// take makes what the cluster gave durable, then uses it.
func (s *self) take(key *ecdsa.PrivateKey, chain [][]byte, bundle []byte, now time.Time) error {
	p, err := makePair(key, chain)
	if err != nil {
		return err
	}
	if err := p.write(s.dir, true); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(s.dir, "bundle.pem"), bundle, true); err != nil {
		return err
	}
	return s.load(now)
}

func (s *self) renewAt(random float64) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pair.renewAt(random)
}

// enroll gives the node its identity: from disk, or by its join token.
func (a *Agent) enroll(ctx context.Context) error {
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		held := a.self.load(time.Now())
		if held == nil {
			return nil
		}
		err := a.join(ctx)
		if err == nil {
			a.log.Info("joined the cluster", "node", a.cfg.Node)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.log.Warn("no identity yet: not joined", "held", held, "error", err, "retry_in", wait)
		if !sleep(ctx, a.jittered(wait)) {
			return ctx.Err()
		}
	}
}

// joinKey is made once and kept: a join that is repeated with the same token and
// key gets the same answer.
func (a *Agent) joinKey() (*ecdsa.PrivateKey, error) {
	path := a.path("agent", "join-key.pem")
	if b, err := os.ReadFile(path); err == nil {
		if block, _ := pem.Decode(b); block != nil {
			if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if key, ok := k.(*ecdsa.PrivateKey); ok {
					return key, nil
				}
			}
		}
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), true)
}

func (a *Agent) join(ctx context.Context) error {
	token, err := a.cfg.Token()
	if err != nil {
		return fmt.Errorf("read join token: %w", err)
	}
	key, err := a.joinKey()
	if err != nil {
		return err
	}
	csr, err := newCSR(key, a.cfg.Node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	conn, err := a.cfg.Upstream.Join(ctx, token)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	resp, err := nodev1.NewNodeServiceClient(conn).Join(ctx, &nodev1.JoinRequest{Token: token, Node: a.cfg.Node, Csr: csr, Facts: a.cfg.Facts})
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if err := a.self.take(key, resp.GetChain(), resp.GetBundle(), time.Now()); err != nil {
		return err
	}
	return os.Remove(a.path("agent", "join-key.pem"))
}

// renewLoop renews the node's own identity at half of its life.
func (a *Agent) renewLoop(ctx context.Context) {
	next := a.self.renewAt(a.cfg.Rand())
	for sleep(ctx, max(time.Until(next), time.Second)) {
		if err := a.renew(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("node identity not renewed", "error", err)
			next = time.Now().Add(a.jittered(30 * time.Second))
			continue
		}
		next = a.self.renewAt(a.cfg.Rand())
	}
}

func (a *Agent) renew(ctx context.Context) error {
	a.mu.Lock()
	link := a.link
	a.mu.Unlock()
	if link == nil {
		return api.E(api.Unavailable, "renew node identity", "the cluster is away")
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	csr, err := newCSR(key, a.cfg.Node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	resp, err := nodev1.NewNodeServiceClient(link).Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	if err != nil {
		return err
	}
	return a.self.take(key, resp.GetChain(), resp.GetBundle(), time.Now())
}

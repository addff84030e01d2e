package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/identity/source"
)

// Identities are renewed at half of their life, less up to a tenth of it, so that
// what was made together is not renewed together.
const (
	renewAt     = 0.5
	renewJitter = 0.1
)

func (a *Agent) renewShare() float64 { return renewAt - renewJitter*a.cfg.Rand() }

// sign brings about the identity of an allocation, and says when to do so again.
// The key is made here and never leaves.
func (a *Agent) sign(ctx context.Context, allocation string) (time.Time, error) {
	dir := a.runPath("identity", allocation)
	now := time.Now()
	held, err := source.ReadDir(dir)
	valid := err == nil && now.Before(held.NotAfter()) // absent or broken: made anew
	if valid {
		if at := held.After(a.renewShare()); at.After(now) {
			return at, nil
		}
	}
	id, err := a.signNew(ctx, allocation)
	if err != nil {
		if valid {
			a.log.Warn("identity not renewed; the present one is still valid", "allocation", allocation, "expires", held.NotAfter(), "error", err)
			return now.Add(a.jittered(30 * time.Second)), nil
		}
		return time.Time{}, err
	}
	if err := source.WriteDir(dir, id); err != nil {
		return time.Time{}, err
	}
	a.pokeWarden()
	return id.After(a.renewShare()), nil
}

func (a *Agent) signNew(ctx context.Context, allocation string) (*source.Identity, error) {
	doing := "sign identity of " + allocation
	a.mu.Lock()
	link := a.link
	a.mu.Unlock()
	if link == nil {
		return nil, api.E(api.Unavailable, doing, "the cluster is away")
	}
	key, csr, err := source.NewCSR()
	if err != nil {
		return nil, err
	}
	resp, err := nodev1.NewNodeServiceClient(link).SignWorkload(ctx, &nodev1.SignWorkloadRequest{Allocation: allocation, Csr: csr})
	if err != nil {
		return nil, api.E(api.KindOf(err), doing, "%w", err)
	}
	// Roots and peers come with the mesh model.
	id, err := source.NewIdentity(key, resp.GetChain(), nil)
	if err != nil {
		return nil, api.E(api.Internal, doing, "%w", err)
	}
	return id, nil
}

// credentials are the node's own identity as it is now.
func (a *Agent) credentials() Credentials {
	id, ok := a.self.Current()
	if !ok {
		return Credentials{}
	}
	return Credentials{Certificate: *id.TLS(), Bundle: id.Bundle, TrustDomain: id.ID.TrustDomain}
}

// load takes the node's identity from disk; an error when there is none that is
// valid.
func (a *Agent) load() error {
	if err := a.self.Load(); err != nil {
		return err
	}
	_, err := a.self.Certificate()
	return err
}

// enroll gives the node its identity: from disk, or by its join token.
func (a *Agent) enroll(ctx context.Context) error {
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		held := a.load()
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
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
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
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
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
	id, err := source.NewIdentity(key, resp.GetChain(), resp.GetBundle())
	if err != nil {
		return fmt.Errorf("join: the answer does not fit: %w", err)
	}
	if err := a.self.Install(id); err != nil {
		return err
	}
	return os.Remove(a.path("agent", "join-key.pem"))
}

// renewal has the node's own identity signed anew; a.self asks for it in time.
func (a *Agent) renewal(ctx context.Context, csr []byte) (chain [][]byte, bundle []byte, err error) {
	a.mu.Lock()
	link := a.link
	a.mu.Unlock()
	if link == nil {
		return nil, nil, api.E(api.Unavailable, "renew node identity", "the cluster is away")
	}
	resp, err := nodev1.NewNodeServiceClient(link).Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	return resp.GetChain(), resp.GetBundle(), err
}

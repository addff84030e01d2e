package fleet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/attest"
)

// Bounds of a join.
const (
	maxBundleBytes = 64 << 10
	maxRoots       = 8
)

// Join implements linkv1.LinkServiceServer. It writes the TrustBundle of the
// cluster's own domain, and marks the token used. Anybody may call it: it costs
// little until the token is known to be good.
func (f *Fleet) Join(ctx context.Context, req *linkv1.JoinRequest) (*linkv1.JoinResponse, error) {
	doing := "join cluster"
	if err := f.strangers.Take(ctx, doing, time.Now()); err != nil {
		return nil, err
	}
	if _, err := api.ParseID(req.GetCluster()); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	doing += " " + req.GetCluster()
	domain := identity.ClusterDomain(f.cfg.Fleet, req.GetCluster())
	hash, _, err := attest.ParseToken(req.GetToken())
	if err != nil {
		return nil, api.E(api.Denied, doing, "the token is not valid")
	}
	if err := checkRoots(req.GetBundle(), domain); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	if err := attest.VerifyProof(req.GetToken(), req.GetBundle(), req.GetProof()); err != nil {
		return nil, api.E(api.Denied, doing, "%w", err)
	}
	sum := sha256.Sum256(req.GetBundle())
	r := redemption{doing: doing, hash: hash, cluster: req.GetCluster(), redeemer: sum[:], now: time.Now()}
	// Looked up before anything is locked for writing.
	if _, err = f.cfg.Store.View(ctx, func(rd store.Reader) error { _, err := r.check(rd); return err }); err == nil {
		_, err = f.cfg.Store.Update(ctx, func(tx store.Tx) error {
			return r.redeem(tx, &linkv1.TrustBundle{TrustDomain: domain, X509Roots: req.GetBundle(), Cluster: req.GetCluster()})
		})
	}
	if err != nil {
		f.log.Warn("join refused", "cluster", req.GetCluster(), "error", err)
		return nil, err
	}
	f.log.Info("cluster joined", "cluster", req.GetCluster(), "trust_domain", domain)
	return &linkv1.JoinResponse{Fleet: f.cfg.Fleet, FleetBundle: f.cfg.FleetBundle(), TrustDomain: domain, VirtualIpCidr: f.cfg.VirtualIPs}, nil
}

// redemption is the use of one token for one bundle.
type redemption struct {
	doing, hash, cluster string
	redeemer             []byte
	now                  time.Time
}

// check gives the token if it may be used, nil when this is the same use again.
// What is wrong with a token is not told apart, so that nobody learns which exist.
func (r redemption) check(rd store.Reader) (*storev1.JoinToken, error) {
	refused := api.E(api.Denied, r.doing, "the token is not valid: it does not exist, is used, has expired or is another cluster's")
	rec, err := rd.Get(store.JoinToken, r.hash)
	if api.KindOf(err) == api.NotFound {
		return nil, refused
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.doing, err)
	}
	t := proto.CloneOf(rec.Message.(*storev1.JoinToken))
	if t.GetCluster() != r.cluster {
		return nil, refused
	}
	if _, err := rd.Get(store.Cluster, api.ClusterName(r.cluster)); err != nil {
		return nil, refused
	}
	if used := t.GetRedeemedBy(); len(used) > 0 {
		if bytes.Equal(used, r.redeemer) {
			return nil, nil // the answer was lost on its way: the same again
		}
		return nil, refused
	}
	if !r.now.Before(t.GetExpireTime().AsTime()) {
		return nil, refused
	}
	return t, nil
}

// redeem uses the token up.
func (r redemption) redeem(tx store.Tx, bundle *linkv1.TrustBundle) error {
	t, err := r.check(tx)
	if err != nil || t == nil {
		return err
	}
	t.RedeemedBy = r.redeemer
	if err := tx.Put(store.JoinToken, r.hash, t); err != nil {
		return err
	}
	return tx.Put(store.TrustBundle, bundle.GetTrustDomain(), bundle)
}

// checkRoots accepts PEM certificates of authorities, of that trust domain where
// they name one.
func checkRoots(bundle []byte, domain string) error {
	if len(bundle) > maxBundleBytes {
		return fmt.Errorf("bundle: %d bytes are more than %d", len(bundle), maxBundleBytes)
	}
	n := 0
	for rest := bundle; ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return fmt.Errorf("bundle: there is something else than PEM in it")
			}
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || block.Type != "CERTIFICATE" {
			return fmt.Errorf("bundle: entry %d is no certificate", n)
		}
		if !cert.IsCA {
			return fmt.Errorf("bundle: entry %d is no authority", n)
		}
		for _, u := range cert.URIs {
			if u.String() != "spiffe://"+domain {
				return fmt.Errorf("bundle: entry %d is of %q, not of trust domain %q", n, u, domain)
			}
		}
	}
	if n == 0 || n > maxRoots {
		return fmt.Errorf("bundle: it has %d roots; 1 to %d are possible", n, maxRoots)
	}
	return nil
}

package main

import (
	"crypto/tls"
	"crypto/x509"
	"testing"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
	"github.com/portolan-io/portolan/identity/trust"
)

// A connection that a cluster opened stays open when the cluster is deleted, and
// perhaps until another of its name has joined. It may call nothing any more.
func TestConnectionsDoNotOutliveTheirRoots(t *testing.T) {
	const domain = "eu.portolan.internal"
	open := func() *ca.Authority {
		a, err := ca.Open(t.Context(), ca.Config{TrustDomain: domain, Storage: ca.DirStorage(t.TempDir()), SealKey: make([]byte, 32)})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	first, second := open(), open()
	pair, err := first.Issue(t.Context(), ca.Request{ID: identity.ID{Kind: identity.Control, TrustDomain: domain}})
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range pair.TLS().Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: chain}}})
	set := trust.NewSet()
	if err := set.Put(domain, first.Bundle()); err != nil {
		t.Fatal(err)
	}
	if id, err := clusterPeer(set)(ctx); err != nil || id.TrustDomain != domain {
		t.Fatal(id, err)
	}
	set.Delete(domain)
	if _, err := clusterPeer(set)(ctx); api.KindOf(err) != api.Unknown {
		t.Errorf("a deleted cluster's connection: %v", err)
	}
	if err := set.Put(domain, second.Bundle()); err != nil {
		t.Fatal(err)
	}
	if _, err := clusterPeer(set)(ctx); api.KindOf(err) != api.Unknown {
		t.Errorf("the connection of another cluster of that name: %v", err)
	}
}

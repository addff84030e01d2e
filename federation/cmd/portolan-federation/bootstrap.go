package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/server"
	"github.com/portolan-io/portolan/federation/store/cockroach"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

const adminLife = 365 * 24 * time.Hour

// openAuthority opens the fleet's authority, or makes it.
func openAuthority(ctx context.Context, c *Config) (*ca.Authority, error) {
	for _, dir := range []string{c.DataDir, c.Identity.Dir, filepath.Dir(c.Identity.SealKeyFile)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make a folder: %w", err)
		}
	}
	key, err := ca.LoadOrCreateSealKey(c.Identity.SealKeyFile)
	if err != nil {
		return nil, err
	}
	return ca.Open(ctx, ca.Config{TrustDomain: c.Fleet, Storage: ca.DirStorage(c.Identity.Dir), SealKey: key})
}

// bootstrap makes what must be there before the first call: the authority, the
// schema, the first records, and the admin's certificate. Repeating it changes
// nothing but the certificate, which is issued anew.
func bootstrap(ctx context.Context, c *Config, admin, out string) error {
	authority, err := openAuthority(ctx, c)
	if err != nil {
		return err
	}
	if err := cockroach.Migrate(ctx, c.Database.URL); err != nil {
		return err
	}
	log := slog.New(slog.DiscardHandler)
	st, err := cockroach.Open(ctx, cockroach.Config{URL: c.Database.URL, Log: log})
	if err != nil {
		return err
	}
	defer func() { _ = st.Close() }()
	// No image is resolved here: a registry may have no certificate yet.
	srv, err := newServer(c, st, authority, server.NewRegistryResolver(server.ResolverConfig{}), nil, nil, log)
	if err != nil {
		return err
	}
	if err := srv.Bootstrap(ctx, admin); err != nil {
		return err
	}
	pair, err := authority.Issue(ctx, ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: c.Fleet, Name: admin}, TTL: adminLife})
	if err != nil {
		return err
	}
	return pair.WriteFiles(out)
}

// issueServerCert issues a certificate for a server that is no control plane. Its
// identity is a user with the server's name, to whom nothing is bound: whoever
// steals it can pretend to be that server and nothing else.
func issueServerCert(ctx context.Context, c *Config, name, out string, ttl time.Duration) error {
	label, ok := strings.CutSuffix(name, "."+c.Fleet)
	if !ok || label == "" || label == "federation" || strings.HasPrefix(label, "cluster.") {
		return fmt.Errorf("issue a certificate for %q: the name must be under %s and none of the control planes'", name, c.Fleet)
	}
	authority, err := openAuthority(ctx, c)
	if err != nil {
		return err
	}
	pair, err := authority.Issue(ctx, ca.Request{
		ID: identity.ID{Kind: identity.User, TrustDomain: c.Fleet, Name: name}, DNSNames: []string{name}, TTL: ttl, IncludeRoot: true,
	})
	if err != nil {
		return err
	}
	return pair.WriteFiles(out)
}

// issueUser issues a person's or a machine's certificate. It may do nothing until
// a role is bound to it.
func issueUser(ctx context.Context, c *Config, name, out string, ttl time.Duration) error {
	if _, err := api.ParseID(name); err != nil {
		return fmt.Errorf("issue a user's certificate: %w", err)
	}
	authority, err := openAuthority(ctx, c)
	if err != nil {
		return err
	}
	pair, err := authority.Issue(ctx, ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: c.Fleet, Name: name}, TTL: ttl})
	if err != nil {
		return err
	}
	return pair.WriteFiles(out)
}

package cockroach

import (
	"context"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/storetest"
	"github.com/portolan-io/portolan/federation/store/storetest/pgtest"
)

// fresh makes migrated databases on a server.
func fresh(server *pgtest.Server) func(t testing.TB) storetest.Replicas {
	return func(t testing.TB) storetest.Replicas {
		url := migrated(t, server)
		return func() store.Store { return open(t, Config{URL: url}) }
	}
}

func migrated(t testing.TB, server *pgtest.Server) string {
	t.Helper()
	url := server.Database(t)
	if err := Migrate(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	return url
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestConformancePostgres(t *testing.T) { storetest.Run(t, fresh(pgtest.Postgres(t))) }

func TestConformanceCockroach(t *testing.T) { storetest.Run(t, fresh(pgtest.Cockroach(t))) }

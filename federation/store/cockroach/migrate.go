package cockroach

import (
	"context"
	"database/sql"
	"embed"
	"io/fs"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"

	"github.com/portolan-io/portolan/federation/api"
)

// One idempotent DDL statement per file and no transaction around it, because
// CockroachDB commits silently before DDL.
//
//go:embed migrations/*.sql
var migrations embed.FS

// Migrate brings the schema of the database at url up to date. Any number of
// replicas may call it at once; a lock in a table lets one of them work.
func Migrate(ctx context.Context, url string) error {
	const doing = "migrate the database"
	db, err := sql.Open("pgx", url)
	if err != nil {
		return api.E(api.Invalid, doing, "database url: %w", err)
	}
	defer func() { _ = db.Close() }()
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	locker, err := lock.NewPostgresTableLocker(
		lock.WithTableLockTimeout(200*time.Millisecond, 300),
		lock.WithTableUnlockTimeout(200*time.Millisecond, 50),
		lock.WithTableLeaseDuration(10*time.Second),
		lock.WithTableHeartbeatInterval(2*time.Second),
	)
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	p, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithLocker(locker), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	if _, err := p.Up(ctx); err != nil {
		return failure(doing, err)
	}
	return nil
}

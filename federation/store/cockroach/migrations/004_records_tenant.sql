-- +goose NO TRANSACTION
-- +goose Up
CREATE INDEX IF NOT EXISTS records_by_tenant ON records (kind, tenant, name);

-- +goose NO TRANSACTION
-- +goose Up
CREATE TABLE IF NOT EXISTS leases (
  name TEXT PRIMARY KEY,
  holder TEXT NOT NULL,
  epoch INT8 NOT NULL,
  expires TIMESTAMPTZ NOT NULL,
  progress INT8 NOT NULL
);

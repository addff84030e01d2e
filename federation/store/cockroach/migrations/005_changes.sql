-- +goose NO TRANSACTION
-- +goose Up
-- The change log, written in the transaction of the change. A tombstone carries
-- the last message.
CREATE TABLE IF NOT EXISTS changes (
  revision INT8 NOT NULL,
  seq INT8 NOT NULL,
  kind TEXT NOT NULL,
  name BYTEA NOT NULL,
  tenant TEXT NOT NULL,
  deleted BOOL NOT NULL,
  data BYTEA NOT NULL,
  PRIMARY KEY (revision, seq)
);

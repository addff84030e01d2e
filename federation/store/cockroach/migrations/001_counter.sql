-- +goose NO TRANSACTION
-- +goose Up
-- One row: the revision of the last commit, and the revision up to which the
-- change log was compacted. Every transaction that writes takes this row first,
-- so revisions follow commit order.
CREATE TABLE IF NOT EXISTS counter (
  id INT8 PRIMARY KEY,
  revision INT8 NOT NULL,
  floor INT8 NOT NULL
);

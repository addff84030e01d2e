-- +goose NO TRANSACTION
-- +goose Up
-- Names are BYTEA because their order must be that of bytes, on databases of any
-- collation; read them with convert_from(name, 'UTF8'). data is the protobuf
-- message of the kind.
CREATE TABLE IF NOT EXISTS records (
  kind TEXT NOT NULL,
  name BYTEA NOT NULL,
  tenant TEXT NOT NULL,
  revision INT8 NOT NULL,
  data BYTEA NOT NULL,
  PRIMARY KEY (kind, name)
);

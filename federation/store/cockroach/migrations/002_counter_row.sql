-- +goose NO TRANSACTION
-- +goose Up
INSERT INTO counter (id, revision, floor) VALUES (1, 0, 0) ON CONFLICT (id) DO NOTHING;

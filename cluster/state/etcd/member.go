package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// member is the embedded etcd. It opens no socket: the client calls it in the
// process.
type member struct{ etcd *embed.Etcd }

func startMember(ctx context.Context, cfg Config) (*member, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	c := embed.NewConfig()
	c.Dir = cfg.Dir
	c.Name = "portolan"
	// A member needs an address in its own list; nobody listens on it.
	nowhere := url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	c.ListenPeerUrls, c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil, nil
	c.AdvertisePeerUrls = []url.URL{nowhere}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.QuotaBackendBytes = cfg.QuotaBytes
	c.MaxTxnOps = maxMemberOps
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(cfg.Log))
	// Alone in its cluster, it needs no patience for votes.
	c.TickMs, c.ElectionMs = 20, 200
	c.EnableGRPCGateway = false
	e, err := embed.StartEtcd(c)
	if err != nil {
		return nil, err
	}
	m := &member{etcd: e}
	select {
	case <-e.Server.ReadyNotify():
		return m, nil
	case err = <-e.Err():
	case <-e.Server.StopNotify():
		err = errors.New("it stopped before it was ready")
	case <-ctx.Done():
		err = ctx.Err()
	}
	m.stop()
	return nil, err
}

func (m *member) client() *clientv3.Client { return v3client.New(m.etcd.Server) }

func (m *member) stop() { m.etcd.Close() }

// zapLogger hands etcd's warnings to our log.
func zapLogger(log *slog.Logger) *zap.Logger { return zap.New(&core{log: log.With("part", "etcd")}) }

type core struct{ log *slog.Logger }

func (c *core) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{log: c.log.With(attrs(fields)...)}
}

func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, "etcd reports", append([]any{"message", e.Message}, attrs(fields)...)...)
	return nil
}

func (c *core) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	out := make([]any, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		out = append(out, slog.String(k, fmt.Sprint(v)))
	}
	return out
}

// Package agent is the node's hands: it holds the session up to the cluster,
// keeps the last good generation on disk, and drives one task.Next per
// allocation against the container engine, the network and the proxies. It owns
// dataDir/agent, dataDir/lastgood, dataDir/logs and runDir/identity; it never
// serves workloads (the warden does, from the same disk) and never decides what
// runs where.
//
// Concurrency: one goroutine per allocation owns that allocation's state; what
// others read of it (reports, runtime service) goes through one mutex-guarded
// board.
package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Credentials are the node's own identity.
type Credentials struct {
	Certificate tls.Certificate // leaf parsed
	Bundle      []byte          // PEM roots of the cluster's trust domain
	TrustDomain string
}

// Upstream is the way to the cluster. Main adapts TLS to it.
type Upstream interface {
	// Join dials without a certificate, trusting only the root that the join token
	// names.
	Join(ctx context.Context, token string) (distribute.Conn, error)
	// Dial dials with the node's identity.
	Dial(ctx context.Context, c Credentials) (distribute.Conn, error)
}

// Warden is what the agent asks of the process beside it.
type Warden interface {
	// Wake tells it that the disk changed; it returns when the warden has looked.
	Wake(ctx context.Context) error
	// Watch calls back with the present status and after every change, until the
	// stream breaks or ctx is done.
	Watch(ctx context.Context, fn func(*nodev1.WardenStatus)) error
}

// DialReplica opens a TCP connection to a port on lo inside a replica's
// namespace.
type DialReplica func(ctx context.Context, netns string, port int) (net.Conn, error)

// Config of an Agent. The fields without "default" are required.
type Config struct {
	// Node is this machine's ID in its cluster.
	Node string
	// DataDir is durable; RunDir is a root-only tmpfs.
	DataDir, RunDir string
	// Facts that are reported up: address, capacity, labels, taints.
	Facts *nodev1.NodeFacts
	// CgroupParent under which containers are made; empty: the engine's default.
	CgroupParent string
	// Token gives the join token, asked only while there is no identity.
	Token func() (string, error)

	Engine   engine.Engine
	Network  network.Networker
	Proxies  proxy.Proxies
	Warden   Warden
	Upstream Upstream
	Log      *slog.Logger

	// Dial for probes; default: a socket made inside the namespace.
	Dial DialReplica
	// Rand gives numbers in [0,1) for jitter; default math/rand/v2.
	Rand func() float64
	// Keepalive is the longest silence of the report stream; default 1 s.
	Keepalive time.Duration
	// Coalesce is how long changes wait for each other; default 15 ms.
	Coalesce time.Duration
	// Reassert is how often network and routes are brought about again; default 5 s.
	Reassert time.Duration
	// Sample is how often memory is read; default 5 s.
	Sample time.Duration
	// LogBytes and LogFiles bound a container's log; default 10 MiB and 3.
	LogBytes int64
	LogFiles int
}

// SetDefaults fills what is absent.
func (c *Config) SetDefaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.Keepalive, time.Second)
	set(&c.Coalesce, 15*time.Millisecond)
	set(&c.Reassert, 5*time.Second)
	set(&c.Sample, 5*time.Second)
	if c.LogBytes == 0 {
		c.LogBytes = 10 << 20
	}
	if c.LogFiles == 0 {
		c.LogFiles = 3
	}
	if c.Rand == nil {
		c.Rand = defaultRand
	}
	if c.Dial == nil {
		c.Dial = func(ctx context.Context, netns string, port int) (net.Conn, error) {
			return network.Dial(ctx, netns, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		}
	}
	if c.Facts == nil {
		c.Facts = &nodev1.NodeFacts{}
	}
}

// Validate gives all faults joined.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, field string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s is required", field))
		}
	}
	need(c.Node != "", "Node")
	need(filepath.IsAbs(c.DataDir), "DataDir (absolute)")
	need(filepath.IsAbs(c.RunDir), "RunDir (absolute)")
	need(c.Engine != nil, "Engine")
	need(c.Network != nil, "Network")
	need(c.Proxies != nil, "Proxies")
	need(c.Warden != nil, "Warden")
	need(c.Upstream != nil, "Upstream")
	need(c.Token != nil, "Token")
	need(c.Log != nil, "Log")
	return errors.Join(errs...)
}

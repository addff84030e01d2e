package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/portolan-io/portolan/nodeagent/agent"
	"github.com/portolan-io/portolan/nodeagent/engine/containerd"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/proxy/envoy"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
	"github.com/portolan-io/portolan/nodeagent/warden"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

// decisionDeadline bounds one network decision. It is above what a busy machine's
// scheduler takes away from a decision of microseconds, and below the warden's own
// bound.
const decisionDeadline = time.Second

func newEngine(c *config, log *slog.Logger) (*containerd.Engine, error) {
	hosts := map[string]containerd.Host{}
	for name, h := range c.Registries.Hosts {
		hosts[name] = containerd.Host{Address: h.Address, CAFile: h.CAFile}
	}
	return containerd.New(containerd.Config{
		Address: c.Containerd.Address, Namespace: c.Containerd.Namespace, Runc: c.Containerd.Runc, RuncRoot: c.Containerd.RuncRoot,
		CgroupParent: c.Containerd.CgroupParent, Hosts: hosts, ReservedUIDs: []uint32{network.ProxyUID}, Log: log,
	})
}

// Proxies are no part of the agent's own group: what bounds the agent does not
// bound them, and what ends it leaves them.
func newProxies(c *config, log *slog.Logger) (*envoy.Envoy, error) {
	return envoy.New(envoy.Config{
		Binary: c.Envoy, Root: filepath.Join(c.RunDir, "proxies"), CgroupParent: filepath.Join(c.Containerd.CgroupParent, "proxies"), Log: log,
	})
}

func newNetwork(c *config, log *slog.Logger) (*network.Linux, error) {
	return network.New(network.Config{RunDir: c.RunDir, DataDir: c.DataDir, Log: log})
}

func runAgent(ctx context.Context, c *config, log *slog.Logger) (err error) {
	facts, err := c.facts()
	if err != nil {
		return err
	}
	eng, err := newEngine(c, log)
	if err != nil {
		return err
	}
	defer closing(&err, eng)
	nw, err := newNetwork(c, log)
	if err != nil {
		return err
	}
	proxies, err := newProxies(c, log)
	if err != nil {
		return err
	}
	w, err := agent.NewWardenClient(filepath.Join(c.RunDir, "warden.sock"))
	if err != nil {
		return err
	}
	defer closing(&err, w)
	a, err := agent.New(agent.Config{
		Node: c.Node, DataDir: c.DataDir, RunDir: c.RunDir, Facts: facts, Token: c.token,
		Engine: eng, Network: nw, Proxies: proxies, Warden: w,
		Upstream: &upstream{serverName: c.Cluster.ServerName, addresses: c.Cluster.Addresses}, Log: log,
	})
	if err != nil {
		return err
	}
	log.Info("agent begins", "address", c.Address, "cluster", c.Cluster.ServerName)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return proxies.Run(ctx) })
	g.Go(func() error { return serveLocal(ctx, filepath.Join(c.RunDir, "agent.sock"), a) })
	return g.Wait()
}

// serveLocal is the break-glass socket: health, and the node's runtime service,
// for root alone. It needs nothing but this process.
func serveLocal(ctx context.Context, path string, a *agent.Agent) error {
	l, err := socket.Listen(path, 0, 0, 0o600)
	if err != nil {
		return fmt.Errorf("local socket: %w", err)
	}
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	a.RegisterRuntime(srv)
	stop := context.AfterFunc(ctx, srv.Stop)
	defer stop()
	if err := srv.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("local socket: %w", err)
	}
	return nil
}

func runWarden(ctx context.Context, c *config, log *slog.Logger) error {
	nw, err := newNetwork(c, log)
	if err != nil {
		return err
	}
	proxies, err := newProxies(c, log)
	if err != nil {
		return err
	}
	w, err := warden.New(warden.Config{
		Node: c.Node, DataDir: c.DataDir, RunDir: c.RunDir, Active: proxies.Active, Connections: nw,
		DNSAddress: network.LinkAddress + ":53", Log: log,
		Compile: func(_ context.Context, bundles []policy.Bundle) (policy.Authorizer, error) {
			return opa.Compile(bundles, opa.Limits{Deadline: decisionDeadline})
		},
	})
	if err != nil {
		return err
	}
	log.Info("warden begins")
	return w.Run(ctx)
}

func closing(err *error, c io.Closer) { *err = errors.Join(*err, c.Close()) }

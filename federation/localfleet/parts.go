package localfleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"sigs.k8s.io/yaml"
)

// parts turns a fleet into commands and the files that they read. Everything it
// writes may be written again.
type parts struct {
	fleet *Fleet
	dirs  Dirs
	tools Tools
	names names
}

func (p *parts) logFile(name string) string {
	return filepath.Join(p.dirs.Data, "logs", strings.ReplaceAll(name, "/", "-")+".log")
}

func (p *parts) data(elem ...string) string {
	return filepath.Join(append([]string{p.dirs.Data}, elem...)...)
}

func (p *parts) run(elem ...string) string {
	return filepath.Join(append([]string{p.dirs.Run}, elem...)...)
}

// writeYAML writes a configuration file.
func writeYAML(path string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.WriteFile(path, b, 0o600)
}

type m = map[string]any

// databaseURL is a Unix socket for PostgreSQL; for CockroachDB loopback, where
// only root's certificate gets in.
func (p *parts) databaseURL() string {
	if p.tools.Cockroach != "" {
		certs := p.cockroachCerts()
		return fmt.Sprintf("postgresql://root@127.0.0.1:%d/portolan?%s", p.fleet.cockroachPort(), url.Values{
			"sslmode": {"verify-full"}, "sslrootcert": {filepath.Join(certs, "ca.crt")},
			"sslcert": {filepath.Join(certs, "client.root.crt")}, "sslkey": {filepath.Join(certs, "client.root.key")},
		}.Encode())
	}
	return "postgres://portolan@/portolan?host=" + p.run("db")
}

// cockroachPort is CockroachDB's; its console has the next.
func (f *Fleet) cockroachPort() int { return f.FederationPort + 50 }

func (p *parts) database() Command {
	c := Command{Name: "database", LogFile: p.logFile("database"), Health: p.databaseHealth}
	if p.tools.Cockroach != "" {
		addr := fmt.Sprintf("127.0.0.1:%d", p.fleet.cockroachPort())
		c.Path, c.Address = p.tools.Cockroach, addr
		c.Args = []string{"start-single-node", "--certs-dir=" + p.cockroachCerts(), "--store=" + p.data("db"), "--listen-addr=" + addr, fmt.Sprintf("--http-addr=127.0.0.1:%d", p.fleet.cockroachPort()+1)}
		return c
	}
	c.Path, c.UID, c.GID, c.StopSignal = p.tools.Postgres, p.tools.UID, p.tools.GID, syscall.SIGINT
	c.Args = []string{"-D", p.data("db"), "-k", p.run("db"), "-c", "listen_addresses=", "-c", "max_connections=60", "-c", "shared_buffers=64MB", "-c", "unix_socket_permissions=0700"}
	c.Address, c.Dir = p.run("db"), "/"
	return c
}

func (p *parts) databaseHealth(ctx context.Context) error {
	network, addr := "unix", p.run("db", ".s.PGSQL.5432")
	if p.tools.Cockroach != "" {
		network, addr = "tcp", fmt.Sprintf("127.0.0.1:%d", p.fleet.cockroachPort())
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	return conn.Close()
}

// initDatabase makes an empty PostgreSQL cluster once.
func (p *parts) initDatabase(ctx context.Context) error {
	if err := p.ownedDir(p.run("db")); err != nil {
		return err
	}
	if p.tools.Cockroach != "" {
		if err := os.MkdirAll(p.data("db"), 0o700); err != nil {
			return err
		}
		return p.makeCockroachCerts(ctx)
	}
	if _, err := os.Stat(p.data("db", "PG_VERSION")); err == nil {
		return nil
	}
	// A half-made one, from an interrupted first start, holds nothing yet.
	if err := os.RemoveAll(p.data("db")); err != nil {
		return err
	}
	if err := p.ownedDir(p.data("db")); err != nil {
		return err
	}
	c := Command{
		Name: "initdb", Path: p.tools.Initdb, UID: p.tools.UID, GID: p.tools.GID, LogFile: p.logFile("initdb"), Dir: "/",
		Args: []string{"-D", p.data("db"), "-U", "portolan", "--auth-local=trust", "--auth-host=reject", "-E", "UTF8", "--no-locale"},
	}
	if err := p.once(ctx, c); err != nil {
		return err
	}
	// Single-user mode needs no client program.
	c.Name, c.Path, c.Stdin = "createdb", p.tools.Postgres, "CREATE DATABASE portolan;\n"
	c.Args = []string{"--single", "-D", p.data("db"), "postgres"}
	return p.once(ctx, c)
}

func (p *parts) cockroachCerts() string { return p.data("pki", "database") }

// makeCockroachCerts makes an authority, the server's certificate and root's, once:
// half of them from an interrupted first start are made anew.
func (p *parts) makeCockroachCerts(ctx context.Context) error {
	dir := p.cockroachCerts()
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	half := dir + ".new"
	if err := errors.Join(os.RemoveAll(half), os.MkdirAll(half, 0o700)); err != nil {
		return err
	}
	for _, args := range [][]string{{"create-ca"}, {"create-node", "127.0.0.1", "localhost"}, {"create-client", "root"}} {
		err := p.once(ctx, Command{
			Name: "database certificates", Path: p.tools.Cockroach, LogFile: p.logFile("database-certificates"),
			Args: append(append([]string{"cert"}, args...), "--certs-dir="+half, "--ca-key="+filepath.Join(half, "ca.key")),
		})
		if err != nil {
			return err
		}
	}
	return os.Rename(half, dir)
}

// createDatabase makes CockroachDB's database, which is part of no initialisation.
func (p *parts) createDatabase(ctx context.Context) error {
	if p.tools.Cockroach == "" {
		return nil
	}
	return p.once(ctx, Command{
		Name: "createdb", Path: p.tools.Cockroach, LogFile: p.logFile("createdb"),
		Args: []string{"sql", "--certs-dir=" + p.cockroachCerts(), fmt.Sprintf("--host=127.0.0.1:%d", p.fleet.cockroachPort()), "-e", "CREATE DATABASE IF NOT EXISTS portolan"},
	})
}

func (p *parts) ownedDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The database's user must be able to walk there.
	for d := filepath.Dir(dir); len(d) >= len(p.dirs.Data) && strings.HasPrefix(d, p.dirs.Data) || d == p.dirs.Run; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o711); err != nil {
			return err
		}
	}
	return os.Chown(dir, p.tools.UID, p.tools.GID)
}

// once runs a command to its end; its log's last lines are in the error.
func (p *parts) once(ctx context.Context, c Command) error {
	proc := newProcess(c, &ledger{path: p.dirs.Data + "/once.json", data: map[string]ledgerEntry{}}, nopLogger)
	cmd, err := proc.start()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", c.Name, err, lastLines(c.LogFile, 3))
	}
	return nil
}

func lastLines(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// registryHost is how the registry is reached from the i-th cluster, or from
// this machine with -1.
func (p *parts) registryHost(i int) m {
	h := "127.0.0.1"
	if i >= 0 {
		ours, _ := p.fleet.WAN(i)
		h = ours.String()
	}
	return m{p.fleet.RegistryName(): m{"address": fmt.Sprintf("%s:%d", h, p.fleet.RegistryPort), "caFile": p.data("pki", "registry", "bundle.pem")}}
}

func (p *parts) federationConfig(r int) (string, error) {
	name := fmt.Sprintf("federation-%d", r+1)
	listen := []string{p.fleet.FederationAddrs(-1)[r]}
	for i := range p.fleet.Clusters {
		listen = append(listen, p.fleet.FederationAddrs(i)[r])
	}
	file := p.data("config", name+".yaml")
	return file, writeYAML(file, m{
		"replica": name, "fleet": p.fleet.Name, "dataDir": p.data(name), "listen": listen,
		"database":        m{"url": p.databaseURL()},
		"identity":        m{"dir": p.data("pki", "fleet"), "sealKeyFile": p.data("pki", "fleet-seal.key")},
		"virtualIPs":      p.fleet.VirtualIPs().String(),
		"registries":      m{"allow": []string{p.fleet.RegistryName()}, "hosts": p.registryHost(-1)},
		"livenessTimeout": p.fleet.LivenessTimeout, "adminSocket": p.run(name + ".sock"), "logLevel": "info",
	})
}

func (p *parts) federation(r int) (Command, error) {
	name := fmt.Sprintf("federation-%d", r+1)
	file, err := p.federationConfig(r)
	return Command{
		Name: name, Path: p.tools.Federation, Args: []string{"serve", "--config", file}, LogFile: p.logFile(name),
		Address: p.fleet.FederationAddrs(-1)[r], Health: socketHealth(p.run(name + ".sock")),
	}, err
}

func (p *parts) registry() Command {
	listen := []string{fmt.Sprintf("127.0.0.1:%d", p.fleet.RegistryPort)}
	for i := range p.fleet.Clusters {
		ours, _ := p.fleet.WAN(i)
		listen = append(listen, fmt.Sprintf("%s:%d", ours, p.fleet.RegistryPort))
	}
	pki := p.data("pki", "registry")
	return Command{
		Name: "registry", Path: p.tools.Self, LogFile: p.logFile("registry"), Address: listen[0], Health: tcpHealth(listen[0]),
		Args: []string{
			"local", "serve-registry", "--listen", strings.Join(listen, ","), "--cert", filepath.Join(pki, "cert.pem"), "--key", filepath.Join(pki, "key.pem"),
			"--data", p.data("registry"), "--images", p.fleet.Sample.Images, "--name", p.fleet.RegistryName(),
		},
	}
}

func (p *parts) ingress() Command {
	var backends []string
	for i, c := range p.fleet.Clusters {
		for j := range c.Nodes {
			backends = append(backends, fmt.Sprintf("%s:8080", p.fleet.NodeAddr(i, j)))
		}
	}
	listen := fmt.Sprintf("127.0.0.1:%d", p.fleet.IngressPort)
	return Command{
		Name: "ingress", Path: p.tools.Self, LogFile: p.logFile("ingress"), Address: listen, Health: tcpHealth(listen),
		Args: []string{"local", "serve-ingress", "--listen", listen, "--backends", strings.Join(backends, ",")},
	}
}

func (p *parts) cluster(i int) (Command, error) {
	c := p.fleet.Clusters[i]
	file := p.data("config", c.Name+".yaml")
	addr := fmt.Sprintf("%s:7450", p.fleet.ClusterAddr(i))
	err := writeYAML(file, m{
		"cluster": c.Name, "dataDir": p.data("clusters", c.Name),
		"federation": m{"serverName": p.fleet.ServerName(), "addresses": p.fleet.FederationAddrs(i), "tokenFile": p.tokenFile(c.Name)},
		"listen":     []string{addr}, "cidr": p.fleet.CIDR(i).String(),
		"sealKeyFile": p.data("clusters", c.Name, "seal.key"), "nodeTimeout": "3s", "adminSocket": p.run(c.Name + ".sock"), "logLevel": "info",
	})
	return Command{
		Name: c.Name, NS: p.names.clusterNS(i), Path: p.tools.Cluster, Args: []string{"serve", "--config", file},
		LogFile: p.logFile(c.Name), Address: addr, Health: socketHealth(p.run(c.Name + ".sock")),
	}, err
}

func (p *parts) tokenFile(name string) string { return p.data("tokens", name) }

// node gives containerd, warden and agent of a node, in the order of their start.
func (p *parts) node(i, j int) ([]Command, error) {
	c, n := p.fleet.Clusters[i], p.fleet.Clusters[i].Nodes[j]
	ns, runDir, dataDir := p.names.nodeNS(i, j), p.run(n.Name), p.data(nodesDir, n.Name)
	ctrSock := filepath.Join(runDir, "containerd.sock")
	group := p.dirs.cgroup() + "/" + n.Name
	if err := p.containerdConfig(n.Name, group); err != nil {
		return nil, err
	}
	labels := m{"zone": n.Zone, "node": n.Name}
	for k, v := range n.Labels {
		labels[k] = v
	}
	file := p.data("config", n.Name+".yaml")
	err := writeYAML(file, m{
		"node": n.Name, "dataDir": dataDir, "runDir": runDir, "address": p.fleet.NodeAddr(i, j).String(),
		"cluster":    m{"serverName": "cluster." + c.Name + "." + p.fleet.Name, "addresses": []string{fmt.Sprintf("%s:7450", p.fleet.ClusterAddr(i))}, "tokenFile": p.tokenFile(n.Name)},
		"containerd": m{"address": ctrSock, "namespace": "portolan", "runc": p.tools.Runc, "runcRoot": filepath.Join(runDir, "runc"), "cgroupParent": group + "/replicas"},
		"envoy":      p.tools.Envoy, "registries": m{"hosts": p.registryHost(i)}, "labels": labels,
		"capacity": m{"cpu": n.CPU, "memory": n.Memory}, "logLevel": "info",
	})
	if err != nil {
		return nil, err
	}
	mk := func(part, path string, health func(context.Context) error, args ...string) Command {
		name := n.Name + "/" + part
		return Command{Name: name, NS: ns, Path: path, Args: args, LogFile: p.logFile(name), Address: p.fleet.NodeAddr(i, j).String(), Health: health}
	}
	ctr := mk("containerd", p.tools.Containerd, socketHealth(ctrSock), "--config", p.data("config", n.Name+"-containerd.toml"))
	// Its shim comes from the same place as itself, whatever else PATH has.
	ctr.Env = []string{"PATH=" + strings.Join([]string{filepath.Dir(p.tools.Containerd), filepath.Dir(p.tools.Runc), os.Getenv("PATH")}, ":")}
	return []Command{
		ctr,
		mk("warden", "setpriv", socketHealth(filepath.Join(runDir, "warden.sock")),
			"--bounding-set=-all,+"+strings.Join(wardenCapabilities, ",+"), "--inh-caps=-all", "--", p.tools.Node, "warden", "--config", file),
		mk("agent", p.tools.Node, socketHealth(filepath.Join(runDir, "agent.sock")), "agent", "--config", file),
	}, nil
}

// wardenCapabilities are all that a warden needs of root's: sockets that belong to
// other users, DNS's port, and replicas' network namespaces. The chart gives the
// same; here it is seen to be enough.
var wardenCapabilities = []string{"chown", "dac_override", "fowner", "net_admin", "net_bind_service", "sys_admin"}

func (p *parts) containerdConfig(node, group string) error {
	toml := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.opt"]
required_plugins = ["io.containerd.grpc.v1.tasks", "io.containerd.snapshotter.v1.overlayfs"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[cgroup]
  path = %q
`, p.data(nodesDir, node, "containerd"), p.run(node, "containerd"), p.run(node, "containerd.sock"), p.run(node, "containerd.sock.ttrpc"), group+"/containerd")
	if err := os.MkdirAll(p.run(node), 0o700); err != nil {
		return err
	}
	return os.WriteFile(p.data("config", node+"-containerd.toml"), []byte(toml), 0o600)
}

// socketHealth asks gRPC health on a Unix socket.
func socketHealth(sock string) func(context.Context) error {
	return func(ctx context.Context) error {
		cc, err := grpc.NewClient("unix:"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer func() { _ = cc.Close() }()
		r, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			return err
		}
		if r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			return fmt.Errorf("answers %s", r.GetStatus())
		}
		return nil
	}
}

func tcpHealth(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/configfile"
)

// serverPrefix begins the federation's server name; the rest is the fleet.
const serverPrefix = "federation."

// Config is cluster.yaml. Unknown fields are refused, and ${NAME} in a
// value comes from the environment.
type Config struct {
	// Cluster is this cluster's ID, as it is registered in the fleet. Required.
	Cluster string `json:"cluster"`
	// DataDir holds what this process keeps on disk. Required.
	DataDir string `json:"dataDir"`
	// Etcd is where the cluster's state is.
	Etcd Etcd `json:"etcd"`
	// Federation is the plane above.
	Federation Federation `json:"federation"`
	// Listen are the addresses (host:port) for nodes. Required.
	Listen []string `json:"listen"`
	// CIDR is the IPv4 range of all replicas; each node gets a /24 of it. Required.
	CIDR string `json:"cidr"`
	// SealKeyFile opens the cluster's authority; it belongs outside the state.
	// dataDir/seal.key when absent.
	SealKeyFile string `json:"sealKeyFile"`
	// NodeTimeout is how long a node may be silent before it is lost; 3s.
	NodeTimeout configfile.Duration `json:"nodeTimeout"`
	// AdminSocket is a Unix socket, for root only, that serves RuntimeService,
	// ClusterAdminService and gRPC health without the federation;
	// dataDir/admin.sock when absent.
	AdminSocket string `json:"adminSocket"`
	// LogLevel is debug, info, warn or error; info when absent.
	LogLevel string `json:"logLevel"`
}

// Etcd is where the cluster's state is.
type Etcd struct {
	// Endpoints of an external etcd; one member is embedded in dataDir/etcd when
	// there are none.
	Endpoints []string `json:"endpoints"`
}

// Federation is the plane above.
type Federation struct {
	// ServerName in the federation's certificate, "federation.<fleet>". Required.
	ServerName string `json:"serverName"`
	// Addresses (host:port) of the federation's replicas, the preferred one first.
	// Required.
	Addresses []string `json:"addresses"`
	// TokenFile holds the join token. It is read until the cluster has joined, and
	// never again.
	TokenFile string `json:"tokenFile"`
}

// LoadConfig reads, completes and checks a file.
func LoadConfig(path string) (*Config, error) {
	c := &Config{}
	if err := configfile.Load(path, c); err != nil {
		return nil, err
	}
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// SetDefaults fills in what was left out.
func (c *Config) SetDefaults() {
	def := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	def(&c.SealKeyFile, filepath.Join(c.DataDir, "seal.key"))
	def(&c.AdminSocket, filepath.Join(c.DataDir, "admin.sock"))
	def(&c.LogLevel, "info")
	if c.NodeTimeout == 0 {
		c.NodeTimeout = configfile.Duration(3 * time.Second)
	}
}

// Fleet is the fleet's trust domain, out of the federation's server name.
func (c *Config) Fleet() string { return strings.TrimPrefix(c.Federation.ServerName, serverPrefix) }

// Validate returns all faults joined.
func (c *Config) Validate() error {
	var errs []error
	bad := func(field, format string, args ...any) { errs = append(errs, fmt.Errorf(field+": "+format, args...)) }
	if _, err := api.ParseID(c.Cluster); err != nil {
		bad("cluster", "%v", err)
	}
	if c.DataDir == "" {
		bad("dataDir", "is required")
	}
	if fleet := c.Fleet(); fleet == "" || fleet == c.Federation.ServerName {
		bad("federation.serverName", "%q is not %s<fleet>", c.Federation.ServerName, serverPrefix)
	}
	addresses := func(field string, list []string) {
		if len(list) == 0 {
			bad(field, "at least one address is required")
		}
		for i, a := range list {
			if _, _, err := net.SplitHostPort(a); err != nil {
				bad(fmt.Sprintf("%s[%d]", field, i), "%v", err)
			}
		}
	}
	addresses("federation.addresses", c.Federation.Addresses)
	addresses("listen", c.Listen)
	if p, err := netip.ParsePrefix(c.CIDR); err != nil || !p.Addr().Is4() || p.Bits() > 23 {
		bad("cidr", "%q is no IPv4 range of at least two /24", c.CIDR)
	}
	if c.NodeTimeout < configfile.Duration(500*time.Millisecond) {
		bad("nodeTimeout", "is shorter than 500ms")
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		bad("logLevel", "%q is none of debug, info, warn, error", c.LogLevel)
	}
	return errors.Join(errs...)
}

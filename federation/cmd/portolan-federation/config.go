package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/configfile"
)

// Config is federation.yaml. Unknown fields are refused, and ${NAME} in a
// value comes from the environment.
type Config struct {
	// Replica is this replica's ID, unique in the federation. Required.
	Replica string `json:"replica"`
	// Fleet is the trust domain of the fleet; "portolan.internal" when absent.
	Fleet string `json:"fleet"`
	// DataDir holds what this replica keeps on disk. Required.
	DataDir string `json:"dataDir"`
	// Listen are the addresses (host:port) of the API and of the clusters' link.
	// Required.
	Listen []string `json:"listen"`
	// Database of the store.
	Database Database `json:"database"`
	// Identity of the fleet: all replicas share it.
	Identity Identity `json:"identity"`
	// VirtualIPs is the range of the services' addresses; "10.68.0.0/16" when absent.
	VirtualIPs string `json:"virtualIPs"`
	// Registries from which images may come. None when absent.
	Registries Registries `json:"registries"`
	// LivenessTimeout is how long a cluster may be silent before it is lost; 3s.
	LivenessTimeout configfile.Duration `json:"livenessTimeout"`
	// AdminSocket is a Unix socket, for root only, that serves gRPC health;
	// dataDir/admin.sock when absent.
	AdminSocket string `json:"adminSocket"`
	// LogLevel is debug, info, warn or error; info when absent.
	LogLevel string `json:"logLevel"`
}

// Database of the store.
type Database struct {
	// URL of CockroachDB or PostgreSQL, "postgres://user@host:port/name". Required.
	URL string `json:"url"`
}

// Identity of the fleet.
type Identity struct {
	// Dir holds the fleet's authority, sealed; dataDir/identity when absent.
	Dir string `json:"dir"`
	// SealKeyFile opens it; it belongs outside Dir. dataDir/seal.key when absent.
	SealKeyFile string `json:"sealKeyFile"`
}

// Registries from which images may come.
type Registries struct {
	// Allow lists them, host or host:port.
	Allow []string `json:"allow"`
	// Hosts says how to reach those of them that need more than their name.
	Hosts map[string]RegistryHost `json:"hosts"`
}

// RegistryHost says how a registry is reached.
type RegistryHost struct {
	// Address (host:port) to dial instead of the registry's name.
	Address string `json:"address"`
	// CAFile holds the roots that it is verified against, in PEM; the system's when
	// absent.
	CAFile string `json:"caFile"`
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
	def(&c.Fleet, "portolan.internal")
	def(&c.VirtualIPs, "10.68.0.0/16")
	def(&c.LogLevel, "info")
	def(&c.Identity.Dir, filepath.Join(c.DataDir, "identity"))
	def(&c.Identity.SealKeyFile, filepath.Join(c.DataDir, "seal.key"))
	def(&c.AdminSocket, filepath.Join(c.DataDir, "admin.sock"))
	if c.LivenessTimeout == 0 {
		c.LivenessTimeout = configfile.Duration(3 * time.Second)
	}
}

// Validate returns all faults joined.
func (c *Config) Validate() error {
	var errs []error
	bad := func(field, format string, args ...any) { errs = append(errs, fmt.Errorf(field+": "+format, args...)) }
	if _, err := api.ParseID(c.Replica); err != nil {
		bad("replica", "%v", err)
	}
	if c.DataDir == "" {
		bad("dataDir", "is required")
	}
	if len(c.Listen) == 0 {
		bad("listen", "at least one address is required")
	}
	for i, l := range c.Listen {
		if _, _, err := net.SplitHostPort(l); err != nil {
			bad(fmt.Sprintf("listen[%d]", i), "%v", err)
		}
	}
	if c.Database.URL == "" {
		bad("database.url", "is required")
	}
	if p, err := netip.ParsePrefix(c.VirtualIPs); err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 30 {
		bad("virtualIPs", "%q is no IPv4 range between /8 and /30", c.VirtualIPs)
	}
	if c.LivenessTimeout < configfile.Duration(500*time.Millisecond) {
		bad("livenessTimeout", "is shorter than 500ms")
	}
	for name := range c.Registries.Hosts {
		if !slices.Contains(c.Registries.Allow, name) {
			bad("registries.hosts", "%q is not in registries.allow", name)
		}
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		bad("logLevel", "%q is none of debug, info, warn, error", c.LogLevel)
	}
	return errors.Join(errs...)
}

package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/configfile"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// config is node.yaml. Unknown fields are refused, and ${NAME} in a value
// comes from the environment.
type config struct {
	// Node is this machine's ID in its cluster. Where it is absent it is made of
	// HostName, the machine's name in whatever form it has one.
	Node     string `json:"node"`
	HostName string `json:"hostName"`
	// DataDir is durable; RunDir is a root-only tmpfs.
	DataDir string `json:"dataDir"`
	RunDir  string `json:"runDir"`
	// Address of the node in its cluster's network.
	Address    string            `json:"address"`
	Cluster    clusterConfig     `json:"cluster"`
	Containerd containerdConfig  `json:"containerd"`
	Envoy      string            `json:"envoy"`
	Registries registryConfig    `json:"registries"`
	Labels     map[string]string `json:"labels"`
	Taints     []taintConfig     `json:"taints"`
	// Capacity to offer; the machine's own where absent.
	Capacity struct {
		CPU    string `json:"cpu"`
		Memory string `json:"memory"`
	} `json:"capacity"`
	// LogLevel: debug, info (default), warn, error.
	LogLevel string `json:"logLevel"`

	level slog.Level
}

type clusterConfig struct {
	// ServerName in the cluster's certificate.
	ServerName string   `json:"serverName"`
	Addresses  []string `json:"addresses"`
	// TokenFile holds the join token; read only while the node has no identity.
	TokenFile string `json:"tokenFile"`
}

type containerdConfig struct {
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	// Runc is the runtime's binary; runc on containerd's PATH when absent.
	Runc         string `json:"runc"`
	RuncRoot     string `json:"runcRoot"`
	CgroupParent string `json:"cgroupParent"`
}

type registryConfig struct {
	Hosts map[string]struct {
		Address string `json:"address"`
		CAFile  string `json:"caFile"`
	} `json:"hosts"`
}

type taintConfig struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Effect string `json:"effect"`
}

var effects = map[string]portolanv1.TaintEffect{
	"NoSchedule":       portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE,
	"PreferNoSchedule": portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE,
	"NoExecute":        portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE,
}

func load(file string) (*config, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	return c, nil
}

func parse(b []byte) (*config, error) {
	c := &config{}
	if err := configfile.Parse(b, os.LookupEnv, c); err != nil {
		return nil, err
	}
	c.setDefaults()
	return c, c.validate()
}

func (c *config) setDefaults() {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&c.Node, nodeID(c.HostName))
	set(&c.Containerd.Address, "/run/containerd/containerd.sock")
	set(&c.Containerd.Namespace, "portolan")
	set(&c.Containerd.CgroupParent, "/portolan")
	set(&c.Envoy, "envoy")
	set(&c.LogLevel, "info")
}

// nodeID makes an ID of a machine's name: what an ID may not hold becomes a dash.
// One that is too long keeps its beginning and gets a hash of the whole, so that
// two machines do not become one.
func nodeID(host string) string {
	const most, sum = 40, 8
	id := strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(host), "-"), "-")
	if id == "" {
		return ""
	}
	if id[0] < 'a' {
		id = "n-" + id
	}
	if len(id) > most {
		whole := fmt.Sprintf("%x", sha256.Sum256([]byte(host)))
		id = strings.TrimRight(id[:most-sum-1], "-") + "-" + whole[:sum]
	}
	return id
}

func (c *config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := api.ParseID(c.Node); err != nil {
		bad("node: %w", err)
	}
	for field, dir := range map[string]string{"dataDir": c.DataDir, "runDir": c.RunDir} {
		if !filepath.IsAbs(dir) {
			bad("%s: %q is no absolute path", field, dir)
		}
	}
	if _, err := netip.ParseAddr(c.Address); err != nil {
		bad("address: %w", err)
	}
	if c.Cluster.ServerName == "" {
		bad("cluster.serverName: is required")
	}
	if len(c.Cluster.Addresses) == 0 {
		bad("cluster.addresses: name at least one")
	}
	if err := c.level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		bad("logLevel: %w", err)
	}
	if _, err := c.facts(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// facts are what the node tells of itself.
func (c *config) facts() (*nodev1.NodeFacts, error) {
	f := &nodev1.NodeFacts{Address: c.Address, Labels: c.Labels}
	var err error
	if f.CpuMilli, err = api.ParseCPU(c.Capacity.CPU); err != nil {
		return nil, fmt.Errorf("capacity.cpu: %w", err)
	}
	if f.MemoryBytes, err = api.ParseBytes(c.Capacity.Memory); err != nil {
		return nil, fmt.Errorf("capacity.memory: %w", err)
	}
	if f.CpuMilli == 0 {
		f.CpuMilli = int64(runtime.NumCPU()) * 1000
	}
	if f.MemoryBytes == 0 {
		var si unix.Sysinfo_t
		if err := unix.Sysinfo(&si); err != nil {
			return nil, fmt.Errorf("capacity.memory: read the machine's: %w", err)
		}
		f.MemoryBytes = int64(si.Totalram) * int64(si.Unit)
	}
	for i, t := range c.Taints {
		effect, ok := effects[t.Effect]
		if !ok || t.Key == "" {
			return nil, fmt.Errorf("taints[%d]: needs a key, and an effect NoSchedule, PreferNoSchedule or NoExecute", i)
		}
		f.Taints = append(f.Taints, &portolanv1.Taint{Key: t.Key, Value: t.Value, Effect: effect})
	}
	return f, nil
}

func (c *config) token() (string, error) {
	if c.Cluster.TokenFile == "" {
		return "", errors.New("cluster.tokenFile is not set, and the node has no identity")
	}
	b, err := os.ReadFile(c.Cluster.TokenFile)
	return strings.TrimSpace(string(b)), err
}

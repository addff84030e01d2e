// Package localfleet runs a whole fleet on one machine as real child processes:
// database, registry, federation replicas, and clusters behind network
// namespaces of their own, each with nodes that have a containerd, an agent and
// a warden. It supervises them, makes faults on request (stop, kill, freeze, cut,
// heal), and takes everything away again. It never holds state of the fleet
// itself and never edits what other software on the machine owns: all names
// carry the fleet's ID.
//
// Concurrency: one Supervisor per data folder, guarded by a lock file; its
// methods are safe for concurrent use.
package localfleet

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api"
)

// DefaultFleet is the fleet that `portolan up` runs without --fleet.
//
//go:embed fleet.yaml
var DefaultFleet []byte

// Fleet is the fleet file.
type Fleet struct {
	// Name is the fleet's trust domain.
	Name string `json:"fleet"`
	// Network is the /12 or larger from which WAN links (x.y+5.0.0/16), virtual
	// IPs (+4) and clusters (+6 and on) are cut, each a /16.
	Network netip.Prefix `json:"network"`
	// Replicas of the federation.
	Replicas int `json:"replicas"`
	// Ports on loopback: federation replicas take successive ones.
	FederationPort int `json:"federationPort"`
	RegistryPort   int `json:"registryPort"`
	IngressPort    int `json:"ingressPort"`
	// LivenessTimeout after which a silent cluster is lost.
	LivenessTimeout string          `json:"livenessTimeout"`
	Clusters        []ClusterConfig `json:"clusters"`
	Sample          Sample          `json:"sample"`
}

// ClusterConfig is one cluster of the fleet file.
type ClusterConfig struct {
	Name     string            `json:"name"`
	Region   string            `json:"region"`
	Zone     string            `json:"zone"`
	Provider string            `json:"provider"`
	Labels   map[string]string `json:"labels"`
	// Prices per hour in the fleet's currency.
	CPUCoreHour   float64      `json:"cpuCoreHour"`
	MemoryGiBHour float64      `json:"memoryGiBHour"`
	Nodes         []NodeConfig `json:"nodes"`
}

// NodeConfig is one node.
type NodeConfig struct {
	Name   string `json:"name"`
	Zone   string `json:"zone"`
	CPU    string `json:"cpu"`
	Memory string `json:"memory"`
	// Storage that is offered for volumes; what the disk has when absent.
	Storage string            `json:"storage"`
	Labels  map[string]string `json:"labels"`
	// Pool is short for the label "pool".
	Pool    string         `json:"pool"`
	Devices []DeviceConfig `json:"devices"`
	Taints  []TaintConfig  `json:"taints"`
}

// DeviceConfig is a number of like devices of a node; without paths they are only
// counted.
type DeviceConfig struct {
	Kind  string   `json:"kind,omitempty"`
	Model string   `json:"model,omitempty"`
	Count int      `json:"count,omitempty"`
	Paths []string `json:"paths,omitempty"`
}

// TaintConfig is a taint of a node; its effect is NoSchedule, PreferNoSchedule or
// NoExecute.
type TaintConfig struct {
	Key    string `json:"key"`
	Value  string `json:"value,omitempty"`
	Effect string `json:"effect"`
}

// Sample is the application that `up` applies. Paths are relative to the fleet
// file.
type Sample struct {
	// Images is a folder of image tarballs, named <repository with _>.tar, that go
	// to the local registry.
	Images string `json:"images"`
	// Manifests are files or folders, applied in order.
	Manifests []string `json:"manifests"`
	// Host and Path that must answer 200 at the ingress before `up` is done.
	Host string `json:"host"`
	Path string `json:"path"`
	// Try are lines that can be pasted.
	Try []string `json:"try"`
}

// LoadFleet reads a fleet file, the default one when path is empty, and makes its
// paths absolute.
func LoadFleet(path string) (Fleet, error) {
	raw, dir := DefaultFleet, ""
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return Fleet{}, fmt.Errorf("read fleet file: %w", err)
		}
		raw = b
		abs, err := filepath.Abs(path)
		if err != nil {
			return Fleet{}, err
		}
		dir = filepath.Dir(abs)
	}
	var f Fleet
	if err := yaml.UnmarshalStrict(raw, &f); err != nil {
		return Fleet{}, fmt.Errorf("read fleet file %s: %w", path, err)
	}
	f.SetDefaults()
	abs := func(p string) string {
		if p == "" || filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	f.Sample.Images = abs(f.Sample.Images)
	for i := range f.Sample.Manifests {
		f.Sample.Manifests[i] = abs(f.Sample.Manifests[i])
	}
	return f, f.Validate()
}

// SetDefaults fills what the file leaves out.
func (f *Fleet) SetDefaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	if f.Name == "" {
		f.Name = "portolan.internal"
	}
	if !f.Network.IsValid() {
		f.Network = netip.MustParsePrefix("10.64.0.0/12")
	}
	def(&f.Replicas, 2)
	def(&f.FederationPort, 7443)
	def(&f.RegistryPort, 7500)
	def(&f.IngressPort, 8080)
	if f.LivenessTimeout == "" {
		f.LivenessTimeout = "3s"
	}
	for i := range f.Clusters {
		c := &f.Clusters[i]
		if c.Region == "" {
			c.Region = c.Name
		}
		if c.Provider == "" {
			c.Provider = "local"
		}
		for j := range c.Nodes {
			n := &c.Nodes[j]
			if n.CPU == "" {
				n.CPU = "4"
			}
			if n.Memory == "" {
				n.Memory = "4Gi"
			}
		}
	}
}

// Validate gives all faults, joined.
func (f *Fleet) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("fleet file: "+format, args...)) }
	if len(f.Clusters) == 0 || len(f.Clusters) > 8 {
		bad("clusters: give 1 to 8, not %d", len(f.Clusters))
	}
	if f.Replicas < 1 || f.Replicas > 5 {
		bad("replicas: give 1 to 5, not %d", f.Replicas)
	}
	if !f.Network.Addr().Is4() || f.Network.Bits() > 12 {
		bad("network: give an IPv4 range of /12 or larger, not %s", f.Network)
	}
	seen := map[string]bool{}
	name := func(path, s string) {
		if _, err := api.ParseID(s); err != nil {
			bad("%s: %w", path, err)
		}
		if seen[s] {
			bad("%s: %q is there twice", path, s)
		}
		seen[s] = true
	}
	for i, c := range f.Clusters {
		name(fmt.Sprintf("clusters[%d].name", i), c.Name)
		if len(c.Nodes) == 0 || len(c.Nodes) > 16 {
			bad("clusters[%d].nodes: give 1 to 16, not %d", i, len(c.Nodes))
		}
		for j, n := range c.Nodes {
			name(fmt.Sprintf("clusters[%d].nodes[%d].name", i, j), n.Name)
		}
	}
	return errors.Join(errs...)
}

// slot gives the n-th /16 of the network.
func (f *Fleet) slot(n int) [4]byte {
	a := f.Network.Masked().Addr().As4()
	a[1] += byte(n)
	return a
}

func host(base [4]byte, c, d byte) netip.Addr {
	base[2], base[3] = c, d
	return netip.AddrFrom4(base)
}

// VirtualIPs is the fleet's range for services.
func (f *Fleet) VirtualIPs() netip.Prefix { return netip.PrefixFrom(host(f.slot(4), 0, 0), 16) }

// WAN is the link of the i-th cluster: our side, its side, /30.
func (f *Fleet) WAN(i int) (ours, theirs netip.Addr) {
	s := f.slot(5)
	return host(s, byte(i), 1), host(s, byte(i), 2)
}

// CIDR of the i-th cluster; .0.1 is its control plane, .0.11 and on its nodes.
func (f *Fleet) CIDR(i int) netip.Prefix { return netip.PrefixFrom(host(f.slot(6+i), 0, 0), 16) }

// ClusterAddr is where the i-th cluster's control plane listens.
func (f *Fleet) ClusterAddr(i int) netip.Addr { return host(f.slot(6+i), 0, 1) }

// NodeAddr is the address of the j-th node of the i-th cluster.
func (f *Fleet) NodeAddr(i, j int) netip.Addr { return host(f.slot(6+i), 0, byte(11+j)) }

// FederationAddrs are host:port of all replicas as seen from the i-th cluster;
// -1 is this machine.
func (f *Fleet) FederationAddrs(i int) []string {
	h := "127.0.0.1"
	if i >= 0 {
		ours, _ := f.WAN(i)
		h = ours.String()
	}
	var out []string
	for r := range f.Replicas {
		out = append(out, fmt.Sprintf("%s:%d", h, f.FederationPort+r))
	}
	return out
}

// ServerName is the federation's one name; RegistryName the registry's.
func (f *Fleet) ServerName() string { return "federation." + f.Name }

// RegistryName is host:port under which images are named everywhere.
func (f *Fleet) RegistryName() string { return fmt.Sprintf("registry.%s:%d", f.Name, f.RegistryPort) }

// fleetID makes names on this machine unique per data folder.
func fleetID(dataDir string) string {
	sum := sha256.Sum256([]byte(dataDir))
	return hex.EncodeToString(sum[:2])
}

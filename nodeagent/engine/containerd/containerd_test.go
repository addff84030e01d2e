package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/engine/containerd"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
)

// daemon is a containerd of our own: root, state, sockets and cgroup in one
// temporary directory.
type daemon struct {
	t           testing.TB
	dir, socket string
	cgroup      string
	cmd         *exec.Cmd
}

func startDaemon(t testing.TB) *daemon {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("missing: root, which containerd needs")
	}
	for _, tool := range []string{"containerd", "runc", "containerd-shim-runc-v2"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("missing: %s on PATH", tool)
		}
	}
	// Short: a Unix socket's path has at most 107 bytes.
	dir, err := os.MkdirTemp("", "ptl-ctr")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, socket: filepath.Join(dir, "c.sock"), cgroup: "/" + filepath.Base(dir)}
	config := fmt.Sprintf(`version = 2
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
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), d.socket, d.socket+".ttrpc", d.cgroup+"/daemon")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.clean)
	d.run()
	return d
}

func (d *daemon) run() {
	d.t.Helper()
	out, err := os.OpenFile(filepath.Join(d.dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer out.Close()
	d.cmd = exec.Command("containerd", "--config", filepath.Join(d.dir, "config.toml"))
	d.cmd.Stdout, d.cmd.Stderr = out, out
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	e := d.open()
	defer e.Close()
	d.answers(e)
}

// answers waits until an engine is connected to the daemon.
func (d *daemon) answers(e *containerd.Engine) {
	d.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for e.Ping(context.Background()) != nil {
		if time.Now().After(deadline) {
			b, _ := os.ReadFile(filepath.Join(d.dir, "log"))
			d.t.Fatalf("containerd does not answer:\n%s", b)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (d *daemon) crash() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
	_ = os.Remove(d.socket)
	d.run()
}

func (d *daemon) open() *containerd.Engine {
	e, err := containerd.New(containerd.Config{
		Address: d.socket, Namespace: "suite", RuncRoot: filepath.Join(d.dir, "runc"), CgroupParent: d.cgroup + "/replicas",
		ReservedUIDs: []uint32{14010}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return e
}

// clean ends what is left, the daemon, and takes away mounts and cgroups.
func (d *daemon) clean() {
	e := d.open()
	if all, err := e.List(context.Background()); err == nil {
		for _, c := range all {
			_ = e.Delete(context.Background(), c.ID)
		}
	}
	_ = e.Close()
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	_ = d.cmd.Wait()
	b, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], d.dir) {
			_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
		}
	}
	if err := os.RemoveAll(d.dir); err != nil {
		d.t.Errorf("clean up: %v", err)
	}
	for _, sub := range []string{"/replicas", "/daemon", ""} {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + d.cgroup + sub)
		for _, g := range append(dirs, "/sys/fs/cgroup"+d.cgroup+sub) {
			_ = syscall.Rmdir(g)
		}
	}
}

// testImage builds the suite's image and serves it from a registry on loopback.
func testImage(t testing.TB) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "work")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "github.com/portolan-io/portolan/nodeagent/engine/enginetest/testimage")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build test image: %v\n%s", err, out)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return push(t, strings.TrimPrefix(srv.URL, "http://")+"/suite", b)
}

func push(t testing.TB, repo string, program []byte) string {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, h := range []*tar.Header{{Name: "tmp/", Mode: 0o755, Typeflag: tar.TypeDir}, {Name: "work", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(program); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err == nil {
		img, err = mutate.ConfigFile(img, &v1.ConfigFile{
			OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, l)},
			Config: v1.Config{Entrypoint: []string{"/work"}, Env: []string{"PATH=/"}},
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(repo + ":latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return repo + "@" + d.String()
}

func diffIDs(t testing.TB, l v1.Layer) []v1.Hash {
	h, err := l.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	return []v1.Hash{h}
}

func TestContainerd(t *testing.T) {
	d := startDaemon(t)
	image := testImage(t)
	enginetest.Run(t, func(t *testing.T) enginetest.Kit {
		e := d.open()
		t.Cleanup(func() { _ = e.Close() })
		return enginetest.Kit{
			Engine: e, Image: image, Isolated: true, Crash: d.crash,
			Reopen: func() engine.Engine {
				o := d.open()
				t.Cleanup(func() { _ = o.Close() })
				return o
			},
		}
	})
}

// A pull that was killed leaves a lease and an ingest that is complete but not
// committed; this registry answers 416 to the Range of the next try.
func TestPullAfterAKilledPull(t *testing.T) {
	d := startDaemon(t)
	image := testImage(t)
	e := d.open()
	defer e.Close()
	ctx := namespaces.WithNamespace(t.Context(), "suite")
	c, err := client.New(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	layer, body := layerOf(t, image)
	if _, err := c.LeasesService().Create(ctx, leases.WithID("left-by-a-killed-pull"), leases.WithLabel("portolan.io/pull", "1")); err != nil {
		t.Fatal(err)
	}
	w, err := c.ContentStore().Writer(leases.WithLease(ctx, "left-by-a-killed-pull"), content.WithRef("layer-"+layer.String()), content.WithDescriptor(ocispec.Descriptor{Digest: digest.Digest(layer.String()), Size: int64(len(body))}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil { // not committed
		t.Fatal(err)
	}
	if _, err := e.Pull(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	ls, err := c.LeasesService().List(ctx)
	if err != nil || len(ls) != 0 {
		t.Errorf("leases left: %v, %v", ls, err)
	}
	open, err := c.ContentStore().ListStatuses(ctx)
	if err != nil || len(open) != 0 {
		t.Errorf("ingests left: %v, %v", open, err)
	}
}

func layerOf(t testing.TB, image string) (v1.Hash, []byte) {
	t.Helper()
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	ls, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	h, err := ls[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ls[0].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return h, b
}

// What a daemon that was killed in the middle of a start leaves behind is listed
// and can be deleted; the ID is free afterwards.
func TestHalfMade(t *testing.T) {
	d := startDaemon(t)
	image := testImage(t)
	e := d.open()
	defer e.Close()
	if _, err := e.Pull(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	spec := func(id string) engine.Spec {
		return engine.Spec{ID: id, Image: image, Args: []string{"sleep"}, MemoryBytes: 64 << 20, Pids: 64, Labels: map[string]string{"half": id}}
	}
	for round := range 6 {
		id := fmt.Sprintf("half-%d.main.1", round)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := e.Create(t.Context(), spec(id)); err == nil {
				_, _ = e.Start(t.Context(), id)
			}
		}()
		<-time.After(time.Duration(10+round*12) * time.Millisecond)
		d.crash()
		<-done
		d.answers(e)
	}
	all, err := e.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of 6 starts left something", len(all))
	for _, c := range all {
		for range 2 {
			if err := e.Delete(t.Context(), c.ID); err != nil {
				t.Errorf("delete %s (state %d): %v", c.ID, c.State, err)
			}
		}
	}
	for round := range 6 {
		id := fmt.Sprintf("half-%d.main.2", round)
		if err := e.Create(t.Context(), spec(id)); err != nil {
			t.Errorf("create the next attempt: %v", err)
			continue
		}
		if _, err := e.Start(t.Context(), id); err != nil {
			t.Errorf("start the next attempt: %v", err)
		}
		if err := e.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if all, err = e.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("left: %+v, %v", all, err)
	}
}

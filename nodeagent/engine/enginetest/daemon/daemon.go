// Package daemon starts a containerd of its own for tests: root, state, sockets
// and cgroup under one temporary directory, and an image of the suite's program
// in a registry on loopback. It skips, naming the missing part, where containerd
// cannot run.
//
// Concurrency: a Daemon belongs to its test.
package daemon

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Daemon is a running containerd.
type Daemon struct {
	// Dir holds all of it; Socket is its address; Cgroup is the parent under which
	// it and its containers are.
	Dir, Socket, Cgroup string

	t   testing.TB
	cmd *exec.Cmd
}

// Start runs a daemon until the test ends. Containers are the test's to delete.
func Start(t testing.TB) *Daemon {
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
	d := &Daemon{t: t, Dir: dir, Socket: filepath.Join(dir, "c.sock"), Cgroup: "/" + filepath.Base(dir)}
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
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), d.Socket, d.Socket+".ttrpc", d.Cgroup+"/daemon")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.clean)
	d.run()
	return d
}

func (d *Daemon) run() {
	d.t.Helper()
	out, err := os.OpenFile(filepath.Join(d.Dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	d.cmd = exec.Command("containerd", "--config", filepath.Join(d.Dir, "config.toml"))
	d.cmd.Stdout, d.cmd.Stderr = out, out
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		c, err := net.Dial("unix", d.Socket)
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(deadline) {
			b, _ := os.ReadFile(filepath.Join(d.Dir, "log"))
			d.t.Fatalf("containerd does not answer: %v\n%s", err, b)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// Crash is kill -9 of the daemon, and its restart.
func (d *Daemon) Crash() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
	_ = os.Remove(d.Socket)
	d.run()
}

// clean ends the daemon, and takes away mounts and cgroups.
func (d *Daemon) clean() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	_ = d.cmd.Wait()
	b, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], d.Dir) {
			_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
		}
	}
	if err := os.RemoveAll(d.Dir); err != nil {
		d.t.Errorf("clean up: %v", err)
	}
	for _, sub := range []string{"/replicas", "/daemon", ""} {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + d.Cgroup + sub)
		for _, g := range append(dirs, "/sys/fs/cgroup"+d.Cgroup+sub) {
			_ = syscall.Rmdir(g)
		}
	}
}

// Image builds the suite's image and serves it from a registry on loopback.
func Image(t testing.TB) string {
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
			OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, l)},
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

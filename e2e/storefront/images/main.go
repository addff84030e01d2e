// Command images builds the sample's container images without Docker: our own
// parts from Go source, Redis and nginx from Debian's packages. It writes one
// tarball per image, <repository with _>@<tag>.tar, and leaves alone what is
// up to date.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// image is one to build.
type image struct {
	file string // "shop_catalog@v1"
	// recipe is hashed: a change of it builds again.
	recipe string
	layer  func(ctx context.Context, root string) error
	config v1.Config
}

func main() {
	out := flag.String("out", "bin/images", "folder for the tarballs")
	src := flag.String("src", ".", "root of the repository")
	flag.Parse()
	if err := build(context.Background(), *src, *out); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, src, out string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for _, img := range append(shopImages(src), redisImage(), nginxImage(src)) {
		if err := buildOne(ctx, img, out); err != nil {
			return fmt.Errorf("%s: %w", img.file, err)
		}
	}
	return nil
}

func buildOne(ctx context.Context, img image, out string) error {
	sum := sha256.Sum256([]byte(img.recipe))
	stamp := filepath.Join(out, img.file+".stamp")
	tarFile := filepath.Join(out, img.file+".tar")
	if b, err := os.ReadFile(stamp); err == nil && string(b) == hex.EncodeToString(sum[:]) {
		if _, err := os.Stat(tarFile); err == nil {
			return nil
		}
	}
	fmt.Fprintf(os.Stderr, "  building image %s\n", img.file)
	root, err := os.MkdirTemp("", "portolan-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(root) }()
	if err := img.layer(ctx, root); err != nil {
		return err
	}
	data, err := pack(root)
	if err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	if err != nil {
		return err
	}
	made, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	cf, err := made.ConfigFile()
	if err != nil {
		return err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config = "linux", "amd64", img.config
	if made, err = mutate.ConfigFile(made, cf); err != nil {
		return err
	}
	repo, tag, _ := strings.Cut(img.file, "@")
	ref, err := name.NewTag(strings.ReplaceAll(repo, "_", "/") + ":" + tag)
	if err != nil {
		return err
	}
	if err := tarball.WriteToFile(tarFile, ref, made); err != nil {
		return err
	}
	return os.WriteFile(stamp, []byte(hex.EncodeToString(sum[:])), 0o644)
}

// pack makes a layer whose bytes depend on the files alone.
func pack(root string) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		h.Name, h.ModTime, h.AccessTime, h.ChangeTime = rel, time.Unix(0, 0), time.Time{}, time.Time{}
		h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
		if err := tw.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		_, err = io.Copy(tw, f)
		return err
	})
	return buf.Bytes(), errors.Join(err, tw.Close())
}

const nobody = "65534:65534"

// shopImages are our own parts: one static binary each, two versions of catalog.
func shopImages(src string) []image {
	recipe := "shop 2 " + hashTree(filepath.Join(src, "e2e/storefront/shop"))
	one := func(part, version string) image {
		return image{
			file: "shop_" + part + "@" + version, recipe: recipe + part + version,
			config: v1.Config{Entrypoint: []string{"/shop", part}, User: nobody, Env: []string{"PATH=/"}},
			layer: func(ctx context.Context, root string) error {
				cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.Version="+version, "-o", filepath.Join(root, "shop"), "./e2e/storefront/shop")
				cmd.Dir, cmd.Env = src, append(os.Environ(), "CGO_ENABLED=0")
				if b, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("%w: %s", err, b)
				}
				return nil
			},
		}
	}
	return []image{one("web", "v1"), one("catalog", "v1"), one("catalog", "v2"), one("cart", "v1"), one("payments", "v1"), one("restock", "v1")}
}

func hashTree(dir string) string {
	h := sha256.New()
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			fmt.Fprintf(h, "%s %x %v\n", path, sha256.Sum256(b), err)
		}
		return nil
	})
	return hex.EncodeToString(h.Sum(nil))
}

// redisImage and nginxImage hold Debian's binaries and just the libraries that
// these load.
func redisImage() image {
	pkgs := []string{"redis-server", "redis-tools", "libjemalloc2", "liblua5.1-0", "liblzf1", "libatomic1", "libhiredis0.14", "lua-bitop", "lua-cjson", "libssl3", "libsystemd0", "libcap2", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libzstd1", "libgcc-s1", "libstdc++6", "libc6"}
	return image{
		file: "library_redis@7", recipe: "redis 2 " + strings.Join(pkgs, " "),
		config: v1.Config{Entrypoint: []string{"/usr/bin/redis-server"}, Cmd: []string{"--save", "", "--appendonly", "no", "--bind", "0.0.0.0", "--protected-mode", "no"}, User: nobody, WorkingDir: "/tmp", Env: []string{"PATH=/usr/bin"}},
		layer: func(ctx context.Context, root string) error {
			return debian(ctx, root, pkgs, "usr/bin/redis-server", "usr/bin/redis-cli")
		},
	}
}

const nginxConf = `worker_processes 1;
error_log /dev/stderr warn;
pid /tmp/nginx.pid;
events { worker_connections 256; }
http {
  types { text/html html; text/css css; application/javascript js; image/svg+xml svg; }
  access_log off;
  client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi; uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
  server {
    listen 8080;
    root /usr/share/shop;
    location = /healthz { return 200 "ok\n"; }
  }
}
`

func nginxImage(src string) image {
	pkgs := []string{"nginx", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g", "libc6"}
	assets := filepath.Join(src, "e2e/storefront/assets")
	return image{
		file: "library_nginx@1.22", recipe: "nginx 2 " + nginxConf + strings.Join(pkgs, " ") + hashTree(assets),
		config: v1.Config{Entrypoint: []string{"/usr/sbin/nginx", "-c", "/etc/nginx/shop.conf", "-g", "daemon off;"}, User: nobody, Env: []string{"PATH=/usr/sbin"}},
		layer: func(ctx context.Context, root string) error {
			if err := debian(ctx, root, pkgs, "usr/sbin/nginx"); err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Join(root, "etc/nginx"), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(root, "etc/nginx/shop.conf"), []byte(nginxConf), 0o644); err != nil {
				return err
			}
			return os.CopyFS(filepath.Join(root, "usr/share/shop"), os.DirFS(assets))
		},
	}
}

// debian unpacks packages and keeps the binaries and the libraries they load.
func debian(ctx context.Context, root string, pkgs []string, binaries ...string) error {
	work, err := os.MkdirTemp("", "portolan-debs-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	// apt drops its rights to this user while it downloads.
	if err := os.Chmod(work, 0o777); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "download"}, pkgs...)...)
	cmd.Dir = work
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w: %s; is the package list fresh? (apt-get update)", err, b)
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil {
		return err
	}
	sort.Strings(debs)
	all := filepath.Join(work, "all")
	for _, d := range debs {
		if b, err := exec.CommandContext(ctx, "dpkg-deb", "-x", d, all).CombinedOutput(); err != nil {
			return fmt.Errorf("dpkg-deb -x %s: %w: %s", filepath.Base(d), err, b)
		}
	}
	keep := map[string]bool{}
	for _, bin := range binaries {
		files, err := needed(ctx, all, bin)
		if err != nil {
			return err
		}
		for _, f := range files {
			keep[f] = true
		}
	}
	for f := range keep {
		if err := copyFile(filepath.Join(root, f), filepath.Join(all, f)); err != nil {
			return err
		}
	}
	for _, dir := range []string{"tmp", "etc", "proc", "sys", "dev", "run", "var/lib/nginx", "var/log/nginx"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o1777); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/:/none\nnobody:x:65534:65534:nobody:/:/none\n"), 0o644)
}

const loader = "lib64/ld-linux-x86-64.so.2"

// needed asks the unpacked loader which libraries a binary takes, and fails when
// one is in none of the packages.
func needed(ctx context.Context, root, bin string) ([]string, error) {
	ld := filepath.Join(root, loader)
	libs := filepath.Join(root, "lib/x86_64-linux-gnu") + ":" + filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	b, err := exec.CommandContext(ctx, ld, "--inhibit-cache", "--library-path", libs, "--list", filepath.Join(root, bin)).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w: %s", bin, err, b)
	}
	files := []string{bin, loader}
	for line := range strings.Lines(string(b)) {
		_, rest, ok := strings.Cut(line, "=> ")
		if !ok {
			continue
		}
		path, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		rel, err := filepath.Rel(root, path)
		if err != nil || strings.HasPrefix(rel, "..") {
			return nil, fmt.Errorf("%s loads %s, which is in none of the packages", bin, strings.TrimSpace(line))
		}
		files = append(files, rel)
	}
	return files, nil
}

// copyFile copies what a name leads to, links resolved.
func copyFile(dst, src string) error {
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	return os.WriteFile(dst, b, 0o755)
}

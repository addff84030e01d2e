package localfleet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// RegistryConfig is the local OCI registry's.
type RegistryConfig struct {
	Listen   []string
	CertFile string
	KeyFile  string
	// Data keeps blobs over restarts; manifests come from Images again.
	Data string
	// Images is a folder of tarballs.
	Images string
	// Name under which images are pushed, host:port.
	Name string
}

// ServeRegistry serves go-containerregistry's registry over TLS until ctx ends.
// Images of the folder are in it before it listens on anything but loopback.
func ServeRegistry(ctx context.Context, c RegistryConfig, logs io.Writer) error {
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return fmt.Errorf("registry data: %w", err)
	}
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return fmt.Errorf("registry certificate: %w", err)
	}
	// Without Range answers: a retry of an interrupted pull would get 416.
	inner := registry.New(registry.Logger(log.New(logs, "registry ", log.LstdFlags)), registry.WithBlobHandler(registry.NewDiskBlobHandler(c.Data)))
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		inner.ServeHTTP(w, r)
	})
	if err := loadImages(ctx, inner, c); err != nil {
		return err
	}
	srv := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx },
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}},
	}
	return serveAll(ctx, srv, c.Listen, true)
}

// serveAll listens on every address and serves until ctx ends.
func serveAll(ctx context.Context, srv *http.Server, addrs []string, withTLS bool) error {
	errs := make(chan error, len(addrs))
	for _, a := range addrs {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", a, err)
		}
		go func() {
			if withTLS {
				errs <- srv.ServeTLS(l, "", "")
			} else {
				errs <- srv.Serve(l)
			}
		}()
	}
	select {
	case <-ctx.Done():
		return srv.Close()
	case err := <-errs:
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	}
}

// loadImages pushes every tarball of the folder through the handler itself.
func loadImages(ctx context.Context, h http.Handler, c RegistryConfig) error {
	if c.Images == "" {
		return nil
	}
	files, err := filepath.Glob(filepath.Join(c.Images, "*.tar"))
	if err != nil {
		return err
	}
	for _, f := range files {
		img, err := tarball.ImageFromPath(f, nil)
		if err != nil {
			return fmt.Errorf("read image %s: %w", f, err)
		}
		tag, err := imageTag(c.Name, f)
		if err != nil {
			return err
		}
		if err := remote.Write(tag, img, remote.WithContext(ctx), remote.WithTransport(handlerTransport{h})); err != nil {
			return fmt.Errorf("load image %s: %w", f, err)
		}
	}
	return nil
}

// imageTag turns "shop_catalog@v1.tar" into registry/shop/catalog:v1.
func imageTag(reg, file string) (name.Tag, error) {
	base := strings.TrimSuffix(filepath.Base(file), ".tar")
	repo, tag, ok := strings.Cut(base, "@")
	if !ok {
		tag = "latest"
	}
	t, err := name.NewTag(reg+"/"+strings.ReplaceAll(repo, "_", "/")+":"+tag, name.Insecure)
	if err != nil {
		return name.Tag{}, fmt.Errorf("image file %s: %w", file, err)
	}
	return t, nil
}

// handlerTransport calls a handler in place of the network.
type handlerTransport struct{ h http.Handler }

func (t handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	pr, pw := io.Pipe()
	w := &pipeWriter{header: http.Header{}, body: pw, ready: make(chan struct{})}
	if r.Body == nil {
		// A server's handler always finds a body.
		r = r.Clone(r.Context())
		r.Body = http.NoBody
	}
	go func() {
		t.h.ServeHTTP(w, r)
		w.WriteHeader(http.StatusOK)
		_ = pw.Close()
		_ = r.Body.Close()
	}()
	select {
	case <-w.ready:
	case <-r.Context().Done():
		_ = pr.CloseWithError(r.Context().Err())
		return nil, r.Context().Err()
	}
	return &http.Response{Status: http.StatusText(w.code), StatusCode: w.code, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: w.header, Body: pr, ContentLength: -1, Request: r}, nil
}

type pipeWriter struct {
	header http.Header
	body   *io.PipeWriter
	code   int
	ready  chan struct{}
}

func (w *pipeWriter) Header() http.Header { return w.header }

func (w *pipeWriter) WriteHeader(code int) {
	if w.code == 0 {
		w.code = code
		close(w.ready)
	}
}

func (w *pipeWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(p)
}

// IngressConfig is the local front door's.
type IngressConfig struct {
	Listen string
	// Backends are host:port of ingress gateways, tried in order.
	Backends []string
}

// ServeIngress forwards TCP from loopback to the first ingress gateway that
// answers: what a load balancer in front of the fleet does.
func ServeIngress(ctx context.Context, c IngressConfig) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", c.Listen, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	slots := make(chan struct{}, 1024)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer func() { <-slots }()
				forward(ctx, conn, c.Backends)
			}()
		default:
			_ = conn.Close()
		}
	}
}

func forward(ctx context.Context, conn net.Conn, backends []string) {
	defer func() { _ = conn.Close() }()
	for _, b := range backends {
		up, err := (&net.Dialer{Timeout: 500 * time.Millisecond}).DialContext(ctx, "tcp", b)
		if err != nil {
			continue
		}
		defer func() { _ = up.Close() }()
		done := make(chan struct{}, 2)
		pipe := func(dst, src net.Conn) {
			_, _ = io.Copy(dst, src)
			if t, ok := dst.(*net.TCPConn); ok {
				_ = t.CloseWrite()
			}
			done <- struct{}{}
		}
		go pipe(up, conn)
		go pipe(conn, up)
		for range 2 {
			select {
			case <-done:
			case <-ctx.Done():
				return
			}
		}
		return
	}
}

package containerd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes/docker"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

const (
	pullLeaseLabel = "portolan.io/pull"
	pullLeaseLife  = time.Hour
	maxDownloads   = 3
)

// Pull implements engine.Engine.
func (e *Engine) Pull(ctx context.Context, ref string) (engine.Image, error) {
	doing := "pull " + ref
	_, digest, ok := strings.Cut(ref, "@")
	if !ok {
		return engine.Image{}, api.E(api.Invalid, doing, "the reference has no digest")
	}
	ctx = e.in(ctx)
	img, err := e.present(ctx, ref)
	if err == nil && img == nil {
		img, err = e.fetch(ctx, ref)
	}
	if err != nil {
		return engine.Image{}, failed(doing, err)
	}
	if got := img.Target().Digest.String(); got != digest {
		return engine.Image{}, api.E(api.Invalid, doing, "the registry gave %s", got)
	}
	cfg, err := imageConfig(ctx, img)
	if err != nil {
		return engine.Image{}, failed(doing, err)
	}
	return engine.Image{
		Ref: ref, Digest: digest, User: cfg.User, Env: cfg.Env, Entrypoint: cfg.Entrypoint, Cmd: cfg.Cmd, WorkingDir: cfg.WorkingDir,
	}, nil
}

// Images implements engine.ImageLister.
func (e *Engine) Images(ctx context.Context) ([]string, error) {
	all, err := e.client.ImageService().List(e.in(ctx))
	if err != nil {
		return nil, failed("list images", err)
	}
	out := make([]string, 0, len(all))
	for _, img := range all {
		out = append(out, img.Target.Digest.String())
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// present gives the image if it is here and unpacked; nil if not.
func (e *Engine) present(ctx context.Context, ref string) (client.Image, error) {
	img, err := e.client.GetImage(ctx, ref)
	if is(err, api.NotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ok, err := img.IsUnpacked(ctx, e.cfg.Snapshotter)
	if err != nil || !ok {
		// Parts of it are gone: fetch it again.
		return nil, nil //nolint:nilerr // the fetch tells what is wrong
	}
	return img, nil
}

func (e *Engine) fetch(ctx context.Context, ref string) (client.Image, error) {
	if err := e.beginPull(ctx); err != nil {
		return nil, err
	}
	defer e.endPull()
	l, err := e.client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(pullLeaseLife), leases.WithLabel(pullLeaseLabel, "1"))
	if err != nil {
		return nil, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), killBound)
		defer cancel()
		if err := e.client.LeasesService().Delete(clean, l); err != nil {
			e.cfg.Log.Warn("lease of a pull stays until it expires", "lease", l.ID, "error", err)
		}
	}()
	hosts, done := e.registryHosts()
	defer done()
	return e.client.Pull(leases.WithLease(ctx, l.ID), ref,
		client.WithPullUnpack,
		client.WithPullSnapshotter(e.cfg.Snapshotter),
		client.WithMaxConcurrentDownloads(maxDownloads),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
	)
}

// beginPull cleans up after pulls that were cut short, once nobody else pulls:
// their leases hold content for good, and an ingest that is complete but not
// committed makes some registries answer 416 to the Range of the next try.
func (e *Engine) beginPull(ctx context.Context) error {
	e.pullMu.Lock()
	defer e.pullMu.Unlock()
	if e.pulling == 0 {
		if err := e.abortLeftovers(ctx); err != nil {
			return err
		}
	}
	e.pulling++
	return nil
}

func (e *Engine) endPull() {
	e.pullMu.Lock()
	defer e.pullMu.Unlock()
	e.pulling--
}

func (e *Engine) abortLeftovers(ctx context.Context) error {
	ls, err := e.client.LeasesService().List(ctx, fmt.Sprintf("labels.%q==1", pullLeaseLabel))
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range ls {
		if err := e.client.LeasesService().Delete(ctx, l); err != nil && !is(err, api.NotFound) {
			return fmt.Errorf("delete lease: %w", err)
		}
	}
	open, err := e.client.ContentStore().ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("list ingests: %w", err)
	}
	for _, s := range open {
		if err := e.client.ContentStore().Abort(ctx, s.Ref); err != nil && !is(err, api.NotFound) {
			return fmt.Errorf("abort ingest: %w", err)
		}
	}
	return nil
}

// registryHosts says how each registry is reached; done closes connections.
func (e *Engine) registryHosts() (docker.RegistryHosts, func()) {
	var mu sync.Mutex // layers are fetched at the same time
	var open []*http.Transport
	hosts := func(host string) ([]docker.RegistryHost, error) {
		t, scheme, err := e.transport(host)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		open = append(open, t)
		mu.Unlock()
		return []docker.RegistryHost{{
			Client: &http.Client{Transport: wholeOn416{t}}, Host: host, Scheme: scheme, Path: "/v2",
			Authorizer:   docker.NewDockerAuthorizer(),
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
		}}, nil
	}
	return hosts, func() {
		for _, t := range open {
			t.CloseIdleConnections()
		}
	}
}

func (e *Engine) transport(host string) (*http.Transport, string, error) {
	h, known := e.cfg.Hosts[host]
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	t := &http.Transport{
		DialContext: dialer.DialContext, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 30 * time.Second,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: maxDownloads, ForceAttemptHTTP2: true,
	}
	if !known {
		t.Proxy = http.ProxyFromEnvironment
	}
	if h.Address != "" {
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, h.Address)
		}
	}
	if h.CAFile != "" {
		pem, err := os.ReadFile(h.CAFile)
		if err != nil {
			return nil, "", api.E(api.Unavailable, "read roots of registry "+host, "%w", err)
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, "", api.E(api.Precondition, "read roots of registry "+host, "%s holds no certificate", h.CAFile)
		}
		return t, "https", nil
	}
	if ok, err := docker.MatchLocalhost(host); err == nil && ok {
		return t, "http", nil
	}
	return t, "https", nil
}

// wholeOn416 asks again for the whole when a registry refuses a range.
type wholeOn416 struct{ next *http.Transport }

func (w wholeOn416) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	if err != nil || resp.StatusCode != http.StatusRequestedRangeNotSatisfiable || r.Header.Get("Range") == "" {
		return resp, err
	}
	if err := resp.Body.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return nil, err
	}
	again := r.Clone(r.Context())
	again.Header.Del("Range")
	return w.next.RoundTrip(again)
}

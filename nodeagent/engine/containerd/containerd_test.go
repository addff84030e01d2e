package containerd_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/engine/containerd"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest/daemon"
)

// start runs a daemon; what the test leaves in it is deleted.
func start(t testing.TB) *daemon.Daemon {
	d := daemon.Start(t)
	t.Cleanup(func() {
		e := open(t, d)
		ctx := context.WithoutCancel(t.Context())
		answers(t, e)
		all, err := e.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, c := range all {
			if err := e.Delete(ctx, c.ID); err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

func open(t testing.TB, d *daemon.Daemon) *containerd.Engine {
	t.Helper()
	return openWith(t, d, "")
}

func openWith(t testing.TB, d *daemon.Daemon, runc string) *containerd.Engine {
	t.Helper()
	e, err := containerd.New(containerd.Config{
		Address: d.Socket, Namespace: "suite", Runc: runc, RuncRoot: filepath.Join(d.Dir, "runc"), CgroupParent: d.Cgroup + "/replicas",
		ReservedUIDs: []uint32{14010}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// answers waits until an engine is connected to the daemon.
func answers(t testing.TB, e *containerd.Engine) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for e.Ping(context.WithoutCancel(t.Context())) != nil {
		if time.Now().After(deadline) {
			t.Fatal("containerd does not answer")
		}
		<-time.After(10 * time.Millisecond)
	}
}

func TestContainerd(t *testing.T) {
	d := start(t)
	image := daemon.Image(t)
	enginetest.Run(t, func(t *testing.T) enginetest.Kit {
		e := open(t, d)
		return enginetest.Kit{
			Engine: e, Image: image, Isolated: true, Crash: d.Crash,
			Reopen: func() engine.Engine {
				return open(t, d)
			},
		}
	})
}

// A pull that was killed leaves a lease and an ingest that is complete but not
// committed; this registry answers 416 to the Range of the next try.
// The runtime that was configured is the one that runs.
func TestRuncIsTheConfiguredOne(t *testing.T) {
	d := start(t)
	image := daemon.Image(t)
	// It is needed until the last container is gone.
	used, runc := filepath.Join(d.Dir, "used"), filepath.Join(d.Dir, "my-runc")
	if err := os.WriteFile(runc, []byte("#!/bin/sh\necho \"$@\" >>"+used+"\nexec runc \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	e := openWith(t, d, runc)
	answers(t, e)
	if _, err := e.Pull(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	if err := e.Create(t.Context(), engine.Spec{ID: "a.main.1", Image: image, Args: []string{"sleep"}, MemoryBytes: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(used); err != nil || !strings.Contains(string(b), "create") {
		t.Errorf("the configured runtime was not used: %q, %v", b, err)
	}
}

func TestPullAfterAKilledPull(t *testing.T) {
	d := start(t)
	image := daemon.Image(t)
	e := open(t, d)
	ctx := namespaces.WithNamespace(t.Context(), "suite")
	c, err := client.New(d.Socket)
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
	d := start(t)
	image := daemon.Image(t)
	e := open(t, d)
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
		d.Crash()
		<-done
		answers(t, e)
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

package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
)

// stateful is replica db-<index> with a volume at /data.
func stateful() *nodev1.Assignment {
	as := assignment("db-1")
	as.Tenant, as.Workload, as.Index = "shop", "db", 1
	as.Volumes = []*nodev1.AssignedVolume{{Volume: "shop.db-1.data", Name: "data", SizeBytes: 1 << 20}}
	as.Spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL
	as.Spec.Volumes = []*portolanv1.Volume{{Name: "data", Size: "1Mi"}}
	as.Spec.Containers[0].Mounts = []*portolanv1.VolumeMount{{Volume: "data", Path: "/data"}}
	return as
}

func TestVolumesOutliveReplicasAndAgents(t *testing.T) {
	inWorld(t, func(w *world) {
		var specs []enginetest.Proc
		w.engine.Script("app", func(p *enginetest.Proc) int {
			specs = append(specs, *p)
			for _, m := range p.Spec.Mounts {
				if m.Target == "/data" {
					if err := os.WriteFile(filepath.Join(m.Source, "written"), []byte("here"), 0o600); err != nil {
						t.Error(err)
					}
				}
			}
			return enginetest.Verbs(p)
		})
		_, kill := w.agent()
		w.assign(stateful())
		w.ready("db-1")
		dir := filepath.Join(w.dir, "data", "volumes", "shop.db-1.data")
		spec := specs[0].Spec
		m := spec.Mounts[len(spec.Mounts)-1]
		if m.Source != dir || m.Target != "/data" || !m.Own || m.ReadOnly || spec.Hostname != "db-1" {
			t.Errorf("mount %+v, hostname %q", m, spec.Hostname)
		}
		for _, want := range []string{"PORTOLAN_REPLICA_NAME=db-1", "PORTOLAN_REPLICA_INDEX=1"} {
			if !slices.Contains(spec.Env, want) {
				t.Errorf("%s is not in %v", want, spec.Env)
			}
		}
		if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o770 {
			t.Errorf("directory of the volume: %v, %v", fi, err)
		}
		kill()
		w.agent()
		stop := stateful()
		stop.Stop = true
		w.assign(stop)
		w.until("the replica is gone", 10*time.Second, func() bool { return w.gone("db-1") })
		if b, err := os.ReadFile(filepath.Join(dir, "written")); err != nil || string(b) != "here" {
			t.Errorf("after replica and agent: %q, %v", b, err)
		}
	})
}

func TestVolumeGoesWhenTheClusterSaysSoAndNothingUsesIt(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.assign(stateful())
		w.ready("db-1")
		volumes := filepath.Join(w.dir, "data", "volumes")
		other := filepath.Join(volumes, "shop.db-2.data")
		if err := os.Mkdir(other, 0o700); err != nil {
			t.Fatal(err)
		}
		w.removeVolume("shop.db-1.data")
		time.Sleep(12 * time.Second) // virtual; longer than it takes to try again
		if _, err := os.Stat(filepath.Join(volumes, "shop.db-1.data")); err != nil || len(w.volumesGone()) != 0 {
			t.Fatalf("a volume in use was deleted: %v, reported %v", err, w.volumesGone())
		}
		w.unassign("db-1")
		w.until("the volume is reported as gone", 20*time.Second, func() bool { return slices.Contains(w.volumesGone(), "shop.db-1.data") })
		if _, err := os.Stat(filepath.Join(volumes, "shop.db-1.data")); !os.IsNotExist(err) {
			t.Errorf("it is still there: %v", err)
		}
		if _, err := os.Stat(other); err != nil {
			t.Errorf("another volume went: %v", err)
		}
	})
}

func TestVolumesNeverLeadOutside(t *testing.T) {
	for _, id := range []string{"", ".", "..", "../x", "a/b", "a.b-0", "a.b-0.c/..", "a.b-0..", ".a.b-0.c", "a.b-0.c\x00", "A.b-0.c", strings.Repeat("a", 250) + ".b-0.c"} {
		if err := checkVolumeID(id); err == nil {
			t.Errorf("volume ID %q is accepted", id)
		}
	}
	if err := checkVolumeID("shop.db-0.data"); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*nodev1.Assignment){
		"an ID that leads up":        func(a *nodev1.Assignment) { a.Volumes[0].Volume = ".." },
		"a volume that is not there": func(a *nodev1.Assignment) { a.Volumes[0].Name = "other" },
		"a relative path":            func(a *nodev1.Assignment) { a.Spec.Containers[0].Mounts[0].Path = "data" },
		"the root":                   func(a *nodev1.Assignment) { a.Spec.Containers[0].Mounts[0].Path = "/" },
		"a path that is not clean":   func(a *nodev1.Assignment) { a.Spec.Containers[0].Mounts[0].Path = "/data/../etc" },
	} {
		as := stateful()
		change(as)
		if err := checkAssignment(as); err == nil {
			t.Errorf("%s is accepted", what)
		}
	}
	// A link in the place of a volume is not followed.
	a := &Agent{cfg: Config{DataDir: t.TempDir()}}
	outside := t.TempDir()
	if err := os.Mkdir(a.path("volumes"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, a.path("volumes", "shop.db-0.data")); err != nil {
		t.Fatal(err)
	}
	if err := a.makeVolume("shop.db-0.data"); err == nil {
		t.Error("a link is taken for a volume")
	}
}

func TestDevices(t *testing.T) {
	inWorld(t, func(w *world) {
		w.tune = func(c *Config) {
			c.Facts.Devices = []*nodev1.Device{{Kind: "gpu", Model: "A100", Index: 0, Path: "/dev/gpu0"}, {Kind: "gpu", Model: "A100", Index: 1, Path: "/dev/gpu1"}, {Kind: "fpga", Index: 0}}
		}
		var spec enginetest.Proc
		w.engine.Script("app", func(p *enginetest.Proc) int { spec = *p; return enginetest.Verbs(p) })
		w.agent()
		as := assignment("w-aaaaa")
		as.Devices = []*nodev1.DeviceShare{{Kind: "gpu", Index: 1, Milli: 500}, {Kind: "fpga", Index: 0, Milli: 1000}}
		w.assign(as)
		w.ready("w-aaaaa")
		if got := spec.Spec.Devices; !slices.Equal(got, []string{"/dev/gpu1"}) {
			t.Errorf("device files %v", got)
		}
		for _, want := range []string{"PORTOLAN_DEVICES_GPU=1", "PORTOLAN_DEVICES_GPU_MILLI=500", "PORTOLAN_DEVICES_FPGA=0"} {
			if !slices.Contains(spec.Spec.Env, want) {
				t.Errorf("%s is not in %v", want, spec.Spec.Env)
			}
		}
	})
}

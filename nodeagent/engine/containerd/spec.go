package containerd

import (
	"context"
	"encoding/json"
	"os"
	"slices"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// groupAnnotation makes containers of one replica share a shim (runc.v2 shim).
const groupAnnotation = "io.containerd.runc.v2.group"

const (
	maxOpenFiles  = 65536
	cpuPeriodUsec = 100_000
)

func (e *Engine) runcOptions() *options.Options {
	return &options.Options{Root: e.cfg.RuncRoot, BinaryName: e.cfg.Runc}
}

func imageConfig(ctx context.Context, img client.Image) (ocispec.ImageConfig, error) {
	desc, err := img.Config(ctx)
	if err != nil {
		return ocispec.ImageConfig{}, err
	}
	b, err := content.ReadBlob(ctx, img.ContentStore(), desc)
	if err != nil {
		return ocispec.ImageConfig{}, err
	}
	var out ocispec.Image
	if err := json.Unmarshal(b, &out); err != nil {
		return ocispec.ImageConfig{}, api.E(api.Invalid, "read image configuration", "%w", err)
	}
	return out.Config, nil
}

// specOpts is the hardened default, then the spec. Order matters: the seccomp
// profile reads the capabilities.
func (e *Engine) specOpts(s engine.Spec, img ocispec.ImageConfig) []oci.SpecOpts {
	args := commandOf(s, img)
	cwd := firstOf(s.WorkingDir, img.WorkingDir, "/")
	opts := []oci.SpecOpts{
		oci.WithDefaultSpec(),
		oci.WithDefaultPathEnv,
		oci.WithEnv(img.Env),
		oci.WithEnv(s.Env),
		oci.WithProcessArgs(args...),
		oci.WithProcessCwd(cwd),
		oci.WithHostname(s.Hostname),
		oci.WithRootFSReadonly(),
		oci.WithNoNewPrivileges,
		oci.WithNamespacedCgroup(),
		oci.WithDefaultUnixDevices,
		oci.WithCgroup(e.cgroup(s.CgroupParent, s.ID)),
		oci.WithRlimit(&specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Hard: openFiles(), Soft: openFiles()}),
		oci.WithRlimit(&specs.POSIXRlimit{Type: "RLIMIT_CORE"}),
		e.withUser(s, img.User),
		withCapabilities(s.AddCapabilities),
		withLimits(s),
		withMounts(s),
		requireArgs,
		seccomp.WithDefaultProfile(),
	}
	if s.NetNS != "" {
		opts = append(opts, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: s.NetNS}))
	}
	if s.Group != "" {
		opts = append(opts, oci.WithAnnotations(map[string]string{groupAnnotation: s.Group}))
	}
	return opts
}

// openFiles is the limit of open files: no more than this machine lets us give.
func openFiles() uint64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return min(l.Max, maxOpenFiles)
}

// commandOf follows the field's rule: a command replaces entrypoint and cmd,
// args alone replace cmd.
func commandOf(s engine.Spec, img ocispec.ImageConfig) []string {
	switch {
	case len(s.Command) > 0:
		return slices.Concat(s.Command, s.Args)
	case len(s.Args) > 0:
		return slices.Concat(img.Entrypoint, s.Args)
	}
	return slices.Concat(img.Entrypoint, img.Cmd)
}

func firstOf(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}

func requireArgs(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	if len(s.Process.Args) == 0 {
		return api.E(api.Invalid, "make container spec", "neither spec nor image names a command")
	}
	return nil
}

func (e *Engine) withUser(s engine.Spec, imageUser string) oci.SpecOpts {
	return func(ctx context.Context, c oci.Client, ct *containers.Container, spec *oci.Spec) error {
		switch {
		case s.UID != nil:
			gid := *s.UID
			if s.GID != nil {
				gid = *s.GID
			}
			spec.Process.User = specs.User{UID: *s.UID, GID: gid}
		case imageUser != "":
			if err := oci.WithUser(imageUser)(ctx, c, ct, spec); err != nil {
				return api.E(api.Invalid, "resolve user of image", "%w", err)
			}
		}
		if u := spec.Process.User; slices.Contains(e.cfg.ReservedUIDs, u.UID) || slices.Contains(e.cfg.ReservedUIDs, u.GID) {
			return api.E(api.Invalid, "make container spec", "user %d:%d is reserved", u.UID, u.GID)
		}
		return nil
	}
}

// withCapabilities gives exactly these; ambient too, so that they also reach a
// process that is not root.
func withCapabilities(add []string) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: add, Effective: add, Permitted: add, Inheritable: add, Ambient: add}
		return nil
	}
}

// withLimits sets cgroup limits in runc's terms, which it translates for version
// 2: there weight follows shares, and swap is the difference to memory.
func withLimits(s engine.Spec) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
		r := spec.Linux.Resources
		if s.MemoryBytes > 0 {
			limit := s.MemoryBytes
			r.Memory = &specs.LinuxMemory{Limit: &limit}
			if swapAccounted() {
				r.Memory.Swap = &limit
			}
		}
		r.CPU = &specs.LinuxCPU{}
		if s.CPUMilli > 0 {
			period, quota := uint64(cpuPeriodUsec), max(s.CPUMilli*cpuPeriodUsec/1000, 1000)
			r.CPU.Period, r.CPU.Quota = &period, &quota
		}
		shares := uint64(max(s.CPURequest*1024/1000, 2))
		r.CPU.Shares = &shares
		if s.Pids > 0 {
			n := s.Pids
			r.Pids = &specs.LinuxPids{Limit: &n}
		}
		return nil
	}
}

// swapAccounted: version 2 always; version 1 when the kernel was told to.
func swapAccounted() bool {
	if unified() {
		return true
	}
	_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	return err == nil
}

func withMounts(s engine.Spec) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
		for _, target := range s.Tmpfs {
			spec.Mounts = append(spec.Mounts, specs.Mount{
				Destination: target, Type: "tmpfs", Source: "tmpfs",
				// runc gives it the mode of the image's directory where there is one: so it
				// belongs to the user, who can write then in any case.
				Options: []string{
					"nosuid", "nodev", "mode=1777", "size=" + itoa(s.TmpfsBytes),
					"uid=" + itoa(int64(spec.Process.User.UID)), "gid=" + itoa(int64(spec.Process.User.GID)),
				},
			})
		}
		for _, m := range s.Mounts {
			options := []string{"rbind", "nosuid", "nodev", "rprivate"}
			if m.ReadOnly {
				options = append(options, "ro")
			}
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source, Options: options})
		}
		return nil
	}
}

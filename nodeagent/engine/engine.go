// Package engine is the port to what runs containers on a node. The adapter for
// containerd is the sub-package containerd; enginetest holds the conformance
// suite and a fake that passes it.
//
// Concurrency: an Engine is safe for concurrent use; calls that concern the same
// container are serialised by their caller.
package engine

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// addable are the capabilities that a container may have, on top of none.
// SETUID and SETGID are not among them: with either, a workload could take the
// proxy's reserved user, whose traffic is not captured, and so leave the mesh.
var addable = []string{"CAP_CHOWN", "CAP_NET_BIND_SERVICE"}

// CheckCapabilities refuses, as api.Invalid, what Spec.AddCapabilities may not
// name. Every engine asks it in Create, whatever was admitted above: what was
// allowed once may be running from disk.
func CheckCapabilities(names []string) error {
	for _, name := range names {
		if !slices.Contains(addable, name) {
			return api.E(api.Invalid, "check capabilities", "%q may not be added; only %s may", name, strings.Join(addable, ", "))
		}
	}
	return nil
}

// Image is a pulled and unpacked image.
type Image struct {
	// Ref is registry/repository@sha256:…
	Ref    string
	Digest string
	// User, Env, Entrypoint, Cmd and WorkingDir of its configuration.
	User            string
	Env             []string
	Entrypoint, Cmd []string
	WorkingDir      string
}

// Spec is a container to create. Everything in it is decided; the engine adds
// only its hardened defaults: no new privileges, default seccomp profile, all
// capabilities dropped but AddCapabilities, read-only root, masked paths, no
// host namespaces.
type Spec struct {
	// ID is unique on the node: <allocation>.<container>.<attempt>.
	ID    string
	Image string // Ref of a pulled image
	// Labels survive an agent crash and come back in Container.
	Labels     map[string]string
	Command    []string // replaces the image's entrypoint when set
	Args       []string // replaces the image's cmd when set
	Env        []string // KEY=value, appended to the image's
	WorkingDir string
	Hostname   string
	// UID and GID; both nil mean the image's user.
	UID, GID *uint32
	// AddCapabilities, as "CAP_NET_BIND_SERVICE"; see CheckCapabilities.
	AddCapabilities []string
	// NetNS is the path of the replica's network namespace.
	NetNS string
	// Mounts are binds from the node, e.g. resolv.conf's directory.
	Mounts []Mount
	// Tmpfs paths, each at most TmpfsBytes large.
	Tmpfs       []string
	TmpfsBytes  int64
	CPUMilli    int64 // limit, quota over 100 ms periods
	CPURequest  int64 // millicores, becomes shares or weight
	MemoryBytes int64 // limit, swap included
	Pids        int64
	// CgroupParent is the path under which the container's cgroup is made.
	CgroupParent string
	// LogPath is the file that receives stdout and stderr, appended by the shim, not
	// by the agent, so that it survives the agent. Its directory exists.
	LogPath string
	// Group shares one shim between containers of the same replica.
	Group string
}

// Mount is a bind mount.
type Mount struct {
	Source, Target string
	ReadOnly       bool
}

// State of a container.
type State int

// The states.
const (
	Created State = iota + 1
	Running
	Exited
	// Unknown: the engine has a record but cannot tell; the caller deletes it.
	Unknown
)

// Container is what the engine knows, also after a crash of the agent.
type Container struct {
	ID        string
	Labels    map[string]string
	State     State
	Pid       int
	StartedAt time.Time
	Exit      *Exit // when Exited
}

// Exit is how a container ended.
type Exit struct {
	Code int
	Time time.Time
	// OOM says that the kernel killed it for its own memory limit; MemoryBytes is
	// the last figure before (or the limit), 0 when unknown.
	OOM         bool
	MemoryBytes int64
}

// Usage is one reading of a container's cgroup.
type Usage struct {
	CPU         time.Duration // since start
	MemoryBytes int64         // working set
	MemoryLimit int64
	Pids        int64
}

// ExecSpec is a process beside a running container's own, in all its namespaces
// and limits.
type ExecSpec struct {
	ID      string // unique for the container
	Command []string
	TTY     bool
	Stdin   io.Reader // nil: none
	Stdout  io.Writer // nil: discarded
	Stderr  io.Writer
	Resize  <-chan Size
}

// Size of a terminal.
type Size struct{ Rows, Columns uint16 }

// Engine is the port. Errors: api.NotFound, api.Exists, api.Precondition,
// api.Unavailable (engine gone; retry), api.Invalid (image or spec can never
// work), else internal.
type Engine interface {
	// Pull fetches by digest and unpacks; present content is not fetched again.
	Pull(ctx context.Context, ref string) (Image, error)
	// Create makes the container and its task, not yet started.
	Create(ctx context.Context, spec Spec) error
	Start(ctx context.Context, id string) (pid int, err error)
	// Signal sends to the init process, or to all processes of the container.
	Signal(ctx context.Context, id string, sig int, all bool) error
	// Wait blocks until the container has exited, survives restarts of the engine
	// and works for containers started by an earlier agent.
	Wait(ctx context.Context, id string) (Exit, error)
	// Delete removes container, task, snapshot and cgroup; idempotent.
	Delete(ctx context.Context, id string) error
	Get(ctx context.Context, id string) (Container, error)
	// List gives everything the engine has for this node, half-made ones too.
	List(ctx context.Context) ([]Container, error)
	Usage(ctx context.Context, id string) (Usage, error)
	Exec(ctx context.Context, id string, spec ExecSpec) (exitCode int, err error)
	// Ping says whether the engine answers.
	Ping(ctx context.Context) error
}

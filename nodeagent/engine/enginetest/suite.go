package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// Kit is an engine under test.
type Kit struct {
	Engine engine.Engine
	// Image to pull: its entrypoint is a program with the suite's verbs.
	Image string
	// Reopen gives another engine on the same containers, as after a crash of the
	// agent. Crash kills the engine's daemon, not its containers, and brings it
	// back. Nil when there is no such thing.
	Reopen func() engine.Engine
	Crash  func()
	// Isolated: containers are real, so that isolation can be looked at.
	Isolated bool
}

const bound = 30 * time.Second

type suite struct {
	Kit
	dir string
	n   int
}

// Run checks an engine against the port's promises.
func Run(t *testing.T, open func(t *testing.T) Kit) {
	k := open(t)
	s := &suite{Kit: k, dir: t.TempDir()}
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"Pull", pullCase},
		{"Lifecycle", lifecycleCase},
		{"ExitCodes", exitCase},
		{"SignalsAndKill", signalCase},
		{"Errors", errorsCase},
		{"DeleteIsIdempotent", deleteCase},
		{"OutOfMemory", oomCase},
		{"LogsSurviveReopen", reopenCase},
		{"DaemonCrash", crashCase},
		{"Exec", execCase},
		{"ExecTerminal", terminalCase},
		{"Usage", usageCase},
		{"Capabilities", capabilitiesCase},
		{"Hardened", hardenedCase},
		{"MountsAndUser", mountsCase},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, s) })
	}
	left, err := s.Engine.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range left {
		t.Errorf("left behind: %s (%d)", c.ID, c.State)
	}
}

func (s *suite) ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	t.Cleanup(cancel)
	return ctx
}

// spec is a container with the verb; it is deleted when the test ends.
func (s *suite) spec(t *testing.T, args ...string) engine.Spec {
	s.n++
	id := fmt.Sprintf("suite-%d.main.1", s.n)
	spec := engine.Spec{
		ID: id, Image: s.Image, Args: args, Labels: map[string]string{"suite": t.Name()}, Hostname: "suite", Group: fmt.Sprintf("suite-%d", s.n),
		CPUMilli: 500, CPURequest: 100, MemoryBytes: 64 << 20, Pids: 64, LogPath: filepath.Join(s.dir, id+".log"),
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), bound)
		defer cancel()
		if err := s.Engine.Delete(ctx, id); err != nil {
			t.Errorf("delete %s: %v", id, err)
		}
	})
	return spec
}

func (s *suite) start(t *testing.T, spec engine.Spec) int {
	t.Helper()
	ctx := s.ctx(t)
	if _, err := s.Engine.Pull(ctx, s.Image); err != nil {
		t.Fatal(err)
	}
	if err := s.Engine.Create(ctx, spec); err != nil {
		t.Fatal(err)
	}
	pid, err := s.Engine.Start(ctx, spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (s *suite) wait(t *testing.T, id string) engine.Exit {
	t.Helper()
	x, err := s.Engine.Wait(s.ctx(t), id)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// until polls; the deadline is real or virtual time.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(bound)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-tick.C
	}
}

func pullCase(t *testing.T, s *suite) {
	ctx := s.ctx(t)
	for range 2 {
		img, err := s.Engine.Pull(ctx, s.Image)
		if err != nil {
			t.Fatal(err)
		}
		if img.Ref != s.Image || !strings.HasSuffix(s.Image, img.Digest) || len(img.Entrypoint) == 0 {
			t.Fatalf("image %+v of %s", img, s.Image)
		}
	}
	name, _, _ := strings.Cut(s.Image, "@")
	if _, err := s.Engine.Pull(ctx, name); api.KindOf(err) != api.Invalid {
		t.Errorf("pull without digest: %v, want invalid", err)
	}
	if s.Isolated {
		_, err := s.Engine.Pull(ctx, name+"@sha256:"+strings.Repeat("0", 64))
		if api.KindOf(err) != api.NotFound {
			t.Errorf("pull of an absent digest: %v, want not found", err)
		}
	}
}

func lifecycleCase(t *testing.T, s *suite) {
	ctx := s.ctx(t)
	spec := s.spec(t, "sleep")
	if _, err := s.Engine.Pull(ctx, s.Image); err != nil {
		t.Fatal(err)
	}
	if err := s.Engine.Create(ctx, spec); err != nil {
		t.Fatal(err)
	}
	c, err := s.Engine.Get(ctx, spec.ID)
	if err != nil || c.State != engine.Created || c.Labels["suite"] != t.Name() {
		t.Fatalf("after create: %+v, %v", c, err)
	}
	pid, err := s.Engine.Start(ctx, spec.ID)
	if err != nil || pid <= 0 {
		t.Fatalf("start: pid %d, %v", pid, err)
	}
	c, err = s.Engine.Get(ctx, spec.ID)
	if err != nil || c.State != engine.Running || c.Pid != pid || c.Exit != nil {
		t.Fatalf("after start: %+v, %v, want pid %d", c, err, pid)
	}
	all, err := s.Engine.List(ctx)
	if err != nil || len(all) != 1 || all[0].ID != spec.ID || all[0].Pid != pid {
		t.Fatalf("list: %+v, %v", all, err)
	}
	if s.Isolated {
		// A Go program needs a moment before it handles the signal.
		until(t, "the process reads its arguments", func() bool { return readAll(fmt.Sprintf("/proc/%d/cmdline", pid)) != "" })
	}
	if err := s.Engine.Signal(ctx, spec.ID, int(syscall.SIGTERM), false); err != nil {
		t.Fatal(err)
	}
	x := s.wait(t, spec.ID)
	if x.Code != 0 && x.Code != 2 || x.OOM || x.Time.IsZero() {
		t.Fatalf("exit %+v", x)
	}
	c, err = s.Engine.Get(ctx, spec.ID)
	if err != nil || c.State != engine.Exited || c.Exit == nil || c.Exit.Code != x.Code || !c.Exit.Time.Equal(x.Time) {
		t.Fatalf("after exit: %+v, %v", c, err)
	}
}

func exitCase(t *testing.T, s *suite) {
	for _, code := range []int{0, 1, 42} {
		spec := s.spec(t, "exit", fmt.Sprint(code))
		s.start(t, spec)
		if x := s.wait(t, spec.ID); x.Code != code || x.OOM {
			t.Errorf("exit %+v, want code %d", x, code)
		}
	}
}

func signalCase(t *testing.T, s *suite) {
	spec := s.spec(t, "stubborn")
	s.start(t, spec)
	ctx := s.ctx(t)
	if err := s.Engine.Signal(ctx, spec.ID, int(syscall.SIGKILL), true); err != nil {
		t.Fatal(err)
	}
	if x := s.wait(t, spec.ID); x.Code != 137 || x.OOM {
		t.Errorf("exit %+v, want 137 and no OOM", x)
	}
	if err := s.Engine.Signal(ctx, spec.ID, int(syscall.SIGTERM), false); err == nil {
		t.Error("a signal to an ended container succeeded")
	}
}

func errorsCase(t *testing.T, s *suite) {
	ctx := s.ctx(t)
	for name, err := range map[string]error{
		"get":    second(s.Engine.Get(ctx, "absent.main.1")),
		"start":  second(s.Engine.Start(ctx, "absent.main.1")),
		"signal": s.Engine.Signal(ctx, "absent.main.1", 15, false),
		"wait":   second(s.Engine.Wait(ctx, "absent.main.1")),
		"exec":   second(s.Engine.Exec(ctx, "absent.main.1", engine.ExecSpec{ID: "x1", Command: []string{"/work"}})),
	} {
		if api.KindOf(err) != api.NotFound {
			t.Errorf("%s of an absent container: %v, want not found", name, err)
		}
	}
	spec := s.spec(t, "sleep")
	s.start(t, spec)
	if err := s.Engine.Create(ctx, spec); api.KindOf(err) != api.Exists {
		t.Errorf("create twice: %v, want exists", err)
	}
	absent := s.spec(t)
	absent.Image = strings.Replace(s.Image, "@sha256:", "@sha256:00", 1)[:len(s.Image)]
	if err := s.Engine.Create(ctx, absent); api.KindOf(err) != api.NotFound {
		t.Errorf("create from an image that was not pulled: %v, want not found", err)
	}
	wctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := s.Engine.Wait(wctx, spec.ID); api.KindOf(err) != api.Canceled {
		t.Errorf("wait given up: %v, want canceled", err)
	}
	if err := s.Engine.Ping(ctx); err != nil {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

func deleteCase(t *testing.T, s *suite) {
	ctx := s.ctx(t)
	spec := s.spec(t, "stubborn")
	s.start(t, spec)
	for range 2 {
		if err := s.Engine.Delete(ctx, spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Engine.Get(ctx, spec.ID); api.KindOf(err) != api.NotFound {
		t.Errorf("get after delete: %v", err)
	}
	// The same ID can be made again, also after a container that never started.
	for range 2 {
		if err := s.Engine.Create(ctx, spec); err != nil {
			t.Fatal(err)
		}
		if err := s.Engine.Delete(ctx, spec.ID); err != nil {
			t.Fatal(err)
		}
	}
}

func oomCase(t *testing.T, s *suite) {
	spec := s.spec(t, "eat")
	spec.MemoryBytes = 24 << 20
	s.start(t, spec)
	x := s.wait(t, spec.ID)
	if !x.OOM || x.Code != 137 || x.MemoryBytes < 8<<20 || x.MemoryBytes > 24<<20 {
		t.Errorf("exit %+v, want OOM with 137 and a figure up to the limit", x)
	}
	c, err := s.Engine.Get(s.ctx(t), spec.ID)
	if err != nil || c.Exit == nil || !c.Exit.OOM {
		t.Errorf("get after OOM: %+v, %v", c, err)
	}
}

func ticks(path string) int { return strings.Count(readAll(path), "tick ") }

func reopenCase(t *testing.T, s *suite) {
	if s.Reopen == nil {
		t.Skip("this engine has no second client")
	}
	spec := s.spec(t, "tick")
	pid := s.start(t, spec)
	until(t, "the log begins", func() bool { return ticks(spec.LogPath) > 2 })
	other := s.Reopen()
	c, err := other.Get(s.ctx(t), spec.ID)
	if err != nil || c.State != engine.Running || c.Pid != pid {
		t.Fatalf("after reopen: %+v, %v", c, err)
	}
	had := ticks(spec.LogPath)
	until(t, "the log goes on", func() bool { return ticks(spec.LogPath) > had+2 })
	if err := other.Signal(s.ctx(t), spec.ID, int(syscall.SIGTERM), false); err != nil {
		t.Fatal(err)
	}
	if x, err := other.Wait(s.ctx(t), spec.ID); err != nil || x.Code != 0 {
		t.Errorf("wait by the other: %+v, %v", x, err)
	}
}

func crashCase(t *testing.T, s *suite) {
	if s.Crash == nil {
		t.Skip("this engine has no daemon")
	}
	spec, ends := s.spec(t, "tick"), s.spec(t, "exit", "7", "1s")
	pid := s.start(t, spec)
	s.start(t, ends)
	type result struct {
		x   engine.Exit
		err error
	}
	got := make(chan result, 1)
	go func() {
		x, err := s.Engine.Wait(s.ctx(t), ends.ID)
		got <- result{x, err}
	}()
	s.Crash()
	if r := <-got; r.err != nil || r.x.Code != 7 {
		t.Errorf("wait across the crash: %+v, %v, want code 7", r.x, r.err)
	}
	c, err := s.Engine.Get(s.ctx(t), spec.ID)
	if err != nil || c.State != engine.Running || c.Pid != pid {
		t.Errorf("after the crash: %+v, %v, want pid %d", c, err, pid)
	}
	had := ticks(spec.LogPath)
	until(t, "the log goes on", func() bool { return ticks(spec.LogPath) > had+2 })
}

func (s *suite) command(args ...string) []string { return append([]string{"/work"}, args...) }

func execCase(t *testing.T, s *suite) {
	spec := s.spec(t, "sleep")
	spec.Env = []string{"COLOUR=blue"}
	s.start(t, spec)
	ctx := s.ctx(t)
	for i, c := range []struct {
		args  []string
		stdin string
		out   string
		code  int
	}{
		{[]string{"exit", "3"}, "", "", 3},
		{[]string{"echo", "a", "b"}, "", "a b\n", 0},
		{[]string{"env", "COLOUR"}, "", "blue\n", 0},
		{[]string{"cat"}, "through\n", "through\n", 0},
	} {
		var out bytes.Buffer
		e := engine.ExecSpec{ID: fmt.Sprintf("x%d", i), Command: s.command(c.args...), Stdout: &out}
		if c.stdin != "" {
			e.Stdin = strings.NewReader(c.stdin)
		}
		code, err := s.Engine.Exec(ctx, spec.ID, e)
		if err != nil || code != c.code || out.String() != c.out {
			t.Errorf("exec %v: code %d, output %q, %v; want %d, %q", c.args, code, out.String(), err, c.code, c.out)
		}
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := s.Engine.Exec(short, spec.ID, engine.ExecSpec{ID: "late", Command: s.command("stubborn")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec given up: %v, want deadline exceeded", err)
	}
	if c, err := s.Engine.Get(ctx, spec.ID); err != nil || c.State != engine.Running {
		t.Errorf("the container did not survive its execs: %+v, %v", c, err)
	}
}

func terminalCase(t *testing.T, s *suite) {
	spec := s.spec(t, "sleep")
	s.start(t, spec)
	r, w := io.Pipe()
	var out bytes.Buffer
	resize := make(chan engine.Size, 1)
	resize <- engine.Size{Rows: 40, Columns: 120}
	go func() {
		_, _ = io.WriteString(w, "typed\n\x04")
		if !s.Isolated {
			_ = w.Close() // a fake has no terminal that knows ^D
		}
	}()
	code, err := s.Engine.Exec(s.ctx(t), spec.ID, engine.ExecSpec{ID: "tty", Command: s.command("cat"), TTY: true, Stdin: r, Stdout: &out, Resize: resize})
	if err != nil || code != 0 || !strings.Contains(out.String(), "typed") {
		t.Errorf("terminal: code %d, output %q, %v", code, out.String(), err)
	}
	_ = r.Close()
}

func usageCase(t *testing.T, s *suite) {
	spec := s.spec(t, "sleep")
	s.start(t, spec)
	until(t, "memory is in use", func() bool {
		u, err := s.Engine.Usage(s.ctx(t), spec.ID)
		return err == nil && u.MemoryBytes > 0 && u.MemoryLimit == spec.MemoryBytes && u.Pids > 0
	})
}

// capabilitiesCase: nothing is made of a spec that asks for more than an engine
// may give, and with all that it may give no process becomes another user.
func capabilitiesCase(t *testing.T, s *suite) {
	ctx := s.ctx(t)
	if _, err := s.Engine.Pull(ctx, s.Image); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"CAP_SETUID", "CAP_SETGID", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "NET_BIND_SERVICE"} {
		spec := s.spec(t, "sleep")
		spec.AddCapabilities = []string{"CAP_CHOWN", name}
		if err := s.Engine.Create(ctx, spec); api.KindOf(err) != api.Invalid {
			t.Errorf("create with %s: %v, want invalid", name, err)
		}
		if _, err := s.Engine.Get(ctx, spec.ID); api.KindOf(err) != api.NotFound {
			t.Errorf("after the refusal of %s: %v, want nothing made", name, err)
		}
	}
	spec := s.spec(t, "sleep")
	spec.AddCapabilities = []string{"CAP_CHOWN", "CAP_NET_BIND_SERVICE"}
	s.start(t, spec)
	if !s.Isolated {
		return
	}
	for _, id := range []string{"setuid", "setgid"} {
		code, err := s.Engine.Exec(ctx, spec.ID, engine.ExecSpec{ID: id, Command: s.command("try", id, "14010")})
		if err != nil || code == 0 {
			t.Errorf("%s to the proxy's user: code %d, %v; it must not work", id, code, err)
		}
	}
}

func hardenedCase(t *testing.T, s *suite) {
	if !s.Isolated {
		t.Skip("this engine has no isolation")
	}
	spec := s.spec(t, "sleep")
	spec.AddCapabilities = []string{"CAP_NET_BIND_SERVICE"}
	s.start(t, spec)
	ctx := s.ctx(t)
	var out bytes.Buffer
	if _, err := s.Engine.Exec(ctx, spec.ID, engine.ExecSpec{ID: "show", Command: s.command("show"), Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs: 1", "Seccomp: 2", "CapEff: 0000000000000400", "CapBnd: 0000000000000400", "Hostname: suite", "Interfaces: 1"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("want %q in:\n%s", want, out.String())
		}
	}
	for i, try := range [][]string{{"write", "/x"}, {"read", "/proc/kcore"}, {"read", "/proc/timer_list"}, {"write", "/proc/sys/kernel/hostname"}, {"unshare"}} {
		code, err := s.Engine.Exec(ctx, spec.ID, engine.ExecSpec{ID: fmt.Sprintf("try%d", i), Command: s.command(append([]string{"try"}, try...)...)})
		if err != nil || code == 0 {
			t.Errorf("try %v: code %d, %v; it must not work", try, code, err)
		}
	}
}

func mountsCase(t *testing.T, s *suite) {
	if !s.Isolated {
		t.Skip("this engine has no isolation")
	}
	src := t.TempDir()
	uid, gid := uint32(1234), uint32(4321)
	spec := s.spec(t, "sleep")
	spec.UID, spec.GID = &uid, &gid
	spec.Mounts = []engine.Mount{{Source: src, Target: "/bound", ReadOnly: true}}
	spec.Tmpfs, spec.TmpfsBytes = []string{"/tmp"}, 1<<20
	s.start(t, spec)
	ctx := s.ctx(t)
	var out bytes.Buffer
	if _, err := s.Engine.Exec(ctx, spec.ID, engine.ExecSpec{ID: "show", Command: s.command("show"), Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "Uid: 1234") || !strings.Contains(out.String(), "Gid: 4321") {
		t.Errorf("user:\n%s", out.String())
	}
	for i, c := range []struct {
		args []string
		code int
	}{{[]string{"try", "write", "/bound/x"}, 1}, {[]string{"try", "write", "/tmp/x"}, 0}, {[]string{"try", "read", "/tmp/x"}, 0}} {
		code, err := s.Engine.Exec(ctx, spec.ID, engine.ExecSpec{ID: fmt.Sprintf("m%d", i), Command: s.command(c.args...)})
		if err != nil || code != c.code {
			t.Errorf("%v: code %d, %v; want %d", c.args, code, err, c.code)
		}
	}
}

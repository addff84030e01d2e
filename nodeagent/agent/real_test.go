package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/engine/containerd"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest/daemon"
	"github.com/portolan-io/portolan/nodeagent/network"
)

// ownNetNS lets every container have an empty namespace of its own.
type ownNetNS struct{ network.Networker }

func (o ownNetNS) Ensure(ctx context.Context, r network.Replica) (network.Attachment, error) {
	_, err := o.Networker.Ensure(ctx, r)
	return network.Attachment{}, err
}

// real is a world whose engine is containerd.
type real struct {
	*world
	daemon *daemon.Daemon
	engine *containerd.Engine
	image  string
}

func newReal(t testing.TB) *real {
	d := daemon.Start(t)
	r := &real{world: newWorld(t, t.TempDir()), daemon: d, image: daemon.Image(t)}
	e, err := containerd.New(containerd.Config{
		Address: d.Socket, Namespace: "agent", RuncRoot: filepath.Join(d.Dir, "runc"), CgroupParent: d.Cgroup + "/replicas", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.engine = e
	r.tune = func(c *Config) {
		c.Engine, c.Network = e, ownNetNS{r.network}
	}
	t.Cleanup(func() {
		for _, kill := range r.kills {
			kill()
		}
		r.cluster.down()
		r.deleteAll()
		_ = e.Close()
	})
	return r
}

func (r *real) deleteAll() {
	ctx := context.WithoutCancel(r.t.Context())
	all, err := r.engine.List(ctx)
	if err != nil {
		r.t.Error(err)
	}
	for _, c := range all {
		if err := r.engine.Delete(ctx, c.ID); err != nil {
			r.t.Error(err)
		}
	}
}

func (r *real) assignment(id string, args ...string) *nodev1.Assignment {
	as := assignment(id, args...)
	as.Spec.Containers[0].ResolvedImage = r.image
	as.Spec.GracePeriod = durationpb.New(5 * time.Second)
	return as
}

// within polls in real time.
func (r *real) within(what string, d time.Duration, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(d)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("not within %s: %s; states %v", d, what, r.status("w-aaaaa"))
		}
		<-time.After(2 * time.Millisecond)
	}
}

// The promises that only real processes can show: same PID after the agent's
// crash and after containerd's, logs go on, a killed process is named, an OOM
// too, a stop is graceful.
func TestOnContainerd(t *testing.T) {
	r := newReal(t)
	_, kill := r.agent()
	r.assign(r.assignment("w-aaaaa", "tick"), r.assignment("oom-aaaaa", "eat"))
	r.within("ready", 20*time.Second, func() bool { return r.status("w-aaaaa").GetReady() })
	pid := r.status("w-aaaaa").GetContainers()[0].GetPid()
	r.within("OOM is named", 20*time.Second, func() bool { return r.status("oom-aaaaa").GetReason().GetCode() == "OOMKilled" })
	if c := r.status("oom-aaaaa").GetContainers()[0]; c.GetMemoryBytes() < 8<<20 || c.GetMemoryBytes() > 32<<20 {
		t.Errorf("memory at the kill: %v", c)
	}
	ticks := func() int {
		b, _ := os.ReadFile(filepath.Join(r.dir, "data/logs/w-aaaaa/main/1.log"))
		return strings.Count(string(b), "tick ")
	}
	kill()
	had := ticks()
	r.within("logs go on without an agent", 5*time.Second, func() bool { return ticks() > had+3 })
	r.daemon.Crash()
	n := r.cluster.count()
	r.agent()
	r.within("the new agent reports", 10*time.Second, func() bool { return r.cluster.count() > n })
	if s := r.status("w-aaaaa"); !s.GetReady() || s.GetContainers()[0].GetPid() != pid || s.GetContainers()[0].GetRestarts() != 0 {
		t.Errorf("after both crashed: %v, want pid %d", s, pid)
	}
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.within("the kill is seen", 5*time.Second, func() bool {
		s := r.status("w-aaaaa")
		return s.GetState() == portolanv1.ReplicaState_REPLICA_STATE_BACKOFF && s.GetContainers()[0].GetLastExitCode() == 137 && s.GetContainers()[0].GetLastExitReason() == "Error"
	})
	r.within("it is restarted", 15*time.Second, func() bool { return r.status("w-aaaaa").GetReady() })
	r.unassign("w-aaaaa")
	r.unassign("oom-aaaaa")
	r.within("both are gone", 15*time.Second, func() bool { return r.gone("w-aaaaa") && r.gone("oom-aaaaa") })
	left, err := r.engine.List(t.Context())
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// cpu is what the daemon, its shims, runc and the containers used so far, and
// what this process did.
func (r *real) cpu() (daemonCPU, self time.Duration) {
	for _, f := range []string{"/sys/fs/cgroup/cpuacct" + r.daemon.Cgroup + "/cpuacct.usage", "/sys/fs/cgroup/cpu,cpuacct" + r.daemon.Cgroup + "/cpuacct.usage"} {
		if b, err := os.ReadFile(f); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			daemonCPU = time.Duration(n)
		}
	}
	if daemonCPU == 0 {
		b, _ := os.ReadFile("/sys/fs/cgroup" + r.daemon.Cgroup + "/cpu.stat")
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "usage_usec" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				daemonCPU = time.Duration(n) * time.Microsecond
			}
		}
	}
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return daemonCPU, time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

const startsPerRound = 20

// BenchmarkT16_StartCost gives CPU-milliseconds per started replica: "bare" is
// this adapter driving containerd, "agent" the whole agent above it (session,
// state machine, identity, reports; network and proxy are fakes). The daemon's
// part counts containerd, shims, runc and the containers' own first steps, from
// their cgroup; the process's part counts the test's own server too, so it
// flatters nobody.
func BenchmarkT16_StartCost(b *testing.B) {
	b.Run("bare", func(b *testing.B) {
		r := newReal(b)
		ctx := b.Context()
		if _, err := r.engine.Pull(ctx, r.image); err != nil {
			b.Fatal(err)
		}
		r.measure(b, func(round int) {
			for i := range startsPerRound {
				id := fmt.Sprintf("bare-%d-%d.main.1", round, i)
				spec := engine.Spec{ID: id, Image: r.image, Args: []string{"sleep"}, CPUMilli: 100, MemoryBytes: 32 << 20, Pids: 64, Group: id, LogPath: filepath.Join(r.dir, id+".log")}
				if err := r.engine.Create(ctx, spec); err != nil {
					b.Fatal(err)
				}
				if _, err := r.engine.Start(ctx, id); err != nil {
					b.Fatal(err)
				}
			}
		}, func(int) { r.deleteAll() })
	})
	b.Run("agent", func(b *testing.B) {
		r := newReal(b)
		r.agent()
		warm := r.assignment("warm-aaaaa", "sleep")
		r.assign(warm)
		r.within("the first", 20*time.Second, func() bool { return r.status("warm-aaaaa").GetReady() })
		id := func(round, i int) string { return fmt.Sprintf("a-%d-%d", round, i) }
		r.measure(b, func(round int) {
			var all []*nodev1.Assignment
			for i := range startsPerRound {
				all = append(all, r.assignment(id(round, i), "sleep"))
			}
			r.assign(all...)
			for i := range startsPerRound {
				r.within("ready", time.Minute, func() bool { return r.status(id(round, i)).GetReady() })
			}
		}, func(round int) {
			for i := range startsPerRound {
				delete(r.cluster.set, id(round, i))
			}
			r.publish()
			for i := range startsPerRound {
				r.within("gone", time.Minute, func() bool { return r.gone(id(round, i)) })
			}
		})
	})
}

func (r *real) measure(b *testing.B, start, stop func(round int)) {
	var daemonCPU, self, wall time.Duration
	rounds := 0
	for b.Loop() {
		d0, s0 := r.cpu()
		began := time.Now()
		start(rounds)
		wall += time.Since(began)
		d1, s1 := r.cpu()
		daemonCPU, self = daemonCPU+d1-d0, self+s1-s0
		b.StopTimer()
		stop(rounds)
		b.StartTimer()
		rounds++
	}
	per := func(d time.Duration) float64 {
		return float64(d.Microseconds()) / 1000 / float64(rounds*startsPerRound)
	}
	b.ReportMetric(per(daemonCPU), "daemon-cpu-ms/start")
	b.ReportMetric(per(self), "process-cpu-ms/start")
	b.ReportMetric(per(wall), "wall-ms/start")
}

package live

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// pids of all running containers of the shop, by replica.
func pids(t *testing.T) map[string]int32 {
	t.Helper()
	out := map[string]int32{}
	for _, r := range replicas(t, "-") {
		for _, c := range r.GetContainers() {
			if c.GetPid() > 0 {
				out[r.GetName()+"/"+c.GetName()] = c.GetPid()
			}
		}
	}
	return out
}

// unchanged says which containers of before have another pid now.
func unchanged(t *testing.T, before map[string]int32, except ...string) {
	t.Helper()
	now := pids(t)
	for name, pid := range before {
		skip := false
		for _, e := range except {
			skip = skip || strings.Contains(name, e)
		}
		if !skip && now[name] != pid {
			t.Errorf("%s had pid %d, has %d: a healthy container was restarted", name, pid, now[name])
		}
	}
}

func replica(t *testing.T, name string) *portolanv1.Replica {
	t.Helper()
	rs, err := listReplicas(always(t), strings.Split(name, "/")[3])
	if err != nil {
		return nil
	}
	for _, r := range rs {
		if r.GetName() == name {
			return r
		}
	}
	return nil
}

// hasEvents waits until a replica's events hold all of the types.
func hasEvents(t *testing.T, object string, types ...string) {
	t.Helper()
	eventually(t, 20*time.Second, "events of "+last(object), func() error {
		r, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListEvents(always(t), &portolanv1.ListEventsRequest{Parent: object})
		if err != nil {
			return err
		}
		have := map[string]bool{}
		for _, e := range r.GetEvents() {
			have[e.GetType()] = true
		}
		for _, want := range types {
			if !have[want] {
				return fmt.Errorf("no %s among %v", want, have)
			}
		}
		return nil
	})
}

// 6. What dies is restarted, with the right backoff and typed events that describe
// shows.
func Test06SelfHealing(t *testing.T) {
	settle(t)
	t.Run("killed process", func(t *testing.T) {
		r := ready(replicas(t, "payments"))[0]
		pid := r.GetContainers()[0].GetPid()
		if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		took := eventually(t, 30*time.Second, "restart", func() error {
			n := replica(t, r.GetName())
			if n == nil || !n.GetReady() || n.GetContainers()[0].GetPid() == pid || n.GetContainers()[0].GetRestarts() == 0 {
				return fmt.Errorf("%v", n)
			}
			return nil
		})
		t.Logf("kill -9 → ready again %s (first backoff is 10s)", took.Round(time.Millisecond))
		if took < 9*time.Second {
			t.Errorf("restarted after %s: backoff begins with 10s", took)
		}
		if out := cli(t, "describe", "replica", last(r.GetName()), "-t", "shop"); !strings.Contains(out, "code 137") {
			t.Errorf("describe does not show the exit:\n%s", out)
		}
	})
	t.Run("liveness", func(t *testing.T) {
		r := ready(in(replicas(t, "catalog"), "eu-west"))[0]
		inReplica(t, r, "POST", "/fail/liveness")
		eventually(t, 40*time.Second, "restart by failing liveness", func() error {
			n := replica(t, r.GetName())
			if n == nil || !n.GetReady() || n.GetContainers()[0].GetRestarts() == 0 {
				return fmt.Errorf("%v", n)
			}
			return nil
		})
		hasEvents(t, r.GetName(), "LivenessFailed")
	})
	t.Run("out of memory", func(t *testing.T) {
		r := ready(in(replicas(t, "catalog"), "eu-west"))[1]
		inReplica(t, r, "POST", "/eat")
		eventually(t, 40*time.Second, "restart after OOM", func() error {
			n := replica(t, r.GetName())
			if n == nil || n.GetContainers()[0].GetLastExitReason() != "OOMKilled" || !n.GetReady() {
				return fmt.Errorf("%v", n)
			}
			return nil
		})
		hasEvents(t, r.GetName(), "OOMKilled")
		if out := cli(t, "describe", "replica", last(r.GetName()), "-t", "shop"); !strings.Contains(out, "OOMKilled") {
			t.Errorf("describe does not show the OOM:\n%s", out)
		}
	})
	t.Run("crash loop", crashLoop)
}

// inReplica sends a request from inside a replica's namespace, over lo, as a
// probe does.
func inReplica(t *testing.T, r *portolanv1.Replica, method, path string) string {
	t.Helper()
	pid := strconv.Itoa(int(r.GetContainers()[0].GetPid()))
	script := fmt.Sprintf(`exec 3<>/dev/tcp/127.0.0.1/8080 && printf '%s %s HTTP/1.0\r\n\r\n' >&3 && timeout 3 cat <&3`, method, path)
	out, err := exec.CommandContext(always(t), "nsenter", "-n", "-t", pid, "--", "bash", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s in %s: %v %s", method, path, last(r.GetName()), err, out)
	}
	return string(out)
}

func crashLoop(t *testing.T) {
	const crasher = `
kind: Workload
tenant: shop
name: crasher
spec:
  containers:
  - image: registry.portolan.internal:7500/shop/web:v1
    command: [/shop, nothing]
    requests: {cpu: 50m}
    limits: {cpu: 100m, memory: 32Mi}
  placement: {allowed_regions: [eu-west]}
`
	apply(t, crasher)
	t.Cleanup(func() { cli(t, "delete", "workload", "crasher", "-t", "shop") })
	var name string
	eventually(t, 60*time.Second, "second restart", func() error {
		rs, err := listReplicas(always(t), "crasher")
		if err != nil || len(rs) == 0 || len(rs[0].GetContainers()) == 0 {
			return fmt.Errorf("%v %v", rs, err)
		}
		name = rs[0].GetName()
		if n := rs[0].GetContainers()[0].GetRestarts(); n < 2 {
			return fmt.Errorf("%d restarts", n)
		}
		return nil
	})
	r := replica(t, name)
	var next time.Duration
	eventually(t, 20*time.Second, "backoff state", func() error {
		if r = replica(t, name); r == nil || r.GetState() != portolanv1.ReplicaState_REPLICA_STATE_BACKOFF {
			return fmt.Errorf("%v", r)
		}
		c := r.GetContainers()[0]
		next = c.GetNextStartTime().AsTime().Sub(c.GetLastExitTime().AsTime())
		return nil
	})
	t.Logf("after %d restarts the next start is %s after the exit", r.GetContainers()[0].GetRestarts(), next.Round(time.Second))
	if want := 10 * time.Second << r.GetContainers()[0].GetRestarts(); next < want-time.Second || next > want+time.Second {
		t.Errorf("backoff %s, want %s", next, want)
	}
	if out := cli(t, "describe", "replica", last(name), "-t", "shop"); !strings.Contains(out, "backoff") {
		t.Errorf("describe does not show the backoff:\n%s", out)
	}
}

// 9. Both federation replicas and the database die: nothing fails, a node's loss
// heals. Then a cluster's control plane dies: its nodes restart a container and an
// Envoy from disk. All back: converged, no healthy container was restarted.
func Test09StaticStability(t *testing.T) {
	settle(t)
	before := pids(t)
	payments := ready(in(replicas(t, "payments"), "us-east"))[0]
	l := startLoad(t, ingressOf["us-east"][0], "/api/items", 50)
	all := []string{"federation-1", "federation-2", "database"}
	for _, p := range all {
		local(t, "kill", "--hold", p)
	}
	t.Cleanup(func() {
		local(t, "heal", "eu-west-2")
		local(t, append([]string{"start"}, append(all, "us-east")...)...)
	})
	eventually(t, 30*time.Second, "requests without the federation", func() error {
		if n, _ := l.sample(); n < 300 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	if n, failed := l.sample(); failed > 0 {
		t.Errorf("federation dead: %d of %d requests failed: %s", failed, n, l.first)
	}
	moved := nodeLossHeals(t)
	t.Logf("federation dead, eu-west-2 cut: its replicas elsewhere after %s", moved.Round(time.Millisecond))
	clusterDies(t, l, payments)
	total, failed := l.Stop()
	t.Logf("%d requests, %d failed", total, failed)
	if failed > 0 {
		t.Errorf("%d requests failed: %s at %s", failed, l.first, l.firstAt)
	}
	local(t, "heal", "eu-west-2")
	local(t, append([]string{"start", "database"}, all[:2]...)...)
	eventually(t, 60*time.Second, "the federation answers", func() error {
		_, _, err := run(t, "", "get", "clusters")
		return err
	})
	settle(t)
	// Replicas of the node that was cut off may have moved; what still exists is the
	// same process, but for the victim.
	for name, pid := range pids(t) {
		if old, ok := before[name]; ok && old != pid && !strings.HasPrefix(name, payments.GetName()+"/") {
			t.Errorf("%s had pid %d, has %d: a healthy container was restarted", name, old, pid)
		}
	}
}

// nodeLossHeals asks the cluster itself through the node's own containers: the
// federation is dead and cannot be asked.
func nodeLossHeals(t *testing.T) time.Duration {
	local(t, "cut", "eu-west-2")
	hc := hop(ingressOf["eu-west"][0], false)
	began := time.Now()
	good := 0
	eventually(t, 60*time.Second, "a row of good answers after the node's loss", func() error {
		a, err := call(always(t), hc, http.MethodGet, "/api/items")
		if err != nil || a.code != http.StatusOK {
			good = 0
			return fmt.Errorf("%v %d", err, a.code)
		}
		if good++; good < 100 {
			return errors.New("not yet a row")
		}
		return nil
	})
	return time.Since(began)
}

func clusterDies(t *testing.T, l *load, payments *portolanv1.Replica) {
	local(t, "kill", "--hold", "us-east")
	_, failed0 := l.sample()
	// A container and an Envoy of a workload that the load does not need.
	victim := int(payments.GetContainers()[0].GetPid())
	if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	local(t, "kill", payments.GetNode()+"/envoy/"+last(payments.GetName()))
	took := eventually(t, 20*time.Second, "the node restarts the Envoy without its cluster", func() error {
		return envoyServes(t, payments)
	})
	t.Logf("cluster dead: killed Envoy serves again after %s", took.Round(time.Millisecond))
	took = eventually(t, 40*time.Second, "the node restarts the container without its cluster", func() error {
		if p := processIn(t, "us-east", "/shop payments"); p == 0 || p == victim {
			return errors.New("not yet")
		}
		return nil
	})
	t.Logf("cluster dead: killed container runs again after %s", took.Round(time.Millisecond))
	if _, failed := l.sample(); failed > failed0 {
		t.Errorf("cluster dead: %d requests failed: %s", failed-failed0, l.first)
	}
	local(t, "start", "us-east")
}

// envoyServes asks a proxy whether it has its listeners.
func envoyServes(t *testing.T, r *portolanv1.Replica) error {
	hc := adminClient(t, r.GetNode(), last(r.GetName()))
	resp, err := hc.Get("http://envoy/listeners")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), "inbound::") {
		return fmt.Errorf("listeners: %q", b)
	}
	return nil
}

// processIn finds a process by its command line in the cgroups of a cluster's
// nodes; the newest when there are several, 0 when there is none.
func processIn(t *testing.T, cluster, command string) int {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, p := range procs {
		// A process that ends meanwhile reads as empty.
		cmd, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cg, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		if pid, err := strconv.Atoi(filepath.Base(p)); err == nil &&
			strings.HasPrefix(strings.ReplaceAll(string(cmd), "\x00", " "), command) && strings.Contains(string(cg), "/"+cluster+"-") {
			found = max(found, pid)
		}
	}
	return found
}

// 10. An agent, a containerd and a warden die under load: same processes after,
// logs go on; agent and containerd cost no request.
func Test10AgentCrash(t *testing.T) {
	settle(t)
	for _, c := range []struct {
		part    string
		allowed int
	}{{"agent", 0}, {"containerd", 0}, {"warden", 64}} {
		t.Run(c.part, func(t *testing.T) {
			before := pids(t)
			l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 100)
			eventually(t, 20*time.Second, "load", func() error {
				if n, _ := l.sample(); n < 100 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
			old := processes(t)["eu-west-1/"+c.part].Pid
			local(t, "kill", "eu-west-1/"+c.part)
			eventually(t, 20*time.Second, c.part+" is back", func() error {
				s := processes(t)["eu-west-1/"+c.part]
				if s.Pid == old || s.State != "running" || s.Health != "ok" {
					return fmt.Errorf("%+v", s)
				}
				return nil
			})
			n0, _ := l.sample()
			eventually(t, 20*time.Second, "load after", func() error {
				if n, _ := l.sample(); n < n0+300 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
			total, failed := l.Stop()
			t.Logf("%s killed: %d requests, %d failed (%s)", c.part, total, failed, l.first)
			if failed > c.allowed {
				t.Errorf("%d requests failed, at most %d may: %s", failed, c.allowed, l.first)
			}
			settle(t)
			unchanged(t, before)
			web := ready(in(replicas(t, "web"), "eu-west"))[0]
			if out := cli(t, "logs", last(web.GetName()), "-t", "shop"); !strings.Contains(out, "serving") {
				t.Errorf("logs of %s:\n%s", web.GetName(), out)
			}
		})
	}
}

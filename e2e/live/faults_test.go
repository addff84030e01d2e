package live

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// pids of all running containers of the shop, by replica.
func pids(t *testing.T) map[string]int32 {
	t.Helper()
	out := map[string]int32{}
	for _, r := range replicas(t, "-") {
		if strings.Contains(r.GetName(), "/workloads/restock/") {
			continue // a job comes to its end by itself
		}
		for _, c := range r.GetContainers() {
			if c.GetPid() > 0 {
				out[r.GetName()+"/"+c.GetName()] = c.GetPid()
			}
		}
	}
	return out
}

// unchanged says which containers of before have another pid now, or are gone;
// but for those under a prefix in except.
func unchanged(t *testing.T, before map[string]int32, except ...string) {
	t.Helper()
	now := pids(t)
	for name, pid := range before {
		skip := false
		for _, e := range except {
			skip = skip || strings.HasPrefix(name, e)
		}
		if !skip && now[name] != pid {
			t.Errorf("%s had pid %d, has %d: a healthy container was restarted or replaced", name, pid, now[name])
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
		hasEvents(t, r.GetName(), "Error", "Started")
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
	occupy(t, "eu-west-2")
	before := pids(t)
	shop := replicas(t, "-")
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
	nodeLossHeals(t, shop)
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
	// What was not on the node that was cut off is the same process, but for the
	// victim.
	lost := []string{payments.GetName() + "/"}
	for _, r := range shop {
		if r.GetNode() == "eu-west-2" {
			lost = append(lost, r.GetName()+"/")
		}
	}
	unchanged(t, before, lost...)
}

// nodeLossHeals cuts eu-west-2 and asks eu-west and eu-west-1 themselves, through
// their local sockets: the federation is dead and cannot be asked. Every replica
// of the lost node gets a ready successor on the other, and callers in the region
// fail at most until the loss is noticed.
func nodeLossHeals(t *testing.T, shop []*portolanv1.Replica) {
	t.Helper()
	want := map[string]int{}
	for _, r := range shop {
		if w := workloadOf(r); r.GetCluster() == "eu-west" && w != "restock" {
			want[w]++
		}
	}
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 50)
	eventually(t, 10*time.Second, "load in eu-west", func() error {
		if n, _ := l.sample(); n < 50 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	began := time.Now()
	local(t, "cut", "eu-west-2")
	admin := linkv1.NewClusterAdminServiceClient(socketConn(t, runDir(t, "eu-west.sock")))
	eventually(t, 20*time.Second, "the loss is noticed", func() error {
		r, err := admin.ListNodes(always(t), &linkv1.ListNodesRequest{})
		if err != nil {
			return err
		}
		for _, n := range r.GetNodes() {
			if last(n.GetName()) == "eu-west-2" && n.GetReady() {
				return errors.New("the node still counts as ready")
			}
		}
		return nil
	})
	noticed := time.Now()
	node := portolanv1.NewRuntimeServiceClient(socketConn(t, runDir(t, "eu-west-1", "agent.sock")))
	eventually(t, 60*time.Second, "the lost node's replicas are ready on the other", func() error {
		r, err := node.ListReplicas(always(t), &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/-"})
		if err != nil {
			return err
		}
		have := map[string]int{}
		for _, p := range ready(r.GetReplicas()) {
			have[workloadOf(p)]++
		}
		for w, n := range want {
			if have[w] < n {
				return fmt.Errorf("%s: %d of %d ready on eu-west-1", w, have[w], n)
			}
		}
		return nil
	})
	moved := time.Now()
	n0, _ := l.sample()
	eventually(t, 20*time.Second, "requests after the move", func() error {
		if n, _ := l.sample(); n < n0+200 {
			return fmt.Errorf("%d", n-n0)
		}
		return nil
	})
	total, failed := l.Stop()
	t.Logf("federation dead, eu-west-2 cut: noticed after %s, its %d replicas ready on eu-west-1 after %s; eu-west: %d requests, %d failed%s",
		noticed.Sub(began).Round(time.Millisecond), len(onNode(shop, "eu-west-2")), moved.Sub(began).Round(time.Millisecond), total, failed, l.lastFailure(began))
	if l.failedSince(noticed) {
		t.Errorf("a request failed that began after the loss was noticed: %s", l.first)
	}
}

func workloadOf(r *portolanv1.Replica) string { return strings.Split(r.GetName(), "/")[3] }

func onNode(rs []*portolanv1.Replica, node string) []*portolanv1.Replica {
	var out []*portolanv1.Replica
	for _, r := range rs {
		if r.GetNode() == node {
			out = append(out, r)
		}
	}
	return out
}

// socketConn is a connection to a part's local socket.
func socketConn(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
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
			all := onNode(ready(replicas(t, "catalog")), "eu-west-1")
			if len(all) == 0 {
				t.Fatal("no replica of catalog on eu-west-1")
			}
			subject := all[0]
			follower := follow(t, subject)
			logsGoOn(t, follower, subject, "before-"+c.part)
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
			logsGoOn(t, follower, subject, "after-"+c.part)
			if n := follower.opened.Load(); c.part != "agent" && n != 1 {
				t.Errorf("logs -f was opened %d times: only the agent's own death may end it", n)
			}
		})
	}
}

// followed is an open `logs -f`.
type followed struct {
	opened atomic.Int32 // how often

	mu  sync.Mutex
	out strings.Builder
}

func (f *followed) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.Write(b)
}

func (f *followed) has(s string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Contains(f.out.String(), s)
}

// follow opens `logs -f` of a replica. An agent's death ends it, as it does for a
// person, who runs it again: so does this, until the test ends.
func follow(t *testing.T, r *portolanv1.Replica) *followed {
	t.Helper()
	f := &followed{}
	ctx, cancel := context.WithCancel(always(t))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			cmd := exec.CommandContext(ctx, fleet.cli, "--config", fleet.config, "logs", "-f", last(r.GetName()), "-t", "shop")
			cmd.Stdout = f
			f.opened.Add(1)
			if err := cmd.Run(); err != nil && ctx.Err() == nil {
				<-time.After(100 * time.Millisecond)
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return f
}

// logsGoOn makes the replica write a line that nobody wrote before, and finds it
// in its log and in the one that is followed.
func logsGoOn(t *testing.T, f *followed, r *portolanv1.Replica, mark string) {
	t.Helper()
	mark = fmt.Sprintf("%s-%d", mark, time.Now().UnixNano())
	inReplica(t, r, "POST", "/log/"+mark)
	eventually(t, 10*time.Second, "the line "+mark+" in logs and logs -f of "+last(r.GetName()), func() error {
		out, errOut, err := run(t, "", "logs", last(r.GetName()), "-t", "shop")
		if err != nil || !strings.Contains(out, mark) {
			return fmt.Errorf("logs lacks it (%v %s)", err, errOut)
		}
		if !f.has(mark) {
			return errors.New("logs -f lacks it")
		}
		return nil
	})
}

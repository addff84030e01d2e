package agent

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity/source"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
)

func TestStartToReady(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.cluster.peers = []*nodev1.NodePeer{{Node: "n2", Address: "10.0.0.2", ReplicaCidr: "10.1.2.0/24"}}
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		s := w.status("w-aaaaa")
		if s.GetState() != portolanv1.ReplicaState_REPLICA_STATE_RUNNING || s.GetEpoch() != 1 || len(s.GetContainers()) != 1 || s.GetContainers()[0].GetPid() == 0 {
			t.Errorf("status %v", s)
		}
		tl := s.GetTimeline()
		for _, ts := range []interface{ AsTime() time.Time }{tl.GetAtNode(), tl.GetPulled(), tl.GetNetworkReady(), tl.GetStarted(), tl.GetReady()} {
			if ts.AsTime().Year() < 2000 {
				t.Errorf("timeline has a gap: %v", tl)
			}
		}
		want := []string{"proxy start w-aaaaa sidecar", "start w-aaaaa.main.1"}
		if got := w.journal.take(); !slices.Equal(got, want) {
			t.Errorf("journal %q, want %q", got, want)
		}
		for _, f := range []string{"run/identity/w-aaaaa/key.pem", "run/identity/w-aaaaa/chain.pem", "data/agent/chain.pem", "data/agent/tasks/w-aaaaa.json"} {
			info, err := os.Stat(filepath.Join(w.dir, f))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", f, info, err)
			}
		}
		for _, d := range []string{"run/identity", "run/workload"} {
			info, err := os.Stat(filepath.Join(w.dir, d))
			if err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("%s: %v, %v; others may reach keys", d, info, err)
			}
		}
		w.until("routes to the peer", time.Second, func() bool { return len(w.network.RoutesNow()) == 1 })
		if w.cluster.joins != 1 || !slices.Equal(w.cluster.signed, []string{"w-aaaaa"}) {
			t.Errorf("joins %d, signed %v", w.cluster.joins, w.cluster.signed)
		}
	})
}

func TestReportsAreDeltasWithKeepalive(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		c := w.cluster
		c.mu.Lock()
		n, session := len(c.reports), c.reports[0].GetSession()
		for i, r := range c.reports {
			if r.GetSequence() != int64(i+1) || r.GetFull() != (i == 0) || r.GetSession() != session {
				t.Errorf("report %d: sequence %d, full %v", i, r.GetSequence(), r.GetFull())
			}
		}
		c.mu.Unlock()
		w.until("keepalives", 4*time.Second, func() bool { return c.count() >= n+3 })
		if r := c.last(); len(r.GetAllocations()) != 0 || len(r.GetEvents()) != 0 {
			t.Errorf("a keepalive says something: %v", r)
		}
		c.mu.Lock()
		c.resync = true
		c.mu.Unlock()
		w.until("a full report after a gap", 4*time.Second, func() bool {
			r := c.last()
			return r.GetFull() && len(r.GetAllocations()) == 1 && r.GetFacts() != nil
		})
	})
}

func TestCrashLoop(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.assign(assignment("w-aaaaa", "exit", "3"))
		var waits []time.Duration
		last := time.Now()
		for n := 1; n <= 6; n++ {
			w.until("the next instance", 6*time.Minute, func() bool {
				return w.did("start w-aaaaa.main." + string(rune('0'+n)))
			})
			waits = append(waits, time.Since(last).Round(time.Second))
			last = time.Now()
		}
		want := []time.Duration{10, 20, 40, 80, 160}
		for i, d := range want {
			if waits[i+1] != d*time.Second {
				t.Errorf("restarts after %v, want %v s", waits[1:], want)
				break
			}
		}
		w.until("the reason is CrashLoopBackOff", time.Second, func() bool {
			s := w.status("w-aaaaa")
			return s.GetContainers()[0].GetRestarts() == 5 && s.GetReason().GetCode() == "CrashLoopBackOff" && s.GetState() == portolanv1.ReplicaState_REPLICA_STATE_BACKOFF && !s.GetReady()
		})
		if c := w.status("w-aaaaa").GetContainers()[0]; c.GetRestarts() != 5 || c.GetLastExitCode() != 3 || c.GetLastExitReason() != "Error" || c.GetNextStartTime() == nil {
			t.Errorf("container %v", c)
		}
	})
}

func TestOutOfMemory(t *testing.T) {
	inWorld(t, func(w *world) {
		w.engine.Script("app", func(p *enginetest.Proc) int {
			p.SetMemory(20 << 20)
			<-time.After(12 * time.Second)
			return p.OOM(0)
		})
		w.agent()
		w.assign(assignment("w-aaaaa"))
		w.until("OOM is told", 30*time.Second, func() bool { return w.status("w-aaaaa").GetReason().GetCode() == "OOMKilled" })
		c := w.status("w-aaaaa").GetContainers()[0]
		if c.GetLastExitReason() != "OOMKilled" || c.GetMemoryBytes() != 20<<20 || c.GetLastExitCode() != 137 {
			t.Errorf("container %v, want the last sample of 20 MiB", c)
		}
		if w.seen("OOMKilled") != 1 {
			t.Errorf("events %v", w.cluster.events)
		}
	})
}

// web is a program with an HTTP port that answers by status.
func web(w *world, status *atomic.Int32) {
	w.engine.Script("app", func(p *enginetest.Proc) int {
		l := p.Listen(8080)
		srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(int(status.Load())) })}
		go func() { _ = srv.Serve(l) }()
		defer srv.Close()
		select {
		case <-p.Signals:
			return 0
		case <-p.Killed:
			return 137
		}
	})
}

func TestProbes(t *testing.T) {
	inWorld(t, func(w *world) {
		var status atomic.Int32
		status.Store(503)
		web(w, &status)
		w.agent()
		as := assignment("w-aaaaa")
		http8080 := &portolanv1.Probe{Check: &portolanv1.Probe_Http{Http: &portolanv1.Probe_HttpCheck{Path: "/healthz", Port: 8080}}, Period: durationpb.New(2 * time.Second)}
		c := as.GetSpec().GetContainers()[0]
		c.Readiness = http8080
		c.Liveness = &portolanv1.Probe{Check: http8080.GetCheck(), Period: durationpb.New(2 * time.Second), InitialDelay: durationpb.New(20 * time.Second), FailureThreshold: 2}
		w.assign(as)
		w.until("it runs, unready", 5*time.Second, func() bool {
			s := w.status("w-aaaaa")
			return s.GetState() == portolanv1.ReplicaState_REPLICA_STATE_RUNNING && s.GetReason().GetCode() == "NotReady"
		})
		status.Store(200)
		w.until("readiness passes soon", time.Second, func() bool { return w.status("w-aaaaa").GetReady() })
		<-time.After(30 * time.Second)
		status.Store(500)
		took := w.until("liveness kills it", 10*time.Second, func() bool { return w.seen("LivenessFailed") > 0 })
		if took > 5*time.Second {
			t.Errorf("two failures with a period of 2s took %s", took)
		}
		status.Store(200)
		w.until("it is restarted after its backoff", 15*time.Second, func() bool {
			s := w.status("w-aaaaa")
			return s.GetReady() && s.GetContainers()[0].GetRestarts() == 1 && s.GetContainers()[0].GetLastExitReason() == "LivenessFailed"
		})
	})
}

func TestStopInOrder(t *testing.T) {
	inWorld(t, func(w *world) {
		w.engine.Script("app", func(p *enginetest.Proc) int { // ignores SIGTERM
			<-p.Killed
			return 137
		})
		w.agent()
		as := assignment("w-aaaaa")
		as.Spec.GracePeriod = durationpb.New(4 * time.Second)
		as.Spec.Containers[0].PreStop = &portolanv1.Hook{Action: &portolanv1.Hook_Sleep{Sleep: durationpb.New(time.Second)}}
		w.assign(as)
		w.ready("w-aaaaa")
		w.journal.take()
		stop := assignment("w-aaaaa")
		stop.Stop, stop.StopReason = true, "scaled down"
		began := time.Now()
		w.assign(stop)
		w.until("draining is reported first", 200*time.Millisecond, func() bool {
			s := w.status("w-aaaaa")
			return s.GetState() == portolanv1.ReplicaState_REPLICA_STATE_STOPPING && !s.GetReady()
		})
		if got := w.journal.take(); len(got) != 0 {
			t.Errorf("before the endpoint was withdrawn: %v", got)
		}
		w.until("it is gone", 10*time.Second, func() bool { return w.gone("w-aaaaa") })
		want := []string{
			"proxy drain w-aaaaa", "signal 15 w-aaaaa.main.1", "signal 9 w-aaaaa.main.1", "delete w-aaaaa.main.1",
			"proxy stop w-aaaaa", "network remove w-aaaaa",
		}
		if got := w.journal.take(); !slices.Equal(got, want) {
			t.Errorf("order\n got %q\nwant %q", got, want)
		}
		if took := time.Since(began); took < 4*time.Second || took > 6*time.Second {
			t.Errorf("took %s with a grace of 4s", took)
		}
		for _, f := range []string{"run/identity/w-aaaaa", "data/agent/tasks/w-aaaaa.json", "data/logs/w-aaaaa"} {
			if _, err := os.Stat(filepath.Join(w.dir, f)); !os.IsNotExist(err) {
				t.Errorf("%s is left: %v", f, err)
			}
		}
	})
}

func TestCrashOfTheAgentDisturbsNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		_, kill := w.agent()
		w.assign(assignment("w-aaaaa", "tick"), assignment("w-bbbbb", "exit", "0", "30s"))
		w.ready("w-aaaaa")
		w.ready("w-bbbbb")
		pid := w.status("w-aaaaa").GetContainers()[0].GetPid()
		kill()
		reported := w.cluster.count()
		w.journal.take()
		<-time.After(time.Minute) // b's container ends meanwhile
		w.agent()
		w.until("the new agent reports", 5*time.Second, func() bool { return w.cluster.count() > reported })
		s := w.status("w-aaaaa")
		if !s.GetReady() || s.GetContainers()[0].GetPid() != pid || s.GetContainers()[0].GetRestarts() != 0 {
			t.Errorf("first status of the new agent: %v, want pid %d", s, pid)
		}
		w.until("what ended meanwhile is restarted", 15*time.Second, func() bool {
			c := w.status("w-bbbbb").GetContainers()[0]
			return c.GetRestarts() == 1 && c.GetLastExitReason() == "Completed" && w.status("w-bbbbb").GetReady()
		})
		for _, line := range w.journal.take() {
			if strings.Contains(line, "w-aaaaa") {
				t.Errorf("the new agent touched a healthy replica: %s", line)
			}
		}
		if w.cluster.joins != 1 || len(w.cluster.signed) != 2 {
			t.Errorf("joins %d, signed %v: identities were not kept", w.cluster.joins, w.cluster.signed)
		}
	})
}

func TestBootFromLastGood(t *testing.T) {
	inWorld(t, func(w *world) {
		_, kill := w.agent()
		w.assign(assignment("w-aaaaa", "tick"), assignment("w-bbbbb", "tick"))
		w.ready("w-aaaaa")
		w.ready("w-bbbbb")
		kill()
		w.cluster.down()
		if err := w.engine.Kill("w-bbbbb.main.1"); err != nil {
			t.Fatal(err)
		}
		a, _ := w.agent()
		w.until("the killed container is restarted without the cluster", 15*time.Second, func() bool {
			r, ok := a.board.get("w-bbbbb")
			return ok && r.status.GetReady() && r.status.GetContainers()[0].GetRestarts() == 1
		})
		if r, ok := a.board.get("w-aaaaa"); !ok || !r.status.GetReady() || r.status.GetContainers()[0].GetRestarts() != 0 {
			t.Errorf("the healthy one: %v", r.status)
		}
		w.cluster.up()
		w.until("the cluster hears of both", 15*time.Second, func() bool {
			return w.status("w-aaaaa").GetReady() && w.status("w-bbbbb").GetContainers()[0].GetRestarts() == 1
		})
	})
}

// What is missing from a last good generation is no reason to stop anything; a
// generation from the cluster is.
func TestOrphansEndOnlyWhenTheClusterSaysSo(t *testing.T) {
	inWorld(t, func(w *world) {
		_, kill := w.agent()
		w.assign(assignment("w-aaaaa", "tick"), assignment("w-bbbbb", "tick"))
		w.ready("w-aaaaa")
		w.ready("w-bbbbb")
		kill()
		w.cluster.down()
		// All that the agent knew is lost, but its identity.
		for _, d := range []string{"data/lastgood", "data/agent/tasks"} {
			if err := os.RemoveAll(filepath.Join(w.dir, d)); err != nil {
				t.Fatal(err)
			}
		}
		w.journal.take()
		w.agent()
		<-time.After(time.Minute)
		if got := w.journal.take(); len(got) != 0 {
			t.Errorf("without word from the cluster: %v", got)
		}
		w.unassign("w-bbbbb")
		w.cluster.up()
		w.until("the orphan is gone and the other taken over", 30*time.Second, func() bool {
			return w.gone("w-bbbbb") && w.status("w-aaaaa").GetReady()
		})
		got := w.journal.take()
		for _, want := range []string{"signal 15 w-bbbbb.main.1", "delete w-bbbbb.main.1", "proxy stop w-bbbbb", "network remove w-bbbbb"} {
			if !slices.Contains(got, want) {
				t.Errorf("journal %q lacks %q", got, want)
			}
		}
		for _, line := range got {
			if strings.Contains(line, "w-aaaaa") && !strings.HasPrefix(line, "proxy start") {
				t.Errorf("touched the assigned one: %s", line)
			}
		}
	})
}

func TestGateway(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		as := &nodev1.Assignment{
			Allocation: "ingress-aaaaa", Tenant: "system", Workload: "ingress", Epoch: 1, Address: "10.0.0.1",
			Spec: &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, Gateway: portolanv1.GatewayKind_GATEWAY_KIND_INGRESS},
		}
		w.assign(as)
		w.ready("ingress-aaaaa")
		if got := w.journal.take(); !slices.Equal(got, []string{"proxy start ingress-aaaaa ingress"}) {
			t.Errorf("journal %q", got)
		}
		if all, _ := w.network.List(w.t.Context()); len(all) != 0 {
			t.Errorf("a gateway has a network of its own: %v", all)
		}
		w.unassign("ingress-aaaaa")
		w.until("it is gone", 5*time.Second, func() bool { return w.gone("ingress-aaaaa") })
	})
}

func TestJob(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		job := func(id, code string) *nodev1.Assignment {
			as := assignment(id, "exit", code, "5s")
			as.Spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_JOB
			return as
		}
		w.assign(job("good-aaaaa", "0"), job("bad-aaaaa", "4"))
		w.until("both ended", 15*time.Second, func() bool {
			return w.status("good-aaaaa").GetState() == portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED &&
				w.status("bad-aaaaa").GetState() == portolanv1.ReplicaState_REPLICA_STATE_FAILED
		})
		w.until("nothing of them runs", 5*time.Second, func() bool {
			all, _ := w.engine.List(w.t.Context())
			running, _ := w.proxies.List(w.t.Context())
			return len(all) == 0 && len(running) == 0
		})
		<-time.After(time.Minute)
		if n := strings.Count(strings.Join(w.journal.take(), " "), "start bad-aaaaa.main"); n != 1 {
			t.Errorf("the failed job was started %d times", n)
		}
		if s := w.status("good-aaaaa"); s == nil {
			t.Error("a finished job is not reported any more")
		}
		w.unassign("good-aaaaa")
		w.until("it is forgotten", 5*time.Second, func() bool { return w.gone("good-aaaaa") })
	})
}

func TestPullBackoffAndHeal(t *testing.T) {
	inWorld(t, func(w *world) {
		ref := "registry.test/app" + digest
		w.engine.FailPull(ref, errors.New("no route to registry"))
		w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.until("the reason is told", 5*time.Second, func() bool {
			r := w.status("w-aaaaa").GetReason()
			return r.GetCode() == "ImagePullFailed" && strings.Contains(r.GetMessage(), "no route")
		})
		<-time.After(10 * time.Minute)
		if n := w.engine.Pulls(ref); n < 8 || n > 25 {
			t.Errorf("%d pulls in 10 minutes", n)
		}
		w.engine.FailPull(ref, nil)
		w.until("it heals", 70*time.Second, func() bool { return w.status("w-aaaaa").GetReady() })
	})
}

func TestAppliedIsTheLeast(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		applied := func() int64 { return w.cluster.last().GetApplied().GetRevision() }
		w.publish()
		w.until("the newest is applied", 3*time.Second, func() bool { return applied() == w.cluster.revision })
		// A frozen proxy holds the node back.
		frozen := w.cluster.revision
		w.publish()
		w.warden.update(func() {
			w.warden.proxies["w-aaaaa"].Status = &nodev1.ProxyStatus{Allocation: "w-aaaaa", Applied: &nodev1.Watermark{Revision: frozen, Generation: frozen}}
		})
		<-time.After(5 * time.Second)
		if applied() != frozen {
			t.Errorf("applied %d while a proxy is at %d", applied(), frozen)
		}
	})
}

func TestRefusedAndStale(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		good := assignment("w-aaaaa", "sleep")
		good.Epoch = 5
		for i, bad := range []func(*nodev1.Assignment){
			func(a *nodev1.Assignment) { a.Allocation = "../../etc" },
			func(a *nodev1.Assignment) { a.Spec.Containers[0].ResolvedImage = "registry.test/app:latest" },
			func(a *nodev1.Assignment) { a.Spec.Containers[0].RunAsUser = 14010 },
			func(a *nodev1.Assignment) { a.Spec.Containers[0].AddCapabilities = []string{"SETUID"} },
			func(a *nodev1.Assignment) { a.Address = "here" },
			func(a *nodev1.Assignment) { a.Spec = nil },
			func(a *nodev1.Assignment) { a.Spec.Gateway = portolanv1.GatewayKind_GATEWAY_KIND_INGRESS },
		} {
			a := assignment("bad-" + strings.Repeat(string(rune('a'+i)), 5))
			bad(a)
			w.cluster.set[a.GetAllocation()] = a
		}
		w.assign(good)
		w.ready("w-aaaaa")
		w.cluster.mu.Lock()
		for id := range w.cluster.state {
			if id != "w-aaaaa" {
				t.Errorf("accepted %s", id)
			}
		}
		w.cluster.mu.Unlock()
		st, ok := w.cluster.cache.Status("n1")
		if !ok || len(st.Nacks) != 7 {
			t.Errorf("%d of 7 bad resources are named as refused: %+v", len(st.Nacks), st.Nacks)
		}
		stale := assignment("w-aaaaa", "sleep")
		stale.Epoch, stale.Stop = 4, true
		w.journal.take()
		w.assign(stale)
		w.until("the older epoch is refused", 5*time.Second, func() bool { return w.seen("StaleEpochRefused") > 0 })
		if s := w.status("w-aaaaa"); !s.GetReady() || s.GetEpoch() != 5 {
			t.Errorf("status %v", s)
		}
	})
}

// An agent killed between the renames of a renewal has an identity when it comes
// back: its token is spent, so it could get no other.
func TestRenewalCutShort(t *testing.T) {
	inWorld(t, func(w *world) {
		_, kill := w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		kill()
		for _, c := range []struct{ dir, path string }{{"data/agent", "/node/n1"}, {"run/identity/w-aaaaa", "/tenant/t/workload/w-aaaaa"}} {
			dir := filepath.Join(w.dir, c.dir)
			old, err := os.ReadFile(filepath.Join(dir, "key.pem"))
			if err != nil {
				t.Fatal(err)
			}
			key, csr, err := source.NewCSR()
			if err != nil {
				t.Fatal(err)
			}
			chain, err := w.cluster.issue(csr, c.path)
			if err != nil {
				t.Fatal(err)
			}
			id, err := source.NewIdentity(key, chain, w.cluster.bundle())
			if err != nil {
				t.Fatal(err)
			}
			if err := source.WriteDir(dir, id); err != nil {
				t.Fatal(err)
			}
			// As before the last rename: the chain is new, its key still the next one.
			if err := os.Rename(filepath.Join(dir, "key.pem"), filepath.Join(dir, "next-key.pem")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "key.pem"), old, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		w.tune = func(c *Config) { c.Token = func() (string, error) { return "", errors.New("the token is spent") } }
		w.agent()
		w.cluster.mu.Lock()
		before := len(w.cluster.reports)
		w.cluster.mu.Unlock()
		w.until("the node is back", 10*time.Second, func() bool {
			w.cluster.mu.Lock()
			defer w.cluster.mu.Unlock()
			return len(w.cluster.reports) > before
		})
		w.ready("w-aaaaa")
		if w.cluster.joins != 1 || len(w.cluster.signed) != 1 {
			t.Errorf("joins %d, signed %v: an identity was lost", w.cluster.joins, w.cluster.signed)
		}
	})
}

// After days of rest the certificate has ended: the node joins anew with the token
// that it is given then.
func TestJoinsAnewWhenTheCertificateEnded(t *testing.T) {
	inWorld(t, func(w *world) {
		_, kill := w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		kill()
		<-time.After(3 * 24 * time.Hour)
		w.agent()
		w.until("it joined again", time.Minute, func() bool {
			w.cluster.mu.Lock()
			defer w.cluster.mu.Unlock()
			return w.cluster.joins == 2
		})
		w.ready("w-aaaaa")
	})
}

func TestIdentitiesAreRenewed(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cluster.life = time.Hour
		w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		w.ready("w-aaaaa")
		first, err := os.ReadFile(filepath.Join(w.dir, "run/identity/w-aaaaa/key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		node, err := os.ReadFile(filepath.Join(w.dir, "data/agent/key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		took := w.until("the workload has a new key", time.Hour, func() bool {
			b, _ := os.ReadFile(filepath.Join(w.dir, "run/identity/w-aaaaa/key.pem"))
			return string(b) != string(first)
		})
		if took < 20*time.Minute || took > 31*time.Minute {
			t.Errorf("renewed after %s of an hour", took)
		}
		w.until("so has the node", 10*time.Minute, func() bool {
			b, _ := os.ReadFile(filepath.Join(w.dir, "data/agent/key.pem"))
			return string(b) != string(node)
		})
		if !w.status("w-aaaaa").GetReady() {
			t.Error("renewal made it unready")
		}
	})
}

func TestEngineAway(t *testing.T) {
	inWorld(t, func(w *world) {
		w.engine.SetDown(true)
		w.agent()
		w.assign(assignment("w-aaaaa", "sleep"))
		<-time.After(20 * time.Second)
		w.engine.SetDown(false)
		w.until("it starts when the engine is back", 70*time.Second, func() bool { return w.status("w-aaaaa").GetReady() })
		if c := w.status("w-aaaaa").GetContainers()[0]; c.GetRestarts() != 0 {
			t.Errorf("the engine's absence counts as a restart: %v", c)
		}
	})
}

func (w *world) logs(req *portolanv1.LogsRequest) (string, error) {
	w.cluster.mu.Lock()
	rt := w.cluster.runtime
	w.cluster.mu.Unlock()
	req.Replica = "tenants/t/workloads/w/replicas/w-aaaaa"
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	stream, err := rt.Logs(ctx, req)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for {
		m, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) || ctx.Err() != nil {
				err = nil
			}
			return out.String(), err
		}
		out.Write(m.GetData())
	}
}

func TestRuntimeOverTheTunnel(t *testing.T) {
	inWorld(t, func(w *world) {
		w.agent()
		w.assign(assignment("w-aaaaa", "tick"))
		w.ready("w-aaaaa")
		<-time.After(2 * time.Second)
		all, err := w.logs(&portolanv1.LogsRequest{})
		if err != nil || !strings.HasPrefix(all, "tick 0\ntick 1\n") {
			t.Fatalf("logs %q, %v", all, err)
		}
		tail, err := w.logs(&portolanv1.LogsRequest{TailLines: 3})
		if err != nil || strings.Count(tail, "\n") != 3 || !strings.HasSuffix(all, tail) {
			t.Errorf("tail %q of %q, %v", tail, all, err)
		}
		if _, err := w.logs(&portolanv1.LogsRequest{Previous: true}); err == nil {
			t.Error("there is a previous instance before any restart")
		}
		if err := w.engine.Kill("w-aaaaa.main.1"); err != nil {
			t.Fatal(err)
		}
		w.until("it is restarted", 15*time.Second, func() bool {
			return w.status("w-aaaaa").GetReady() && w.status("w-aaaaa").GetContainers()[0].GetRestarts() == 1
		})
		followed, err := w.logs(&portolanv1.LogsRequest{Follow: true})
		if err != nil || strings.Count(followed, "\n") < 50 || !strings.HasPrefix(followed, "tick 0\n") {
			t.Errorf("followed %q, %v", followed, err)
		}
		previous, err := w.logs(&portolanv1.LogsRequest{Previous: true})
		if err != nil || !strings.HasPrefix(previous, all) {
			t.Errorf("previous %q, %v, want it to begin with %q", previous, err, all)
		}
		execOver(t, w)
		replicasOver(t, w)
	})
}

func execOver(t *testing.T, w *world) {
	t.Helper()
	stream, err := w.cluster.runtime.Exec(w.t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*portolanv1.ExecRequest{
		{Message: &portolanv1.ExecRequest_Start_{Start: &portolanv1.ExecRequest_Start{Replica: "tenants/t/workloads/w/replicas/w-aaaaa", Command: []string{"/work", "cat"}}}},
		{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("hello ")}},
		{Message: &portolanv1.ExecRequest_Stdin{Stdin: []byte("there")}},
		{Message: &portolanv1.ExecRequest_CloseStdin{CloseStdin: true}},
	} {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	code := int32(-1)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		out.Write(m.GetStdout())
		if x, ok := m.GetMessage().(*portolanv1.ExecResponse_ExitCode); ok {
			code = x.ExitCode
		}
	}
	if out.String() != "hello there" || code != 0 {
		t.Errorf("exec: %q, code %d", out.String(), code)
	}
}

func replicasOver(t *testing.T, w *world) {
	t.Helper()
	r, err := w.cluster.runtime.ListReplicas(w.t.Context(), &portolanv1.ListReplicasRequest{Parent: "tenants/t/workloads/-"})
	if err != nil || len(r.GetReplicas()) != 1 || r.GetReplicas()[0].GetSpiffeId() != "spiffe://eu.portolan.internal/tenant/t/workload/w" {
		t.Errorf("replicas %v, %v", r, err)
	}
	for parent, want := range map[string]bool{"tenants/t": true, "tenants/t/workloads/w": true, "tenants/tt": false, "tenants/t/workloads/w2": false, "": true} {
		e, err := w.cluster.runtime.ListEvents(w.t.Context(), &portolanv1.ListEventsRequest{Parent: parent})
		if err != nil || (len(e.GetEvents()) > 0) != want {
			t.Errorf("events of %q: %d, %v, want some: %v", parent, len(e.GetEvents()), err, want)
		}
	}
}

func TestRotate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "1.log")
	write := func(s string) {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	var got strings.Builder
	l := &logReader{path: path, files: 3, buf: make([]byte, 7), send: func(b []byte) error { got.Write(b); return nil }}
	want := ""
	for _, part := range []string{"one\n", "two\ntwo\n", "three\n", "four\n"} {
		write(part)
		want += part
		if err := rotate(path, 1, 3); err != nil {
			t.Fatal(err)
		}
	}
	write("five\n")
	if err := l.start(0); err != nil || got.String() != "three\nfour\nfive\n" {
		t.Errorf("kept %q, %v; want the three newest of %q", got.String(), err, want)
	}
	got.Reset()
	write("six\n")
	if err := rotate(path, 1, 3); err != nil {
		t.Fatal(err)
	}
	write("7\n")
	if err := l.rest(); err != nil || got.String() != "six\n7\n" {
		t.Errorf("a follower across a rotation got %q, %v", got.String(), err)
	}
	for tail, want := range map[int]string{1: "7\n", 2: "six\n7\n", 3: "five\nsix\n7\n", 100: "four\nfive\nsix\n7\n"} {
		got.Reset()
		l := &logReader{path: path, files: 3, buf: make([]byte, 5), send: l.send}
		if err := l.start(tail); err != nil || got.String() != want {
			t.Errorf("tail %d: %q, %v, want %q", tail, got.String(), err, want)
		}
	}
}

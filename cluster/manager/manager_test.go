package manager

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/mem"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// rig is a manager on state in memory, and nodes that do what they are told.
type rig struct {
	t     *testing.T
	store *mem.Store
	m     *Manager
	stop  context.CancelFunc
	done  chan error
	nodes map[string]*fakeNode
	rev   int64
	all   map[string]*linkv1.Intent
}

// fakeNode starts a replica in a second, stops one in half a second, and reports
// every second and on change.
type fakeNode struct {
	id      string
	session int64
	mu      sync.Mutex
	cut     bool
	end     portolanv1.ReplicaState // what replicas come to, after a second; none when 0
	never   bool                    // replicas do not get ready
	usage   *nodev1.Usage           // of each replica that is ready
	oom     int64                   // bytes at which each was killed once
	facts   *nodev1.NodeFacts       // other than those it registered with
	cancel  context.CancelFunc
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, nodes: map[string]*fakeNode{}, all: map[string]*linkv1.Intent{}}
	r.start(mem.New())
	t.Cleanup(r.close)
	return r
}

func (r *rig) start(s *mem.Store) {
	r.store = s
	m, err := New(Config{Store: s, Cluster: "eu", CIDR: "10.77.0.0/16", Seed: 1})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.m, r.stop, r.done = m, cancel, make(chan error, 1)
	go func() { r.done <- m.Run(ctx) }()
}

func (r *rig) close() {
	for _, n := range r.nodes {
		n.cancel()
	}
	r.stop()
	if err := <-r.done; err != nil {
		r.t.Errorf("Run: %v", err)
	}
	synctest.Wait()
}

// restart has the cluster's process begin anew; its nodes reconnect after a
// while.
func (r *rig) restart(reconnect time.Duration) {
	for _, n := range r.nodes {
		n.cancel()
	}
	r.stop()
	<-r.done
	r.start(r.store.Reopen())
	for _, id := range slices.Sorted(maps.Keys(r.nodes)) {
		n := r.nodes[id]
		n.session++
		r.run(n, reconnect)
	}
}

func (r *rig) addNode(id string, labels ...string) *fakeNode {
	r.t.Helper()
	facts := &nodev1.NodeFacts{Address: "192.168.0." + id[1:], CpuMilli: 4000, MemoryBytes: 8 << 30, StorageBytes: 100 << 30, Labels: map[string]string{}}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		facts.Labels[k] = v
	}
	if _, err := r.m.RegisterNode(r.t.Context(), id, facts, []byte("key")); err != nil {
		r.t.Fatal(err)
	}
	n := &fakeNode{id: id, session: 1}
	r.nodes[id] = n
	r.run(n, 0)
	synctest.Wait() // it has reported
	return n
}

func (r *rig) run(n *fakeNode, after time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	store, session := r.store, n.session
	go func() {
		sleep(ctx, after)
		n.serve(ctx, store, session)
	}()
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (n *fakeNode) set(f func(*fakeNode)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n)
}

// serve looks every 100 ms at what it is told.
func (n *fakeNode) serve(ctx context.Context, store *mem.Store, session int64) {
	since := map[string]time.Time{}
	statuses := map[string]*nodev1.AllocationStatus{}
	told, applied := map[string]*clusterv1.Allocation{}, &nodev1.Watermark{}
	for ctx.Err() == nil {
		n.mu.Lock()
		cut, end, never, usage, oom, facts := n.cut, n.end, n.never, n.usage, n.oom, n.facts
		n.mu.Unlock()
		if cut {
			sleep(ctx, 100*time.Millisecond)
			continue
		}
		s := store.Snapshot()
		was := told
		told = map[string]*clusterv1.Allocation{}
		for id, a := range s.Allocations {
			if a.GetNode() != n.id {
				continue
			}
			told[id] = a
			if statuses[id] == nil && !a.GetStop() && a.GetFinal() == nil {
				since[id] = time.Now()
				statuses[id] = &nodev1.AllocationStatus{Allocation: id, State: portolanv1.ReplicaState_REPLICA_STATE_STARTING}
			}
			up := time.Since(since[id]) >= time.Second
			switch {
			case a.GetStop() && time.Since(a.GetStopTime().AsTime()) >= 500*time.Millisecond:
				delete(statuses, id)
			case statuses[id] == nil || statuses[id].GetReady() || !up || never:
			case end != 0 && (a.GetSpec().GetKind() == job || a.GetSpec().GetKind() == cron):
				statuses[id] = &nodev1.AllocationStatus{Allocation: id, State: end}
			default:
				statuses[id] = &nodev1.AllocationStatus{Allocation: id, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true, Timeline: &portolanv1.Timeline{Ready: timestamppb.Now()}}
			}
		}
		if !maps.Equal(was, told) || applied.GetRevision() != s.Settled {
			applied = &nodev1.Watermark{Revision: s.Settled, Generation: s.Generation}
		}
		removed := map[string]bool{}
		for id, v := range s.Volumes {
			if v.GetNode() == n.id && v.GetDelete() {
				removed[id] = true
			}
		}
		all := maps.Clone(statuses)
		for id, st := range all {
			if st.GetReady() && usage != nil {
				st, u := proto.CloneOf(st), proto.CloneOf(usage)
				u.Time = timestamppb.Now()
				st.Usage, all[id] = u, st
			}
			if oom > 0 {
				st = proto.CloneOf(st)
				st.Containers = []*portolanv1.ContainerState{{Name: "main", LastExitReason: oomKilled, LastExitTime: timestamppb.New(since[id]), MemoryBytes: oom}}
				all[id] = st
			}
		}
		_ = store.Observe(n.id, &state.NodeStatus{
			Connected: true, LastSeen: time.Now(), Session: session, Allocations: all,
			Applied: applied, Facts: facts, RemovedVolumes: removed,
		})
		sleep(ctx, 100*time.Millisecond)
	}
}

func (r *rig) commit() {
	r.t.Helper()
	r.rev++
	if err := r.store.CommitIntents(r.t.Context(), r.rev, maps.Clone(r.all), time.Now()); err != nil {
		r.t.Fatal(err)
	}
}

func spec(kind portolanv1.WorkloadKind, cpu string) *portolanv1.WorkloadSpec {
	return &portolanv1.WorkloadSpec{Kind: kind, Containers: []*portolanv1.Container{{Name: "main", Limits: &portolanv1.ResourceList{Cpu: cpu, Memory: "64Mi"}}}}
}

func (r *rig) want(name, revision string, replicas int32, sp *portolanv1.WorkloadSpec) {
	r.t.Helper()
	r.all["workload/t/"+name] = &linkv1.Intent{Revision: r.rev + 1, Body: &linkv1.Intent_Workload{Workload: &linkv1.WorkloadIntent{
		Tenant: "t", Workload: name, Uid: "u-" + name, Epoch: r.rev + 1, CurrentRevision: revision,
		Revisions: []*linkv1.RevisionIntent{{Revision: revision, Replicas: replicas, Spec: sp}},
	}}}
	r.commit()
}

func (r *rig) unwant(name string) {
	r.t.Helper()
	delete(r.all, "workload/t/"+name)
	r.commit()
}

type allocation = *clusterv1.Allocation

func cloneIntent(i *linkv1.Intent) *linkv1.Intent { return proto.CloneOf(i) }

// ready counts a workload's replicas that are ready and meant to stay.
func (r *rig) ready(name string) int {
	s, n := r.store.Snapshot(), 0
	for id, a := range s.Allocations {
		if st := s.NodeStatus[a.GetNode()]; a.GetWorkload() == name && !a.GetStop() && st != nil && st.Allocations[id].GetReady() {
			n++
		}
	}
	return n
}

// on lists "node revision state" of a workload's replicas, sorted.
func (r *rig) on(name string) []string {
	s := r.store.Snapshot()
	var out []string
	for id, a := range s.Allocations {
		if a.GetWorkload() != name {
			continue
		}
		st := "waiting"
		if r := s.NodeStatus[a.GetNode()]; r != nil && r.Allocations[id].GetReady() {
			st = "ready"
		}
		if a.GetStop() {
			st = "stopping"
		}
		if a.GetFinal() != nil {
			st = strings.ToLower(strings.TrimPrefix(a.GetFinal().GetState().String(), "REPLICA_STATE_"))
		}
		out = append(out, fmt.Sprintf("%s %s %s", a.GetNode(), a.GetRevision(), st))
	}
	slices.Sort(out)
	return out
}

func (r *rig) expect(name string, want ...string) {
	r.t.Helper()
	synctest.Wait()
	if got := r.on(name); !slices.Equal(got, want) {
		r.t.Fatalf("replicas of %s at %v:\n got %q\nwant %q", name, time.Now().Format("05.000"), got, want)
	}
}

func (r *rig) events(typ string) int {
	n := 0
	for _, e := range r.m.Events() {
		if e.GetType() == typ {
			n += int(e.GetCount())
		}
	}
	return n
}

const (
	service = portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE
	job     = portolanv1.WorkloadKind_WORKLOAD_KIND_JOB
	daemon  = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
)

func story(t *testing.T, run func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { run(t, newRig(t)) })
}

func TestApplyAndRemove(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		r.addNode("n2")
		at := time.Now()
		r.want("web", "r1", 2, spec(service, "500m"))
		r.expect("web", "n1 r1 waiting", "n2 r1 waiting")
		s := r.store.Snapshot()
		if s.Settled != r.rev {
			t.Errorf("settled %d of %d", s.Settled, r.rev)
		}
		for id, a := range s.Allocations {
			cidr := strings.TrimSuffix(s.Nodes[a.GetNode()].GetReplicaCidr(), "0/24")
			if !strings.HasPrefix(a.GetAddress(), cidr) || !a.GetAtCluster().AsTime().Equal(at) || a.GetEpoch() != r.rev || a.GetFederationRevision() != r.rev {
				t.Errorf("allocation %v on a node with %s", a, cidr)
			}
			if stem, random, _ := strings.Cut(id, "-"); stem != "web" || len(random) != 5 {
				t.Errorf("name %s", id)
			}
		}
		time.Sleep(2 * time.Second)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		gen := r.store.Snapshot().Generation
		time.Sleep(time.Hour)
		if got := r.store.Snapshot().Generation; got != gen {
			t.Errorf("an idle cluster went from generation %d to %d", gen, got)
		}
		r.unwant("web")
		time.Sleep(2 * time.Second)
		r.expect("web")
		for typ, n := range map[string]int{"Bound": 2, "Stopping": 2, "Stopped": 2, "NodeRegistered": 2} {
			if got := r.events(typ); got != n {
				t.Errorf("%d events %s, want %d", got, typ, n)
			}
		}
	})
}

func TestNodeLostAndReturned(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		r.addNode("n2")
		r.want("web", "r1", 2, spec(service, "500m"))
		time.Sleep(10 * time.Second) // over the grace of the start
		n1.set(func(n *fakeNode) { n.cut = true })
		time.Sleep(2900 * time.Millisecond)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		time.Sleep(200 * time.Millisecond)
		r.expect("web", "n1 r1 ready", "n2 r1 ready", "n2 r1 waiting")
		if r.store.Snapshot().Nodes["n1"].GetLostTime() == nil || r.events("NodeLost") != 1 || r.events("Replaced") != 1 {
			t.Error("the loss of the node is not on record")
		}
		time.Sleep(3 * time.Second)
		n1.set(func(n *fakeNode) { n.cut = false })
		time.Sleep(3 * time.Second)
		r.expect("web", "n2 r1 ready", "n2 r1 ready")
		if r.store.Snapshot().Nodes["n1"].GetLostTime() != nil || r.events("NodeReturned") != 1 {
			t.Error("the return of the node is not on record")
		}
		r.namesNoNode()
	})
}

func TestAllLost(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1, n2 := r.addNode("n1"), r.addNode("n2")
		r.want("web", "r1", 2, spec(service, "500m"))
		time.Sleep(10 * time.Second)
		for _, n := range []*fakeNode{n1, n2} {
			n.set(func(n *fakeNode) { n.cut = true })
		}
		time.Sleep(time.Minute)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		if r.events("AllNodesSilent") != 1 || r.events("NodeLost") != 0 {
			t.Errorf("events %v", r.m.Events())
		}
		// One comes back: the other gets its time too.
		n1.set(func(n *fakeNode) { n.cut = false })
		time.Sleep(5 * time.Second)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		n2.set(func(n *fakeNode) { n.cut = false })
		time.Sleep(time.Minute)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		if got := r.events("Bound"); got != 2 {
			t.Errorf("%d replicas were bound", got)
		}
		// But one that stays away is lost in the end.
		n2.set(func(n *fakeNode) { n.cut = true })
		time.Sleep(10 * time.Second)
		r.expect("web", "n1 r1 ready", "n1 r1 ready", "n2 r1 ready")
	})
}

func TestRollingUpdate(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		for _, id := range []string{"n1", "n2", "n3"} {
			r.addNode(id)
		}
		r.want("web", "r1", 3, spec(service, "500m"))
		time.Sleep(3 * time.Second)
		r.want("web", "r2", 3, spec(service, "500m"))
		for range 300 {
			time.Sleep(100 * time.Millisecond)
			live, ready := 0, 0
			for _, s := range r.on("web") {
				live++
				if strings.HasSuffix(s, " ready") {
					ready++
				}
			}
			if live > 4 || ready < 3 {
				t.Fatalf("%d live, %d ready during the update: %v", live, ready, r.on("web"))
			}
		}
		r.expect("web", "n1 r2 ready", "n2 r2 ready", "n3 r2 ready")
	})
}

func TestHalted(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		r.want("web", "r1", 1, spec(service, "500m"))
		time.Sleep(3 * time.Second)
		n1.set(func(n *fakeNode) { n.never = true })
		r.want("web", "r2", 1, spec(service, "400m"))
		time.Sleep(9 * time.Minute)
		if r.events("Halted") != 0 {
			t.Error("halted before its deadline")
		}
		time.Sleep(2 * time.Minute)
		r.expect("web", "n1 r1 ready", "n1 r2 waiting")
		if r.events("Halted") != 1 {
			t.Errorf("events %v", r.m.Events())
		}
		n1.set(func(n *fakeNode) { n.never = false })
		time.Sleep(3 * time.Second)
		r.expect("web", "n1 r2 ready")
		if r.events("Resumed") != 1 {
			t.Errorf("events %v", r.m.Events())
		}
	})
}

func TestJob(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		n1.set(func(n *fakeNode) { n.end = portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED })
		sp := spec(job, "100m")
		sp.Job = &portolanv1.WorkloadSpec_JobSpec{Parallelism: 2}
		r.want("sum", "r1", 3, sp)
		time.Sleep(500 * time.Millisecond)
		r.expect("sum", "n1 r1 waiting", "n1 r1 waiting")
		time.Sleep(5 * time.Second)
		r.expect("sum", "n1 r1 succeeded", "n1 r1 succeeded", "n1 r1 succeeded")
		// Nothing begins again, not after a restart either.
		r.restart(time.Second)
		time.Sleep(time.Minute)
		r.expect("sum", "n1 r1 succeeded", "n1 r1 succeeded", "n1 r1 succeeded")
		if got := r.events("Bound"); got != 0 {
			t.Errorf("%d replicas were bound after the restart", got)
		}
	})
}

func TestDaemon(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		n2 := r.addNode("n2")
		sp := &portolanv1.WorkloadSpec{Kind: daemon, Gateway: portolanv1.GatewayKind_GATEWAY_KIND_INGRESS}
		r.want("gw", "r1", 0, sp)
		time.Sleep(3 * time.Second)
		r.expect("gw", "n1 r1 ready", "n2 r1 ready")
		for _, a := range r.store.Snapshot().Allocations {
			if want := "192.168.0." + a.GetNode()[1:]; a.GetAddress() != want {
				t.Errorf("gateway has address %s, its node %s", a.GetAddress(), want)
			}
		}
		r.addNode("n3")
		time.Sleep(10 * time.Second)
		r.expect("gw", "n1 r1 ready", "n2 r1 ready", "n3 r1 ready")
		n2.set(func(n *fakeNode) { n.cut = true })
		time.Sleep(10 * time.Second)
		r.expect("gw", "n1 r1 ready", "n2 r1 ready", "n3 r1 ready")
		n2.set(func(n *fakeNode) { n.cut = false })
		time.Sleep(10 * time.Second)
		r.expect("gw", "n1 r1 ready", "n2 r1 ready", "n3 r1 ready")
		if got := r.events("Bound"); got != 3 {
			t.Errorf("%d replicas were bound", got)
		}
	})
}

// A restart of the cluster's process disturbs nobody, even when nodes take longer
// than their timeout to come back.
func TestRestart(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		for _, id := range []string{"n1", "n2", "n3"} {
			r.addNode(id)
		}
		r.want("web", "r1", 3, spec(service, "500m"))
		time.Sleep(10 * time.Second)
		before := slices.Sorted(maps.Keys(r.store.Snapshot().Allocations))
		r.restart(5 * time.Second)
		time.Sleep(time.Minute)
		if after := slices.Sorted(maps.Keys(r.store.Snapshot().Allocations)); !slices.Equal(before, after) {
			t.Errorf("replicas before %v, after %v", before, after)
		}
		if r.events("NodeLost") != 0 {
			t.Errorf("events %v", r.m.Events())
		}
		// A node that went down with it is noticed in the end.
		r.nodes["n2"].set(func(n *fakeNode) { n.cut = true })
		r.restart(time.Second)
		time.Sleep(20 * time.Second)
		if r.store.Snapshot().Nodes["n2"].GetLostTime() == nil || r.events("Replaced") != 1 {
			t.Errorf("a node that never came back: events %v", r.m.Events())
		}
	})
}

func TestPending(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1")
		time.Sleep(time.Second)
		r.want("big", "r1", 3, spec(service, "3"))
		r.expect("big", "n1 r1 waiting")
		p := r.store.Snapshot().Pending["t/big"]
		if len(p) != 1 || p[0].Code != "InsufficientCPU" || p[0].Count != 1 || p[0].Replica != "r1" {
			t.Errorf("pending %+v", p)
		}
		if r.events("Unschedulable") != 1 || r.store.Snapshot().Settled != r.rev {
			t.Errorf("settled %d, events %v", r.store.Snapshot().Settled, r.m.Events())
		}
		r.addNode("n2")
		r.addNode("n3")
		time.Sleep(3 * time.Second)
		r.expect("big", "n1 r1 ready", "n2 r1 ready", "n3 r1 ready")
		if p := r.store.Snapshot().Pending; len(p) != 0 {
			t.Errorf("still pending: %v", p)
		}
	})
}

func TestRegisterNode(t *testing.T) {
	ctx := t.Context()
	m, err := New(Config{Store: mem.New(), Cluster: "eu", CIDR: "10.9.0.0/22"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			if _, err := m.RegisterNode(ctx, fmt.Sprintf("n%d", i), &nodev1.NodeFacts{CpuMilli: 1}, []byte("a")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var cidrs []string
	for _, n := range m.cfg.Store.Snapshot().Nodes {
		cidrs = append(cidrs, n.GetReplicaCidr())
	}
	slices.Sort(cidrs)
	if want := []string{"10.9.1.0/24", "10.9.2.0/24", "10.9.3.0/24"}; !slices.Equal(cidrs, want) {
		t.Errorf("ranges %v, want %v", cidrs, want)
	}
	if _, err := m.RegisterNode(ctx, "n9", nil, nil); api.KindOf(err) != api.Exhausted {
		t.Errorf("a fourth node: %v", err)
	}
	if _, err := m.RegisterNode(ctx, "No_ID", nil, nil); api.KindOf(err) != api.Invalid {
		t.Errorf("a bad name: %v", err)
	}
	was := m.cfg.Store.Snapshot().Nodes["n1"]
	again, err := m.RegisterNode(ctx, "n1", &nodev1.NodeFacts{CpuMilli: 2}, []byte("b"))
	if err != nil || again.GetReplicaCidr() != was.GetReplicaCidr() || again.GetFacts().GetCpuMilli() != 2 || string(again.GetKeyHash()) != "b" {
		t.Errorf("registered again: %v, %v", again, err)
	}
}

func TestDeleteNode(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		n1 := r.addNode("n1")
		r.addNode("n2")
		r.want("web", "r1", 2, spec(service, "500m"))
		time.Sleep(10 * time.Second)
		r.expect("web", "n1 r1 ready", "n2 r1 ready")
		if err := r.m.DeleteNode(t.Context(), "n1", false); api.KindOf(err) != api.Precondition {
			t.Fatalf("a live node: %v", err)
		}
		if err := r.m.DeleteNode(t.Context(), "n9", true); api.KindOf(err) != api.NotFound {
			t.Fatalf("a node that is not there: %v", err)
		}
		n1.set(func(n *fakeNode) { n.cut = true })
		time.Sleep(4 * time.Second)
		if err := r.m.DeleteNode(t.Context(), "n1", false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		r.expect("web", "n2 r1 ready", "n2 r1 ready")
		s := r.store.Snapshot()
		if s.Nodes["n1"] != nil || s.NodeStatus["n1"] != nil || r.events("NodeDeleted") != 1 {
			t.Error("something of the node is left")
		}
		for _, a := range s.Allocations {
			if a.GetNode() == "n1" {
				t.Errorf("%s is still assigned to it", a.GetAllocation())
			}
		}
		r.addNode("n3")
		if got := r.store.Snapshot().Nodes["n3"].GetReplicaCidr(); got != "10.77.1.0/24" {
			t.Errorf("its range was not given again: n3 has %s", got)
		}
		// By force also one that lives.
		if err := r.m.DeleteNode(t.Context(), "n2", true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		r.expect("web", "n3 r1 ready", "n3 r1 ready")
	})
}

func TestKeysOfANode(t *testing.T) {
	now := time.Unix(1000, 0)
	m, err := New(Config{Store: mem.New(), Cluster: "eu", CIDR: "10.9.0.0/22", Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if err := m.RenewNode(ctx, "n1", []byte("k"), now); api.KindOf(err) != api.NotFound {
		t.Errorf("a node that is not there: %v", err)
	}
	if _, err := m.RegisterNode(ctx, "n1", nil, []byte("joined")); err != nil {
		t.Fatal(err)
	}
	keys := func() (out []string) {
		for _, k := range m.cfg.Store.Snapshot().Nodes["n1"].GetRenewedKeys() {
			out = append(out, string(k.GetHash()))
		}
		return out
	}
	for i := range maxNodeKeys {
		if err := m.RenewNode(ctx, "n1", fmt.Append(nil, i), now.Add(time.Duration(i+1)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.RenewNode(ctx, "n1", []byte("more"), now.Add(time.Hour)); api.KindOf(err) != api.Exhausted {
		t.Errorf("one more than the bound: %v", err)
	}
	now = now.Add(14 * time.Hour)
	if err := m.RenewNode(ctx, "n1", []byte("next"), now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := keys(); !slices.Equal(got, []string{"14", "15", "next"}) {
		t.Errorf("keys %v: those whose certificates ended must be gone", got)
	}
	if n, err := m.RegisterNode(ctx, "n1", nil, []byte("again")); err != nil || string(n.GetKeyHash()) != "again" || len(keys()) != 0 {
		t.Errorf("keys of before it joined again count: %v %v %v", n, keys(), err)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{
		{}, {Store: mem.New(), Cluster: "eu", CIDR: "10.0.0.0/24"}, {Store: mem.New(), Cluster: "eu", CIDR: "fd00::/16"}, {Store: mem.New(), Cluster: "EU", CIDR: "10.0.0.0/16"},
	} {
		if _, err := New(c); api.KindOf(err) != api.Invalid {
			t.Errorf("config %+v: %v", c, err)
		}
	}
}

func TestEvents(t *testing.T) {
	m, err := New(Config{Store: mem.New(), Cluster: "eu", CIDR: "10.0.0.0/16", MaxEvents: 5})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		m.AddEvents(&portolanv1.Event{Object: "o", Type: "Killed", Message: "same"})
	}
	if es := m.Events(); len(es) != 1 || es[0].GetCount() != 3 || es[0].GetCluster() != "eu" {
		t.Errorf("events %v", es)
	}
	for i := range 20 {
		m.AddEvents(&portolanv1.Event{Object: "o", Type: "Bound", Message: fmt.Sprint(i)})
	}
	if es := m.Events(); len(es) != 5 || es[4].GetMessage() != "19" {
		t.Errorf("events %v", es)
	}
}

// No field is forgotten when a record is copied.
func TestCopyAllocation(t *testing.T) {
	a := &clusterv1.Allocation{}
	fields := a.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			a.ProtoReflect().Mutable(f).List().Append(protoreflect.ValueOfString(string(f.Name())))
			continue
		case f.IsList():
			a.ProtoReflect().Mutable(f).List().AppendMutable()
			continue
		}
		switch f.Kind() {
		case protoreflect.StringKind:
			a.ProtoReflect().Set(f, protoreflect.ValueOfString(string(f.Name())))
		case protoreflect.Int64Kind:
			a.ProtoReflect().Set(f, protoreflect.ValueOfInt64(7))
		case protoreflect.Int32Kind:
			a.ProtoReflect().Set(f, protoreflect.ValueOfInt32(7))
		case protoreflect.BoolKind:
			a.ProtoReflect().Set(f, protoreflect.ValueOfBool(true))
		case protoreflect.MessageKind:
			a.ProtoReflect().Mutable(f)
		default:
			t.Fatalf("field %s: kind %v is not known here", f.Name(), f.Kind())
		}
	}
	if c := copyAllocation(a); !proto.Equal(a, c) {
		t.Errorf("copied %v to %v", a, c)
	}
}

// TestClustersDrawDifferentNames: a replica's name is asked for over the whole
// fleet, and clusters may be seeded alike.
func TestClustersDrawDifferentNames(t *testing.T) {
	draw := func(cluster string) uint64 {
		m, err := New(Config{Store: mem.New(), Cluster: cluster, CIDR: "10.77.0.0/16", Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		return m.rand.Uint64()
	}
	if draw("eu") == draw("us") {
		t.Error("two clusters with one seed draw the same names")
	}
	if first, again := draw("eu"), draw("eu"); first != again {
		t.Error("names are not repeatable")
	}
}

func TestModes(t *testing.T) {
	story(t, func(t *testing.T, r *rig) {
		r.addNode("n1", "pool=gpu")
		r.addNode("n2", "pool=gpu")
		r.addNode("n3")
		ctx := t.Context()
		for name, err := range map[string]error{
			"neither": r.m.SetMode(ctx, "", "", portolanv1.NodeMode_NODE_MODE_CORDONED, time.Time{}),
			"both":    r.m.SetMode(ctx, "n1", "gpu", portolanv1.NodeMode_NODE_MODE_CORDONED, time.Time{}),
		} {
			if api.KindOf(err) != api.Invalid {
				t.Errorf("%s: %v, want invalid", name, err)
			}
		}
		if err := r.m.SetMode(ctx, "n9", "", portolanv1.NodeMode_NODE_MODE_CORDONED, time.Time{}); api.KindOf(err) != api.NotFound {
			t.Errorf("an unknown node: %v, want not found", err)
		}
		modes := func() string {
			out := ""
			for _, id := range []string{"n1", "n2", "n3"} {
				n := r.store.Snapshot().Nodes[id]
				out += fmt.Sprintf("%s %d %t; ", id, n.GetMode(), n.GetDrainDeadline() != nil)
			}
			return out
		}
		for _, c := range []struct {
			node, pool string
			mode       portolanv1.NodeMode
			deadline   time.Time
			want       string
		}{
			{"", "gpu", portolanv1.NodeMode_NODE_MODE_CORDONED, time.Time{}, "n1 1 false; n2 1 false; n3 0 false; "},
			{"n3", "", portolanv1.NodeMode_NODE_MODE_DRAINING, time.Now().Add(time.Minute), "n1 1 false; n2 1 false; n3 2 true; "},
			{"", "default", portolanv1.NodeMode_NODE_MODE_UNSPECIFIED, time.Time{}, "n1 1 false; n2 1 false; n3 0 false; "},
		} {
			if err := r.m.SetMode(ctx, c.node, c.pool, c.mode, c.deadline); err != nil {
				t.Fatal(err)
			}
			if got := modes(); got != c.want {
				t.Errorf("after %v: %s, want %s", c, got, c.want)
			}
		}
		if r.events("NodeCordoned") != 2 || r.events("NodeDraining") != 1 || r.events("NodeFreed") != 1 {
			t.Errorf("events: %v", r.m.Events())
		}
	})
}

// namesNoNode: what tenants read of their replicas names no node; events have it in
// a field of its own.
func (r *rig) namesNoNode() {
	r.t.Helper()
	names := func(text string) bool {
		words := strings.FieldsFunc(text, func(c rune) bool { return strings.ContainsRune(" :;,.", c) })
		return slices.ContainsFunc(words, func(w string) bool { return r.nodes[w] != nil })
	}
	bound := 0
	for _, e := range r.m.Events() {
		if !strings.HasPrefix(e.GetObject(), "tenants/") {
			continue
		}
		if names(e.GetMessage()) {
			r.t.Errorf("%s of %s names a node: %s", e.GetType(), e.GetObject(), e.GetMessage())
		}
		if e.GetType() == "Bound" {
			if bound++; r.nodes[e.GetNode()] == nil {
				r.t.Errorf("an event does not say on which node %s is", e.GetObject())
			}
		}
	}
	if bound == 0 {
		r.t.Error("nothing was bound")
	}
}

package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
)

// rig is a fleet's store with some replicas of the loop, in a bubble.
type rig struct {
	t     *testing.T
	s     store.Store
	log   bytes.Buffer
	mu    sync.Mutex
	stops map[string]func()
}

// run runs a test in virtual time.
func run(t *testing.T, fn func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, s: mem.New(mem.Config{RunTwice: true}), stops: map[string]func(){}}
		defer func() {
			for _, stop := range r.stops {
				stop()
			}
		}()
		fn(r)
	})
}

func (r *rig) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(p)
}

// start runs a replica over a store, which may be a decorated one.
func (r *rig) start(name string, s store.Store) *Control {
	r.t.Helper()
	c, err := New(Config{Store: s, Holder: name, Log: slog.New(slog.NewTextHandler(r, nil))})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	r.stops[name] = func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run of %s: %v", name, err)
		}
		delete(r.stops, name)
	}
	synctest.Wait()
	return c
}

func (r *rig) update(fn func(tx store.Tx) error) int64 {
	r.t.Helper()
	rev, err := r.s.Update(r.t.Context(), fn)
	if err != nil {
		r.t.Fatal(err)
	}
	synctest.Wait()
	return rev
}

// cluster registers a cluster with cores, ready.
func (r *rig) cluster(id, region string, cores int64) {
	r.t.Helper()
	r.update(func(tx store.Tx) error {
		return errors.Join(
			tx.Put(store.Cluster, "clusters/"+id, &portolanv1.Cluster{Name: "clusters/" + id, Spec: &portolanv1.ClusterSpec{Region: region}}),
			tx.Put(store.ClusterStatus, "clusters/"+id, status(portolanv1.ClusterState_CLUSTER_STATE_READY, cores)),
		)
	})
}

func status(state portolanv1.ClusterState, cores int64) *storev1.ClusterStatusRecord {
	return &storev1.ClusterStatusRecord{Status: &portolanv1.ClusterStatus{
		State: state, CpuMilli: cores * 1000, MemoryBytes: 1 << 40, Nodes: 2, LastSeenTime: timestamppb.Now(),
	}}
}

func (r *rig) state(id string, state portolanv1.ClusterState, cores int64) {
	r.t.Helper()
	r.update(func(tx store.Tx) error { return tx.Put(store.ClusterStatus, "clusters/"+id, status(state, cores)) })
}

const (
	ready = portolanv1.ClusterState_CLUSTER_STATE_READY
	lost  = portolanv1.ClusterState_CLUSTER_STATE_LOST
)

// spec wants replicas of one core each, and no surge.
func spec(replicas int32) *portolanv1.WorkloadSpec {
	one := int32(1)
	return &portolanv1.WorkloadSpec{
		Replicas: &replicas, Update: &portolanv1.WorkloadSpec_UpdateStrategy{MaxUnavailable: &one},
		Containers: []*portolanv1.Container{{Limits: &portolanv1.ResourceList{Cpu: "1", Memory: "1Mi"}}},
		Placement:  &portolanv1.WorkloadSpec_Placement{},
	}
}

// workload stores a workload "tenants/t/workloads/id" and its revision.
func (r *rig) workload(id, revision string, s *portolanv1.WorkloadSpec) int64 {
	r.t.Helper()
	name := api.WorkloadName("t", id)
	return r.update(func(tx store.Tx) error {
		return errors.Join(
			tx.Put(store.Revision, name+"/revisions/"+revision, &portolanv1.WorkloadRevision{Name: name + "/revisions/" + revision, Spec: s}),
			tx.Put(store.Workload, name, &portolanv1.Workload{Name: name, Spec: s, Status: &portolanv1.WorkloadStatus{CurrentRevision: revision}}),
		)
	})
}

// placed writes all placements as "workload@cluster revision×replicas+failover".
func (r *rig) placed() string {
	r.t.Helper()
	var out []string
	used := map[string]int64{}
	if _, err := r.s.View(r.t.Context(), func(rd store.Reader) error {
		for rec, err := range rd.List(store.Placement, store.ListOptions{}) {
			if err != nil {
				return err
			}
			p := rec.Message.(*portolanv1.Placement).GetSpec()
			w := strings.Split(rec.Name, "/")
			text := w[3] + "@" + w[5]
			for _, rev := range p.GetRevisions() {
				text += fmt.Sprintf(" %s×%d", rev.GetRevision(), rev.GetReplicas())
			}
			if extra := place.PreviousOf(p).Failover; extra > 0 {
				text += fmt.Sprintf(" (%d standing in)", extra)
			}
			out = append(out, text)
			used[w[5]] += p.GetReservedCpuMilli()
		}
		for c, n := range used {
			rec, err := rd.Get(store.ClusterStatus, "clusters/"+c)
			if err == nil && n > rec.Message.(*storev1.ClusterStatusRecord).GetStatus().GetCpuMilli() {
				r.t.Errorf("%s is overcommitted: %dm reserved", c, n)
			}
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	sort.Strings(out)
	return strings.Join(out, ", ")
}

func (r *rig) want(when, want string) {
	r.t.Helper()
	synctest.Wait()
	if got := r.placed(); got != want {
		r.t.Errorf("%s:\n got %s\nwant %s\n%s", when, got, want, r.log.String())
	}
}

func (r *rig) lease() store.Lease {
	r.t.Helper()
	all, err := r.s.Leases(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, l := range all {
		if l.Name == PlaceLease {
			return l
		}
	}
	return store.Lease{}
}

func TestPlaces(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 8)
		rev := r.workload("web", "v1", spec(4))
		r.want("placed", "web@eu v1×2, web@us v1×2")
		if got := r.lease().Progress; got < rev {
			t.Errorf("progress %d, the workload is of %d", got, rev)
		}
		before := r.lease().Progress
		r.workload("web", "v2", spec(6))
		r.want("another revision, and more", "web@eu v2×3, web@us v2×3")
		now, err := r.s.View(t.Context(), func(rd store.Reader) error {
			rec, err := rd.Get(store.Placement, "tenants/t/workloads/web/placements/eu")
			if err != nil {
				return err
			}
			p := rec.Message.(*portolanv1.Placement)
			if p.GetGeneration() != 2 || p.GetSpec().GetEpoch() != rec.Revision || p.GetSpec().GetWriterEpoch() != 1 || p.GetSpec().GetReservedCpuMilli() != 3000 || len(p.GetSpec().GetReasons()) == 0 || p.GetRevision() != rec.Revision {
				t.Errorf("the record is %v", p)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := r.lease().Progress; got != now || got <= before {
			t.Errorf("progress %d after %d, the store is at %d", got, before, now)
		}
		r.update(func(tx store.Tx) error { return tx.Delete(store.Workload, "tenants/t/workloads/web") })
		r.want("deleted", "")
	})
}

// TestQuiet: without changes nothing is written, however long.
func TestQuiet(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.start("two", r.s)
		r.cluster("eu", "eu", 8)
		r.workload("web", "v1", spec(4))
		before, err := r.s.View(t.Context(), func(store.Reader) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if after, err := r.s.View(t.Context(), func(store.Reader) error { return nil }); err != nil || after != before {
			t.Errorf("revision %d became %d by itself, %v", before, after, err)
		}
		if l := r.lease(); l.Epoch != 1 || !strings.HasPrefix(l.Holder, "one/") {
			t.Errorf("the lease moved: %+v", l)
		}
	})
}

// TestRoutesKeepRevisions: what a route names runs on, beside the current one.
func TestRoutesKeepRevisions(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.workload("web", "v1", spec(2))
		route := &portolanv1.Route{Spec: &portolanv1.RouteSpec{Service: "shop", Rules: []*portolanv1.RouteRule{{Backends: []*portolanv1.RouteBackend{
			{Revision: "v1", Weight: 90}, {Service: "shop", Revision: "v2", Weight: 10},
		}}}}}
		r.update(func(tx store.Tx) error {
			return errors.Join(
				tx.Put(store.Service, "tenants/t/services/shop", &portolanv1.Service{Spec: &portolanv1.ServiceSpec{Workload: "web"}}),
				tx.Put(store.Route, "tenants/t/routes/shop", route))
		})
		r.workload("web", "v2", spec(2))
		r.want("canary", "web@eu v2×2 v1×2")
		r.workload("web", "v3", spec(2))
		r.want("a third, which fits as well", "web@eu v3×2 v1×2 v2×2")
		r.update(func(tx store.Tx) error { return tx.Delete(store.Route, "tenants/t/routes/shop") })
		r.want("no route names the old ones", "web@eu v3×2")
	})
}

func TestCapacity(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 4)
		for i := range 5 {
			r.workload(fmt.Sprintf("w%d", i), "v1", spec(1))
		}
		r.want("four of five", "w0@eu v1×1, w1@eu v1×1, w2@eu v1×1, w3@eu v1×1")
		r.update(func(tx store.Tx) error { return tx.Delete(store.Workload, "tenants/t/workloads/w1") })
		r.want("room is used as soon as it is there", "w0@eu v1×1, w2@eu v1×1, w3@eu v1×1, w4@eu v1×1")
		r.workload("w5", "v1", spec(2))
		r.state("eu", ready, 5)
		r.want("one more core, one more replica", "w0@eu v1×1, w2@eu v1×1, w3@eu v1×1, w4@eu v1×1, w5@eu v1×1")
		r.workload("w0", "v1", spec(0))
		r.want("scaling down makes room", "w2@eu v1×1, w3@eu v1×1, w4@eu v1×1, w5@eu v1×2")
		r.cluster("us", "us", 1)
		r.workload("w6", "v1", spec(3))
		r.want("the rest waits", "w2@eu v1×1, w3@eu v1×1, w4@eu v1×1, w5@eu v1×2, w6@us v1×1")
	})
}

func TestResidencyAndCordon(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 8)
		r.workload("web", "v1", spec(4))
		r.update(func(tx store.Tx) error {
			return tx.Put(store.Tenant, "tenants/t", &portolanv1.Tenant{Spec: &portolanv1.TenantSpec{AllowedRegions: []string{"us"}}})
		})
		r.want("residency moves them", "web@us v1×4")
		r.update(func(tx store.Tx) error { return tx.Delete(store.Cluster, "clusters/us") })
		r.want("no cluster is left", "")
	})
}

func TestFailover(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 8)
		s := spec(4)
		s.Placement.Failover = &portolanv1.WorkloadSpec_Failover{After: durationpb.New(5 * time.Second)}
		r.workload("web", "v1", s)
		r.workload("plain", "v1", spec(2))
		r.state("eu", lost, 8)
		r.want("not yet", "plain@eu v1×1, plain@us v1×1, web@eu v1×2, web@us v1×2")
		time.Sleep(5*time.Second - 1)
		r.want("not yet", "plain@eu v1×1, plain@us v1×1, web@eu v1×2, web@us v1×2")
		time.Sleep(time.Nanosecond)
		r.want("due", "plain@eu v1×1, plain@us v1×1, web@eu v1×2, web@us v1×4 (2 standing in)")
		r.state("eu", ready, 8)
		r.want("back, but nothing is ready there", "plain@eu v1×1, plain@us v1×1, web@eu v1×2, web@us v1×4 (2 standing in)")
		for n := range int32(3) {
			r.update(func(tx store.Tx) error {
				return tx.Put(store.PlacementStatus, "tenants/t/workloads/web/placements/eu", &storev1.PlacementStatusRecord{
					Status: &portolanv1.PlacementStatus{Revisions: []*portolanv1.RevisionReplicas{{Revision: "v1", ReadyReplicas: n}}},
				})
			})
		}
		r.want("as declared", "plain@eu v1×1, plain@us v1×1, web@eu v1×2, web@us v1×2")
	})
}

// TestAllDark: if everything looks dead, nothing is done.
func TestAllDark(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 8)
		s := spec(4)
		s.Placement.Failover = &portolanv1.WorkloadSpec_Failover{}
		r.workload("web", "v1", s)
		r.update(func(tx store.Tx) error {
			return errors.Join(tx.Put(store.ClusterStatus, "clusters/eu", status(lost, 8)), tx.Put(store.ClusterStatus, "clusters/us", status(lost, 8)))
		})
		time.Sleep(time.Minute)
		r.want("everything is dark", "web@eu v1×2, web@us v1×2")
		r.state("us", ready, 8)
		time.Sleep(time.Minute)
		r.want("one is back", "web@eu v1×2, web@us v1×4 (2 standing in)")
	})
}

// TestStandby: the second replica does nothing until the first gives up or falls
// silent.
func TestStandby(t *testing.T) {
	run(t, func(r *rig) {
		cut := &cutStore{Store: r.s}
		r.start("one", cut)
		r.start("two", r.s)
		r.cluster("eu", "eu", 8)
		r.workload("web", "v1", spec(1))
		if l := r.lease(); !strings.HasPrefix(l.Holder, "one/") || l.Epoch != 1 {
			t.Fatalf("lease %+v", l)
		}
		cut.set(true)
		r.workload("web", "v1", spec(2))
		r.want("the holder is cut off", "web@eu v1×1")
		time.Sleep(4 * time.Second)
		r.want("the other one took over", "web@eu v1×2")
		if l := r.lease(); !strings.HasPrefix(l.Holder, "two/") || l.Epoch != 2 {
			t.Errorf("lease %+v", l)
		}
		cut.set(false)
		time.Sleep(10 * time.Second)
		r.workload("web", "v1", spec(3))
		r.want("one decides", "web@eu v1×3")
		r.stops["two"]()
		time.Sleep(time.Second)
		r.workload("web", "v1", spec(4))
		r.want("who leaves gives the lease up", "web@eu v1×4")
		if l := r.lease(); !strings.HasPrefix(l.Holder, "one/") || l.Epoch != 3 {
			t.Errorf("lease %+v", l)
		}
	})
}

// TestFenced: a holder that was held up while deciding commits nothing once its
// epoch is over.
func TestFenced(t *testing.T) {
	run(t, func(r *rig) {
		slow := &slowStore{Store: r.s, entered: make(chan struct{}), resume: make(chan struct{})}
		r.cluster("eu", "eu", 8)
		r.workload("web", "v1", spec(1))
		r.start("one", slow)
		<-slow.entered // it decided one replica, and hangs before its transaction
		r.start("two", r.s)
		r.workload("web", "v1", spec(2))
		time.Sleep(4 * time.Second)
		r.want("the other one decided", "web@eu v1×2")
		close(slow.resume)
		r.want("the late write is refused", "web@eu v1×2")
		if slow.err == nil || api.KindOf(slow.err) != api.Conflict {
			t.Errorf("the late transaction ended with %v, want a conflict", slow.err)
		}
		time.Sleep(time.Minute)
		r.want("and not repeated", "web@eu v1×2")
	})
}

// TestOvertaken: a cluster that shrinks between decision and commit is not
// overcommitted.
func TestOvertaken(t *testing.T) {
	run(t, func(r *rig) {
		slow := &slowStore{Store: r.s, entered: make(chan struct{}), resume: make(chan struct{})}
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 8)
		r.workload("web", "v1", spec(8))
		r.workload("other", "v1", spec(1))
		r.start("one", slow)
		<-slow.entered
		r.state("eu", ready, 2)
		r.workload("other", "v2", spec(1))
		close(slow.resume)
		time.Sleep(time.Second)
		r.want("decided again", "other@eu v2×1, web@eu v1×1, web@us v1×7")
		if api.KindOf(slow.err) != api.Conflict {
			t.Errorf("the overtaken transaction ended with %v, want a conflict", slow.err)
		}
	})
}

// TestStoreGone: errors of the store are outlived.
func TestStoreGone(t *testing.T) {
	run(t, func(r *rig) {
		cut := &cutStore{Store: r.s}
		cut.set(true)
		r.start("one", cut)
		r.cluster("eu", "eu", 8)
		r.workload("web", "v1", spec(1))
		time.Sleep(time.Minute)
		r.want("the store is gone", "")
		cut.set(false)
		time.Sleep(5 * time.Second)
		r.want("it is back", "web@eu v1×1")
	})
}

func TestDaemon(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		s := spec(0)
		s.Kind, s.Replicas = portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON, nil
		r.workload("agent", "v1", s)
		r.cluster("us", "us", 8)
		r.want("in each", "agent@eu v1×0, agent@us v1×0")
		more := status(ready, 8)
		more.Status.Nodes = 5
		r.update(func(tx store.Tx) error { return tx.Put(store.ClusterStatus, "clusters/eu", more) })
		_, err := r.s.View(t.Context(), func(rd store.Reader) error {
			rec, err := rd.Get(store.Placement, "tenants/t/workloads/agent/placements/eu")
			if err == nil && (rec.Message.(*portolanv1.Placement).GetSpec().GetReservedCpuMilli() != 5000 || !rec.Message.(*portolanv1.Placement).GetSpec().GetDaemon()) {
				t.Errorf("five nodes are not reserved for: %v", rec.Message)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestExplain(t *testing.T) {
	run(t, func(r *rig) {
		c := r.start("one", r.s)
		r.cluster("eu", "eu", 8)
		r.cluster("us", "us", 1)
		r.workload("web", "v1", spec(2))
		w := &portolanv1.Workload{Name: "tenants/t/workloads/web", Spec: spec(20), Generation: 1}
		before := r.placed()
		_, err := r.s.View(t.Context(), func(rd store.Reader) error {
			got, err := c.Explain(rd, w)
			if err != nil {
				return err
			}
			if got.GetDesiredReplicas() != 20 || got.GetUnplacedReplicas() != 11 || len(got.GetClusters()) != 2 || got.GetClusters()[0].GetReplicas() != 8 || len(got.GetClusters()[1].GetReasons()) == 0 {
				t.Errorf("got %v", got)
			}
			if rs := got.GetReasons(); len(rs) != 1 || rs[0].GetCode() != place.Capacity || rs[0].GetCount() != 11 || got.GetScoreOf() != portolanv1.Objective_OBJECTIVE_COST {
				t.Errorf("about no single cluster it says %v, scores are of %v", rs, got.GetScoreOf())
			}
			w.Spec.Containers[0].Limits.Cpu = "lots"
			_, err = c.Explain(rd, w)
			if api.KindOf(err) != api.Invalid {
				t.Errorf("a broken quantity: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		r.want("explaining changes nothing", before)
	})
}

func TestConfig(t *testing.T) {
	_, err := New(Config{MaxBatch: -1})
	for _, want := range []string{"a store is required", "a holder is required", "a log is required", "batch"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
}

// cutStore fails every call while it is cut.
type cutStore struct {
	store.Store
	mu  sync.Mutex
	cut bool
}

func (c *cutStore) set(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
}

func (c *cutStore) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return api.E(api.Unavailable, "test", "cut off")
	}
	return nil
}

func (c *cutStore) View(ctx context.Context, fn func(store.Reader) error) (int64, error) {
	if err := c.err(); err != nil {
		return 0, err
	}
	return c.Store.View(ctx, fn)
}

func (c *cutStore) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	if err := c.err(); err != nil {
		return 0, err
	}
	return c.Store.Update(ctx, fn)
}

func (c *cutStore) Acquire(ctx context.Context, name, holder string, ttl time.Duration, progress int64) (store.Lease, error) {
	if err := c.err(); err != nil {
		return store.Lease{}, err
	}
	return c.Store.Acquire(ctx, name, holder, ttl, progress)
}

func (c *cutStore) Watch(ctx context.Context, from int64, f store.WatchFilter) (store.Watcher, error) {
	if err := c.err(); err != nil {
		return nil, err
	}
	return c.Store.Watch(ctx, from, f)
}

// slowStore holds the first Update up until it may resume, whatever its context
// says, as a process that was stopped would.
type slowStore struct {
	store.Store
	once            sync.Once
	entered, resume chan struct{}
	err             error
}

func (s *slowStore) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	first := false
	s.once.Do(func() { first = true })
	if !first {
		return s.Store.Update(ctx, fn)
	}
	close(s.entered)
	<-s.resume
	rev, err := s.Store.Update(context.WithoutCancel(ctx), fn)
	s.err = err
	return rev, err
}

// TestMany: a burst over full clusters never overcommits, and ends settled.
func TestMany(t *testing.T) {
	run(t, func(r *rig) {
		r.start("one", r.s)
		for i := range 4 {
			r.cluster(fmt.Sprintf("c%d", i), "eu", 50)
		}
		r.update(func(tx store.Tx) error {
			for i := range 300 {
				name := fmt.Sprintf("tenants/t/workloads/w%03d", i)
				if err := tx.Put(store.Workload, name, &portolanv1.Workload{Name: name, Spec: proto.CloneOf(spec(1)), Generation: 1}); err != nil {
					return err
				}
			}
			return nil
		})
		if n := len(strings.Split(r.placed(), ", ")); n != 200 {
			t.Errorf("%d placed, want all 200 that fit", n)
		}
	})
}

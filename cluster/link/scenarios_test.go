package link_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/fleet"
	"github.com/portolan-io/portolan/federation/store"
)

func TestWatermarkReachesTheClusterAndComesBackWithoutChurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, "eu")
		eu := w.clusters["eu"]
		w.eventually(time.Second, "eu is ready", func() bool { return w.clusterState("eu") == ready })
		began := time.Now()
		rev := w.shop("eu")
		w.eventually(50*time.Millisecond, "the intents are there", func() bool {
			s := eu.state.Snapshot()
			return s.IntentRevision >= rev && s.Intents["workload/shop/web"] != nil && s.Intents["service/shop/web"] != nil
		})
		w.eventually(100*time.Millisecond, "applied is known above", func() bool { return w.progress("eu") >= rev })
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("there and back took %v", took)
		}
		// A placement's status record appears at once: permits live as long as it.
		w.eventually(100*time.Millisecond, "status record", func() bool {
			_, ok := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", "eu"))
			return ok
		})
		eu.run(t)
		w.eventually(100*time.Millisecond, "readiness is known above", func() bool {
			p, _ := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", "eu"))
			return len(p.GetStatus().GetRevisions()) == 1 && p.GetStatus().GetRevisions()[0].GetReadyReplicas() == 1 && p.GetStatus().GetObservedGeneration() == 1
		})
		w.eventually(100*time.Millisecond, "capacity is known above", func() bool {
			c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
			return c.GetStatus().GetCpuMilli() == 4000 && c.GetStatus().GetNodesReady() == 1
		})
		<-time.After(time.Second)
		synctest.Wait()
		quiet := w.revision()
		<-time.After(time.Minute)
		synctest.Wait()
		if now := w.revision(); now != quiet {
			t.Errorf("a quiet minute made %d revisions", now-quiet)
		}
		if p := w.progress("eu"); p != quiet {
			t.Errorf("applied is %d, not the newest revision %d", p, quiet)
		}
	})
}

func TestLaggingNodeHoldsTheClusterBackAndIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, "eu")
		eu := w.clusters["eu"]
		eu.run(t)
		eu.observe(t, 0, "web-aaaaa")
		rev := w.shop("eu")
		w.eventually(time.Second, "intents", func() bool { return eu.state.Snapshot().Settled >= rev })
		<-time.After(2 * time.Second)
		if p := w.progress("eu"); p >= rev {
			t.Fatalf("progress is %d although the node has applied nothing", p)
		}
		for name, r := range w.replicas {
			cc, ok := r.fleet.Conn("eu")
			if !ok {
				t.Fatalf("replica %s has no tunnel", name)
			}
			resp, err := linkv1.NewClusterAdminServiceClient(cc).ListLaggards(t.Context(), &linkv1.ListLaggardsRequest{Revision: rev})
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.GetLaggards()) != 1 || resp.GetLaggards()[0].GetName() != "clusters/eu/nodes/n1" {
				t.Errorf("laggards: %v", resp.GetLaggards())
			}
		}
		eu.observe(t, rev, "web-aaaaa")
		w.eventually(100*time.Millisecond, "progress", func() bool { return w.progress("eu") >= rev })
	})
}

func TestClusterLostAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, "eu", "us")
		w.eventually(time.Second, "both are ready", func() bool { return w.clusterState("eu") == ready && w.clusterState("us") == ready })
		w.shop("eu", "us")
		for _, c := range w.clusters {
			c.run(t)
		}
		export := func() *linkv1.ServiceExport {
			e, _ := get[*linkv1.ServiceExport](w, store.ServiceExport, fleet.ExportName("shop", "web", "eu"))
			return e
		}
		w.eventually(time.Second, "eu's export is known to us", func() bool {
			e := w.clusters["us"].state.Snapshot().Intents["export/eu/shop/web"].GetExport()
			return e.GetHealthy() && len(e.GetGateways()) == 1 && e.GetGateways()[0] == "10.0.0.1:15443" && e.GetRegion() == "eu-region"
		})
		readiness := func() int32 {
			p, _ := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", "eu"))
			return p.GetStatus().GetRevisions()[0].GetReadyReplicas()
		}
		if readiness() == 0 {
			t.Error("eu has no ready replica")
		}
		w.clusters["eu"].setCut(true)
		cut := time.Now()
		w.eventually(6*time.Second, "eu is lost", func() bool { return w.clusterState("eu") == lost })
		if took := time.Since(cut); took < 2*time.Second {
			t.Errorf("lost after %v already", took)
		}
		if export().GetHealthy() {
			t.Error("a lost cluster's export is healthy")
		}
		w.eventually(time.Second, "us was told", func() bool {
			e := w.clusters["us"].state.Snapshot().Intents["export/eu/shop/web"].GetExport()
			return e != nil && !e.GetHealthy()
		})
		if w.clusterState("us") != ready {
			t.Error("us is not ready")
		}
		// The stream of before the cut hangs for long; what it knows says nothing.
		rev := w.revision()
		for range 100 {
			<-time.After(50 * time.Millisecond)
			if w.clusterState("eu") != lost || export().GetHealthy() || readiness() != 0 {
				t.Fatalf("eu is taken for alive again %v after the cut", time.Since(cut))
			}
		}
		if got := w.revision(); got > rev+2 {
			t.Errorf("%d revisions while nothing happened", got-rev)
		}
		w.clusters["eu"].setCut(false)
		w.eventually(5*time.Second, "eu is back", func() bool { return w.clusterState("eu") == ready && export().GetHealthy() && readiness() > 0 })
	})
}

func TestEverythingSilentIsNoReasonToAct(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, "eu", "us")
		w.eventually(time.Second, "both are ready", func() bool { return w.clusterState("eu") == ready && w.clusterState("us") == ready })
		w.clusters["eu"].setCut(true)
		w.clusters["us"].setCut(true)
		<-time.After(time.Minute)
		synctest.Wait()
		if w.clusterState("eu") != ready || w.clusterState("us") != ready {
			t.Error("a cluster was marked although all were silent at once")
		}
	})
}

func TestDeathOfAReplicaLosesNoCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, "eu", "us")
		w.eventually(time.Second, "both are ready", func() bool { return w.clusterState("eu") == ready && w.clusterState("us") == ready })
		w.kill(w.replicas["fed-0"])
		died := time.Now()
		rev := w.shop("eu")
		w.eventually(time.Second, "the other replica serves", func() bool { return w.clusters["eu"].state.Snapshot().IntentRevision >= rev && w.progress("eu") >= rev })
		for time.Since(died) < 20*time.Second {
			<-time.After(100 * time.Millisecond)
			if w.clusterState("eu") != ready || w.clusterState("us") != ready {
				t.Fatalf("a cluster was lost %v after a replica's death", time.Since(died))
			}
		}
	})
}

func TestFrozenReplicaIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, "eu", "us")
		eu := w.clusters["eu"]
		w.eventually(time.Second, "both are ready", func() bool { return w.clusterState("eu") == ready && w.clusterState("us") == ready })
		// No connection breaks: nothing comes from fed-0 any more, that is all.
		eu.mu.Lock()
		eu.dark = "fed-0"
		eu.mu.Unlock()
		froze := time.Now()
		rev := w.shop("eu")
		w.eventually(3*time.Second, "the other replica serves", func() bool { return eu.state.Snapshot().IntentRevision >= rev && w.progress("eu") >= rev })
		for time.Since(froze) < 10*time.Second {
			<-time.After(100 * time.Millisecond)
			if w.clusterState("eu") != ready {
				t.Fatalf("eu was lost %v after one replica froze", time.Since(froze))
			}
		}
	})
}

func TestPermitGoesWhenTheStopIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, "eu", "us")
		w.shop("eu", "us")
		for _, c := range w.clusters {
			c.run(t)
		}
		eu, us := w.clusters["eu"].state, w.clusters["us"].state
		permitted := func() bool { return eu.Snapshot().Intents["permit/shop/web/us"] != nil }
		w.eventually(time.Second, "us may call", func() bool {
			p, _ := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", "us"))
			return permitted() && len(p.GetStatus().GetRevisions()) > 0
		})
		rev := w.update(func(tx store.Tx) error { return tx.Delete(store.Placement, api.PlacementName("shop", "web", "us")) })
		w.eventually(time.Second, "us knows of the end", func() bool { return us.Snapshot().Intents["workload/shop/web"] == nil && w.progress("us") >= rev })
		<-time.After(5 * time.Second)
		if !permitted() {
			t.Fatal("the permit went although a replica runs")
		}
		if err := us.Commit(t.Context(), stop(us.Snapshot().Generation, "web-aaaaa")); err != nil {
			t.Fatal(err)
		}
		w.eventually(time.Second, "the permit is gone", func() bool { return !permitted() })
		w.eventually(time.Second, "the export is gone", func() bool {
			_, ok := get[*linkv1.ServiceExport](w, store.ServiceExport, fleet.ExportName("shop", "web", "us"))
			return !ok
		})
	})
}

func TestRefusedIntentIsQuarantinedAloneAndKnownAbove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, "eu")
		eu := w.clusters["eu"]
		w.shop("eu")
		w.eventually(time.Second, "the service is there", func() bool { return eu.state.Snapshot().Intents["service/shop/web"] != nil })
		name := api.ServiceName("shop", "web")
		rev := w.update(func(tx store.Tx) error {
			if err := tx.Put(store.Service, api.ServiceName("shop", "other"), &portolanv1.Service{Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 1}}}}); err != nil {
				return err
			}
			return tx.Put(store.Service, name, &portolanv1.Service{Spec: &portolanv1.ServiceSpec{}})
		})
		w.eventually(time.Second, "the rest is there", func() bool {
			s := eu.state.Snapshot()
			return s.IntentRevision >= rev && s.Intents["service/shop/other"] != nil
		})
		if got := eu.state.Snapshot().Intents["service/shop/web"].GetService().GetSpec().GetPorts(); len(got) != 1 {
			t.Errorf("the last good one did not stay: %v", got)
		}
		nack := func() *storev1.NackRecord {
			n, _ := get[*storev1.NackRecord](w, store.Nack, "service/shop/web@eu")
			return n
		}
		w.eventually(time.Second, "the refusal is known above", func() bool { return nack() != nil })
		if n := nack(); n.GetConsumer() != "clusters/eu" || n.GetMessage() != "service.spec.ports: must not be empty" {
			t.Errorf("nack %v", n)
		}
		w.put(store.Service, name, &portolanv1.Service{Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 81}}}})
		w.eventually(time.Second, "the refusal is over", func() bool { return nack() == nil })
	})
}

// raw opens a report stream by hand.
func (w *world) raw(c string) (linkv1.LinkService_ReportClient, context.CancelFunc) {
	w.t.Helper()
	cc, err := w.dial(&cluster{id: c, wires: map[*wire]int{}}, "fed-0")
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	s, err := linkv1.NewLinkServiceClient(cc).Report(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return s, func() { cancel(); _ = cc.Close() }
}

// exchange sends one report and gives the answer.
func exchange(t *testing.T, s linkv1.LinkService_ReportClient, m *linkv1.StatusReport) *linkv1.ReportAck {
	t.Helper()
	if err := s.Send(m); err != nil {
		t.Fatal(err)
	}
	a, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if a.GetSequence() != m.GetSequence() {
		t.Fatalf("answer to %d, not to %d", a.GetSequence(), m.GetSequence())
	}
	return a
}

func TestGapIsAnsweredByResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu"})
		synctest.Wait()
		<-time.After(time.Second)
		s, end := w.raw("eu")
		defer end()
		if !exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 1}).GetResync() {
			t.Error("a delta without a base was taken")
		}
		if exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 2, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 1}}).GetResync() {
			t.Error("a full report was refused")
		}
		if exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 3, Cluster: &linkv1.ClusterSummary{Nodes: 2}}).GetResync() {
			t.Error("the next delta was refused")
		}
		nodes := func() int32 {
			c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
			return c.GetStatus().GetNodes()
		}
		w.eventually(time.Second, "two nodes", func() bool { return nodes() == 2 })
		if !exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 5, Cluster: &linkv1.ClusterSummary{Nodes: 9}}).GetResync() {
			t.Error("a gap was not noticed")
		}
		if !exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 6, Cluster: &linkv1.ClusterSummary{Nodes: 9}}).GetResync() {
			t.Error("a delta after a gap was taken")
		}
		<-time.After(time.Second)
		if nodes() != 2 {
			t.Error("what came after the gap was stored")
		}
		exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 7, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 3}})
		w.eventually(time.Second, "three nodes", func() bool { return nodes() == 3 })
	})
}

// All that a cluster sums up about itself is in its status, field by field of the
// same name.
func TestTheWholeSummaryIsTheStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu"})
		synctest.Wait()
		<-time.After(time.Second)
		s, end := w.raw("eu")
		defer end()
		sum := &linkv1.ClusterSummary{
			CpuMilli: 8000, MemoryBytes: 32 << 30, Nodes: 3, NodesReady: 2,
			GatewayAddresses: []string{"192.0.2.1:7443"}, IngressAddresses: []string{"192.0.2.1:8080"},
			Pools: []*portolanv1.PoolStatus{{Pool: "spot", Nodes: 2, NodesReady: 2, CpuMilli: 8000, Spot: true, CpuCoreHourMicros: 9000, Devices: map[string]int32{"gpu/T4": 2}, WantedNodes: 1}},
		}
		// One is kept in the lease row, the other only read through.
		elsewhere := map[protoreflect.Name]bool{"applied_revision": true, "laggards": true}
		fields := sum.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			if f := fields.Get(i); !elsewhere[f.Name()] && !sum.ProtoReflect().Has(f) {
				t.Fatalf("the summary of this test lacks %s", f.Name())
			}
		}
		exchange(t, s, &linkv1.StatusReport{Session: 5, Sequence: 1, Full: true, Cluster: proto.CloneOf(sum)})
		w.eventually(time.Second, "three nodes", func() bool {
			c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
			return c.GetStatus().GetNodes() == 3
		})
		c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
		status := c.GetStatus().ProtoReflect()
		for i := range fields.Len() {
			f := fields.Get(i)
			is := status.Descriptor().Fields().ByName(f.Name())
			if is == nil || elsewhere[f.Name()] {
				continue
			}
			if !status.Get(is).Equal(sum.ProtoReflect().Get(f)) {
				t.Errorf("%s was reported as %v, and is %v", f.Name(), sum.ProtoReflect().Get(f), status.Get(is))
			}
		}
	})
}

func TestOlderSessionIsFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu"})
		<-time.After(time.Second)
		old, endOld := w.raw("eu")
		defer endOld()
		exchange(t, old, &linkv1.StatusReport{Session: 7, Sequence: 1, Full: true})
		fresh, endFresh := w.raw("eu")
		exchange(t, fresh, &linkv1.StatusReport{Session: 8, Sequence: 1, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 4}})
		if _, err := old.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older stream ended with %v", err)
		}
		w.eventually(time.Second, "session 8 is stored", func() bool {
			c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
			return c.GetStatus().GetSession() == 8
		})
		endFresh()
		<-time.After(time.Second)
		// Nobody is connected now: only the record knows of session 8.
		late, endLate := w.raw("eu")
		defer endLate()
		if err := late.Send(&linkv1.StatusReport{Session: 7, Sequence: 1, Full: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := late.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older session was answered with %v", err)
		}
	})
}

func TestForeignReportsAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		for _, c := range []string{"eu", "us"} {
			w.put(store.Cluster, api.ClusterName(c), &portolanv1.Cluster{Name: api.ClusterName(c)})
		}
		w.shop("us")
		<-time.After(time.Second)
		s, end := w.raw("eu")
		defer end()
		exchange(t, s, &linkv1.StatusReport{
			Session: 1, Sequence: 1, Full: true,
			Exports:   []*linkv1.ServiceExport{{Cluster: "us", Tenant: "shop", Service: "web", Healthy: true, Gateways: []string{"6.6.6.6:1"}}},
			Workloads: []*linkv1.WorkloadStatusReport{{Tenant: "shop", Workload: "web", Epoch: 9}},
			Nacks: []*linkv1.Nack{
				{Resource: "service/shop/web", Consumer: "clusters/us", Message: "a lie"},
				{Resource: "policy/tenants/shop/policyBundles/p", Message: "a lie"},
				{Resource: "policy/policyBundles/nowhere", Message: "a lie"},
				{Resource: "bundle/" + fleetDomain, Consumer: "clusters/us/nodes/n1", Message: "it is told this"},
			},
		})
		<-time.After(time.Second)
		synctest.Wait()
		for _, c := range []string{"eu", "us"} {
			if _, ok := get[*linkv1.ServiceExport](w, store.ServiceExport, fleet.ExportName("shop", "web", c)); ok {
				t.Errorf("an export of %s was stored", c)
			}
			if p, _ := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", c)); p.GetEpoch() != 0 {
				t.Errorf("a status of %s was stored", c)
			}
		}
		if w.clusterState("eu") != ready {
			t.Error("the rest of the report was dropped too")
		}
		for _, res := range []string{"service/shop/web", "policy/tenants/shop/policyBundles/p", "policy/policyBundles/nowhere"} {
			if _, ok := get[*storev1.NackRecord](w, store.Nack, res+"@eu"); ok {
				t.Errorf("a refusal of %s was stored, which eu is not told", res)
			}
		}
		if n, ok := get[*storev1.NackRecord](w, store.Nack, "bundle/"+fleetDomain+"@eu"); !ok || n.GetConsumer() != "clusters/eu" {
			t.Errorf("eu's own refusal: %v", n)
		}
	})
}

func TestReportsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu"})
		w.shop("eu")
		w.put(store.Revision, api.RevisionName("shop", "web", "r0"), &portolanv1.WorkloadRevision{Spec: &portolanv1.WorkloadSpec{}})
		<-time.After(time.Second)
		s, end := w.raw("eu")
		defer end()
		long := strings.Repeat("x", 1<<20)
		m := &linkv1.StatusReport{
			Session: 1, Sequence: 1, Full: true, Cluster: &linkv1.ClusterSummary{},
			Workloads: []*linkv1.WorkloadStatusReport{{
				Tenant: "shop", Workload: "web", Epoch: 1, Conditions: []*portolanv1.Condition{{Type: "Halted", Message: long}},
				Revisions: []*portolanv1.RevisionReplicas{
					{Revision: "r1", Replicas: 1, ReadyReplicas: 1}, {Revision: "r0", Replicas: 2}, // r0 is on its way out
					{Revision: "made-up", Replicas: 1000}, {Revision: "r1", Replicas: 1000}, {Revision: long},
				},
			}},
		}
		for i := range 1000 {
			m.Cluster.IngressAddresses = append(m.Cluster.IngressAddresses, fmt.Sprintf("10.0.0.1:%d", i))
		}
		exchange(t, s, m)
		<-time.After(time.Second)
		synctest.Wait()
		p, _ := get[*storev1.PlacementStatusRecord](w, store.PlacementStatus, api.PlacementName("shop", "web", "eu"))
		st := p.GetStatus()
		if len(st.GetConditions()) != 1 || len(st.GetConditions()[0].GetMessage()) > 4096 {
			t.Error("a condition of a megabyte was stored")
		}
		if r := st.GetRevisions(); len(r) != 2 || r[0].GetRevision() != "r1" || r[0].GetReplicas() != 1 || r[1].GetRevision() != "r0" {
			t.Errorf("%d revisions were stored", len(r))
		}
		c, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
		if n := len(c.GetStatus().GetIngressAddresses()); n == 0 || n > api.MaxListItems {
			t.Errorf("%d addresses were stored", n)
		}
	})
}

func TestOnlyClustersOfTheFleetReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		<-time.After(time.Second)
		s, end := w.raw("nowhere")
		defer end()
		_ = s.Send(&linkv1.StatusReport{Session: 1, Sequence: 1, Full: true})
		if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("answered with %v", err)
		}
	})
}

// left lists what is said of a cluster.
func (w *world) left(cluster string) (out []string) {
	w.t.Helper()
	if _, err := w.store.View(w.ctx, func(r store.Reader) error {
		out = nil
		for _, kind := range []store.Kind{store.ClusterStatus, store.PlacementStatus, store.ServiceExport, store.Nack} {
			for rec, err := range r.List(kind, store.ListOptions{}) {
				if err != nil {
					return err
				}
				if strings.HasSuffix(rec.Name, "/"+cluster) || strings.HasSuffix(rec.Name, "@"+cluster) {
					out = append(out, rec.Name)
				}
			}
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

func TestDeletedClusterIsCutOffAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, "eu", "us")
		w.shop("eu", "us")
		for _, c := range w.clusters {
			c.run(t)
		}
		w.put(store.Service, api.ServiceName("shop", "web"), &portolanv1.Service{Spec: &portolanv1.ServiceSpec{Ports: []*portolanv1.ServicePort{{Port: 80}}}})
		w.put(store.Service, api.ServiceName("shop", "odd"), &portolanv1.Service{Spec: &portolanv1.ServiceSpec{}})
		w.eventually(2*time.Second, "all is said of eu", func() bool { return len(w.left("eu")) == 4 })
		// By hand, because a link tries again at once.
		w.put(store.Cluster, "clusters/ap", &portolanv1.Cluster{Name: "clusters/ap"})
		<-time.After(time.Second)
		hand, end := w.raw("ap")
		defer end()
		exchange(t, hand, &linkv1.StatusReport{Session: 1, Sequence: 1, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 9}})
		cc, err := w.dial(&cluster{id: "ap", wires: map[*wire]int{}}, "fed-1")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cc.Close() }()
		pipe, err := linkv1.NewLinkServiceClient(cc).Tunnel(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.update(func(tx store.Tx) error {
			if err := tx.Delete(store.Placement, api.PlacementName("shop", "web", "eu")); err != nil {
				return err
			}
			if err := tx.Delete(store.Cluster, "clusters/ap"); err != nil {
				return err
			}
			return tx.Delete(store.Cluster, "clusters/eu")
		})
		if _, err := hand.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the report stream ended with %v", err)
		}
		for err == nil {
			_, err = pipe.Recv()
		}
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("the tunnel ended with %v", err)
		}
		w.eventually(time.Second, "what was open of eu is closed", func() bool {
			for _, r := range w.replicas {
				st, _ := r.fleet.Status("eu")
				if slices.Contains(r.fleet.Connected(), "eu") || st.Connected {
					return false
				}
			}
			return true
		})
		w.eventually(time.Second, "nothing is said of eu", func() bool { return len(w.left("eu"))+len(w.left("ap")) == 0 })
		if len(w.left("us")) != 4 {
			t.Errorf("of us there is left: %v", w.left("us"))
		}
		<-time.After(5 * time.Second) // eu's link goes on trying
		synctest.Wait()
		if got := w.left("eu"); len(got) != 0 {
			t.Errorf("it came back: %v", got)
		}
	})
}

func TestClusterMadeAgainBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu", Uid: "first"})
		<-time.After(time.Second)
		first, end := w.raw("eu")
		defer end()
		exchange(t, first, &linkv1.StatusReport{Session: 7, Sequence: 1, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 9}})
		w.eventually(time.Second, "the first is ready", func() bool { return w.clusterState("eu") == ready })
		// Nobody can look between these two.
		w.update(func(tx store.Tx) error { return tx.Delete(store.Cluster, "clusters/eu") })
		w.put(store.Cluster, "clusters/eu", &portolanv1.Cluster{Name: "clusters/eu", Uid: "second"})
		if _, err := first.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the first's stream ended with %v", err)
		}
		w.eventually(time.Second, "nothing of the first counts", func() bool { return len(w.left("eu")) == 0 })
		second, end2 := w.raw("eu")
		defer end2()
		// An older number than the first's: there is no order between them.
		exchange(t, second, &linkv1.StatusReport{Session: 2, Sequence: 1, Full: true, Cluster: &linkv1.ClusterSummary{Nodes: 1}})
		w.eventually(time.Second, "the second is ready", func() bool {
			s, _ := get[*storev1.ClusterStatusRecord](w, store.ClusterStatus, "clusters/eu")
			return s.GetStatus().GetNodes() == 1 && s.GetUid() == "second"
		})
	})
}

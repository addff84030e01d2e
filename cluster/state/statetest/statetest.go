// Package statetest is the suite that every implementation of the cluster's
// state passes. It owns no state and uses only the port.
//
// Concurrency: Run runs its cases one after the other, each on a store of its
// own.
package statetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Opened is an empty store, and the way to have its process restart.
type Opened struct {
	Store state.Store
	// Restart closes the store and opens what it kept.
	Restart func() state.Store
}

// Run checks an implementation.
func Run(t *testing.T, open func(t *testing.T) Opened) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, Opened)
	}{
		{"empty", testEmpty},
		{"intents", testIntents},
		{"older intents are refused", testOlderIntents},
		{"commit and restart", testCommitRestart},
		{"volumes and states", testVolumesStates},
		{"a changed base is a conflict", testConflict},
		{"snapshots never change", testImmutable},
		{"wait", testWait},
		{"observe", testObserve},
		{"pending", testPending},
		{"tokens", testTokens},
		{"blobs", testBlobs},
		{"big records", testBig},
		{"wide change", testWide},
		{"concurrent writers", testConcurrent},
		{"random history", testHistory},
		{"closed", testClosed},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, open(t)) })
	}
}

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t *testing.T, err error, kind api.Kind) {
	t.Helper()
	if err == nil || api.KindOf(err) != kind {
		t.Fatalf("got error %v, want kind %d", err, kind)
	}
}

func service(name string, revision int64, vip string) *linkv1.Intent {
	return &linkv1.Intent{Revision: revision, Body: &linkv1.Intent_Service{Service: &linkv1.ServiceIntent{Tenant: "t", Service: name, VirtualIp: vip}}}
}

func node(id string) *clusterv1.Node {
	return &clusterv1.Node{Node: id, ReplicaCidr: "10.0.1.0/24", CreateTime: timestamppb.New(t0)}
}

func alloc(id, node string) *clusterv1.Allocation {
	return &clusterv1.Allocation{Allocation: id, Tenant: "t", Workload: "w", Node: node, Epoch: 1}
}

func testEmpty(t *testing.T, o Opened) {
	s := o.Store.Snapshot()
	if s.Generation <= 0 || s.IntentRevision != 0 || len(s.Intents)+len(s.Nodes)+len(s.Allocations)+len(s.NodeStatus) != 0 || s.Degraded != "" {
		t.Fatalf("an empty store gives %+v", s)
	}
	ok(t, o.Store.Ping(t.Context()))
}

func testIntents(t *testing.T, o Opened) {
	ctx := t.Context()
	a, b := service("a", 1, "10.68.0.1"), service("b", 1, "10.68.0.2")
	ok(t, o.Store.CommitIntents(ctx, 5, map[string]*linkv1.Intent{"service/t/a": a, "service/t/b": b}, t0))
	s1 := o.Store.Snapshot()
	a2 := service("a", 7, "10.68.0.9")
	ok(t, o.Store.CommitIntents(ctx, 7, map[string]*linkv1.Intent{"service/t/a": a2, "service/t/b": proto.CloneOf(b)}, t0.Add(time.Minute)))
	s2 := o.Store.Snapshot()
	if s2.IntentRevision != 7 || s2.Generation <= s1.Generation {
		t.Fatalf("revision %d generation %d after %d", s2.IntentRevision, s2.Generation, s1.Generation)
	}
	if s1.Intents["service/t/b"] != s2.Intents["service/t/b"] {
		t.Error("an unchanged intent is another message in the next snapshot")
	}
	if got := s2.IntentTimes["service/t/b"]; !got.Equal(t0) {
		t.Errorf("time of the unchanged intent is %v", got)
	}
	ok(t, o.Store.CommitIntents(ctx, 7, map[string]*linkv1.Intent{"service/t/a": a2}, t0.Add(2*time.Minute)))
	r := o.Restart().Snapshot()
	if r.IntentRevision != 7 || len(r.Intents) != 1 || !proto.Equal(r.Intents["service/t/a"], a2) || r.Degraded != "" {
		t.Fatalf("after a restart: revision %d, intents %v, degraded %q", r.IntentRevision, r.Intents, r.Degraded)
	}
	if got := r.IntentTimes["service/t/a"]; !got.Equal(t0.Add(time.Minute)) {
		t.Errorf("time of a is %v after the restart", got)
	}
	if r.Generation <= o.Store.Snapshot().Generation {
		t.Errorf("generation %d went back from %d over a restart", r.Generation, o.Store.Snapshot().Generation)
	}
}

func testOlderIntents(t *testing.T, o Opened) {
	ok(t, o.Store.CommitIntents(t.Context(), 5, map[string]*linkv1.Intent{"service/t/a": service("a", 1, "")}, t0))
	wantKind(t, o.Store.CommitIntents(t.Context(), 4, nil, t0), api.Conflict)
	if s := o.Store.Snapshot(); s.IntentRevision != 5 || len(s.Intents) != 1 {
		t.Fatalf("a refused commit left %+v", s)
	}
	wantKind(t, o.Restart().CommitIntents(t.Context(), 4, nil, t0), api.Conflict)
}

func testCommitRestart(t *testing.T, o Opened) {
	ctx := t.Context()
	ok(t, o.Store.CommitIntents(ctx, 3, nil, t0))
	ok(t, o.Store.Commit(ctx, state.Change{
		Base: o.Store.Snapshot().Generation, Settled: 3, PutNodes: []*clusterv1.Node{node("n1"), node("n2")},
		PutAllocations: []*clusterv1.Allocation{alloc("w-1", "n1"), alloc("w-2", "n1"), alloc("w-3", "n2")},
	}))
	stopped := alloc("w-2", "n1")
	stopped.Stop, stopped.StopReason = true, "ScaleDown"
	ok(t, o.Store.Commit(ctx, state.Change{
		Base: o.Store.Snapshot().Generation, PutAllocations: []*clusterv1.Allocation{stopped}, DeleteAllocations: []string{"w-1", "w-3"}, DeleteNodes: []string{"n2"},
	}))
	want := o.Store.Snapshot()
	got := o.Restart().Snapshot()
	if len(got.Nodes) != 1 || !proto.Equal(got.Nodes["n1"], node("n1")) || len(got.Allocations) != 1 || !proto.Equal(got.Allocations["w-2"], stopped) {
		t.Fatalf("after a restart: nodes %v allocations %v; before: %v", got.Nodes, got.Allocations, want.Allocations)
	}
	if got.Settled != 3 || got.Modified["w-2"] == 0 {
		t.Errorf("settled %d, modified %v", got.Settled, got.Modified)
	}
	wantKind(t, o.Store.Commit(ctx, state.Change{Settled: 9, Base: want.Generation}), api.Unavailable)
}

func volume(id, node string) *clusterv1.Volume {
	return &clusterv1.Volume{Volume: id, Tenant: "t", Workload: "w", Name: "data", Node: node, SizeBytes: 1 << 30, CreateTime: timestamppb.New(t0)}
}

func workloadState(workload string, replicas int32) *clusterv1.WorkloadState {
	return &clusterv1.WorkloadState{Tenant: "t", Workload: workload, Scale: &clusterv1.Scale{Replicas: replicas, Time: timestamppb.New(t0)}}
}

func testVolumesStates(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	first := s.Snapshot()
	ok(t, s.Commit(ctx, state.Change{
		Base: first.Generation, PutVolumes: []*clusterv1.Volume{volume("t.w-0.data", "n1"), volume("t.w-1.data", "n2")},
		PutStates: []*clusterv1.WorkloadState{workloadState("w", 3), workloadState("x", 1)}, PutAllocations: []*clusterv1.Allocation{alloc("w-0", "n1")},
	}))
	base := s.Snapshot()
	going := volume("t.w-0.data", "n1")
	going.Delete = true
	ok(t, s.Commit(ctx, state.Change{
		Base: base.Generation, PutVolumes: []*clusterv1.Volume{going}, DeleteVolumes: []string{"t.w-1.data"},
		PutStates: []*clusterv1.WorkloadState{workloadState("w", 5)}, DeleteStates: []string{"t/x"},
	}))
	if len(first.Volumes)+len(first.States) != 0 || len(base.Volumes) != 2 || base.States["t/w"].GetScale().GetReplicas() != 3 || base.States["t/x"] == nil {
		t.Errorf("a snapshot changed after it was handed out: %v, %v", base.Volumes, base.States)
	}
	for what, c := range map[string]state.Change{
		"a changed volume":   {PutVolumes: []*clusterv1.Volume{going}},
		"a deleted volume":   {PutVolumes: []*clusterv1.Volume{volume("t.w-1.data", "n2")}},
		"a volume to delete": {DeleteVolumes: []string{"t.w-0.data"}},
		"a changed state":    {PutStates: []*clusterv1.WorkloadState{workloadState("w", 4)}},
		"a deleted state":    {PutStates: []*clusterv1.WorkloadState{workloadState("x", 4)}},
	} {
		c.Base = base.Generation
		if err := s.Commit(ctx, c); api.KindOf(err) != api.Conflict {
			t.Errorf("%s on an old base: %v, want a conflict", what, err)
		}
	}
	got := o.Restart().Snapshot()
	if len(got.Volumes) != 1 || !proto.Equal(got.Volumes["t.w-0.data"], going) || len(got.States) != 1 || !proto.Equal(got.States["t/w"], workloadState("w", 5)) {
		t.Fatalf("after a restart: volumes %v, states %v", got.Volumes, got.States)
	}
}

func testConflict(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{node("n")}, PutAllocations: []*clusterv1.Allocation{alloc("w-1", "n"), alloc("w-2", "n")}}))
	base := s.Snapshot().Generation
	ok(t, s.Commit(ctx, state.Change{Base: base, PutAllocations: []*clusterv1.Allocation{alloc("w-1", "n")}}))
	before := s.Snapshot()
	wantKind(t, s.Commit(ctx, state.Change{Base: base, PutAllocations: []*clusterv1.Allocation{alloc("w-3", "n")}, DeleteAllocations: []string{"w-1"}}), api.Conflict)
	if s.Snapshot() != before {
		t.Error("a refused change changed something")
	}
	ok(t, s.Commit(ctx, state.Change{Base: base, DeleteAllocations: []string{"w-2"}})) // untouched since base
	wantKind(t, s.Commit(ctx, state.Change{Base: base, PutAllocations: []*clusterv1.Allocation{alloc("w-2", "n")}}), api.Conflict)
	ok(t, s.Commit(ctx, state.Change{Base: base, PutNodes: []*clusterv1.Node{node("n")}}))
	wantKind(t, s.Commit(ctx, state.Change{Base: base, DeleteNodes: []string{"n"}}), api.Conflict)
	wantKind(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, Settled: 99}), api.Invalid)
}

func testImmutable(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	ok(t, s.CommitIntents(ctx, 1, map[string]*linkv1.Intent{"service/t/a": service("a", 1, "")}, t0))
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{node("n")}, PutAllocations: []*clusterv1.Allocation{alloc("w-1", "n")}}))
	ok(t, s.Observe("n", &state.NodeStatus{Session: 1, LastSeen: t0}))
	old := s.Snapshot()
	if s.Snapshot() != old {
		t.Error("without a change the snapshot is another one")
	}
	ok(t, s.CommitIntents(ctx, 2, nil, t0))
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutAllocations: []*clusterv1.Allocation{alloc("w-2", "n")}, DeleteAllocations: []string{"w-1"}}))
	ok(t, s.Observe("n", &state.NodeStatus{Session: 1, LastSeen: t0.Add(time.Second), Connected: true}))
	s.SetPending(map[string][]state.PendingReason{"t/w": {{Code: "X"}}})
	if len(old.Intents) != 1 || old.IntentRevision != 1 || len(old.Allocations) != 1 || old.Allocations["w-1"] == nil || old.NodeStatus["n"].Connected || len(old.Pending) != 0 {
		t.Fatalf("a snapshot changed after it was handed out: %+v", old)
	}
}

func testWait(t *testing.T, o Opened) {
	s := o.Store
	gen := s.Snapshot().Generation
	ok(t, s.Wait(t.Context(), gen-1))
	done := make(chan error, 1)
	go func() { done <- s.Wait(t.Context(), gen) }()
	ok(t, s.CommitIntents(t.Context(), 1, nil, t0))
	ok(t, <-done)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- s.Wait(ctx, s.Snapshot().Generation) }()
	cancel()
	wantKind(t, <-done, api.Canceled)
	go func() { done <- s.Wait(t.Context(), s.Snapshot().Generation) }()
	ok(t, s.Close())
	wantKind(t, <-done, api.Unavailable)
}

func status(session int64, seen time.Time, allocs ...string) *state.NodeStatus {
	st := &state.NodeStatus{Connected: true, Session: session, LastSeen: seen, Allocations: map[string]*nodev1.AllocationStatus{}}
	for _, a := range allocs {
		st.Allocations[a] = &nodev1.AllocationStatus{Allocation: a, State: portolanv1.ReplicaState_REPLICA_STATE_RUNNING, Ready: true}
	}
	return st
}

func testObserve(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	wantKind(t, s.Observe("n", status(1, t0)), api.NotFound)
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{node("n")}}))
	ok(t, s.Observe("n", status(2, t0, "w-1")))
	gen := s.Snapshot().Generation
	ok(t, s.Observe("n", status(2, t0.Add(time.Second), "w-1")))
	if got := s.Snapshot(); got.Generation != gen || !got.NodeStatus["n"].LastSeen.Equal(t0.Add(time.Second)) {
		t.Errorf("a sign of life gave generation %d after %d, last seen %v", got.Generation, gen, got.NodeStatus["n"].LastSeen)
	}
	used := status(2, t0.Add(time.Second), "w-1")
	used.Allocations["w-1"].Usage = &nodev1.Usage{CpuMilli: 250, MemoryBytes: 1 << 20}
	ok(t, s.Observe("n", used))
	if got := s.Snapshot(); got.Generation != gen || got.NodeStatus["n"].Allocations["w-1"].GetUsage().GetCpuMilli() != 250 {
		t.Errorf("usage alone gave generation %d after %d, and is %v", got.Generation, gen, got.NodeStatus["n"].Allocations["w-1"].GetUsage())
	}
	gone := status(2, t0.Add(time.Second), "w-1")
	gone.RemovedVolumes = map[string]bool{"t.w-0.data": true}
	ok(t, s.Observe("n", gone))
	if s.Snapshot().Generation <= gen {
		t.Error("a volume that is gone woke nobody")
	}
	ok(t, s.Observe("n", status(2, t0.Add(2*time.Second))))
	if got := s.Snapshot(); got.Generation <= gen || len(got.NodeStatus["n"].Allocations) != 0 {
		t.Errorf("an allocation that went left %+v at generation %d", got.NodeStatus["n"], got.Generation)
	}
	wantKind(t, s.Observe("n", status(1, t0)), api.Conflict)
	lost := node("n")
	lost.LostTime = timestamppb.New(t0)
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{lost}}))
	gen = s.Snapshot().Generation
	ok(t, s.Observe("n", status(2, t0.Add(3*time.Second))))
	if s.Snapshot().Generation <= gen {
		t.Error("a sign of life of a lost node woke nobody")
	}
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, DeleteNodes: []string{"n"}}))
	if len(s.Snapshot().NodeStatus) != 0 {
		t.Error("a deleted node is still observed")
	}
	if r := o.Restart().Snapshot(); len(r.NodeStatus) != 0 {
		t.Error("what was observed outlived a restart")
	}
}

func testPending(t *testing.T, o Opened) {
	p := map[string][]state.PendingReason{"t/w": {{Replica: "r1/0", Code: "InsufficientCPU", Message: "m", Count: 3, Nearest: "n", Remedies: []state.Remedy{{Code: "FreeCPU", Message: "r"}}}}}
	o.Store.SetPending(p)
	gen := o.Store.Snapshot().Generation
	o.Store.SetPending(map[string][]state.PendingReason{"t/w": {{Replica: "r1/0", Code: "InsufficientCPU", Message: "m", Count: 3, Nearest: "n", Remedies: []state.Remedy{{Code: "FreeCPU", Message: "r"}}}}})
	if got := o.Store.Snapshot(); got.Generation != gen || len(got.Pending["t/w"]) != 1 {
		t.Errorf("equal reasons gave generation %d after %d, %v", got.Generation, gen, got.Pending)
	}
	p = map[string][]state.PendingReason{"t/w": {{Replica: "r1/0", Code: "InsufficientCPU", Message: "m", Count: 3, Nearest: "n", NearestReason: "cordoned", Remedies: []state.Remedy{{Code: "FreeCPU", Message: "r"}}}}}
	o.Store.SetPending(p)
	if got := o.Store.Snapshot(); got.Generation <= gen || got.Pending["t/w"][0].NearestReason != "cordoned" {
		t.Errorf("another sentence of the nearest gave generation %d after %d, %v", got.Generation, gen, got.Pending)
	}
	advice := func() map[string]*portolanv1.RequestAdvice {
		return map[string]*portolanv1.RequestAdvice{"t/w": {Target: &portolanv1.ReplicaResources{CpuMilli: 70}}}
	}
	notes := state.Notes{Wishes: map[string]state.PoolWish{"gpu": {Nodes: -2, Reason: "r", Going: []string{"n1", "n2"}, HourMicros: -5}}, Blocked: map[string][]state.Blocked{"n": {{Code: "Budget", Count: 1}}}, Requests: advice()}
	o.Store.SetNotes(notes)
	gen = o.Store.Snapshot().Generation
	o.Store.SetNotes(state.Notes{Wishes: map[string]state.PoolWish{"gpu": {Nodes: -2, Reason: "r", Going: []string{"n1", "n2"}, HourMicros: -5}}, Blocked: map[string][]state.Blocked{"n": {{Code: "Budget", Count: 1}}}, Requests: advice()})
	if got := o.Store.Snapshot(); got.Generation != gen || got.Notes.Wishes["gpu"].Nodes != -2 || got.Notes.Blocked["n"][0].Count != 1 || got.Notes.Requests["t/w"].GetTarget().GetCpuMilli() != 70 {
		t.Errorf("equal notes gave generation %d after %d, %v", got.Generation, gen, got.Notes)
	}
	notes.Wishes = map[string]state.PoolWish{"gpu": {Nodes: -2, Reason: "r", Going: []string{"n1", "n3"}, HourMicros: -5}}
	o.Store.SetNotes(notes)
	if got := o.Store.Snapshot(); got.Generation <= gen || got.Notes.Wishes["gpu"].Going[1] != "n3" {
		t.Errorf("other nodes that should go gave generation %d after %d, %v", got.Generation, gen, got.Notes)
	}
	gen = o.Store.Snapshot().Generation
	notes.Scaling = map[string]*portolanv1.ScaleVerdict{"t/w": {Replicas: 3}}
	o.Store.SetNotes(notes)
	if got := o.Store.Snapshot(); got.Generation != gen || got.Notes.Scaling["t/w"].GetReplicas() != 3 || got.Notes.Wishes["gpu"].Nodes != -2 {
		t.Errorf("what scaling came to gave generation %d after %d, %v", got.Generation, gen, got.Notes)
	}
	o.Store.SetNotes(state.Notes{})
	if got := o.Store.Snapshot(); got.Generation <= gen || len(got.Notes.Wishes)+len(got.Notes.Blocked)+len(got.Notes.Requests) != 0 {
		t.Errorf("cleared notes gave %v", got.Notes)
	}
	gen = o.Store.Snapshot().Generation
	o.Store.SetPending(nil)
	if got := o.Store.Snapshot(); got.Generation <= gen || len(got.Pending) != 0 {
		t.Errorf("cleared reasons gave %v", got.Pending)
	}
}

func testTokens(t *testing.T, o Opened) {
	ctx := t.Context()
	_, err := o.Store.Token(ctx, "h")
	wantKind(t, err, api.NotFound)
	tok := &clusterv1.NodeToken{Node: "n", ExpireTime: timestamppb.New(t0)}
	ok(t, o.Store.PutToken(ctx, "h", tok))
	tok.RedeemedBy = []byte("key")
	ok(t, o.Store.PutToken(ctx, "h", tok))
	got, err := o.Restart().Token(ctx, "h")
	ok(t, err)
	if !proto.Equal(got, tok) {
		t.Errorf("got %v", got)
	}
}

func testBlobs(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	_, err := s.LoadBlob(ctx, "ca/key")
	wantKind(t, err, api.NotFound)
	ok(t, s.SaveBlob(ctx, "ca/key", []byte("one"), true))
	wantKind(t, s.SaveBlob(ctx, "ca/key", []byte("two"), true), api.Exists)
	ok(t, s.SaveBlob(ctx, "ca/key", []byte("three"), false))
	got, err := o.Restart().LoadBlob(ctx, "ca/key")
	ok(t, err)
	if !bytes.Equal(got, []byte("three")) {
		t.Errorf("got %q", got)
	}
}

// noise does not compress.
func noise(n int) string {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"[r.IntN(64)]
	}
	return string(b)
}

func testBig(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	intents := map[string]*linkv1.Intent{}
	for i := range 5 {
		intents[fmt.Sprintf("service/t/s%d", i)] = service(noise(900<<10+i), 1, "")
	}
	ok(t, s.CommitIntents(ctx, 1, intents, t0))
	big := alloc("w-1", "n")
	big.StopReason = noise(1 << 20)
	big2 := alloc("w-2", "n")
	big2.StopReason = noise(1<<20 + 1)
	ok(t, s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{node("n")}, PutAllocations: []*clusterv1.Allocation{big, big2}}))
	s = o.Restart()
	got := s.Snapshot()
	if len(got.Intents) != 5 || len(got.Allocations) != 2 || !proto.Equal(got.Allocations["w-1"], big) || !proto.Equal(got.Intents["service/t/s3"], intents["service/t/s3"]) {
		t.Fatal("big records did not come back as they were")
	}
	ok(t, s.Commit(ctx, state.Change{Base: got.Generation, PutAllocations: []*clusterv1.Allocation{alloc("w-1", "n")}, DeleteAllocations: []string{"w-2"}}))
	if got := s.Snapshot().Allocations; len(got) != 1 || got["w-1"].GetStopReason() != "" {
		t.Fatal("a big record did not become small")
	}
}

func testWide(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	var c state.Change
	for n := range 500 {
		id := fmt.Sprintf("n%03d", n)
		c.PutNodes = append(c.PutNodes, node(id))
		for a := range 4 {
			c.PutAllocations = append(c.PutAllocations, alloc(fmt.Sprintf("w-%s-%d", id, a), id))
		}
	}
	c.Base = s.Snapshot().Generation
	ok(t, s.CommitIntents(ctx, 1, nil, t0))
	c.Settled = 1
	ok(t, s.Commit(ctx, c))
	got := o.Restart().Snapshot()
	if len(got.Nodes) != 500 || len(got.Allocations) != 2000 || got.Settled != 1 {
		t.Fatalf("%d nodes, %d allocations, settled %d", len(got.Nodes), len(got.Allocations), got.Settled)
	}
}

func testConcurrent(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 10 {
				id := fmt.Sprintf("n%d-%d", w, i)
				if err := s.Commit(ctx, state.Change{Base: s.Snapshot().Generation, PutNodes: []*clusterv1.Node{node(id)}}); err != nil {
					t.Error(err)
				}
				if err := s.Observe(id, status(1, t0)); err != nil {
					t.Error(err)
				}
				for id := range s.Snapshot().NodeStatus {
					if s.Snapshot().Nodes[id] == nil {
						t.Error("an observed node is not in the snapshot")
					}
				}
			}
		})
	}
	wg.Wait()
	if n := len(s.Snapshot().Nodes); n != 40 {
		t.Errorf("%d nodes", n)
	}
}

// testHistory compares a random history with a plain map, over restarts.
func testHistory(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	r := rand.New(rand.NewPCG(7, 7))
	intents, allocs := map[string]*linkv1.Intent{}, map[string]*clusterv1.Allocation{}
	for step := range 120 {
		switch r.IntN(4) {
		case 0, 1:
			next := map[string]*linkv1.Intent{}
			maps.Copy(next, intents)
			name := fmt.Sprintf("service/t/s%d", r.IntN(12))
			if r.IntN(3) == 0 {
				delete(next, name)
			} else {
				next[name] = service(name, int64(step), strings.Repeat("x", r.IntN(3000)))
			}
			ok(t, s.CommitIntents(ctx, int64(step+1), next, t0))
			intents = next
		default:
			id := fmt.Sprintf("w-%d", r.IntN(20))
			c := state.Change{Base: s.Snapshot().Generation}
			if _, there := allocs[id]; there && r.IntN(2) == 0 {
				c.DeleteAllocations = []string{id}
				delete(allocs, id)
			} else {
				a := alloc(id, "n"+id[2:])
				a.Epoch = int64(step)
				c.PutAllocations = []*clusterv1.Allocation{a}
				allocs[id] = a
			}
			ok(t, s.Commit(ctx, c))
		}
		if step%40 == 39 {
			s = o.Restart()
		}
		compare(t, step, s.Snapshot(), intents, allocs)
	}
}

func compare(t *testing.T, step int, s *state.Snapshot, intents map[string]*linkv1.Intent, allocs map[string]*clusterv1.Allocation) {
	t.Helper()
	if err := errors.Join(same("intents", s.Intents, intents), same("allocations", s.Allocations, allocs)); err != nil {
		t.Fatalf("step %d: %v", step, err)
	}
}

func same[M proto.Message](what string, got, want map[string]M) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d %s, want %d", len(got), what, len(want))
	}
	for k, v := range want {
		if !proto.Equal(got[k], v) {
			return fmt.Errorf("%s %s: %v, want %v", what, k, got[k], v)
		}
	}
	return nil
}

func testClosed(t *testing.T, o Opened) {
	ctx, s := t.Context(), o.Store
	ok(t, s.Close())
	ok(t, s.Close())
	wantKind(t, s.Ping(ctx), api.Unavailable)
	wantKind(t, s.CommitIntents(ctx, 1, nil, t0), api.Unavailable)
	wantKind(t, s.Commit(ctx, state.Change{}), api.Unavailable)
	wantKind(t, s.SaveBlob(ctx, "k", nil, false), api.Unavailable)
	wantKind(t, s.Observe("n", status(1, t0)), api.Unavailable)
}

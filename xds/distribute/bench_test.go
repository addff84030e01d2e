package distribute

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"
)

const (
	benchSubscribers = 1000
	benchSets        = 100 // endpoint sets that each subscriber has
)

func cpuTime() time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		panic(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// fakeStream is one subscriber without a network: it acknowledges at once. So
// the figure is the server's work, the same for both caches; marshalling and
// gRPC come on top for both alike.
type fakeStream struct {
	ctx  context.Context
	in   chan *discovery.DeltaDiscoveryRequest
	got  *atomic.Int64
	done func()
}

func (s *fakeStream) Send(r *discovery.DeltaDiscoveryResponse) error {
	s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
	s.got.Add(int64(len(r.GetResources())))
	s.done()
	return nil
}

func (s *fakeStream) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	select {
	case r := <-s.in:
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}
func (s *fakeStream) Context() context.Context     { return s.ctx }
func (s *fakeStream) SetHeader(metadata.MD) error  { return nil }
func (s *fakeStream) SendHeader(metadata.MD) error { return nil }
func (s *fakeStream) SetTrailer(metadata.MD)       {}
func (s *fakeStream) SendMsg(any) error            { return nil }
func (s *fakeStream) RecvMsg(any) error            { return nil }

func benchSet(i, version int) *endpointv3.ClusterLoadAssignment {
	set := &endpointv3.ClusterLoadAssignment{ClusterName: fmt.Sprintf("outbound/shop/svc-%03d/http/all", i)}
	l := &endpointv3.LocalityLbEndpoints{}
	for j := range 10 {
		l.LbEndpoints = append(l.LbEndpoints, &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &clusterv3.Address{Address: &clusterv3.Address_SocketAddress{SocketAddress: &clusterv3.SocketAddress{
				Address: net.IPv4(10, 1, byte(version), byte(j)).String(), PortSpecifier: &clusterv3.SocketAddress_PortValue{PortValue: 8080},
			}}},
		}}})
	}
	set.Endpoints = []*endpointv3.LocalityLbEndpoints{l}
	return set
}

// BenchmarkT8_EndpointChange: one endpoint set changes, and 1,000 subscribers,
// each with 100 sets, have got and acknowledged it. Ours has a view for each; the
// peer is go-control-plane's LinearCache, one for all.
func BenchmarkT8_EndpointChange(b *testing.B) {
	c := NewCache(CacheConfig{Rules: EnvoyRules()})
	var all []*Resource
	for i := range benchSets {
		all = append(all, mustResource(b, i, 0))
	}
	for i := range benchSubscribers {
		c.Set(fmt.Sprintf("n%04d", i), EndpointType, all)
	}
	views := c.Views()
	srv := NewServer(context.Background(), ServerConfig{Cache: c, Identify: func(_ context.Context, n *clusterv3.Node) (string, error) { return n.GetId(), nil }})
	benchmarkChange(b, srv.DeltaAggregatedResources, func(version int) {
		put := []*Resource{mustResource(b, 0, version)}
		for _, v := range views {
			c.Update(v, EndpointType, put, nil)
		}
	})
}

func BenchmarkT8_EndpointChange_Peer_LinearCache(b *testing.B) {
	all := map[string]types.Resource{}
	for i := range benchSets {
		set := benchSet(i, 0)
		all[set.GetClusterName()] = set
	}
	c := cache.NewLinearCache(EndpointType, cache.WithInitialResources(all))
	srv := server.NewServer(context.Background(), c, nil)
	benchmarkChange(b, srv.DeltaAggregatedResources, func(version int) {
		set := benchSet(0, version)
		if err := c.UpdateResource(set.GetClusterName(), set); err != nil {
			b.Fatal(err)
		}
	})
}

func benchmarkChange(b *testing.B, handler func(discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error, change func(version int)) {
	b.Helper()
	names := make([]string, benchSets)
	for i := range names {
		names[i] = benchSet(i, 0).GetClusterName()
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg, streams sync.WaitGroup
	var got atomic.Int64
	wg.Add(benchSubscribers)
	for i := range benchSubscribers {
		s := &fakeStream{ctx: ctx, in: make(chan *discovery.DeltaDiscoveryRequest, 4), got: &got, done: wg.Done}
		s.in <- &discovery.DeltaDiscoveryRequest{Node: NodeOf(fmt.Sprintf("n%04d", i)), TypeUrl: EndpointType, ResourceNamesSubscribe: names}
		streams.Go(func() { _ = handler(s) })
	}
	wg.Wait()
	if got.Load() != benchSubscribers*benchSets {
		b.Fatalf("%d resources at the start", got.Load())
	}
	time.Sleep(100 * time.Millisecond) // the first acknowledgements are not part of it
	got.Store(0)
	start, version := cpuTime(), 0
	for b.Loop() {
		version++
		wg.Add(benchSubscribers)
		change(version)
		wg.Wait()
	}
	cpu := cpuTime() - start
	if want := int64(b.N) * benchSubscribers; got.Load() != want {
		b.Fatalf("%d resources were sent, want %d", got.Load(), want)
	}
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/change")
	cancel()
	streams.Wait()
}

func mustResource(b *testing.B, i, version int) *Resource {
	m := benchSet(i, version%250)
	r, err := NewResource(EndpointType, m.GetClusterName(), m)
	if err != nil {
		b.Fatal(err)
	}
	return r
}

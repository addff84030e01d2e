package proxytest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

type deltaClient = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// stream is one connection to the warden, to its end.
func (p *instance) stream(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	subscribed := map[string][]string{}
	if err := p.subscribe(s, subscribed); err != nil {
		return err
	}
	for {
		resp, err := s.Recv()
		if err != nil {
			return err
		}
		if err := p.thawed(ctx); err != nil {
			return err
		}
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
		if refused := p.take(resp); refused != "" {
			req.ErrorDetail = &rpcstatus.Status{Code: int32(codes.Internal), Message: refused}
		}
		if err := s.Send(req); err != nil {
			return err
		}
		if err := p.subscribe(s, subscribed); err != nil {
			return err
		}
	}
}

// subscribe sends what changed in the names that are wanted; on a new stream
// with the versions that are known.
func (p *instance) subscribe(s deltaClient, subscribed map[string][]string) error {
	p.mu.Lock()
	wanted := p.state.wanted()
	known := p.state.versionsKnown()
	p.mu.Unlock()
	for _, t := range order {
		names, before := wanted[t], subscribed[t]
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: t}
		for _, n := range names {
			if !slices.Contains(before, n) {
				req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, n)
			}
		}
		for _, n := range before {
			if !slices.Contains(names, n) {
				req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, n)
			}
		}
		if len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) == 0 {
			continue
		}
		if _, again := subscribed[t]; !again {
			req.InitialResourceVersions = known[t]
			req.Node = &corev3.Node{Id: p.spec.ID}
		}
		subscribed[t] = names
		if err := s.Send(req); err != nil {
			return err
		}
	}
	return nil
}

func (s *state) versionsKnown() map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, t := range order {
		out[t] = map[string]string{}
		for name, a := range s.have[t] {
			out[t][name] = a.version
		}
	}
	return out
}

// errorWords begin Envoy's refusals, by type.
var errorWords = map[string]string{
	ClusterType: "Error adding/updating cluster(s) ", ListenerType: "Error adding/updating listener(s) ",
}

// take applies a response: like in Envoy, good siblings of a refused listener or
// cluster apply, while one refused resource of another type drops the response.
func (p *instance) take(resp *discovery.DeltaDiscoveryResponse) (refused string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := resp.GetTypeUrl()
	fresh := map[string]accepted{}
	var faults []string
	for _, r := range resp.GetResources() {
		m, err := parse(t, r)
		why := ""
		if err != nil {
			why = err.Error()
		} else if p.refuse != nil {
			why = p.refuse(t, r.GetName())
		}
		if why != "" {
			faults = append(faults, fmt.Sprintf("%s: %s", r.GetName(), why))
			continue
		}
		fresh[r.GetName()] = accepted{version: r.GetVersion(), message: m}
	}
	words, siblings := errorWords[t]
	if len(faults) > 0 {
		refused = words + strings.Join(faults, "\n")
		if !siblings {
			return refused
		}
	}
	p.state.answered[t] = true
	for _, n := range resp.GetRemovedResources() {
		delete(p.state.have[t], n)
	}
	maps.Copy(p.state.have[t], fresh)
	p.state.settle(p.warming)
	return refused
}

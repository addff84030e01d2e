package inproc

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"
)

// What is really there, beside what the API says.

// instance is a running container, and the proxy beside it.
type instance struct {
	Node, Replica, Workload string
	PID, ProxyPID           int
	container               string // its ID in the engine
	address                 netip.Addr
}

// node finds a machine by name.
func (f *Fleet) node(name string) *node {
	f.t.Helper()
	for _, n := range f.nodes() {
		if n.name == name {
			return n
		}
	}
	f.t.Fatalf("there is no node %q", name)
	return nil
}

// Running lists what really runs of a workload of tenant shop, on every node,
// reachable or not; by the names of clusters or nodes when some are given.
func (f *Fleet) Running(workload string, places ...string) []instance {
	f.t.Helper()
	var out []instance
	for _, n := range f.nodes() {
		if len(places) > 0 && !slices.Contains(places, n.name) && !slices.Contains(places, n.cluster.name) {
			continue
		}
		ids, err := n.network.List(f.ctx)
		f.must("list networks", err)
		containers, err := n.engine.List(f.ctx)
		f.must("list containers", err)
		for _, id := range ids {
			if workloadOf(id) != workload {
				continue
			}
			r, _ := n.network.Replica(id)
			for _, c := range containers {
				if c.State == engine.Running && strings.HasPrefix(c.ID, id) {
					p, _ := n.proxies.Status(f.ctx, id)
					out = append(out, instance{Node: n.name, Replica: id, Workload: workload, PID: c.Pid, ProxyPID: p.Pid, container: c.ID, address: r.Address})
				}
			}
		}
	}
	return out
}

// workloadOf is the workload in a replica's ID: web-x7k2p, or db-0-k3f9 of a
// stateful one.
func workloadOf(id string) string {
	stem := id[:max(0, strings.LastIndex(id, "-"))]
	if i := strings.LastIndex(stem, "-"); i > 0 && len(id)-len(stem) == 5 && strings.Trim(stem[i+1:], "0123456789") == "" {
		return stem[:i]
	}
	return stem
}

// Snapshot remembers every container and proxy of some workloads, so that
// Untouched can tell what was restarted.
func (f *Fleet) Snapshot(workloads ...string) map[string]instance {
	f.t.Helper()
	out := map[string]instance{}
	for _, w := range workloads {
		for _, i := range f.Running(w) {
			out[i.Replica] = i
		}
	}
	return out
}

// Kept fails the test when anything of a snapshot was restarted or is gone.
func (f *Fleet) Kept(before map[string]instance) {
	f.t.Helper()
	after := f.Snapshot(workloadsOf(before)...)
	for id, b := range before {
		if a, ok := after[id]; !ok {
			f.t.Errorf("%s on %s is gone", id, b.Node)
		} else if a != b {
			f.t.Errorf("%s was restarted: %+v, before %+v", id, a, b)
		}
	}
}

// Untouched is Kept, and nothing was added.
func (f *Fleet) Untouched(before map[string]instance) {
	f.t.Helper()
	f.Kept(before)
	for id, a := range f.Snapshot(workloadsOf(before)...) {
		if _, ok := before[id]; !ok {
			f.t.Errorf("%s came up on %s", id, a.Node)
		}
	}
}

func workloadsOf(list map[string]instance) []string {
	names := map[string]bool{}
	for _, i := range list {
		names[i.Workload] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// Settled waits until exactly so many replicas of a workload are ready by the API
// and run in truth, in total or in the places given, and returns how long it took.
func (f *Fleet) Settled(most time.Duration, workload string, replicas int) time.Duration {
	f.t.Helper()
	return f.Within(most, fmt.Sprintf("%d replicas of %s", replicas, workload), func() string {
		w := Get(f, &portolanv1.Workload{}, "tenants/shop/workloads/"+workload)
		if got := len(f.Running(workload)); got != replicas || int(w.GetStatus().GetReadyReplicas()) != replicas {
			return fmt.Sprintf("%d run; status %v", got, w.GetStatus())
		}
		return ""
	})
}

// Call makes a request from a replica of one workload to a service of tenant shop.
// pick in [0,1) decides between weights.
func (f *Fleet) Call(from instance, service string, pick float64) proxytest.Response {
	f.t.Helper()
	f.mu.Lock()
	vip, ok := f.vips["tenants/shop/services/"+service]
	f.mu.Unlock()
	if !ok {
		f.t.Fatalf("service %s was not applied", service)
	}
	ctx, cancel := context.WithTimeout(f.ctx, 5*time.Second)
	defer cancel()
	return f.mesh.Call(ctx, from.address, proxytest.Request{To: netip.AddrPortFrom(vip, 80), Host: service + ".shop.mesh", Path: "/", Pick: pick, Turn: pick})
}

// Caller is a replica of a workload, of a place when one is given.
func (f *Fleet) Caller(workload string, places ...string) instance {
	f.t.Helper()
	all := f.Running(workload, places...)
	if len(all) == 0 {
		f.t.Fatalf("no replica of %s runs in %v", workload, places)
	}
	return all[0]
}

// owner is the node of a replica.
func (f *Fleet) owner(replica string) *node {
	f.t.Helper()
	for _, n := range f.nodes() {
		if _, ok := n.network.Replica(replica); ok {
			return n
		}
	}
	f.t.Fatalf("there is no replica %s", replica)
	return nil
}

// Visit makes a request from outside to the ingress of a node.
func (f *Fleet) Visit(name, host string) proxytest.Response {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, 5*time.Second)
	defer cancel()
	return f.mesh.Call(ctx, f.node(name).ingress(), proxytest.Request{Host: host, Path: "/"})
}

// leftovers names what nodes still hold of replicas, gateways aside.
func (f *Fleet) leftovers() string {
	var out []string
	for _, n := range f.nodes() {
		networks, err := n.network.List(f.ctx)
		f.must("list networks", err)
		containers, err := n.engine.List(f.ctx)
		f.must("list containers", err)
		proxies, err := n.proxies.List(f.ctx)
		f.must("list proxies", err)
		keys, err := os.ReadDir(filepath.Join(n.run, "identity"))
		f.must("list identities", err)
		if len(networks)+len(containers) > 0 || len(proxies) != 2 || len(keys) != 2 {
			out = append(out, fmt.Sprintf("%s: networks %q, %d containers, proxies %q, %d identities", n.name, networks, len(containers), proxies, len(keys)))
		}
	}
	return strings.Join(out, "; ")
}

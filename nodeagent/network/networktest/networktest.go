// Package networktest holds a fake of the node's network and the conformance
// suite that it and the real one pass. The fake makes nothing in any kernel.
//
// Concurrency: Fake is safe for concurrent use.
package networktest

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/nodeagent/network"
)

// Fake is a Networker in memory.
type Fake struct {
	mu       sync.Mutex
	replicas map[string]network.Replica
	routes   []network.Route
	conns    map[string]map[netip.AddrPort]uint16
	fail     error
	dir      string
}

var _ network.Networker = (*Fake)(nil)

// NewFake makes an empty one. When dir is not empty, resolv.conf and hosts are
// really written under it.
func NewFake(dir string) *Fake {
	return &Fake{replicas: map[string]network.Replica{}, conns: map[string]map[netip.AddrPort]uint16{}, dir: dir}
}

// Fail makes every later call return err; nil ends that.
func (f *Fake) Fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

// Ensure implements network.Networker.
func (f *Fake) Ensure(ctx context.Context, r network.Replica) (network.Attachment, error) {
	doing := "ensure network of " + r.Allocation
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(ctx, doing, r.Allocation); err != nil {
		return network.Attachment{}, err
	}
	if !r.Capture {
		return network.Attachment{}, nil
	}
	if !r.Address.Is4() {
		return network.Attachment{}, api.E(api.Invalid, doing, "address %s is not IPv4", r.Address)
	}
	f.replicas[r.Allocation] = r
	dir := "/fake/net/" + r.Allocation
	if f.dir != "" {
		dir = filepath.Join(f.dir, r.Allocation)
		if err := f.write(dir, r); err != nil {
			return network.Attachment{}, api.E(api.Internal, doing, "%w", err)
		}
	}
	return network.Attachment{NetNS: "/fake/netns/" + r.Allocation, Dir: dir}, nil
}

func (f *Fake) write(dir string, r network.Replica) error {
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("search "+r.Tenant+".mesh mesh\nnameserver "+network.LinkAddress+"\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "hosts"), []byte("127.0.0.1 localhost\n"), 0o644),
	)
}

func (f *Fake) check(ctx context.Context, doing, allocation string) error {
	if err := ctx.Err(); err != nil {
		return api.E(api.Canceled, doing, "%w", err)
	}
	if f.fail != nil {
		return f.fail
	}
	if allocation == "" || allocation == "." || allocation == ".." || strings.ContainsAny(allocation, "/\x00") {
		return api.E(api.Invalid, doing, "allocation %q is no file name", allocation)
	}
	return nil
}

// Remove implements network.Networker.
func (f *Fake) Remove(_ context.Context, allocation string) error {
	doing := "remove network of " + allocation
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(context.Background(), doing, allocation); err != nil {
		return err
	}
	delete(f.replicas, allocation)
	delete(f.conns, allocation)
	if f.dir != "" {
		if err := os.RemoveAll(filepath.Join(f.dir, allocation)); err != nil {
			return api.E(api.Internal, doing, "%w", err)
		}
	}
	return nil
}

// List implements network.Networker.
func (f *Fake) List(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	out := make([]string, 0, len(f.replicas))
	for a := range f.replicas {
		out = append(out, a)
	}
	slices.Sort(out)
	return out, nil
}

// Routes implements network.Networker.
func (f *Fake) Routes(_ context.Context, routes []network.Route) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	for _, r := range routes {
		if !r.CIDR.IsValid() || !r.CIDR.Addr().Is4() || !r.Via.Is4() {
			return api.E(api.Invalid, "set routes", "route %s via %s is not IPv4", r.CIDR, r.Via)
		}
	}
	f.routes = slices.Clone(routes)
	return nil
}

// RoutesNow gives the routes that were set last.
func (f *Fake) RoutesNow() []network.Route {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.routes)
}

// Replica gives what was ensured; false when it is not there.
func (f *Fake) Replica(allocation string) (network.Replica, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.replicas[allocation]
	return r, ok
}

// Connect notes an open inbound connection to a port.
func (f *Fake) Connect(allocation string, remote netip.AddrPort, port uint16) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conns[allocation] == nil {
		f.conns[allocation] = map[netip.AddrPort]uint16{}
	}
	f.conns[allocation][remote] = port
}

// Remotes gives the remote ends of open connections.
func (f *Fake) Remotes(_ context.Context, allocation string) ([]netip.AddrPort, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	var out []netip.AddrPort
	for r := range f.conns[allocation] {
		out = append(out, r)
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out, nil
}

// CloseConnections implements network.Networker.
func (f *Fake) CloseConnections(_ context.Context, allocation string, remotes []netip.AddrPort, port uint16) (int, error) {
	doing := "close connections of " + allocation
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(context.Background(), doing, allocation); err != nil {
		return 0, err
	}
	if _, ok := f.replicas[allocation]; !ok && len(remotes) > 0 && len(f.conns[allocation]) == 0 {
		return 0, api.E(api.NotFound, doing, "no namespace")
	}
	n := 0
	for r, p := range f.conns[allocation] {
		for _, want := range remotes {
			if r.Addr() == want.Addr() && (want.Port() == 0 || want.Port() == r.Port()) && (port == 0 || port == p || port == network.InboundPort) {
				delete(f.conns[allocation], r)
				n++
				break
			}
		}
	}
	return n, nil
}

// Run checks what every Networker promises. open gives a fresh one for a node.
func Run(t *testing.T, open func(t *testing.T) network.Networker) {
	t.Helper()
	replica := network.Replica{Allocation: "web-a1b2c", Tenant: "shop", Address: netip.MustParseAddr("10.200.1.5"), Capture: true}
	t.Run("ensure is idempotent and listed", func(t *testing.T) {
		n := open(t)
		first, err := n.Ensure(t.Context(), replica)
		if err != nil {
			t.Fatal(err)
		}
		second, err := n.Ensure(t.Context(), replica)
		if err != nil {
			t.Fatal(err)
		}
		if first != second || first.NetNS == "" || first.Dir == "" {
			t.Fatalf("attachments differ or are empty: %+v, %+v", first, second)
		}
		wantList(t, n, "web-a1b2c")
	})
	t.Run("remove is complete and idempotent", func(t *testing.T) {
		n := open(t)
		if _, err := n.Ensure(t.Context(), replica); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := n.Remove(t.Context(), replica.Allocation); err != nil {
				t.Fatal(err)
			}
			wantList(t, n)
		}
	})
	t.Run("gateways get nothing", func(t *testing.T) {
		n := open(t)
		a, err := n.Ensure(t.Context(), network.Replica{Allocation: "gw", Address: replica.Address})
		if err != nil || a.NetNS != "" {
			t.Fatalf("attachment %+v, error %v", a, err)
		}
		wantList(t, n)
	})
	t.Run("what cannot be is refused", func(t *testing.T) {
		n := open(t)
		for _, bad := range []network.Replica{
			{Allocation: "", Address: replica.Address, Capture: true},
			{Allocation: "../up", Address: replica.Address, Capture: true},
			{Allocation: "six", Address: netip.MustParseAddr("fd00::1"), Capture: true},
			{Allocation: "none", Capture: true},
		} {
			if _, err := n.Ensure(t.Context(), bad); api.KindOf(err) != api.Invalid {
				t.Errorf("Ensure(%+v): %v, want an Invalid error", bad, err)
			}
		}
		if err := n.Remove(t.Context(), "../up"); api.KindOf(err) != api.Invalid {
			t.Errorf("Remove(../up): %v, want an Invalid error", err)
		}
		err := n.Routes(t.Context(), []network.Route{{CIDR: netip.MustParsePrefix("fd00::/64"), Via: netip.MustParseAddr("fd00::1")}})
		if api.KindOf(err) != api.Invalid {
			t.Errorf("Routes(IPv6): %v, want an Invalid error", err)
		}
	})
	t.Run("closing nothing closes nothing", func(t *testing.T) {
		n := open(t)
		if _, err := n.Ensure(t.Context(), replica); err != nil {
			t.Fatal(err)
		}
		closed, err := n.CloseConnections(t.Context(), replica.Allocation, []netip.AddrPort{netip.MustParseAddrPort("10.200.1.9:40000")}, 0)
		if err != nil || closed != 0 {
			t.Fatalf("closed %d, error %v", closed, err)
		}
	})
}

func wantList(t *testing.T, n network.Networker, want ...string) {
	t.Helper()
	got, err := n.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("List is %q, want %q", got, want)
	}
}

package network_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/portolan-io/portolan/e2e/ownns"
	"github.com/portolan-io/portolan/nodeagent/network"
	"github.com/portolan-io/portolan/nodeagent/network/networktest"
)

// helper modes of this binary, run as another user inside a replica's namespace.
const helperMode = "PORTOLAN_NETWORK_HELPER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperMode); mode != "" {
		os.Exit(helper(mode))
	}
	ownns.Main(m)
}

func linux(t *testing.T) *network.Linux {
	t.Helper()
	if !ownns.Inside() {
		t.Skip("needs root and the right to make network namespaces")
	}
	l, err := network.New(network.Config{RunDir: t.TempDir(), DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		all, err := l.List(context.Background())
		if err != nil {
			t.Error(err)
		}
		for _, a := range all {
			if err := l.Remove(context.Background(), a); err != nil {
				t.Error(err)
			}
		}
	})
	return l
}

func TestConformance(t *testing.T) {
	t.Run("linux", func(t *testing.T) {
		networktest.Run(t, func(t *testing.T) network.Networker { return linux(t) })
	})
	t.Run("fake", func(t *testing.T) {
		networktest.Run(t, func(t *testing.T) network.Networker { return networktest.NewFake(t.TempDir()) })
	})
}

func TestConfigIsChecked(t *testing.T) {
	_, err := network.New(network.Config{RunDir: "run", DataDir: "data", DevicePrefix: "toolong"})
	if err == nil || !strings.Contains(err.Error(), "runDir") || !strings.Contains(err.Error(), "dataDir") || !strings.Contains(err.Error(), "prefix") {
		t.Fatalf("error %v does not name all three faults", err)
	}
}

func ensure(t *testing.T, l *network.Linux, name, addr string) network.Attachment {
	t.Helper()
	a, err := l.Ensure(t.Context(), network.Replica{Allocation: name, Tenant: "shop", Address: netip.MustParseAddr(addr), Capture: true})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestFilesOfTheReplica(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	resolv, err := os.ReadFile(filepath.Join(a.Dir, "resolv.conf"))
	if err != nil {
		t.Fatal(err)
	}
	want := "search shop.mesh mesh\nnameserver 169.254.77.1\noptions timeout:1 attempts:3\n"
	if string(resolv) != want {
		t.Errorf("resolv.conf is %q, want %q", resolv, want)
	}
	hosts, err := os.ReadFile(filepath.Join(a.Dir, "hosts"))
	if err != nil {
		t.Fatal(err)
	}
	if string(hosts) != "127.0.0.1 localhost\n10.200.1.2 web-1\n" {
		t.Errorf("hosts is %q", hosts)
	}
}

// listen opens a listener inside a replica's namespace.
func listen(t *testing.T, ns, address string) net.Listener {
	t.Helper()
	type result struct {
		l   net.Listener
		err error
	}
	out := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with its namespace
		fd, err := os.Open(ns)
		if err == nil {
			err = setns(int(fd.Fd()))
			_ = fd.Close()
		}
		if err != nil {
			out <- result{err: err}
			return
		}
		l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", address)
		out <- result{l, err}
	}()
	r := <-out
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { _ = r.l.Close() })
	return r.l
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestOutboundTCPIsCaptured(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	proxy := listen(t, a.NetNS, "0.0.0.0:15001")
	// Nobody has the address: only capture can answer.
	c, err := network.Dial(t.Context(), a.NetNS, "tcp", "10.68.0.9:80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	got := accept(t, proxy)
	if got.RemoteAddr().String() != c.LocalAddr().String() {
		t.Errorf("proxy sees %s, the workload is %s", got.RemoteAddr(), c.LocalAddr())
	}
	if orig := originalDst(t, got); orig != "10.68.0.9:80" {
		t.Errorf("original destination is %s", orig)
	}
}

func TestLoopbackIsNotCaptured(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	app := listen(t, a.NetNS, "127.0.0.1:9000")
	c, err := network.Dial(t.Context(), a.NetNS, "tcp", "127.0.0.1:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if got := accept(t, app); got.RemoteAddr().String() != c.LocalAddr().String() {
		t.Errorf("application sees %s, the probe is %s", got.RemoteAddr(), c.LocalAddr())
	}
}

func TestProxyUserIsNotCaptured(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	b := ensure(t, l, "api-1", "10.200.1.3")
	_ = listen(t, a.NetNS, "0.0.0.0:15001")
	inbound := listen(t, b.NetNS, "0.0.0.0:15006")
	out := runHelper(t, a.NetNS, "dial 10.200.1.3:8080", network.ProxyUID)
	if out != "connected" {
		t.Fatalf("helper says %q", out)
	}
	got := accept(t, inbound)
	if addr := netip.MustParseAddrPort(got.RemoteAddr().String()).Addr(); addr.String() != "10.200.1.2" {
		t.Errorf("the callee sees %s, want the caller's own address", addr)
	}
	if orig := originalDst(t, got); orig != "10.200.1.3:8080" {
		t.Errorf("original destination is %s", orig)
	}
}

func TestOnlyDNSLeavesBesidesTCP(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	serveEcho(t, network.LinkAddress+":53")
	serveEcho(t, network.LinkAddress+":54")
	if out := runHelper(t, a.NetNS, "ask udp "+network.LinkAddress+":53", 1000); out != "answered" {
		t.Errorf("DNS at the node over UDP: %q", out)
	}
	if out := runHelper(t, a.NetNS, "ask tcp "+network.LinkAddress+":53", 1000); out != "answered" {
		t.Errorf("DNS at the node over TCP: %q", out)
	}
	if out := runHelper(t, a.NetNS, "ask udp "+network.LinkAddress+":54", 1000); out == "answered" {
		t.Error("UDP to another port of the node got out")
	}
	if out := runHelper(t, a.NetNS, "ask udp "+network.LinkAddress+":54", network.ProxyUID); out == "answered" {
		t.Error("UDP of the proxy's user got out")
	}
}

func TestNoIPv6Inside(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	if _, err := network.Dial(t.Context(), a.NetNS, "tcp", "[::1]:9000"); err == nil {
		t.Fatal("a connection over IPv6 was made")
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("IPv6 is alive inside: %v", err)
	}
}

func TestForeignFlushIsRepaired(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs nft in PATH")
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("needs nsenter in PATH")
	}
	proxy := listen(t, a.NetNS, "0.0.0.0:15001")
	for name, args := range map[string][]string{
		"flush ruleset": {"flush", "ruleset"},
		"one chain":     {"flush", "chain", "inet", "portolan", "output_nat"},
		"policy":        {"add", "chain", "inet", "portolan", "output", "{ policy accept; }"},
	} {
		if out, err := exec.Command(nsenter, append([]string{"--net=" + a.NetNS, nft}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		before := ruleset(t, nsenter, nft, a.NetNS)
		ensure(t, l, "web-1", "10.200.1.2")
		after := ruleset(t, nsenter, nft, a.NetNS)
		if before == after || strings.Count(after, "policy drop") != 2 || strings.Count(after, "redirect to") != 2 {
			t.Errorf("%s: not repaired:\n%s", name, after)
		}
	}
	c, err := network.Dial(t.Context(), a.NetNS, "tcp", "10.68.0.9:80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	accept(t, proxy)
}

func ruleset(t *testing.T, nsenter, nft, ns string) string {
	t.Helper()
	out, err := exec.Command(nsenter, "--net="+ns, nft, "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestLostVethIsMadeAnew(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, "pt") {
			if err := netlink.LinkDel(link); err != nil {
				t.Fatal(err)
			}
		}
	}
	ensure(t, l, "web-1", "10.200.1.2")
	serveEcho(t, network.LinkAddress+":53")
	if out := runHelper(t, a.NetNS, "ask udp "+network.LinkAddress+":53", 1000); out != "answered" {
		t.Errorf("no way to the node after the repair: %q", out)
	}
}

func TestRoutesAreExact(t *testing.T) {
	l := linux(t)
	uplink := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}
	if err := netlink.LinkAdd(uplink); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(uplink) })
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName("up1")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(netlink.AddrAdd(uplink, addr), netlink.LinkSetUp(uplink), netlink.LinkSetUp(peer)); err != nil {
		t.Fatal(err)
	}
	route := func(cidr, via string) network.Route {
		return network.Route{CIDR: netip.MustParsePrefix(cidr), Via: netip.MustParseAddr(via)}
	}
	for _, step := range [][]network.Route{
		{route("10.200.2.0/24", "192.0.2.2"), route("10.200.3.0/24", "192.0.2.3")},
		{route("10.200.3.0/24", "192.0.2.9")},
		nil,
	} {
		if err := l.Routes(t.Context(), step); err != nil {
			t.Fatal(err)
		}
		have, err := netlink.RouteList(uplink, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		var got, want []string
		for _, r := range have {
			if r.Gw != nil {
				got = append(got, r.Dst.String()+" via "+r.Gw.String())
			}
		}
		for _, r := range step {
			want = append(want, r.CIDR.String()+" via "+r.Via.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("routes are %q, want %q", got, want)
		}
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/up0/forwarding"); err != nil || strings.TrimSpace(string(b)) != "1" {
		t.Errorf("the uplink does not forward: %q, %v", b, err)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Errorf("every device forwards: %q, %v", b, err)
	}
}

func TestCloseConnections(t *testing.T) {
	l := linux(t)
	a := ensure(t, l, "web-1", "10.200.1.2")
	b := ensure(t, l, "redis-1", "10.200.1.3")
	inbound := listen(t, b.NetNS, "0.0.0.0:15006")
	dialled := startHelper(t, a.NetNS, "hold 10.200.1.3:6379", network.ProxyUID)
	kept := startHelper(t, a.NetNS, "hold 10.200.1.3:6379", network.ProxyUID)
	first, second := accept(t, inbound), accept(t, inbound)
	remotes, err := l.Remotes(t.Context(), "redis-1")
	if err != nil || len(remotes) != 2 {
		t.Fatalf("remotes %v, error %v", remotes, err)
	}
	victim := netip.MustParseAddrPort(first.RemoteAddr().String())
	// The port that the caller meant is not the socket's after capture.
	n, err := l.CloseConnections(t.Context(), "redis-1", []netip.AddrPort{victim}, 6379)
	if err != nil || n != 1 {
		t.Fatalf("closed %d, error %v", n, err)
	}
	if _, err := first.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("the callee reads %v", err)
	}
	ended := 0
	for _, h := range []*holder{dialled, kept} {
		if h.local == victim.String() {
			if got := h.wait(t); !strings.Contains(got, "reset") {
				t.Errorf("the caller reads %q", got)
			}
			ended++
		}
	}
	if ended != 1 {
		t.Fatalf("%d callers have the address %s", ended, victim)
	}
	if _, err := second.Write([]byte("x")); err != nil {
		t.Errorf("the other connection broke: %v", err)
	}
	all := netip.AddrPortFrom(netip.MustParseAddr("10.200.1.2"), 0)
	if n, err := l.CloseConnections(t.Context(), "redis-1", []netip.AddrPort{all}, 0); err != nil || n != 1 {
		t.Errorf("closing by address: %d, error %v", n, err)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	l := linux(t)
	links := func() int {
		all, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	mounts := func() int {
		b, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "\n")
	}
	wantLinks, wantMounts := links(), mounts()
	a := ensure(t, l, "web-1", "10.200.1.2")
	if links() == wantLinks || mounts() == wantMounts {
		t.Fatal("nothing was made")
	}
	if err := l.Remove(t.Context(), "web-1"); err != nil {
		t.Fatal(err)
	}
	if got := links(); got != wantLinks {
		t.Errorf("%d links, before it were %d", got, wantLinks)
	}
	if got := mounts(); got != wantMounts {
		t.Errorf("%d mounts, before it were %d", got, wantMounts)
	}
	for _, p := range []string{a.NetNS, a.Dir} {
		if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
}

func TestDialWantsLiterals(t *testing.T) {
	if _, err := network.Dial(t.Context(), "", "tcp", "localhost:80"); err == nil {
		t.Fatal("a name was accepted")
	}
}

// serveEcho answers like a DNS server would: on UDP and TCP of one port.
func serveEcho(t *testing.T, address string) {
	t.Helper()
	pc, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { _ = pc.Close(); _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		b := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(b[:n], from)
		}
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.CopyN(c, c, 5)
			_ = c.Close()
		}
	})
}

// holder is a helper process that holds a connection.
type holder struct {
	cmd   *exec.Cmd
	out   *lineReader
	local string
}

func (h *holder) wait(t *testing.T) string {
	t.Helper()
	line, err := h.out.next()
	if err != nil {
		t.Fatal(err)
	}
	return line
}

func command(ns, what string, uid int) *exec.Cmd {
	cmd := exec.Command("nsenter", "--net="+ns, "--", "setpriv", "--reuid="+strconv.Itoa(uid), "--regid="+strconv.Itoa(uid), "--clear-groups", "/proc/self/fd/3")
	cmd.Env = []string{helperMode + "=" + what, "PATH=" + os.Getenv("PATH")}
	self, err := os.Open("/proc/self/exe") // the binary's path need not be open to others
	if err == nil {
		cmd.ExtraFiles = []*os.File{self}
	}
	cmd.Stderr = os.Stderr
	return cmd
}

func runHelper(t *testing.T, ns, what string, uid int) string {
	t.Helper()
	out, err := command(ns, what, uid).Output()
	if err != nil {
		t.Fatalf("helper %q: %v", what, err)
	}
	return strings.TrimSpace(string(out))
}

func startHelper(t *testing.T, ns, what string, uid int) *holder {
	t.Helper()
	cmd := command(ns, what, uid)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	h := &holder{cmd: cmd, out: newLineReader(out)}
	if h.local, err = h.out.next(); err != nil {
		t.Fatal(err)
	}
	return h
}

// helper is the other side of runHelper.
func helper(what string) int {
	say := func(s string) { _, _ = io.WriteString(os.Stdout, s+"\n") }
	args := strings.Fields(what)
	switch args[0] {
	case "dial", "hold":
		c, err := net.DialTimeout("tcp", args[1], 3*time.Second)
		if err != nil {
			say(err.Error())
			return 0
		}
		if args[0] == "dial" {
			say("connected")
			return 0
		}
		say(c.LocalAddr().String())
		_, err = io.Copy(io.Discard, c)
		if err == nil {
			say("closed")
		} else {
			say(err.Error())
		}
	case "ask":
		c, err := net.DialTimeout(args[1], args[2], time.Second)
		if err == nil {
			err = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		}
		if err == nil {
			_, err = c.Write([]byte("hello"))
		}
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 5))
		}
		if err != nil {
			say(err.Error())
			return 0
		}
		say("answered")
	}
	return 0
}

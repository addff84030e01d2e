package warden

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// dnsTTL is short, because a deleted service's name shall be gone soon; virtual
// addresses themselves are stable.
const dnsTTL = 5

// resolver answers mesh names to replicas, each as it may see them.
type resolver struct {
	world *atomic.Pointer[world]
	log   *slog.Logger
}

// serve answers on UDP and TCP until ctx ends. The address need not exist yet:
// the first replica's veth brings it.
func (r *resolver) serve(ctx context.Context, address string) error {
	lc := net.ListenConfig{Control: freebind}
	udp, err := lc.ListenPacket(ctx, "udp4", address)
	if err != nil {
		return fmt.Errorf("dns: %w", err)
	}
	tcp, err := lc.Listen(ctx, "tcp4", address)
	if err != nil {
		_ = udp.Close()
		return fmt.Errorf("dns: %w", err)
	}
	servers := []*dns.Server{
		{PacketConn: udp, Handler: r},
		{Listener: tcp, Handler: r, MaxTCPQueries: 64, IdleTimeout: func() time.Duration { return 5 * time.Second }},
	}
	done := make(chan error, len(servers))
	var running sync.WaitGroup
	for _, s := range servers {
		running.Go(func() { done <- s.ActivateAndServe() })
	}
	var failed error
	select {
	case <-ctx.Done():
	case failed = <-done:
		failed = fmt.Errorf("dns stopped: %w", failed)
	}
	_ = udp.Close()
	_ = tcp.Close()
	running.Wait()
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the servers end because they were asked to
	}
	return failed
}

func freebind(_, _ string, c syscall.RawConn) error {
	var opt error
	err := c.Control(func(fd uintptr) {
		opt = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(err, opt)
}

// ServeDNS implements dns.Handler.
func (r *resolver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	var src netip.Addr
	if ap, err := netip.ParseAddrPort(w.RemoteAddr().String()); err == nil {
		src = ap.Addr().Unmap()
	}
	if err := w.WriteMsg(r.answer(q, src)); err != nil {
		r.log.Debug("dns answer not sent", "client", src, "error", err)
	}
}

// answer decides: refused for strangers, for what is not in the mesh and before
// the first generation; NXDOMAIN for unknown names; an empty answer for types a
// known name does not have.
func (r *resolver) answer(q *dns.Msg, src netip.Addr) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(1232, false)
	}
	if q.Opcode != dns.OpcodeQuery || len(q.Question) != 1 {
		m.Rcode = dns.RcodeFormatError
		return m
	}
	question := q.Question[0]
	name := strings.TrimSuffix(strings.ToLower(question.Name), ".")
	wd := r.world.Load()
	if wd == nil {
		m.Rcode = dns.RcodeServerFailure
		return m
	}
	asking := wd.byAddress[src]
	if asking == nil || question.Qclass != dns.ClassINET || (name != "mesh" && !strings.HasSuffix(name, ".mesh")) {
		m.Rcode = dns.RcodeRefused
		return m
	}
	m.Authoritative = true
	found, vip := wd.lookup(asking, name)
	if !found {
		m.Rcode = dns.RcodeNameError
	}
	if !found || !vip.Is4() || (question.Qtype != dns.TypeA && question.Qtype != dns.TypeANY) {
		m.Ns = []dns.RR{authority()}
		return m
	}
	m.Answer = []dns.RR{&dns.A{
		Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: dnsTTL},
		A:   vip.AsSlice(),
	}}
	return m
}

// authority bounds how long "no such name" is remembered (RFC 2308).
func authority() dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: "mesh.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: dnsTTL},
		Ns:  "warden.mesh.", Mbox: "warden.mesh.", Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: dnsTTL,
	}
}

package proxytest

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
)

// eastWestPort is network.EastWestPort.
const eastWestPort = 15443

// Mesh joins the fakes of several nodes, so that calls can be made between them.
type Mesh struct {
	mu      sync.Mutex
	places  map[netip.Addr]place
	blocked func(from, to netip.Addr) bool
	ports   uint16
}

type place struct {
	fake *Fake
	id   string
	addr netip.Addr
}

// NewMesh makes an empty one.
func NewMesh() *Mesh { return &Mesh{places: map[netip.Addr]place{}, ports: 30000} }

// Place says at which address a proxy of a fake can be reached: a replica's own,
// a gateway's node's.
func (m *Mesh) Place(f *Fake, id string, addr netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.places[addr] = place{f, id, addr}
}

// Remove takes the address away.
func (m *Mesh) Remove(addr netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.places, addr)
}

// Block cuts ways between addresses; nil heals all.
func (m *Mesh) Block(cut func(from, to netip.Addr) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blocked = cut
}

// Response is what became of a call.
type Response struct {
	// Status is HTTP's; for TCP 200 stands for connected, 0 for refused or closed.
	Status int
	// Callee is the allocation that answered, Cluster the caller's choice.
	Callee, Cluster string
	// Caller is the identity that the callee saw.
	Caller string
	// Via is the address of the east-west gateway that was passed, if one was.
	Via netip.Addr
	// Detail says why the call failed.
	Detail string
}

// OK says that the call was answered by an application.
func (r Response) OK() bool { return r.Status == 200 }

// Call makes a call from the proxy at an address: its application's, or for an
// ingress that of somebody outside.
func (m *Mesh) Call(ctx context.Context, from netip.Addr, r Request) Response {
	src, ok := m.at(from)
	if !ok {
		return Response{Detail: fmt.Sprintf("no proxy at %s", from)}
	}
	p, err := src.fake.get("call from proxy", src.id)
	if err != nil {
		return Response{Detail: err.Error()}
	}
	listener := "outbound"
	if p.spec.Role == "ingress" {
		listener = "ingress"
	}
	p.mu.Lock()
	to := p.state.outbound(listener, r, "")
	own, ownErr := p.state.certificate()
	p.mu.Unlock()
	if to.status != 0 {
		return Response{Status: to.status, Cluster: to.cluster, Detail: "answered by the caller's proxy"}
	}
	if ownErr != nil {
		return Response{Status: 503, Cluster: to.cluster, Detail: ownErr.Error()}
	}
	return m.deliver(ctx, from, p, to, own, r)
}

func (m *Mesh) at(a netip.Addr) (place, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p, ok := m.places[a]
	return p, ok
}

func (m *Mesh) open(from, to netip.Addr) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.blocked == nil || !m.blocked(from, to)
}

func (m *Mesh) port() uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ports++
	return m.ports
}

// deliver brings a call to the endpoint, through a gateway when it is one.
func (m *Mesh) deliver(ctx context.Context, from netip.Addr, caller *instance, to choice, own *tls.Certificate, r Request) Response {
	out := Response{Cluster: to.cluster}
	fail := func(format string, args ...any) Response {
		out.Detail = fmt.Sprintf(format, args...)
		if to.http {
			out.Status = 503
		}
		return out
	}
	target := to.endpoint
	for range 2 {
		if !m.open(from, target.Addr()) {
			return fail("no way from %s to %s", from, target.Addr())
		}
		dst, ok := m.at(target.Addr())
		if !ok {
			return fail("nothing listens at %s", target)
		}
		p, err := dst.fake.get("call to proxy", dst.id)
		if err != nil {
			return fail("%s", err)
		}
		if target.Port() == eastWestPort {
			p.mu.Lock()
			next := p.state.outbound("east-west", Request{To: target, Turn: r.Turn, Pick: r.Pick}, to.sni)
			p.mu.Unlock()
			if next.status != 0 {
				return fail("the gateway at %s does not pass %s", target.Addr(), to.sni)
			}
			out.Via, from, target = target.Addr(), target.Addr(), next.endpoint
			continue
		}
		out.Callee = dst.id
		if err := caller.trusts(p, to.accepts); err != nil {
			return fail("%s", err)
		}
		status, caller, err := p.inbound(ctx, netip.AddrPortFrom(from, m.port()), target.Port(), own, r)
		out.Caller = caller
		if err != nil {
			return fail("%s", err)
		}
		out.Status = status
		return out
	}
	return fail("the way does not end at a replica")
}

// inbound is the callee's side: TLS in both directions, then the authorizer.
func (p *instance) inbound(ctx context.Context, from netip.AddrPort, port uint16, peer *tls.Certificate, r Request) (int, string, error) {
	if err := p.thawed(ctx); err != nil {
		return 0, "", err
	}
	p.mu.Lock()
	st, conn, drained := p.state, p.conn, p.drained
	own, err := st.certificate()
	chain, http := st.inboundChain(port)
	var peerID string
	if err == nil && chain {
		peerID, err = st.verify("PEERS", peer)
	}
	p.mu.Unlock()
	switch {
	case drained:
		return 0, "", errors.New("the callee has drained")
	case err != nil:
		return 0, peerID, err
	case !chain:
		return 0, "", fmt.Errorf("the callee serves nothing on port %d", port)
	}
	ownID, err := spiffeOf(own)
	if err != nil {
		return 0, peerID, err
	}
	if http {
		p.mu.Lock()
		p.requests++
		p.mu.Unlock()
	}
	res, err := authv3.NewAuthorizationClient(conn).Check(ctx, checkRequest(from, port, peerID, ownID, http, r))
	if err != nil {
		if http {
			return 403, peerID, nil
		}
		return 0, peerID, fmt.Errorf("authorizer: %w", err)
	}
	if res.GetStatus().GetCode() != int32(codes.OK) {
		if !http {
			return 0, peerID, errors.New("denied")
		}
		return int(cmp.Or(res.GetDeniedResponse().GetStatus().GetCode(), 403)), peerID, nil
	}
	return 200, peerID, nil
}

// trusts is the caller's side of TLS: the callee's certificate must be of its
// domain's roots, and one of those that are expected.
func (p *instance) trusts(callee *instance, accepts []string) error {
	callee.mu.Lock()
	cert, err := callee.state.certificate()
	callee.mu.Unlock()
	if err != nil {
		return err
	}
	p.mu.Lock()
	id, err := p.state.verify("ALL", cert)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	if len(accepts) > 0 && !slices.Contains(accepts, id) {
		return fmt.Errorf("the caller does not accept %s", id)
	}
	return nil
}

func checkRequest(from netip.AddrPort, port uint16, peer, own string, http bool, r Request) *authv3.CheckRequest {
	address := func(a string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: a, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}
	}
	a := &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: address(from.Addr().String(), uint32(from.Port())), Principal: peer},
		Destination: &authv3.AttributeContext_Peer{Address: address("127.0.0.1", uint32(port)), Principal: own},
	}
	if http {
		headers := map[string]string{":method": cmp.Or(r.Method, "GET"), ":path": cmp.Or(r.Path, "/"), ":authority": r.Host}
		for k, v := range r.Headers {
			headers[strings.ToLower(k)] = v
		}
		a.Request = &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: cmp.Or(r.Method, "GET"), Path: cmp.Or(r.Path, "/"), Host: r.Host, Headers: headers, Protocol: "HTTP/1.1", Scheme: "http",
		}}
	}
	return &authv3.CheckRequest{Attributes: a}
}

// inboundChain says whether a port is served, and whether as HTTP.
func (s *state) inboundChain(port uint16) (served, http bool) {
	l, ok := s.active[ListenerType]["inbound"].message.(*listenerv3.Listener)
	if !ok {
		return false, false
	}
	for _, c := range l.GetFilterChains() {
		if uint16(c.GetFilterChainMatch().GetDestinationPort().GetValue()) != port {
			continue
		}
		for _, f := range c.GetFilters() {
			if unpack(f.GetTypedConfig(), &hcmv3.HttpConnectionManager{}) {
				return true, true
			}
		}
		return true, false
	}
	return false, false
}

func (s *state) certificate() (*tls.Certificate, error) {
	secret, ok := s.have[SecretType]["default"].message.(*tlsv3.Secret)
	if !ok {
		return nil, errors.New("the proxy has no identity")
	}
	c := secret.GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		return nil, fmt.Errorf("the proxy's identity is unusable: %w", err)
	}
	return &pair, nil
}

func spiffeOf(c *tls.Certificate) (string, error) {
	if c.Leaf == nil || len(c.Leaf.URIs) != 1 {
		return "", errors.New("the certificate has not exactly one URI")
	}
	return c.Leaf.URIs[0].String(), nil
}

// verify checks a peer against a secret as Envoy's SPIFFE validator does: the
// roots of its own domain, then the accepted names.
func (s *state) verify(name string, peer *tls.Certificate) (string, error) {
	id, err := spiffeOf(peer)
	if err != nil {
		return "", err
	}
	secret, ok := s.have[SecretType][name].message.(*tlsv3.Secret)
	if !ok {
		return id, fmt.Errorf("secret %s is missing", name)
	}
	v := secret.GetValidationContext()
	cfg := &tlsv3.SPIFFECertValidatorConfig{}
	if !unpack(v.GetCustomValidatorConfig().GetTypedConfig(), cfg) {
		return id, fmt.Errorf("secret %s is no SPIFFE validator", name)
	}
	domain, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	roots := x509.NewCertPool()
	for _, d := range cfg.GetTrustDomains() {
		if d.GetName() == domain {
			addRoots(roots, d.GetTrustBundle().GetInlineBytes())
		}
	}
	between := x509.NewCertPool()
	for _, der := range peer.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	_, err = peer.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return id, fmt.Errorf("%s is not trusted: %w", id, err)
	}
	matchers := v.GetMatchTypedSubjectAltNames()
	for _, m := range matchers {
		if e := m.GetMatcher().GetExact(); e != "" && e == id {
			return id, nil
		}
		if p := m.GetMatcher().GetPrefix(); p != "" && strings.HasPrefix(id, p) {
			return id, nil
		}
	}
	if len(matchers) > 0 {
		return id, fmt.Errorf("%s is not accepted", id)
	}
	return id, nil
}

func addRoots(pool *x509.CertPool, b []byte) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			pool.AddCert(c)
		}
	}
}

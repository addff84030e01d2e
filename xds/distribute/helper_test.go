package distribute

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/portolan-io/portolan/federation/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testType = "type.googleapis.com/google.protobuf.StringValue"

// res makes a resource of the test type.
func res(t testing.TB, name, body string) *Resource { return typed(t, testType, name, body) }

func typed(t testing.TB, typeURL, name, body string) *Resource {
	t.Helper()
	r, err := NewResource(typeURL, name, wrapperspb.String(body))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// body reads a resource of the test type back.
func body(r *Resource) string {
	m := &wrapperspb.StringValue{}
	if r == nil || r.Body.UnmarshalTo(&wrapperspb.StringValue{}) != nil && unmarshalAny(r.Body, m) != nil {
		return "<broken>"
	}
	_ = unmarshalAny(r.Body, m)
	return m.Value
}

func unmarshalAny(a *anypb.Any, m *wrapperspb.StringValue) error {
	return (&anypb.Any{TypeUrl: testType, Value: a.GetValue()}).UnmarshalTo(m)
}

func mark(t testing.TB, revision int) *Resource {
	return res(t, api.WatermarkName, fmt.Sprint(revision))
}

// hub is a server over bufconn that can be stopped and started.
type hub struct {
	t     testing.TB
	cache *Cache

	mu   sync.Mutex
	lis  *bufconn.Listener
	grpc *grpc.Server
	stop context.CancelFunc
}

func newHub(t testing.TB, cfg CacheConfig) *hub {
	h := &hub{t: t, cache: NewCache(cfg)}
	h.start()
	t.Cleanup(h.close)
	return h
}

func (h *hub) start() {
	ctx, cancel := context.WithCancel(context.Background())
	srv := NewServer(ctx, ServerConfig{Cache: h.cache, Identify: func(_ context.Context, n *corev3.Node) (string, error) {
		if n.GetId() == "" {
			return "", api.E(api.Unknown, "identify", "no node ID")
		}
		return n.GetId(), nil
	}})
	g := grpc.NewServer()
	srv.Register(g)
	lis := bufconn.Listen(1 << 20)
	h.mu.Lock()
	h.lis, h.grpc, h.stop = lis, g, cancel
	h.mu.Unlock()
	go func() { _ = g.Serve(lis) }()
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stop()
	h.grpc.Stop()
}

func (h *hub) conn() *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///hub", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			h.mu.Lock()
			lis := h.lis
			h.mu.Unlock()
			return lis.DialContext(ctx)
		}))
	if err != nil {
		h.t.Fatal(err)
	}
	return conn
}

// peer is a raw consumer that speaks the protocol word by word.
type peer struct {
	t      testing.TB
	stream deltaStream
	got    chan *discovery.DeltaDiscoveryResponse
	end    chan error
	id     string
}

func (h *hub) peer(id string) *peer {
	h.t.Helper()
	conn := h.conn()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	p := &peer{t: h.t, stream: s, id: id, got: make(chan *discovery.DeltaDiscoveryResponse, 1000), end: make(chan error, 1)}
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				p.end <- err
				return
			}
			p.got <- r
		}
	}()
	h.t.Cleanup(func() { cancel(); _ = conn.Close() })
	return p
}

func (p *peer) send(r *discovery.DeltaDiscoveryRequest) {
	p.t.Helper()
	r.Node = NodeOf(p.id)
	if err := p.stream.Send(r); err != nil {
		p.t.Fatal(err)
	}
	synctest.Wait()
}

func (p *peer) subscribe(typeURL string, known map[string]string, names ...string) {
	p.t.Helper()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names, InitialResourceVersions: known})
}

func (p *peer) ack(r *discovery.DeltaDiscoveryResponse) {
	p.t.Helper()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

func (p *peer) nack(r *discovery.DeltaDiscoveryResponse, message string) {
	p.t.Helper()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Code: 13, Message: message}})
}

// next is the next response, in short form: "type: name=body name=body -removed".
func (p *peer) next() (*discovery.DeltaDiscoveryResponse, string) {
	p.t.Helper()
	synctest.Wait()
	select {
	case r := <-p.got:
		return r, short(r)
	default:
		p.t.Fatal("no response came")
		return nil, ""
	}
}

// expect takes the next response, compares it and acknowledges.
func (p *peer) expect(want string) {
	p.t.Helper()
	r, got := p.next()
	if got != want {
		p.t.Fatalf("got  %s\nwant %s", got, want)
	}
	p.ack(r)
}

func (p *peer) quiet() {
	p.t.Helper()
	synctest.Wait()
	select {
	case r := <-p.got:
		p.t.Fatalf("unexpected response: %s", short(r))
	default:
	}
}

func short(r *discovery.DeltaDiscoveryResponse) string {
	s := ""
	for _, m := range r.GetResources() {
		s += " " + m.GetName() + "=" + body(&Resource{Body: m.GetResource()})
	}
	for _, name := range r.GetRemovedResources() {
		s += " -" + name
	}
	if s == "" {
		return "nothing"
	}
	return s[1:]
}

// consume runs a Consumer until the test ends.
func (h *hub) consume(cfg ConsumerConfig) (*Consumer, context.CancelFunc) {
	h.t.Helper()
	if cfg.TypeURL == "" {
		cfg.TypeURL = testType
	}
	cfg.Dial = func(context.Context) (Conn, error) { return h.conn(), nil }
	cfg.MinBackoff = 10 * time.Millisecond
	c, err := NewConsumer(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Run(ctx); err != nil {
			h.t.Errorf("Run: %v", err)
		}
	}()
	stop := func() { cancel(); <-done }
	h.t.Cleanup(stop)
	return c, stop
}

package proxytest_test

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/grpc/test/bufconn"

	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/proxy/proxytest"
)

// pipes are the sockets of a test, in memory.
type pipes struct {
	mu sync.Mutex
	l  map[string]*bufconn.Listener
}

func (p *pipes) dial(ctx context.Context, spec proxy.Spec) (net.Conn, error) {
	p.mu.Lock()
	l := p.l[spec.ID]
	p.mu.Unlock()
	if l == nil {
		return nil, net.ErrClosed
	}
	return l.DialContext(ctx)
}

func TestFakeConformance(t *testing.T) {
	proxytest.Run(t, func(t *testing.T) proxytest.Harness {
		p := &pipes{l: map[string]*bufconn.Listener{}}
		f := proxytest.NewFake(proxytest.FakeConfig{Dial: p.dial})
		t.Cleanup(f.Close)
		dir := t.TempDir()
		return proxytest.Harness{
			Proxies: f,
			Spec: func(id string) proxy.Spec {
				return proxy.Spec{ID: id, Dir: filepath.Join(dir, id), XDSSocket: filepath.Join(dir, id, proxy.XDSSocketFile), Role: proxy.RoleSidecar}
			},
			Listen: func(_ *testing.T, spec proxy.Spec) net.Listener {
				l := bufconn.Listen(1 << 20)
				p.mu.Lock()
				p.l[spec.ID] = l
				p.mu.Unlock()
				return l
			},
		}
	})
}

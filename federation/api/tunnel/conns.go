package tunnel

import (
	"context"
	"slices"
	"sync"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
)

// Conns are the tunnels that lower planes dialled, by who dialled. The newest
// tunnel of a key is the one that counts. The zero value is ready.
//
// Concurrency: safe for concurrent use.
type Conns struct {
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
}

// Handle serves one tunnel RPC: the stream's client is available under key until
// the stream or ctx ends or a newer one takes its place. It returns then.
func (c *Conns) Handle(ctx context.Context, key string, s Stream) error {
	cc, gone, err := Client(s)
	if err != nil {
		return api.E(api.Internal, "open tunnel of "+key, "%w", err)
	}
	c.mu.Lock()
	if c.conns == nil {
		c.conns = map[string]*grpc.ClientConn{}
	}
	old := c.conns[key]
	c.conns[key] = cc
	c.mu.Unlock()
	if old != nil {
		hangUp(old)
	}
	select {
	case <-gone:
	case <-s.Context().Done():
	case <-ctx.Done():
	}
	c.mu.Lock()
	if c.conns[key] == cc {
		delete(c.conns, key)
	}
	c.mu.Unlock()
	hangUp(cc)
	return nil
}

// hangUp does not wait: a write that is held back by the stream ends only when
// the stream's handler has returned.
func hangUp(cc *grpc.ClientConn) { go func() { _ = cc.Close() }() }

// Get gives the connection to who has a tunnel open.
func (c *Conns) Get(key string) (grpc.ClientConnInterface, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cc, ok := c.conns[key]
	return cc, ok
}

// Keys lists who has a tunnel open, in order.
func (c *Conns) Keys() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys := make([]string, 0, len(c.conns))
	for k := range c.conns {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

package link

import (
	"context"
	"sync"
	"time"

	"github.com/portolan-io/portolan/xds/distribute"
)

// hangUpTimeout is how long a farewell is waited for.
const hangUpTimeout = 100 * time.Millisecond

// replicas says which federation replica is used now. Whoever sees it fail moves
// everybody to the next one.
type replicas struct {
	cfg *Config

	mu      sync.Mutex
	current int
	// intents is the connection of the consumer, and where it leads.
	intents *intentConn
}

type intentConn struct {
	distribute.Conn
	at   int
	once sync.Once
}

func (c *intentConn) Close() error {
	c.once.Do(func() { hangUp(c.Conn) })
	return nil
}

// hangUp closes a connection. To a peer that is cut off, a farewell may take
// seconds; nobody waits for it.
func hangUp(c distribute.Conn) {
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Close() }()
	select {
	case <-done:
	case <-time.After(hangUpTimeout):
	}
}

// pick gives the replica in use and its number.
func (r *replicas) pick() (string, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg.Addresses[r.current], r.current
}

// failed moves on from a replica, if nobody did before.
func (r *replicas) failed(at int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == at {
		r.current = (at + 1) % len(r.cfg.Addresses)
	}
}

// dialForIntents is the consumer's Dialer.
func (r *replicas) dialForIntents(ctx context.Context) (distribute.Conn, error) {
	address, at := r.pick()
	r.mu.Lock()
	r.intents = nil
	r.mu.Unlock()
	conn, err := r.cfg.Dial(ctx, address)
	if err != nil {
		r.failed(at)
		return nil, err
	}
	c := &intentConn{Conn: conn, at: at}
	r.mu.Lock()
	r.intents = c
	r.mu.Unlock()
	return c, nil
}

// failedIntents moves on from where the consumer was.
func (r *replicas) failedIntents() {
	r.mu.Lock()
	c := r.intents
	r.mu.Unlock()
	if c != nil {
		r.failed(c.at)
	}
}

// abandon takes the consumer off a replica that does not answer reports either:
// its stream may hang without an error.
func (r *replicas) abandon(at int) {
	r.failed(at)
	r.mu.Lock()
	c := r.intents
	r.mu.Unlock()
	if c != nil && c.at == at {
		_ = c.Close()
	}
}

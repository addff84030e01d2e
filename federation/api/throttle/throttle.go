// Package throttle bounds what strangers may ask of a server: callers without a
// certificate, of whom nothing is known but where they call from. It owns one
// bucket for each address and one for all of them, and never says who may do what.
//
// Concurrency: a Throttle is safe for concurrent use.
package throttle

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
)

// The bounds. A rack that is switched on calls from one address; what is refused
// tries again with backoff.
const (
	perAddress, addressBurst = 5, 20 // calls per second
	overall, overallBurst    = 50, 200
	maxAddresses             = 4096
)

// Throttle is the buckets. Make one with New.
type Throttle struct {
	mu  sync.Mutex
	all *rate.Limiter
	by  map[string]*rate.Limiter
}

// New makes full buckets.
func New() *Throttle {
	return &Throttle{all: rate.NewLimiter(overall, overallBurst), by: map[string]*rate.Limiter{}}
}

// Take counts one call of a stranger; api.Exhausted when there were too many.
func (t *Throttle) Take(ctx context.Context, doing string, now time.Time) error {
	if !t.allow(Address(ctx), now) {
		return api.E(api.Exhausted, doing, "too many calls from there; try again later")
	}
	return nil
}

func (t *Throttle) allow(address string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.by[address]
	if b == nil {
		// Any may make room: who comes back gets a full bucket, and all together are
		// bounded still.
		for a := range t.by {
			if len(t.by) < maxAddresses {
				break
			}
			delete(t.by, a)
		}
		b = rate.NewLimiter(perAddress, addressBurst)
		t.by[address] = b
	}
	// An address that has had enough takes nothing from the others.
	return b.AllowN(now, 1) && t.all.AllowN(now, 1)
}

// Address is where a caller calls from: the IPv4 address or, of IPv6, the /64,
// which is what one customer has.
func Address(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if a = a.Unmap().WithZone(""); a.Is4() {
		return a.String()
	}
	return netip.PrefixFrom(a, 64).Masked().String()
}

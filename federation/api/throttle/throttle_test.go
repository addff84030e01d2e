package throttle

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
)

func from(address string) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(address), Port: 4000}})
}

func TestAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7",
		"2001:db8:1:2:3::4": "2001:db8:1:2::/64", "2001:db8:1:2:ffff::": "2001:db8:1:2::/64",
	} {
		if got := Address(from(in)); got != want {
			t.Errorf("%s counts as %s, want %s", in, got, want)
		}
	}
	if got := Address(context.Background()); got != "" {
		t.Errorf("nobody calls from %q", got)
	}
}

func TestOneAddressDoesNotTakeTheOthersShare(t *testing.T) {
	x, now := New(), time.Unix(1000, 0)
	took := func(n int, address string) (got int) {
		for range n {
			switch err := x.Take(from(address), "join", now); {
			case err == nil:
				got++
			case api.KindOf(err) != api.Exhausted:
				t.Fatal(err)
			}
		}
		return got
	}
	if got := took(10_000, "192.0.2.1"); got != addressBurst {
		t.Errorf("one address was let in %d times", got)
	}
	if got := took(5, "192.0.2.2"); got != 5 {
		t.Errorf("another was let in %d times of 5", got)
	}
	now = now.Add(time.Second)
	if got := took(100, "192.0.2.1"); got != perAddress {
		t.Errorf("a second later: %d", got)
	}
}

func TestAllTogetherAreBounded(t *testing.T) {
	x, now, let := New(), time.Unix(1000, 0), 0
	for i := range 3 * maxAddresses {
		if x.allow(fmt.Sprint(i), now) {
			let++
		}
	}
	if let != overallBurst {
		t.Errorf("%d were let in at once", let)
	}
	if len(x.by) > maxAddresses {
		t.Errorf("%d addresses are remembered", len(x.by))
	}
}

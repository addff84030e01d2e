package fleet

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/federation/store/mem"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

func authority(t *testing.T, domain string) *ca.Authority {
	t.Helper()
	a, err := ca.Open(t.Context(), ca.Config{TrustDomain: domain, Storage: ca.DirStorage(t.TempDir()), SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestJoinTokenIsForOneClusterOneBundleAndAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, fed := mem.New(mem.Config{RunTwice: true}), authority(t, testFleet)
		f, err := New(Config{Store: st, Replica: "r", Fleet: testFleet, VirtualIPs: "10.68.0.0/16", FleetBundle: fed.Bundle, Peer: func(context.Context) (identity.ID, error) { return identity.ID{}, nil }})
		if err != nil {
			t.Fatal(err)
		}
		mint := func(cluster string) string {
			token, hash := fed.NewToken()
			if _, err := st.Update(t.Context(), func(tx store.Tx) error {
				return tx.Put(store.JoinToken, hash, &storev1.JoinToken{Cluster: cluster, ExpireTime: timestamppb.New(time.Now().Add(10 * time.Minute))})
			}); err != nil {
				t.Fatal(err)
			}
			return token
		}
		for _, c := range []string{"eu", "us"} {
			if _, err := st.Update(t.Context(), func(tx store.Tx) error {
				return tx.Put(store.Cluster, api.ClusterName(c), &portolanv1.Cluster{Name: api.ClusterName(c)})
			}); err != nil {
				t.Fatal(err)
			}
		}
		join := func(token, cluster string, a *ca.Authority, bundle []byte) (*linkv1.JoinResponse, error) {
			proof, err := a.Prove(token)
			if err != nil {
				t.Fatal(err)
			}
			return f.Join(t.Context(), &linkv1.JoinRequest{Token: token, Cluster: cluster, Bundle: bundle, Proof: proof})
		}
		eu, us, fake := authority(t, "eu."+testFleet), authority(t, "us."+testFleet), authority(t, "eu."+testFleet)
		refused := func(what string, kind api.Kind, err error) {
			t.Helper()
			if err == nil || api.KindOf(err) != kind {
				t.Errorf("%s: %v", what, err)
			}
		}
		token := mint("eu")
		_, err = join(token, "us", us, us.Bundle())
		refused("another cluster", api.Denied, err)
		_, err = join(token, "eu", us, us.Bundle())
		refused("roots of another domain", api.Invalid, err)
		_, err = join(token, "eu", fake, eu.Bundle())
		refused("roots whose key the caller has not", api.Denied, err)
		ghost := mint("ghost")
		_, err = join(ghost, "ghost", authority(t, "ghost."+testFleet), authority(t, "ghost."+testFleet).Bundle())
		refused("a cluster that is not in the fleet", api.Denied, err)
		unknown, _ := fed.NewToken()
		_, err = join(unknown, "eu", eu, eu.Bundle())
		refused("an unknown token", api.Denied, err)

		resp, err := join(token, "eu", eu, eu.Bundle())
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetTrustDomain() != "eu."+testFleet || resp.GetFleet() != testFleet || string(resp.GetFleetBundle()) != string(fed.Bundle()) || resp.GetVirtualIpCidr() == "" {
			t.Errorf("answer %v", resp)
		}
		if _, err := st.View(t.Context(), func(r store.Reader) error {
			rec, err := r.Get(store.TrustBundle, "eu."+testFleet)
			if err == nil && string(rec.Message.(*linkv1.TrustBundle).GetX509Roots()) != string(eu.Bundle()) {
				t.Error("the record holds other roots")
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		_, err = join(token, "eu", fake, fake.Bundle())
		refused("a used token with other roots", api.Denied, err)
		late := mint("eu")
		<-time.After(10 * time.Minute)
		_, err = join(late, "eu", eu, eu.Bundle())
		refused("an expired token", api.Denied, err)
		// The answer was lost on its way: the same again, whenever.
		if _, err := join(token, "eu", eu, eu.Bundle()); err != nil {
			t.Error("the same again:", err)
		}
	})
}

func TestObserverCountsOnlySilenceThatItWatched(t *testing.T) {
	start := time.Unix(1000, 0)
	o := &observer{timeout: 3 * time.Second}
	rows := func(at time.Duration) []store.Lease {
		// A clock of the store that is an hour off does not matter.
		return []store.Lease{{Name: LeaseOf("eu"), Expires: start.Add(at - time.Hour)}, {Name: LeaseOf("us"), Expires: start.Add(at)}}
	}
	look := func(at time.Duration, r []store.Lease) []string {
		return o.look(start.Add(at), []string{"eu", "us"}, r)
	}
	for at := time.Duration(0); at <= 20*time.Second; at += 250 * time.Millisecond {
		if s := look(at, rows(at)); len(s) != 0 {
			t.Fatalf("at %v silent: %v", at, s)
		}
	}
	stale := rows(20 * time.Second)
	for at := 20250 * time.Millisecond; at <= 23*time.Second; at += 250 * time.Millisecond {
		now := rows(at)
		now[0] = stale[0]
		if s := look(at, now); len(s) != 0 {
			t.Fatalf("at %v silent: %v", at, s)
		}
	}
	now := rows(23250 * time.Millisecond)
	now[0] = stale[0]
	if s := look(23250*time.Millisecond, now); len(s) != 1 || s[0] != "eu" {
		t.Errorf("silent: %v", s)
	}
	// This process slept, or the store was away: nobody is to blame for that.
	if s := look(60*time.Second, now); len(s) != 0 {
		t.Errorf("after a gap silent: %v", s)
	}
	for at := 60 * time.Second; at <= 63*time.Second; at += 250 * time.Millisecond {
		if s := look(at, now); len(s) != 0 {
			t.Errorf("at %v silent: %v", at, s)
		}
	}
	if s := look(63250*time.Millisecond, now); len(s) != 2 {
		t.Errorf("silent: %v", s)
	}
}

// counting counts what is asked of a store.
type counting struct {
	store.Store
	views, updates int
}

func (c *counting) View(ctx context.Context, fn func(store.Reader) error) (int64, error) {
	c.views++
	return c.Store.View(ctx, fn)
}

func (c *counting) Update(ctx context.Context, fn func(store.Tx) error) (int64, error) {
	c.updates++
	return c.Store.Update(ctx, fn)
}

// Anybody may call Join: those without a good token lock nothing, and are bounded.
func TestStrangersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, fed := &counting{Store: mem.New(mem.Config{})}, authority(t, testFleet)
		f, err := New(Config{Store: st, Replica: "r", Fleet: testFleet, VirtualIPs: "10.68.0.0/16", FleetBundle: fed.Bundle, Peer: func(context.Context) (identity.ID, error) { return identity.ID{}, nil }})
		if err != nil {
			t.Fatal(err)
		}
		eu := authority(t, "eu."+testFleet)
		token, _ := fed.NewToken()
		proof, err := eu.Prove(token)
		if err != nil {
			t.Fatal(err)
		}
		got := map[api.Kind]int{}
		for range 500 {
			_, err := f.Join(t.Context(), &linkv1.JoinRequest{Token: token, Cluster: "eu", Bundle: eu.Bundle(), Proof: proof})
			got[api.KindOf(err)]++
		}
		if got[api.Denied] != st.views || st.views > 30 || got[api.Denied]+got[api.Exhausted] != 500 || st.updates != 0 {
			t.Errorf("answers %v, %d looks, %d transactions", got, st.views, st.updates)
		}
	})
}

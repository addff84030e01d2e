package distribute

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/api"
)

// run is a test in virtual time.
func run(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// settle lets virtual time pass and everything come to rest.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func set(t testing.TB, kv ...string) []*Resource {
	var out []*Resource
	for _, s := range kv {
		name, body, _ := strings.Cut(s, "=")
		out = append(out, res(t, name, body))
	}
	return out
}

func TestNothingIsAnsweredBeforeTheViewIsLoaded(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		p := h.peer("n")
		p.subscribe(testType, map[string]string{"old": "v"}, "*")
		p.quiet()
		h.cache.Update("n", testType, set(t, "a=1"), nil) // never Set: a part is no whole
		p.quiet()
		h.cache.Set("other", testType, set(t, "a=1"))
		p.quiet()
		h.cache.Set("n", testType, set(t, "a=1"))
		p.expect("a=1 -old")
		p.quiet()
	})
}

func TestEmptySetIsAnswered(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, nil)
		p := h.peer("n")
		p.subscribe(testType, nil)
		p.expect("nothing")
		p.quiet()
	})
}

func TestOrderOfOneResponse(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, append(set(t, "z=1", "watermark=1"), set(t, "a=1", "m=1")...))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		p.expect("z=1 a=1 m=1 watermark=1")
		h.cache.Update("n", testType, set(t, "watermark=2", "b=1", "z=2"), []string{"m"})
		p.expect("z=2 b=1 watermark=2 -m")
		h.cache.Set("n", testType, set(t, "z=3", "watermark=2")) // same watermark closes another change
		p.expect("z=3 watermark=2 -a -b")
		h.cache.Set("n", testType, set(t, "watermark=2", "z=3"))
		p.quiet()
	})
}

func TestIdenticalContentSendsNothing(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1", "b=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		p.expect("a=1 b=1")
		h.cache.Set("n", testType, set(t, "b=1", "a=1"))
		h.cache.Update("n", testType, set(t, "a=1"), []string{"never"})
		p.quiet()
	})
}

func TestChangesWhileWaitingForTheAckTravelTogether(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		first, _ := p.next()
		for i := range 100 {
			h.cache.Update("n", testType, set(t, fmt.Sprintf("a=%d", i+2)), nil)
		}
		p.quiet()
		if st, _ := h.cache.Status("n"); st.Pending == 0 || len(st.Acked) != 0 {
			t.Errorf("status before the acknowledgement: %+v", st)
		}
		p.ack(first)
		p.expect("a=101")
		synctest.Wait()
		if st, _ := h.cache.Status("n"); st.Pending != 0 || st.Acked[Key{testType, "a"}] != res(t, "a", "101").Version {
			t.Errorf("status: %+v", st)
		}
	})
}

func TestResumeSendsWhatChangedOnly(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1", "b=1", "watermark=1"))
		versions := map[string]string{}
		for _, r := range set(t, "a=1", "b=1", "watermark=1") {
			versions[r.Name] = r.Version
		}
		p := h.peer("n")
		p.subscribe(testType, versions, "*")
		p.quiet()
		if st, _ := h.cache.Status("n"); !st.Connected || st.Pending != 0 || len(st.Acked) != 3 {
			t.Errorf("status after a resume with nothing to do: %+v", st)
		}
		h.cache.Set("n", testType, set(t, "b=2", "c=1", "watermark=2"))
		q := h.peer("n")
		q.subscribe(testType, versions, "*")
		q.expect("b=2 c=1 watermark=2 -a")
	})
}

func TestNackOfOneResourceQuarantinesIt(t *testing.T) {
	run(t, func(t *testing.T) {
		changes := 0
		h := newHub(t, CacheConfig{OnChange: func(string) { changes++ }})
		h.cache.Set("n", testType, set(t, "a=1", "b=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		p.expect("a=1 b=1")
		h.cache.Update("n", testType, set(t, "a=bad"), nil)
		r, _ := p.next()
		p.nack(r, "field x is wrong")
		p.quiet()
		st, _ := h.cache.Status("n")
		if len(st.Nacks) != 1 || st.Nacks[0].Name != "a" || st.Nacks[0].Message != "field x is wrong" || st.Nacks[0].Version != res(t, "a", "bad").Version {
			t.Fatalf("nacks: %+v", st.Nacks)
		}
		if st.Pending != 1 || st.Acked[Key{testType, "a"}] != res(t, "a", "1").Version {
			t.Errorf("status: %+v", st)
		}
		h.cache.Set("n", testType, set(t, "a=bad", "b=1")) // the same again
		p.quiet()
		h.cache.Update("n", testType, set(t, "b=2"), nil) // others go on
		p.expect("b=2")
		h.cache.Update("n", testType, set(t, "a=good", "b=3", "watermark=9"), nil)
		p.expect("b=3")    // what was refused before travels alone,
		p.expect("a=good") // and the watermark after it
		p.expect("watermark=9")
		synctest.Wait()
		if st, _ := h.cache.Status("n"); len(st.Nacks) != 0 || st.Pending != 0 {
			t.Errorf("status: %+v", st)
		}
		if changes == 0 {
			t.Error("OnChange was never called")
		}
	})
}

func TestNackThatNamesNobodyIsBisected(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1", "b=bad", "c=1", "watermark=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		r, got := p.next()
		if got != "a=1 b=bad c=1 watermark=1" {
			t.Fatal(got)
		}
		p.nack(r, "protocol violation")
		p.expect("a=1")
		r, _ = p.next()
		p.nack(r, "protocol violation")
		p.expect("c=1")
		p.expect("watermark=1")
		p.quiet()
		st, _ := h.cache.Status("n")
		if len(st.Nacks) != 1 || st.Nacks[0].Name != "b" {
			t.Errorf("nacks: %+v", st.Nacks)
		}
	})
}

func TestNackInEnvoysWords(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "in=1", "inbound=1", "out=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		r, _ := p.next()
		p.nack(r, "Error adding/updating listener(s) inbound: duplicate address")
		p.expect("in=1 out=1") // not known to be taken: sent again, together
		p.quiet()
		st, _ := h.cache.Status("n")
		if len(st.Nacks) != 1 || st.Nacks[0].Name != "inbound" {
			t.Errorf("nacks: %+v", st.Nacks)
		}
	})
}

// TestRestartedConsumerGetsTheLastAccepted: a consumer that lost everything is
// tried with the newest version once, and then gets the one it took before.
func TestRestartedConsumerGetsTheLastAccepted(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1", "b=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		p.expect("a=1 b=1")
		h.cache.Update("n", testType, set(t, "a=bad"), nil)
		r, _ := p.next()
		p.nack(r, "no")
		p.quiet()
		q := h.peer("n")
		q.subscribe(testType, nil, "*")
		q.expect("b=1")
		r, got := q.next()
		if got != "a=bad" {
			t.Fatal(got)
		}
		q.nack(r, "no")
		q.expect("a=1")
		q.quiet()
		if st, _ := h.cache.Status("n"); len(st.Nacks) != 1 || st.Pending != 1 {
			t.Errorf("the refusal no longer stands: %+v", st)
		}
		h.cache.Update("n", testType, nil, []string{"a"})
		q.expect("-a")
		synctest.Wait()
		if st, _ := h.cache.Status("n"); len(st.Nacks) != 0 || st.Pending != 0 {
			t.Errorf("a refusal outlives its resource: %+v", st)
		}
	})
}

func TestNamedSubscriptions(t *testing.T) {
	run(t, func(t *testing.T) {
		unknown := func(typeURL, name string) *Resource {
			if strings.HasPrefix(name, "e") {
				return res(t, name, "empty")
			}
			return nil
		}
		h := newHub(t, CacheConfig{Rules: Rules{Unknown: unknown}})
		p := h.peer("n")
		p.subscribe(testType, nil, "a", "e1", "x")
		p.quiet()
		h.cache.Set("n", testType, set(t, "a=1", "b=1"))
		p.expect("e1=empty a=1")
		p.subscribe(testType, nil, "b")
		p.expect("b=1")
		p.subscribe(testType, nil, "a") // asked for again: it may have dropped it
		p.expect("a=1")
		h.cache.Update("n", testType, set(t, "c=1", "x=1"), nil)
		p.expect("x=1") // c is none of its business
		p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: testType, ResourceNamesUnsubscribe: []string{"a"}})
		h.cache.Update("n", testType, set(t, "a=2", "e1=3"), nil)
		p.expect("e1=3")
		h.cache.Update("n", testType, nil, []string{"e1", "b"})
		p.expect("e1=empty -b")
		p.quiet()
		if st, _ := h.cache.Status("n"); st.Pending != 0 {
			t.Errorf("pending: %+v", st)
		}
	})
}

// TestMakeBeforeBreak follows Envoy's types through a change that adds and takes
// away.
func TestMakeBeforeBreak(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{Rules: EnvoyRules()})
		world := func(clusters, routes string) map[string][]*Resource {
			sets := map[string][]*Resource{ListenerType: {typed(t, ListenerType, "l", "1")}, SecretType: nil}
			for name := range strings.FieldsSeq(clusters) {
				sets[ClusterType] = append(sets[ClusterType], typed(t, ClusterType, name, "1"))
				sets[EndpointType] = append(sets[EndpointType], typed(t, EndpointType, name, "1"))
			}
			sets[RouteType] = []*Resource{typed(t, RouteType, "r", routes)}
			return sets
		}
		h.cache.SetAll("n", world("old", "old"))
		p := h.peer("n")
		p.subscribe(ClusterType, nil, "*")
		p.expect("old=1")
		p.subscribe(EndpointType, nil, "old")
		p.expect("old=1")
		p.subscribe(ListenerType, nil, "*")
		p.expect("l=1")
		p.subscribe(RouteType, nil, "r")
		p.expect("r=old")

		h.cache.SetAll("n", world("new", "new"))
		cds, got := p.next()
		if got != "new=1" {
			t.Fatalf("first %s, want the new cluster alone", got)
		}
		p.quiet() // the route waits until the cluster is there
		p.subscribe(EndpointType, nil, "new")
		eds, got := p.next()
		if got != "new=1" {
			t.Fatal(got)
		}
		p.ack(eds)
		p.ack(cds)
		rds, got := p.next()
		if got != "r=new" {
			t.Fatal(got)
		}
		p.quiet() // the old cluster stays until the route was taken
		p.ack(rds)
		_, x := p.next()
		_, y := p.next()
		if x != "-old" || y == "" {
			t.Errorf("then %q and %q, want the old cluster removed", x, y)
		}
	})
}

func TestRefusedRouteKeepsItsClusters(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{Rules: EnvoyRules()})
		sets := func(cluster, route string) map[string][]*Resource {
			return map[string][]*Resource{ClusterType: {typed(t, ClusterType, cluster, "1")}, RouteType: {typed(t, RouteType, "r", route)}}
		}
		h.cache.SetAll("n", sets("old", "1"))
		p := h.peer("n")
		p.subscribe(ClusterType, nil, "*")
		p.expect("old=1")
		p.subscribe(RouteType, nil, "r")
		p.expect("r=1")
		h.cache.SetAll("n", sets("new", "bad"))
		p.expect("new=1")
		r, _ := p.next()
		p.nack(r, "no")
		p.quiet()
		h.cache.SetAll("n", sets("new", "good"))
		p.expect("r=good")
		p.expect("-old")
	})
}

func TestUpdatedClusterGetsItsEndpointsAgain(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{Rules: EnvoyRules()})
		sets := func(v string) map[string][]*Resource {
			return map[string][]*Resource{ClusterType: {typed(t, ClusterType, "c", v)}, EndpointType: {typed(t, EndpointType, "c", "1")}, ListenerType: {typed(t, ListenerType, "l", v)}}
		}
		h.cache.SetAll("n", sets("1"))
		p := h.peer("n")
		p.subscribe(ClusterType, nil, "*")
		p.expect("c=1")
		p.subscribe(EndpointType, nil, "c")
		p.expect("c=1")
		p.subscribe(ListenerType, nil, "*")
		p.expect("l=1")
		h.cache.SetAll("n", sets("2"))
		cds, _ := p.next() // Envoy acknowledges it only once it has the endpoints
		eds, got := p.next()
		if eds.GetTypeUrl() != EndpointType || got != "c=1" {
			t.Fatalf("got %s %s", eds.GetTypeUrl(), got)
		}
		p.ack(eds)
		p.quiet()
		// It never does: the listener is not held back for ever.
		settle(6 * time.Second)
		p.expect("l=2")
		p.ack(cds)
		p.quiet()
	})
}

func TestWrongStreams(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{MaxViews: 1})
		conn := h.conn()
		defer conn.Close()
		sotw, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sotw.Recv(); status.Code(err) != codes.Unimplemented {
			t.Errorf("state of the world: %v", err)
		}
		ends := func(id string, want codes.Code) {
			t.Helper()
			p := h.peer(id)
			p.subscribe(testType, nil, "*")
			if err := <-p.end; status.Code(err) != want {
				t.Errorf("stream of %q ended with %v, want %v", id, err, want)
			}
		}
		ends("", codes.Unauthenticated)
		h.cache.Set("n", testType, nil)
		ends("too many", codes.ResourceExhausted)
		p := h.peer("n")
		for i := range maxTypes + 1 {
			p.subscribe(fmt.Sprint("type", i), nil, "*")
		}
		if err := <-p.end; status.Code(err) != codes.ResourceExhausted {
			t.Errorf("too many types: %v", err)
		}
	})
}

func TestViewsAreApart(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		const n = 50
		shared := res(t, "a", "1")
		var peers []*peer
		for i := range n {
			view := fmt.Sprintf("n%02d", i)
			h.cache.Set(view, testType, []*Resource{shared, res(t, "own", view)})
			p := h.peer(view)
			p.subscribe(testType, nil, "*")
			p.expect("a=1 own=" + view)
			peers = append(peers, p)
		}
		h.cache.Update("n07", testType, set(t, "a=2"), nil)
		for i, p := range peers {
			if i == 7 {
				p.expect("a=2")
			} else {
				p.quiet()
			}
		}
		if got := h.cache.Views(); len(got) != n || !slices.IsSorted(got) {
			t.Errorf("views: %v", got)
		}
	})
}

func TestRemoveForgetsAndClosesNothing(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1"))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		p.expect("a=1")
		h.cache.Remove("n")
		p.quiet()
		h.cache.Set("n", testType, set(t, "b=1"))
		p.expect("b=1 -a")
		_ = p.stream.CloseSend()
		synctest.Wait()
		if st, ok := h.cache.Status("n"); !ok || st.Connected {
			t.Errorf("status after the stream ended: %+v %v", st, ok)
		}
		h.cache.Remove("n")
		if _, ok := h.cache.Status("n"); ok || len(h.cache.Views()) != 0 {
			t.Error("the view is still there")
		}
	})
}

func TestLargeSetsTravelInParts(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		var rs []*Resource
		for i := range 8 {
			rs = append(rs, res(t, fmt.Sprint("r", i), strings.Repeat("x", 1<<20)))
		}
		h.cache.Set("n", testType, append(rs, mark(t, 1)))
		p := h.peer("n")
		p.subscribe(testType, nil, "*")
		var names []string
		for parts := 0; len(names) < 9; parts++ {
			r, _ := p.next()
			for _, m := range r.GetResources() {
				names = append(names, m.GetName())
			}
			if n := len(r.GetResources()); n == 0 || n > 3 {
				t.Fatalf("%d resources in one part", n)
			}
			p.ack(r)
		}
		if names[8] != api.WatermarkName {
			t.Errorf("order: %v", names)
		}
	})
}

var errFull = errors.New("disk is full")

func collect(into *[]Generation) func(context.Context, Generation) error {
	return func(_ context.Context, g Generation) error { *into = append(*into, g); return nil }
}

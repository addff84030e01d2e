package distribute

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func contents(g Generation) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(g.Resources)) {
		out = append(out, name+"="+body(g.Resources[name]))
	}
	return strings.Join(out, " ")
}

func TestConsumerCommitsAtWatermarks(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		var got []Generation
		h.consume(ConsumerConfig{NodeID: "n", Commit: collect(&got)})
		h.cache.Set("n", testType, set(t, "a=1", "b=1"))
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("committed without a watermark")
		}
		h.cache.Update("n", testType, set(t, "b=2", "watermark=1"), nil)
		synctest.Wait()
		if len(got) != 1 || contents(got[0]) != "a=1 b=2" || body(got[0].Watermark) != "1" || !slices.Equal(got[0].Changed, []string{"a", "b"}) {
			t.Fatalf("%+v", got)
		}
		h.cache.Update("n", testType, set(t, "c=1"), []string{"a"})
		h.cache.Update("n", testType, set(t, "watermark=2"), nil)
		synctest.Wait()
		if len(got) != 2 || contents(got[1]) != "b=2 c=1" || !slices.Equal(got[1].Changed, []string{"c"}) || !slices.Equal(got[1].Removed, []string{"a"}) {
			t.Fatalf("%+v", got[1])
		}
	})
}

func TestConsumerRefusesByName(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		var got []Generation
		check := func(r *Resource) error {
			if strings.HasPrefix(body(r), "bad") {
				return errors.New("spec.port: is 0")
			}
			return nil
		}
		h.consume(ConsumerConfig{NodeID: "n", Check: check, Commit: collect(&got)})
		h.cache.Set("n", testType, set(t, "a=1", "b=1", "watermark=1"))
		synctest.Wait()
		h.cache.Set("n", testType, set(t, "a=bad", "b=2", "c=bad", "watermark=2"))
		synctest.Wait()
		if len(got) != 2 || contents(got[1]) != "a=1 b=2" || body(got[1].Watermark) != "2" {
			t.Fatalf("generation: %s %+v", contents(got[len(got)-1]), got)
		}
		st, _ := h.cache.Status("n")
		if len(st.Nacks) != 2 || st.Nacks[0].Name != "a" || st.Nacks[0].Message != "spec.port: is 0" || st.Pending != 2 {
			t.Fatalf("status: %+v", st)
		}
		h.cache.Set("n", testType, set(t, "a=2", "b=2", "watermark=3"))
		synctest.Wait()
		if contents(got[len(got)-1]) != "a=2 b=2" {
			t.Error(contents(got[len(got)-1]))
		}
		if st, _ := h.cache.Status("n"); len(st.Nacks) != 0 || st.Pending != 0 {
			t.Errorf("status: %+v", st)
		}
	})
}

func TestConsumerRetriesTheCommit(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		failures, states := 3, []string{}
		var got []Generation
		h.consume(ConsumerConfig{
			NodeID: "n",
			Commit: func(_ context.Context, g Generation) error {
				if failures--; failures >= 0 {
					return errFull
				}
				got = append(got, g)
				return nil
			},
			OnState: func(connected bool, err error) { states = append(states, fmt.Sprint(connected, err)) },
		})
		h.cache.Set("n", testType, set(t, "a=1", "watermark=1"))
		synctest.Wait()
		if st, _ := h.cache.Status("n"); len(st.Acked) != 0 {
			t.Error("acknowledged before it was committed")
		}
		settle(time.Minute)
		if len(got) != 1 {
			t.Fatalf("commits: %v", got)
		}
		want := []string{"true<nil>", "true" + "commit generation: disk is full"}
		if strings.ReplaceAll(states[0], " ", "") != want[0] || !strings.Contains(states[1], "disk is full") {
			t.Errorf("states: %q", states)
		}
		if st, _ := h.cache.Status("n"); st.Pending != 0 {
			t.Errorf("status: %+v", st)
		}
	})
}

func TestConsumerOutlivesItsServer(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		var got []Generation
		h.consume(ConsumerConfig{NodeID: "n", Commit: collect(&got)})
		h.cache.Set("n", testType, set(t, "a=1", "b=1", "watermark=1"))
		synctest.Wait()
		h.close()
		settle(time.Minute)
		if st, _ := h.cache.Status("n"); st.Connected {
			t.Error("still connected")
		}
		h.cache = NewCache(CacheConfig{}) // a new process, which knows nothing yet
		h.start()
		settle(time.Minute)
		if st, ok := h.cache.Status("n"); !ok || !st.Connected {
			t.Error("not connected to the new server")
		}
		if len(got) != 1 {
			t.Fatalf("the empty server changed something: %v", got)
		}
		h.cache.Set("n", testType, set(t, "b=1", "watermark=2"))
		synctest.Wait()
		if len(got) != 2 || contents(got[1]) != "b=1" || !slices.Equal(got[1].Removed, []string{"a"}) || len(got[1].Changed) != 0 {
			t.Fatalf("%+v", got[len(got)-1])
		}
	})
}

func TestConsumerResumesFromDisk(t *testing.T) {
	run(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		h.cache.Set("n", testType, set(t, "a=1", "b=1", "watermark=1"))
		var first, second []Generation
		_, stop := h.consume(ConsumerConfig{NodeID: "n", Commit: collect(&first)})
		synctest.Wait()
		stop()
		h.consume(ConsumerConfig{NodeID: "n", Known: &first[0], Commit: collect(&second)})
		synctest.Wait()
		if len(second) != 0 {
			t.Fatal("an unchanged generation was sent again")
		}
		h.cache.Update("n", testType, set(t, "b=2", "watermark=2"), nil)
		synctest.Wait()
		if len(second) != 1 || contents(second[0]) != "a=1 b=2" || !slices.Equal(second[0].Changed, []string{"a", "b"}) {
			t.Fatalf("%+v", second)
		}
	})
}

func TestConsumerBacksOffWithFullJitter(t *testing.T) {
	c, err := NewConsumer(ConsumerConfig{
		TypeURL: testType, Dial: func(context.Context) (Conn, error) { return nil, errFull }, Commit: func(context.Context, Generation) error { return nil },
		MinBackoff: 100 * time.Millisecond, MaxBackoff: 2 * time.Second, Rand: func() float64 { return 0.5 },
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []time.Duration
	for i := range 7 {
		got = append(got, c.backoff(i))
	}
	ms := time.Millisecond
	if want := []time.Duration{50 * ms, 100 * ms, 200 * ms, 400 * ms, 800 * ms, 1000 * ms, 1000 * ms}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if c.backoff(1000) > 2*time.Second {
		t.Error("overflow")
	}
	run(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := c.Run(ctx); err != nil {
			t.Errorf("Run after its context ended: %v", err)
		}
	})
}

// TestConsumerEndsWithWhatWasSet: whatever happens in whatever order, restarts
// included, the committed set is the last one that was set.
func TestConsumerEndsWithWhatWasSet(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.SampledFrom([]string{"set", "update", "remove", "restart", "wait", "drop"}), 1, 30).Draw(rt, "steps")
		synctest.Test(t, func(t *testing.T) {
			h := newHub(t, CacheConfig{})
			want, revision := map[string]string{}, 0
			apply := func() {
				revision++
				rs := []*Resource{mark(t, revision)}
				for name, b := range want {
					rs = append(rs, res(t, name, b))
				}
				h.cache.Set("n", testType, rs)
			}
			apply()
			var got []Generation
			h.consume(ConsumerConfig{NodeID: "n", Commit: collect(&got)})
			for i, step := range steps {
				name := fmt.Sprint("r", i%5)
				switch step {
				case "set":
					want[name] = fmt.Sprint(i)
					apply()
				case "update":
					want[name] = fmt.Sprint(i)
					revision++
					h.cache.Update("n", testType, []*Resource{res(t, name, fmt.Sprint(i)), mark(t, revision)}, nil)
				case "remove":
					delete(want, name)
					revision++
					h.cache.Update("n", testType, []*Resource{mark(t, revision)}, []string{name})
				case "restart":
					h.close()
					h.cache = NewCache(CacheConfig{})
					apply()
					h.start()
				case "drop":
					h.close()
					h.start()
				case "wait":
					settle(time.Second)
				}
			}
			settle(time.Minute)
			var expect []string
			for _, name := range slices.Sorted(maps.Keys(want)) {
				expect = append(expect, name+"="+want[name])
			}
			if last := got[len(got)-1]; contents(last) != strings.Join(expect, " ") || body(last.Watermark) != fmt.Sprint(revision) {
				t.Errorf("committed %q at %s, want %q at %d", contents(last), body(last.Watermark), expect, revision)
			}
		})
	})
}

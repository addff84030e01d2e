package distribute

import (
	"context"
	"testing"
	"testing/synctest"
)

func TestWatermarkLastAndCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, CacheConfig{})
		var got []Generation
		h.consume(ConsumerConfig{NodeID: "n", Commit: func(_ context.Context, g Generation) error { got = append(got, g); return nil }})
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("committed before anything was set")
		}
		h.cache.Set("n", testType, []*Resource{mark(t, 1), res(t, "b", "1"), res(t, "a", "1")})
		synctest.Wait()
		if len(got) != 1 || len(got[0].Resources) != 2 || body(got[0].Watermark) != "1" {
			t.Fatalf("generations: %+v", got)
		}
		h.cache.Update("n", testType, []*Resource{res(t, "a", "2"), mark(t, 2)}, []string{"b"})
		synctest.Wait()
		if len(got) != 2 || len(got[1].Resources) != 1 || got[1].Changed[0] != "a" || got[1].Removed[0] != "b" {
			t.Fatalf("generations: %+v", got)
		}
		st, ok := h.cache.Status("n")
		if !ok || !st.Connected || st.Pending != 0 || len(st.Acked) != 2 {
			t.Fatalf("status: %+v", st)
		}
	})
}

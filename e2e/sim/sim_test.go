package sim

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
)

// eventsPerSeed is how long one cluster lives.
const eventsPerSeed = 2000

func fromEnv(t *testing.T, name string, def int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestEvents runs model clusters through random events, SIM_EVENTS of them (20,000;
// `make sim` sets a million), each followed by a check of the invariants; at the
// end of each cluster's life everything heals, and desired must become actual.
// SEED runs one seed again and tells its story.
func TestEvents(t *testing.T) {
	if seed := os.Getenv("SEED"); seed != "" {
		n, err := strconv.ParseUint(seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		c := New(n)
		c.tell = 1 << 20
		err = lived(c)
		t.Logf("%s", strings.Join(c.Log(), "\n"))
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	seeds := max(1, fromEnv(t, "SIM_EVENTS", 6_000)/eventsPerSeed)
	began := time.Now()
	var mu sync.Mutex
	reached := map[string]int{}
	var wg sync.WaitGroup
	next := make(chan uint64)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := range next {
				c := New(seed)
				err := lived(c)
				mu.Lock()
				for k, n := range c.Reached {
					reached[k] += n
				}
				mu.Unlock()
				if err != nil {
					log := c.Log()
					t.Errorf("SEED=%d: %v\n%s", seed, err, strings.Join(log[max(0, len(log)-60):], "\n"))
				}
			}
		})
	}
	for seed := range uint64(seeds) {
		if t.Failed() {
			break
		}
		next <- seed + 1
	}
	close(next)
	wg.Wait()
	t.Logf("%d events in %v; reached %v", seeds*eventsPerSeed, time.Since(began).Round(time.Second), reached)
	for _, r := range rare {
		if reached[r.what] == 0 && seeds >= r.seeds {
			t.Errorf("no run came to %q", r.what)
		}
	}
}

// lived is a whole life; a core that panics in it is told with its seed.
func lived(c *Cluster) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	return c.live(eventsPerSeed)
}

// rare is what runs must come to, or they show nothing, each from so many clusters
// on.
var rare = []struct {
	what  string
	seeds int
}{
	// Nodes.
	{"all dark", 10},
	{reconcile.ZoneDark, 10},
	{reconcile.NodeLost, 10},
	{reconcile.Surplus, 10},
	{reconcile.NodeGone, 10},
	{reconcile.NodeDraining, 10},
	{reconcile.DrainDeadline, 10},
	{reconcile.NodeRefuses, 10},
	{reconcile.StayOver, 10},
	{"no longer fits", 10},
	{schedule.SelectorMismatch.String(), 10},
	{schedule.InsufficientCPU.String(), 10},
	// Room.
	{"refused", 10},
	{"displaced", 10},
	{"room given up", 10},
	{reconcile.Rebalance, 10},
	{reconcile.Moved, 10},
	// Budgets.
	{reconcile.BudgetExhausted, 10},
	{reconcile.BudgetPerHour, 10},
	{reconcile.BudgetWindow, 10},
	{reconcile.ReplacementFirst, 10},
	// Updates.
	{reconcile.RevisionReplaced, 10},
	{reconcile.NewRevision, 10},
	{reconcile.NoRestartNeeded, 10},
	{reconcile.FailingChecks, 10},
	{reconcile.NoProgress, 10},
	{"previewed", 10},
	{"switched", 10},
	{"preview given up", 10},
	// Kinds.
	{reconcile.StartInOrder, 10},
	{reconcile.ScaleDown, 10},
	{reconcile.VolumeNodeLost, 10},
	{reconcile.VolumeNodeGone, 10},
	{reconcile.VolumeLeaving, 50},
	{reconcile.EarlierLeaving, 10},
	{reconcile.ReplicaNodeLost, 10},
	{reconcile.NodeEligible, 10},
	{reconcile.JobComplete, 10},
	{reconcile.JobFailed, 10},
	{reconcile.JobRetry, 10},
	{reconcile.Expired, 10},
	{reconcile.RunBegan, 10},
	{reconcile.RunMissed, 10},
	{reconcile.RunSkipped, 10},
	{reconcile.RunReplaced, 10},
	{reconcile.HistoryLimit, 10},
	// Scaling.
	{"scaled up", 10},
	{"scaled down", 10},
}

// TestSame: one seed is one story.
func TestSame(t *testing.T) {
	var stories []string
	for range 2 {
		c := New(7)
		for range 300 {
			if err := c.Step(); err != nil {
				t.Fatal(err)
			}
		}
		stories = append(stories, strings.Join(c.Log(), "\n"))
	}
	if stories[0] != stories[1] {
		a, b := strings.Split(stories[0], "\n"), strings.Split(stories[1], "\n")
		i := 0
		for i < min(len(a), len(b)) && a[i] == b[i] {
			i++
		}
		t.Errorf("two stories of one seed, from line %d on:\n%s\n\n%s", i, strings.Join(slices.Clone(a[i:min(i+5, len(a))]), "\n"), strings.Join(b[i:min(i+5, len(b))], "\n"))
	}
}

// BenchmarkEvent is what one event and its check cost.
func BenchmarkEvent(b *testing.B) {
	c, seed := New(1), uint64(1)
	began := time.Now()
	for i := 0; b.Loop(); i++ {
		if i%eventsPerSeed == eventsPerSeed-1 {
			seed++
			c = New(seed)
		}
		if err := c.Step(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "events/s")
}

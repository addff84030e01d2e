package agent

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
)

// A replica's usage is reported when it changes noticeably, and not at every
// sample.
func TestUsageIsReportedWhenItChanges(t *testing.T) {
	inWorld(t, func(w *world) {
		var milli, queue atomic.Int64
		milli.Store(200)
		queue.Store(7)
		w.engine.Script("app", func(p *enginetest.Proc) int {
			go func() { // a metrics page on port 9000
				srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
					_, _ = fmt.Fprintf(rw, "# HELP queue Length.\nqueue{shard=\"a\"} %d\nqueue{shard=\"}b\"} 1 1700000000\nother 3\nbroken\n", queue.Load())
				})}
				_ = srv.Serve(p.Listen(9000))
			}()
			p.SetMemory(20 << 20)
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					p.SetCPU(milli.Load())
				case <-p.Signals:
					return 0
				case <-p.Killed:
					return 137
				}
			}
		})
		w.agent()
		as := assignment("w-aaaaa")
		as.Spec.Autoscale = &portolanv1.Autoscale{Max: 3, Metrics: []*portolanv1.ScaleMetric{
			{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CUSTOM, Name: "queue", Port: 9000, Target: 5},
			{Kind: portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND, Target: 5},
		}}
		w.assign(as)
		w.ready("w-aaaaa")
		usage := func() *nodev1.Usage { return w.status("w-aaaaa").GetUsage() }
		w.until("usage is reported", 15*time.Second, func() bool { return usage().GetCpuMilli() > 190 && usage().GetCpuMilli() < 210 })
		if u := usage(); u.GetMemoryBytes() != 20<<20 || u.GetCustom()["queue"] != 8 || u.RequestsPerSecond != nil {
			t.Errorf("usage %v", u)
		}
		first := usage().GetTime().AsTime()
		time.Sleep(12 * time.Second)
		if got := usage().GetTime().AsTime(); !got.Equal(first) {
			t.Errorf("the same figures were reported again after %v", got.Sub(first))
		}
		w.until("the same figures are reported so that they do not look old", 30*time.Second, func() bool { return usage().GetTime().AsTime().After(first) })
		milli.Store(500)
		if took := w.until("a change is reported", 12*time.Second, func() bool { return usage().GetCpuMilli() > 450 }); took < time.Second {
			t.Errorf("CPU over a period changed after %v", took)
		}
	})
}

func TestNoticeable(t *testing.T) {
	rate := func(v float64) *float64 { return &v }
	base := &nodev1.Usage{CpuMilli: 1000, MemoryBytes: 100 << 20, RequestsPerSecond: rate(100), Custom: map[string]float64{"q": 10}}
	for what, c := range map[string]struct {
		is   *nodev1.Usage
		want bool
	}{
		"the same":          {base, false},
		"CPU by 4 %":        {&nodev1.Usage{CpuMilli: 1040, MemoryBytes: 100 << 20, RequestsPerSecond: rate(100), Custom: map[string]float64{"q": 10}}, false},
		"CPU by 10 %":       {&nodev1.Usage{CpuMilli: 1100, MemoryBytes: 100 << 20, RequestsPerSecond: rate(100), Custom: map[string]float64{"q": 10}}, true},
		"requests by 10 %":  {&nodev1.Usage{CpuMilli: 1000, MemoryBytes: 100 << 20, RequestsPerSecond: rate(90), Custom: map[string]float64{"q": 10}}, true},
		"no requests known": {&nodev1.Usage{CpuMilli: 1000, MemoryBytes: 100 << 20, Custom: map[string]float64{"q": 10}}, true},
		"another gauge":     {&nodev1.Usage{CpuMilli: 1000, MemoryBytes: 100 << 20, RequestsPerSecond: rate(100), Custom: map[string]float64{"p": 10}}, true},
	} {
		if got := noticeable(base, c.is); got != c.want {
			t.Errorf("%s: %t", what, got)
		}
	}
}

func TestParseGauges(t *testing.T) {
	got, err := parseGauges(strings.NewReader("# TYPE a gauge\na 1\na{x=\"1\"} 2.5\nb NaN\nc{ 1\nd{y=\"} 3\"} 4\n e\t5 17\n"))
	if err != nil || len(got) != 3 || got["a"] != 3.5 || got["d"] != 4 || got["e"] != 5 {
		t.Errorf("%v, %v", got, err)
	}
}

package autoscale

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

func usage(at time.Time, milli, bytes int64) *nodev1.Usage {
	return &nodev1.Usage{Time: timestamppb.New(at), CpuMilli: milli, MemoryBytes: bytes}
}

// The stories in testdata/recommend. Commands:
//
//	use for=24h every=1m cpu=200 memory=100 [peak=300:1h] [request=500]   millicores and MiB; peak is the CPU's, once in so long
//	oom memory=200
//	recommend
func TestRecommendStories(t *testing.T) {
	datadriven.RunTest(t, "testdata/recommend", func(t *testing.T, d *datadriven.TestData) string {
		t.Helper()
		if d.Cmd == "new" {
			told = &profileStory{at: epoch}
			return ""
		}
		return told.command(t, d)
	})
}

type profileStory struct {
	p  Profile
	at time.Time
}

var told *profileStory

func (s *profileStory) command(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	arg := func(key string) string {
		for _, a := range d.CmdArgs {
			if a.Key == key {
				return a.Vals[0]
			}
		}
		return "0"
	}
	number := func(text string) int64 {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	length := func(text string) time.Duration {
		v, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	switch d.Cmd {
	case "use":
		every := length(arg("every"))
		peak, often, _ := strings.Cut(arg("peak"), ":")
		since := time.Duration(0)
		for used := time.Duration(0); used < length(arg("for")); used += every {
			milli := number(arg("cpu"))
			if often != "" && since >= length(often) {
				milli, since = number(peak), 0
			}
			s.p.Observe(usage(s.at, milli, number(arg("memory"))<<20), api.Resources{CPUMilli: number(arg("request"))})
			s.at, since = s.at.Add(every), since+every
		}
	case "oom":
		s.p.ObserveOOM(s.at, number(arg("memory"))<<20)
	case "recommend":
		r := Recommend(&s.p)
		b, err := s.p.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		show := func(r api.Resources) string { return fmt.Sprintf("%dm %dMi", r.CPUMilli, r.MemoryBytes>>20) }
		return fmt.Sprintf("lower %s, target %s, upper %s, confidence %.2f\n%s: %s\n%d bytes\n", show(r.Lower), show(r.Target), show(r.Upper), r.Confidence, r.Reason.GetCode(), r.Reason.GetMessage(), len(b))
	default:
		t.Fatalf("command %s is not known", d.Cmd)
	}
	return ""
}

// The percentile is that of the sorted samples, weighted by age, to the width of a
// bucket.
func TestPercentileAgainstSorting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h histogram
		type sample struct{ v, w float64 }
		var all []sample
		at := epoch
		for range rapid.IntRange(1, 200).Draw(t, "samples") {
			at = at.Add(time.Duration(rapid.IntRange(0, 100).Draw(t, "hours")) * time.Hour)
			v := math.Exp(rapid.Float64Range(0, 11).Draw(t, "log"))
			w := rapid.Float64Range(0.1, 4).Draw(t, "weight")
			h.add(v, w, at)
			all = append(all, sample{v, w * math.Exp2(at.Sub(epoch).Hours()/24)})
		}
		slices.SortFunc(all, func(a, b sample) int { return int(math.Copysign(1, a.v-b.v)) })
		total := 0.0
		for _, s := range all {
			total += s.w
		}
		p := rapid.Float64Range(0.05, 0.99).Draw(t, "p")
		sum, want := 0.0, 0.0
		near := false
		for _, s := range all {
			sum += s.w
			near = near || math.Abs(sum-p*total) < 1e-6*total // either side of a step is right
			if want == 0 && sum >= p*total {
				want = s.v
			}
		}
		if got := h.percentile(p); !near && want < startOf(buckets-1) && (got < want*0.999 || got > want*growth+1.001) {
			t.Fatalf("percentile %.3f is %.3f, %.3f in the sorted samples", p, got, want)
		}
	})
}

// Writing and reading moves no recommendation by more than a bucket, and never
// needs more room than is promised.
func TestProfileSurvivesWriting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawProfile(t)
		b, err := p.MarshalBinary()
		if err != nil || len(b) > MaxProfileBytes {
			t.Fatalf("%d bytes of %d: %v", len(b), MaxProfileBytes, err)
		}
		var q Profile
		if err := q.UnmarshalBinary(b); err != nil {
			t.Fatal(err)
		}
		again, err := q.MarshalBinary()
		if err != nil || !bytes.Equal(b, again) {
			t.Fatal("what is written, read and written again differs")
		}
		was, is := Recommend(p), Recommend(&q)
		near := func(a, b int64) bool { return math.Abs(float64(a-b)) <= 0.11*float64(max(a, b))+25+1<<20 }
		if p.samples > 0 && (!near(was.Target.CPUMilli, is.Target.CPUMilli) || !near(was.Target.MemoryBytes, is.Target.MemoryBytes)) {
			t.Fatalf("%+v became %+v", was, is)
		}
	})
}

func drawProfile(t *rapid.T) *Profile {
	p := &Profile{}
	at := epoch
	for range rapid.IntRange(0, 300).Draw(t, "samples") {
		at = at.Add(time.Duration(rapid.IntRange(0, 7200).Draw(t, "seconds")) * time.Second)
		u := usage(at, rapid.Int64Range(0, 2_000_000).Draw(t, "milli"), rapid.Int64Range(0, 2e12).Draw(t, "bytes"))
		p.Observe(u, api.Resources{CPUMilli: rapid.Int64Range(0, 4000).Draw(t, "request")})
	}
	return p
}

// Bounds are in order, and come nearer as more is known.
func TestRecommendationsNarrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := &Profile{}
		milli, mem := rapid.Int64Range(30, 4000).Draw(t, "milli"), rapid.Int64Range(20<<20, 8<<30).Draw(t, "bytes")
		width := math.Inf(1)
		at := epoch
		for range 5 {
			for range samplesPerDay {
				p.Observe(usage(at, milli, mem), api.Resources{})
				at = at.Add(time.Minute)
			}
			r := Recommend(p)
			if r.Lower.CPUMilli > r.Target.CPUMilli || r.Target.CPUMilli > r.Upper.CPUMilli || r.Lower.MemoryBytes > r.Target.MemoryBytes || r.Target.MemoryBytes > r.Upper.MemoryBytes {
				t.Fatalf("bounds are not in order: %+v", r)
			}
			if r.Target.CPUMilli < milli || float64(r.Target.CPUMilli) > float64(milli)*safety*growth+15 {
				t.Fatalf("%dm are used, %dm recommended", milli, r.Target.CPUMilli)
			}
			w := float64(r.Upper.CPUMilli - r.Lower.CPUMilli)
			if w > width {
				t.Fatalf("the bounds grew apart from %f to %f", width, w)
			}
			width = w
		}
	})
}

func FuzzProfile(f *testing.F) {
	var p Profile
	p.Observe(usage(epoch, 100, 1<<30), api.Resources{})
	p.Observe(usage(epoch.Add(30*time.Hour), 900, 1<<31), api.Resources{})
	b, err := p.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var q Profile
		if q.UnmarshalBinary(b) != nil {
			return
		}
		q.Observe(usage(epoch, 1, 1), api.Resources{})
		Recommend(&q)
		if out, err := q.MarshalBinary(); err != nil || len(out) > MaxProfileBytes {
			t.Fatalf("%d bytes: %v", len(out), err)
		}
	})
}

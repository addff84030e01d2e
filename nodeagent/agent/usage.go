package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/proxy"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// This file measures what replicas use: CPU and memory from the engine, requests
// from the proxy, custom gauges from the replica's own metrics page. It is reported
// when it changed noticeably, and now and then so that it does not look old.

const (
	scrapeBound = time.Second
	maxPage     = 1 << 20
	// usageAge is after how long a figure is reported again though it did not
	// change.
	usageAge = 30 * time.Second
	// imagesEvery is how often, at most, a change of the images is reported.
	imagesEvery = 30 * time.Second
	maxImages   = 1000
)

// meter is the last reading of a replica.
type meter struct {
	at       time.Time
	cpu      map[string]time.Duration // by container instance
	requests uint64
	counted  bool // requests is a reading
}

// sampleLoop reads what replicas use. Memory also goes to their state, so that an
// OOM has a last figure.
func (a *Agent) sampleLoop(ctx context.Context) error {
	meters := map[string]*meter{}
	images := time.Time{}
	for sleep(ctx, a.jittered(a.cfg.Sample)) {
		meters = a.sample(ctx, meters)
		if now := time.Now(); now.Sub(images) >= imagesEvery {
			images = now
			a.noteImages(ctx)
		}
	}
	return nil
}

// sample measures every replica that runs, and gives the readings for the next
// time.
func (a *Agent) sample(ctx context.Context, last map[string]*meter) map[string]*meter {
	byReplica := map[*runner]map[string]engine.Usage{}
	for id, in := range a.liveNow() {
		u, err := a.cfg.Engine.Usage(ctx, id)
		if err != nil {
			continue
		}
		in.r.post(task.Sampled{Container: in.container, Bytes: u.MemoryBytes})
		if byReplica[in.r] == nil {
			byReplica[in.r] = map[string]engine.Usage{}
		}
		byReplica[in.r][id] = u
	}
	next := make(map[string]*meter, len(byReplica))
	all := make(map[string]*nodev1.Usage, len(byReplica))
	for r, us := range byReplica {
		m, usage := r.measure(ctx, last[r.id], us)
		next[r.id] = m
		if usage != nil {
			all[r.id] = usage
		}
	}
	a.board.setUsage(all)
	return next
}

// measure gives the replica's reading, and with one before what it uses.
func (r *runner) measure(ctx context.Context, last *meter, us map[string]engine.Usage) (*meter, *nodev1.Usage) {
	now := time.Now()
	m := &meter{at: now, cpu: make(map[string]time.Duration, len(us))}
	u := &nodev1.Usage{Time: timestamppb.New(now)}
	cpu := time.Duration(0)
	for id, x := range us {
		m.cpu[id] = x.CPU
		u.MemoryBytes += x.MemoryBytes
		before := time.Duration(0) // a container that is new has used all of it since
		if last != nil {
			before = last.cpu[id]
		}
		cpu += max(0, x.CPU-before)
	}
	r.mu.Lock()
	as := r.assignment
	r.mu.Unlock()
	r.readRequests(ctx, as, m, last, u)
	r.readCustom(ctx, as, u)
	if last == nil || !now.After(last.at) {
		return m, nil
	}
	u.CpuMilli = int64(math.Round(1000 * float64(cpu) / float64(now.Sub(last.at))))
	return m, u
}

// scales says whether the replica's workload scales by a kind of metric.
func scales(as *nodev1.Assignment, kind portolanv1.ScaleMetricKind) bool {
	for _, m := range as.GetSpec().GetAutoscale().GetMetrics() {
		if m.GetKind() == kind {
			return true
		}
	}
	return false
}

// readRequests asks the proxy, where somebody wants to know.
func (r *runner) readRequests(ctx context.Context, as *nodev1.Assignment, m, last *meter, u *nodev1.Usage) {
	p, ok := r.a.cfg.Proxies.(proxy.Meter)
	if !ok || !scales(as, portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_REQUESTS_PER_SECOND) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, scrapeBound)
	defer cancel()
	n, err := p.Requests(ctx, r.id)
	if err != nil {
		return
	}
	m.requests, m.counted = n, true
	if last != nil && last.counted && n >= last.requests { // less: the proxy began anew
		rate := float64(n-last.requests) / m.at.Sub(last.at).Seconds()
		u.RequestsPerSecond = &rate
	}
}

// readCustom reads the gauges that the workload scales by, each page once.
func (r *runner) readCustom(ctx context.Context, as *nodev1.Assignment, u *nodev1.Usage) {
	type page struct {
		port int32
		path string
	}
	pages := map[page]map[string]float64{}
	for _, m := range as.GetSpec().GetAutoscale().GetMetrics() {
		if m.GetKind() != portolanv1.ScaleMetricKind_SCALE_METRIC_KIND_CUSTOM {
			continue
		}
		p := page{m.GetPort(), m.GetPath()}
		if p.path == "" {
			p.path = "/metrics"
		}
		gauges, ok := pages[p]
		if !ok {
			var err error
			if gauges, err = r.scrape(ctx, int(p.port), p.path); err != nil {
				r.a.log.Debug("metrics page not read", "allocation", r.id, "port", p.port, "error", err)
			}
			pages[p] = gauges
		}
		if v, ok := gauges[m.GetName()]; ok {
			if u.Custom == nil {
				u.Custom = map[string]float64{}
			}
			u.Custom[m.GetName()] = v
		}
	}
}

// scrape reads a metrics page inside the replica's namespace, as probes are made.
func (r *runner) scrape(ctx context.Context, port int, path string) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, scrapeBound)
	defer cancel()
	c, err := r.a.cfg.Dial(ctx, r.attached().NetNS, port)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort("127.0.0.1", strconv.Itoa(port))+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "portolan-metrics")
	req.Close = true
	if err := req.Write(c); err != nil {
		return nil, timeoutWords(ctx, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(c, maxPage)), req)
	if err != nil {
		return nil, timeoutWords(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s answered %d", path, resp.StatusCode)
	}
	return parseGauges(resp.Body)
}

// parseGauges reads the text format of Prometheus: the sum over the label sets of
// each name. What is no sample line is passed over.
func parseGauges(in io.Reader) (map[string]float64, error) {
	out := map[string]float64{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, rest, ok := cutName(line)
		if !ok {
			continue
		}
		value, _, _ := strings.Cut(strings.TrimSpace(rest), " ") // a timestamp may follow
		v, err := strconv.ParseFloat(value, 64)
		if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			continue
		}
		out[name] += v
	}
	return out, lines.Err()
}

// cutName splits a sample line into the metric's name and what follows its labels.
func cutName(line string) (name, rest string, ok bool) {
	i := strings.IndexAny(line, "{ \t")
	if i <= 0 {
		return "", "", false
	}
	if line[i] != '{' {
		return line[:i], line[i:], true
	}
	j := strings.LastIndexByte(line, '}') // a label's value may hold braces
	if j < i {
		return "", "", false
	}
	return line[:i], line[j+1:], true
}

// noticeable says whether a figure differs so much that others must hear of it, or
// was not reported for long.
func noticeable(was, is *nodev1.Usage) bool {
	if was == nil || is.GetTime().AsTime().Sub(was.GetTime().AsTime()) >= usageAge {
		return true
	}
	if apart(float64(was.GetCpuMilli()), float64(is.GetCpuMilli()), 10) || apart(float64(was.GetMemoryBytes()), float64(is.GetMemoryBytes()), 1<<20) {
		return true
	}
	if (was.RequestsPerSecond == nil) != (is.RequestsPerSecond == nil) || apart(was.GetRequestsPerSecond(), is.GetRequestsPerSecond(), 0.5) {
		return true
	}
	if len(was.GetCustom()) != len(is.GetCustom()) {
		return true
	}
	for name, v := range is.GetCustom() {
		if old, ok := was.GetCustom()[name]; !ok || apart(old, v, 0) {
			return true
		}
	}
	return false
}

// apart: by more than a twentieth, and by more than least.
func apart(a, b, least float64) bool {
	d := math.Abs(a - b)
	return d > least && d > max(math.Abs(a), math.Abs(b))/20
}

// noteImages reports which images are here, so that replicas can be put where
// theirs is.
func (a *Agent) noteImages(ctx context.Context) {
	l, ok := a.cfg.Engine.(engine.ImageLister)
	if !ok {
		return
	}
	images, err := l.Images(ctx)
	if err != nil {
		a.log.Debug("images not listed", "error", err)
		return
	}
	a.board.setImages(images[:min(len(images), maxImages)])
}

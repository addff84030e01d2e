// Package live holds the tests on a real local fleet: real processes, containers,
// Envoys, database and network namespaces. One fleet serves all tests; each leaves
// it as it found it, so that their order does not matter, but for the last, which
// takes it away (its file sorts last).
package live

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/client"
	"github.com/portolan-io/portolan/federation/localfleet"
)

var (
	keep    = flag.Bool("keep", false, "leave the fleet running after the tests")
	dataDir = flag.String("data-dir", "", "use the fleet of this data folder, and leave it running")
)

// fleet is the one that all tests use.
var fleet struct {
	cli     string // the binary
	dataDir string
	config  string
	before  machine // as it looked before `up`
	own     bool
	gone    bool // a test took it away
	// endCrasher deletes the workload that crashes all the time, once.
	endCrasher func()
	conn       *grpc.ClientConn
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	if testing.Short() {
		fmt.Println("live tests skipped: -short")
		return 0
	}
	if os.Geteuid() != 0 {
		fmt.Println("live tests need root: network namespaces and containers")
		return 1
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return fail("find the repository", err)
	}
	fleet.cli = filepath.Join(root, "bin", "portolan")
	if fleet.before, err = lookAtMachine(); err != nil {
		return fail("look at the machine", err)
	}
	fleet.dataDir, fleet.own = *dataDir, *dataDir == ""
	if fleet.config, err = client.DefaultPath(); err != nil {
		return fail("find the contexts", err)
	}
	if fleet.own {
		tmp, err := os.MkdirTemp("", "portolan-live-")
		if err != nil {
			return fail("make a data folder", err)
		}
		// The database's user walks through it.
		if err := os.Chmod(tmp, 0o711); err != nil {
			return fail("make a data folder", err)
		}
		fleet.dataDir = filepath.Join(tmp, "fleet")
		fleet.config = filepath.Join(tmp, "cli.yaml")
		defer os.RemoveAll(tmp)
		cmd := exec.Command(fleet.cli, "up", "--detach", "--data-dir", fleet.dataDir, "--fleet", filepath.Join(root, "e2e", "fleet.yaml"), "--config", fleet.config)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			dumpLogs()
			_ = exec.Command(fleet.cli, "down", "--purge", "--data-dir", fleet.dataDir, "--config", fleet.config).Run()
			return fail("start the fleet", err)
		}
	}
	f, err := client.Load(fleet.config)
	if err != nil {
		return fail("read the context", err)
	}
	c, err := f.Get("local")
	if err != nil {
		return fail("read the context", err)
	}
	if fleet.conn, err = client.Dial(c); err != nil {
		return fail("dial", err)
	}
	fleet.endCrasher = startCrasher()
	code := m.Run()
	if !fleet.gone {
		fleet.endCrasher()
	}
	_ = fleet.conn.Close()
	if code != 0 && fleet.own {
		dumpLogs()
	}
	if fleet.own && !*keep {
		if out, err := exec.Command(fleet.cli, "down", "--purge", "--data-dir", fleet.dataDir, "--config", fleet.config).CombinedOutput(); err != nil {
			fmt.Printf("down: %v: %s\n", err, out)
			code = 1
		}
	}
	return code
}

func fail(what string, err error) int {
	fmt.Printf("%s: %v\n", what, err)
	return 1
}

// dumpLogs prints the end of every log, so that a failure can be understood
// where only the output survives.
func dumpLogs() {
	files, _ := filepath.Glob(filepath.Join(fleet.dataDir, "logs", "*.log"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		fmt.Printf("==== %s\n%s\n", filepath.Base(f), strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
}

// run calls the CLI and returns stdout, stderr and its error.
func run(t *testing.T, stdin string, args ...string) (string, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(always(t), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, fleet.cli, append([]string{"--config", fleet.config}, args...)...)
	cmd.Env = append(os.Environ(), "PORTOLAN_DATA_DIR="+fleet.dataDir)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	return out.String(), errOut.String(), err
}

// cli calls it and fails the test when it fails.
func cli(t *testing.T, args ...string) string {
	t.Helper()
	out, errOut, err := run(t, "", args...)
	if err != nil {
		t.Fatalf("portolan %s: %v\n%s%s", strings.Join(args, " "), err, out, errOut)
	}
	return out
}

// apply applies YAML.
func apply(t *testing.T, yaml string) {
	t.Helper()
	if out, errOut, err := run(t, yaml, "apply", "-f", "-"); err != nil {
		t.Fatalf("apply: %v\n%s%s\n%s", err, out, errOut, yaml)
	}
}

// local makes or mends a fault.
func local(t *testing.T, args ...string) {
	t.Helper()
	cli(t, append([]string{"local"}, args...)...)
}

// eventually polls until ok says so; what it says last is the failure.
func eventually(t *testing.T, limit time.Duration, what string, ok func() error) time.Duration {
	t.Helper()
	began := time.Now()
	var last error
	for time.Since(began) < limit {
		if last = ok(); last == nil {
			return time.Since(began)
		}
		<-time.After(50 * time.Millisecond)
	}
	t.Fatalf("%s: not within %s: %v", what, limit, last)
	return 0
}

// replicas of a workload of the shop, "-" for all.
func replicas(t *testing.T, workload string) []*portolanv1.Replica {
	t.Helper()
	rs, err := listReplicas(always(t), workload)
	if err != nil {
		t.Fatalf("list replicas of %s: %v", workload, err)
	}
	return rs
}

func listReplicas(ctx context.Context, workload string) ([]*portolanv1.Replica, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListReplicas(ctx, &portolanv1.ListReplicasRequest{Parent: "tenants/shop/workloads/" + workload})
	if err != nil {
		return nil, err
	}
	rs := r.GetReplicas()
	sort.Slice(rs, func(i, j int) bool { return rs[i].GetName() < rs[j].GetName() })
	return rs, nil
}

func ready(rs []*portolanv1.Replica) []*portolanv1.Replica {
	var out []*portolanv1.Replica
	for _, r := range rs {
		if r.GetReady() {
			out = append(out, r)
		}
	}
	return out
}

func in(rs []*portolanv1.Replica, cluster string) []*portolanv1.Replica {
	var out []*portolanv1.Replica
	for _, r := range rs {
		if r.GetCluster() == cluster {
			out = append(out, r)
		}
	}
	return out
}

func last(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// ingress addresses of nodes, by cluster: the tests' own fixed view of e2e/fleet.yaml.
var ingressOf = map[string][]string{
	"eu-west": {"10.70.0.11:8080", "10.70.0.12:8080"},
	"us-east": {"10.71.0.11:8080", "10.71.0.12:8080"},
}

// hop is an HTTP client that enters through one ingress address.
func hop(addr string, keepAlive bool) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: !keepAlive, MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", addr)
		},
	}}
}

type answer struct {
	code   int
	body   string
	header http.Header
}

func call(ctx context.Context, hc *http.Client, method, path string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://shop.localhost"+path, nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return answer{resp.StatusCode, string(b), resp.Header}, err
}

// load is a bounded stream of requests beside a fault.
type load struct {
	mu      sync.Mutex
	total   int
	failed  int
	seen    map[string]int
	first   string // the first failure
	firstAt time.Time
	lastAt  time.Time
	// lastBegan is when the last request began of those that failed.
	lastBegan time.Time
	stop      context.CancelFunc
	done      chan struct{}
}

// startLoad sends rate requests per second until Stop, from several workers with
// kept-alive connections. Every answer other than 200 counts as failed.
func startLoad(t *testing.T, addr, path string, rate int) *load {
	t.Helper()
	ctx, cancel := context.WithTimeout(always(t), 5*time.Minute)
	l := &load{seen: map[string]int{}, stop: cancel, done: make(chan struct{})}
	hc := hop(addr, true)
	tick := time.NewTicker(time.Second / time.Duration(rate))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	go func() {
		defer close(l.done)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				wg.Wait()
				return
			case <-tick.C:
				select {
				case slots <- struct{}{}:
				default:
					continue
				}
				wg.Go(func() {
					defer func() { <-slots }()
					// A request that began is awaited: stopping is not its failure.
					rctx, rcancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
					defer rcancel()
					began := time.Now()
					a, err := call(rctx, hc, http.MethodGet, path)
					l.count(began, a, err)
				})
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-l.done })
	return l
}

func (l *load) count(began time.Time, a answer, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	if err == nil && a.code == http.StatusOK {
		l.seen[a.header.Get("X-Upstream-Cluster")+"/"+a.header.Get("X-Upstream-Version")]++
		return
	}
	l.failed++
	l.lastAt = time.Now()
	if began.After(l.lastBegan) {
		l.lastBegan = began
	}
	if l.first == "" {
		l.firstAt = l.lastAt
		l.first = fmt.Sprintf("%d %v %s", a.code, err, firstLine(a.body))
	}
}

// Stop ends it and returns total and failed.
func (l *load) Stop() (int, int) {
	l.stop()
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, l.failed
}

// lastFailure says when it was, counted from a moment; empty without one.
func (l *load) lastFailure(from time.Time) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == 0 {
		return ""
	}
	return fmt.Sprintf("; last failure %s after: %s", l.lastAt.Sub(from).Round(time.Millisecond), l.first)
}

// failedSince says whether a request failed that began after a moment.
func (l *load) failedSince(at time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastBegan.After(at)
}

// sample gives the counts so far.
func (l *load) sample() (int, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, l.failed
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	if len(s) > 200 {
		s = s[:200]
	}
	return s
}

// settle waits until everything is as declared: all workloads ready, no replica
// too many, every proxy at the newest revision.
func settle(t *testing.T) {
	t.Helper()
	want := map[string]int{"redis": 1, "payments": 2, "assets": 2, "catalog": 4, "cart": 2, "web": 2}
	eventually(t, 90*time.Second, "the fleet settles", func() error {
		rs, err := listReplicas(always(t), "-")
		if err != nil {
			return err
		}
		have := map[string]int{}
		for _, r := range rs {
			w := strings.Split(r.GetName(), "/")[3]
			if w == "restock" {
				continue
			}
			if !r.GetReady() || r.GetState() != portolanv1.ReplicaState_REPLICA_STATE_RUNNING {
				return fmt.Errorf("%s is %s (%s)", r.GetName(), r.GetState(), r.GetReason().GetCode())
			}
			have[w]++
		}
		for w, n := range want {
			if have[w] != n {
				return fmt.Errorf("%s has %d replicas, want %d", w, have[w], n)
			}
		}
		return nil
	})
	cli(t, "wait", "--timeout", "60s")
}

// processes of the fleet by name.
func processes(t *testing.T) map[string]procStatus {
	t.Helper()
	var st struct {
		Processes []procStatus `json:"processes"`
	}
	if err := json.Unmarshal([]byte(cli(t, "status", "-o", "json")), &st); err != nil {
		t.Fatal(err)
	}
	out := map[string]procStatus{}
	for _, p := range st.Processes {
		out[p.Name] = p
	}
	return out
}

type procStatus struct {
	Name, State, Health string
	Pid                 int
}

// machine is what a fleet could leave behind.
type machine struct {
	Links, Namespaces, Mounts, Processes, Tables, Cgroups, Routes []string
}

func lookAtMachine() (machine, error) {
	var m machine
	var errs []error
	lines := func(name string, args ...string) []string {
		out, err := exec.Command(name, args...).Output()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		var ls []string
		for l := range strings.Lines(string(out)) {
			ls = append(ls, strings.TrimSpace(l))
		}
		sort.Strings(ls)
		return ls
	}
	m.Links = lines("ip", "-br", "link")
	m.Namespaces = lines("ip", "netns")
	m.Routes = lines("ip", "route")
	m.Tables = lines("nft", "list", "tables")
	b, err := os.ReadFile("/proc/self/mounts")
	errs = append(errs, err)
	for l := range strings.Lines(string(b)) {
		m.Mounts = append(m.Mounts, strings.TrimSpace(l))
	}
	// Version 2 has one tree, version 1 one for each controller.
	for _, pattern := range []string{"/sys/fs/cgroup/portolan*", "/sys/fs/cgroup/*/portolan*"} {
		found, err := filepath.Glob(pattern)
		errs = append(errs, err)
		m.Cgroups = append(m.Cgroups, found...)
	}
	ps, err := fleetProcesses()
	m.Processes = ps
	errs = append(errs, err)
	sort.Strings(m.Processes)
	return m, errors.Join(errs...)
}

// fleetProcesses finds what belongs to this fleet by its folders on the command
// line or its cgroup: others on the machine may run the same programs.
func fleetProcesses() ([]string, error) {
	if fleet.dataDir == "" {
		return nil, nil // none yet
	}
	d, err := localfleet.NewDirs(fleet.dataDir)
	if err != nil {
		return nil, err
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range procs {
		if zombie(p) {
			continue
		}
		// A process that ends meanwhile reads as empty.
		cmd, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cgroup, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		s := strings.ReplaceAll(string(cmd), "\x00", " ")
		if strings.Contains(s, d.Data+"/") || strings.Contains(s, d.Run+"/") || strings.Contains(string(cgroup), "/portolan-"+d.ID+"/") {
			out = append(out, filepath.Base(p)+" "+s)
		}
	}
	return out, nil
}

// zombie says that nothing of a process is left but its entry in the table, which
// waits for its parent: init, where the supervisor was killed.
func zombie(proc string) bool {
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

// always is a context that also serves clean-ups, which run when the test's own
// has ended.
func always(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }

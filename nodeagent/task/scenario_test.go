package task_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// story is one allocation, its time, and what it printed.
type story struct {
	a    *nodev1.Assignment
	s    *task.State
	now  time.Time
	zero time.Time
	out  strings.Builder
	// fail names actions that fail, with their words; auto actions succeed at once.
	fail map[string]*task.Fault
	hold map[task.Kind]bool
	held []task.Action
	last string
}

var zero = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newStory(t *testing.T, spec string) *story {
	t.Helper()
	b, err := yaml.YAMLToJSON([]byte(spec))
	if err != nil {
		t.Fatal(err)
	}
	ws := &portolanv1.WorkloadSpec{}
	if err := protojson.Unmarshal(b, ws); err != nil {
		t.Fatal(err)
	}
	a := &nodev1.Assignment{Allocation: "w-abcde", Tenant: "t", Workload: "w", Epoch: 1, Address: "10.1.1.2", Spec: ws}
	return &story{a: a, s: task.New(a, zero), now: zero, zero: zero, fail: map[string]*task.Fault{}, hold: map[task.Kind]bool{}}
}

func (st *story) say(format string, args ...any) {
	fmt.Fprintf(&st.out, "%6s  %s\n", st.now.Sub(st.zero), fmt.Sprintf(format, args...))
}

func name(act task.Action) string {
	s := string(act.Kind)
	if act.Container != "" {
		s += " " + act.Container
	}
	switch act.Kind {
	case task.Start, task.Delete:
		s += fmt.Sprintf("#%d", act.Attempt)
	case task.Signal:
		s += map[int]string{9: " KILL", 15: " TERM"}[act.Signal]
	case task.Probe:
		s += " " + act.Probe.String()
	}
	return s
}

func (st *story) observe(o task.Observation) {
	for _, e := range task.Observe(st.a, st.s, o, st.now) {
		st.say("event %s: %s", e.Type, e.Message)
	}
}

func (st *story) finish(act task.Action) {
	f := task.Finished{Action: act, Pid: 100 + act.Attempt, At: st.now, RenewAt: st.now.Add(24 * time.Hour)}
	f.Err = st.fail[name(act)]
	st.observe(f)
}

// step goes on until there is nothing to begin, and prints the status when it
// changed.
func (st *story) step() (wake time.Time) {
	for range 1000 {
		d := task.Next(st.a, st.s, st.now)
		if line := status(d); line != st.last {
			st.last = line
			st.say("%s", line)
		}
		if d.Action.Kind == task.None {
			return d.Wake
		}
		st.say("-> %s", name(d.Action))
		st.observe(task.Began{Action: d.Action})
		switch {
		case d.Action.Kind == task.Cancel:
			st.cancel(d.Action.Container)
		case st.hold[d.Action.Kind]:
			st.held = append(st.held, d.Action)
		default:
			st.finish(d.Action)
		}
	}
	st.say("NEVER SETTLES")
	return time.Time{}
}

func (st *story) cancel(container string) {
	for i, act := range st.held {
		if act.Container == container {
			st.held = append(st.held[:i], st.held[i+1:]...)
			st.observe(task.Finished{Action: act, Err: &task.Fault{Kind: api.Canceled, Message: "canceled"}})
			return
		}
	}
}

func status(d task.Decision) string {
	s := d.Status
	line := "= " + strings.TrimPrefix(s.GetState().String(), "REPLICA_STATE_")
	if s.GetReady() {
		line += " ready"
	}
	if r := s.GetReason(); r != nil {
		line += fmt.Sprintf(" (%s: %s)", r.GetCode(), r.GetMessage())
	}
	if d.Forget {
		line += " FORGET"
	}
	return line
}

// advance lets time pass, from wake to wake.
func (st *story) advance(by time.Duration) {
	end := st.now.Add(by)
	for {
		wake := st.step()
		if wake.IsZero() || wake.After(end) {
			break
		}
		if wake.After(st.now) {
			st.now = wake
		}
	}
	st.now = end
	st.step()
}

func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		st := &story{fail: map[string]*task.Fault{}}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "assign" {
				failing := st.fail
				st = newStory(t, d.Input)
				st.fail = failing
				if d.HasArg("hold-pull") {
					st.hold[task.Pull] = true
				}
			}
			st.out.Reset()
			st.command(t, d)
			return st.out.String()
		})
	})
}

func (st *story) command(t *testing.T, d *datadriven.TestData) {
	var container, text string
	var code int
	for _, arg := range d.CmdArgs {
		switch arg.Key {
		case "c":
			container = arg.Vals[0]
		case "code":
			code, _ = strconv.Atoi(arg.Vals[0])
		}
	}
	text = strings.TrimSpace(d.Input)
	switch d.Cmd {
	case "assign":
		st.step()
	case "serving": // the warden has the sockets
		st.observe(task.ProxySeen{Serving: true})
		st.step()
	case "proxy": // ready, or lost
		st.observe(task.ProxySeen{Serving: true, Ready: !d.HasArg("lost")})
		st.step()
	case "advance":
		by, err := time.ParseDuration(d.CmdArgs[0].Key)
		if err != nil {
			d.Fatalf(t, "%v", err)
		}
		st.advance(by)
	case "exit":
		x := task.Exit{Code: code, Time: st.now, OOM: d.HasArg("oom")}
		st.observe(task.Ended{Container: container, Attempt: st.s.Container(container).Attempt, Exit: x, Lost: d.HasArg("lost")})
		st.step()
	case "memory":
		n, _ := strconv.ParseInt(text, 10, 64)
		st.observe(task.Sampled{Container: container, Bytes: n})
		st.step()
	case "fail": // each line: an action that fails from now on
		for line := range strings.Lines(text) {
			kind := api.Unavailable
			if d.HasArg("invalid") {
				kind = api.Invalid
			}
			st.fail[strings.TrimSpace(line)] = &task.Fault{Kind: kind, Message: "it failed"}
		}
	case "heal":
		clear(st.fail)
	case "hold": // actions of this kind stay in flight
		st.hold[task.Kind(d.CmdArgs[0].Key)] = true
	case "release":
		held := st.held
		st.held = nil
		clear(st.hold)
		for _, act := range held {
			st.finish(act)
		}
		st.step()
	case "stop":
		st.a.Stop, st.a.StopReason = true, text
		for _, e := range task.Tick(st.a, st.s, st.now) {
			st.say("event %s: %s", e.Type, e.Message)
		}
		st.step()
	case "adopt": // each line: container attempt [exit code]
		var o task.Adopted
		for line := range strings.Lines(text) {
			f := strings.Fields(line)
			n, _ := strconv.Atoi(f[1])
			in := task.Instance{Container: f[0], Attempt: n, Pid: 100 + n, StartedAt: st.now.Add(-time.Minute)}
			if len(f) > 2 {
				c, _ := strconv.Atoi(f[2])
				in.Exit = &task.Exit{Code: c, Time: st.now.Add(-time.Second)}
			}
			o.Instances = append(o.Instances, in)
		}
		st.observe(o)
		st.step()
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
}

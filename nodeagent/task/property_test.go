package task_test

import (
	"encoding/json"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// life drives an allocation with random luck and checks, after every step, what
// must never happen.
type life struct {
	t       *rapid.T
	a       *nodev1.Assignment
	s       *task.State
	now     time.Time
	flight  []task.Action
	up      map[string]int // container -> attempt, as the engine has it
	hadProx bool
	stopped bool
}

func newLife(t *rapid.T) *life {
	spec := &portolanv1.WorkloadSpec{}
	probe := func() *portolanv1.Probe {
		if !rapid.Bool().Draw(t, "probe") {
			return nil
		}
		return &portolanv1.Probe{Check: &portolanv1.Probe_Tcp{Tcp: &portolanv1.Probe_TcpCheck{Port: 80}}}
	}
	if rapid.Bool().Draw(t, "job") {
		spec.Kind = portolanv1.WorkloadKind_WORKLOAD_KIND_JOB
	}
	for range rapid.IntRange(0, 2).Draw(t, "inits") {
		spec.InitContainers = append(spec.InitContainers, &portolanv1.Container{Name: "i" + string(rune('a'+len(spec.GetInitContainers())))})
	}
	for range rapid.IntRange(1, 2).Draw(t, "mains") {
		spec.Containers = append(spec.Containers, &portolanv1.Container{
			Name: "m" + string(rune('a'+len(spec.GetContainers()))), Startup: probe(), Liveness: probe(), Readiness: probe(),
		})
	}
	a := &nodev1.Assignment{Allocation: "w-abcde", Epoch: 1, Spec: spec}
	return &life{t: t, a: a, s: task.New(a, zero), now: zero, up: map[string]int{}}
}

func (l *life) observe(o task.Observation) { task.Observe(l.a, l.s, o, l.now) }

// settle begins all there is to begin.
func (l *life) settle() time.Time {
	for range 200 {
		d := task.Next(l.a, l.s, l.now)
		l.check(d)
		if d.Action.Kind == task.None {
			return d.Wake
		}
		l.observe(task.Began{Action: d.Action})
		if d.Action.Kind == task.Cancel {
			continue
		}
		for _, f := range l.flight {
			if f.Container == d.Action.Container && f.Kind != task.Probe && d.Action.Kind != task.Probe {
				l.t.Fatalf("%v begun while %v is in flight", d.Action, f)
			}
		}
		l.flight = append(l.flight, d.Action)
	}
	l.t.Fatal("there is always something to begin")
	return time.Time{}
}

func (l *life) check(d task.Decision) {
	act := d.Action
	switch {
	case act.Kind == task.Start && (!l.s.Identity.Done || !l.s.Network.Done || !l.hadProx):
		l.t.Fatalf("%v before the replica is set up", act)
	case act.Kind == task.Start && l.stopped:
		l.t.Fatalf("%v after the stop", act)
	case act.Kind == task.Start && l.up[act.Container] != 0:
		l.t.Fatalf("%v while instance %d runs", act, l.up[act.Container])
	case act.Kind == task.Remove && len(l.up) > 0:
		l.t.Fatalf("the network is removed under running containers %v", l.up)
	}
	if d.Status.GetReady() {
		if l.stopped || !l.s.ProxyReady {
			l.t.Fatal("ready without a proxy or after the stop")
		}
		for _, c := range l.a.GetSpec().GetContainers() {
			if l.up[task.ContainerName(c)] == 0 {
				l.t.Fatalf("ready without container %s", c.GetName())
			}
		}
	}
}

// land ends one action in flight.
func (l *life) land(i int, ok bool) {
	act := l.flight[i]
	l.flight = append(l.flight[:i], l.flight[i+1:]...)
	f := task.Finished{Action: act, Pid: 1, At: l.now, RenewAt: l.now.Add(time.Hour)}
	if !ok {
		f.Err = &task.Fault{Kind: api.Unavailable, Message: "bad luck"}
	}
	if act.Kind == task.Start && ok {
		l.up[act.Container] = act.Attempt
	}
	l.observe(f)
}

func (l *life) exit(container string, code int) {
	attempt := l.up[container]
	delete(l.up, container)
	l.observe(task.Ended{Container: container, Attempt: attempt, Exit: task.Exit{Code: code, Time: l.now}})
}

func (l *life) random() {
	t := l.t
	switch rapid.IntRange(0, 9).Draw(t, "what") {
	case 0, 1, 2, 3:
		if len(l.flight) > 0 {
			l.land(rapid.IntRange(0, len(l.flight)-1).Draw(t, "which"), rapid.IntRange(0, 3).Draw(t, "luck") > 0)
		}
	case 4:
		l.now = l.now.Add(time.Duration(rapid.IntRange(0, 20_000).Draw(t, "ms")) * time.Millisecond)
	case 5:
		ready := rapid.Bool().Draw(t, "ready")
		l.hadProx = l.hadProx || ready
		l.observe(task.ProxySeen{Serving: true, Ready: ready})
	case 6:
		for c := range l.up {
			l.exit(c, rapid.IntRange(0, 1).Draw(t, "code"))
			break
		}
	case 7: // the agent dies: what was in flight is lost or done, the state is what was written
		l.crash()
	case 8:
		if rapid.IntRange(0, 5).Draw(t, "stop") == 0 {
			l.a.Stop, l.stopped = true, true
			task.Tick(l.a, l.s, l.now)
		}
	}
}

func (l *life) crash() {
	for _, act := range l.flight {
		if act.Kind == task.Start && l.up[act.Container] == 0 && rapid.Bool().Draw(l.t, "was done") {
			l.up[act.Container] = act.Attempt
		}
	}
	l.flight = nil
	b, err := json.Marshal(l.s)
	if err != nil {
		l.t.Fatal(err)
	}
	l.s = &task.State{}
	if err := json.Unmarshal(b, l.s); err != nil {
		l.t.Fatal(err)
	}
	var o task.Adopted
	for c, n := range l.up {
		o.Instances = append(o.Instances, task.Instance{Container: c, Attempt: n, Pid: 1, StartedAt: l.now})
	}
	l.observe(o)
}

// Whatever happens: nothing runs before its network and proxy, nothing starts
// after a stop, nothing runs twice, ready means ready. And once luck returns, a
// stop always comes to its end, soon.
func TestLifeProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newLife(t)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			l.settle()
			l.random()
		}
		l.a.Stop, l.stopped = true, true
		task.Tick(l.a, l.s, l.now)
		deadline := l.now.Add(10 * time.Minute)
		for !l.s.Gone() {
			wake := l.settle()
			if len(l.flight) > 0 {
				act := l.flight[0]
				l.land(0, true)
				if act.Kind == task.Signal && act.Signal == 9 && l.up[act.Container] == act.Attempt {
					l.exit(act.Container, 137)
				}
				continue
			}
			if l.s.Gone() {
				break
			}
			if wake.IsZero() || l.now.After(deadline) {
				t.Fatalf("stuck: %+v", *l.s)
			}
			if wake.After(l.now) {
				l.now = wake
			}
		}
		if d := task.Next(l.a, l.s, l.now); !d.Forget || len(l.up) > 0 {
			t.Fatalf("gone, but forget is %v and %v run", d.Forget, l.up)
		}
	})
}

func TestBackoff(t *testing.T) {
	for n, want := range map[int]time.Duration{1: 10 * time.Second, 2: 20 * time.Second, 5: 160 * time.Second, 6: 5 * time.Minute, 60: 5 * time.Minute} {
		if got := task.Backoff(n); got != want {
			t.Errorf("backoff %d is %s, want %s", n, got, want)
		}
	}
}

func TestAccept(t *testing.T) {
	five, four := &nodev1.Assignment{Epoch: 5}, &nodev1.Assignment{Epoch: 4}
	if !task.Accept(nil, four) || !task.Accept(four, five) || !task.Accept(five, five) || task.Accept(five, four) {
		t.Error("an older epoch must be refused, and nothing else")
	}
}

package task

import (
	"fmt"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// Observe folds what happened into the state and gives the events to tell.
func Observe(a *nodev1.Assignment, s *State, o Observation, now time.Time) []Event {
	var ev []Event
	switch o := o.(type) {
	case Began:
		s.begin(o.Action)
	case Finished:
		ev = s.finish(a, o, now)
	case Ended:
		ev = s.ended(a, o)
	case ProxySeen:
		s.Serving, s.ProxyReady, s.ProxyDetail = o.Serving, o.Ready, o.Detail
		s.ProxyWasReady = s.ProxyWasReady || o.Ready
	case Sampled:
		if c := s.Container(o.Container); c != nil && c.Phase == Up {
			c.Memory = o.Bytes
		}
	case Adopted:
		ev = s.adopt(a, o, now)
	}
	s.settle(a)
	return append(ev, s.tick(a, now)...)
}

// Tick looks at the clock and the assignment alone. Call it when the assignment
// changed.
func Tick(a *nodev1.Assignment, s *State, now time.Time) []Event {
	s.settle(a)
	return s.tick(a, now)
}

// tick begins the stop when one is wanted, and stamps what became true.
func (s *State) tick(a *nodev1.Assignment, now time.Time) []Event {
	var ev []Event
	if !s.ready(a) && s.PulledAt.IsZero() && s.allPulled() {
		s.PulledAt = now
	}
	if s.StopBegan.IsZero() && (a.GetStop() || s.Outcome != "") {
		s.WasReady = s.ReadyAt.After(time.Time{}) && s.Outcome == ""
		s.StopBegan = now
		if !s.ProxyWasReady {
			// Nobody was sent here: nothing to drain.
			s.Drained.done()
			s.GraceUntil = now.Add(Grace(a))
		}
		if a.GetStop() {
			ev = append(ev, Event{"Stopping", a.GetStopReason()})
		}
	}
	if s.ReadyAt.IsZero() && s.ready(a) {
		s.ReadyAt = now
		if s.PulledAt.IsZero() {
			s.PulledAt = now
		}
		ev = append(ev, Event{"Ready", fmt.Sprintf("after %s on the node", now.Sub(s.AtNode).Round(time.Millisecond))})
	}
	return ev
}

// settle decides the outcome of a job.
func (s *State) settle(a *nodev1.Assignment) {
	if !isJob(a) || s.Outcome != "" || len(s.Containers) == 0 || !s.StopBegan.IsZero() {
		return
	}
	all := true
	for i := range s.Containers {
		c := &s.Containers[i]
		if c.LastExit != nil && c.Phase != Up && c.LastExit.Reason != ReasonCompleted {
			s.Outcome = Failed
			return
		}
		all = all && c.Finished
	}
	if all {
		s.Outcome = Succeeded
	}
}

func (s *State) begin(act Action) {
	c := s.Container(act.Container)
	switch {
	case act.Kind == Cancel && c != nil:
		c.Cancelled = true
	case act.Kind == Cancel:
		s.Cancelled = true
	case c == nil:
		s.Busy, s.Cancelled = act, false
	case act.Kind == Probe:
		c.Probes[act.Probe].Busy = true
	default:
		c.Busy, c.Cancelled = act, false
	}
}

func (s *State) finish(a *nodev1.Assignment, o Finished, now time.Time) []Event {
	if o.Action.Kind == Cancel {
		return nil
	}
	if c := s.Container(o.Action.Container); c != nil {
		if o.Action.Kind == Probe {
			return s.probed(a, c, o, now)
		}
		c.Busy, c.Cancelled = Action{}, false
		return s.finishContainer(a, c, o, now)
	}
	s.Busy, s.Cancelled = Action{}, false
	return s.finishReplica(a, o, now)
}

func (s *State) finishReplica(a *nodev1.Assignment, o Finished, now time.Time) []Event {
	st := map[Kind]*Step{
		Sign: &s.Identity, Network: &s.Network, Proxy: &s.Proxy, Drain: &s.Drained, StopProx: &s.ProxyGone, Remove: &s.Removed,
	}[o.Action.Kind]
	if st == nil {
		return nil
	}
	if o.Err != nil {
		renewal := o.Action.Kind == Sign && st.Done
		st.fail(a, o.Err, now)
		st.Done = renewal
		if o.Action.Kind == Drain {
			// A proxy that cannot drain is dead or frozen; the stop goes on.
			s.drained(a, now)
		}
		return nil
	}
	st.done()
	switch o.Action.Kind {
	case Sign:
		s.RenewAt = o.RenewAt
	case Network:
		if s.NetworkAt.IsZero() {
			s.NetworkAt = now
		}
	case Drain:
		s.drained(a, now)
	default:
	}
	return nil
}

func (s *State) drained(a *nodev1.Assignment, now time.Time) {
	s.Drained.done()
	s.GraceUntil = now.Add(Grace(a))
}

func (s *State) finishContainer(a *nodev1.Assignment, c *Container, o Finished, now time.Time) []Event {
	switch o.Action.Kind {
	case Pull:
		return c.pulled(a, o, now)
	case Start:
		return s.started(a, c, o, now)
	case PreStop:
		c.PreStopped = true
		if o.Err != nil {
			return []Event{{"PreStopFailed", c.Name + ": " + o.Err.Message}}
		}
	case Signal:
		return c.signalled(a, o, now)
	case Delete:
		if o.Err != nil {
			c.Retry.fail(a, o.Err, now)
			return nil
		}
		c.Retry, c.Phase, c.Pid = Step{}, Absent, 0
	default:
	}
	return nil
}

func (c *Container) pulled(a *nodev1.Assignment, o Finished, now time.Time) []Event {
	if o.Err == nil {
		c.Pulled.done()
		return nil
	}
	if o.Err.Kind == api.Canceled {
		return nil
	}
	c.Pulled.fail(a, o.Err, now)
	return []Event{{ReasonImagePullFailed, c.Name + ": " + o.Err.Message}}
}

func (s *State) started(a *nodev1.Assignment, c *Container, o Finished, now time.Time) []Event {
	if o.Err != nil {
		return c.startFailed(o, now)
	}
	if c.LastExit != nil {
		c.Restarts++
	}
	c.up(a, o.Action.Attempt, o.Pid, o.At)
	if s.StartedAt.IsZero() && !c.Init && s.allUp() {
		s.StartedAt = o.At
	}
	return []Event{{"Started", fmt.Sprintf("%s: instance %d, pid %d", c.Name, c.Attempt, c.Pid)}}
}

// startFailed lets what the failed start left behind be deleted first. Only an
// engine that is away is not the container's own fault.
func (c *Container) startFailed(o Finished, now time.Time) []Event {
	c.Attempt, c.Phase, c.Retry = o.Action.Attempt, Exited, Step{}
	if o.Err.Kind == api.Unavailable || o.Err.Kind == api.Canceled {
		c.NextStart = now.Add(retryFirst)
		return nil
	}
	if o.Err.Kind == api.NotFound {
		c.Pulled = Step{} // the image went away: fetch it again
	}
	c.Crashes++
	c.NextStart = now.Add(Backoff(c.Crashes))
	c.LastExit = &Exit{Code: 128, Time: now, Reason: ReasonStartFailed, Message: o.Err.Message}
	return []Event{{ReasonStartFailed, c.Name + ": " + o.Err.Message}}
}

func (c *Container) up(a *nodev1.Assignment, attempt, pid int, at time.Time) {
	spec := ContainerSpec(a, c.Name)
	c.Attempt, c.Phase, c.Pid, c.StartedAt = attempt, Up, pid, at
	c.Retry, c.NextStart, c.Memory = Step{}, time.Time{}, 0
	c.KillReason, c.PreStopped, c.TermSent, c.KillAt = "", false, false, time.Time{}
	c.Started = c.Init || ProbeSpec(spec, Startup) == nil
	c.Ready = c.Started && ProbeSpec(spec, Readiness) == nil
	c.Probes = [3]Streak{}
	for k := range c.Probes {
		if p := ProbeSpec(spec, ProbeKind(k)); p != nil {
			c.Probes[k].NextAt = at.Add(p.GetInitialDelay().AsDuration())
		}
	}
}

func (c *Container) signalled(a *nodev1.Assignment, o Finished, now time.Time) []Event {
	if o.Err != nil {
		c.Retry.fail(a, o.Err, now)
		return nil
	}
	c.Retry = Step{}
	if o.Action.Signal == sigkill {
		// If it did not help, try again; the exit is what ends this.
		c.Retry.RetryAt = now.Add(retryFirst)
		return []Event{{"Killed", c.Name + ": SIGKILL after the grace period"}}
	}
	c.TermSent = true
	c.KillAt = now.Add(Grace(a))
	return nil
}

// ended takes an exit: names its reason and sets the restart.
func (s *State) ended(a *nodev1.Assignment, o Ended) []Event {
	c := s.Container(o.Container)
	if c == nil || c.Phase != Up || c.Attempt != o.Attempt {
		return nil
	}
	x := o.Exit
	x.Reason = c.exitReason(a, s, o)
	switch {
	case o.Down:
		x.Message = "it ended with the node or its engine"
	case o.Lost:
		x.Message = "the engine does not know it any more"
	}
	if x.OOM && x.MemoryBytes == 0 {
		x.MemoryBytes = c.Memory
	}
	c.Phase, c.Ready, c.Started, c.LastExit = Exited, false, false, &x
	c.Retry = Step{}
	if !s.StopBegan.IsZero() {
		return []Event{{"Stopped", fmt.Sprintf("%s: exit code %d", c.Name, x.Code)}}
	}
	if (c.Init || isJob(a)) && x.Reason == ReasonCompleted {
		c.Finished = true
		c.Crashes = 0
		return []Event{{ReasonCompleted, c.Name}}
	}
	if x.Time.Sub(c.StartedAt) >= HealthyAfter {
		c.Crashes = 0
	}
	ev := []Event{{x.Reason, exitSentence(c, x)}}
	if o.Down {
		c.NextStart = x.Time
		return ev
	}
	c.Crashes++
	c.NextStart = x.Time.Add(Backoff(c.Crashes))
	if c.Crashes >= CrashLoopAfter && !isJob(a) {
		ev = append(ev, Event{ReasonCrashLoopBackOff, fmt.Sprintf("%s: %d exits in a row, next start in %s", c.Name, c.Crashes, Backoff(c.Crashes))})
	}
	return ev
}

func (c *Container) exitReason(a *nodev1.Assignment, s *State, o Ended) string {
	switch {
	case o.Lost:
		return ReasonContainerLost
	case o.Exit.OOM:
		return ReasonOOMKilled
	case c.KillReason != "":
		return c.KillReason
	case o.Exit.Code == 0:
		return ReasonCompleted
	case !s.StopBegan.IsZero() && !isJob(a):
		return ReasonStopped
	}
	return ReasonError
}

func exitSentence(c *Container, x Exit) string {
	if x.OOM {
		return fmt.Sprintf("%s: out of memory, last seen %d bytes, exit code %d", c.Name, x.MemoryBytes, x.Code)
	}
	if x.Message != "" {
		return c.Name + ": " + x.Message
	}
	return fmt.Sprintf("%s: exit code %d", c.Name, x.Code)
}

func (s *State) probed(a *nodev1.Assignment, c *Container, o Finished, now time.Time) []Event {
	kind := o.Action.Probe
	st := &c.Probes[kind]
	if c.Attempt != o.Action.Attempt || c.Phase != Up {
		return nil
	}
	p := ProbeSpec(ContainerSpec(a, c.Name), kind)
	if p == nil {
		return nil
	}
	st.Busy = false
	st.NextAt = now.Add(probePeriod(p))
	if kind == Readiness && !c.Ready && c.Restarts == 0 && s.ReadyAt.IsZero() {
		st.NextAt = now.Add(min(probePeriod(p), FirstReadiness))
	}
	if o.Err != nil {
		st.Failures, st.Successes, st.Error = st.Failures+1, 0, o.Err.Message
		return c.failed(kind, st, failureLimit(p))
	}
	st.Failures, st.Successes, st.Error = 0, st.Successes+1, ""
	switch {
	case kind == Startup:
		c.Started = true
		c.Ready = c.Ready || ProbeSpec(ContainerSpec(a, c.Name), Readiness) == nil
	case kind == Readiness && !c.Ready && st.Successes >= successLimit(p):
		c.Ready = true
		return []Event{{"ContainerReady", c.Name}}
	}
	return nil
}

func (c *Container) failed(kind ProbeKind, st *Streak, limit int) []Event {
	if st.Failures < limit {
		return nil
	}
	sentence := fmt.Sprintf("%s: %d times in a row: %s", c.Name, st.Failures, st.Error)
	switch kind {
	case Readiness:
		if c.Ready {
			c.Ready = false
			return []Event{{ReasonNotReady, sentence}}
		}
		return nil
	case Startup:
		c.KillReason = ReasonStartupFailed
	case Liveness:
		c.KillReason = ReasonLivenessFailed
	}
	c.Ready = false
	return []Event{{c.KillReason, sentence}}
}

// adopt takes over from an earlier agent: what the engine has counts, the rest
// of the state is what that agent wrote down.
func (s *State) adopt(a *nodev1.Assignment, o Adopted, now time.Time) []Event {
	// Brought about again: each is idempotent, and running containers go on. After
	// a reboot the identity is gone with its tmpfs.
	s.Identity, s.Network, s.Proxy = Step{}, Step{}, Step{}
	if s.ProxyGone.Done || s.Outcome != "" || !s.StopBegan.IsZero() {
		s.Proxy.done()
	}
	var ev []Event
	for i := range s.Containers {
		c := &s.Containers[i]
		in, ok := instance(o.Instances, c.Name)
		switch {
		case ok && in.Attempt > c.Attempt || ok && c.Phase != Up && in.Exit == nil:
			// Begun after the last word of the earlier agent.
			c.Restarts += max(in.Attempt-max(c.Attempt, 1), 0)
			c.up(a, in.Attempt, in.Pid, in.StartedAt)
			if in.Exit != nil {
				ev = append(ev, s.ended(a, Ended{Container: c.Name, Attempt: in.Attempt, Exit: *in.Exit})...)
			}
		case ok && in.Attempt == c.Attempt && c.Phase == Up && in.Exit != nil:
			ev = append(ev, s.ended(a, Ended{Container: c.Name, Attempt: in.Attempt, Exit: *in.Exit})...)
		case ok && c.Phase == Up:
			c.Pid = in.Pid
		case !ok && c.Phase == Up:
			ev = append(ev, s.ended(a, Ended{Container: c.Name, Attempt: c.Attempt, Exit: Exit{Code: 255, Time: now}, Lost: true, Down: true})...)
		case !ok:
			c.Phase = Absent
		}
	}
	return ev
}

func instance(all []Instance, name string) (Instance, bool) {
	for _, in := range all {
		if in.Container == name {
			return in, true
		}
	}
	return Instance{}, false
}

func (s *State) allPulled() bool {
	for i := range s.Containers {
		if !s.Containers[i].Pulled.Done {
			return false
		}
	}
	return true
}

func (s *State) allUp() bool {
	for i := range s.Containers {
		if c := &s.Containers[i]; !c.Init && c.Phase != Up {
			return false
		}
	}
	return true
}

// ready says whether the replica may be sent traffic.
func (s *State) ready(a *nodev1.Assignment) bool {
	if a.GetStop() || !s.StopBegan.IsZero() || s.Outcome != "" || !s.ProxyReady {
		return false
	}
	if IsGateway(a) {
		return true
	}
	for i := range s.Containers {
		if c := &s.Containers[i]; !c.Init && (c.Phase != Up || !c.Ready || c.KillReason != "") {
			return false
		}
	}
	return len(s.Containers) > 0
}

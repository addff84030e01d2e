package task

import (
	"time"

	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// Decision is what Next says.
type Decision struct {
	// Action to begin now; Kind None when there is none. Call Next again after
	// Began was observed: there may be more.
	Action Action
	// Wake is when to call Next again without an observation; zero: never.
	Wake time.Time
	// Status to report.
	Status *nodev1.AllocationStatus
	// Forget: nothing is left and the allocation is no longer wanted.
	Forget bool
}

// Signals, by number, so that nothing here depends on a system.
const (
	sigterm = 15
	sigkill = 9
)

// decider collects the earliest time at which something falls due.
type decider struct {
	a    *nodev1.Assignment
	s    *State
	now  time.Time
	wake time.Time
}

// Next decides one step. It changes nothing: what it decides becomes true by
// observation.
func Next(a *nodev1.Assignment, s *State, now time.Time) Decision {
	d := &decider{a: a, s: s, now: now}
	var act Action
	switch {
	case s.Gone():
	case !s.StopBegan.IsZero():
		act = d.stopping()
	default:
		act = d.running()
	}
	return Decision{Action: act, Wake: d.wake, Status: Status(a, s, now), Forget: s.Gone() && (a.GetStop() || s.Outcome == "")}
}

// due says whether t has come; if not, it is remembered as a time to look again.
func (d *decider) due(t time.Time) bool {
	if !t.After(d.now) {
		return true
	}
	if d.wake.IsZero() || t.Before(d.wake) {
		d.wake = t
	}
	return false
}

func (d *decider) try(st *Step) bool { return !st.Done && d.due(st.RetryAt) }

func (d *decider) running() Action {
	if act := d.replica(); act.Kind != None {
		return act
	}
	for i := range d.s.Containers {
		if act := d.container(i); act.Kind != None {
			return act
		}
	}
	return Action{}
}

// replica names the replica's own next step: identity, network, proxy, in order.
func (d *decider) replica() Action {
	s := d.s
	if s.Busy.Kind != None {
		return Action{}
	}
	switch {
	case !s.Identity.Done:
		if d.try(&s.Identity) {
			return Action{Kind: Sign}
		}
		return Action{}
	case !s.Network.Done && !IsGateway(d.a):
		if d.try(&s.Network) {
			return Action{Kind: Network}
		}
		return Action{}
	case !s.Proxy.Done:
		if s.Serving && d.try(&s.Proxy) {
			return Action{Kind: Proxy}
		}
	}
	if !s.RenewAt.IsZero() && d.due(s.RenewAt) && d.due(s.Identity.RetryAt) {
		return Action{Kind: Sign}
	}
	return Action{}
}

// setUp says that a container may be started: nothing of a workload runs before
// its traffic is captured and its proxy was live.
func (d *decider) setUp() bool {
	return d.s.Identity.Done && d.s.Network.Done && d.s.Proxy.Done && d.s.ProxyWasReady
}

func (d *decider) container(i int) Action {
	c := &d.s.Containers[i]
	if c.Phase == Up {
		if act := d.probe(c); act.Kind != None {
			return act
		}
		if c.Busy.Kind == None && c.KillReason != "" {
			return d.kill(c)
		}
		return Action{}
	}
	if c.Busy.Kind != None || c.Phase == Exited && !d.due(c.Retry.RetryAt) {
		return Action{}
	}
	if c.Phase == Exited {
		return Action{Kind: Delete, Container: c.Name, Attempt: c.Attempt}
	}
	if c.Finished {
		return Action{}
	}
	if !c.Pulled.Done {
		if d.try(&c.Pulled) {
			return Action{Kind: Pull, Container: c.Name}
		}
		return Action{}
	}
	if !d.setUp() || !d.turn(i) || !d.due(c.NextStart) || !d.due(c.Retry.RetryAt) {
		return Action{}
	}
	return Action{Kind: Start, Container: c.Name, Attempt: c.Attempt + 1}
}

// turn says whether all init containers before this one have finished, and, for
// a main container, all of them.
func (d *decider) turn(i int) bool {
	for j := range d.s.Containers {
		c := &d.s.Containers[j]
		if c.Init && j < i && !c.Finished {
			return false
		}
	}
	return true
}

// kill ends an instance that failed its probe: SIGTERM, grace, SIGKILL.
func (d *decider) kill(c *Container) Action {
	switch {
	case !d.due(c.Retry.RetryAt):
		return Action{}
	case !c.TermSent:
		return Action{Kind: Signal, Container: c.Name, Attempt: c.Attempt, Signal: sigterm}
	case d.due(c.KillAt):
		return Action{Kind: Signal, Container: c.Name, Attempt: c.Attempt, Signal: sigkill}
	}
	return Action{}
}

func (d *decider) probe(c *Container) Action {
	if c.KillReason != "" {
		return Action{}
	}
	spec := ContainerSpec(d.a, c.Name)
	for _, kind := range [...]ProbeKind{Startup, Liveness, Readiness} {
		p := ProbeSpec(spec, kind)
		if p == nil || c.Init || (kind == Startup) == c.Started {
			continue
		}
		if st := &c.Probes[kind]; !st.Busy && d.due(st.NextAt) {
			return Action{Kind: Probe, Container: c.Name, Attempt: c.Attempt, Probe: kind}
		}
	}
	return Action{}
}

// stopping goes on in order: what is in flight gives up, the proxy drains, each
// container runs its preStop, gets SIGTERM, then SIGKILL, all is deleted, the
// proxy ends, the network goes.
func (d *decider) stopping() Action {
	s := d.s
	if act := d.giveUp(); act.Kind != None {
		return act
	}
	if !s.Drained.Done {
		if s.Busy.Kind == None && d.due(s.StopBegan.Add(d.drainWait())) && d.try(&s.Drained) {
			return Action{Kind: Drain}
		}
		return Action{}
	}
	left := false
	for i := range s.Containers {
		c := &s.Containers[i]
		act := d.end(c)
		if act.Kind != None {
			return act
		}
		left = left || c.Phase != Absent || c.Busy.Kind != None
	}
	switch {
	case left || s.Busy.Kind != None:
		return Action{}
	case !s.ProxyGone.Done:
		if d.try(&s.ProxyGone) {
			return Action{Kind: StopProx}
		}
	case d.try(&s.Removed):
		return Action{Kind: Remove}
	}
	return Action{}
}

// drainWait is nothing for a replica to which nobody was sent.
func (d *decider) drainWait() time.Duration {
	if d.s.WasReady {
		return DrainWait
	}
	return 0
}

func (d *decider) giveUp() Action {
	s := d.s
	switch s.Busy.Kind {
	case Sign, Network, Proxy:
		if !s.Cancelled {
			return Action{Kind: Cancel}
		}
	default:
	}
	for i := range s.Containers {
		c := &s.Containers[i]
		late := c.Busy.Kind == PreStop && s.Drained.Done && d.due(s.GraceUntil)
		if (c.Busy.Kind == Pull || late) && !c.Cancelled {
			return Action{Kind: Cancel, Container: c.Name}
		}
	}
	return Action{}
}

// end leads one container out.
func (d *decider) end(c *Container) Action {
	if c.Busy.Kind != None || !d.due(c.Retry.RetryAt) {
		return Action{}
	}
	switch c.Phase {
	case Exited:
		return Action{Kind: Delete, Container: c.Name, Attempt: c.Attempt}
	case Absent:
		return Action{}
	case Up:
	}
	overdue := d.due(d.s.GraceUntil)
	switch {
	case !c.PreStopped && !c.TermSent && !overdue && ContainerSpec(d.a, c.Name).GetPreStop().GetAction() != nil:
		return Action{Kind: PreStop, Container: c.Name, Attempt: c.Attempt}
	case !c.TermSent && !overdue:
		return Action{Kind: Signal, Container: c.Name, Attempt: c.Attempt, Signal: sigterm}
	case overdue:
		return Action{Kind: Signal, Container: c.Name, Attempt: c.Attempt, Signal: sigkill}
	}
	return Action{}
}

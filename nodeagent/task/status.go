package task

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Status is what the state looks like from above.
func Status(a *nodev1.Assignment, s *State, now time.Time) *nodev1.AllocationStatus {
	out := &nodev1.AllocationStatus{
		Allocation: a.GetAllocation(), Epoch: a.GetEpoch(), Address: a.GetAddress(),
		Ready: s.ready(a),
		Timeline: &portolanv1.Timeline{
			AtCluster: a.GetAtCluster(), Bound: a.GetBound(), AtNode: stamp(s.AtNode), Pulled: stamp(s.PulledAt),
			NetworkReady: stamp(s.NetworkAt), Started: stamp(s.StartedAt), Ready: stamp(s.ReadyAt),
		},
	}
	for i := range s.Containers {
		out.Containers = append(out.Containers, containerStatus(&s.Containers[i], now))
	}
	out.State, out.Reason = s.summary(a, now)
	return out
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func containerStatus(c *Container, now time.Time) *portolanv1.ContainerState {
	out := &portolanv1.ContainerState{
		Name: c.Name, State: c.state(now), Ready: c.Phase == Up && c.Ready, Restarts: int32(c.Restarts),
		StartTime: stamp(c.StartedAt), MemoryBytes: c.Memory,
	}
	if c.Phase == Up {
		out.Pid = int32(c.Pid)
	}
	if c.Phase != Up && !c.Finished && c.NextStart.After(now) {
		out.NextStartTime = stamp(c.NextStart)
	}
	if x := c.LastExit; x != nil {
		out.LastExitCode, out.LastExitReason, out.LastExitTime = int32(x.Code), x.Reason, stamp(x.Time)
		if x.OOM && c.Phase != Up {
			out.MemoryBytes = x.MemoryBytes
		}
	}
	return out
}

func (c *Container) state(now time.Time) portolanv1.ReplicaState {
	switch {
	case c.Phase == Up && c.KillReason != "":
		return portolanv1.ReplicaState_REPLICA_STATE_STOPPING
	case c.Phase == Up && c.Started:
		return portolanv1.ReplicaState_REPLICA_STATE_RUNNING
	case c.Phase == Up:
		return portolanv1.ReplicaState_REPLICA_STATE_STARTING
	case c.Finished:
		return portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED
	case c.NextStart.After(now):
		return portolanv1.ReplicaState_REPLICA_STATE_BACKOFF
	case !c.Pulled.Done && (c.Busy.Kind == Pull || c.Pulled.Failures > 0):
		return portolanv1.ReplicaState_REPLICA_STATE_PULLING
	case c.Busy.Kind == Start:
		return portolanv1.ReplicaState_REPLICA_STATE_STARTING
	}
	return portolanv1.ReplicaState_REPLICA_STATE_PENDING
}

// summary is the replica's state and the one reason that explains it best.
func (s *State) summary(a *nodev1.Assignment, now time.Time) (portolanv1.ReplicaState, *portolanv1.Reason) {
	switch {
	case s.Outcome == Succeeded:
		return portolanv1.ReplicaState_REPLICA_STATE_SUCCEEDED, reason(ReasonCompleted, "every container ended with exit code 0")
	case s.Outcome == Failed:
		return portolanv1.ReplicaState_REPLICA_STATE_FAILED, s.failure()
	case a.GetStop() || !s.StopBegan.IsZero():
		return portolanv1.ReplicaState_REPLICA_STATE_STOPPING, reason(ReasonStopped, a.GetStopReason())
	}
	if r := s.backoff(now); r != nil {
		return portolanv1.ReplicaState_REPLICA_STATE_BACKOFF, r
	}
	for i := range s.Containers {
		if c := &s.Containers[i]; !c.Pulled.Done && c.Pulled.Failures > 0 {
			return portolanv1.ReplicaState_REPLICA_STATE_PULLING, reason(ReasonImagePullFailed, c.Name+": "+c.Pulled.Error)
		}
	}
	if r := s.pending(a); r != nil {
		return portolanv1.ReplicaState_REPLICA_STATE_PENDING, r
	}
	if !s.allPulled() {
		return portolanv1.ReplicaState_REPLICA_STATE_PULLING, nil
	}
	if !s.allStarted() {
		return portolanv1.ReplicaState_REPLICA_STATE_STARTING, nil
	}
	return portolanv1.ReplicaState_REPLICA_STATE_RUNNING, s.unready(a)
}

func (s *State) failure() *portolanv1.Reason {
	for i := range s.Containers {
		c := &s.Containers[i]
		if c.LastExit != nil && c.LastExit.Reason != ReasonCompleted {
			return reason(c.LastExit.Reason, exitSentence(c, *c.LastExit))
		}
	}
	return reason(ReasonError, "")
}

func (s *State) backoff(now time.Time) *portolanv1.Reason {
	for i := range s.Containers {
		c := &s.Containers[i]
		if c.Phase == Up || c.Finished || !c.NextStart.After(now) || c.LastExit == nil {
			continue
		}
		next := fmt.Sprintf("; restart %d at %s", c.Restarts+1, c.NextStart.UTC().Format(time.RFC3339))
		if c.Crashes >= CrashLoopAfter {
			return reason(ReasonCrashLoopBackOff, fmt.Sprintf("%d exits in a row, the last %s: %s%s", c.Crashes, c.LastExit.Reason, exitSentence(c, *c.LastExit), next))
		}
		return reason(c.LastExit.Reason, exitSentence(c, *c.LastExit)+next)
	}
	return nil
}

// pending says what the replica itself still lacks before its containers start.
func (s *State) pending(a *nodev1.Assignment) *portolanv1.Reason {
	switch {
	case s.ProxyWasReady && !IsGateway(a):
		return nil
	case !s.Identity.Done:
		return reason(ReasonIdentityPending, s.Identity.Error)
	case !s.Network.Done && !IsGateway(a):
		return reason(ReasonNetworkPending, s.Network.Error)
	case !s.ProxyReady:
		return reason(ReasonProxyNotReady, s.proxyWords())
	}
	return nil
}

func (s *State) proxyWords() string {
	if s.Proxy.Error != "" {
		return s.Proxy.Error
	}
	if !s.Serving && s.ProxyDetail == "" {
		return "the warden does not serve it yet"
	}
	return s.ProxyDetail
}

// unready says why a running replica gets no traffic.
func (s *State) unready(a *nodev1.Assignment) *portolanv1.Reason {
	if s.ready(a) {
		return nil
	}
	if !s.ProxyReady {
		return reason(ReasonProxyNotReady, s.proxyWords())
	}
	for i := range s.Containers {
		if c := &s.Containers[i]; c.KillReason != "" && c.Phase == Up {
			return reason(c.KillReason, c.Name)
		}
	}
	for i := range s.Containers {
		if c := &s.Containers[i]; !c.Init && !c.Ready {
			return reason(ReasonNotReady, c.Name+": "+c.Probes[Readiness].Error)
		}
	}
	return nil
}

func (s *State) allStarted() bool {
	for i := range s.Containers {
		if c := &s.Containers[i]; !c.Init && !c.Finished && (c.Phase != Up || !c.Started) {
			return false
		}
	}
	return true
}

func reason(code, message string) *portolanv1.Reason {
	return &portolanv1.Reason{Code: code, Message: message}
}

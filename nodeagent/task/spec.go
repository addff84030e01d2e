package task

import (
	"hash/fnv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Times of the field's convention, and ours.
const (
	RestartFirst = 10 * time.Second
	RestartCap   = 5 * time.Minute
	HealthyAfter = 10 * time.Minute
	// CrashLoopAfter crashes in a row are called CrashLoopBackOff.
	CrashLoopAfter = 5
	// DrainWait is between the withdrawal of the endpoint and the proxy's drain.
	DrainWait = 500 * time.Millisecond
	// FirstReadiness is the longest period of a readiness probe until its first
	// success, so that a slow period does not delay the first request.
	FirstReadiness = 500 * time.Millisecond

	defaultGrace         = 30 * time.Second
	defaultPeriod        = 10 * time.Second
	defaultTimeout       = time.Second
	defaultFailureLimit  = 3
	retryFirst, retryCap = time.Second, time.Minute
)

// New is the state of an assignment that was just seen.
func New(a *nodev1.Assignment, now time.Time) *State {
	s := &State{AtNode: now}
	for _, c := range a.GetSpec().GetInitContainers() {
		s.Containers = append(s.Containers, Container{Name: ContainerName(c), Init: true})
	}
	for _, c := range a.GetSpec().GetContainers() {
		s.Containers = append(s.Containers, Container{Name: ContainerName(c)})
	}
	return s
}

// ContainerName is the container's name, "main" when it has none.
func ContainerName(c *portolanv1.Container) string {
	if c.GetName() == "" {
		return "main"
	}
	return c.GetName()
}

// ContainerSpec finds a container of the assignment by name; nil when absent.
func ContainerSpec(a *nodev1.Assignment, name string) *portolanv1.Container {
	for _, c := range a.GetSpec().GetInitContainers() {
		if ContainerName(c) == name {
			return c
		}
	}
	for _, c := range a.GetSpec().GetContainers() {
		if ContainerName(c) == name {
			return c
		}
	}
	return nil
}

// Accept decides between what is held and what came: an older epoch of the same
// allocation is refused. It says false when held stays.
func Accept(held, came *nodev1.Assignment) bool {
	return held == nil || came.GetEpoch() >= held.GetEpoch()
}

// IsGateway says that the replica is a proxy alone.
func IsGateway(a *nodev1.Assignment) bool {
	return a.GetSpec().GetGateway() != portolanv1.GatewayKind_GATEWAY_KIND_UNSPECIFIED
}

func isJob(a *nodev1.Assignment) bool {
	k := a.GetSpec().GetKind()
	return k == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB || k == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON
}

// Grace is the time between SIGTERM and SIGKILL.
func Grace(a *nodev1.Assignment) time.Duration {
	return orDefault(a.GetSpec().GetGracePeriod(), defaultGrace)
}

// ProbeSpec gives a probe of a container; nil when it has none.
func ProbeSpec(c *portolanv1.Container, kind ProbeKind) *portolanv1.Probe {
	var p *portolanv1.Probe
	switch kind {
	case Startup:
		p = c.GetStartup()
	case Liveness:
		p = c.GetLiveness()
	case Readiness:
		p = c.GetReadiness()
	}
	if p.GetCheck() == nil {
		return nil
	}
	return p
}

// ProbeTimeout is how long one probe may take.
func ProbeTimeout(p *portolanv1.Probe) time.Duration {
	return orDefault(p.GetTimeout(), defaultTimeout)
}

func probePeriod(p *portolanv1.Probe) time.Duration { return orDefault(p.GetPeriod(), defaultPeriod) }

func failureLimit(p *portolanv1.Probe) int {
	if n := int(p.GetFailureThreshold()); n > 0 {
		return n
	}
	return defaultFailureLimit
}

func successLimit(p *portolanv1.Probe) int { return max(int(p.GetSuccessThreshold()), 1) }

func orDefault(d *durationpb.Duration, def time.Duration) time.Duration {
	if d == nil || d.AsDuration() <= 0 {
		return def
	}
	return d.AsDuration()
}

// Backoff is the wait before restart n (1 is the first): 10 s, 20 s, … 5 min.
func Backoff(n int) time.Duration {
	return double(RestartFirst, RestartCap, n)
}

func double(first, limit time.Duration, n int) time.Duration {
	d := first
	for i := 1; i < n && d < limit; i++ {
		d *= 2
	}
	return min(d, limit)
}

// retryDelay spreads retries of many nodes: 1 s doubling to 1 min, less up to a
// quarter that depends on the allocation and the count.
func retryDelay(allocation string, failures int) time.Duration {
	d := double(retryFirst, retryCap, failures)
	h := fnv.New32a()
	_, _ = h.Write([]byte(allocation))
	_, _ = h.Write([]byte{byte(failures)})
	return d - d/4*time.Duration(h.Sum32()%1000)/1000
}

func (st *Step) fail(a *nodev1.Assignment, f *Fault, now time.Time) {
	st.Done = false
	st.Failures++
	st.Error = f.Message
	st.RetryAt = now.Add(retryDelay(a.GetAllocation(), st.Failures))
}

func (st *Step) done() { *st = Step{Done: true} }

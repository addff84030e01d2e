package task

import (
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// Kind of an action.
type Kind string

// The actions. Those of the replica come first, those of a container after.
const (
	None     Kind = ""
	Sign     Kind = "sign"      // make or renew the replica's identity
	Network  Kind = "network"   // bring about namespace, address, capture
	Proxy    Kind = "proxy"     // start the proxy
	Drain    Kind = "drain"     // tell the proxy to stop accepting
	StopProx Kind = "stopproxy" // end the proxy
	Remove   Kind = "remove"    // remove the namespace, identity and files
	Cancel   Kind = "cancel"    // give up the action in flight of Container ("" is the replica's own)

	Pull    Kind = "pull"
	Start   Kind = "start" // create and start instance Attempt
	Probe   Kind = "probe"
	PreStop Kind = "prestop"
	Signal  Kind = "signal"
	Delete  Kind = "delete" // remove instance Attempt from the engine
)

// ProbeKind is one of the three probes.
type ProbeKind int

// The probes.
const (
	Startup ProbeKind = iota
	Liveness
	Readiness
)

func (p ProbeKind) String() string { return [...]string{"startup", "liveness", "readiness"}[p] }

// Action is one thing to begin.
type Action struct {
	Kind      Kind      `json:"kind,omitempty"`
	Container string    `json:"container,omitempty"`
	Attempt   int       `json:"attempt,omitempty"`
	Signal    int       `json:"signal,omitempty"`
	Probe     ProbeKind `json:"probe,omitempty"`
}

// Step is something of the replica that must be brought about.
type Step struct {
	Done     bool      `json:"done,omitempty"`
	Failures int       `json:"failures,omitempty"`
	RetryAt  time.Time `json:"retry_at,omitzero"`
	Error    string    `json:"error,omitempty"`
}

// Phase of a container's present instance.
type Phase string

// The phases.
const (
	Absent Phase = ""       // no instance in the engine
	Up     Phase = "up"     // started
	Exited Phase = "exited" // ended, not yet deleted
)

// Exit is how an instance ended.
type Exit struct {
	Code        int       `json:"code"`
	Time        time.Time `json:"time"`
	OOM         bool      `json:"oom,omitempty"`
	MemoryBytes int64     `json:"memory_bytes,omitempty"`
	// Reason is one of the Reason constants; filled by Observe.
	Reason string `json:"reason,omitempty"`
	// Message where the code does not tell, as of a start that failed.
	Message string `json:"message,omitempty"`
}

// Streak is the state of one probe of one instance.
type Streak struct {
	NextAt    time.Time `json:"next_at,omitzero"`
	Failures  int       `json:"failures,omitempty"`
	Successes int       `json:"successes,omitempty"`
	Busy      bool      `json:"-"`
	Error     string    `json:"error,omitempty"`
}

// Container is what is known of one container of the spec.
type Container struct {
	Name string `json:"name"`
	Init bool   `json:"init,omitempty"`

	Pulled Step `json:"pulled,omitzero"`
	// Attempt numbers instances from 1; 0 before the first.
	Attempt   int       `json:"attempt,omitempty"`
	Phase     Phase     `json:"phase,omitempty"`
	Pid       int       `json:"pid,omitempty"`
	StartedAt time.Time `json:"started_at,omitzero"`
	// Started: the startup probe passed, or there is none. Ready: likewise.
	Started  bool      `json:"started,omitempty"`
	Ready    bool      `json:"ready,omitempty"`
	Probes   [3]Streak `json:"probes,omitzero"`
	Memory   int64     `json:"memory,omitempty"`
	Restarts int       `json:"restarts,omitempty"`
	// Crashes since the last instance that lived for HealthyAfter.
	Crashes   int       `json:"crashes,omitempty"`
	LastExit  *Exit     `json:"last_exit,omitempty"`
	NextStart time.Time `json:"next_start,omitzero"`
	// KillReason says why it is being ended: a probe's reason, or Stopped.
	KillReason string    `json:"kill_reason,omitempty"`
	PreStopped bool      `json:"pre_stopped,omitempty"`
	TermSent   bool      `json:"term_sent,omitempty"`
	KillAt     time.Time `json:"kill_at,omitzero"`
	// Retry delays the next try of a failed engine call on this container.
	Retry Step `json:"retry,omitzero"`
	// Finished: an init container or a job's container that needs no other run.
	Finished bool `json:"finished,omitempty"`
	// Busy is the action in flight.
	Busy Action `json:"-"`
	// Cancelled: the action in flight was told to give up.
	Cancelled bool `json:"-"`
}

// State is all that is known of an allocation. It survives the agent as JSON,
// but for what was in flight.
type State struct {
	AtNode     time.Time   `json:"at_node"`
	Identity   Step        `json:"identity,omitzero"`
	RenewAt    time.Time   `json:"renew_at,omitzero"`
	Network    Step        `json:"network,omitzero"`
	Proxy      Step        `json:"proxy,omitzero"`
	Containers []Container `json:"containers,omitempty"`

	// Serving: the warden has the proxy's sockets. ProxyReady: the proxy has all
	// its configuration active; ProxyWasReady: it once had.
	Serving       bool   `json:"-"`
	ProxyReady    bool   `json:"proxy_ready,omitempty"`
	ProxyWasReady bool   `json:"proxy_was_ready,omitempty"`
	ProxyDetail   string `json:"-"`

	// Outcome is api-visible: "" while it runs, else Succeeded or FailedJob.
	Outcome string `json:"outcome,omitempty"`
	// StopBegan is when stopping began; zero while it runs.
	StopBegan  time.Time `json:"stop_began,omitzero"`
	WasReady   bool      `json:"was_ready,omitempty"` // when stopping began
	Drained    Step      `json:"drained,omitzero"`
	GraceUntil time.Time `json:"grace_until,omitzero"`
	ProxyGone  Step      `json:"proxy_gone,omitzero"`
	Removed    Step      `json:"removed,omitzero"`

	PulledAt, NetworkAt, StartedAt, ReadyAt time.Time

	// Busy is the replica's own action in flight.
	Busy      Action `json:"-"`
	Cancelled bool   `json:"-"`
}

// Gone says that nothing of the allocation is left on the node.
func (s *State) Gone() bool { return s.Removed.Done }

// Container finds by name; nil when there is none.
func (s *State) Container(name string) *Container {
	for i := range s.Containers {
		if s.Containers[i].Name == name {
			return &s.Containers[i]
		}
	}
	return nil
}

// Reasons that people see; stable codes.
const (
	ReasonOOMKilled        = "OOMKilled"
	ReasonError            = "Error"
	ReasonCompleted        = "Completed"
	ReasonLivenessFailed   = "LivenessFailed"
	ReasonStartupFailed    = "StartupFailed"
	ReasonCrashLoopBackOff = "CrashLoopBackOff"
	ReasonImagePullFailed  = "ImagePullFailed"
	ReasonStartFailed      = "StartFailed"
	ReasonContainerLost    = "ContainerLost"
	ReasonIdentityPending  = "IdentityPending"
	ReasonNetworkPending   = "NetworkPending"
	ReasonProxyNotReady    = "ProxyNotReady"
	ReasonNotReady         = "NotReady"
	ReasonStopped          = "Stopped"
)

// Outcomes of a job's replica.
const (
	Succeeded = "Succeeded"
	Failed    = "Failed"
)

// Observation is something that happened: one of the types below.
type Observation interface{ observation() }

type (
	// Began says that the action is being carried out.
	Began struct{ Action Action }
	// Finished says how it ended. Err nil means success.
	Finished struct {
		Action Action
		Err    *Fault
		// Pid and At of a Start.
		Pid int
		At  time.Time
		// RenewAt of a Sign.
		RenewAt time.Time
	}
	// Ended says that a container's instance exited; Lost, that the engine does
	// not know it any more.
	Ended struct {
		Container string
		Attempt   int
		Exit      Exit
		Lost      bool
		// Down says that it was lost while no agent watched, with the engine or the
		// machine: not the container's fault.
		Down bool
	}
	// ProxySeen is what the warden says of the replica's proxy.
	ProxySeen struct {
		Serving, Ready bool
		Detail         string
	}
	// Sampled is a memory figure.
	Sampled struct {
		Container string
		Bytes     int64
	}
	// Adopted is what the engine has when an agent begins: the newest instance of
	// each container. Those absent from it are gone.
	Adopted struct{ Instances []Instance }
)

// Instance of a container in the engine.
type Instance struct {
	Container string
	Attempt   int
	Pid       int
	StartedAt time.Time
	Exit      *Exit // nil while it runs
}

// Fault is an error, cut to what decisions need.
type Fault struct {
	Kind    api.Kind
	Message string
}

func (Began) observation()     {}
func (Finished) observation()  {}
func (Ended) observation()     {}
func (ProxySeen) observation() {}
func (Sampled) observation()   {}
func (Adopted) observation()   {}

// Event is a typed thing worth telling.
type Event struct {
	Type    string
	Message string
}

// Package place decides how many replicas of a workload run in which cluster.
// It is a pure function of one snapshot: it reads no clock, holds no state and
// writes nothing; who calls it checks the plan again against the present and
// commits it. Every cluster gets reasons, also those that are not chosen.
//
// Concurrency: Place may be called from anywhere; it keeps nothing.
package place

import (
	"math"
	"sort"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Codes of reasons, stable.
const (
	Chosen          = "chosen"             // replicas are placed here
	Kept            = "kept"               // they were here before
	Failover        = "failover"           // instead of a lost cluster; count says how many
	Lost            = "lost"               // silent; keeps what it had
	ObserverSuspect = "observer-suspect"   // everything looks dead: nothing is changed
	Pending         = "pending"            // never joined
	Cordoned        = "cordoned"           // nothing new here
	Residency       = "residency"          // the tenant may not run in this region
	NotAllowed      = "region-not-allowed" // not among the workload's regions
	Forbidden       = "region-forbidden"   // excluded by the workload
	Selector        = "selector"           // a label is missing
	Taint           = "taint"              // a taint is not tolerated
	SoftTaint       = "soft-taint"         // avoided, not refused
	Capacity        = "capacity"           // no room for one more
	OverCapacity    = "over-capacity"      // holds more than would fit now
	Spread          = "spread"             // one more would break the spread
	NotNeeded       = "not-needed"         // feasible, but others come first
	MinGroups       = "min-groups"         // fewer domains than the spread asks for
)

// defaultFailoverAfter is how long a cluster must be silent when the workload's
// failover does not say.
const defaultFailoverAfter = 5 * time.Second

// Snapshot is what a decision depends on, besides the time.
type Snapshot struct {
	Workload Workload
	// Clusters of the whole fleet, in any order, IDs unique.
	Clusters []Cluster
}

// Workload is what is placed.
type Workload struct {
	Spec *portolanv1.WorkloadSpec
	// Residency are the regions that the tenant may run in; empty means all.
	Residency []string
	// Revisions that run beside each other, each with all replicas.
	Revisions []Revision
}

// Revision is one template of the workload.
type Revision struct {
	ID string
	// Requests of one replica.
	Requests api.Resources
	// Surge is how many replicas more than declared an update may run.
	Surge int
}

// NewRevision reads what placement needs from a template.
func NewRevision(id string, spec *portolanv1.WorkloadSpec) (Revision, error) {
	r, err := api.RequestsOf(spec)
	return Revision{ID: id, Requests: r, Surge: surge(spec)}, err
}

func surge(spec *portolanv1.WorkloadSpec) int {
	u := spec.GetUpdate()
	switch {
	case spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB, spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		return 0
	case u.GetMaxSurge() == 0 && u.GetMaxUnavailable() == 0:
		return 1
	}
	return int(u.GetMaxSurge())
}

// Cluster is one cluster as the decision sees it.
type Cluster struct {
	ID       string
	Labels   map[string]string
	Spec     *portolanv1.ClusterSpec
	State    portolanv1.ClusterState
	LastSeen time.Time
	// Nodes that the cluster has; a daemon runs on each.
	Nodes int
	// Free is the capacity less the reservations of all other workloads.
	Free api.Resources
	// Previous is what this workload has there.
	Previous Previous
	// Ready replicas of each revision that the cluster last reported. It only
	// says how long replicas go on standing in for a cluster that came back.
	Ready int
}

// Previous is an earlier decision for one cluster.
type Previous struct {
	// Present says that there is a placement, be it of no replicas.
	Present bool
	// Declared replicas, and those more that stand in for lost clusters.
	Declared, Failover int
	// Claim is what it reserves.
	Claim api.Resources
}

// PreviousOf reads it from the stored placement.
func PreviousOf(p *portolanv1.PlacementSpec) Previous {
	out := Previous{Present: true, Claim: api.Resources{CPUMilli: p.GetReservedCpuMilli(), MemoryBytes: p.GetReservedMemoryBytes()}}
	for _, r := range p.GetRevisions() {
		out.Declared = max(out.Declared, int(r.GetReplicas()))
	}
	for _, r := range p.GetReasons() {
		if r.GetCode() == Failover {
			out.Failover = min(int(r.GetCount()), out.Declared)
			out.Declared -= out.Failover
		}
	}
	return out
}

// Reason is a stable code and a sentence.
type Reason struct {
	Code, Message string
	// Count of replicas that it speaks of; 0 when none.
	Count int
}

// Assignment is the decision for one cluster that runs the workload.
type Assignment struct {
	Cluster string
	// Replicas of each revision, those for lost clusters included; of a daemon 0.
	Replicas int
	// Failover is how many of them stand in for lost clusters.
	Failover int
	// Claim is what to reserve: replicas and surge of all revisions.
	Claim   api.Resources
	Reasons []Reason
}

// Verdict is what the decision has to say about one cluster.
type Verdict struct {
	Cluster string
	// Feasible: it may run replicas of this workload and has room for one.
	Feasible bool
	Replicas int
	// Score orders clusters of the same standing; higher is better. It is the
	// price of a replica-hour in micro-units of currency, negative.
	Score   int64
	Reasons []Reason
}

// Plan is the decision.
type Plan struct {
	// Desired replicas of each revision over the fleet, and how many of them no
	// cluster could take.
	Desired, Unplaced int
	// FailoverUnplaced replicas of lost clusters could not be placed elsewhere.
	FailoverUnplaced int
	// Assignments in order of cluster ID.
	Assignments []Assignment
	// Verdicts on every cluster, in order of ID.
	Verdicts []Verdict
	// Reasons that are about no single cluster.
	Reasons []Reason
	// Frozen: everything looks dead, so the plan is what was there before.
	Frozen bool
	// Again is when time alone may change the decision; zero when it cannot.
	Again time.Time
}

// Place decides. The same snapshot and time give the same plan.
func Place(s Snapshot, now time.Time) Plan {
	d := newDecision(s, now)
	switch {
	case d.allDark():
		d.freeze()
	case d.isDaemon():
		d.daemon()
	default:
		d.keepLost()
		d.spread()
		d.failover()
	}
	return d.plan()
}

// Claim is what n replicas reserve in one cluster.
func (w Workload) Claim(n int) api.Resources {
	var sum api.Resources
	if n <= 0 {
		return sum
	}
	for _, r := range w.Revisions {
		sum = sum.Add(r.Requests.Times(int64(n + r.Surge)))
	}
	return sum
}

// decision is the working state. Everything counts in units: a unit is a replica,
// or a whole job that may not be split.
type decision struct {
	w     Workload
	now   time.Time
	cells []*cell
	// units wanted, replicas per unit, and replicas of a unit that run at once.
	units, perUnit, running int
	domain                  func(*cell) string
	plain                   *portolanv1.WorkloadSpec_Placement
	missing                 int // units that found no place
	extraMissing            int
	reasons                 []Reason
	frozen                  bool
	again                   time.Time
}

// cell is one cluster in a decision.
type cell struct {
	Cluster
	group string
	price float64
	// soft counts taints that are to be avoided.
	soft int
	// barred says that nothing may be here, closed that nothing may be added.
	barred, closed bool
	verdict        []Reason
	// room is how many units fit in all, extra ones included.
	room int
	// n are the declared units, fixed of them belong to a lost cluster.
	n, fixed int
	extra    int
	// had units were here before.
	had, hadExtra int
}

func newDecision(s Snapshot, now time.Time) *decision {
	d := &decision{w: s.Workload, now: now, plain: s.Workload.Spec.GetPlacement(), perUnit: 1, running: 1}
	d.units = count(s.Workload.Spec)
	if s.Workload.Spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
		if p := max(1, int(s.Workload.Spec.GetJob().GetParallelism())); p < d.units {
			// Its bound on replicas at a time holds only within one cluster.
			d.units, d.perUnit, d.running = 1, d.units, p
		}
	}
	d.domain = domainOf(d.plain.GetSpread().GetOver())
	for _, c := range s.Clusters {
		d.cells = append(d.cells, d.newCell(c))
	}
	sort.Slice(d.cells, func(i, j int) bool { return d.cells[i].ID < d.cells[j].ID })
	return d
}

// count is how many replicas the spec declares.
func count(spec *portolanv1.WorkloadSpec) int {
	switch spec.GetKind() {
	case portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON:
		return 0
	case portolanv1.WorkloadKind_WORKLOAD_KIND_JOB:
		return max(1, int(spec.GetJob().GetCompletions()))
	default: // a service
	}
	if spec.Replicas == nil {
		return 1
	}
	return max(0, int(spec.GetReplicas()))
}

func domainOf(over portolanv1.SpreadDomain) func(*cell) string {
	switch over {
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION:
		return func(c *cell) string { return c.Spec.GetRegion() }
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_ZONE:
		return func(c *cell) string { return c.Spec.GetRegion() + "/" + c.Spec.GetZone() }
	default:
		return func(c *cell) string { return c.ID }
	}
}

func (d *decision) newCell(c Cluster) *cell {
	x := &cell{Cluster: c, price: d.priceOf(c.Spec)}
	x.group = d.domain(x)
	d.judge(x)
	x.had, x.hadExtra = c.Previous.Declared/d.perUnit, c.Previous.Failover/d.perUnit
	x.room = d.roomIn(x)
	return x
}

// priceOf one running replica of all revisions for an hour; of one core and one
// GiB when they request nothing.
func (d *decision) priceOf(spec *portolanv1.ClusterSpec) float64 {
	var r api.Resources
	for _, rev := range d.w.Revisions {
		r = r.Add(rev.Requests)
	}
	if r == (api.Resources{}) {
		r = api.Resources{CPUMilli: 1000, MemoryBytes: 1 << 30}
	}
	return float64(r.CPUMilli)/1000*float64(spec.GetCpuCoreHourMicros()) + float64(r.MemoryBytes)/(1<<30)*float64(spec.GetMemoryGibHourMicros())
}

// claim is what units reserve in one cluster.
func (d *decision) claim(units int) api.Resources { return d.w.Claim(units * d.running) }

// roomIn is how many units the cluster can hold: as many as fit into what is free,
// and never fewer than what it already holds under a claim of the same size,
// because losing a node must not send replicas over the world.
func (d *decision) roomIn(x *cell) int {
	if x.barred {
		return 0
	}
	if d.isDaemon() {
		return d.daemonRoom(x)
	}
	had := x.had + x.hadExtra
	limit := max(1, d.units)
	if x.closed {
		limit = had
	}
	n := d.fit(x.Free, limit)
	if held := min(had, limit); n < held {
		n = max(n, d.fit(x.Previous.Claim, held))
	}
	return n
}

// fit is the greatest number of units up to limit whose claim fits.
func (d *decision) fit(free api.Resources, limit int) int {
	return sort.Search(limit, func(i int) bool { return !d.claim(i + 1).Fits(free) })
}

// plan turns the state into the answer.
func (d *decision) plan() Plan {
	p := Plan{
		Desired: d.units * d.perUnit, Unplaced: d.missing * d.perUnit, FailoverUnplaced: d.extraMissing * d.perUnit,
		Reasons: d.reasons, Frozen: d.frozen, Again: d.again,
	}
	for _, x := range d.cells {
		a := d.assignment(x)
		v := Verdict{Cluster: x.ID, Replicas: a.Replicas, Score: -int64(min(math.Round(x.price), math.MaxInt64/2))}
		v.Reasons = d.explain(x)
		v.Feasible = !x.barred && (x.n+x.extra > 0 || x.room > 0)
		p.Verdicts = append(p.Verdicts, v)
		if x.n+x.extra > 0 {
			a.Reasons = v.Reasons
			p.Assignments = append(p.Assignments, a)
		}
	}
	return p
}

func (d *decision) assignment(x *cell) Assignment {
	a := Assignment{Cluster: x.ID, Replicas: (x.n + x.extra) * d.perUnit, Failover: x.extra * d.perUnit, Claim: d.claim(x.n + x.extra)}
	switch {
	case d.frozen:
		a.Replicas, a.Failover, a.Claim = x.Previous.Declared+x.Previous.Failover, x.Previous.Failover, x.Previous.Claim
	case d.isDaemon():
		a.Replicas, a.Claim = 0, d.daemonClaim(x)
	}
	return a
}

func (d *decision) isDaemon() bool {
	return d.w.Spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
}

package schedule

import (
	"time"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Class is what replicas of one revision ask of a node.
type Class struct{}

// Compile makes a class of a spec.
func Compile(spec *portolanv1.WorkloadSpec, o Options) (*Class, error) { panic("written next") }

// Table holds the nodes and what is bound to them.
type Table struct{}

// NewTable gives an empty one. The seed breaks ties.
func NewTable(seed uint64) *Table { panic("written next") }

// PutNode adds a node or replaces what is known of it.
func (t *Table) PutNode(n Node) { panic("written next") }

// DeleteNode takes it out. Replicas that are on it count nowhere until it returns.
func (t *Table) DeleteNode(id string) { panic("written next") }

// SetPools replaces the pools.
func (t *Table) SetPools(p Pools) { panic("written next") }

// PutReplica counts a bound replica; putting it again replaces it.
func (t *Table) PutReplica(r Replica) { panic("written next") }

// DeleteReplica forgets it.
func (t *Table) DeleteReplica(id string) { panic("written next") }

// PutVolume counts a volume on its node's disk.
func (t *Table) PutVolume(id, node string, bytes int64) { panic("written next") }

// DeleteVolume forgets it.
func (t *Table) DeleteVolume(id string) { panic("written next") }

// Nominate keeps room on a node for one replica of a group; several calls keep
// several. A group finds its own room free.
func (t *Table) Nominate(group string, c *Class, node string) { panic("written next") }

// Withdraw gives up all that was kept for a group.
func (t *Table) Withdraw(group string) { panic("written next") }

// Nominations is how many replicas of a group have room kept.
func (t *Table) Nominations(group string) int { panic("written next") }

// Schedule decides a batch.
func Schedule(t *Table, b Batch) Result { panic("written next") }

// Misfits gives the bound replicas that no longer have their place, at most max.
func Misfits(t *Table, max int) []Misfit { panic("written next") }

// Fits says whether a bound replica still has its place.
func Fits(t *Table, replica string) (Misfit, bool) { panic("written next") }

// Moves gives at most max proposals to move replicas to better nodes, the greatest
// gain first.
func Moves(t *Table, max, minGainPercent int) []Move { panic("written next") }

// Admit says whether replicas may begin and stay on a node.
func Admit(n *clusterv1.Node, spec *portolanv1.WorkloadSpec) Admission { panic("written next") }

// Event is what happened to a table.
type Event uint8

// Events that may help who waits.
const (
	// NodeBetter: it is new, or its labels, taints, mode, readiness or capacity changed.
	NodeBetter Event = iota
	// RoomFreed on a node: a replica, a volume or a nomination is gone.
	RoomFreed
	// ReplicaBound may help affinity and spreading.
	ReplicaBound
	// PoolsChanged may help anybody.
	PoolsChanged
	// BudgetFreed: more may be displaced.
	BudgetFreed
)

// Waiting is a group in a Queue.
type Waiting struct {
	Key   string
	Class *Class
	Count int
	// Since orders groups of one tenant and priority.
	Since time.Time
}

// Queue holds the groups that wait for nodes.
type Queue struct{}

// NewQueue gives an empty queue for at most limit groups.
func NewQueue(limit int) *Queue { panic("written next") }

// Put adds a group, or replaces what is known of it; what is new or was changed is
// ready at once. A full queue drops the group that would be served last and gives
// its key.
func (q *Queue) Put(w Waiting) (dropped string) { panic("written next") }

// Delete takes a group out.
func (q *Queue) Delete(key string) { panic("written next") }

// Refuse puts a group that was served to sleep until something happens that helps
// one of the codes.
func (q *Queue) Refuse(key string, codes Codes) { panic("written next") }

// Wake makes those ready that an event can help; node is where it happened, empty
// when it concerns no single one.
func (q *Queue) Wake(t *Table, e Event, node string) { panic("written next") }

// Take gives the keys of at most max ready groups in the order in which they are to
// be served: by priority, then by the dominant share of the tenant over its weight
// (1 when absent), then the oldest.
func (q *Queue) Take(t *Table, weights map[string]int32, max int) []string { panic("written next") }

// Expired gives the gangs whose deadline is over, oldest first; NextExpiry is when
// the next one will be, zero for never.
func (q *Queue) Expired(now time.Time) (keys []string, next time.Time) { panic("written next") }

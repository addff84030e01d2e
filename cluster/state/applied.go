package state

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// maxLaggards bounds a list of laggards.
const maxLaggards = 100

// Live lists the nodes whose lease is not over, in order.
func (s *Snapshot) Live() []string {
	var live []string
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		if s.Nodes[id].GetLostTime() == nil {
			live = append(live, id)
		}
	}
	return live
}

// Heard says whether every live node has reported since this process began: until
// then, what is observed is a part, and must not be taken for the whole.
func (s *Snapshot) Heard() bool {
	for _, id := range s.Live() {
		if st := s.NodeStatus[id]; st == nil || st.Session == 0 {
			return false
		}
	}
	return true
}

// Applied is the federation revision that the whole cluster has applied: the
// manager has looked past it, and so has every live node with all its proxies.
func (s *Snapshot) Applied() int64 {
	applied := s.Settled
	for _, id := range s.Live() {
		applied = min(applied, s.NodeStatus[id].applied())
	}
	return applied
}

func (n *NodeStatus) applied() int64 {
	if n == nil {
		return 0
	}
	return n.Applied.GetRevision()
}

// Laggards names the consumers of the cluster that have not applied revision: the
// cluster itself while its manager has not settled, live nodes, and proxies where
// it is they that hold their node back.
func (s *Snapshot) Laggards(cluster string, revision int64) []*portolanv1.Laggard {
	name := "clusters/" + cluster
	if s.Settled < revision {
		return []*portolanv1.Laggard{{Name: name, AppliedRevision: s.Settled, Detail: "has not decided what follows from it"}}
	}
	var out []*portolanv1.Laggard
	for _, id := range s.Live() {
		if s.NodeStatus[id].applied() >= revision {
			continue
		}
		out = append(out, s.NodeStatus[id].laggards(name+"/nodes/"+id, revision)...)
		if len(out) >= maxLaggards {
			return out[:maxLaggards]
		}
	}
	return out
}

func (n *NodeStatus) laggards(name string, revision int64) []*portolanv1.Laggard {
	self := &portolanv1.Laggard{Name: name, AppliedRevision: n.applied()}
	switch {
	case n == nil || n.Session == 0:
		self.Detail = "has not reported yet"
		return []*portolanv1.Laggard{self}
	case !n.Connected:
		self.Detail = "silent since " + n.LastSeen.UTC().Format(time.RFC3339Nano)
		return []*portolanv1.Laggard{self}
	}
	var out []*portolanv1.Laggard
	for _, id := range slices.Sorted(maps.Keys(n.Proxies)) {
		p := n.Proxies[id]
		if p.GetApplied().GetRevision() >= revision {
			continue
		}
		l := &portolanv1.Laggard{Name: name + "/proxies/" + id, AppliedRevision: p.GetApplied().GetRevision()}
		if nacks := p.GetNacks(); len(nacks) > 0 {
			l.Detail = fmt.Sprintf("refused %s: %s", nacks[0].GetResource(), nacks[0].GetMessage())
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return []*portolanv1.Laggard{self}
	}
	return out
}

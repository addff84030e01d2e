package manager

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// maxRegisterTries bounds how often a registration meets the loop's own write.
const maxRegisterTries = 10

// RegisterNode makes a node part of the cluster and gives it a range for its
// replicas. Doing it again updates facts and key, and keeps the range; keys of
// before count no more.
// api.Exhausted when no range is left, api.Invalid for a bad ID.
func (m *Manager) RegisterNode(ctx context.Context, node string, facts *nodev1.NodeFacts, keyHash []byte) (*clusterv1.Node, error) {
	doing := "register node " + node
	if _, err := api.ParseID(node); err != nil {
		return nil, api.E(api.Invalid, doing, "%w", err)
	}
	m.register.Lock()
	defer m.register.Unlock()
	var err error
	for range maxRegisterTries {
		s := m.cfg.Store.Snapshot()
		n := &clusterv1.Node{Node: node, CreateTime: timestamppb.New(m.cfg.Now())}
		was, known := s.Nodes[node]
		if known {
			if proto.Equal(was.GetFacts(), facts) && bytes.Equal(was.GetKeyHash(), keyHash) {
				return was, nil
			}
			n = proto.CloneOf(was)
		} else if n.ReplicaCidr, err = m.freeRange(s); err != nil {
			return nil, err
		}
		n.Facts, n.KeyHash, n.RenewedKeys = facts, keyHash, nil
		err = m.cfg.Store.Commit(ctx, state.Change{Base: s.Generation, PutNodes: []*clusterv1.Node{n}})
		if err == nil {
			if !known {
				m.AddEvents(m.nodeEvent(node, "NodeRegistered", "replicas get addresses of "+n.ReplicaCidr, m.cfg.Now()))
			}
			return n, nil
		}
		if api.KindOf(err) != api.Conflict {
			return nil, err
		}
	}
	return nil, err
}

// SetMode changes the mode of a node, or of all nodes of a pool when node is empty.
// deadline is of a drain; zero: never. api.NotFound when there is no such node,
// api.Invalid unless exactly one of node and pool is given.
func (m *Manager) SetMode(ctx context.Context, node, pool string, mode portolanv1.NodeMode, deadline time.Time) error {
	const doing = "set the mode of nodes"
	if (node == "") == (pool == "") {
		return api.E(api.Invalid, doing, "name a node or a pool, and not both")
	}
	m.register.Lock()
	defer m.register.Unlock()
	var err error
	for range maxRegisterTries {
		s := m.cfg.Store.Snapshot()
		c := state.Change{Base: s.Generation}
		found := false
		for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
			n := s.Nodes[id]
			if id != node && (node != "" || state.PoolOf(n) != pool) {
				continue
			}
			found = true
			if up := inMode(n, mode, deadline); up != nil {
				c.PutNodes = append(c.PutNodes, up)
			}
		}
		if !found {
			return api.E(api.NotFound, doing, "there is no node %q, or no node in pool %q", node, pool)
		}
		if err = m.cfg.Store.Commit(ctx, c); err == nil {
			for _, n := range c.PutNodes {
				m.AddEvents(m.nodeEvent(n.GetNode(), modeEvents[mode], modeSentence(mode, deadline), m.cfg.Now()))
			}
			return nil
		}
		if api.KindOf(err) != api.Conflict {
			return err
		}
	}
	return err
}

// modeEvents are the types of the events that a mode makes.
var modeEvents = map[portolanv1.NodeMode]string{
	portolanv1.NodeMode_NODE_MODE_UNSPECIFIED: "NodeFreed",
	portolanv1.NodeMode_NODE_MODE_CORDONED:    "NodeCordoned",
	portolanv1.NodeMode_NODE_MODE_DRAINING:    "NodeDraining",
}

func modeSentence(mode portolanv1.NodeMode, deadline time.Time) string {
	switch {
	case mode == portolanv1.NodeMode_NODE_MODE_CORDONED:
		return "nothing new is bound to it"
	case mode == portolanv1.NodeMode_NODE_MODE_DRAINING && deadline.IsZero():
		return "what runs there leaves, within its disruption budgets"
	case mode == portolanv1.NodeMode_NODE_MODE_DRAINING:
		return "what runs there leaves, within its disruption budgets until " + deadline.UTC().Format(time.RFC3339)
	}
	return "it takes replicas"
}

// inMode gives the record with the mode; nil when it is so already.
func inMode(n *clusterv1.Node, mode portolanv1.NodeMode, deadline time.Time) *clusterv1.Node {
	var until *timestamppb.Timestamp
	if mode == portolanv1.NodeMode_NODE_MODE_DRAINING && !deadline.IsZero() {
		until = timestamppb.New(deadline)
	}
	if n.GetMode() == mode && proto.Equal(n.GetDrainDeadline(), until) {
		return nil
	}
	up := proto.CloneOf(n)
	up.Mode, up.DrainDeadline = mode, until
	return up
}

// taintTimes says since when a node has each taint that makes replicas leave; was
// is what its record says. Nil when there is none.
func taintTimes(was map[string]*timestamppb.Timestamp, taints []*portolanv1.Taint, now time.Time) map[string]*timestamppb.Timestamp {
	var out map[string]*timestamppb.Timestamp
	for _, t := range taints {
		if t.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE {
			continue
		}
		if out == nil {
			out = map[string]*timestamppb.Timestamp{}
		}
		key := t.GetKey() + "=" + t.GetValue()
		if out[key] = was[key]; out[key] == nil {
			out[key] = timestamppb.New(now)
		}
	}
	return out
}

func sameTime(a, b *timestamppb.Timestamp) bool { return proto.Equal(a, b) }

// freeRange gives the lowest /24 that no node has, from the second of the
// cluster's range on.
func (m *Manager) freeRange(s *state.Snapshot) (string, error) {
	taken := make(map[string]bool, len(s.Nodes))
	for _, n := range s.Nodes {
		taken[n.GetReplicaCidr()] = true
	}
	base := m.cidr.Addr().As4()
	for i := uint32(1); i < 1<<(24-m.cidr.Bits()); i++ {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(base[:])+i<<8)
		if p := netip.PrefixFrom(netip.AddrFrom4(a), 24).String(); !taken[p] {
			return p, nil
		}
	}
	return "", api.E(api.Exhausted, "register a node", "range %s has no free /24: %d nodes have one", m.cidr, len(taken))
}

// leaseChange is what became of the nodes' leases.
type leaseChange struct {
	put    []*clusterv1.Node
	events []*portolanv1.Event
	next   time.Time
	// dark says that all nodes are silent.
	dark bool
}

// edit gives the node's record for changing.
func (c *leaseChange) edit(n *clusterv1.Node) *clusterv1.Node {
	if last := len(c.put) - 1; last >= 0 && c.put[last].GetNode() == n.GetNode() {
		return c.put[last]
	}
	up := proto.CloneOf(n)
	c.put = append(c.put, up)
	return up
}

// leases compares when nodes were seen with their records. When all are silent,
// the fault is likelier here than there, and nothing changes; neither does it
// while they have had no time to come back. Their leases do not end at the same
// moment even then, so a node is lost only when a witness was heard just now: in
// the second half of the timeout, in which a live node reports at least once.
func (m *Manager) leases(s *state.Snapshot, now time.Time) leaseChange {
	var c leaseChange
	silent := 0
	var heard time.Time
	for _, n := range s.Nodes {
		seen := m.seen(s, n)
		if seen.After(heard) {
			heard = seen
		}
		if until := seen.Add(m.cfg.NodeTimeout); now.After(until) {
			silent++
		} else {
			c.next = earlier(c.next, until.Add(time.Millisecond))
		}
	}
	c.dark = silent > 0 && silent == len(s.Nodes)
	judge := !c.dark && !m.dark && !now.Before(m.graceUntil)
	switch {
	case now.Before(m.graceUntil):
		c.next = earlier(c.next, m.graceUntil)
	case judge && now.Sub(heard) > m.cfg.NodeTimeout/2:
		judge = false
		c.next = earlier(c.next, now.Add(m.cfg.NodeTimeout/10))
	}
	for _, n := range s.Nodes {
		m.lease(&c, s, n, judge, now)
	}
	slices.SortFunc(c.put, func(a, b *clusterv1.Node) int { return cmp.Compare(a.GetNode(), b.GetNode()) })
	slices.SortFunc(c.events, func(a, b *portolanv1.Event) int { return cmp.Compare(a.GetObject(), b.GetObject()) })
	return c
}

// lease compares one node with its record. judge says that it may be called lost.
func (m *Manager) lease(c *leaseChange, s *state.Snapshot, n *clusterv1.Node, judge bool, now time.Time) {
	id, st := n.GetNode(), s.NodeStatus[n.GetNode()]
	silent := now.After(m.seen(s, n).Add(m.cfg.NodeTimeout))
	switch {
	case silent && judge && n.GetLostTime() == nil:
		c.edit(n).LostTime = timestamppb.New(now)
		c.events = append(c.events, m.nodeEvent(id, "NodeLost", fmt.Sprintf("silent for more than %v", m.cfg.NodeTimeout), now))
	case !silent && st != nil && n.GetLostTime() != nil:
		c.edit(n).LostTime = nil
		c.events = append(c.events, m.nodeEvent(id, "NodeReturned", fmt.Sprintf("it was lost for %v", now.Sub(n.GetLostTime().AsTime()).Round(time.Millisecond)), now))
	}
	facts := n.GetFacts()
	if st != nil && st.Facts != nil {
		if facts = st.Facts; facts != n.GetFacts() && !proto.Equal(facts, n.GetFacts()) {
			c.edit(n).Facts = facts
		}
	}
	if times := taintTimes(n.GetTaintTimes(), facts.GetTaints(), now); !maps.EqualFunc(times, n.GetTaintTimes(), sameTime) {
		c.edit(n).TaintTimes = times
	}
}

// seen is when a node gave its last sign of life; a node that this process has
// not heard yet is given the time since the process began.
func (m *Manager) seen(s *state.Snapshot, n *clusterv1.Node) time.Time {
	if st := s.NodeStatus[n.GetNode()]; st != nil {
		return st.LastSeen
	}
	if at := n.GetCreateTime().AsTime(); at.After(m.start) {
		return at
	}
	return m.start
}

// noteDark follows whether all nodes are silent. When the first comes back, the
// others get the time to do so.
func (m *Manager) noteDark(dark bool, now time.Time) {
	switch {
	case dark && !m.dark:
		m.cfg.Log.Error("all nodes are silent, nothing is done about it")
		m.AddEvents(m.clusterEvent("AllNodesSilent", "every node is silent: nothing is done until one is heard", now))
	case !dark && m.dark:
		m.cfg.Log.Info("nodes are heard again")
		m.graceUntil = now.Add(m.cfg.NodeTimeout + settleGrace)
	}
	m.dark = dark
}

// notReady is why a node takes no new replicas; 0 when it does.
func (m *Manager) notReady(s *state.Snapshot, n *clusterv1.Node, now time.Time) schedule.Code {
	st := s.NodeStatus[n.GetNode()]
	switch {
	case n.GetLostTime() != nil:
		return schedule.NodeLost
	case st == nil:
		// After a restart of this process the nodes that were there are believed to
		// be: else the first to reconnect would get everything.
		if n.GetCreateTime().AsTime().Before(m.start) && now.Before(m.graceUntil) {
			return 0
		}
		return schedule.NodeNotReady
	case !st.Connected || now.After(st.LastSeen.Add(m.cfg.NodeTimeout)):
		return schedule.NodeNotReady
	}
	return 0
}

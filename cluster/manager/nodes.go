package manager

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/schedule/old"
	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// maxRegisterTries bounds how often a registration meets the loop's own write.
const maxRegisterTries = 10

// RegisterNode makes a node part of the cluster and gives it a range for its
// replicas. Doing it again updates facts and key, and keeps the range.
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
		n.Facts, n.KeyHash = facts, keyHash
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
	silent := make(map[string]bool, len(s.Nodes))
	var heard time.Time
	for id, n := range s.Nodes {
		seen := m.seen(s, n)
		if seen.After(heard) {
			heard = seen
		}
		until := seen.Add(m.cfg.NodeTimeout)
		if silent[id] = now.After(until); !silent[id] {
			c.next = earlier(c.next, until.Add(time.Millisecond))
		} else {
			c.dark = true
		}
	}
	for _, is := range silent {
		c.dark = c.dark && is
	}
	judge := !c.dark && !m.dark && !now.Before(m.graceUntil)
	switch {
	case now.Before(m.graceUntil):
		c.next = earlier(c.next, m.graceUntil)
	case judge && now.Sub(heard) > m.cfg.NodeTimeout/2:
		judge = false
		c.next = earlier(c.next, now.Add(m.cfg.NodeTimeout/10))
	}
	for _, id := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[id]
		st := s.NodeStatus[id]
		switch {
		case silent[id] && judge && n.GetLostTime() == nil:
			c.edit(n).LostTime = timestamppb.New(now)
			c.events = append(c.events, m.nodeEvent(id, "NodeLost", fmt.Sprintf("silent for more than %v", m.cfg.NodeTimeout), now))
		case !silent[id] && st != nil && n.GetLostTime() != nil:
			c.edit(n).LostTime = nil
			c.events = append(c.events, m.nodeEvent(id, "NodeReturned", fmt.Sprintf("it was lost for %v", now.Sub(n.GetLostTime().AsTime()).Round(time.Millisecond)), now))
		}
		if st != nil && st.Facts != nil && !proto.Equal(st.Facts, n.GetFacts()) {
			c.edit(n).Facts = st.Facts
		}
	}
	return c
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

// notReady is why a node takes no new replicas; empty when it does.
func (m *Manager) notReady(s *state.Snapshot, n *clusterv1.Node, now time.Time) string {
	st := s.NodeStatus[n.GetNode()]
	switch {
	case n.GetLostTime() != nil:
		return old.NodeLost
	case st == nil:
		// After a restart of this process the nodes that were there are believed to
		// be: else the first to reconnect would get everything.
		if n.GetCreateTime().AsTime().Before(m.start) && now.Before(m.graceUntil) {
			return ""
		}
		return old.NodeNotReady
	case !st.Connected || now.After(st.LastSeen.Add(m.cfg.NodeTimeout)):
		return old.NodeNotReady
	}
	return ""
}

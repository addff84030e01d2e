package manager

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// maxNodeKeys bounds the keys that a node may have at once. At one renewal a day
// it has two; more are renewals whose answers were lost.
const maxNodeKeys = 16

// RenewNode notes a key for which the node got a certificate until expire. The
// keys of before stay: the node has the new one only when the answer arrives.
// api.Exhausted when too many are unexpired.
func (m *Manager) RenewNode(ctx context.Context, node string, keyHash []byte, expire time.Time) error {
	doing := "renew node " + node
	return m.changeNode(ctx, doing, node, func(s *state.Snapshot, n *clusterv1.Node) (state.Change, error) {
		now := m.cfg.Now()
		n = proto.CloneOf(n)
		n.RenewedKeys = slices.DeleteFunc(n.GetRenewedKeys(), func(k *clusterv1.NodeKey) bool { return !now.Before(k.GetExpireTime().AsTime()) })
		if len(n.GetRenewedKeys()) >= maxNodeKeys {
			return state.Change{}, api.E(api.Exhausted, doing, "it has %d keys already", maxNodeKeys)
		}
		n.RenewedKeys = append(n.RenewedKeys, &clusterv1.NodeKey{Hash: keyHash, ExpireTime: timestamppb.New(expire)})
		return state.Change{Base: s.Generation, PutNodes: []*clusterv1.Node{n}}, nil
	})
}

// DeleteNode takes a node out of the cluster; its range is free afterwards, and the
// next pass makes its replicas elsewhere. Only a lost one, unless forced:
// api.Precondition.
func (m *Manager) DeleteNode(ctx context.Context, node string, force bool) error {
	doing := "delete node " + node
	err := m.changeNode(ctx, doing, node, func(s *state.Snapshot, n *clusterv1.Node) (state.Change, error) {
		if n.GetLostTime() == nil && !force {
			return state.Change{}, api.E(api.Precondition, doing, "it is not lost: stop it first, or force it")
		}
		return state.Change{Base: s.Generation, DeleteNodes: []string{node}}, nil
	})
	if err == nil {
		m.AddEvents(m.nodeEvent(node, "NodeDeleted", "it is no longer part of the cluster", m.cfg.Now()))
	}
	return err
}

// changeNode commits what decide makes of the newest record of a node, again when
// the loop wrote it meanwhile.
func (m *Manager) changeNode(ctx context.Context, doing, node string, decide func(*state.Snapshot, *clusterv1.Node) (state.Change, error)) error {
	m.register.Lock()
	defer m.register.Unlock()
	var err error
	for range maxRegisterTries {
		s := m.cfg.Store.Snapshot()
		n := s.Nodes[node]
		if n == nil {
			return api.E(api.NotFound, doing, "there is no such node")
		}
		c, refused := decide(s, n)
		if refused != nil {
			return refused
		}
		if err = m.cfg.Store.Commit(ctx, c); err == nil || api.KindOf(err) != api.Conflict {
			return err
		}
	}
	return err
}

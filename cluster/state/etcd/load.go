package etcd

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
)

// load takes ownership and reads everything. What cannot be read is an error,
// but for intents, which have older generations: without its nodes and
// allocations a cluster would begin anew over replicas that run.
func (s *Store) load(ctx context.Context) (state.Loaded, error) {
	const doing = "load the cluster's state"
	l := state.Loaded{
		Nodes: map[string]*clusterv1.Node{}, Allocations: map[string]*clusterv1.Allocation{},
		Volumes: map[string]*clusterv1.Volume{}, States: map[string]*clusterv1.WorkloadState{},
	}
	wctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	r, err := s.client.Put(wctx, s.key("owner"), s.owner)
	if err != nil {
		return l, fault(doing, err)
	}
	// Revisions only grow, and no process makes 2^32 changes between two writes: so
	// generations grow over restarts too.
	l.Generation = r.Header.Revision << 32
	if err := s.loadGenerations(ctx, &l); err != nil {
		return l, api.E(api.Internal, doing, "%w", err)
	}
	if err := s.loadRecords(ctx, &l); err != nil {
		return l, api.E(api.Internal, doing, "%w", err)
	}
	b, err := s.getRaw(ctx, s.key("settled"))
	if err != nil {
		return l, err
	}
	if len(b) > 0 {
		if l.Settled, err = strconv.ParseInt(string(b), 10, 64); err != nil {
			return l, api.E(api.Internal, doing, "settled: %w", err)
		}
	}
	return l, nil
}

// getRaw reads a key that may be absent, before the store is open.
func (s *Store) getRaw(ctx context.Context, key string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	r, err := s.client.Get(ctx, key)
	if err != nil {
		return nil, fault("read "+key, err)
	}
	if len(r.Kvs) == 0 {
		return nil, nil
	}
	return r.Kvs[0].Value, nil
}

func (s *Store) loadRecords(ctx context.Context, l *state.Loaded) error {
	if err := loadAll(ctx, s, "node", l.Nodes); err != nil {
		return err
	}
	if err := loadAll(ctx, s, "volume", l.Volumes); err != nil {
		return err
	}
	if err := loadAll(ctx, s, "state", l.States); err != nil {
		return err
	}
	packs := map[string]*clusterv1.NodeAllocations{}
	if err := loadAll(ctx, s, "alloc", packs); err != nil {
		return err
	}
	for node, p := range packs {
		of := make(map[string]*clusterv1.Allocation, len(p.GetAllocations()))
		for _, a := range p.GetAllocations() {
			of[a.GetAllocation()], l.Allocations[a.GetAllocation()] = a, a
		}
		s.byNode[node] = of
	}
	return nil
}

// loadAll reads all records of a kind, by what follows the kind in their keys.
func loadAll[T any, M interface {
	*T
	proto.Message
}](ctx context.Context, s *Store, kind string, into map[string]M) error {
	prefix := s.key(kind, "")
	kvs, err := s.list(ctx, prefix)
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		m := M(new(T))
		b, err := s.read(ctx, kv)
		if err == nil {
			err = proto.Unmarshal(b, m)
		}
		if err != nil {
			return fmt.Errorf("%s %q: %w", kind, kv.Key, err)
		}
		into[strings.TrimPrefix(string(kv.Key), prefix)] = m
	}
	return nil
}

// part of a change that is written before the next.
type part struct {
	records []record
	packs   []pack
	change  state.Change
}

// pack is the new content of a node's allocations; nil data when there are none.
type pack struct {
	node        string
	allocations map[string]*clusterv1.Allocation
	data        []byte
}

// parts cuts a change by node. An allocation never moves between nodes. What
// allocations refer to comes before them; the states of workloads, which say that
// something was dealt with, come after them.
func (s *Store) parts(c state.Change) []part {
	all := s.Snapshot().Allocations
	by := map[string]*state.Change{}
	of := func(node string) *state.Change {
		if by[node] == nil {
			by[node] = &state.Change{Base: c.Base}
		}
		return by[node]
	}
	for _, a := range c.PutAllocations {
		ch := of(a.GetNode())
		ch.PutAllocations = append(ch.PutAllocations, a)
	}
	for _, id := range c.DeleteAllocations {
		if a, ok := all[id]; ok {
			ch := of(a.GetNode())
			ch.DeleteAllocations = append(ch.DeleteAllocations, id)
		}
	}
	first := part{change: state.Change{
		Base: c.Base, PutNodes: c.PutNodes, DeleteNodes: c.DeleteNodes, PutVolumes: c.PutVolumes, DeleteVolumes: c.DeleteVolumes,
	}}
	first.records = append(recordsOf(s, "node", c.PutNodes, (*clusterv1.Node).GetNode, c.DeleteNodes),
		recordsOf(s, "volume", c.PutVolumes, (*clusterv1.Volume).GetVolume, c.DeleteVolumes)...)
	last := part{
		change:  state.Change{Base: c.Base, PutStates: c.PutStates, DeleteStates: c.DeleteStates},
		records: recordsOf(s, "state", c.PutStates, state.StateKey, c.DeleteStates),
	}
	out := append([]part{first}, append(s.packParts(by), last)...)
	return slices.DeleteFunc(out, func(p part) bool { return p.change.Empty() })
}

// recordsOf gives the records that write and delete messages of a kind.
func recordsOf[M proto.Message](s *Store, kind string, put []M, id func(M) string, del []string) []record {
	out := make([]record, 0, len(put)+len(del))
	for _, m := range put {
		out = append(out, record{key: s.key(kind, id(m)), data: marshal(m)})
	}
	for _, d := range del {
		out = append(out, record{key: s.key(kind, d)})
	}
	return out
}

// packParts puts the packs of several nodes together, up to the limits of a
// transaction.
func (s *Store) packParts(by map[string]*state.Change) []part {
	var out []part
	size, cur := 0, part{}
	for _, node := range slices.Sorted(maps.Keys(by)) {
		ch := by[node]
		p := s.pack(node, ch)
		if len(cur.packs) > 0 && (len(cur.packs) >= s.ops/4 || size+len(p.data) > maxBatch) {
			out, size, cur = append(out, cur), 0, part{}
		}
		size += len(p.data)
		cur.packs = append(cur.packs, p)
		cur.change.PutAllocations = append(cur.change.PutAllocations, ch.PutAllocations...)
		cur.change.DeleteAllocations = append(cur.change.DeleteAllocations, ch.DeleteAllocations...)
	}
	if len(cur.packs) > 0 {
		out = append(out, cur)
	}
	return out
}

func (s *Store) pack(node string, ch *state.Change) pack {
	of := maps.Clone(s.byNode[node])
	if of == nil {
		of = map[string]*clusterv1.Allocation{}
	}
	for _, a := range ch.PutAllocations {
		of[a.GetAllocation()] = a
	}
	for _, id := range ch.DeleteAllocations {
		delete(of, id)
	}
	p := pack{node: node, allocations: of}
	if len(of) == 0 {
		return p
	}
	m := &clusterv1.NodeAllocations{Allocations: make([]*clusterv1.Allocation, 0, len(of))}
	for _, id := range slices.Sorted(maps.Keys(of)) {
		m.Allocations = append(m.Allocations, of[id])
	}
	p.data = marshal(m)
	return p
}

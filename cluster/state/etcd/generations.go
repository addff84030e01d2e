package etcd

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// maxDeltas is after how many changes a generation is written whole again.
const maxDeltas = 32

// keepGenerations is how many of the newest generations can be loaded.
const keepGenerations = 5

// generations knows what of the intents is on disk. A chain is a whole
// generation and the changes on top of it. Two chains are kept at least, so that
// losing the newest whole one leaves another to fall back to.
type generations struct {
	newest     int64
	wholes     []int64 // sequences of the whole ones on disk, oldest first
	broken     bool    // the newest on disk is not what is in memory
	deltas     int
	deltaBytes int
	wholeBytes int
}

type generation struct {
	sequence int64
	whole    bool
	data     []byte
}

// next gives the record that makes a change durable.
func (g *generations) next(c state.IntentChange, all map[string]*linkv1.Intent) (generation, error) {
	m := &clusterv1.IntentGeneration{Revision: c.Revision, CommitTime: timestamppb.New(c.Time), Sequence: g.newest + 1, Base: g.newest, Intents: c.Put, Removed: c.Removed}
	whole := g.broken || len(g.wholes) == 0 || g.deltas >= maxDeltas || g.deltaBytes > g.wholeBytes
	if whole {
		m.Base, m.Intents, m.Removed = 0, all, nil
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return generation{}, fmt.Errorf("marshal revision %d: %w", c.Revision, err)
	}
	return generation{sequence: m.Sequence, whole: whole, data: b}, nil
}

func (g *generations) written(w generation) {
	g.newest = w.sequence
	if !w.whole {
		g.deltas++
		g.deltaBytes += len(w.data)
		return
	}
	g.wholes = append(g.wholes, w.sequence)
	g.broken, g.deltas, g.deltaBytes, g.wholeBytes = false, 0, 0, len(w.data)
}

// oldest is the sequence from which generations are kept: the chain of the last
// of keepGenerations, and never less than two chains.
func (g *generations) oldest() int64 {
	limit := g.newest - keepGenerations + 1
	for i := len(g.wholes) - 2; i >= 0; i-- {
		if g.wholes[i] <= limit {
			return g.wholes[i]
		}
	}
	return 0
}

func (s *Store) genKey(sequence int64) string { return s.key("gen", fmt.Sprintf("%020d", sequence)) }

// dropOldGenerations deletes what is not needed any more. Failing is harmless:
// the next commit tries again.
func (s *Store) dropOldGenerations(ctx context.Context) {
	from := s.gens.oldest()
	if len(s.gens.wholes) == 0 || from <= s.gens.wholes[0] {
		return
	}
	chunk := s.key("chunk")
	err := s.txn(ctx, "drop old generations",
		clientv3.OpDelete(s.genKey(0), clientv3.WithRange(s.genKey(from))),
		clientv3.OpDelete(chunk+s.genKey(0), clientv3.WithRange(chunk+s.genKey(from))))
	if err != nil {
		s.cfg.Log.Warn("old generations of intents stay for now", "error", err)
		return
	}
	for len(s.gens.wholes) > 0 && s.gens.wholes[0] < from {
		delete(s.chunked, s.genKey(s.gens.wholes[0]))
		s.gens.wholes = s.gens.wholes[1:]
	}
}

// loadGenerations rebuilds the newest generation that can be read. A generation
// counts when it parses and, if it is a change, the one before it counts.
func (s *Store) loadGenerations(ctx context.Context, out *state.Loaded) error {
	kvs, err := s.list(ctx, s.key("gen", ""))
	if err != nil {
		return err
	}
	last := int64(0) // sequence of what out holds
	var faults []string
	for _, kv := range kvs {
		sequence := int64(0)
		if _, err := fmt.Sscanf(strings.TrimPrefix(string(kv.Key), s.key("gen", "")), "%d", &sequence); err != nil {
			return fmt.Errorf("key %q is no generation: %w", kv.Key, err)
		}
		s.gens.newest = sequence
		g, size, err := s.readGeneration(ctx, kv)
		if err == nil && g.GetBase() != 0 && g.GetBase() != last {
			err = fmt.Errorf("generation %d, which it changes, cannot be read", g.GetBase())
		}
		if err != nil {
			if len(faults) < keepGenerations {
				faults = append(faults, fmt.Sprintf("generation %d: %v", sequence, err))
			}
			continue
		}
		if g.GetBase() == 0 {
			faults = nil
		}
		mergeGeneration(g, out)
		last = sequence
		s.gens.written(generation{sequence: sequence, whole: g.GetBase() == 0, data: make([]byte, size)})
	}
	if last != s.gens.newest {
		s.gens.broken = true
		out.Degraded = strings.Join(faults, "; ")
	}
	return nil
}

func (s *Store) readGeneration(ctx context.Context, kv *mvccpb.KeyValue) (*clusterv1.IntentGeneration, int, error) {
	b, err := s.read(ctx, kv)
	if err != nil {
		return nil, 0, err
	}
	g := &clusterv1.IntentGeneration{}
	if err := proto.Unmarshal(b, g); err != nil {
		return nil, 0, fmt.Errorf("parse: %w", err)
	}
	return g, len(b), nil
}

func mergeGeneration(g *clusterv1.IntentGeneration, out *state.Loaded) {
	when := g.GetCommitTime().AsTime()
	if g.GetBase() == 0 {
		was := out.Intents
		times := out.IntentTimes
		out.Intents, out.IntentTimes = make(map[string]*linkv1.Intent, len(g.GetIntents())), make(map[string]time.Time, len(g.GetIntents()))
		for name, in := range g.GetIntents() {
			out.Intents[name], out.IntentTimes[name] = in, when
			if old, ok := was[name]; ok && proto.Equal(old, in) {
				out.IntentTimes[name] = times[name]
			}
		}
	} else {
		for name, in := range g.GetIntents() {
			out.Intents[name], out.IntentTimes[name] = in, when
		}
		for _, name := range g.GetRemoved() {
			delete(out.Intents, name)
			delete(out.IntentTimes, name)
		}
	}
	out.IntentRevision = g.GetRevision()
}

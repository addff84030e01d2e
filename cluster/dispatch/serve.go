package dispatch

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/xds/distribute"
)

// maker marshals directives, each once for all nodes and only when it changed.
// Owned by one goroutine.
type maker struct {
	made map[string]made // by name and, for what is one node's own, node
	used map[string]made // in the pass that runs
}

type made struct {
	source    proto.Message
	directive *nodev1.Directive
	resource  *distribute.Resource
}

// resource gives the resource of an item. own is the node whose alone it is, or
// "".
func (m *maker) resource(it item, own string) (*distribute.Resource, error) {
	key := it.name + "@" + own
	if u, ok := m.used[key]; ok && u.directive == it.directive {
		return u.resource, nil
	}
	old, ok := m.made[key]
	if !ok || ((it.source == nil || old.source != it.source) && !proto.Equal(old.directive, it.directive)) {
		r, err := distribute.NewResource(api.DirectiveTypeURL, it.name, it.directive)
		if err != nil {
			return nil, err
		}
		old = made{resource: r}
	}
	old.source, old.directive = it.source, it.directive
	m.used[key] = old
	return old.resource, nil
}

// nodeSet is what a node was told last.
type nodeSet struct {
	resources  []*distribute.Resource
	settled    int64
	generation int64 // at which resources changed last
	// modified is when the records of the node's allocations changed last: a change
	// that the node sees nothing of must be covered by its watermark too, because
	// the manager waits for that.
	modified int64
}

// server keeps the cache at the state. Owned by one goroutine.
type server struct {
	d     *Dispatch
	maker maker
	nodes map[string]*nodeSet
}

// Run serves until ctx ends. Streams are answered only while it runs.
func (d *Dispatch) Run(ctx context.Context) error {
	defer d.stop()
	s := &server{d: d, maker: maker{made: map[string]made{}}, nodes: map[string]*nodeSet{}}
	if !d.awaitNodes(ctx) {
		return nil
	}
	seen := int64(-1)
	for {
		if err := d.cfg.State.Wait(ctx, seen); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		snapshot := d.cfg.State.Snapshot()
		d.fence(snapshot)
		s.pass(snapshot)
		seen = snapshot.Generation
		select {
		case <-time.After(coalesce):
		case <-ctx.Done():
			return nil
		}
	}
}

// awaitNodes waits until every live node has reported, or the bound: before that
// no readiness is known, and serving would take endpoints away.
func (d *Dispatch) awaitNodes(ctx context.Context) bool {
	wait, cancel := context.WithTimeout(ctx, d.cfg.NodeTimeout)
	defer cancel()
	for {
		s := d.cfg.State.Snapshot()
		if s.Heard() {
			return true
		}
		if err := d.cfg.State.Wait(wait, s.Generation); err != nil {
			return ctx.Err() == nil
		}
	}
}

// pass takes one snapshot to the cache.
func (s *server) pass(snapshot *state.Snapshot) {
	w := newWorld(snapshot, s.d.cfg.Facts)
	s.maker.used = make(map[string]made, len(s.maker.made))
	for node := range snapshot.Nodes {
		s.node(w, node)
	}
	s.maker.made = s.maker.used
	for node := range s.nodes {
		if snapshot.Nodes[node] == nil {
			delete(s.nodes, node)
			s.d.cache.Remove(node)
		}
	}
}

// node brings one node's view up to date. A generation that changes nothing for
// the node sends nothing.
func (s *server) node(w *world, node string) {
	items := w.of(node)
	next := make([]*distribute.Resource, 0, len(items)+1)
	for _, it := range items {
		own := ""
		if it.name == "config" {
			own = node
		}
		r, err := s.maker.resource(it, own)
		if err != nil {
			s.d.log.Error("directive left out", "alarm", true, "node", node, "resource", it.name, "error", err)
			continue
		}
		next = append(next, r)
	}
	old := s.nodes[node]
	modified := int64(0)
	for _, a := range w.onNode[node] {
		modified = max(modified, w.s.Modified[a.GetAllocation()])
	}
	unchanged := old != nil && slices.Equal(old.resources, next)
	same := unchanged && modified <= old.modified
	if same && old.settled == w.s.Settled {
		return
	}
	now := &nodeSet{resources: next, settled: w.s.Settled, generation: w.s.Generation, modified: modified}
	if same {
		now.generation = old.generation
	}
	s.nodes[node] = now
	mark, err := distribute.NewResource(api.DirectiveTypeURL, api.WatermarkName, watermark(now.settled, now.generation).directive)
	if err != nil {
		s.d.log.Error("watermark not made", "node", node, "error", err)
		return
	}
	if unchanged {
		s.d.cache.Update(node, api.DirectiveTypeURL, []*distribute.Resource{mark}, nil)
		return
	}
	s.d.cache.Set(node, api.DirectiveTypeURL, append(slices.Clip(next), mark))
}

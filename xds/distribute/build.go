package distribute

import (
	"cmp"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/portolan-io/portolan/federation/api"
)

// maxResponseBytes bounds one response, so that a peer with gRPC's default
// limit of 4 MiB takes it; a single greater resource travels alone.
const maxResponseBytes = 2 << 20

// pumpAll queues an answer for each type that has something to send and may.
// Under the view's lock.
func (s *session) pumpAll() {
	if !s.attached {
		return
	}
	types := make([]*subscription, 0, maxTypes)
	for _, st := range s.types {
		if len(st.dirty) > 0 || len(st.held) > 0 || st.empty {
			types = append(types, st)
		}
	}
	slices.SortFunc(types, func(a, b *subscription) int { return s.view.compareTypes(a.typeURL, b.typeURL) })
	for _, st := range types {
		st.sort()
	}
	for _, st := range types {
		st.pump()
	}
}

// sort parts removals that must wait from what may go now.
func (st *subscription) sort() {
	after := st.sess.view.rules.RemoveAfter[st.typeURL]
	if len(after) == 0 {
		return
	}
	if st.sess.settled(after, true) {
		for name := range st.held {
			st.dirty[name] = struct{}{}
		}
		clear(st.held)
		return
	}
	t := st.sess.view.set(st.typeURL)
	for name := range st.dirty {
		if st.breaks(t, name) {
			delete(st.dirty, name)
			st.held[name] = struct{}{}
		}
	}
	for name := range st.held {
		if !st.breaks(t, name) {
			delete(st.held, name)
			st.dirty[name] = struct{}{}
		}
	}
}

// breaks says that sending name would take something away.
func (st *subscription) breaks(t *typeSet, name string) bool {
	if _, ok := st.force[name]; ok {
		return false // the consumer waits for an answer
	}
	_, present := t.res[name]
	return !present && st.known[name] != "" && t.loaded
}

// settled says that the stream has nothing open in those types.
func (s *session) settled(types []string, refusals bool) bool {
	for _, typeURL := range types {
		st := s.types[typeURL]
		if st == nil {
			continue
		}
		if len(st.dirty) > 0 || st.inflight > 0 || refusals && len(st.refused) > 0 {
			return false
		}
	}
	return true
}

func (st *subscription) pump() {
	s := st.sess
	if st.ch == nil || st.queued || st.inflight > 0 && !st.urgent {
		return
	}
	if t := s.view.types[st.typeURL]; t == nil || !t.loaded || len(st.dirty) == 0 && !st.empty {
		return
	}
	if after := s.view.rules.PutAfter[st.typeURL]; len(after) > 0 && !st.overdue && !s.settled(after, false) {
		st.wait()
		return
	}
	st.since, st.overdue = time.Time{}, false
	select {
	case st.ch <- &answer{sess: s, req: &discovery.DeltaDiscoveryRequest{TypeUrl: st.typeURL}}:
		st.queued = true
	default: // never: see maxTypes
	}
}

// wait bounds how long a type is held back by others.
func (st *subscription) wait() {
	if !st.since.IsZero() {
		return
	}
	s := st.sess
	st.since = time.Now()
	s.hold = time.AfterFunc(s.view.rules.MaxHold, func() {
		s.view.mu.Lock()
		defer s.view.mu.Unlock()
		if _, ok := s.view.sessions[s]; !ok {
			return
		}
		for _, st := range s.types {
			if !st.since.IsZero() && time.Since(st.since) >= s.view.rules.MaxHold {
				st.overdue = true
			}
		}
		s.pumpAll()
	})
}

// build fills an answer from the state of now.
func (s *session) build(typeURL string) *discovery.DeltaDiscoveryResponse {
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	st := s.types[typeURL]
	st.queued, st.urgent, st.empty = false, false, false
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
	s.building = &batch{typeURL: typeURL}
	st.sort()
	for _, c := range st.choose() {
		st.take(c, resp, s.building)
	}
	st.inflight++
	st.items += len(s.building.items)
	// More of the same type goes once this was acknowledged. Another type that
	// must follow at once is queued now, and so comes after this response.
	s.pumpAll()
	return resp
}

// candidate is one resource to send, or a removal.
type candidate struct {
	name    string
	res     *Resource // nil: removal
	seq     uint64
	suspect bool
}

// choose gives what goes into the next response, in order: removals, puts in the
// order of the set, and the watermark when nothing is left after it. A suspect
// goes alone.
func (st *subscription) choose() []candidate {
	var normal, suspects []candidate
	var watermark *candidate
	t := st.sess.view.set(st.typeURL)
	if !t.loaded {
		return nil
	}
	for name := range st.dirty {
		c, ok := st.candidate(t, name)
		switch {
		case !ok:
			delete(st.dirty, name)
			delete(st.force, name)
		case name == api.WatermarkName:
			watermark = &c
		case c.suspect:
			suspects = append(suspects, c)
		default:
			normal = append(normal, c)
		}
	}
	order := func(a, b candidate) int { return cmp.Or(cmp.Compare(a.seq, b.seq), cmp.Compare(a.name, b.name)) }
	slices.SortFunc(normal, order)
	if len(normal) == 0 && len(suspects) > 0 {
		return []candidate{slices.MinFunc(suspects, order)}
	}
	size := 0
	for i, c := range normal {
		if c.res != nil {
			size += c.res.size()
		}
		if i > 0 && size > maxResponseBytes {
			return normal[:i]
		}
	}
	if watermark != nil && len(suspects) == 0 {
		normal = append(normal, *watermark)
	}
	return normal
}

// candidate decides what is to be sent for a name; false: nothing.
func (st *subscription) candidate(t *typeSet, name string) (candidate, bool) {
	e, ok := t.res[name]
	res := e.res
	_, named := st.names[name]
	if !ok && named && st.sess.view.rules.Unknown != nil {
		res = st.sess.view.rules.Unknown(st.typeURL, name)
	}
	_, force := st.force[name]
	known := st.known[name]
	if res == nil {
		refused, ok := st.refused[name]
		if ok && refused != "" {
			delete(st.refused, name)
		}
		return candidate{name: name}, known != "" && (!ok || refused != "")
	}
	if refused, ok := st.refused[name]; ok {
		if refused == res.Version {
			// The newest was refused: a consumer that holds nothing gets what it took last.
			last := t.acked[name].res
			return candidate{name: name, res: last, seq: e.seq}, known == "" && last != nil && last.Version != refused
		}
		delete(st.refused, name)
	}
	_, suspect := st.sess.view.suspects[Key{st.typeURL, name}]
	return candidate{name: name, res: res, seq: e.seq, suspect: suspect}, force || known != res.Version
}

// take puts a candidate into the response and notes it as known.
func (st *subscription) take(c candidate, resp *discovery.DeltaDiscoveryResponse, b *batch) {
	delete(st.dirty, c.name)
	delete(st.force, c.name)
	it := item{name: c.name, prev: st.known[c.name], res: c.res}
	if c.res == nil {
		resp.RemovedResources = append(resp.RemovedResources, c.name)
		delete(st.known, c.name)
	} else {
		it.version = c.res.Version
		resp.Resources = append(resp.Resources, c.res.message())
		st.known[c.name] = c.res.Version
	}
	b.items = append(b.items, it)
	if rules := st.sess.view.rules; rules.Resend != nil && c.res != nil {
		st.sess.resend(rules.Resend(st.typeURL, c.name))
	}
}

// resend sends what the consumer forgets, without waiting for acknowledgements.
func (s *session) resend(keys []Key) {
	for _, k := range keys {
		st := s.types[k.Type]
		if st == nil || st.known[k.Name] == "" {
			continue
		}
		s.touch(k.Type, k.Name, true)
		st.urgent = true
	}
}

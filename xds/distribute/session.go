package distribute

import (
	"context"
	"errors"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Bounds of one stream.
const (
	// maxTypes on a stream. The channel of go-control-plane's handler holds two
	// answers per type it knows, ten; a subscription has at most one waiting there.
	maxTypes    = 16
	maxInflight = 256 // unacknowledged responses; a consumer beyond is cut off
)

// session is one stream: go-control-plane's view of the cache, and its
// callbacks. Its methods are called by the goroutine of the stream, except
// where the doc says "under the view's lock".
type session struct {
	srv    *Server
	stream grpc.ServerStream
	view   *view

	// Under the view's lock.
	types    map[string]*subscription
	inflight map[string]*batch // by nonce
	attached bool
	// superseded streams still get changes, but their word does not count.
	hold *time.Timer

	building *batch // between build and OnStreamDeltaResponse
}

// subscription is one type on one stream, under the view's lock.
type subscription struct {
	typeURL  string
	sess     *session
	ch       chan cache.DeltaResponse
	wildcard bool
	names    map[string]struct{}
	// known is what the consumer holds if it took all that was sent.
	known map[string]string
	// dirty names may have to be sent; force those that are sent even when known.
	dirty map[string]struct{}
	force map[string]struct{}
	// held removals wait for other types.
	held map[string]struct{}
	// refused versions are not sent again on this stream; "" is a refused removal.
	refused map[string]string

	inflight int
	items    int  // in flight
	queued   bool // an answer waits in ch
	urgent   bool // do not wait for acknowledgements
	empty    bool // the first answer is due even when there is nothing to say
	overdue  bool // waited for other types as long as allowed
	since    time.Time
}

// batch is what one response carried.
type batch struct {
	typeURL string
	items   []item
}

type item struct {
	name    string
	version string // "" for a removal
	prev    string // known before
	res     *Resource
}

func newSession(srv *Server, s grpc.ServerStream) *session {
	return &session{srv: srv, stream: s, types: map[string]*subscription{}, inflight: map[string]*batch{}}
}

// OnDeltaStreamOpen does nothing: the stream is nobody's before its first request.
func (s *session) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }

// OnDeltaStreamClosed detaches the session.
func (s *session) OnDeltaStreamClosed(int64, *corev3.Node) {
	if s.view == nil {
		return
	}
	s.view.mu.Lock()
	delete(s.view.sessions, s)
	if s.view.current == s {
		s.view.current, s.view.since = nil, time.Now()
	}
	if s.hold != nil {
		s.hold.Stop()
	}
	s.view.mu.Unlock()
	s.srv.cfg.Cache.collect(s.view)
	s.srv.cfg.Log.Info("discovery stream closed", "view", s.view.name)
	s.srv.cfg.Cache.changed(s.view.name)
}

// OnStreamDeltaRequest identifies the stream at its first request, and takes
// acknowledgements and refusals.
func (s *session) OnStreamDeltaRequest(_ int64, req *discovery.DeltaDiscoveryRequest) error {
	if s.view == nil {
		if err := s.identify(req.GetNode()); err != nil {
			return err
		}
	}
	if req.GetTypeUrl() == "" || req.GetResponseNonce() == "" {
		return nil
	}
	s.view.mu.Lock()
	changed := s.settle(req)
	s.view.mu.Unlock()
	if changed {
		s.srv.cfg.Cache.changed(s.view.name)
	}
	return nil
}

func (s *session) identify(n *corev3.Node) error {
	name, err := s.srv.cfg.Identify(s.stream.Context(), n)
	if err != nil {
		s.srv.cfg.Log.Warn("discovery stream refused", "node", n.GetId(), "error", err)
		if _, ok := status.FromError(err); ok {
			return err
		}
		return status.Error(codes.PermissionDenied, err.Error())
	}
	v := s.srv.cfg.Cache.lock(name)
	if v == nil {
		return status.Error(codes.ResourceExhausted, "too many consumers")
	}
	v.sessions[s] = struct{}{}
	v.mu.Unlock()
	s.view = v
	// The header tells the consumer that it was accepted, also when there is
	// nothing to send.
	return s.stream.SendHeader(metadata.MD{})
}

// CreateWatch is the state-of-the-world form.
func (s *session) CreateWatch(*cache.Request, cache.Subscription, chan cache.Response) (func(), error) {
	return nil, errors.New("only incremental discovery is served")
}

// CreateDeltaWatch is called after each request; the watch is the right to push
// one answer into ch.
func (s *session) CreateDeltaWatch(req *cache.DeltaRequest, sub cache.Subscription, ch chan cache.DeltaResponse) (func(), error) {
	v := s.view
	v.mu.Lock()
	if len(s.inflight) > maxInflight {
		v.mu.Unlock()
		return nil, status.Error(codes.ResourceExhausted, "too many responses without acknowledgement")
	}
	st, known := s.types[req.GetTypeUrl()]
	if !known {
		if len(s.types) >= maxTypes {
			v.mu.Unlock()
			return nil, status.Error(codes.ResourceExhausted, "too many resource types on one stream")
		}
		st = s.open(req)
	}
	if limit := s.srv.cfg.Cache.cfg.MaxResourcesPerView; len(st.names)+len(req.GetResourceNamesSubscribe()) > limit {
		v.mu.Unlock()
		return nil, status.Error(codes.ResourceExhausted, "too many names subscribed")
	}
	st.ch = ch
	st.subscribe(req, sub.IsWildcard(), !known)
	connected := !s.attached
	if connected {
		s.attached = true
		v.current, v.since = s, time.Now()
	}
	s.pumpAll()
	v.mu.Unlock()
	if connected {
		s.srv.cfg.Log.Info("discovery stream open", "view", v.name)
	}
	if connected || !known {
		s.srv.cfg.Cache.changed(v.name)
	}
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		st.ch = nil
	}, nil
}

// open begins a subscription with what the consumer says it holds. Under the
// view's lock.
func (s *session) open(req *discovery.DeltaDiscoveryRequest) *subscription {
	st := &subscription{
		typeURL: req.GetTypeUrl(), sess: s, names: map[string]struct{}{}, known: map[string]string{}, dirty: map[string]struct{}{},
		force: map[string]struct{}{}, held: map[string]struct{}{}, refused: map[string]string{},
	}
	s.types[st.typeURL] = st
	t := s.view.set(st.typeURL)
	before := t.acked
	t.acked = make(map[string]ackedEntry, len(req.GetInitialResourceVersions()))
	for name, version := range req.GetInitialResourceVersions() {
		st.known[name] = version
		a := ackedEntry{version: version}
		if e, ok := t.res[name]; ok && e.res.Version == version {
			a.res = e.res
		} else if old := before[name]; old.version == version {
			a.res = old.res
		}
		t.acked[name] = a
	}
	// What it lost but held before stays at hand, in case the newest is refused.
	for name := range s.view.suspects {
		if name.Type != st.typeURL || t.acked[name.Name].version != "" || before[name.Name].res == nil {
			continue
		}
		t.acked[name.Name] = ackedEntry{res: before[name.Name].res}
	}
	return st
}

// subscribe takes the names of a request. Under the view's lock.
func (st *subscription) subscribe(req *discovery.DeltaDiscoveryRequest, wildcard, first bool) {
	t := st.sess.view.set(st.typeURL)
	if wildcard && !st.wildcard {
		st.wildcard = true
		st.empty = len(st.known) == 0
		for name := range t.res {
			st.look(name)
		}
	}
	st.wildcard = wildcard
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" {
			continue
		}
		st.names[name] = struct{}{}
		st.urgent = true
		if !first { // the consumer may have dropped it in between
			st.force[name] = struct{}{}
		}
		st.look(name)
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		delete(st.names, name)
		if st.wildcard {
			st.force[name] = struct{}{}
			st.look(name)
			continue
		}
		st.lose(name)
		delete(t.acked, name)
	}
	if first {
		for name := range st.known {
			st.look(name)
		}
	}
}

func (st *subscription) lose(name string) {
	delete(st.known, name)
	delete(st.dirty, name)
	delete(st.force, name)
	delete(st.held, name)
	delete(st.refused, name)
}

// touch notes that a resource of the view may have changed. Under the view's lock.
func (s *session) touch(typeURL, name string, force bool) {
	st := s.types[typeURL]
	if st == nil {
		return
	}
	if _, ok := st.names[name]; !ok && !st.wildcard {
		return
	}
	if force {
		st.force[name] = struct{}{}
	}
	st.look(name)
}

// look keeps dirty exact: name is in it just when there is something to send.
// Called whenever anything changed of what candidate looks at.
func (st *subscription) look(name string) {
	t := st.sess.view.types[st.typeURL]
	if t == nil || !t.loaded {
		return // loaded looks at everything
	}
	delete(st.held, name)
	if _, ok := st.candidate(t, name); ok {
		st.dirty[name] = struct{}{}
		return
	}
	delete(st.dirty, name)
	delete(st.force, name)
}

// loaded begins to serve a type: what the consumer holds and the set does not
// is to go. Under the view's lock.
func (s *session) loaded(typeURL string, t *typeSet) {
	st := s.types[typeURL]
	if st == nil {
		return
	}
	for name := range st.known {
		st.look(name)
	}
	for name := range st.names {
		st.look(name)
	}
	for name, a := range t.acked {
		if e, ok := t.res[name]; ok && e.res.Version == a.version {
			t.acked[name] = ackedEntry{version: a.version, res: e.res}
		}
	}
}

// unloaded stops serving until the view is Set again. Under the view's lock.
func (s *session) unloaded() {
	for _, st := range s.types {
		clear(st.dirty)
		clear(st.force)
		clear(st.held)
		clear(st.refused)
	}
}

func (st *subscription) pending() int {
	return len(st.dirty) + len(st.held) + len(st.refused) + st.items
}

// OnStreamDeltaResponse learns the nonce of what was built last.
func (s *session) OnStreamDeltaResponse(_ int64, _ *discovery.DeltaDiscoveryRequest, resp *discovery.DeltaDiscoveryResponse) {
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	s.inflight[resp.GetNonce()] = s.building
	s.building = nil
}

// answer is a token in go-control-plane's channel. It is filled in when it is
// sent, so that however many changes came meanwhile travel in one response.
type answer struct {
	sess *session
	req  *discovery.DeltaDiscoveryRequest
}

func (a *answer) GetDeltaDiscoveryResponse() (*discovery.DeltaDiscoveryResponse, error) {
	return a.sess.build(a.req.GetTypeUrl()), nil
}
func (a *answer) GetDeltaRequest() *discovery.DeltaDiscoveryRequest { return a.req }
func (a *answer) GetSystemVersion() (string, error)                 { return "", nil }
func (a *answer) GetResponseVersion() string                        { return "" }

// GetNextVersionMap is go-control-plane's own bookkeeping, which is not used; it
// writes into the map.
func (a *answer) GetNextVersionMap() map[string]string { return map[string]string{} }

func (a *answer) GetReturnedResources() map[string]string { return a.GetNextVersionMap() }
func (a *answer) GetContext() context.Context             { return a.sess.stream.Context() }

var (
	_ cache.ConfigWatcher = (*session)(nil)
	_ cache.DeltaResponse = (*answer)(nil)
	_ cache.Subscription  = stream.Subscription{}
)

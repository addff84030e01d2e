package distribute

import (
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

const maxNackMessage = 2048 // bytes of a refusal that are kept

// settle takes the word of a consumer on one response. It says whether the
// view's status changed. Under the view's lock.
func (s *session) settle(req *discovery.DeltaDiscoveryRequest) bool {
	b := s.inflight[req.GetResponseNonce()]
	st := s.types[req.GetTypeUrl()]
	if b == nil || st == nil || b.typeURL != st.typeURL {
		return false
	}
	delete(s.inflight, req.GetResponseNonce())
	st.inflight--
	st.items -= len(b.items)
	if s.view.current != s {
		return false
	}
	if req.GetErrorDetail() == nil {
		delete(s.view.nacks, Key{st.typeURL, ""})
		for _, it := range b.items {
			st.accept(it)
		}
		return true
	}
	st.refuse(b, req.GetErrorDetail())
	return true
}

func (st *subscription) accept(it item) {
	v := st.sess.view
	t := v.set(st.typeURL)
	if it.version == "" {
		delete(t.acked, it.name)
	} else {
		t.acked[it.name] = ackedEntry{version: it.version, res: it.res}
	}
	if e, ok := t.res[it.name]; ok && e.res.Version != it.version {
		return // an older version: the refusal of the newest stands
	}
	delete(v.nacks, Key{st.typeURL, it.name})
	delete(v.suspects, Key{st.typeURL, it.name})
	delete(st.refused, it.name)
}

// refuse quarantines what the consumer names, alone; where it names nothing,
// each resource of the response is tried alone.
func (st *subscription) refuse(b *batch, detail *rpcstatus.Status) {
	v := st.sess.view
	named, exact := culprits(b, detail)
	st.sess.srv.cfg.Log.Warn("resource refused", "view", v.name, "type", st.typeURL, "named", len(named), "in", len(b.items), "message", clip(detail.GetMessage()))
	delete(v.nacks, Key{st.typeURL, ""}) // explained now, or written anew
	if len(named) == 0 && len(b.items) > 0 {
		v.nacks[Key{st.typeURL, ""}] = Nack{Type: st.typeURL, Message: clip(detail.GetMessage()), Time: time.Now()}
	}
	for _, it := range b.items {
		key := Key{st.typeURL, it.name}
		message, bad := named[it.name]
		if !bad && exact {
			st.accept(it)
			continue
		}
		if st.known[it.name] == it.version { // nothing newer was sent since
			st.restore(it)
		}
		if bad || len(named) == 0 {
			v.suspects[key] = struct{}{}
		}
		if bad {
			st.refused[it.name] = it.version
			v.nacks[key] = Nack{Type: st.typeURL, Name: it.name, Version: it.version, Message: clip(message), Time: time.Now()}
		}
		st.look(it.name)
	}
}

func (st *subscription) restore(it item) {
	if it.prev == "" {
		delete(st.known, it.name)
		return
	}
	st.known[it.name] = it.prev
}

// culprits gives the refused resources and why. exact: all others were taken.
//
// Portolan's consumers list them as google.rpc.BadRequest. Envoy writes
// "Error adding/updating listener(s) a: why\nb: why"; a single resource needs no
// name.
func culprits(b *batch, detail *rpcstatus.Status) (named map[string]string, exact bool) {
	named = map[string]string{}
	for _, d := range detail.GetDetails() {
		bad := &errdetails.BadRequest{}
		if d.UnmarshalTo(bad) != nil {
			continue
		}
		exact = true
		for _, f := range bad.GetFieldViolations() {
			named[f.GetField()] = f.GetDescription()
		}
	}
	if exact {
		return named, true
	}
	if len(b.items) == 1 {
		named[b.items[0].name] = detail.GetMessage()
		return named, false
	}
	for _, it := range b.items {
		if it.version != "" && mentions(detail.GetMessage(), it.name) {
			named[it.name] = detail.GetMessage()
		}
	}
	return named, false
}

// mentions says that message has name as a word followed by a colon.
func mentions(message, name string) bool {
	for rest := message; ; {
		i := strings.Index(rest, name+":")
		if i < 0 {
			return false
		}
		if i == 0 || strings.ContainsRune(" \n\t,'\"", rune(rest[i-1])) {
			return true
		}
		rest = rest[i+len(name):]
	}
}

func clip(s string) string {
	if len(s) > maxNackMessage {
		return strings.ToValidUTF8(s[:maxNackMessage], "") + "…"
	}
	return s
}

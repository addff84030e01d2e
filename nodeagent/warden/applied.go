package warden

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/xds/distribute"
)

// Pace of asking a proxy whether what it accepted is active: soon after a
// change, and ever slower while it warms.
const (
	confirmSoon  = 10 * time.Millisecond
	confirmMax   = time.Second
	adminTimeout = 2 * time.Second
)

// confirm follows one proxy: an acknowledgement means accepted, only the proxy's
// own admin says that it is active. It ends with ctx.
func (w *Warden) confirm(ctx context.Context, r *replica) {
	wait := time.Duration(0)
	for {
		var again <-chan time.Time
		if wait > 0 {
			again = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-r.poke:
			// Several changes at once are one question.
			wait = confirmSoon
			continue
		case <-again:
		}
		if w.confirmOnce(ctx, r) {
			wait = 0
			continue
		}
		wait = min(2*max(wait, confirmSoon), confirmMax)
	}
}

// confirmOnce is true when there is nothing more to find out until the next poke.
func (w *Warden) confirmOnce(ctx context.Context, r *replica) bool {
	r.mu.Lock()
	want, confirmed := r.want, r.confirmed
	r.mu.Unlock()
	st, ok := w.cache.Status(r.allocation)
	if !ok || !st.Connected {
		w.note(r, want, "", "the proxy is not connected")
		return true
	}
	switch {
	case want.digest == "":
		return true
	case len(st.Nacks) > 0:
		w.note(r, want, confirmed, "the proxy refused a resource")
		return true
	case st.Pending > 0:
		w.note(r, want, confirmed, fmt.Sprintf("%d resources are not acknowledged", st.Pending))
		return true
	}
	if confirmed == want.digest {
		w.note(r, want, confirmed, "")
		return true
	}
	ask, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	active, err := w.cfg.Active(ask, r.allocation)
	if err != nil {
		w.note(r, want, confirmed, "the proxy does not answer: "+clip(err.Error()))
		return false
	}
	if missing := inactive(want.sets, st.Acked, active); missing != "" {
		w.note(r, want, confirmed, missing)
		return false
	}
	w.note(r, want, want.digest, "")
	return true
}

// inactive names something that was acknowledged but is not active, or is active
// though it was removed; empty when all is as it should be.
func inactive(sets map[string][]*distribute.Resource, acked map[distribute.Key]string, active map[string]map[string]string) string {
	for typeURL, list := range sets {
		have, told := active[typeURL]
		if !told {
			continue // the proxy cannot tell: the acknowledgement must do
		}
		for _, x := range list {
			if _, subscribed := acked[distribute.Key{Type: typeURL, Name: x.Name}]; !subscribed {
				continue // nothing refers to it
			}
			if got := have[x.Name]; got != x.Version {
				return fmt.Sprintf("%s %s is not active yet: at %.8s, wants %.8s", shortType(typeURL), x.Name, orNone(got), x.Version)
			}
		}
		if typeURL != distribute.ListenerType && typeURL != distribute.ClusterType {
			continue
		}
		if len(have) > len(list) {
			return shortType(typeURL) + ": removed ones are still active"
		}
	}
	return ""
}

// note records what is known of the proxy, and tells the watchers of a change.
func (w *Warden) note(r *replica, want target, confirmed, detail string) {
	r.mu.Lock()
	changed := r.confirmed != confirmed || r.detail != detail
	r.confirmed, r.detail = confirmed, detail
	if confirmed != "" && confirmed == want.digest && newer(want.watermark, r.applied) {
		r.applied, changed = want.watermark, true
	}
	r.mu.Unlock()
	if changed {
		w.status.changed()
	}
}

func newer(a, b *nodev1.Watermark) bool {
	if a == nil || b == nil {
		return a != nil
	}
	return !proto.Equal(a, b)
}

func shortType(typeURL string) string {
	switch typeURL {
	case distribute.ClusterType:
		return "cluster"
	case distribute.EndpointType:
		return "endpoints"
	case distribute.ListenerType:
		return "listener"
	case distribute.RouteType:
		return "route"
	case distribute.SecretType:
		return "secret"
	default:
		return typeURL
	}
}

func orNone(version string) string {
	if version == "" {
		return "none"
	}
	return version
}

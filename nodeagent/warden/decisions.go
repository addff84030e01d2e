package warden

import (
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/policy"
)

// maxDecisions bounds the log of decisions; the oldest goes first.
const maxDecisions = 2048

// decisionLog is a ring of the newest decisions, and counters of all.
type decisionLog struct {
	mu              sync.Mutex
	ring            []*nodev1.NetworkDecision
	next            int
	allowed, denied int64
}

func (l *decisionLog) note(w *world, c call, d policy.Decision) {
	e := &nodev1.NetworkDecision{
		Time: timestamppb.New(time.Now()), Allocation: c.allocation, Source: clip(c.principal), Protocol: "tcp",
		Port: int32(c.port), Request: clip(c.request), Allowed: d.Allowed,
	}
	if c.http {
		e.Protocol = "http"
	}
	if a := w.replicas[c.allocation]; a != nil {
		e.Destination = w.identityOf(a).String()
	}
	if !d.Allowed {
		e.Reason = reasonOf(d)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if d.Allowed {
		l.allowed++
	} else {
		l.denied++
	}
	if len(l.ring) < maxDecisions {
		l.ring = append(l.ring, e)
		return
	}
	l.ring[l.next] = e
	l.next = (l.next + 1) % maxDecisions
}

func reasonOf(d policy.Decision) string {
	if len(d.Denials) == 0 {
		return "denied"
	}
	first := d.Denials[0]
	return clip(first.Rule + ": " + first.Message)
}

func clip(s string) string {
	if len(s) > 512 {
		return s[:512]
	}
	return s
}

// newest gives at most limit entries, newest first.
func (l *decisionLog) newest(limit int, allocation string) []*nodev1.NetworkDecision {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*nodev1.NetworkDecision
	for i := range l.ring {
		e := l.ring[((l.next-1-i)%len(l.ring)+len(l.ring))%len(l.ring)]
		if allocation != "" && e.GetAllocation() != allocation {
			continue
		}
		if out = append(out, e); len(out) == limit {
			break
		}
	}
	return out
}

func (l *decisionLog) counts() (allowed, denied int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.allowed, l.denied
}

package fleet

import (
	"slices"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/store"
)

// The SQL store derives a lease's end from what is left of it, so that one and
// the same row jitters from look to look. A silent cluster must be found all the
// same, and a reporting one must not.
func TestObserverSeesThroughJitter(t *testing.T) {
	now := time.Unix(1000, 0)
	o := &observer{timeout: 3 * time.Second}
	lease := func(c string, expires time.Time) store.Lease { return store.Lease{Name: LeaseOf(c), Expires: expires} }
	dead, alive := now.Add(3*time.Second), now.Add(3*time.Second)
	var found time.Duration
	for i := range 40 {
		elapsed := time.Duration(i) * 250 * time.Millisecond
		jitter := time.Duration(i*7919%40) * time.Millisecond
		if i%4 == 0 {
			alive = now.Add(elapsed + 3*time.Second)
		}
		silent := o.look(now.Add(elapsed), []string{"dead", "alive"}, []store.Lease{lease("dead", dead.Add(jitter)), lease("alive", alive.Add(-jitter))})
		if slices.Contains(silent, "alive") {
			t.Fatalf("after %s a reporting cluster counts as silent", elapsed)
		}
		if slices.Contains(silent, "dead") && found == 0 {
			found = elapsed
		}
	}
	if found < 3*time.Second || found > 4*time.Second {
		t.Errorf("silence was found after %s, want 3s to 4s", found)
	}
}

package opa

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/portolan-io/portolan/policy"
)

// A built-in that cannot be stopped: the caller is answered in time all the same,
// and the evaluation holds its slot until it ends.
func TestWhatCannotBeStoppedIsAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustCompile(t, Limits{Concurrent: 1, Deadline: 50 * time.Millisecond})
		release := make(chan struct{})
		stuck := func(topdown.Cancel) policy.Decision {
			<-release
			return policy.Decision{Allowed: true}
		}
		start := time.Now()
		d := s.bounded(t.Context(), policy.Denial{Bundle: "policyBundles/stuck"}, stuck)
		if d.Allowed || time.Since(start) != 50*time.Millisecond || d.Denials[0].Bundle != "policyBundles/stuck" {
			t.Errorf("%+v after %s", d, time.Since(start))
		}
		yes := func(topdown.Cancel) policy.Decision { return policy.Decision{Allowed: true} }
		if d := s.bounded(t.Context(), policy.Denial{}, yes); d.Allowed || !strings.Contains(d.Denials[0].Message, "too many") {
			t.Errorf("%+v", d)
		}
		close(release)
		synctest.Wait()
		if d := s.bounded(t.Context(), policy.Denial{}, yes); !d.Allowed {
			t.Errorf("the slot did not come back: %+v", d)
		}
	})
}

func TestAPanicDenies(t *testing.T) {
	s := mustCompile(t, Limits{})
	d := s.bounded(context.Background(), policy.Denial{Bundle: "policyBundles/p"}, func(topdown.Cancel) policy.Decision { panic("boom") })
	if d.Allowed || len(d.Denials) != 1 || !strings.Contains(d.Denials[0].Message, "the engine failed: boom") {
		t.Errorf("%+v", d)
	}
	if len(s.slots) != 0 {
		t.Error("the slot is lost")
	}
}

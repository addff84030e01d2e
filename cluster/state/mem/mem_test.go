package mem

import (
	"testing"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/cluster/state/statetest"
)

func TestConformance(t *testing.T) {
	statetest.Run(t, func(*testing.T) statetest.Opened {
		s := New()
		last := s
		return statetest.Opened{Store: s, Restart: func() state.Store {
			last = last.Reopen()
			return last
		}}
	})
}

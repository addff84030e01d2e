package enginetest_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/portolan-io/portolan/nodeagent/engine"
	"github.com/portolan-io/portolan/nodeagent/engine/enginetest"
)

func kit(t *testing.T) enginetest.Kit {
	f := enginetest.NewFake()
	t.Cleanup(f.Close)
	return enginetest.Kit{
		Engine: f, Image: "registry.test/suite@sha256:" + strings.Repeat("a", 64),
		Reopen: func() engine.Engine { return f },
		Crash:  func() { f.SetDown(true); f.SetDown(false) },
	}
}

func TestFake(t *testing.T) { enginetest.Run(t, kit) }

// The same in virtual time: nothing waits for the machine's clock.
func TestFakeInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := enginetest.NewFake()
		defer f.Close()
		ctx := t.Context()
		ref := "registry.test/suite@sha256:" + strings.Repeat("a", 64)
		if _, err := f.Pull(ctx, ref); err != nil {
			t.Fatal(err)
		}
		if err := f.Create(ctx, engine.Spec{ID: "a", Image: ref, Args: []string{"exit", "5", "1h"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Start(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		c, err := f.Get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		x, err := f.Wait(ctx, "a")
		if err != nil || x.Code != 5 || x.Time.Sub(c.StartedAt).Hours() != 1 {
			t.Fatalf("exit %+v, %v", x, err)
		}
	})
}

package live

import (
	"os/exec"
	"testing"
)

// 12. After down --purge the machine looks as before up.
func Test12LeavesNothing(t *testing.T) {
	if !fleet.own || *keep {
		t.Skip("missing: a fleet of the tests' own, which they may take away")
	}
	for range 2 {
		out, err := exec.CommandContext(always(t), fleet.cli, "down", "--purge", "--data-dir", fleet.dataDir, "--config", fleet.config).CombinedOutput()
		if err != nil {
			t.Fatalf("down --purge: %v\n%s", err, out)
		}
	}
	after, err := lookAtMachine()
	if err != nil {
		t.Fatal(err)
	}
	diff := func(what string, before, after []string) {
		had := map[string]bool{}
		for _, b := range before {
			had[b] = true
		}
		for _, a := range after {
			if !had[a] {
				t.Errorf("left behind: %s %s", what, a)
			}
		}
	}
	diff("link", fleet.before.Links, after.Links)
	diff("namespace", fleet.before.Namespaces, after.Namespaces)
	diff("mount", fleet.before.Mounts, after.Mounts)
	diff("process", fleet.before.Processes, after.Processes)
	diff("nftables table", fleet.before.Tables, after.Tables)
	diff("cgroup", fleet.before.Cgroups, after.Cgroups)
	diff("route", fleet.before.Routes, after.Routes)
}

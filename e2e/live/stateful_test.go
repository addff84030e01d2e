package live

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const image = "registry.portolan.internal:7500/shop/"

// keeper is a stateful workload in eu-west that notes each of its starts in a
// volume.
func keeper(revision, tag string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: keeper
spec:
  kind: stateful
  replicas: 2
  revision: %s
  volumes: [{name: data, size: 16Mi}]
  containers:
  - image: %scatalog:%s
    command: [/shop, keeper]
    requests: {cpu: 50m}
    limits: {cpu: 200m, memory: 32Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
    mounts: [{volume: data, path: /data}]
  placement: {allowed_clusters: [eu-west]}
`, revision, image, tag)
}

// volume is where a replica's data lies on this machine.
func volume(node, replica string) string {
	return filepath.Join(fleet.dataDir, "nodes", node, "volumes", "shop."+replica+".data")
}

// starts reads what a replica noted, from the node's disk.
func starts(node, replica string) []string {
	b, err := os.ReadFile(filepath.Join(volume(node, replica), "starts"))
	if err != nil {
		return []string{err.Error()}
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// keepers waits until both replicas are ready and gives them by name.
func keepers(t *testing.T, limit time.Duration, revision string) (map[string]*portolanv1.Replica, time.Duration) {
	t.Helper()
	out := map[string]*portolanv1.Replica{}
	took := eventually(t, limit, "keeper of "+revision, func() error {
		clear(out)
		rs, err := listReplicas(always(t), "keeper")
		if err != nil {
			return err
		}
		for _, r := range rs {
			if !r.GetReady() || r.GetRevision() != revision {
				return fmt.Errorf("%s of %s is %s (%s)", last(r.GetName()), r.GetRevision(), r.GetState(), r.GetReason().GetMessage())
			}
			// The ID is the name and some characters of its owner: keeper-0-k3f9.
			id := last(r.GetName())
			out[id[:strings.LastIndexByte(id, '-')]] = r
		}
		if len(out) != 2 {
			return fmt.Errorf("%d replicas", len(out))
		}
		return nil
	})
	return out, took
}

// A stateful workload keeps its names and its data over a restart, a crash of the
// agent, and an update; its volumes go with it.
func TestStateful(t *testing.T) {
	settle(t)
	apply(t, keeper("v1", "v1"))
	t.Cleanup(func() {
		if _, _, err := run(t, "", "delete", "workload", "keeper", "-t", "shop"); err == nil {
			settle(t)
		}
	})
	before, up := keepers(t, 60*time.Second, "v1")
	nodes := map[string]string{}
	for _, name := range []string{"keeper-0", "keeper-1"} {
		r := before[name]
		if r == nil {
			t.Fatalf("there is no %s: %v", name, before)
		}
		nodes[name] = r.GetNode()
		if got := starts(r.GetNode(), name); !slices.Equal(got, []string{name + " v1"}) {
			t.Errorf("the volume of %s says %q", name, got)
		}
		if got := inReplica(t, r, "GET", "/starts"); !strings.Contains(got, name+" v1") {
			t.Errorf("inside %s: %s", name, got)
		}
		fi, err := os.Stat(volume(r.GetNode(), name))
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); fi.Mode().Perm() != 0o770 || st.Uid == 0 {
			t.Errorf("the volume of %s has mode %v and belongs to %d", name, fi.Mode(), st.Uid)
		}
	}
	t.Logf("applied → both ready %s, on %v", up.Round(time.Millisecond), nodes)

	// The agent crashes: the containers go on, on their volumes.
	local(t, "kill", nodes["keeper-0"]+"/agent")
	after, _ := keepers(t, 60*time.Second, "v1")
	if after["keeper-0"].GetName() != before["keeper-0"].GetName() {
		t.Errorf("keeper-0 was %s and is %s", before["keeper-0"].GetName(), after["keeper-0"].GetName())
	}
	if a, b := after["keeper-0"].GetContainers()[0].GetPid(), before["keeper-0"].GetContainers()[0].GetPid(); a != b {
		t.Errorf("after a crash of the agent keeper-0 has pid %d, had %d", a, b)
	}

	// The container is killed: it comes back to its data.
	pid := before["keeper-0"].GetContainers()[0].GetPid()
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	back := eventually(t, 60*time.Second, "keeper-0 starts again", func() error {
		if got := starts(nodes["keeper-0"], "keeper-0"); !slices.Equal(got, []string{"keeper-0 v1", "keeper-0 v1"}) {
			return fmt.Errorf("its volume says %q", got)
		}
		return nil
	})
	t.Logf("kill -9 → started again on its data %s (first backoff is 10s)", back.Round(time.Millisecond))
	keepers(t, 60*time.Second, "v1")

	// Another revision: names, nodes and data stay.
	apply(t, keeper("v2", "v2"))
	updated, took := keepers(t, 120*time.Second, "v2")
	for name, node := range nodes {
		got := starts(node, name)
		if updated[name].GetNode() != node || got[0] != name+" v1" || got[len(got)-1] != name+" v2" {
			t.Errorf("%s is on %s (was on %s); its volume says %q", name, updated[name].GetNode(), node, got)
		}
	}
	t.Logf("updated one by one in %s", took.Round(time.Millisecond))

	cli(t, "delete", "workload", "keeper", "-t", "shop")
	gone := eventually(t, 60*time.Second, "the volumes go with the workload", func() error {
		for name, node := range nodes {
			if _, err := os.Stat(volume(node, name)); !os.IsNotExist(err) {
				return fmt.Errorf("the volume of %s is on %s: %v", name, node, err)
			}
		}
		return nil
	})
	t.Logf("deleted → volumes gone %s", gone.Round(time.Millisecond))
}

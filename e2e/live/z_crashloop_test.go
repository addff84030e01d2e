package live

import (
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// crasher ends at once, whenever it is started. It is a tenant's of its own, so
// that the shop's tests need not know of it, and in us-east, where no test takes
// its node away.
const crasher = `
{kind: Tenant, name: lab, spec: {}}
---
kind: Workload
tenant: lab
name: looper
spec:
  containers:
  - image: registry.portolan.internal:7500/shop/web:v1
    command: [/shop, nothing]
    requests: {cpu: 50m}
    limits: {cpu: 100m, memory: 32Mi}
  placement: {allowed_regions: [us-east]}
`

// startCrasher applies it before the tests: five exits in a row take two and a half
// minutes of backoff, which pass while they run.
func startCrasher() (end func()) {
	call := func(args ...string) {
		cmd := exec.Command(fleet.cli, append([]string{"--config", fleet.config}, args...)...)
		cmd.Stdin = strings.NewReader(crasher)
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Printf("%v: %v\n%s", args, err, out)
		}
	}
	call("apply", "-f", "-")
	return sync.OnceFunc(func() { call("delete", "-f", "-") })
}

// 6, the crash loop: after five exits in a row it is called by its name, in an
// event and in describe, and the next start is 160 s after the exit.
func Test06CrashLoopBackOff(t *testing.T) {
	// What never gets ready would keep a later start waiting.
	t.Cleanup(fleet.endCrasher)
	var r *portolanv1.Replica
	took := eventually(t, 4*time.Minute, "the crash loop is called by its name", func() error {
		resp, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListReplicas(always(t), &portolanv1.ListReplicasRequest{Parent: "tenants/lab/workloads/looper"})
		if err != nil || len(resp.GetReplicas()) != 1 {
			return fmt.Errorf("%v %v", resp, err)
		}
		if r = resp.GetReplicas()[0]; r.GetReason().GetCode() != "CrashLoopBackOff" || r.GetState() != portolanv1.ReplicaState_REPLICA_STATE_BACKOFF {
			return fmt.Errorf("%s is %s: %v", r.GetName(), r.GetState(), r.GetReason())
		}
		return nil
	})
	c := r.GetContainers()[0]
	next := c.GetNextStartTime().AsTime().Sub(c.GetLastExitTime().AsTime())
	t.Logf("CrashLoopBackOff seen after %s more, %d restarts; next start %s after the exit", took.Round(time.Second), c.GetRestarts(), next.Round(time.Second))
	if c.GetRestarts() < 4 {
		t.Errorf("%d restarts are no loop yet", c.GetRestarts())
	}
	if want := min(10*time.Second<<c.GetRestarts(), 5*time.Minute); next < want-time.Second || next > want+time.Second {
		t.Errorf("backoff %s, want %s", next, want)
	}
	hasEvents(t, r.GetName(), "Error", "CrashLoopBackOff")
	if out := cli(t, "describe", "replica", last(r.GetName()), "-t", "lab"); !strings.Contains(out, "CrashLoopBackOff") {
		t.Errorf("describe does not name the loop:\n%s", out)
	}
}

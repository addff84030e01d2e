package live

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// batchOf is a job, or a cron workload, whose replicas work for two seconds.
func batchOf(name, kind, code, more string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: %s
spec:
  kind: %s
  containers:
  - image: %sweb:v1
    command: [/shop, batch, 2s, "%s"]
    requests: {cpu: 20m}
    limits: {cpu: 100m, memory: 32Mi}
%s
  placement: {allowed_clusters: [us-east]}
`, name, kind, image, code, more)
}

// eventsOf gives the messages of events of a type on a workload of the shop and its
// replicas.
func eventsOf(ctx context.Context, workload, typ string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := portolanv1.NewRuntimeServiceClient(fleet.conn).ListEvents(ctx, &portolanv1.ListEventsRequest{Parent: "tenants/shop/workloads/" + workload, Limit: 5000})
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range r.GetEvents() {
		if e.GetType() == typ {
			out = append(out, e.GetMessage())
		}
	}
	return out, nil
}

// ended waits until that many replicas have ended, and says how.
func ended(t *testing.T, limit time.Duration, workload string, n int) ([]string, time.Duration) {
	t.Helper()
	var got []string
	took := eventually(t, limit, fmt.Sprintf("%d replicas of %s have ended", n, workload), func() error {
		var err error
		if got, err = eventsOf(always(t), workload, "Finished"); err != nil {
			return err
		}
		if len(got) < n {
			return fmt.Errorf("events Finished: %q", got)
		}
		return nil
	})
	return got, took
}

// condition waits until a workload has a condition.
func condition(t *testing.T, limit time.Duration, workload, typ string) time.Duration {
	t.Helper()
	return eventually(t, limit, workload+" is "+typ, func() error {
		w, err := getWorkload(always(t), workload)
		if err != nil {
			return err
		}
		for _, c := range w.GetStatus().GetConditions() {
			if c.GetType() == typ && c.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE {
				return nil
			}
		}
		return fmt.Errorf("%v", w.GetStatus().GetConditions())
	})
}

// A job finishes, one that fails says so, and a cron workload runs at its minutes.
func TestJobsAndCron(t *testing.T) {
	settle(t)
	for name, yaml := range map[string]string{
		"count":  batchOf("count", "job", "0", "  job: {completions: 3, parallelism: 2}"),
		"broken": batchOf("broken", "job", "3", "  job: {max_retries: 0}"),
		"minute": batchOf("minute", "cron", "0", `  cron: {schedule: "* * * * *"}`),
	} {
		apply(t, yaml)
		t.Cleanup(func() { cli(t, "delete", "workload", name, "-t", "shop") })
	}
	took := condition(t, 90*time.Second, "count", "Complete")
	got, _ := ended(t, time.Second, "count", 3)
	for _, how := range got {
		if how != "succeeded" {
			t.Errorf("replicas of count ended: %q", got)
		}
	}
	t.Logf("job of three, two at a time: complete after %s", took.Round(time.Millisecond))
	condition(t, 60*time.Second, "broken", "Failed")
	if got, _ := ended(t, 10*time.Second, "broken", 1); got[0] != "failed" {
		t.Errorf("broken ended: %q", got)
	}
	runs, took := ended(t, 150*time.Second, "minute", 2)
	for _, how := range runs {
		if how != "succeeded" {
			t.Errorf("runs ended: %q", runs)
		}
	}
	began, err := eventsOf(always(t), "minute", "RunBegan")
	if err != nil || len(began) < 2 {
		t.Errorf("events RunBegan: %q, %v", began, err)
	}
	t.Logf("cron: two runs have ended after another %s", took.Round(time.Second))
}

package live

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// catalogOf is the catalog's manifest with another revision and more of the spec.
func catalogOf(revision, container, update string) string {
	return fmt.Sprintf(`
kind: Workload
tenant: shop
name: catalog
spec:
  replicas: 4
  revision: %s
  containers:
  - %s
    requests: {cpu: 50m}
    limits: {cpu: 500m, memory: 64Mi}
    readiness: {http: {path: /healthz, port: 8080}, period: 1s}
    liveness: {http: {path: /livez, port: 8080}, period: 1s}
  placement: {failover: {after: 3s}}
  update: %s
`, revision, container, update)
}

const (
	goodV1 = "image: registry.portolan.internal:7500/shop/catalog:v1"
	goodV2 = "image: registry.portolan.internal:7500/shop/catalog:v2"
	// badV3 ends as soon as it begins.
	badV3 = "image: registry.portolan.internal:7500/shop/catalog:v2\n    command: [/shop, nothing]"
)

func getWorkload(ctx context.Context, id string) (*portolanv1.Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return portolanv1.NewWorkloadServiceClient(fleet.conn).GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: "tenants/shop/workloads/" + id})
}

// rolloutIs waits until the rollout of the catalog is in a state.
func rolloutIs(t *testing.T, limit time.Duration, target string, state portolanv1.RolloutState) (*portolanv1.RolloutStatus, time.Duration) {
	t.Helper()
	var st *portolanv1.RolloutStatus
	took := eventually(t, limit, "rollout "+state.String(), func() error {
		w, err := getWorkload(always(t), "catalog")
		if err != nil {
			return err
		}
		if st = w.GetStatus().GetRollout(); st.GetTarget() != target || st.GetState() != state {
			return fmt.Errorf("%v", st)
		}
		return nil
	})
	return st, took
}

// restoreCatalog puts the sample's own catalog back.
func restoreCatalog(t *testing.T) {
	t.Helper()
	if out, err := exec.Command(fleet.cli, "apply", "-f", "../storefront/manifests/30-catalog.yaml", "--config", fleet.config).CombinedOutput(); err != nil {
		t.Errorf("back to the sample's catalog: %v %s", err, out)
	}
	settle(t)
}

// waitLoad waits until n more requests were answered.
func waitLoad(t *testing.T, l *load, n int) {
	t.Helper()
	total, _ := l.sample()
	eventually(t, 30*time.Second, "load", func() error {
		if now, _ := l.sample(); now < total+n {
			return fmt.Errorf("%d more requests", now-total)
		}
		return nil
	})
}

// A rolling update loses no request; a bad version is halted in its cluster and
// taken back by the federation, and the good replicas never stop.
func Test13RollbackOfABadVersion(t *testing.T) {
	settle(t)
	t.Cleanup(func() { restoreCatalog(t) })
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 100)
	waitLoad(t, l, 100)
	began := time.Now()
	apply(t, catalogOf("v2", goodV2, "{max_surge: 1, max_unavailable: 0}"))
	_, took := rolloutIs(t, 90*time.Second, "v2", portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE)
	total, failed := l.sample()
	t.Logf("rolling update v1 → v2 complete after %s: %d requests, %d failed", took.Round(time.Millisecond), total, failed)

	before := map[string]int32{}
	for _, r := range ready(replicas(t, "catalog")) {
		before[r.GetName()] = r.GetContainers()[0].GetPid()
	}
	if len(before) != 4 {
		t.Fatalf("%d replicas are ready before the bad version, want 4", len(before))
	}
	apply(t, catalogOf("v3", badV3, "{max_surge: 2, max_unavailable: 0, max_failures: 1}"))
	st, took := rolloutIs(t, 90*time.Second, "v3", portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK)
	t.Logf("bad version applied → halted and taken back after %s: %s", took.Round(time.Millisecond), st.GetReason().GetMessage())
	eventually(t, 60*time.Second, "only v2 again", func() error {
		rs, err := listReplicas(always(t), "catalog")
		if err != nil {
			return err
		}
		if len(rs) != 4 {
			return fmt.Errorf("%d replicas", len(rs))
		}
		for _, r := range rs {
			if r.GetRevision() != "v2" || !r.GetReady() {
				return fmt.Errorf("%s is %s, %v", last(r.GetName()), r.GetRevision(), r.GetState())
			}
			if before[r.GetName()] != r.GetContainers()[0].GetPid() {
				return fmt.Errorf("%s was not there before, or was restarted", last(r.GetName()))
			}
		}
		return nil
	})
	total, failed = l.Stop()
	t.Logf("%s under load: %d requests, %d failed", time.Since(began).Round(time.Second), total, failed)
	if failed > 0 {
		t.Errorf("%d requests failed: %s", failed, l.first)
	}
	if out := cli(t, "describe", "workload", "catalog", "-t", "shop"); !strings.Contains(out, "rolled-back") || !strings.Contains(out, "v3") {
		t.Errorf("describe does not tell of the rollback:\n%s", out)
	}
}

// Blue-green: the new version comes up whole and gets no request until the
// switch; the switch and the way back are immediate and lose none.
func Test14BlueGreen(t *testing.T) {
	settle(t)
	t.Cleanup(func() { restoreCatalog(t) })
	const keep = "keep_old: 120s"
	apply(t, catalogOf("v1", goodV1, "{type: UPDATE_TYPE_BLUE_GREEN, blue_green: {"+keep+"}}"))
	rolloutIs(t, 60*time.Second, "v1", portolanv1.RolloutState_ROLLOUT_STATE_COMPLETE)
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 100)
	waitLoad(t, l, 100)
	apply(t, catalogOf("v2", goodV2, "{type: UPDATE_TYPE_BLUE_GREEN, blue_green: {"+keep+"}}"))
	_, took := rolloutIs(t, 90*time.Second, "v2", portolanv1.RolloutState_ROLLOUT_STATE_WAITING)
	waitLoad(t, l, 200)
	t.Logf("v2 whole beside v1 after %s", took.Round(time.Millisecond))
	if got := versions(l); got["v2"] > 0 {
		t.Errorf("v2 got %d requests before the switch", got["v2"])
	}
	if n := len(ready(replicas(t, "catalog"))); n != 8 {
		t.Errorf("%d replicas are ready, want 4 of each", n)
	}
	for _, to := range []string{"v2", "v1", "v2"} {
		at := time.Now()
		apply(t, catalogOf("v2", goodV2, "{type: UPDATE_TYPE_BLUE_GREEN, blue_green: {active: "+to+", "+keep+"}}"))
		cli(t, "wait")
		live := time.Since(at)
		if err := serves(t, to); err != nil {
			t.Errorf("after the switch to %s is live: %v", to, err)
		}
		t.Logf("switch to %s live everywhere after %s", to, live.Round(time.Millisecond))
	}
	total, failed := l.Stop()
	t.Logf("%d requests over three switches, %d failed", total, failed)
	if failed > 0 {
		t.Errorf("%d requests failed: %s", failed, l.first)
	}
}

// versions counts answers by the version that gave them.
func versions(l *load) map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]int{}
	for k, n := range l.seen {
		_, v, _ := strings.Cut(k, "/")
		out[v] += n
	}
	return out
}

// serves says whether only one version answers, at every ingress.
func serves(t *testing.T, version string) error {
	t.Helper()
	var errs []error
	for _, addrs := range ingressOf {
		for _, addr := range addrs {
			hc := hop(addr, true)
			for range 25 {
				a, err := call(always(t), hc, http.MethodGet, "/api/items")
				if got := a.header.Get("X-Upstream-Version"); err != nil || got != version {
					errs = append(errs, fmt.Errorf("%s answered %d with version %q, %w", addr, a.code, got, errors.Join(err)))
				}
			}
		}
	}
	return errors.Join(errs...)
}

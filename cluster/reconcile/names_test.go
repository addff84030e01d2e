package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// IDs of stateful replicas are of one tenant and one workload, valid, and stay.
func TestStatefulNames(t *testing.T) {
	seen := map[string]string{}
	for _, tenant := range []string{"red", "blue"} {
		for _, name := range []string{"db", strings.Repeat("a", 26) + "-" + strings.Repeat("b", 13)} {
			for _, uid := range []string{"u1", "u2"} {
				for _, index := range []int32{0, 11, 1234} {
					id := statefulName(Key{tenant, name}, uid, index)
					if _, err := api.ParseID(id); err != nil {
						t.Errorf("%s/%s: %v", tenant, name, err)
					}
					if again := statefulName(Key{tenant, name}, uid, index); again != id {
						t.Errorf("%s and %s are of one replica", id, again)
					}
					whose := fmt.Sprint(tenant, name, uid, index)
					if other, taken := seen[id]; taken {
						t.Errorf("%s is of %s and %s", id, other, whose)
					}
					seen[id] = whose
				}
			}
		}
	}
}

// Two tenants have a stateful workload of one name in one cluster, and one has
// another one of it later.
func TestStatefulTenants(t *testing.T) {
	w := newWorld()
	w.addNode("n1")
	want := func(tenant, uid string, epoch int64) {
		w.want(Key{tenant, "db"}, &linkv1.WorkloadIntent{Tenant: tenant, Workload: "db", Uid: uid, Epoch: epoch, CurrentRevision: "r1", Revisions: []*linkv1.RevisionIntent{{
			Revision: "r1", Replicas: 2, Spec: &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_STATEFUL},
		}}})
	}
	check := func(n int) {
		t.Helper()
		w.roll()
		hosts := map[string]string{}
		for id, a := range w.allocs {
			host := fmt.Sprintf("%s/%s-%d", a.GetTenant(), a.GetWorkload(), a.GetIndex())
			if hosts[host] != "" {
				t.Errorf("%s and %s are both %s", id, hosts[host], host)
			}
			hosts[host] = id
		}
		if len(hosts) != n {
			t.Errorf("there are %v, %d are wanted", hosts, n)
		}
	}
	want("red", "u1", 1)
	want("blue", "u2", 2)
	check(4)
	want("red", "u3", 3)
	for range 4 { // while the earlier one goes
		p := Reconcile(w.input())
		old := statefulName(Key{"red", "db"}, "u1", 0)
		leaves := slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Kind == Remove && s.Allocation == old })
		for _, s := range p.Steps {
			if s.Kind == Create && s.Index == 0 && w.allocs[old] != nil && !leaves {
				t.Fatal("a second red/db-0 begins")
			}
		}
		w.apply(p)
		w.settle()
	}
	check(4)
}

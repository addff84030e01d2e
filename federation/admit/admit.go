// Package admit decides whether an object may be stored: defaults first, then
// validation against a closed snapshot of what it refers to, then what still
// refers to it. Policy in Rego is asked by federation/server after that, with
// the object that this package completed.
//
// It is pure: no clock, no randomness, no I/O, no goroutines, no logging. It
// never resolves images and never reads a store; the caller gathers the
// snapshot. Safe for concurrent use, as it holds nothing.
package admit

import (
	"fmt"
	"sort"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// Snapshot is what a decision may look at, all of one revision of the store.
// Maps are by ID and hold objects of the tenant of the object that is decided,
// unless said otherwise. Nil maps are empty.
type Snapshot struct {
	// Fleet is the trust domain of the fleet.
	Fleet string
	// Tenant owns the object; nil for the fleet's own objects, or when it is absent.
	Tenant    *portolanv1.Tenant
	Workloads map[string]*portolanv1.Workload
	// Revisions by workload, then by revision: their templates.
	Revisions map[string]map[string]*portolanv1.WorkloadSpec
	Services  map[string]*portolanv1.Service
	Routes    map[string]*portolanv1.Route
	// Hosts maps ingress host names of the whole fleet to the name of the route that
	// has them.
	Hosts map[string]string
	// Tenants of the fleet; only gathered for role bindings.
	Tenants map[string]bool
	// RoleBindings of the fleet; only gathered for role bindings and tenants.
	RoleBindings []*portolanv1.RoleBinding
	// Others are names of objects that refer to the object and are no workload,
	// service, route or role binding: policy bundles of a tenant, placements in a cluster.
	Others []string
}

// Object is what this package decides on: one of the messages of portolan.v1
// that users write.
type Object interface {
	proto.Message
	GetName() string
	GetLabels() map[string]string
}

// Input is one decision.
type Input struct {
	// Object is the object as it would be stored, after Defaults.
	Object Object
	// Old is the stored object; nil when there is none.
	Old Object
	// Snapshot of what is around it.
	Snapshot *Snapshot
}

// Defaults fills in what the user left out. It changes obj.
func Defaults(obj Object, snap *Snapshot) {
	switch o := obj.(type) {
	case *portolanv1.Workload:
		defaultWorkload(o)
	case *portolanv1.Service:
		defaultService(o)
	case *portolanv1.Route:
		defaultRoute(o, snap)
	}
}

// Validate says what is wrong with the object in itself and in what it refers
// to. Such a request can never succeed as it is, as long as the snapshot stays.
func Validate(in Input) []api.Violation {
	c := &checker{snap: in.Snapshot}
	if in.Snapshot == nil {
		c.snap = &Snapshot{}
	}
	c.object(in.Object)
	switch o := in.Object.(type) {
	case *portolanv1.Tenant:
		c.tenant(o)
	case *portolanv1.Cluster:
		c.cluster(o)
	case *portolanv1.RoleBinding:
		c.roleBinding(o)
	case *portolanv1.Workload:
		c.workload(o)
	case *portolanv1.Service:
		c.service(o)
	case *portolanv1.Route:
		c.route(o)
	case *portolanv1.PolicyBundle:
		c.policyBundle(o)
	default:
		c.add("", "objects of this kind cannot be written")
	}
	return c.out
}

// checker gathers violations.
type checker struct {
	snap *Snapshot
	out  []api.Violation
}

func (c *checker) add(field, format string, args ...any) {
	c.out = append(c.out, api.Violation{Field: field, Message: fmt.Sprintf(format, args...)})
}

// object checks what all kinds have in common.
func (c *checker) object(o Object) {
	if n := proto.Size(o); n > api.MaxObjectBytes {
		c.add("", "the object has %d bytes; at most %d are stored", n, api.MaxObjectBytes)
	}
	c.labels("labels", o.GetLabels(), api.MaxLabels)
	if t := api.TenantOf(o.GetName()); t != "" {
		if _, isTenant := o.(*portolanv1.Tenant); !isTenant && c.snap.Tenant == nil {
			c.add("name", "tenant %q does not exist", t)
		}
	}
}

// id gives the last segment of a name.
func id(o Object) string {
	name := o.GetName()
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			return name[i+1:]
		}
	}
	return name
}

// keys gives the keys of a map in order, so that outputs are a function of inputs.
func keys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

package reconcile

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// restarts says of every field of a WorkloadSpec whether a replica must begin anew
// when it changes. The others are read by the loops and not by the replica.
var restarts = map[protoreflect.Name]bool{
	"kind": true, "containers": true, "init_containers": true, "gateway": true, "volumes": true,
	// A running replica takes a new grace period over.
	"grace_period": false,
	"replicas":     false, "revision": false, "placement": false, "update": false, "job": false, "cron": false, "autoscale": false,
	"disruption": false, "priority": false, "never_preempt": false,
	// Where it may run concerns the next bind, and what no longer fits is moved. Its
	// devices are its own: see needsRestart.
	"scheduling": false,
}

// needsRestart compares the specs of a replica and of a revision.
func needsRestart(have, want *portolanv1.WorkloadSpec) bool {
	if have == want {
		return false
	}
	a, b := have.ProtoReflect(), want.ProtoReflect()
	fields := a.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if restarts[f.Name()] && (a.Has(f) != b.Has(f) || (a.Has(f) && !a.Get(f).Equal(b.Get(f)))) {
			return true
		}
	}
	return !slices.EqualFunc(have.GetScheduling().GetDevices(), want.GetScheduling().GetDevices(), func(a, b *portolanv1.DeviceRequest) bool { return proto.Equal(a, b) })
}

// changed says that the revision of an allocation has another template now: an
// override for this cluster did.
func (d desired) changed(a *clusterv1.Allocation) bool {
	for _, want := range d.revisions {
		if want.GetRevision() == a.GetRevision() {
			return needsRestart(a.GetSpec(), want.GetSpec())
		}
	}
	return false
}

// takeOver gives replicas what they can take over while they run: the newer spec
// of their revision, and the name and spec of the current one when theirs goes.
// The runs of a cron workload go on as they began.
func (p *planner) takeOver(k Key, w Workload, d desired, rs []*replica) {
	if d.kind == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
		return
	}
	for _, r := range rs {
		if !r.active() || !r.mine || r.outdated {
			continue
		}
		want := d.takes(r)
		if want == nil || (want.GetRevision() == r.GetRevision() && (r.GetSpec() == want.GetSpec() || proto.Equal(r.GetSpec(), want.GetSpec()))) {
			continue
		}
		p.step(Step{
			Kind: Update, Key: k, Code: NoRestartNeeded, Reason: fmt.Sprintf("it takes revision %s over while it runs", want.GetRevision()),
			Allocation: r.GetAllocation(), Workload: w, Revision: want,
		})
		up := standIn(r.Allocation)
		up.Revision, up.Spec = want.GetRevision(), want.GetSpec()
		r.Allocation = up
	}
}

// takes is the revision that a replica follows without a restart; nil when there
// is none.
func (d desired) takes(r *replica) *linkv1.RevisionIntent {
	for _, want := range d.revisions {
		if want.GetRevision() == r.GetRevision() {
			return want
		}
	}
	if d.frozen || needsRestart(r.GetSpec(), d.current.GetSpec()) {
		return nil
	}
	return d.current
}

package place

import (
	"maps"
	"slices"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// awayTier comes after every group of the fallbacks: what is to leave.
const awayTier = 63

// fault is a constraint that a cluster does not meet; explain makes sentences and
// remedies of it.
type fault struct {
	code       string
	key, value string
	// have is what is there instead; absent says that nothing is.
	have   string
	absent bool
	at     time.Time
}

func (x *cell) bar(f fault) {
	x.barred = true
	x.faults = append(x.faults, f)
}

func (x *cell) close(f fault) {
	x.closed = true
	x.faults = append(x.faults, f)
}

// selector is the wanted labels in order.
func (d *decision) selector() []string {
	if len(d.plain.GetClusterSelector()) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(d.plain.GetClusterSelector()))
}

// judge holds a cluster against every hard constraint, and notes all that fail,
// so that explain can name each.
func (d *decision) judge(x *cell, want []string) {
	region := x.Spec.GetRegion()
	if r := d.w.Residency; len(r) > 0 && !slices.Contains(r, region) {
		x.bar(fault{code: Residency, key: region})
	}
	if r := d.plain.GetAllowedRegions(); len(r) > 0 && !slices.Contains(r, region) {
		x.bar(fault{code: NotAllowed, key: region})
	}
	if slices.Contains(d.plain.GetForbiddenRegions(), region) {
		x.bar(fault{code: Forbidden, key: region})
	}
	if c := d.plain.GetAllowedClusters(); len(c) > 0 && !slices.Contains(c, x.ID) {
		x.bar(fault{code: ClusterNotAllowed, key: x.ID})
	}
	if slices.Contains(d.plain.GetForbiddenClusters(), x.ID) {
		x.bar(fault{code: ClusterForbidden, key: x.ID})
	}
	for _, k := range want {
		if have, ok := x.Labels[k]; !ok || have != d.plain.GetClusterSelector()[k] {
			x.bar(fault{code: Selector, key: k, value: d.plain.GetClusterSelector()[k], have: have, absent: !ok})
		}
	}
	d.judgeTaints(x)
	d.judgeOrder(x)
	d.judgeDevices(x)
	d.judgeNear(x)
	d.judgeState(x)
}

func (d *decision) judgeTaints(x *cell) {
	for _, t := range x.Spec.GetTaints() {
		ok, stay := tolerated(t, d.plain.GetTolerations())
		f := fault{code: Taint, key: t.GetKey(), value: t.GetValue()}
		switch {
		case ok && stay == nil:
		case ok:
			f.at = x.Changed.Add(*stay)
			if !f.at.After(d.now) {
				x.bar(f)
				continue
			}
			f.code = Staying
			x.close(f)
			if x.Previous.Present {
				d.sooner(f.at)
			}
		case t.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE:
			x.soft++
			f.code = SoftTaint
			x.faults = append(x.faults, f)
		case t.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE && !plant.keepsUnderNoExecute:
			f.have = "NO_EXECUTE"
			x.bar(f)
		default:
			x.close(f)
		}
	}
}

// tolerated says whether a taint is, and of NO_EXECUTE for how long; nil is for
// ever. The most patient toleration counts.
func tolerated(t *portolanv1.Taint, list []*portolanv1.Toleration) (ok bool, stay *time.Duration) {
	for _, tol := range list {
		if tol.GetKey() != t.GetKey() || tol.GetValue() != "" && tol.GetValue() != t.GetValue() ||
			tol.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED && tol.GetEffect() != t.GetEffect() {
			continue
		}
		if tol.GetStay() == nil || t.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE {
			return true, nil
		}
		if s := tol.GetStay().AsDuration(); stay == nil || s > *stay {
			ok, stay = true, &s
		}
	}
	return ok, stay
}

// judgeOrder finds the cluster's place in the order of fallbacks, and its weight.
func (d *decision) judgeOrder(x *cell) {
	if groups := d.plain.GetFallbacks(); len(groups) > 0 {
		x.tier = slices.IndexFunc(groups, func(g *portolanv1.WorkloadSpec_ClusterGroup) bool {
			return matches(g.GetMatch(), x.ID, x.Spec, x.Labels)
		})
		if x.tier < 0 {
			x.tier = 0
			x.bar(fault{code: NoGroup})
		}
	}
	if d.order == byWeight {
		if x.weight = d.weightOf(x.Cluster); x.weight == 0 {
			x.bar(fault{code: NoWeight})
		}
	}
}

// judgeDevices: a cluster that has too few fitting devices for one replica takes
// none.
func (d *decision) judgeDevices(x *cell) {
	for _, r := range d.w.Spec.GetScheduling().GetDevices() {
		if devicesFor(r, x.Cluster) == 0 {
			x.bar(fault{code: Device, key: kindOf(r), value: modelsOf(r)})
		}
	}
}

// devices bounds the units by what devices the cluster has in all; which of them
// are free, only it knows.
func (d *decision) devices(x *cell, limit int) int {
	for _, r := range d.w.Spec.GetScheduling().GetDevices() {
		limit = min(limit, devicesFor(r, x.Cluster)/d.running)
	}
	return limit
}

// devicesFor is how many replicas a cluster's devices serve.
func devicesFor(r *portolanv1.DeviceRequest, c *Cluster) int {
	milli := 0
	for _, p := range c.Pools {
		for name, n := range p.GetDevices() {
			kind, model := cutModel(name)
			if kind == kindOf(r) && (len(r.GetModels()) == 0 || slices.Contains(r.GetModels(), model)) {
				milli += 1000 * int(n)
			}
		}
	}
	if r.GetShareMilli() > 0 {
		// A share is of one device, so that what is left of each is lost.
		return milli / 1000 * (1000 / int(r.GetShareMilli()))
	}
	return milli / (1000 * max(1, int(r.GetCount())))
}

// relation is a must or a wish about where another workload runs.
type relation struct {
	*portolanv1.WorkloadSpec_ClusterAffinity
	other string
	// theirs: the other one asks for it.
	theirs bool
	at     map[domain]bool
}

// relate reads the affinity of both sides. Near something that runs nowhere is
// nowhere, unless both ask for each other: one must be the first.
func (d *decision) relate() {
	for _, a := range d.plain.GetAffinity() {
		if a.GetWorkload() == d.w.ID {
			continue // a bound on how many are together; see group
		}
		r := relation{WorkloadSpec_ClusterAffinity: a, other: a.GetWorkload()}
		mutual := false
		for i := range d.s.Others {
			if o := &d.s.Others[i]; o.ID == a.GetWorkload() {
				r.at = d.domains(a.GetOver(), o.Clusters)
				mutual = slices.ContainsFunc(o.Affinity, func(b *portolanv1.WorkloadSpec_ClusterAffinity) bool {
					return b.GetWorkload() == d.w.ID && !b.GetAnti() && !b.GetPrefer()
				})
			}
		}
		if len(r.at) == 0 && mutual && !a.GetAnti() {
			continue
		}
		d.near = append(d.near, r)
	}
	for i := range d.s.Others {
		o := &d.s.Others[i]
		for _, b := range o.Affinity {
			if b.GetWorkload() == d.w.ID && b.GetAnti() && !b.GetPrefer() && o.ID != d.w.ID {
				d.near = append(d.near, relation{b, o.ID, true, d.domains(b.GetOver(), o.Clusters)})
			}
		}
	}
}

func (d *decision) domains(over portolanv1.SpreadDomain, clusters []string) map[domain]bool {
	out := map[domain]bool{}
	for i := range d.s.Clusters {
		if c := &d.s.Clusters[i]; slices.Contains(clusters, c.ID) {
			out[domainOf(over, c)] = true
		}
	}
	return out
}

// judgeNear: a must closes the cluster, and what is there leaves when it can; a
// wish counts against it.
func (d *decision) judgeNear(x *cell) {
	for _, r := range d.near {
		if r.at[domainOf(r.GetOver(), x.Cluster)] != r.GetAnti() {
			continue
		}
		f := fault{code: Affinity, key: r.other, absent: len(r.at) == 0}
		if r.GetAnti() {
			f.code = AntiAffinity
		}
		if r.theirs {
			f.have = "theirs"
		}
		f.value = overName(r.GetOver())
		if r.GetPrefer() {
			f.code = AffinityWish
			x.wish += max(1, int(r.GetWeight()))
			if r.GetAnti() {
				f.have = "anti"
			}
			x.faults = append(x.faults, f)
			continue
		}
		x.close(f)
		x.away = !d.rooted && !d.plain.GetExclusive()
	}
	if x.away {
		x.tier = awayTier
	}
}

func (d *decision) judgeState(x *cell) {
	if x.Spec.GetCordoned() {
		x.close(fault{code: Cordoned})
	}
	switch x.State {
	case portolanv1.ClusterState_CLUSTER_STATE_READY:
	case portolanv1.ClusterState_CLUSTER_STATE_LOST:
		x.close(fault{code: Lost})
	default:
		x.bar(fault{code: Pending})
	}
}

func isDaemon(spec *portolanv1.WorkloadSpec) bool {
	return spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON
}

func (d *decision) isDaemon() bool { return isDaemon(d.w.Spec) }

// daemon runs on every cluster that may have it. Its unit is a cluster.
func (d *decision) daemon() {
	d.desired = 0
	for i := range d.cells {
		if x := &d.cells[i]; d.has(x) {
			x.n = min(1, x.room)
			d.desired++
			d.missing += 1 - x.n
		}
	}
}

// has says whether a cluster is to have by itself what every cluster is to.
func (d *decision) has(x *cell) bool { return !x.barred && (!x.closed || x.Previous.Present) }

// daemonClaim is one replica of each revision on every node.
func (d *decision) daemonClaim(x *cell) api.Resources { return x.unit.Times(int64(x.Nodes)) }

// daemonRoom is 1 when one replica on each node fits, or when a claim of that
// size is already held.
func (d *decision) daemonRoom(x *cell) int {
	c := d.daemonClaim(x)
	if c.Fits(d.freeFor(x)) || x.Previous.Present && c.Fits(x.Previous.Claim) {
		return 1
	}
	return 0
}

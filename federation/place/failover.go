package place

import (
	"cmp"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// decide fills the cells with the decision.
func (d *decision) decide() {
	switch {
	case d.allDark():
		d.freeze()
	case d.isDaemon():
		d.daemon()
		d.displaceEach()
	case d.duplicated():
		d.keepLost()
		d.duplicate()
		d.displaceEach()
	case d.plain.GetExclusive():
		d.exclusive()
	default:
		d.keepLost()
		d.spread()
		d.displace()
		d.failover()
	}
	if !d.frozen {
		d.report()
	}
}

// allDark: every cluster that ever joined is silent. Then it is more likely that
// we are deaf.
func (d *decision) allDark() bool {
	lost := 0
	for i := range d.cells {
		switch d.cells[i].State {
		case portolanv1.ClusterState_CLUSTER_STATE_READY:
			return false
		case portolanv1.ClusterState_CLUSTER_STATE_LOST:
			lost++
		default: // never joined
		}
	}
	return lost > 0
}

// freeze keeps what was there.
func (d *decision) freeze() {
	d.frozen = true
	d.reasons = append(d.reasons, Reason{Code: ObserverSuspect, Message: suspect})
	for i := range d.cells {
		x := &d.cells[i]
		x.n, x.extra, x.room = 0, 0, 0
		if x.Previous.Present {
			x.n, x.extra = max(1, x.Previous.Declared), x.Previous.Failover
		}
	}
}

// keepLost leaves in lost clusters what they had: they are cut off and run it,
// whatever is written here.
func (d *decision) keepLost() {
	left := d.want
	for i := range d.cells {
		if x := &d.cells[i]; x.lost() && !x.barred {
			x.fixed = min(x.had, x.room, left)
			if !d.duplicated() {
				left -= x.fixed
			}
			x.n, x.extra = x.fixed, min(x.hadExtra, x.room-x.fixed)
		}
	}
}

// duplicate gives every cluster that may have them all units.
func (d *decision) duplicate() {
	d.desired = 0
	for i := range d.cells {
		x := &d.cells[i]
		if !d.has(x) {
			continue
		}
		want := d.want
		if x.closed {
			want = min(x.had, d.want)
		}
		if !x.lost() {
			x.n = min(want, x.room)
		}
		d.desired += want
		d.missing += want - x.n
	}
}

// exclusive keeps the one unit where it is, also in a lost cluster, as long as it
// may be there. Else it is told to stop, and begins elsewhere only when no cluster
// has one any more.
func (d *decision) exclusive() {
	var keeper *cell
	held := false
	for i := range d.cells {
		x := &d.cells[i]
		if !x.Previous.Present || x.Previous.Declared == 0 && x.Stopped {
			continue
		}
		held = true
		stays := d.want > 0 && !x.barred && x.Previous.Declared > 0 && (x.room > 0 || x.lost())
		if x.leaving = true; stays && (keeper == nil || x.lost() && !keeper.lost()) {
			keeper = x
		}
	}
	switch {
	case keeper != nil:
		keeper.n, keeper.leaving = 1, false
	case held && !plant.exclusiveHurries:
		d.missing = d.want
	default:
		d.spread()
		d.displace()
	}
}

// failover places once more, elsewhere, what lost clusters hold, when the
// workload wants that and they have been silent long enough. What stands in ends
// when the cluster is back and its replicas are ready. Jobs are not run twice, and
// what has volumes stays with them.
func (d *decision) failover() {
	rule := d.plain.GetFailover()
	if rule == nil || d.rooted {
		return
	}
	after := defaultFailoverAfter
	if a := rule.GetAfter(); a != nil {
		after = a.AsDuration()
	}
	want, awaited := 0, 0
	for i := range d.cells {
		x := &d.cells[i]
		if x.State == portolanv1.ClusterState_CLUSTER_STATE_READY && x.hadExtra == 0 {
			awaited += max(0, min(x.n, x.had)-x.Ready/d.perUnit)
		}
		if x.fixed == 0 {
			continue
		}
		if due := x.LastSeen.Add(after); due.After(d.now) && !plant.failsOverEarly {
			d.sooner(due)
			x.faults = append(x.faults, fault{code: Lost, at: due})
			continue
		}
		want += x.fixed
	}
	d.standIn(want, awaited)
}

func (d *decision) sooner(t time.Time) {
	if d.again.IsZero() || t.Before(d.again) {
		d.again = t
	}
}

// standIn gives extra units: first those that were there before stay, then more
// are added. Those that a returned cluster is still awaited for only stay.
func (d *decision) standIn(want, awaited int) {
	if want+awaited == 0 {
		return
	}
	for i := range d.cells {
		x := &d.cells[i]
		for want+awaited > 0 && x.extra < x.hadExtra && d.opens(x) {
			x.extra++
			if want > 0 {
				want--
			} else {
				awaited--
			}
		}
	}
	for ; want > 0; want-- {
		var best *cell
		for i := range d.cells {
			if x := &d.cells[i]; d.opens(x) && (best == nil || cmp.Or(cmp.Compare(x.class, best.class), cmp.Compare(x.n+x.extra, best.n+best.extra), cmp.Compare(x.price, best.price)) < 0) {
				best = x
			}
		}
		if best == nil {
			break
		}
		best.extra++
	}
	d.extraMissing = want
}

// opens says whether a cluster can take one more that stands in.
func (d *decision) opens(x *cell) bool {
	if x.State != portolanv1.ClusterState_CLUSTER_STATE_READY || x.n+x.extra >= d.extraRoom(x) {
		return false
	}
	for j := range d.spreads {
		s := &d.spreads[j]
		if s.prefer || s.most > d.want {
			continue
		}
		n := 0
		for _, i := range d.of(x, j).cells {
			n += d.cells[i].n + d.cells[i].extra
		}
		if n >= s.most {
			return false
		}
	}
	return true
}

// extraRoom is the room for declared and extra units together.
func (d *decision) extraRoom(x *cell) int {
	if x.barred || x.closed {
		return x.room
	}
	limit := 2 * d.want
	free := min(fit(x.unit, x.surge, d.free(x), limit), d.devices(x, limit))
	return max(x.room, free, fit(x.unit, x.surge, x.Previous.Claim, min(x.had+x.hadExtra, limit)))
}

package schedule

// nodeKey is a node's key for the group, and what is against it of the terms that
// work node by node.
func (u *run) nodeKey(i int32) (key uint64, codes Code) {
	t, r := u.t, u.r
	if i == u.notOn {
		codes |= OtherNode
	}
	own := int32(0)
	if u.nodeSpread || t.spreadsOut(i) {
		own = t.countOn(i, r.rev)
	}
	if u.nodeSkew > 0 && own+1-int32(u.nodeMin) > u.nodeSkew {
		codes |= SpreadSkew
	}
	wish, against := u.nodeAffinity(i)
	codes |= against
	key = u.x.keys[i]
	wish += uint32(key >> wishShift)
	return uint64(min(wish, maxWish))<<wishShift | uint64(min(own, maxOwn))<<ownShift | key&(1<<ownShift-1), codes
}

func (u *run) nodeAffinity(i int32) (wish uint32, codes Code) {
	for k := range u.r.affinity {
		a := &u.r.affinity[k]
		if a.column != nil {
			continue
		}
		n := u.t.countOn(i, a.scope)
		w, c := a.judge(n, a.scope == u.r.work && a.scope.total == 0)
		wish, codes = wish+w, codes|c
	}
	for _, s := range u.r.work.against {
		if s.column == nil && u.t.countOn(i, s) > 0 && !u.t.faults.avoidersIgnored {
			codes |= WorkloadAntiAffinity
		}
	}
	return wish, codes
}

// judge says what n replicas of the other workload in a domain mean; first is that
// it is its own, and there is none anywhere.
func (a *affinity) judge(n int32, first bool) (wish uint32, codes Code) {
	met := (n > 0) != a.anti
	switch {
	case met || (first && !a.prefer):
		return 0, 0
	case a.prefer:
		return a.weight, 0
	case a.anti:
		return 0, WorkloadAntiAffinity
	default:
		return 0, WorkloadAffinity
	}
}

// verdict is what is against domains with these values of the index's columns, the
// weight of wishes that they do not meet, and how many replicas to spread from are
// there.
func (u *run) verdict(values []int32) (codes Code, wish uint32, count uint64) {
	x, r := u.x, u.r
	for k := range r.spreads {
		s := &r.spreads[k]
		if s.column == nil {
			continue
		}
		n := r.rev.in(s.column, values[x.columnAt(s.column)])
		count += uint64(n)
		if s.must() && n+1-u.mins[k].least > s.skew {
			codes |= SpreadSkew
		}
	}
	for k := range r.affinity {
		a := &r.affinity[k]
		if a.column == nil {
			continue
		}
		n := int32(0)
		if v := values[x.columnAt(a.column)]; v != 0 {
			n = a.scope.in(a.column, v)
		}
		w, c := a.judge(n, a.scope == r.work && a.scope.total == 0)
		wish, codes = wish+w, codes|c
	}
	for _, s := range r.work.against {
		if s.column == nil || s.total == 0 || u.t.faults.avoidersIgnored {
			continue
		}
		if v := values[x.columnAt(s.column)]; v != 0 && s.in(s.column, v) > 0 {
			codes |= WorkloadAntiAffinity
		}
	}
	return codes, wish, count
}

func (x *index) columnAt(c *column) int {
	for k := range x.columns {
		if x.columns[k] == c {
			return k
		}
	}
	return -1
}

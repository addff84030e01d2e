package place

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// farMicros is the round trip that is assumed where none was measured.
const farMicros = 10_000_000

// decision is the working state. Everything counts in units: a unit is a replica,
// or a whole job that may not be split.
type decision struct {
	s     *Snapshot
	w     *Workload
	now   time.Time
	plain *portolanv1.WorkloadSpec_Placement
	cells []cell
	units
	// rooted: what runs stays where it is, unless it may not be there: it has
	// volumes, or is a job that has begun.
	rooted bool
	// afresh: the objective is another one than before, so that nothing is kept for
	// being there.
	afresh bool
	order  ordering
	basis  string
	// spreads that hold, those of the spec first; doms has for each cell its group
	// in each of them.
	spreads  []spread
	declared int
	// wishes says that some of them are, with a bound.
	wishes bool
	doms   []int32
	near   []relation
	// roomFromLower says that claims of lower priority count as room, up to level.
	roomFromLower bool
	level         int
	missing       int // units that found no place
	extraMissing  int
	desired       int
	displaced     []Displaced
	reasons       []Reason
	frozen        bool
	again         time.Time
	// phrases are the latest of explain.
	phrases    [8]phrase
	slab       []Reason
	nextPhrase int
}

// units is how a workload is counted: units wanted, replicas per unit, and replicas
// of a unit that run at once.
type units struct{ want, perUnit, running int }

func newUnits(spec *portolanv1.WorkloadSpec) units {
	u := units{want: most(spec), perUnit: 1, running: 1}
	if isJob(spec) {
		p := max(1, int(spec.GetJob().GetParallelism()))
		if p < u.want || spec.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON {
			// Its bound on replicas at a time holds only within one cluster, and a run of
			// a cron is in one.
			u = units{want: 1, perUnit: u.want, running: min(p, u.want)}
		}
	}
	if spec.GetPlacement().GetExclusive() {
		u.want = min(u.want, 1)
	}
	return u
}

// cell is one cluster in a decision.
type cell struct {
	*Cluster
	index int
	// unit is what one unit claims, surge what an update adds.
	unit, surge api.Resources
	// prices of a unit for an hour, on demand and on spot nodes, and how many units
	// the latter hold.
	price, spotPrice int64
	spotRoom         int
	latency          int64
	// soft counts taints that are to be avoided, wish the weights of unmet wishes.
	soft, wish int
	// tier is the place in the order of fallbacks, weight that of the division.
	tier   int
	weight int64
	// barred says that nothing may be here, closed that nothing may be added, away
	// that what is here is to leave when it can.
	barred, closed, away bool
	faults               []fault
	// room is how many units fit in all, extra ones included.
	room int
	// n are the declared units, fixed of them belong to a lost cluster.
	n, fixed int
	extra    int
	// had units were here before.
	had, hadExtra int
	// gained is what claims of lower priority leave.
	gained api.Resources
	// leaving: an exclusive unit is to stop here.
	leaving bool
	class   uint64
	rank    uint64
}

func (x *cell) lost() bool { return x.State == portolanv1.ClusterState_CLUSTER_STATE_LOST }

func newDecision(s *Snapshot, now time.Time) *decision {
	spec := s.Workload.Spec
	d := &decision{s: s, w: &s.Workload, now: now, plain: spec.GetPlacement(), units: newUnits(spec)}
	d.rooted = isJob(spec) || len(spec.GetVolumes()) > 0
	d.desired = d.want
	d.order = d.ordering()
	d.basis = d.basisText()
	d.relate()
	d.cells = make([]cell, len(s.Clusters))
	for i := range s.Clusters {
		d.cells[i].Cluster = &s.Clusters[i]
	}
	for i := 1; i < len(d.cells); i++ {
		if d.cells[i-1].ID > d.cells[i].ID {
			slices.SortFunc(d.cells, func(a, b cell) int { return cmp.Compare(a.ID, b.ID) })
			break
		}
	}
	d.judges()
	d.group()
	for i := range d.cells {
		x := &d.cells[i]
		if p := x.Previous; p.Present && p.Basis != "" && p.Basis != d.basis && !d.rooted {
			d.afresh = true
		}
	}
	d.rankCells()
	return d
}

// judges fills the cells.
func (d *decision) judges() {
	want := d.selector()
	for i := range d.cells {
		x := &d.cells[i]
		x.index = i
		for _, r := range d.w.Running() {
			q := r.requestsIn(x.Cluster)
			x.unit = x.unit.Add(q.Times(int64(d.running)))
			x.surge = x.surge.Add(q.Times(int64(r.Surge)))
		}
		x.had, x.hadExtra = x.Previous.Declared/d.perUnit, x.Previous.Failover/d.perUnit
		d.judge(x, want)
		d.price(x)
		x.room = d.roomIn(x)
		if d.order == byFree {
			x.weight = d.weightByFree(x)
		}
	}
}

// pricePer hour of an amount.
func pricePer(r api.Resources, core, gib int64) int64 {
	p := float64(r.CPUMilli)/1000*float64(core) + float64(r.MemoryBytes)/(1<<30)*float64(gib)
	return int64(min(math.Round(p), math.MaxInt64/4))
}

// price of one unit of all revisions for an hour; of one core and one GiB when
// they request nothing. The prices of several pools count by their size.
func (d *decision) price(x *cell) {
	r := x.unit
	if r == (api.Resources{}) {
		r = api.Resources{CPUMilli: 1000, MemoryBytes: 1 << 30}
	}
	base := pricePer(r, x.Spec.GetCpuCoreHourMicros(), x.Spec.GetMemoryGibHourMicros())
	x.price, x.spotPrice = base, base
	var sum, size [2]float64
	for _, p := range x.Pools {
		i, c := 0, base
		if p.GetSpot() {
			i = 1
		}
		if p.GetCpuCoreHourMicros() != 0 || p.GetMemoryGibHourMicros() != 0 {
			c = pricePer(r, p.GetCpuCoreHourMicros(), p.GetMemoryGibHourMicros())
		}
		w := float64(max(1, p.GetCpuMilli()))
		sum[i], size[i] = sum[i]+w*float64(c), size[i]+w
	}
	if size[0] > 0 {
		x.price = int64(math.Round(sum[0] / size[0]))
	}
	if size[1] > 0 {
		x.spotPrice = int64(math.Round(sum[1] / size[1]))
	}
	switch d.plain.GetCapacity() {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		x.price = x.spotPrice
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		x.spotRoom = fit(x.unit, api.Resources{}, x.Spot, math.MaxInt32)
	default:
	}
	if d.order == byLatency {
		x.latency = d.latency(x)
	}
}

// latency is the mean round trip from the workload's origins, in microseconds.
func (d *decision) latency(x *cell) int64 {
	var sum, weights int64
	for _, o := range d.plain.GetOrigins() {
		w := int64(max(1, o.GetWeight()))
		rtt, ok := x.Spec.GetRttMillis()[o.GetRegion()]
		us := int64(rtt) * 1000
		switch {
		case !ok && o.GetRegion() == x.Spec.GetRegion():
			us = 0
		case !ok:
			us = farMicros
		}
		sum, weights = sum+w*us, weights+w
	}
	if weights == 0 {
		return 0
	}
	return sum / weights
}

// priceOf the n-th unit in a cell: spot nodes fill first.
func (x *cell) priceOf(n int) int64 {
	if n <= x.spotRoom {
		return x.spotPrice
	}
	return x.price
}

// free is what the workload's capacity type may use; a daemon is on every node.
func (d *decision) free(x *cell) api.Resources {
	switch CapacityOf(d.w.Spec) {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		return x.Spot
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		return x.Free.Add(x.Spot)
	default:
		return x.Free
	}
}

// claim is what units reserve in one cluster.
func (x *cell) claim(units int) api.Resources {
	if units <= 0 {
		return api.Resources{}
	}
	return x.unit.Times(int64(units)).Add(x.surge)
}

// fit is the greatest number of units up to limit whose claim fits.
func fit(unit, surge, free api.Resources, limit int) int {
	in := func(unit, surge, free int64) int {
		switch {
		case free < surge:
			return 0
		case unit <= 0:
			return limit
		}
		return int(min((free-surge)/unit, int64(limit)))
	}
	return max(0, min(in(unit.CPUMilli, surge.CPUMilli, free.CPUMilli), in(unit.MemoryBytes, surge.MemoryBytes, free.MemoryBytes)))
}

// roomIn is how many units the cluster can hold: as many as fit into what is free,
// and never fewer than what it already holds under a claim of the same size,
// because losing a node must not send replicas over the world.
func (d *decision) roomIn(x *cell) int {
	if x.barred {
		return 0
	}
	if d.isDaemon() {
		return d.daemonRoom(x)
	}
	had := x.had + x.hadExtra
	limit := max(1, d.want)
	if x.closed {
		limit = had
	}
	n := min(fit(x.unit, x.surge, d.freeFor(x), limit), d.devices(x, limit))
	if held := min(had, limit); n < held {
		n = max(n, fit(x.unit, x.surge, x.Previous.Claim, held))
	}
	return n
}

// freeFor is what is free, and with roomFromLower what lower claims would leave.
func (d *decision) freeFor(x *cell) api.Resources {
	f := d.free(x)
	if d.roomFromLower {
		for _, l := range d.lower(x) {
			f = f.Add(l.Claim)
		}
	}
	return f
}

// weightByFree is how many units fit into what is free, whatever is wanted: bounded
// by that, clusters of every size that could hold all would weigh the same.
func (d *decision) weightByFree(x *cell) int64 {
	if x.barred {
		return 0
	}
	return int64(min(fit(x.unit, x.surge, d.free(x), math.MaxInt32), d.devices(x, math.MaxInt32)))
}

// group finds the groups of every spread, and each cell's place in them.
func (d *decision) group() {
	add := func(over portolanv1.SpreadDomain, s spread) {
		s.over = over
		d.wishes = d.wishes || s.prefer && s.bounds()
		d.spreads = append(d.spreads, s)
	}
	all := d.plain.GetSpreads()
	if d.plain.GetSpread() != nil {
		all = append([]*portolanv1.WorkloadSpec_ClusterSpread{d.plain.GetSpread()}, all...)
	}
	for _, s := range all {
		skew := math.MaxInt
		if m := int(s.GetMaxSkew()); m > 0 {
			skew = m
		}
		add(s.GetOver(), spread{least: max(1, int(s.GetMinGroups())), skew: skew, most: math.MaxInt, prefer: s.GetPrefer()})
	}
	d.declared = len(d.spreads)
	for _, a := range d.plain.GetAffinity() {
		if a.GetAnti() && a.GetWorkload() == d.w.ID && d.w.ID != "" {
			add(a.GetOver(), spread{least: 1, skew: math.MaxInt, most: 1, prefer: a.GetPrefer()})
		}
	}
	d.doms = make([]int32, len(d.cells)*len(d.spreads))
	for j := range d.spreads {
		d.groupBy(j)
	}
}

// groupBy finds the groups of one spread.
func (d *decision) groupBy(j int) {
	s, stride := &d.spreads[j], len(d.spreads)
	backing := make([]int32, len(d.cells))
	if perCluster(s.over) {
		s.groups = make([]group, len(d.cells))
		for i := range d.cells {
			backing[i], d.doms[i*stride+j] = int32(i), int32(i)
			s.groups[i] = group{name: domain{a: d.cells[i].ID}, cells: backing[i : i+1 : i+1]}
		}
		return
	}
	seen := make(map[domain]int32, 32)
	for i := range d.cells {
		key := domainOf(s.over, d.cells[i].Cluster)
		g, ok := seen[key]
		if !ok {
			g = int32(len(s.groups))
			seen[key] = g
			s.groups = append(s.groups, group{name: key})
		}
		s.groups[g].size++
		d.doms[i*stride+j] = g
	}
	at := 0
	for g := range s.groups {
		s.groups[g].cells = backing[at : at : at+s.groups[g].size]
		at += s.groups[g].size
	}
	for i := range d.cells {
		g := &s.groups[d.doms[i*stride+j]]
		g.cells = append(g.cells, int32(i))
	}
}

func perCluster(over portolanv1.SpreadDomain) bool {
	return over == portolanv1.SpreadDomain_SPREAD_DOMAIN_CLUSTER || over == portolanv1.SpreadDomain_SPREAD_DOMAIN_UNSPECIFIED
}

// domain is the name of a region, zone, provider or cluster.
type domain struct{ a, b string }

func domainOf(over portolanv1.SpreadDomain, c *Cluster) domain {
	switch over {
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION:
		return domain{a: c.Spec.GetRegion()}
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_ZONE:
		return domain{c.Spec.GetRegion(), c.Spec.GetZone()}
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_PROVIDER:
		return domain{a: c.Spec.GetProvider()}
	default:
		return domain{a: c.ID}
	}
}

// of is the cell's group in a spread.
func (d *decision) of(x *cell, j int) *group {
	return &d.spreads[j].groups[d.doms[x.index*len(d.spreads)+j]]
}

// basisText names what the decision is to bring about: an objective, a division,
// and what they are measured by.
func (d *decision) basisText() string {
	b := make([]byte, 0, 64)
	b = append(b, d.because()...)
	switch d.plain.GetCapacity() {
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		b = append(b, ", on spot nodes first"...)
	case portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		b = append(b, ", only on spot nodes"...)
	default:
	}
	if d.order == byWeight {
		for _, w := range d.plain.GetWeights() {
			b = append(append(b, ' '), nameMatch(w.GetMatch())...)
			b = strconv.AppendInt(append(b, '='), int64(w.GetWeight()), 10)
		}
	}
	if d.order == byLatency {
		for _, o := range d.plain.GetOrigins() {
			b = append(append(b, ' '), o.GetRegion()...)
			b = strconv.AppendInt(append(b, '='), int64(max(1, o.GetWeight())), 10)
		}
	}
	return string(b)
}

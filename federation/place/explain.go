package place

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const suspect = "every cluster looks dead, so the observer is suspected: nothing is changed"

// report says what is about no single cluster.
func (d *decision) report() {
	for j := range d.declared {
		s := &d.spreads[j]
		if want := min(s.least, d.want); want > 1 && s.used < want && !d.isDaemon() && !d.duplicated() {
			d.reasons = append(d.reasons, Reason{Code: MinGroups, Message: fmt.Sprintf("the spread asks for %d %s, %d can be used", s.least, plural(s.over), s.used)})
		}
	}
	if d.missing > 0 && d.plain.GetExclusive() && d.leaves() {
		d.reasons = append(d.reasons, Reason{Code: Leaving, Message: "it begins elsewhere when its cluster is known to have stopped it"})
	} else if d.missing > 0 && d.isDaemon() {
		d.reasons = append(d.reasons, Reason{Code: Capacity, Message: fmt.Sprintf("%d of %d clusters have no room for one replica on each node", d.missing, d.desired), Count: d.missing})
	} else if d.missing > 0 {
		d.reasons = append(d.reasons, Reason{Code: Capacity, Message: "not every replica found a cluster", Count: d.missing * d.perUnit})
	}
	if d.extraMissing > 0 {
		d.reasons = append(d.reasons, Reason{Code: Failover, Message: "not every replica of the lost clusters found room elsewhere", Count: d.extraMissing * d.perUnit})
	}
	if len(d.displaced) > 0 {
		n := 0
		for _, v := range d.displaced {
			n += v.Replicas
		}
		d.reasons = append(d.reasons, Reason{Code: Displaces, Message: fmt.Sprintf("%d replicas of lower priority make room", n), Count: n})
	}
}

func (d *decision) leaves() bool {
	for i := range d.cells {
		if d.cells[i].leaving {
			return true
		}
	}
	return false
}

// sentence is a fault in words.
func (d *decision) sentence(x *cell, f fault) string {
	name := f.key
	if f.value != "" {
		name += "=" + f.value
	}
	switch f.code {
	case Residency:
		return "the tenant may run only in " + strings.Join(d.w.Residency, ", ") + ", this is " + f.key
	case NotAllowed:
		return "region " + f.key + " is not among spec.placement.allowed_regions (" + strings.Join(d.plain.GetAllowedRegions(), ", ") + ")"
	case Forbidden:
		return "region " + f.key + " is in spec.placement.forbidden_regions"
	case ClusterNotAllowed:
		return "the cluster is not among spec.placement.allowed_clusters"
	case ClusterForbidden:
		return "the cluster is in spec.placement.forbidden_clusters"
	case Selector:
		if f.absent {
			return "the cluster has no label " + f.key + ", spec.placement.cluster_selector wants " + name
		}
		return "label " + f.key + " is " + f.have + ", spec.placement.cluster_selector wants " + f.value
	case SoftTaint:
		return "taint " + name + " is to be avoided"
	case Staying:
		return "taint " + name + " is tolerated until " + f.at.UTC().Format(time.RFC3339Nano) + ": nothing new here"
	case Taint:
		return taintSentence(name, f)
	case NoGroup:
		return "the cluster is in none of spec.placement.fallbacks"
	case NoWeight:
		return "none of spec.placement.weights gives the cluster a weight"
	case Device:
		return "the cluster has too few devices of " + strings.TrimSpace(f.key+" "+f.value) + " for one replica"
	case Affinity, AntiAffinity, AffinityWish:
		return nearSentence(f)
	case Cordoned:
		return "the cluster is cordoned: nothing new here"
	case Lost:
		if !f.at.IsZero() {
			return "failover is due at " + f.at.UTC().Format(time.RFC3339Nano)
		}
		return "the cluster is silent: what it had stays declared, nothing new here"
	case Pending:
		return "the cluster has never joined"
	}
	return x.ID
}

func taintSentence(name string, f fault) string {
	switch {
	case !f.at.IsZero():
		return "taint " + name + " was tolerated until " + f.at.UTC().Format(time.RFC3339Nano)
	case f.have != "":
		return "taint " + name + " is not tolerated, and nothing may stay under it"
	}
	return "taint " + name + " is not tolerated: nothing new here"
}

func nearSentence(f fault) string {
	switch {
	case f.code == AffinityWish && f.have == "anti":
		return "workload " + f.key + ", which it prefers to keep away from, runs in this " + f.value
	case f.code == AffinityWish:
		return "workload " + f.key + ", which it prefers to be near, does not run in this " + f.value
	case f.have == "theirs":
		return "workload " + f.key + " runs in this " + f.value + " and keeps away from it"
	case f.code == AntiAffinity:
		return "workload " + f.key + ", which it keeps away from, runs in this " + f.value
	case f.absent:
		return "workload " + f.key + ", which it must be near, runs nowhere"
	}
	return "workload " + f.key + ", which it must be near, does not run in this " + f.value
}

// explain is a cluster's reasons: its faults, and what the decision made of it.
func (d *decision) explain(x *cell) []Reason {
	out := d.reserve(len(x.faults) + 2)
	for _, f := range x.faults {
		out = append(out, Reason{Code: f.code, Message: d.sentence(x, f)})
	}
	note := func(code string, count int, message string) {
		out = append(out, Reason{Code: code, Message: message, Count: count})
	}
	switch {
	case d.frozen:
		note(ObserverSuspect, 0, suspect)
		if x.extra > 0 {
			note(Failover, x.Previous.Failover, strconv.Itoa(x.Previous.Failover)+" replicas stand in for lost clusters")
		}
		return out
	case x.leaving:
		note(Leaving, 0, "its one replica is to stop here before it may run elsewhere")
		return out
	case x.barred || d.isDaemon() && x.n > 0:
		if x.n > 0 {
			note(Chosen, 0, "one replica on each eligible node")
		}
		return d.explainDisplaced(x, out)
	}
	if kept := min(x.had, x.n) * d.perUnit; kept > 0 {
		note(Kept, kept, d.phrase(kept, " replicas were here before", ""))
	}
	if added := (x.n - x.had) * d.perUnit; added > 0 {
		note(Chosen, added, d.phrase(added, " replicas placed here: ", d.because()))
	}
	if x.extra > 0 {
		note(Failover, x.extra*d.perUnit, strconv.Itoa(x.extra*d.perUnit)+" replicas stand in for lost clusters")
	}
	if x.n > 0 && x.tier > 0 && !x.away {
		note(Overflow, x.n*d.perUnit, "fallback group "+d.plain.GetFallbacks()[x.tier].GetName()+" takes what earlier groups have no room for")
	}
	return d.explainLimit(x, out)
}

// explainLimit says why the cluster has not more.
func (d *decision) explainLimit(x *cell, out []Reason) []Reason {
	before := len(out)
	if x.n+x.extra > 0 && len(d.displaced) == 0 && !x.claim(x.n+x.extra).Fits(d.free(x)) {
		return append(out, Reason{Code: OverCapacity, Message: "holds more than is free now; nothing is moved for that"})
	}
	if d.isDaemon() {
		if d.has(x) {
			out = append(out, Reason{Code: Capacity, Message: d.lacks(x)})
		}
		return out
	}
	out = d.explainDisplaced(x, out)
	if x.n > 0 && d.missing == 0 || x.n >= d.want && d.duplicated() && d.want > 0 || x.closed || len(out) > before && d.missing == 0 {
		return out
	}
	add := func(code, message string) []Reason { return append(out, Reason{Code: code, Message: message}) }
	switch {
	case d.want == 0:
		return add(NotNeeded, "no replicas are declared")
	case x.room <= x.n+x.extra:
		return add(Capacity, d.lacks(x))
	case d.plain.GetExclusive() && d.missing == 0:
		return add(Exclusive, "has room, but its one replica is elsewhere")
	case d.missing > 0 && d.leaves():
		return add(Exclusive, "has room, but its one replica has not stopped yet")
	case d.missing > 0:
		return add(Spread, "one more here would break "+d.broken(x))
	}
	return add(NotNeeded, d.phrase(0, "has room, but ", d.because()))
}

// explainDisplaced says what makes room in a cluster, but not whose it is: that may
// be another tenant's.
func (d *decision) explainDisplaced(x *cell, out []Reason) []Reason {
	n := 0
	for _, v := range d.displaced {
		if v.Cluster == x.ID {
			n += v.Replicas
		}
	}
	if n == 0 {
		return out
	}
	return append(out, Reason{Code: Displaces, Message: strconv.Itoa(n) + " replicas of lower priority make room", Count: n})
}

// reserve gives room for some reasons, out of one piece for many clusters.
func (d *decision) reserve(n int) []Reason {
	if len(d.slab) < n {
		d.slab = make([]Reason, max(n, 2*len(d.cells)))
	}
	out := d.slab[:0:n]
	d.slab = d.slab[n:]
	return out
}

// phrase is a number with words; many clusters have the same.
func (d *decision) phrase(n int, text, more string) string {
	for i := range d.phrases {
		if p := &d.phrases[i]; p.n == n && p.text == text {
			return p.all
		}
	}
	all := text + more
	if n > 0 {
		all = strconv.Itoa(n) + all
	}
	d.phrases[d.nextPhrase%len(d.phrases)] = phrase{n, text, all}
	d.nextPhrase++
	return all
}

type phrase struct {
	n         int
	text, all string
}

// broken names the spread that one more would break.
func (d *decision) broken(x *cell) string {
	for j := range d.spreads {
		if s := &d.spreads[j]; !s.prefer && s.bounds() && d.of(x, j).full {
			if j >= d.declared {
				return "the anti-affinity to itself over " + plural(s.over)
			}
			return d.spreadField(j)
		}
	}
	return "spec.placement.spread"
}

func (d *decision) spreadField(j int) string {
	if d.plain.GetSpread() != nil {
		if j == 0 {
			return "spec.placement.spread"
		}
		j--
	}
	return "spec.placement.spreads[" + strconv.Itoa(j) + "]"
}

// lacks says what one more unit would take.
func (d *decision) lacks(x *cell) string {
	need := d.shortfall(x)
	var parts []string
	if need.CPUMilli > 0 {
		parts = append(parts, strconv.FormatInt(need.CPUMilli, 10)+"m CPU")
	}
	if need.MemoryBytes > 0 {
		parts = append(parts, strconv.FormatInt(need.MemoryBytes, 10)+" bytes of memory")
	}
	if len(parts) == 0 {
		if x.room < d.want {
			return "has no more devices"
		}
		return "as many as are wanted"
	}
	more := "one more would need "
	if d.isDaemon() {
		more = "one replica on each node would need "
	}
	return more + strings.Join(parts, " and ") + " more than is free" + d.capacityName()
}

func (d *decision) capacityName() string {
	if CapacityOf(d.w.Spec) == portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY {
		return " on spot nodes"
	}
	return ""
}

func overName(o portolanv1.SpreadDomain) string {
	switch o {
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_REGION:
		return "region"
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_ZONE:
		return "zone"
	case portolanv1.SpreadDomain_SPREAD_DOMAIN_PROVIDER:
		return "provider"
	default:
		return "cluster"
	}
}

func plural(o portolanv1.SpreadDomain) string { return overName(o) + "s" }

func kindOf(r *portolanv1.DeviceRequest) string {
	if r.GetKind() == "" {
		return "gpu"
	}
	return r.GetKind()
}

func modelsOf(r *portolanv1.DeviceRequest) string { return strings.Join(r.GetModels(), ",") }

func cutModel(name string) (kind, model string) {
	kind, model, _ = strings.Cut(name, "/")
	return kind, model
}

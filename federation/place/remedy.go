package place

import (
	"fmt"
	"math"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// remedies are the smallest changes after which the cluster could take one more:
// one for each fault that keeps it out, and room where that is lacking. None where
// it could anyway.
func (d *decision) remedies(x *cell) []Remedy {
	if d.frozen || d.plain.GetExclusive() && (d.missing == 0 || d.leaves()) || d.duplicated() && x.n >= d.want || d.isDaemon() && x.n > 0 {
		return nil
	}
	var out []Remedy
	out = append(out, d.moreDevices(x)...)
	for _, f := range x.faults {
		if r := d.remedy(x, f); r.Code != "" {
			out = append(out, r)
		}
	}
	if need := d.shortfall(x); need != (api.Resources{}) {
		out = append(out, Remedy{Code: Capacity, Amount: need, Message: "free " + amount(need) + d.capacityName()})
	}
	if d.isDaemon() || d.duplicated() {
		return out
	}
	for j := range d.spreads {
		out = append(out, d.loosen(x, j)...)
	}
	return out
}

// remedy lifts one fault.
func (d *decision) remedy(x *cell, f fault) Remedy {
	r := Remedy{Code: f.code, Key: f.key, Value: f.value}
	name := f.key
	if f.value != "" {
		name += "=" + f.value
	}
	switch f.code {
	case Residency:
		r.Message = "add region " + f.key + " to the tenant's allowed_regions"
	case NotAllowed:
		r.Message = "add region " + f.key + " to spec.placement.allowed_regions"
	case Forbidden:
		r.Message = "take region " + f.key + " out of spec.placement.forbidden_regions"
	case ClusterNotAllowed:
		r.Message = "add " + f.key + " to spec.placement.allowed_clusters"
	case ClusterForbidden:
		r.Message = "take " + f.key + " out of spec.placement.forbidden_clusters"
	case Selector:
		r.Message = "label the cluster " + name
	case Taint, Staying:
		r.Message = "tolerate taint " + name
	case NoGroup:
		r.Message = "add a group with the cluster to spec.placement.fallbacks"
		r.Key = x.ID
	case NoWeight:
		r.Message = "give the cluster a weight in spec.placement.weights"
		r.Key = x.ID
	case Affinity:
		r.Message = "drop the affinity to workload " + f.key
	case AntiAffinity:
		r.Message = "drop the anti-affinity to workload " + f.key
		if f.have == "theirs" {
			r.Message = "drop the anti-affinity of workload " + f.key + " to this one"
		}
	case Cordoned:
		r.Message = "uncordon the cluster"
	case Lost:
		if !f.at.IsZero() {
			return Remedy{}
		}
		r.Message = "connect the cluster again"
	case Pending:
		r.Message = "join the cluster"
	default: // a wish keeps nothing out, and moreDevices speaks of devices
		return Remedy{}
	}
	return r
}

// moreDevices are the devices that are missing for one more unit.
func (d *decision) moreDevices(x *cell) []Remedy {
	var out []Remedy
	replicas := (x.n + x.extra + 1) * d.running
	for _, r := range d.w.Spec.GetScheduling().GetDevices() {
		if devicesFor(r, x.Cluster) >= replicas {
			continue
		}
		whole := &portolanv1.DeviceRequest{Kind: r.GetKind(), Count: 1, Models: r.GetModels()}
		need := replicas * max(1, int(r.GetCount()))
		if r.GetShareMilli() > 0 {
			each := 1000 / int(r.GetShareMilli())
			need = (replicas + each - 1) / each
		}
		need -= devicesFor(whole, x.Cluster)
		name := kindOf(r)
		if m := modelsOf(r); m != "" {
			name += " " + m
		}
		out = append(out, Remedy{Code: Device, Key: kindOf(r), Value: modelsOf(r), Number: need, Message: fmt.Sprintf("add %d devices of %s", need, name)})
	}
	return out
}

// shortfall is how much more must be free for one more unit.
func (d *decision) shortfall(x *cell) api.Resources {
	next, free := x.claim(x.n+x.extra+1), d.free(x).Add(x.gained)
	if d.isDaemon() {
		next = d.daemonClaim(x)
	}
	if !d.isDaemon() && x.n+x.extra < x.had+x.hadExtra && next.Fits(x.Previous.Claim) {
		return api.Resources{}
	}
	need := minus(next, free)
	return api.Resources{CPUMilli: max(0, need.CPUMilli), MemoryBytes: max(0, need.MemoryBytes)}
}

func amount(r api.Resources) string {
	var parts []string
	if r.CPUMilli > 0 {
		parts = append(parts, fmt.Sprintf("%dm CPU", r.CPUMilli))
	}
	if r.MemoryBytes > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes of memory", r.MemoryBytes))
	}
	return strings.Join(parts, " and ")
}

// loosen is the least bound of a spread with which one more fits beside what is
// placed now.
func (d *decision) loosen(x *cell, j int) []Remedy {
	s, g := &d.spreads[j], d.of(x, j)
	if s.prefer || d.missing == 0 || d.leaves() {
		return nil
	}
	if j >= d.declared {
		if g.n+1 <= s.most {
			return nil
		}
		return []Remedy{{Code: Spread, Index: j, Number: 0, Message: "drop the anti-affinity to itself over " + plural(s.over)}}
	}
	if s.skew == math.MaxInt {
		return nil
	}
	low, high := s.extremes()
	if g.n == 0 {
		low = 1
	}
	need := max(high, g.n+1) - min(low, g.n+1)
	if need <= s.skew {
		return nil
	}
	return []Remedy{{Code: Spread, Index: j, Number: need, Message: fmt.Sprintf("raise max_skew of %s to %d", d.spreadField(j), need)}}
}

package autoscale

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// suits says whether an empty node of a pool could take one replica, or why not.
func suits(p *Pool, s *Shape) (*portolanv1.Reason, bool) {
	refuse := func(code, format string, args ...any) (*portolanv1.Reason, bool) {
		return &portolanv1.Reason{Code: code, Message: fmt.Sprintf(format, args...)}, false
	}
	switch {
	case p.Spot && s.Capacity != portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY && s.Capacity != portolanv1.CapacityType_CAPACITY_TYPE_SPOT_PREFERRED:
		return refuse(NotOnSpot, "its nodes may be taken back at any time")
	case !p.Spot && s.Capacity == portolanv1.CapacityType_CAPACITY_TYPE_SPOT_ONLY:
		return refuse(SpotOnly, "its nodes are not spot nodes")
	case !labelled(p.Labels, s):
		return refuse(LabelMismatch, "its nodes do not have the labels")
	}
	for _, t := range p.Taints {
		if t.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_PREFER_NO_SCHEDULE && !tolerated(t, s.Tolerations) {
			return refuse(PoolTainted, "taint %s=%s is not tolerated", t.GetKey(), t.GetValue())
		}
	}
	r := newRoom(p)
	if !r.devices(s, false) {
		return refuse(NoSuchDevice, "its nodes do not have the devices")
	}
	if r.take(s, 1) == 0 {
		return refuse(NodeTooSmall, "%dm of CPU and %d MiB do not fit a node of %dm and %d MiB", s.Request.CPUMilli, s.Request.MemoryBytes>>20, p.Size.CPUMilli, p.Size.MemoryBytes>>20)
	}
	return nil, true
}

func labelled(labels map[string]string, s *Shape) bool {
	for k, v := range s.Selector {
		if labels[k] != v {
			return false
		}
	}
	if len(s.Affinity) == 0 {
		return true
	}
	return slices.ContainsFunc(s.Affinity, func(t *portolanv1.RequirementTerm) bool {
		return !slices.ContainsFunc(t.GetRequirements(), func(r *portolanv1.Requirement) bool { return !meets(labels, r) })
	})
}

func meets(labels map[string]string, r *portolanv1.Requirement) bool {
	v, has := labels[r.GetKey()]
	switch r.GetOperator() {
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_IN:
		return has && slices.Contains(r.GetValues(), v)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_IN:
		return !has || !slices.Contains(r.GetValues(), v)
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_EXISTS:
		return has
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_NOT_EXISTS:
		return !has
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_GREATER:
		d, ok := distance(v, r)
		return ok && d > 0
	case portolanv1.RequirementOperator_REQUIREMENT_OPERATOR_LESS:
		d, ok := distance(v, r)
		return ok && d < 0
	default:
		return false
	}
}

// distance compares a label with the one value as integers.
func distance(label string, r *portolanv1.Requirement) (int, bool) {
	if len(r.GetValues()) != 1 {
		return 0, false
	}
	a, errA := strconv.ParseInt(label, 10, 64)
	b, errB := strconv.ParseInt(r.GetValues()[0], 10, 64)
	if errA != nil || errB != nil {
		return 0, false
	}
	switch {
	case a > b:
		return 1, true
	case a < b:
		return -1, true
	}
	return 0, true
}

func tolerated(t *portolanv1.Taint, all []*portolanv1.Toleration) bool {
	return slices.ContainsFunc(all, func(x *portolanv1.Toleration) bool {
		return x.GetKey() == t.GetKey() && (x.GetValue() == "" || x.GetValue() == t.GetValue()) &&
			(x.GetEffect() == portolanv1.TaintEffect_TAINT_EFFECT_UNSPECIFIED || x.GetEffect() == t.GetEffect())
	})
}

func deviceMatches(d *portolanv1.DeviceRequest, s DeviceStock) bool {
	kind := d.GetKind()
	if kind == "" {
		kind = "gpu"
	}
	return kind == s.Kind && (len(d.GetModels()) == 0 || slices.Contains(d.GetModels(), s.Model))
}

// room is what of a node is free.
type room struct {
	cpu, memory, storage int64
	// free thousandths of each device, and which it is.
	free  []int32
	stock []DeviceStock
}

func newRoom(p *Pool) *room {
	r := &room{cpu: p.Size.CPUMilli, memory: p.Size.MemoryBytes, storage: p.StorageBytes}
	for _, s := range p.Devices {
		for range s.Count {
			r.free, r.stock = append(r.free, 1000), append(r.stock, s)
		}
	}
	return r
}

// take puts up to n replicas in, and gives how many.
func (r *room) take(s *Shape, n int) int {
	for _, of := range [][2]int64{{r.cpu, s.Request.CPUMilli}, {r.memory, s.Request.MemoryBytes}, {r.storage, s.StorageBytes}} {
		if of[1] > 0 {
			n = int(min(int64(n), max(0, of[0])/of[1]))
		}
	}
	if len(s.Devices) > 0 {
		got := 0
		for got < n && r.devices(s, true) {
			got++
		}
		n = got
	}
	r.cpu -= int64(n) * s.Request.CPUMilli
	r.memory -= int64(n) * s.Request.MemoryBytes
	r.storage -= int64(n) * s.StorageBytes
	return n
}

// hold puts a replica in that is there already, whether it fits or not.
func (r *room) hold(s *Shape) {
	r.cpu -= s.Request.CPUMilli
	r.memory -= s.Request.MemoryBytes
	r.storage -= s.StorageBytes
	r.devices(s, true)
}

// devices finds the devices of one replica, and takes them when told to. A share
// goes where it leaves the least.
func (r *room) devices(s *Shape, keep bool) bool {
	free := slices.Clone(r.free)
	for _, d := range s.Devices {
		if !grab(free, r.stock, d) {
			return false
		}
	}
	if keep {
		r.free = free
	}
	return true
}

func grab(free []int32, stock []DeviceStock, d *portolanv1.DeviceRequest) bool {
	if d.GetCount() > 0 {
		need := d.GetCount()
		for i := range free {
			if need > 0 && free[i] == 1000 && deviceMatches(d, stock[i]) {
				free[i] = 0
				need--
			}
		}
		return need == 0
	}
	best := -1
	for i := range free {
		if free[i] >= d.GetShareMilli() && deviceMatches(d, stock[i]) && (best < 0 || free[i] < free[best]) {
			best = i
		}
	}
	if best < 0 {
		return false
	}
	free[best] -= d.GetShareMilli()
	return true
}

// waste is the mean part that stays empty, over what the pool's nodes have.
func (r *room) waste(p *Pool) float64 {
	sum, kinds := 0.0, 0
	add := func(free, all int64) {
		if all > 0 {
			sum += float64(free) / float64(all)
			kinds++
		}
	}
	add(r.cpu, p.Size.CPUMilli)
	add(r.memory, p.Size.MemoryBytes)
	free := int64(0)
	for _, f := range r.free {
		free += int64(f)
	}
	add(free, int64(len(r.free))*1000)
	return sum / float64(max(kinds, 1))
}

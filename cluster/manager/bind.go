package manager

import (
	"fmt"
	"hash/fnv"
	"net/netip"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/reconcile"
	"github.com/portolan-io/portolan/cluster/schedule"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// Hosts of a node's /24 that replicas get.
const (
	firstHost = 2
	lastHost  = 254
)

// address gives a free one of a node, beginning at a place that the name of the
// replica says, so that an address is not used again at once.
func (d *decider) address(node, allocation string) (string, error) {
	p, err := netip.ParsePrefix(d.s.Nodes[node].GetReplicaCidr())
	if err != nil {
		return "", fmt.Errorf("range of node %s: %w", node, err)
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(allocation))
	base := p.Masked().Addr().As4()
	const hosts = lastHost - firstHost + 1
	for i := range uint32(hosts) {
		base[3] = byte(firstHost + (h.Sum32()%hosts+i)%hosts)
		ip := netip.AddrFrom4(base)
		if _, used := d.m.mirror.taken[node][ip]; used || d.taken[ip] {
			continue
		}
		d.taken[ip] = true
		return ip.String(), nil
	}
	return "", fmt.Errorf("range %s of node %s is used up", p, node)
}

// bind makes the record of a new replica, and those of its volumes.
func (d *decider) bind(st *reconcile.Step, to schedule.Binding) {
	w, spec := st.Workload, st.Revision.GetSpec()
	id := st.Name
	if id == "" {
		id = d.name(st.Key.Workload)
	}
	if d.s.Allocations[id] != nil {
		return // its name is free when the record of the one before is gone, which wakes the next pass
	}
	address := d.s.Nodes[to.Node].GetFacts().GetAddress()
	if !isGateway(spec) {
		var err error
		if address, err = d.address(to.Node, id); err != nil {
			d.m.cfg.Log.Error("node has no address for a replica", "node", to.Node, "error", err)
			return
		}
	}
	at := w.Committed
	if at.IsZero() {
		at = d.now
	}
	a := &clusterv1.Allocation{
		Allocation: id, Tenant: st.Key.Tenant, Workload: st.Key.Workload, Revision: st.Revision.GetRevision(), Epoch: w.Intent.GetEpoch(),
		Node: to.Node, Address: address, Spec: spec, AtCluster: timestamppb.New(at), Bound: d.stamp, Index: st.Index, Run: st.Run,
		FederationRevision: w.Revision, Uid: w.Intent.GetUid(), Volumes: d.bindVolumes(st, to.Node),
	}
	for _, s := range to.Devices {
		a.Devices = append(a.Devices, &nodev1.DeviceShare{Kind: s.Kind, Index: s.Index, Milli: s.Milli})
	}
	d.keep(id, a)
	d.event(st.Key, id, "Bound", st.Code+": "+st.Reason)
	if st.Allocation != "" {
		old := d.edit(st.Allocation)
		old.ReplacedBy = id
		if st.Code == reconcile.NodeLost {
			old.EvictTime = a.GetBound()
		}
		old.Disrupted = old.GetDisrupted() || st.Disrupt
		d.event(st.Key, st.Allocation, "Replaced", "by "+id+": "+st.Reason)
	}
}

// volumeID names a volume of a stateful replica.
func volumeID(k reconcile.Key, index int32, name string) string {
	return fmt.Sprintf("%s.%s-%d.%s", k.Tenant, k.Workload, index, name)
}

// volumesOf gives the IDs of a replica's volumes; here says that all of them are
// there.
func (d *decider) volumesOf(st *reconcile.Step) (ids []string, here bool) {
	here = true
	for _, v := range st.Revision.GetSpec().GetVolumes() {
		id := volumeID(st.Key, st.Index, v.GetName())
		ids = append(ids, id)
		here = here && d.s.Volumes[id] != nil && !d.s.Volumes[id].GetDelete()
	}
	return ids, here && len(ids) > 0
}

// bindVolumes makes the records of the volumes that a replica does not have yet: its
// first node keeps them.
func (d *decider) bindVolumes(st *reconcile.Step, node string) []string {
	ids, _ := d.volumesOf(st)
	for i, v := range st.Revision.GetSpec().GetVolumes() {
		if was := d.s.Volumes[ids[i]]; was != nil && !was.GetDelete() {
			continue
		}
		size, err := api.ParseBytes(v.GetSize())
		if err != nil {
			d.m.cfg.Log.Error("size of a volume does not parse", "volume", ids[i], "error", err) // the class was compiled of it
		}
		d.volumes[ids[i]] = &clusterv1.Volume{
			Volume: ids[i], Tenant: st.Key.Tenant, Workload: st.Key.Workload, Uid: st.Workload.Intent.GetUid(), Index: st.Index, Name: v.GetName(),
			Node: node, SizeBytes: size, CreateTime: d.stamp,
		}
	}
	return ids
}

const (
	nameLetters = "abcdefghijklmnopqrstuvwxyz0123456789"
	nameRandom  = 5
	// maxStem keeps the name of a replica within the 40 characters of an ID.
	maxStem = 40 - 1 - nameRandom
)

// name gives a new name to a replica.
func (d *decider) name(workload string) string {
	stem := workload[:min(len(workload), maxStem)]
	for {
		b := []byte(stem + "-")
		for range nameRandom {
			b = append(b, nameLetters[d.m.rand.IntN(len(nameLetters))])
		}
		_, used := d.s.Allocations[string(b)]
		if _, fresh := d.put[string(b)]; !used && !fresh {
			return string(b)
		}
	}
}

package fleet

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// speaksOf says whether a status record is of the cluster with that unique ID.
// Records that name none are from before they did.
func speaksOf(s *storev1.ClusterStatusRecord, uid string) bool {
	return s.GetUid() == "" || s.GetUid() == uid
}

// departed says whether a cluster is no longer in the fleet, or what is said of it
// is of an earlier life of its name.
func departed(get func(store.Kind, string) (store.Record, bool), cluster string) bool {
	rec, ok := get(store.Cluster, api.ClusterName(cluster))
	if !ok {
		return true
	}
	c, _ := rec.Message.(*portolanv1.Cluster)
	rec, _ = get(store.ClusterStatus, api.ClusterName(cluster))
	s, _ := rec.Message.(*storev1.ClusterStatusRecord)
	return !speaksOf(s, c.GetUid())
}

// leftovers are the deletions of all that departed clusters reported, by cluster.
// The cluster's own status goes last: until then nothing new is taken of its name.
func leftovers(v *store.View) map[string][]write {
	gone, out := map[string]bool{}, map[string][]write{}
	drop := func(cluster string, kind store.Kind, name string) {
		is, known := gone[cluster]
		if !known {
			is = departed(v.Get, cluster)
			gone[cluster] = is
		}
		if is {
			out[cluster] = append(out[cluster], write{kind, name, nil})
		}
	}
	for rec := range v.List(store.PlacementStatus, store.ListOptions{}) {
		drop(rec.Name[strings.LastIndexByte(rec.Name, '/')+1:], rec.Kind, rec.Name)
	}
	for name, e := range store.All[*linkv1.ServiceExport](v, store.ServiceExport) {
		drop(e.GetCluster(), store.ServiceExport, name)
	}
	for name, n := range store.All[*storev1.NackRecord](v, store.Nack) {
		drop(n.GetCluster(), store.Nack, name)
	}
	for rec := range v.List(store.ClusterStatus, store.ListOptions{}) {
		drop(strings.TrimPrefix(rec.Name, "clusters/"), rec.Kind, rec.Name)
	}
	return out
}

// lives names the clusters of a view, each with its life. What a cluster reports
// is written only while it is in the fleet: so there are new leftovers only when
// this changed.
func lives(v *store.View) string {
	var b strings.Builder
	for name, c := range store.All[*portolanv1.Cluster](v, store.Cluster) {
		b.WriteString(name + " " + c.GetUid() + "\n")
	}
	return b.String()
}

// forget deletes what departed clusters left, if this replica holds the lease.
// swept are the lives for which nothing was left; it returns the new ones.
func (f *Fleet) forget(ctx context.Context, swept string) string {
	v := f.mirror.Snapshot()
	now := lives(v)
	if v.Revision < 0 || now == swept {
		return swept
	}
	left := leftovers(v)
	if len(left) == 0 {
		return now
	}
	lease, err := f.cfg.Store.Acquire(ctx, LivenessLease, f.cfg.Replica, f.cfg.LivenessTimeout, f.Revision())
	if err != nil || !lease.Held {
		return swept
	}
	for _, c := range slices.Sorted(maps.Keys(left)) {
		for batch := range slices.Chunk(left[c], writeBatch) {
			if err := f.forgetBatch(ctx, lease.Epoch, c, batch); err != nil {
				f.log.Warn("a departed cluster's records not deleted", "cluster", c, "error", err)
				return swept
			}
		}
		f.log.Info("a departed cluster's records deleted", "cluster", c, "records", len(left[c]))
	}
	return swept // the next look finds nothing, or what came meanwhile
}

func (f *Fleet) forgetBatch(ctx context.Context, epoch int64, cluster string, batch []write) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	_, err := f.cfg.Store.Update(ctx, func(tx store.Tx) error {
		if err := tx.CheckLease(LivenessLease, epoch); err != nil {
			return err
		}
		var failed error
		still := departed(func(k store.Kind, name string) (store.Record, bool) {
			rec, err := tx.Get(k, name)
			if err != nil && api.KindOf(err) != api.NotFound {
				failed = err
			}
			return rec, err == nil
		}, cluster)
		if failed != nil || !still {
			return failed
		}
		for _, w := range batch {
			if err := applyWrite(tx, w); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

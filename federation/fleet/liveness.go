package fleet

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
)

// LivenessLease is the lease under which one replica marks clusters as lost, and
// deletes what departed ones left.
const LivenessLease = "fleet/liveness"

// observer judges silence by this process's own clock: a cluster is silent when
// its lease row was not renewed for the bound while this process could see it.
// The rows' own times are only compared with each other, so clocks of replicas
// and of the store need not agree. Owned by one goroutine.
type observer struct {
	timeout time.Duration
	last    time.Time // of the last successful look
	renewed map[string]mark
}

// renewalShare of the bound is the least move of a row that counts as a renewal:
// with 3 s it is 250 ms, and clusters report every second.
const renewalShare = 12

type mark struct {
	expires time.Time // in the row
	at      time.Time // when that was first seen
}

// look takes the rows in and returns the silent ones among clusters. After a gap
// in looking every cluster gets the full bound again: silence that nobody
// watched is no silence.
func (o *observer) look(now time.Time, clusters []string, leases []store.Lease) (silent []string) {
	rows := map[string]time.Time{}
	for _, l := range leases {
		rows[l.Name] = l.Expires
	}
	if o.renewed == nil || now.Sub(o.last) > o.timeout/2 {
		o.renewed = map[string]mark{}
	}
	o.last = now
	next := make(map[string]mark, len(clusters))
	for _, c := range clusters {
		expires := rows[LeaseOf(c)]
		m, ok := o.renewed[c]
		// A store gives the end of a lease by its own clock and what is left of it, so
		// the same row reads a little differently each time. A renewal moves it by the
		// time between two reports, which is longer.
		if !ok || expires.Sub(m.expires) > o.timeout/renewalShare {
			m = mark{expires: expires, at: now}
		}
		next[c] = m
		if now.Sub(m.at) > o.timeout {
			silent = append(silent, c)
		}
	}
	o.renewed = next
	return silent
}

// watchLiveness marks silent clusters as lost and forgets departed ones, if this
// replica holds the lease. Every replica looks all the time, so that a successor need not begin anew.
func (f *Fleet) watchLiveness(ctx context.Context) error {
	o := &observer{timeout: f.cfg.LivenessTimeout}
	tick := time.NewTicker(f.cfg.LivenessTimeout / 12)
	defer tick.Stop()
	dark, swept := false, ""
	var out outage
	var next time.Time // before it the store is left alone
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
			_ = f.cfg.Store.Release(rctx, LivenessLease, f.cfg.Replica) // it expires by itself
			cancel()
			return nil
		}
		if time.Now().Before(next) {
			continue
		}
		ready, lost := f.known()
		tctx, cancel := context.WithTimeout(ctx, f.cfg.LivenessTimeout/4)
		var err error
		dark, err = f.judge(tctx, o, ready, lost, dark)
		cancel()
		if err != nil && ctx.Err() == nil {
			first, wait := out.failed()
			if first {
				f.log.Warn("signs of life cannot be read: no cluster is judged", "error", err)
			}
			next = time.Now().Add(wait)
			continue
		}
		if out.worked() {
			f.log.Info("signs of life are read again")
		}
		swept = f.forget(ctx, swept)
	}
}

// judge makes one look and acts on it. It returns whether everything looks dead,
// and an error when the store did not answer: without it nothing is known and
// nothing can be said.
func (f *Fleet) judge(ctx context.Context, o *observer, ready, lost []string, dark bool) (bool, error) {
	lease, err := f.cfg.Store.Acquire(ctx, LivenessLease, f.cfg.Replica, f.cfg.LivenessTimeout, f.Revision())
	if err != nil {
		return dark, err
	}
	leases, err := f.cfg.Store.Leases(ctx)
	if err != nil {
		return dark, err
	}
	silent := o.look(time.Now(), ready, leases)
	if len(silent) == 0 {
		return false, nil
	}
	if len(silent) == len(ready) {
		// If everything looks dead, the observer is broken: stop acting. With one
		// cluster left there is nowhere to fail over to, either.
		if !dark {
			f.log.Error("every cluster is silent: nothing is done", "alarm", true, "silent", silent, "lost_before", lost)
		}
		return true, nil
	}
	if !lease.Held {
		return false, nil
	}
	for _, c := range silent {
		if err := f.markLost(ctx, c, lease.Epoch, o.renewed[c].at); err != nil {
			f.log.Warn("cluster not marked as lost", "cluster", c, "error", err)
		}
	}
	return false, nil
}

// known gives the clusters that are ready and those that are lost.
func (f *Fleet) known() (ready, lost []string) {
	v := f.mirror.Snapshot()
	for name, s := range store.All[*storev1.ClusterStatusRecord](v, store.ClusterStatus) {
		ids, err := api.ParseName(name, api.ClusterPattern)
		if err != nil {
			continue
		}
		if _, ok := v.Get(store.Cluster, name); !ok {
			continue
		}
		switch s.GetStatus().GetState() {
		case portolanv1.ClusterState_CLUSTER_STATE_READY:
			ready = append(ready, ids[0])
		case portolanv1.ClusterState_CLUSTER_STATE_LOST:
			lost = append(lost, ids[0])
		default: // has never joined
		}
	}
	return ready, lost
}

// markLost writes the loss and takes the health of the cluster's exports and the
// readiness of its replicas away, in one transaction under the lease.
func (f *Fleet) markLost(ctx context.Context, cluster string, epoch int64, lastSeen time.Time) error {
	now, marked := time.Now(), false
	rev, err := f.cfg.Store.Update(ctx, func(tx store.Tx) error {
		marked = false
		if err := tx.CheckLease(LivenessLease, epoch); err != nil {
			return err
		}
		rec, err := tx.Get(store.ClusterStatus, api.ClusterName(cluster))
		if err != nil {
			return err
		}
		s := proto.CloneOf(rec.Message.(*storev1.ClusterStatusRecord))
		if s.GetStatus().GetState() != portolanv1.ClusterState_CLUSTER_STATE_READY {
			return nil
		}
		s.Status.State = portolanv1.ClusterState_CLUSTER_STATE_LOST
		s.Status.LastSeenTime = timestamppb.New(lastSeen)
		s.Status.Conditions = []*portolanv1.Condition{condition(portolanv1.ConditionState_CONDITION_STATE_FALSE, "Silent", "no report for "+f.cfg.LivenessTimeout.String(), now)}
		if err := tx.Put(store.ClusterStatus, rec.Name, s); err != nil {
			return err
		}
		marked = true
		if err := silenceExports(tx, cluster); err != nil {
			return err
		}
		return silencePlacements(tx, cluster, now)
	})
	if err == nil && marked {
		f.log.Error("cluster lost", "alarm", true, "cluster", cluster, "last_seen", lastSeen, "revision", rev)
	}
	return err
}

func silenceExports(tx store.Tx, cluster string) error {
	var sick []store.Record
	for rec, err := range tx.List(store.ServiceExport, store.ListOptions{}) {
		if err != nil {
			return err
		}
		if e := rec.Message.(*linkv1.ServiceExport); e.GetCluster() == cluster && e.GetHealthy() {
			sick = append(sick, rec)
		}
	}
	for _, rec := range sick {
		if err := tx.Put(rec.Kind, rec.Name, silenced(rec.Message.(*linkv1.ServiceExport))); err != nil {
			return err
		}
	}
	return nil
}

// silencePlacements makes replicas that cannot be seen count as not ready. The
// cluster's next report says what is so.
func silencePlacements(tx store.Tx, cluster string, now time.Time) error {
	var seen []store.Record
	for rec, err := range tx.List(store.PlacementStatus, store.ListOptions{}) {
		if err != nil {
			return err
		}
		if strings.HasSuffix(rec.Name, "/placements/"+cluster) {
			seen = append(seen, rec)
		}
	}
	for _, rec := range seen {
		m := proto.CloneOf(rec.Message.(*storev1.PlacementStatusRecord))
		for _, r := range m.GetStatus().GetRevisions() {
			r.ReadyReplicas, r.AvailableReplicas = 0, nil
		}
		if m.Status != nil {
			unknown := condition(portolanv1.ConditionState_CONDITION_STATE_UNKNOWN, "ClusterLost", "the cluster is silent", now)
			unknown.Type = "Available"
			m.Status.Conditions = []*portolanv1.Condition{unknown}
		}
		if err := tx.Put(rec.Kind, rec.Name, m); err != nil {
			return err
		}
	}
	return nil
}

package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"sort"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/policy/bundle"
)

// writeBeside writes what goes with an object in its transaction, and sets the
// parts of its status that are stored with it.
func (s *Server) writeBeside(tx store.Tx, ch *change, next, old object, now time.Time) error {
	switch o := next.(type) {
	case *portolanv1.Workload:
		return s.writeRevision(tx, o, old, now)
	case *portolanv1.Service:
		return s.writeVirtualIP(tx, ch, o, now)
	case *portolanv1.PolicyBundle:
		o.Status = &portolanv1.PolicyBundleStatus{Digest: bundle.Digest(o.GetSpec().GetFiles())}
	}
	return nil
}

// dropBeside removes what goes with a deleted object.
func (s *Server) dropBeside(tx store.Tx, old object, now time.Time) error {
	switch o := old.(type) {
	case *portolanv1.Workload:
		names, err := namesUnder(tx, store.Revision, o.GetName()+"/revisions/")
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := tx.Delete(store.Revision, n); err != nil {
				return err
			}
		}
	case *portolanv1.Service:
		ip := o.GetStatus().GetVirtualIp()
		if ip == "" {
			return nil
		}
		return tx.Put(store.VirtualIP, ip, &storev1.VirtualIP{Service: o.GetName(), ReleaseTime: timestamppb.New(now.Add(virtualIPQuarantine))})
	case *portolanv1.Cluster:
		return s.dropCluster(tx, lastID(o.GetName()))
	}
	return nil
}

// dropCluster takes back what let a cluster in: its domain is trusted by nobody
// from now on, and its unused tokens are void.
func (s *Server) dropCluster(tx store.Tx, cluster string) error {
	domain := identity.ClusterDomain(s.cfg.Fleet, cluster)
	if err := tx.Delete(store.TrustBundle, domain); err != nil && api.KindOf(err) != api.NotFound {
		return err
	}
	var tokens []string
	g := &gatherer{r: tx}
	each(g, store.JoinToken, store.ListOptions{}, func(hash string, t *storev1.JoinToken) {
		if t.GetCluster() == cluster {
			tokens = append(tokens, hash)
		}
	})
	if g.err != nil {
		return g.err
	}
	for _, hash := range tokens {
		if err := tx.Delete(store.JoinToken, hash); err != nil {
			return err
		}
	}
	return nil
}

func namesUnder(r store.Reader, kind store.Kind, prefix string) ([]string, error) {
	var names []string
	for rec, err := range r.List(kind, store.ListOptions{Prefix: prefix}) {
		if err != nil {
			return nil, err
		}
		names = append(names, rec.Name)
	}
	return names, nil
}

// writeRevision makes the revision that the spec stands for, if its template is
// new, and forgets old ones that nothing refers to.
func (s *Server) writeRevision(tx store.Tx, w *portolanv1.Workload, old object, now time.Time) error {
	before, _ := old.(*portolanv1.Workload)
	current := before.GetStatus().GetCurrentRevision()
	same := before != nil && admit.TemplateHash(before.GetSpec()) == admit.TemplateHash(w.GetSpec())
	id := w.GetSpec().GetRevision()
	switch {
	case id == "" && same:
		id = current
	case id == "":
		id = fmt.Sprintf("r%d", w.GetGeneration())
	}
	w.Status = &portolanv1.WorkloadStatus{CurrentRevision: id}
	name := w.GetName() + "/revisions/" + id
	rec, err := tx.Get(store.Revision, name)
	switch {
	case err == nil:
		if got, ok := rec.Message.(*portolanv1.WorkloadRevision); !ok || admit.TemplateHash(got.GetSpec()) != admit.TemplateHash(w.GetSpec()) {
			return api.InvalidFields("write "+name, []api.Violation{{Field: "spec.revision", Message: fmt.Sprintf("revision %q already stands for another template: choose a new name", id)}})
		}
	case api.KindOf(err) == api.NotFound:
		rev := &portolanv1.WorkloadRevision{
			Name: name, Uid: s.cfg.NewUID(), Generation: 1, Labels: w.GetLabels(), Spec: proto.CloneOf(w.GetSpec()),
			CreateTime: timestamppb.New(now), UpdateTime: timestamppb.New(now),
		}
		rev.Etag = etagOf(rev)
		if err := tx.Put(store.Revision, name, rev); err != nil {
			return err
		}
	default:
		return err
	}
	return s.trimRevisions(tx, w, id)
}

// trimRevisions keeps the newest unreferenced old revisions.
func (s *Server) trimRevisions(tx store.Tx, w *portolanv1.Workload, current string) error {
	tenant, id := api.TenantOf(w.GetName()), lastID(w.GetName())
	g := &gatherer{r: tx, snap: &admit.Snapshot{}}
	var revs []*portolanv1.WorkloadRevision
	each(g, store.Revision, store.ListOptions{Prefix: w.GetName() + "/revisions/"}, func(_ string, m *portolanv1.WorkloadRevision) { revs = append(revs, m) })
	if g.err != nil || len(revs) <= maxOldRevisions+1 {
		return g.err
	}
	g.services(tenant)
	g.routes(tenant)
	kept := admit.ReferencedRevisions(id, g.snap.Services, g.snap.Routes)
	kept[current] = true
	each(g, store.Rollout, store.ListOptions{Prefix: w.GetName()}, func(name string, r *storev1.Rollout) {
		if name == w.GetName() {
			kept[r.GetStatus().GetStable()], kept[r.GetStatus().GetActive()], kept[r.GetKeep()] = true, true, true
		}
	})
	each(g, store.Placement, store.ListOptions{Prefix: w.GetName() + "/placements/"}, func(_ string, p *portolanv1.Placement) {
		for _, r := range p.GetSpec().GetRevisions() {
			kept[r.GetRevision()] = true
		}
	})
	if g.err != nil {
		return g.err
	}
	sort.SliceStable(revs, func(i, j int) bool { return revs[i].GetCreateTime().AsTime().After(revs[j].GetCreateTime().AsTime()) })
	old := 0
	for _, r := range revs {
		if kept[lastID(r.GetName())] {
			continue
		}
		if old++; old > maxOldRevisions {
			if err := tx.Delete(store.Revision, r.GetName()); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeVirtualIP gives a new service its address and every service its host name.
func (s *Server) writeVirtualIP(tx store.Tx, ch *change, svc *portolanv1.Service, now time.Time) error {
	host := api.Hostname(api.TenantOf(svc.GetName()), lastID(svc.GetName()))
	if ip := svc.GetStatus().GetVirtualIp(); ip != "" {
		svc.Status = &portolanv1.ServiceStatus{VirtualIp: ip, Hostname: host}
		return nil
	}
	ip, err := s.freeVirtualIP(tx, ch, svc.GetName(), now)
	if err != nil {
		return err
	}
	svc.Status = &portolanv1.ServiceStatus{VirtualIp: ip, Hostname: host}
	return tx.Put(store.VirtualIP, ip, &storev1.VirtualIP{Service: svc.GetName()})
}

// errCrowded says that the probes of a transaction met taken addresses only: a gap
// must be looked for outside of it.
var errCrowded = errors.New("no free address near where the service's name points")

// maxProbes bounds the reads of a transaction that looks for an address: it has
// the whole fleet's writes waiting.
const maxProbes = 64

// addresses are the virtual IPs, by offset. The first and the last address of the
// range are not given.
func (s *Server) addresses() (count uint32, at func(offset uint32) string) {
	base := binary.BigEndian.Uint32(s.cfg.VirtualIPs.Addr().AsSlice())
	return uint32(1)<<(32-s.cfg.VirtualIPs.Bits()) - 2, func(offset uint32) string {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], base+1+offset)
		return netip.AddrFrom4(b).String()
	}
}

// preferred is the offset that a service's name gives: so one that comes back
// finds its old address, and bursts do not meet.
func (s *Server) preferred(service string) uint32 {
	count, _ := s.addresses()
	h := fnv.New32a()
	_, _ = h.Write([]byte(service))
	return h.Sum32() % count
}

// mayTake says whether a service may have an address of which that record is.
func mayTake(held *storev1.VirtualIP, service string, now time.Time) bool {
	t := held.GetReleaseTime()
	return t != nil && (held.GetService() == service || now.After(t.AsTime()))
}

// freeVirtualIP probes from the preferred address on, or from the gap that was
// found outside the transaction.
func (s *Server) freeVirtualIP(r store.Reader, ch *change, service string, now time.Time) (string, error) {
	count, at := s.addresses()
	start := s.preferred(service)
	if ch.gap != nil {
		start = *ch.gap
	}
	for i := range min(count, maxProbes) {
		ip := at((start + i) % count)
		rec, err := r.Get(store.VirtualIP, ip)
		if err != nil && api.KindOf(err) == api.NotFound {
			return ip, nil
		}
		if err != nil {
			return "", err
		}
		held, ok := rec.Message.(*storev1.VirtualIP)
		if !ok {
			return "", api.E(api.Internal, "find a virtual IP", "record holds a %T", rec.Message)
		}
		if mayTake(held, service, now) {
			return ip, nil
		}
	}
	if count > maxProbes {
		return "", errCrowded
	}
	return "", s.allTaken()
}

func (s *Server) allTaken() error {
	return api.E(api.Exhausted, "find a virtual IP", "every address of %s is taken", s.cfg.VirtualIPs)
}

// findGap reads which addresses are taken, on a snapshot, and gives the first free
// one from the preferred on.
func (s *Server) findGap(ctx context.Context, service string, now time.Time) (uint32, error) {
	taken := map[string]bool{}
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		clear(taken)
		for rec, err := range r.List(store.VirtualIP, store.ListOptions{}) {
			if err != nil {
				return err
			}
			if held, ok := rec.Message.(*storev1.VirtualIP); !ok || !mayTake(held, service, now) {
				taken[rec.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	count, at := s.addresses()
	start := s.preferred(service)
	for i := range count {
		if offset := (start + i) % count; !taken[at(offset)] {
			return offset, nil
		}
	}
	return 0, s.allTaken()
}

// resultKey is where the first result of a request ID is kept.
func resultKey(ch *change) string { return ch.c.actor + "/" + ch.requestID }

// earlier gives the result of the same request, when it was carried out before.
func (s *Server) earlier(r store.Reader, ch *change) (proto.Message, error) {
	if ch.requestID == "" || ch.dry {
		return nil, nil
	}
	rec, err := r.Get(store.RequestResult, resultKey(ch))
	if err != nil {
		if api.KindOf(err) == api.NotFound {
			return nil, nil
		}
		return nil, err
	}
	m, ok := rec.Message.(*storev1.RequestResult)
	if !ok {
		return nil, api.E(api.Internal, ch.doing, "record holds a %T", rec.Message)
	}
	if m.GetMethod() != ch.c.method || string(m.GetRequestHash()) != hashOf(ch.request) {
		return nil, api.InvalidFields(ch.doing, []api.Violation{{Field: "request_id", Message: "was used for another request before"}})
	}
	out, err := m.GetResponse().UnmarshalNew()
	if err != nil {
		return nil, api.E(api.Internal, ch.doing, "read the first result: %w", err)
	}
	return out, nil
}

// remember keeps the result for retries of the same request.
func (s *Server) remember(tx store.Tx, ch *change, result proto.Message, now time.Time) error {
	if ch.requestID == "" {
		return nil
	}
	a, err := anypb.New(result)
	if err != nil {
		return api.E(api.Internal, ch.doing, "keep the result: %w", err)
	}
	return tx.Put(store.RequestResult, resultKey(ch), &storev1.RequestResult{
		Method: ch.c.method, RequestHash: []byte(hashOf(ch.request)), Response: a, ExpireTime: timestamppb.New(now.Add(requestResultLife)),
	})
}

// sweep is how far maintain has looked at a kind.
type sweep struct {
	kind  store.Kind
	after string
	done  bool
}

// maintain deletes all that expired. It goes through each kind in pages, each in a
// snapshot and a transaction of its own, and takes turns between the kinds: a
// backlog of one holds neither the store nor the others up.
func (s *Server) maintain(ctx context.Context, now time.Time) error {
	sweeps := []*sweep{{kind: store.RequestResult}, {kind: store.VirtualIP}, {kind: store.JoinToken}}
	var errs []error
	for busy := true; busy; {
		busy = false
		for _, w := range sweeps {
			if w.done {
				continue
			}
			if err := s.sweepPage(ctx, w, now); err != nil {
				errs = append(errs, fmt.Errorf("clear %ss: %w", w.kind, err))
				w.done = true
			}
			busy = busy || !w.done
		}
	}
	return errors.Join(errs...)
}

// sweepPage looks at the next records of a kind and deletes the expired ones.
func (s *Server) sweepPage(ctx context.Context, w *sweep, now time.Time) error {
	var old []string
	next := w.after
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		old, next = nil, w.after
		n := 0
		for rec, err := range r.List(w.kind, store.ListOptions{After: w.after, Limit: scanBatch}) {
			if err != nil {
				return err
			}
			n, next = n+1, rec.Name
			if expired(rec.Message, now) {
				old = append(old, rec.Name)
			}
		}
		w.done = n < scanBatch
		return nil
	})
	w.after = next
	if err != nil || len(old) == 0 {
		return err
	}
	_, err = s.cfg.Store.Update(ctx, func(tx store.Tx) error {
		for _, name := range old {
			rec, err := tx.Get(w.kind, name)
			switch {
			case err != nil && api.KindOf(err) == api.NotFound:
				continue
			case err != nil:
				return err
			case !expired(rec.Message, now):
				continue
			}
			if err := tx.Delete(w.kind, name); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func expired(m proto.Message, now time.Time) bool {
	t := expiry(m)
	return t != nil && now.After(t.AsTime())
}

func expiry(m proto.Message) *timestamppb.Timestamp {
	switch o := m.(type) {
	case *storev1.RequestResult:
		return o.GetExpireTime()
	case *storev1.VirtualIP:
		return o.GetReleaseTime()
	case *storev1.JoinToken:
		return o.GetExpireTime()
	}
	return nil
}

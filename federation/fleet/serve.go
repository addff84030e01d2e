package fleet

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/xds/distribute"
)

// debounce is the least time between two recomputations; the first change after a
// quiet time is served at once.
const debounce = 10 * time.Millisecond

// model is what the reporting side reads of the serving side's last pass. Never
// changed after it was published.
type model struct {
	view     *store.View
	tenants  map[string]*tenantView
	shared   []named         // what every cluster is told alike
	gateways map[string]bool // clusters with an ingress gateway
}

// fleetUnit is the part of a cluster's set that belongs to no tenant.
const fleetUnit = ""

// stepper turns changes into changes of each cluster's set. Owned by one
// goroutine.
type stepper struct {
	fleet    string
	revision int64
	roots    []byte
	tenants  map[string]*tenantView
	shared   []named // of fleetUnit, without the cluster's own
	gateways map[string]bool
	// sets holds for each cluster what it is told, by tenant (or fleetUnit), and
	// uids whose set that is.
	sets map[string]map[string]map[string]*distribute.Resource
	uids map[string]string
}

// update is what changed for one cluster.
type update struct {
	first  bool // the cluster was not known before: put is everything
	put    []*distribute.Resource
	remove []string
}

func newStepper(fleet string) *stepper {
	return &stepper{fleet: fleet, revision: -1, tenants: map[string]*tenantView{}, gateways: map[string]bool{}, sets: map[string]map[string]map[string]*distribute.Resource{}, uids: map[string]string{}}
}

// dirt is what a batch of changes makes stale.
type dirt struct {
	all     bool
	fleet   bool
	tenants map[string]bool
}

func dirtOf(changes []store.Change) dirt {
	d := dirt{tenants: map[string]bool{}}
	for _, c := range changes {
		switch c.Record.Kind {
		case store.Cluster:
			// Permits and presence depend on which clusters there are.
			d.all = true
		case store.TrustBundle:
			d.fleet = true
		case store.Tenant, store.PolicyBundle, store.Workload, store.Revision, store.Service, store.Route, store.Placement, store.PlacementStatus, store.ServiceExport:
			if t := api.TenantOf(c.Record.Name); t != "" {
				d.tenants[t] = true
			} else {
				d.fleet = true
			}
		default: // reaches no cluster
		}
	}
	return d
}

// step takes the next view. It returns the updates by cluster, the clusters that
// are gone, and faults to be told. A cluster of a name that was another's before
// is both gone and new.
func (s *stepper) step(v *store.View, roots []byte, d dirt) (updates map[string]*update, gone, problems []string) {
	if s.revision < 0 || d.all {
		d = dirt{all: true, fleet: true, tenants: map[string]bool{}}
		for _, t := range tenants(v) {
			d.tenants[t] = true
		}
		for t := range s.tenants {
			d.tenants[t] = true
		}
	}
	if d.fleet || !bytes.Equal(roots, s.roots) {
		s.shared, s.roots, d.fleet = fleetShared(v, s.fleet, roots), roots, true
	}
	clusters := map[string]store.Record{}
	for rec := range v.List(store.Cluster, store.ListOptions{}) {
		clusters[strings.TrimPrefix(rec.Name, "clusters/")] = rec
	}
	for c := range s.sets {
		rec, ok := clusters[c]
		if m, _ := rec.Message.(*portolanv1.Cluster); !ok || m.GetUid() != s.uids[c] {
			delete(s.sets, c)
			delete(s.uids, c)
			gone = append(gone, c)
		}
	}
	problems = s.resolve(v, d)
	wider := s.moveGateways()
	marshal := marshaller{}
	updates = map[string]*update{}
	for c, rec := range clusters {
		u := &update{}
		if s.sets[c] == nil {
			u.first = true
			m, _ := rec.Message.(*portolanv1.Cluster)
			s.uids[c] = m.GetUid()
			s.sets[c] = map[string]map[string]*distribute.Resource{}
		}
		if d.fleet || u.first {
			s.replace(u, c, fleetUnit, append(slices.Clone(s.shared), clusterIntent(rec, c)), marshal)
		}
		for id := range s.units(c, d, wider || u.first) {
			if t := s.tenants[id]; t != nil {
				s.replace(u, c, id, t.forCluster(c, s.gateways[c]), marshal)
			} else {
				s.replace(u, c, id, nil, marshal)
			}
		}
		u.put = append(u.put, marshal.resource(watermark(v.Revision)))
		updates[c] = u
	}
	s.revision = v.Revision
	return updates, gone, append(problems, marshal.problems()...)
}

// resolve recomputes the stale tenants.
func (s *stepper) resolve(v *store.View, d dirt) (problems []string) {
	if len(d.tenants) > 0 {
		s.tenants = maps.Clone(s.tenants) // the old map may be in a published model
	}
	for id := range d.tenants {
		if t := tenantOf(v, id); t != nil {
			s.tenants[id] = t
			problems = append(problems, t.problems...)
		} else {
			delete(s.tenants, id)
		}
	}
	return problems
}

// moveGateways recomputes which clusters have an ingress gateway, and says whether
// that changed.
func (s *stepper) moveGateways() bool {
	now := map[string]bool{}
	for _, t := range s.tenants {
		for c := range t.gateways {
			now[c] = true
		}
	}
	changed := !maps.Equal(now, s.gateways)
	s.gateways = now
	return changed
}

// units are the tenants of which a cluster's part is stale.
func (s *stepper) units(cluster string, d dirt, all bool) map[string]bool {
	if !all {
		return d.tenants
	}
	out := maps.Clone(d.tenants)
	for id := range s.tenants {
		out[id] = true
	}
	for id := range s.sets[cluster] {
		if id != fleetUnit {
			out[id] = true
		}
	}
	return out
}

// replace sets one unit of a cluster's set and notes the difference.
func (s *stepper) replace(u *update, cluster, unit string, next []named, m marshaller) {
	old := s.sets[cluster][unit]
	set := make(map[string]*distribute.Resource, len(next))
	for _, n := range next {
		r := m.resource(n)
		if r == nil {
			// Too great or not marshallable: the last good one stays.
			if r = old[n.name]; r == nil {
				continue
			}
		}
		set[n.name] = r
		if o := old[n.name]; o == nil || o.Version != r.Version {
			u.put = append(u.put, r)
		}
	}
	for name := range old {
		if set[name] == nil {
			u.remove = append(u.remove, name)
		}
	}
	if len(set) == 0 {
		delete(s.sets[cluster], unit)
		return
	}
	s.sets[cluster][unit] = set
}

// marshaller marshals each intent once, however many clusters it goes to.
type marshaller map[*linkv1.Intent]marshalled

type marshalled struct {
	r       *distribute.Resource
	problem string
}

func (m marshaller) resource(n named) *distribute.Resource {
	if done, ok := m[n.intent]; ok {
		return done.r
	}
	var done marshalled
	r, err := distribute.NewResource(api.IntentTypeURL, n.name, n.intent)
	switch {
	case err != nil:
		done.problem = err.Error()
	case len(r.Body.GetValue()) > 2*api.MaxObjectBytes:
		done.problem = "intent " + n.name + " is too great to be sent"
	default:
		done.r = r
	}
	m[n.intent] = done
	return done.r
}

func (m marshaller) problems() []string {
	var out []string
	for _, d := range m {
		if d.problem != "" {
			out = append(out, d.problem)
		}
	}
	slices.Sort(out)
	return out
}

// serve follows the mirror and keeps the cache at it, until ctx ends.
func (f *Fleet) serve(ctx context.Context) error {
	s := newStepper(f.cfg.Fleet)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		v, changed := f.mirror.Next()
		if v.Revision > s.revision {
			f.pass(s, v)
		}
		select {
		case <-changed:
		case <-f.rootsChanged:
			if v.Revision >= 0 {
				f.pass(s, v)
			}
			continue
		case <-ctx.Done():
			return nil
		}
		// The timer has run since the last pass.
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		timer.Reset(debounce)
	}
}

// pass takes one view to the cache.
func (f *Fleet) pass(s *stepper, v *store.View) {
	var d dirt
	if s.revision >= 0 {
		if changes, ok := f.mirror.Since(s.revision, v.Revision); ok {
			d = dirtOf(changes)
		} else {
			d.all = true
		}
	}
	roots := f.cfg.FleetBundle()
	if s.revision < 0 || d.all || d.fleet || !bytes.Equal(roots, s.roots) {
		f.cfg.OnBundles(bundles(v, f.cfg.Fleet, roots))
	}
	f.admit(v)
	updates, gone, problems := s.step(v, roots, d)
	for _, p := range problems {
		f.log.Error("intent left out", "alarm", true, "problem", p)
	}
	f.model.Store(&model{view: v, tenants: s.tenants, shared: s.shared, gateways: s.gateways})
	for _, c := range gone {
		f.cache.Remove(c)
	}
	for _, c := range slices.Sorted(maps.Keys(updates)) {
		u := updates[c]
		slices.SortStableFunc(u.put, func(a, b *distribute.Resource) int { return rank(a.Name) - rank(b.Name) })
		if u.first {
			f.cache.Set(c, api.IntentTypeURL, u.put)
		} else {
			f.cache.Update(c, api.IntentTypeURL, u.put, u.remove)
		}
	}
	f.wakeSessions()
}

package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/place"
	"github.com/portolan-io/portolan/federation/store"
)

// This file is the pure part of serving intents: what each cluster is told, as a
// function of one snapshot. Everything of one tenant is resolved once (tenantOf)
// and then cut to each cluster (forCluster); what belongs to no tenant is
// fleetIntents.

// derivedKinds are the records that intents follow from.
var derivedKinds = []store.Kind{
	store.Tenant, store.Cluster, store.TrustBundle, store.PolicyBundle, store.Workload, store.Revision,
	store.Service, store.Route, store.Placement, store.PlacementStatus, store.ServiceExport,
}

// named is an intent under its resource name.
type named struct {
	name   string
	intent *linkv1.Intent
}

// tenantView is one tenant, resolved. Never changed after it was made.
type tenantView struct {
	id string
	// placed are the Placement records and going the PlacementStatus records, by
	// cluster and workload. A status without its placement is a workload that the
	// cluster has not yet confirmed to have stopped.
	placed map[string]map[string]store.Record
	going  map[string]map[string]store.Record
	// presence of each workload: clusters in which it is placed or not yet gone.
	presence  map[string][]string
	workloads map[string][]named // by cluster
	exports   map[string][]named // by the cluster that exports
	permits   map[string][]named // by the cluster that is permitted
	// shared goes alike to every cluster that this tenant concerns.
	shared []named
	// ingress says whether any route has host names at the ingress.
	ingress bool
	// gateways are the clusters with an ingress gateway of this tenant.
	gateways map[string]bool
	// exporters are the clusters of which there is any export record.
	exporters map[string]bool
	// problems are references that lead nowhere; what they hold is left out.
	problems []string
}

// tenantOf resolves a tenant; nil when nothing of it is left.
func tenantOf(v *store.View, id string) *tenantView {
	t := &tenantView{
		id: id, placed: map[string]map[string]store.Record{}, going: map[string]map[string]store.Record{},
		presence: map[string][]string{}, workloads: map[string][]named{}, exports: map[string][]named{},
		permits: map[string][]named{}, gateways: map[string]bool{}, exporters: map[string]bool{},
	}
	prefix := api.TenantName(id) + "/"
	t.locate(v, prefix)
	t.addWorkloads(v)
	t.addShared(v, prefix)
	for rec := range v.List(store.ServiceExport, store.ListOptions{Prefix: prefix}) {
		e, ok := rec.Message.(*linkv1.ServiceExport)
		if !ok {
			continue
		}
		t.exporters[e.GetCluster()] = true
		if slices.Contains(t.presenceOfService(v, e.GetService()), e.GetCluster()) {
			name := "export/" + e.GetCluster() + "/" + id + "/" + e.GetService()
			t.exports[e.GetCluster()] = append(t.exports[e.GetCluster()], named{name, &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Export{Export: e}}})
		}
	}
	if rec, ok := v.Get(store.Tenant, api.TenantName(id)); ok {
		spec := rec.Message.(*portolanv1.Tenant).GetSpec()
		t.shared = append(t.shared, named{"tenant/" + id, &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Tenant{Tenant: &linkv1.TenantIntent{Tenant: id, Spec: spec}}}})
	} else if len(t.placed) == 0 && len(t.going) == 0 && len(t.exporters) == 0 {
		return nil
	}
	return t
}

// locate finds where the workloads of the tenant are, and who is permitted.
func (t *tenantView) locate(v *store.View, prefix string) {
	at := map[string]map[string]int64{} // workload → cluster → revision that says so
	note := func(rec store.Record, into map[string]map[string]store.Record) {
		ids, err := api.ParseName(rec.Name, api.PlacementPattern)
		if err != nil {
			t.problems = append(t.problems, err.Error())
			return
		}
		w, c := ids[1], ids[2]
		if _, ok := v.Get(store.Cluster, api.ClusterName(c)); !ok {
			return // a cluster that was taken out of the fleet has nothing and may nothing
		}
		put(into, c, w, rec)
		if at[w] == nil {
			at[w] = map[string]int64{}
		}
		if _, ok := at[w][c]; !ok {
			at[w][c] = rec.Revision
		}
	}
	for rec := range v.List(store.Placement, store.ListOptions{Prefix: prefix}) {
		note(rec, t.placed)
	}
	for rec := range v.List(store.PlacementStatus, store.ListOptions{Prefix: prefix}) {
		note(rec, t.going)
	}
	for _, w := range slices.Sorted(maps.Keys(at)) {
		t.presence[w] = slices.Sorted(maps.Keys(at[w]))
		for _, c := range t.presence[w] {
			// No revision: a permit is the same whichever decision it follows from.
			t.permits[c] = append(t.permits[c], named{
				"permit/" + t.id + "/" + w + "/" + c,
				&linkv1.Intent{Body: &linkv1.Intent_Permit{Permit: &linkv1.PeerPermit{Tenant: t.id, Workload: w, Cluster: c}}},
			})
		}
	}
}

func put(m map[string]map[string]store.Record, a, b string, r store.Record) {
	if m[a] == nil {
		m[a] = map[string]store.Record{}
	}
	m[a][b] = r
}

// addWorkloads makes the workload intents of every cluster.
func (t *tenantView) addWorkloads(v *store.View) {
	for _, c := range slices.Sorted(maps.Keys(t.placed)) {
		for _, w := range slices.Sorted(maps.Keys(t.placed[c])) {
			rec := t.placed[c][w]
			p, ok := rec.Message.(*portolanv1.Placement)
			if !ok {
				continue
			}
			i := t.workload(v, c, w, rec.Revision, p)
			if i == nil {
				continue
			}
			for _, r := range i.GetWorkload().GetRevisions() {
				if r.GetSpec().GetGateway() == portolanv1.GatewayKind_GATEWAY_KIND_INGRESS {
					t.gateways[c] = true
				}
			}
			t.workloads[c] = append(t.workloads[c], named{"workload/" + t.id + "/" + w, i})
		}
	}
}

// workload makes one workload intent for a cluster; nil when none of its revisions
// exists.
func (t *tenantView) workload(v *store.View, cluster, w string, derived int64, p *portolanv1.Placement) *linkv1.Intent {
	out := &linkv1.WorkloadIntent{Tenant: t.id, Workload: w, Epoch: p.GetSpec().GetEpoch(), ActiveRevision: p.GetSpec().GetActiveRevision()}
	newest, newestGeneration := "", int64(-1)
	// A workload that is deleted takes its revisions along; the placements follow.
	owner, owned := v.Get(store.Workload, api.WorkloadName(t.id, w))
	for _, r := range p.GetSpec().GetRevisions() {
		rec, ok := v.Get(store.Revision, api.RevisionName(t.id, w, r.GetRevision()))
		if !ok {
			if owned {
				t.problems = append(t.problems, fmt.Sprintf("placement %s names revision %q, which does not exist", p.GetName(), r.GetRevision()))
			}
			continue
		}
		m := rec.Message.(*portolanv1.WorkloadRevision)
		out.Revisions = append(out.Revisions, &linkv1.RevisionIntent{
			Revision: r.GetRevision(), Replicas: r.GetReplicas(), MinReplicas: r.GetMinReplicas(), MaxReplicas: r.GetMaxReplicas(), Spec: m.GetSpec(),
		})
		derived = max(derived, rec.Revision)
		if g := max(m.GetGeneration(), rec.Revision); g > newestGeneration {
			newest, newestGeneration = r.GetRevision(), g
		}
	}
	if len(out.Revisions) == 0 {
		return nil
	}
	out.CurrentRevision = newest
	if owned {
		m := owner.Message.(*portolanv1.Workload)
		out.Uid, out.Labels = m.GetUid(), m.GetLabels()
		if overlay(out.Revisions, m.GetSpec()) {
			derived = max(derived, owner.Revision)
		}
		for _, current := range []string{m.GetSpec().GetRevision(), m.GetStatus().GetCurrentRevision()} {
			if slices.ContainsFunc(out.Revisions, func(r *linkv1.RevisionIntent) bool { return current != "" && r.GetRevision() == current }) {
				out.CurrentRevision = current
			}
		}
	}
	if rec, ok := v.Get(store.Cluster, api.ClusterName(cluster)); ok {
		m := rec.Message.(*portolanv1.Cluster)
		for _, r := range out.Revisions {
			r.Spec = place.Override(r.GetSpec(), cluster, m.GetSpec(), m.GetLabels())
		}
	}
	return &linkv1.Intent{Revision: derived, Body: &linkv1.Intent_Workload{Workload: out}}
}

// overlay puts what is no part of a template, and therefore makes no revision of
// its own, into the specs that a cluster is told: how replicas are scheduled,
// scaled and updated. It says whether anything changed.
func overlay(revisions []*linkv1.RevisionIntent, now *portolanv1.WorkloadSpec) bool {
	changed := false
	for _, r := range revisions {
		// The record's own spec is shared and never changed.
		if spec := admit.Overlay(r.GetSpec(), now); spec != r.GetSpec() {
			r.Spec, changed = spec, true
		}
	}
	return changed
}

// addShared makes what goes alike to every concerned cluster: services, routes and
// network policies of the tenant.
func (t *tenantView) addShared(v *store.View, prefix string) {
	for rec := range v.List(store.Service, store.ListOptions{Prefix: prefix}) {
		s, ok := rec.Message.(*portolanv1.Service)
		if !ok {
			continue
		}
		id := strings.TrimPrefix(rec.Name, prefix+"services/")
		t.shared = append(t.shared, named{"service/" + t.id + "/" + id, &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Service{Service: &linkv1.ServiceIntent{
			Tenant: t.id, Service: id, Spec: s.GetSpec(), VirtualIp: s.GetStatus().GetVirtualIp(), Clusters: t.presence[workloadOf(s, id)],
		}}}})
	}
	for rec := range v.List(store.Route, store.ListOptions{Prefix: prefix}) {
		r, ok := rec.Message.(*portolanv1.Route)
		if !ok {
			continue
		}
		id := strings.TrimPrefix(rec.Name, prefix+"routes/")
		t.ingress = t.ingress || len(r.GetSpec().GetIngressHosts()) > 0
		t.shared = append(t.shared, named{"route/" + t.id + "/" + id, &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Route{Route: &linkv1.RouteIntent{Tenant: t.id, Route: id, Spec: r.GetSpec()}}}})
	}
	t.shared = append(t.shared, policies(v, prefix)...)
}

// workloadOf is the ID of the workload that a service selects.
func workloadOf(s *portolanv1.Service, id string) string {
	return cmp.Or(s.GetSpec().GetWorkload(), id)
}

// presenceOfService lists the clusters in which a service's workload is; none
// when the service does not exist.
func (t *tenantView) presenceOfService(v *store.View, service string) []string {
	s, ok := store.One[*portolanv1.Service](v, store.Service, api.ServiceName(t.id, service))
	if !ok {
		return nil
	}
	return t.presence[workloadOf(s, service)]
}

// policies are the network bundles whose names begin with prefix + "policyBundles/".
func policies(v *store.View, prefix string) []named {
	var out []named
	for rec := range v.List(store.PolicyBundle, store.ListOptions{Prefix: prefix + "policyBundles/"}) {
		b, ok := rec.Message.(*portolanv1.PolicyBundle)
		if !ok || b.GetSpec().GetKind() != portolanv1.PolicyKind_POLICY_KIND_NETWORK {
			continue
		}
		out = append(out, named{"policy/" + rec.Name, &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Policy{Policy: &linkv1.PolicyIntent{
			Name: rec.Name, Spec: b.GetSpec(), Digest: b.GetStatus().GetDigest(),
		}}}})
	}
	return out
}

// here says whether anything of the tenant is in the cluster.
func (t *tenantView) here(cluster string) bool {
	return len(t.placed[cluster]) > 0 || len(t.going[cluster]) > 0
}

// forCluster cuts the tenant to one cluster. gateway says whether the cluster has
// an ingress gateway, which concerns it with every tenant that has ingress hosts.
func (t *tenantView) forCluster(cluster string, gateway bool) []named {
	concerned := t.here(cluster) || gateway && t.ingress
	var out []named
	// Gateways of other clusters call into this one whoever's the workload is, so
	// the system tenant's permits go everywhere.
	if concerned || t.id == api.SystemTenant {
		out = append(out, except(t.permits, cluster)...)
	}
	if !concerned {
		return out
	}
	out = append(out, t.shared...)
	out = append(out, except(t.exports, cluster)...)
	return append(out, t.workloads[cluster]...)
}

func except(m map[string][]named, cluster string) []named {
	var out []named
	for _, c := range slices.Sorted(maps.Keys(m)) {
		if c != cluster {
			out = append(out, m[c]...)
		}
	}
	return out
}

// fleetShared is what every cluster is told alike and belongs to no tenant: trust
// bundles and guardrails.
func fleetShared(v *store.View, fleet string, roots []byte) []named {
	out := []named{{"bundle/" + fleet, &linkv1.Intent{Body: &linkv1.Intent_Bundle{Bundle: &linkv1.TrustBundle{TrustDomain: fleet, X509Roots: roots}}}}}
	for rec := range v.List(store.TrustBundle, store.ListOptions{}) {
		if b, ok := rec.Message.(*linkv1.TrustBundle); ok {
			out = append(out, named{"bundle/" + b.GetTrustDomain(), &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Bundle{Bundle: b}}})
		}
	}
	return append(out, policies(v, "")...)
}

// clusterIntent is what a cluster is told of itself.
func clusterIntent(rec store.Record, cluster string) named {
	c, _ := rec.Message.(*portolanv1.Cluster)
	return named{"cluster", &linkv1.Intent{Revision: rec.Revision, Body: &linkv1.Intent_Cluster{Cluster: &linkv1.ClusterIntent{Cluster: cluster, Spec: c.GetSpec()}}}}
}

// tenants lists the IDs of all tenants that have records.
func tenants(v *store.View) []string {
	ids := map[string]bool{}
	for rec := range v.List(store.Tenant, store.ListOptions{}) {
		ids[api.TenantOf(rec.Name)] = true
	}
	for _, k := range []store.Kind{store.Placement, store.PlacementStatus, store.ServiceExport} {
		for rec := range v.List(k, store.ListOptions{}) {
			ids[api.TenantOf(rec.Name)] = true
		}
	}
	return slices.Sorted(maps.Keys(ids))
}

// Derive gives all that a cluster is told at a snapshot, by resource name, the
// watermark included, and what had to be left out. It is what a full
// recomputation says; the server comes to the same step by step.
func Derive(v *store.View, fleet string, roots []byte, cluster string) (map[string]*linkv1.Intent, []string) {
	rec, ok := v.Get(store.Cluster, api.ClusterName(cluster))
	if !ok {
		return nil, nil
	}
	all := append(fleetShared(v, fleet, roots), clusterIntent(rec, cluster))
	var resolved []*tenantView
	gateway := false
	var problems []string
	for _, id := range tenants(v) {
		if t := tenantOf(v, id); t != nil {
			resolved = append(resolved, t)
			gateway = gateway || t.gateways[cluster]
			problems = append(problems, t.problems...)
		}
	}
	for _, t := range resolved {
		all = append(all, t.forCluster(cluster, gateway)...)
	}
	out := make(map[string]*linkv1.Intent, len(all)+1)
	for _, n := range all {
		out[n.name] = n.intent
	}
	w := watermark(v.Revision)
	out[w.name] = w.intent
	return out, problems
}

func watermark(revision int64) named {
	return named{api.WatermarkName, &linkv1.Intent{Revision: revision, Body: &linkv1.Intent_Watermark{Watermark: &linkv1.Watermark{Revision: revision}}}}
}

// rank orders resources within one answer: what is referred to comes first.
func rank(name string) int {
	kind, _, _ := strings.Cut(name, "/")
	return slices.Index([]string{"cluster", "tenant", "bundle", "permit", "policy", "service", "export", "route", "workload", api.WatermarkName}, kind)
}

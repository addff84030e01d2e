package cli

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

func (a *app) getCommand() *cobra.Command {
	var selector map[string]string
	var cluster string
	c := &cobra.Command{
		Use: "get KIND [NAME…]", Short: "Show objects, replicas or nodes", GroupID: "objects", Args: cobra.MinimumNArgs(1),
		Long: `Shows objects of a kind: tenants, clusters, workloads, services, routes,
policybundles, rolebindings, revisions, placements, auditentries; and what runs:
replicas, nodes.`,
		Example: `  portolan get workloads -t shop
  portolan get workload web -t shop -o yaml
  portolan get replicas -t shop -o wide
  portolan get revision catalog/v2 -t shop
  portolan get clusters -o name`,
		ValidArgs: kindWords(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			switch strings.ToLower(args[0]) {
			case "replica", "replicas":
				return a.getReplicas(cmd, args[1:], cluster)
			case "node", "nodes":
				return a.getNodes(cmd, cluster)
			}
			return a.getObjects(cmd, args, selector)
		},
	}
	a.outputFlag(c)
	c.Flags().StringToStringVarP(&selector, "selector", "l", nil, "labels an object must have, k=v,…")
	c.Flags().StringVar(&cluster, "cluster", "", "only this cluster (replicas, nodes)")
	return c
}

func kindWords() []string {
	words := []string{"replicas", "nodes"}
	for _, k := range manifest.Kinds {
		words = append(words, strings.ToLower(k.Plural))
	}
	return words
}

func (a *app) getObjects(cmd *cobra.Command, args []string, selector map[string]string) error {
	k, err := manifest.FindKind(args[0])
	if err != nil {
		return err
	}
	cc, err := a.dial()
	if err != nil {
		return err
	}
	o := objects{cc: cc}
	var msgs []proto.Message
	if len(args) == 1 {
		parent := ""
		if a.tenant != "" && k.Tenant != "" {
			parent = api.TenantName(a.tenant)
		}
		if msgs, err = o.list(cmd.Context(), k, parent, selector); err != nil {
			return err
		}
	}
	for _, id := range args[1:] {
		name, err := k.FullName(a.tenant, id)
		if err != nil {
			return err
		}
		m, err := o.get(cmd.Context(), k, name)
		if err != nil {
			return err
		}
		msgs = append(msgs, m)
	}
	if done, err := a.machine(len(args) == 2, msgs); done {
		return err
	}
	if len(msgs) == 0 {
		a.notef("no %s%s\n", strings.ToLower(k.Plural), inTenant(a.tenant))
		return nil
	}
	a.print(objectTable(k, msgs, time.Now()))
	return nil
}

func inTenant(t string) string {
	if t == "" {
		return ""
	}
	return " in tenant " + t
}

// objectTable shows objects of one kind.
func objectTable(k manifest.Kind, msgs []proto.Message, now time.Time) *table {
	rows := map[string]func() *table{
		"Tenant": func() *table {
			return tableOf(msgs, []string{"NAME", "DISPLAY NAME", "REGIONS", "AGE"}, func(m *portolanv1.Tenant) []string {
				return []string{last(m.GetName()), orDash(m.GetSpec().GetDisplayName()), orAll(m.GetSpec().GetAllowedRegions()), age(m.GetCreateTime(), now)}
			})
		},
		"Cluster":          func() *table { return clusterTable(msgs, now) },
		"Workload":         func() *table { return workloadTable(msgs, now) },
		"WorkloadRevision": func() *table { return revisionTable(msgs, now) },
		"Service": func() *table {
			return tableOf(msgs, []string{"TENANT", "NAME", "HOST", "VIRTUAL IP", "PORTS", "+WORKLOAD", "AGE"}, func(m *portolanv1.Service) []string {
				return []string{api.TenantOf(m.GetName()), last(m.GetName()), m.GetStatus().GetHostname(), m.GetStatus().GetVirtualIp(), portsText(m.GetSpec().GetPorts()), m.GetSpec().GetWorkload(), age(m.GetCreateTime(), now)}
			})
		},
		"Route": func() *table {
			return tableOf(msgs, []string{"TENANT", "NAME", "FOR", "BACKENDS", "STATE", "AGE"}, func(m *portolanv1.Route) []string {
				return []string{api.TenantOf(m.GetName()), last(m.GetName()), routeFor(m.GetSpec()), backendsText(m.GetSpec()), conditionsText(m.GetStatus().GetConditions()), age(m.GetCreateTime(), now)}
			})
		},
		"PolicyBundle": func() *table {
			return tableOf(msgs, []string{"TENANT", "NAME", "KIND", "FILES", "DIGEST", "AGE"}, func(m *portolanv1.PolicyBundle) []string {
				return []string{orDash(api.TenantOf(m.GetName())), last(m.GetName()), word(m.GetSpec().GetKind().String(), "POLICY_KIND_"), fmt.Sprint(len(m.GetSpec().GetFiles())), clipTo(m.GetStatus().GetDigest(), 12), age(m.GetUpdateTime(), now)}
			})
		},
		"RoleBinding": func() *table {
			return tableOf(msgs, []string{"NAME", "SUBJECT", "ROLE", "TENANT"}, func(m *portolanv1.RoleBinding) []string {
				return []string{last(m.GetName()), m.GetSpec().GetSubject(), word(m.GetSpec().GetRole().String(), "ROLE_"), orDash(m.GetSpec().GetTenant())}
			})
		},
		"Placement": func() *table {
			return tableOf(msgs, []string{"TENANT", "WORKLOAD", "CLUSTER", "REVISIONS", "READY", "+EPOCH", "REASON"}, func(m *portolanv1.Placement) []string {
				ready := 0
				for _, r := range m.GetStatus().GetRevisions() {
					ready += int(r.GetReadyReplicas())
				}
				return []string{api.TenantOf(m.GetName()), workloadOf(m.GetName()), last(m.GetName()), revisionsText(m.GetSpec().GetRevisions()), fmt.Sprint(ready), fmt.Sprint(m.GetSpec().GetEpoch()), reasonsText(m.GetSpec().GetReasons())}
			})
		},
		"AuditEntry": func() *table {
			return tableOf(msgs, []string{"TIME", "ACTOR", "METHOD", "RESOURCE", "DECISION", "REASON"}, func(m *portolanv1.AuditEntry) []string {
				_, method, _ := strings.Cut(m.GetMethod(), "/")
				return []string{m.GetTime().AsTime().Local().Format("15:04:05"), last(m.GetActor()), method, m.GetResource(), word(m.GetDecision().String(), "AUDIT_DECISION_"), m.GetReason()}
			})
		},
	}
	return rows[k.Name]()
}

func tableOf[T proto.Message](msgs []proto.Message, head []string, row func(T) []string) *table {
	t := newTable(head...)
	for _, m := range msgs {
		if v, ok := m.(T); ok {
			t.add(row(v)...)
		}
	}
	return t
}

func clusterTable(msgs []proto.Message, now time.Time) *table {
	return tableOf(msgs, []string{"NAME", "REGION", "STATE", "NODES", "CPU", "MEMORY", "SEEN", "+APPLIED", "+INGRESS", "AGE"}, func(m *portolanv1.Cluster) []string {
		s := m.GetStatus()
		return []string{
			last(m.GetName()), m.GetSpec().GetRegion(), word(s.GetState().String(), "CLUSTER_STATE_"), fmt.Sprintf("%d/%d", s.GetNodesReady(), s.GetNodes()),
			coresText(s.GetCpuMilli()), bytesText(s.GetMemoryBytes()), age(s.GetLastSeenTime(), now), fmt.Sprint(s.GetAppliedRevision()), strings.Join(s.GetIngressAddresses(), ","), age(m.GetCreateTime(), now),
		}
	})
}

func workloadTable(msgs []proto.Message, now time.Time) *table {
	return tableOf(msgs, []string{"TENANT", "NAME", "KIND", "READY", "REVISION", "CLUSTERS", "STATE", "+IMAGES", "AGE"}, func(m *portolanv1.Workload) []string {
		s := m.GetStatus()
		var where, images []string
		for _, p := range s.GetPlacements() {
			n := 0
			for _, r := range p.GetRevisions() {
				n += int(r.GetReplicas())
			}
			where = append(where, fmt.Sprintf("%s %d/%d", p.GetCluster(), p.GetReadyReplicas(), n))
		}
		for _, c := range m.GetSpec().GetContainers() {
			images = append(images, c.GetImage())
		}
		kind := word(m.GetSpec().GetKind().String(), "WORKLOAD_KIND_")
		if g := m.GetSpec().GetGateway(); g != 0 {
			kind += "/" + word(g.String(), "GATEWAY_KIND_")
		}
		return []string{
			api.TenantOf(m.GetName()), last(m.GetName()), kind, fmt.Sprintf("%d/%d", s.GetReadyReplicas(), s.GetDesiredReplicas()), orDash(s.GetCurrentRevision()),
			orDash(strings.Join(where, ", ")), conditionsText(s.GetConditions()), strings.Join(images, ","), age(m.GetCreateTime(), now),
		}
	})
}

func revisionTable(msgs []proto.Message, now time.Time) *table {
	return tableOf(msgs, []string{"TENANT", "WORKLOAD", "REVISION", "IMAGES", "+DIGESTS", "AGE"}, func(m *portolanv1.WorkloadRevision) []string {
		var images, digests []string
		for _, c := range m.GetSpec().GetContainers() {
			images = append(images, c.GetImage())
			_, d, _ := strings.Cut(c.GetResolvedImage(), "@")
			digests = append(digests, d)
		}
		return []string{api.TenantOf(m.GetName()), workloadOf(m.GetName()), last(m.GetName()), strings.Join(images, ","), strings.Join(digests, ","), age(m.GetCreateTime(), now)}
	})
}

func workloadOf(name string) string {
	if p := strings.Split(name, "/"); len(p) > 3 {
		return p[3]
	}
	return ""
}

func orAll(list []string) string {
	if len(list) == 0 {
		return "all"
	}
	return strings.Join(list, ",")
}

func clipTo(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

func portsText(ports []*portolanv1.ServicePort) string {
	var out []string
	for _, p := range ports {
		s := fmt.Sprint(p.GetPort())
		if p.GetTargetPort() != 0 && p.GetTargetPort() != p.GetPort() {
			s += fmt.Sprintf("→%d", p.GetTargetPort())
		}
		if p.GetProtocol() == portolanv1.PortProtocol_PORT_PROTOCOL_TCP {
			s += "/tcp"
		}
		out = append(out, s)
	}
	return strings.Join(out, ",")
}

func routeFor(s *portolanv1.RouteSpec) string {
	var out []string
	if s.GetService() != "" {
		out = append(out, s.GetService())
	}
	return strings.Join(append(out, s.GetIngressHosts()...), ",")
}

func backendsText(s *portolanv1.RouteSpec) string {
	var rules []string
	for _, r := range s.GetRules() {
		var bs []string
		for _, b := range r.GetBackends() {
			name := b.GetService()
			if name == "" {
				name = s.GetService()
			}
			if b.GetRevision() != "" {
				name += "@" + b.GetRevision()
			}
			if len(r.GetBackends()) > 1 {
				name += fmt.Sprintf(" %d%%", b.GetWeight())
			}
			bs = append(bs, name)
		}
		rules = append(rules, strings.Join(bs, ", "))
	}
	return strings.Join(rules, "; ")
}

func revisionsText(rs []*portolanv1.RevisionReplicas) string {
	var out []string
	for _, r := range rs {
		out = append(out, fmt.Sprintf("%s×%d", r.GetRevision(), r.GetReplicas()))
	}
	return orDash(strings.Join(out, ", "))
}

func reasonsText(rs []*portolanv1.Reason) string {
	var out []string
	for _, r := range rs {
		s := r.GetMessage()
		if s == "" {
			s = r.GetCode()
		}
		// Most sentences begin with their number.
		if r.GetCount() > 1 && !strings.HasPrefix(s, fmt.Sprintf("%d ", r.GetCount())) {
			s = fmt.Sprintf("%s (%d)", s, r.GetCount())
		}
		out = append(out, s)
	}
	return strings.Join(out, "; ")
}

// conditionsText shows what is not well, each reason once; "ok" when all is.
func conditionsText(cs []*portolanv1.Condition) string {
	var bad []string
	// True is the bad news of these; of all others it is the good one.
	alarms := map[string]bool{"Halted": true, "Failed": true, "Rejected": true, "Unplaced": true}
	for _, c := range cs {
		if c.GetType() == "Progressing" || c.GetType() == "Complete" {
			continue
		}
		isTrue := c.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE
		reason := c.GetReason()
		if reason == "" {
			reason = c.GetType() + "=" + word(c.GetState().String(), "CONDITION_STATE_")
		}
		if isTrue == alarms[c.GetType()] && !slices.Contains(bad, reason) {
			bad = append(bad, reason)
		}
	}
	if len(bad) == 0 {
		return "ok"
	}
	return strings.Join(bad, ", ")
}

func (a *app) getReplicas(cmd *cobra.Command, args []string, cluster string) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	tenant, err := a.needTenant()
	if err != nil {
		return err
	}
	if len(args) == 0 {
		args = []string{"-"}
	}
	var all []*portolanv1.Replica
	for _, w := range args {
		rs, err := a.replicas(cmd.Context(), cc, tenant, w, cluster)
		if err != nil {
			return err
		}
		all = append(all, rs...)
	}
	msgs := make([]proto.Message, len(all))
	for i, r := range all {
		msgs[i] = r
	}
	if done, err := a.machine(false, msgs); done {
		return err
	}
	if len(all) == 0 {
		a.notef("no replicas%s\n", inTenant(tenant))
		return nil
	}
	a.print(replicaTable(all, time.Now()))
	return nil
}

func replicaTable(rs []*portolanv1.Replica, now time.Time) *table {
	sort.SliceStable(rs, func(i, j int) bool { return rs[i].GetName() < rs[j].GetName() })
	t := newTable("REPLICA", "REVISION", "CLUSTER", "NODE", "STATE", "READY", "RESTARTS", "+ADDRESS", "+IDENTITY", "AGE", "WHY")
	for _, r := range rs {
		restarts := 0
		for _, c := range r.GetContainers() {
			restarts += int(c.GetRestarts())
		}
		ready := "no"
		if r.GetReady() {
			ready = "yes"
		}
		why := r.GetReason().GetCode()
		if m := r.GetReason().GetMessage(); m != "" && why != "" {
			why += ": " + m
		}
		t.add(last(r.GetName()), r.GetRevision(), r.GetCluster(), orDash(r.GetNode()), word(r.GetState().String(), "REPLICA_STATE_"), ready, fmt.Sprint(restarts), orDash(r.GetAddress()), orDash(r.GetSpiffeId()), age(r.GetTimeline().GetBound(), now), why)
	}
	return t
}

func (a *app) getNodes(cmd *cobra.Command, cluster string) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	nodes, err := a.nodes(cmd.Context(), cc, cluster)
	if err != nil {
		return err
	}
	msgs := make([]proto.Message, len(nodes))
	for i, n := range nodes {
		msgs[i] = n
	}
	if done, err := a.machine(false, msgs); done {
		return err
	}
	t := newTable("CLUSTER", "NODE", "READY", "MODE", "+POOL", "ADDRESS", "REPLICAS", "CPU", "MEMORY", "+RANGE", "+LABELS", "SEEN")
	for _, n := range nodes {
		ready := "no"
		if n.GetReady() {
			ready = "yes"
		}
		var labels []string
		for k, v := range n.GetLabels() {
			labels = append(labels, k+"="+v)
		}
		sort.Strings(labels)
		t.add(strings.Split(n.GetName(), "/")[1], last(n.GetName()), ready, modeText(n.GetMode()), orDash(n.GetPool()), n.GetAddress(), fmt.Sprint(n.GetReplicas()),
			coresText(n.GetAllocatedCpuMilli())+"/"+coresText(n.GetCpuMilli()), bytesText(n.GetAllocatedMemoryBytes())+"/"+bytesText(n.GetMemoryBytes()),
			n.GetReplicaCidr(), strings.Join(labels, ","), age(n.GetLastSeenTime(), time.Now()))
	}
	a.print(t)
	return nil
}

func modeText(m portolanv1.NodeMode) string {
	if m == portolanv1.NodeMode_NODE_MODE_UNSPECIFIED {
		return "-"
	}
	return word(m.String(), "NODE_MODE_")
}

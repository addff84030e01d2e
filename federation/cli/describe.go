package cli

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

func (a *app) describeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "describe KIND NAME", Short: "Tell all about one object", GroupID: "objects", Args: cobra.ExactArgs(2),
		Example: `  portolan describe workload web -t shop
  portolan describe replica web-x7k2p -t shop
  portolan describe cluster eu-west`,
		ValidArgs: []string{"workload", "replica", "cluster", "service", "route", "tenant", "policybundle"},
		RunE: func(cmd *cobra.Command, args []string) error {
			cc, err := a.dial()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if w := strings.ToLower(args[0]); w == "replica" || w == "replicas" {
				return a.describeReplica(ctx, cc, args[1])
			}
			k, err := manifest.FindKind(args[0])
			if err != nil {
				return err
			}
			name, err := k.FullName(a.tenant, args[1])
			if err != nil {
				return err
			}
			m, err := (objects{cc: cc}).get(ctx, k, name)
			if err != nil {
				return err
			}
			a.describeHead(m)
			switch v := m.(type) {
			case *portolanv1.Workload:
				return a.describeWorkload(ctx, cc, v)
			case *portolanv1.Cluster:
				return a.describeCluster(ctx, cc, v)
			}
			y, err := specYAML(m)
			a.printf("\n%s", y)
			return err
		},
	}
}

func (a *app) describeHead(m proto.Message) {
	a.printf("Name:        %s\n", text(m, "name"))
	type stamped interface {
		GetCreateTime() *timestamppb.Timestamp
		GetLabels() map[string]string
	}
	a.printf("Generation:  %d (revision %d)\n", number(m, "generation"), number(m, "revision"))
	if s, ok := m.(stamped); ok {
		a.printf("Created:     %s ago\n", age(s.GetCreateTime(), time.Now()))
		if len(s.GetLabels()) > 0 {
			var ls []string
			for k, v := range s.GetLabels() {
				ls = append(ls, k+"="+v)
			}
			sort.Strings(ls)
			a.printf("Labels:      %s\n", strings.Join(ls, ", "))
		}
	}
}

func (a *app) conditions(cs []*portolanv1.Condition) {
	if len(cs) == 0 {
		return
	}
	a.printf("\nConditions:\n")
	t := newTable("  TYPE", "STATE", "REASON", "SINCE", "MESSAGE")
	for _, c := range cs {
		t.add("  "+c.GetType(), word(c.GetState().String(), "CONDITION_STATE_"), c.GetReason(), age(c.GetLastTransitionTime(), time.Now()), c.GetMessage())
	}
	a.print(t)
}

func (a *app) describeWorkload(ctx context.Context, cc grpc.ClientConnInterface, w *portolanv1.Workload) error {
	s := w.GetStatus()
	a.printf("Revision:    %s\nReady:       %d of %d\n", orDash(s.GetCurrentRevision()), s.GetReadyReplicas(), s.GetDesiredReplicas())
	if s.GetUnplacedReplicas() > 0 {
		a.printf("Unplaced:    %d\n", s.GetUnplacedReplicas())
	}
	a.rollout(s.GetRollout())
	a.printf("\nContainers:\n")
	for _, c := range append(append([]*portolanv1.Container{}, w.GetSpec().GetInitContainers()...), w.GetSpec().GetContainers()...) {
		a.printf("  %s: %s\n", c.GetName(), c.GetImage())
		if c.GetResolvedImage() != "" && c.GetResolvedImage() != c.GetImage() {
			a.printf("    resolved to %s\n", c.GetResolvedImage())
		}
		a.printf("    limits: cpu %s, memory %s, pids %d\n", c.GetLimits().GetCpu(), c.GetLimits().GetMemory(), c.GetLimits().GetPids())
	}
	a.conditions(s.GetConditions())
	if err := a.describePlacements(ctx, cc, w.GetName()); err != nil {
		return err
	}
	if err := a.describeScaling(ctx, cc, w); err != nil {
		return err
	}
	tenant := api.TenantOf(w.GetName())
	rs, err := a.replicas(ctx, cc, tenant, last(w.GetName()), "")
	if err != nil {
		return err
	}
	if len(rs) > 0 {
		a.printf("\nReplicas:\n")
		a.print(replicaTable(rs, time.Now()))
	}
	return a.tailEvents(ctx, cc, w.GetName())
}

// rollout says how the change to the newest template goes.
func (a *app) rollout(r *portolanv1.RolloutStatus) {
	if r == nil {
		return
	}
	a.printf("Rollout:     %s for %s: %s\n", word(r.GetState().String(), "ROLLOUT_STATE_"), age(r.GetStateTime(), time.Now()), r.GetReason().GetMessage())
	if r.GetActive() != "" {
		a.printf("Serving:     revision %s\n", r.GetActive())
	}
}

func (a *app) describePlacements(ctx context.Context, cc grpc.ClientConnInterface, workload string) error {
	r, err := portolanv1.NewWorkloadServiceClient(cc).ListPlacements(ctx, &portolanv1.ListPlacementsRequest{Parent: workload, PageSize: 1000})
	if err != nil {
		return err
	}
	if len(r.GetPlacements()) == 0 {
		return nil
	}
	a.printf("\nPlacements:\n")
	t := newTable("  CLUSTER", "REVISIONS", "EPOCH", "WHY")
	for _, p := range r.GetPlacements() {
		t.add("  "+last(p.GetName()), revisionsText(p.GetSpec().GetRevisions()), fmt.Sprint(p.GetSpec().GetEpoch()), reasonsText(p.GetSpec().GetReasons()))
	}
	a.print(t)
	return nil
}

func (a *app) tailEvents(ctx context.Context, cc grpc.ClientConnInterface, object string) error {
	r, err := portolanv1.NewRuntimeServiceClient(cc).ListEvents(ctx, &portolanv1.ListEventsRequest{Parent: object, Limit: 20})
	if err != nil {
		return err
	}
	a.silent(r.GetSilentClusters())
	if len(r.GetEvents()) > 0 {
		a.printf("\nEvents:\n")
		a.print(eventTable(r.GetEvents(), time.Now()))
	}
	return nil
}

func (a *app) silent(clusters []string) {
	if len(clusters) > 0 {
		a.notef("note: no answer from %s\n", strings.Join(clusters, ", "))
	}
}

func eventTable(evs []*portolanv1.Event, now time.Time) *table {
	t := newTable("AGE", "TYPE", "OBJECT", "CLUSTER", "+NODE", "MESSAGE")
	for _, e := range evs {
		msg := e.GetMessage()
		if e.GetCount() > 1 {
			msg += fmt.Sprintf(" (×%d)", e.GetCount())
		}
		t.add(age(e.GetTime(), now), e.GetType(), last(e.GetObject()), e.GetCluster(), orDash(e.GetNode()), msg)
	}
	return t
}

func (a *app) describeCluster(ctx context.Context, cc grpc.ClientConnInterface, c *portolanv1.Cluster) error {
	s, spec := c.GetStatus(), c.GetSpec()
	a.printf("Region:      %s, zone %s, provider %s\n", spec.GetRegion(), orDash(spec.GetZone()), orDash(spec.GetProvider()))
	a.printf("Price:       %.4f per core-hour, %.4f per GiB-hour\n", float64(spec.GetCpuCoreHourMicros())/1e6, float64(spec.GetMemoryGibHourMicros())/1e6)
	a.printf("State:       %s, seen %s ago, applied revision %d\n", word(s.GetState().String(), "CLUSTER_STATE_"), age(s.GetLastSeenTime(), time.Now()), s.GetAppliedRevision())
	a.printf("Capacity:    %s cores, %s memory on %d of %d nodes\n", coresText(s.GetCpuMilli()), bytesText(s.GetMemoryBytes()), s.GetNodesReady(), s.GetNodes())
	if len(s.GetIngressAddresses()) > 0 {
		a.printf("Ingress:     %s\n", strings.Join(s.GetIngressAddresses(), ", "))
	}
	for _, t := range spec.GetTaints() {
		a.printf("Taint:       %s=%s:%s\n", t.GetKey(), t.GetValue(), word(t.GetEffect().String(), "TAINT_EFFECT_"))
	}
	a.conditions(s.GetConditions())
	nodes, err := a.nodes(ctx, cc, last(c.GetName()))
	if err != nil {
		a.notef("note: its nodes cannot be read now: %s\n", explainError(err))
		return nil
	}
	a.printf("\nNodes:\n")
	t := newTable("  NODE", "READY", "ADDRESS", "REPLICAS", "CPU", "MEMORY", "SEEN")
	for _, n := range nodes {
		ready := "no"
		if n.GetReady() {
			ready = "yes"
		}
		t.add("  "+last(n.GetName()), ready, n.GetAddress(), fmt.Sprint(n.GetReplicas()), coresText(n.GetAllocatedCpuMilli())+"/"+coresText(n.GetCpuMilli()), bytesText(n.GetAllocatedMemoryBytes())+"/"+bytesText(n.GetMemoryBytes()), age(n.GetLastSeenTime(), time.Now()))
	}
	a.print(t)
	return nil
}

func (a *app) describeReplica(ctx context.Context, cc grpc.ClientConnInterface, id string) error {
	r, err := a.findReplica(ctx, cc, id)
	if err != nil {
		return err
	}
	a.printf("Name:        %s\nCluster:     %s\nNode:        %s\nRevision:    %s (epoch %d)\nAddress:     %s\nIdentity:    %s\n", r.GetName(), r.GetCluster(), orDash(r.GetNode()), r.GetRevision(), r.GetEpoch(), orDash(r.GetAddress()), orDash(r.GetSpiffeId()))
	a.printf("State:       %s, ready: %v\n", word(r.GetState().String(), "REPLICA_STATE_"), r.GetReady())
	if c := r.GetReason().GetCode(); c != "" {
		a.printf("Why:         %s: %s\n", c, r.GetReason().GetMessage())
	}
	a.printf("Proxy:       has applied revision %d\n", r.GetProxyAppliedRevision())
	tl := r.GetTimeline()
	a.printf("\nTimeline:\n")
	prev := tl.GetAtCluster()
	for _, s := range []struct {
		name string
		at   *timestamppb.Timestamp
	}{{"at cluster", tl.GetAtCluster()}, {"bound", tl.GetBound()}, {"at node", tl.GetAtNode()}, {"pulled", tl.GetPulled()}, {"network ready", tl.GetNetworkReady()}, {"started", tl.GetStarted()}, {"ready", tl.GetReady()}} {
		if s.at == nil {
			continue
		}
		a.printf("  %-14s %s  +%s\n", s.name, s.at.AsTime().Local().Format("15:04:05.000"), s.at.AsTime().Sub(prev.AsTime()).Round(time.Millisecond))
		prev = s.at
	}
	a.printf("\nContainers:\n")
	t := newTable("  NAME", "STATE", "READY", "PID", "RESTARTS", "MEMORY", "LAST EXIT")
	for _, c := range r.GetContainers() {
		exit := "-"
		if c.GetLastExitReason() != "" {
			exit = fmt.Sprintf("%s (code %d) %s ago", c.GetLastExitReason(), c.GetLastExitCode(), age(c.GetLastExitTime(), time.Now()))
		}
		t.add("  "+c.GetName(), word(c.GetState().String(), "REPLICA_STATE_"), fmt.Sprint(c.GetReady()), fmt.Sprint(c.GetPid()), fmt.Sprint(c.GetRestarts()), bytesText(c.GetMemoryBytes()), exit)
	}
	a.print(t)
	return a.tailEvents(ctx, cc, r.GetName())
}

// replicas of a workload ("-" for all), read through; silent clusters are noted.
func (a *app) replicas(ctx context.Context, cc grpc.ClientConnInterface, tenant, workload, cluster string) ([]*portolanv1.Replica, error) {
	r, err := portolanv1.NewRuntimeServiceClient(cc).ListReplicas(ctx, &portolanv1.ListReplicasRequest{Parent: api.WorkloadName(tenant, last(workload)), Cluster: cluster})
	if err != nil {
		return nil, err
	}
	a.silent(r.GetSilentClusters())
	return r.GetReplicas(), nil
}

// findReplica finds one by its ID or name in full.
func (a *app) findReplica(ctx context.Context, cc grpc.ClientConnInterface, id string) (*portolanv1.Replica, error) {
	tenant := a.tenant
	if t := api.TenantOf(id); t != "" {
		tenant = t
	}
	if tenant == "" {
		return nil, fmt.Errorf("which tenant? say --tenant NAME, or the replica's name in full")
	}
	rs, err := a.replicas(ctx, cc, tenant, "-", "")
	if err != nil {
		return nil, err
	}
	for _, r := range rs {
		if last(r.GetName()) == last(id) {
			return r, nil
		}
	}
	return nil, api.E(api.NotFound, "find replica "+last(id), "there is none in tenant %s: see `portolan get replicas -t %s`", tenant, tenant)
}

// nodes of one cluster, or of all.
func (a *app) nodes(ctx context.Context, cc grpc.ClientConnInterface, cluster string) ([]*portolanv1.NodeInfo, error) {
	names := []string{api.ClusterName(last(cluster))}
	if cluster == "" {
		k, err := manifest.FindKind("cluster")
		if err != nil {
			return nil, err
		}
		cs, err := (objects{cc: cc}).list(ctx, k, "", nil)
		if err != nil {
			return nil, err
		}
		names = nil
		for _, c := range cs {
			names = append(names, text(c, "name"))
		}
	}
	var all []*portolanv1.NodeInfo
	for _, n := range names {
		r, err := portolanv1.NewClusterServiceClient(cc).ListNodes(ctx, &portolanv1.ListNodesRequest{Cluster: n})
		if err != nil && len(names) > 1 && api.KindOf(err) == api.Unavailable {
			a.silent([]string{n})
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, r.GetNodes()...)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].GetName() < all[j].GetName() })
	return all, nil
}

func (a *app) explainCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "explain workload NAME", Short: "Why it is where it is, why not elsewhere, and what it should request", GroupID: "objects", Args: cobra.ExactArgs(2),
		Example: `  portolan explain workload web -t shop`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			k, err := manifest.FindKind(args[0])
			if err != nil {
				return err
			}
			if k.Name != "Workload" {
				return fmt.Errorf("only workloads are placed: say `portolan explain workload NAME`")
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			name, err := k.FullName(a.tenant, args[1])
			if err != nil {
				return err
			}
			r, err := portolanv1.NewWorkloadServiceClient(cc).ExplainWorkload(cmd.Context(), &portolanv1.ExplainWorkloadRequest{Name: name})
			if err != nil {
				return err
			}
			if a.output == "json" || a.output == "yaml" {
				_, err := a.machine(true, []proto.Message{r})
				return err
			}
			a.explain(name, r)
			return nil
		},
	}
	a.outputFlag(c)
	return c
}

func (a *app) explain(name string, r *portolanv1.ExplainWorkloadResponse) {
	a.printf("%s wants %s", short(name), wanted(r))
	if r.GetUnplacedReplicas() > 0 {
		a.printf("; %d without a place", r.GetUnplacedReplicas())
	}
	if r.GetFailoverUnplacedReplicas() > 0 {
		a.printf("; %d more, to stand in for lost clusters, have no place", r.GetFailoverUnplacedReplicas())
	}
	a.printf("\n\n")
	a.verdicts(r)
	a.printf("\nWhy:\n")
	for _, m := range r.GetReasons() {
		a.printf("  %s\n", reasonsText([]*portolanv1.Reason{m}))
	}
	for _, c := range r.GetClusters() {
		a.printf("  %s: %s\n", last(c.GetCluster()), orDash(reasonsText(c.GetReasons())))
		if len(c.GetRemedies()) > 0 && !c.GetFeasible() {
			a.printf("    it would fit: %s\n", remediesText(c.GetRemedies()))
		} else if len(c.GetRemedies()) > 0 && r.GetUnplacedReplicas() > 0 {
			a.printf("    more would fit: %s\n", remediesText(c.GetRemedies()))
		}
	}
	if len(r.GetNodes()) > 0 {
		a.printf("\nReplicas that wait for a node:\n")
	}
	for _, v := range r.GetNodes() {
		a.printf("  %s", v.GetCluster())
		if v.GetReplica() != "" {
			a.printf(", revision %s", v.GetReplica())
		}
		a.printf(": %s\n", reasonsText(v.GetReasons()))
		if n := nearestText(v); n != "" {
			a.printf("    %s\n", n)
		}
		for i, m := range v.GetRemedies() {
			a.printf("    %s: %s\n", [2]string{"it would fit", "or"}[min(i, 1)], m.GetMessage())
		}
	}
	a.scaling(r.GetScaling())
	a.requests(r.GetRequests())
}

// scaling says what each cluster's last look at a workload that scales by itself
// came to.
func (a *app) scaling(list []*portolanv1.ScaleVerdict) {
	if len(list) == 0 {
		return
	}
	a.printf("\nHow it scales:\n")
	for _, v := range list {
		a.printf("  %s: %d replicas are wanted\n", v.GetCluster(), v.GetReplicas())
		for _, r := range v.GetReasons() {
			a.printf("    %s\n", reasonsText([]*portolanv1.Reason{r}))
		}
	}
}

// describeScaling is the same of one workload; what does not answer is left out.
func (a *app) describeScaling(ctx context.Context, cc grpc.ClientConnInterface, w *portolanv1.Workload) error {
	if w.GetSpec().GetAutoscale() == nil {
		return nil
	}
	r, err := portolanv1.NewWorkloadServiceClient(cc).ExplainWorkload(ctx, &portolanv1.ExplainWorkloadRequest{Name: w.GetName()})
	if err != nil && api.KindOf(err) != api.Unavailable {
		return err
	}
	a.scaling(r.GetScaling())
	return nil
}

// nearestText says which node comes nearest, unless tenants are not told, and what
// keeps from it.
func nearestText(v *portolanv1.NodeVerdict) string {
	node, why := v.GetNearest(), v.GetNearestReason()
	switch {
	case node != "" && why != "":
		return "nearest is node " + node + ": " + why
	case node != "":
		return "nearest is node " + node
	case why != "":
		return "at the nearest node: " + why
	}
	return ""
}

// wanted is how many replicas there are to be; of a daemon, in how many clusters.
func wanted(r *portolanv1.ExplainWorkloadResponse) string {
	if r.GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_DAEMON {
		return fmt.Sprintf("to be in %d clusters", r.GetDesiredReplicas())
	}
	return fmt.Sprintf("%d replicas", r.GetDesiredReplicas())
}

// verdicts is the table of clusters, with what they were compared by: scores grow
// with what is better, so that they are prices and times below zero.
func (a *app) verdicts(r *portolanv1.ExplainWorkloadResponse) {
	heads, by := []string{"CLUSTER", "POSSIBLE", "REPLICAS"}, func(int64) string { return "" }
	plain := func(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }
	switch scored := slices.ContainsFunc(r.GetClusters(), func(c *portolanv1.ClusterVerdict) bool { return c.GetScore() != 0 }); {
	case !scored: // there are no prices
	case r.GetScoreOf() == portolanv1.Objective_OBJECTIVE_COST:
		heads, by = append(heads, "PER REPLICA-HOUR"), func(micros int64) string { return plain(float64(micros) / 1e6) }
	case r.GetScoreOf() == portolanv1.Objective_OBJECTIVE_LATENCY:
		heads, by = append(heads, "LATENCY"), func(micros int64) string { return plain(float64(micros)/1000) + "ms" }
	default: // from a server that does not say
	}
	t := newTable(heads...)
	for _, c := range r.GetClusters() {
		possible := "no"
		if c.GetFeasible() {
			possible = "yes"
		}
		row := []string{last(c.GetCluster()), possible, fmt.Sprint(c.GetReplicas()), by(-c.GetScore())}
		t.add(row[:len(heads)]...)
	}
	a.print(t)
}

// requests says what replicas should request by what they used.
func (a *app) requests(list []*portolanv1.RequestAdvice) {
	if len(list) == 0 {
		return
	}
	a.printf("\nWhat a replica requests, and should by what it used:\n")
	t := newTable("CLUSTER", "CPU", "SHOULD BE", "MEMORY", "SHOULD BE")
	for _, q := range list {
		have, want, low, high := q.GetRequested(), q.GetTarget(), q.GetLower(), q.GetUpper()
		t.add(q.GetCluster(), coresText(have.GetCpuMilli()), should(have.GetCpuMilli(), low.GetCpuMilli(), want.GetCpuMilli(), high.GetCpuMilli(), coresText),
			bytesText(have.GetMemoryBytes()), should(have.GetMemoryBytes(), low.GetMemoryBytes(), want.GetMemoryBytes(), high.GetMemoryBytes(), bytesText))
	}
	a.print(t)
	for _, q := range list {
		a.printf("  %s: %s\n", q.GetCluster(), q.GetReason().GetMessage())
	}
}

// should is the figure to change to; a request inside the bounds is left alone.
func should(have, low, want, high int64, text func(int64) string) string {
	switch {
	case have < low:
		return text(want) + " (too little)"
	case have > high:
		return text(want) + " (too much)"
	}
	return "as it is"
}

// remediesText joins what is to be done together.
func remediesText(rs []*portolanv1.Reason) string {
	var out []string
	for _, r := range rs {
		out = append(out, r.GetMessage())
	}
	return strings.Join(out, " and ")
}

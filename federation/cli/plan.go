package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

// planOptions are what is thought of; one of them.
type planOptions struct {
	files         []string
	remove        string
	lost, drained string
	added         string
	region        string
	cpu, memory   string
}

func (a *app) planCommand() *cobra.Command {
	var o planOptions
	c := &cobra.Command{
		Use: "plan (-f FILE… | --delete WORKLOAD | --lost CLUSTER | --drained CLUSTER | --added CLUSTER)", Short: "What a change would do: placements, cost, who is displaced", GroupID: "objects", Args: cobra.NoArgs,
		Long: `Nothing is changed. For manifests it ends with a token: given to apply with
--plan, the change is refused when it would do something else by then.
For a cluster it shows what moves and what would find no place.`,
		Example: `  portolan plan -f web.yaml
  portolan apply -f web.yaml --plan 5b2c…   # exactly what was shown, or nothing
  portolan plan --delete web -t shop
  portolan plan --lost eu-west              # is there room elsewhere?
  portolan plan --added ap-south --region ap-south --cpu 64 --memory 256Gi`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			reqs, err := a.planRequests(o)
			if err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			return a.plan(cmd.Context(), cc, reqs, len(o.files) > 0)
		},
	}
	f := c.Flags()
	f.StringArrayVarP(&o.files, "filename", "f", nil, "file, folder or - for stdin, of which the workloads are planned")
	f.StringVar(&o.remove, "delete", "", "workload that would be deleted")
	f.StringVar(&o.lost, "lost", "", "cluster that would be silent")
	f.StringVar(&o.drained, "drained", "", "cluster that everything would leave")
	f.StringVar(&o.added, "added", "", "cluster that would be new")
	f.StringVar(&o.region, "region", "", "region of the new cluster")
	f.StringVar(&o.cpu, "cpu", "", "capacity of the new cluster: cores")
	f.StringVar(&o.memory, "memory", "", "capacity of the new cluster: memory")
	c.MarkFlagsOneRequired("filename", "delete", "lost", "drained", "added")
	c.MarkFlagsMutuallyExclusive("filename", "delete", "lost", "drained", "added")
	a.outputFlag(c)
	return c
}

// planRequests turns the flags into what the server is asked.
func (a *app) planRequests(o planOptions) ([]*portolanv1.PlanRequest, error) {
	cluster := func(kind portolanv1.ClusterChange_Kind, c *portolanv1.Cluster) []*portolanv1.PlanRequest {
		return []*portolanv1.PlanRequest{{Change: &portolanv1.PlanRequest_Cluster{Cluster: &portolanv1.ClusterChange{Kind: kind, Cluster: c}}}}
	}
	switch {
	case o.lost != "":
		return cluster(portolanv1.ClusterChange_KIND_LOST, &portolanv1.Cluster{Name: api.ClusterName(last(o.lost))}), nil
	case o.drained != "":
		return cluster(portolanv1.ClusterChange_KIND_DRAINED, &portolanv1.Cluster{Name: api.ClusterName(last(o.drained))}), nil
	case o.added != "":
		return a.planAdded(o, cluster)
	case o.remove != "":
		k, err := manifest.FindKind("workload")
		if err != nil {
			return nil, err
		}
		name, err := k.FullName(a.tenant, o.remove)
		if err != nil {
			return nil, err
		}
		return []*portolanv1.PlanRequest{{Change: &portolanv1.PlanRequest_DeleteWorkload{DeleteWorkload: name}}}, nil
	}
	objs, err := manifest.ReadPaths(o.files, a.in)
	if err != nil {
		return nil, err
	}
	var out []*portolanv1.PlanRequest
	for _, obj := range objs {
		if w, ok := obj.Message.(*portolanv1.Workload); ok {
			out = append(out, &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_Workload{Workload: w}})
		}
	}
	if len(out) == 0 {
		return nil, errors.New("there is no workload in these files: other objects are not placed, see `portolan diff`")
	}
	return out, nil
}

func (a *app) planAdded(o planOptions, cluster func(portolanv1.ClusterChange_Kind, *portolanv1.Cluster) []*portolanv1.PlanRequest) ([]*portolanv1.PlanRequest, error) {
	cpu, err := api.ParseCPU(o.cpu)
	if err != nil {
		return nil, err
	}
	memory, err := api.ParseBytes(o.memory)
	if err != nil {
		return nil, err
	}
	if o.region == "" || cpu == 0 || memory == 0 {
		return nil, errors.New("a new cluster needs --region, --cpu and --memory")
	}
	return cluster(portolanv1.ClusterChange_KIND_ADDED, &portolanv1.Cluster{
		Name: api.ClusterName(last(o.added)), Spec: &portolanv1.ClusterSpec{Region: o.region}, Status: &portolanv1.ClusterStatus{CpuMilli: cpu, MemoryBytes: memory},
	}), nil
}

func (a *app) plan(ctx context.Context, cc grpc.ClientConnInterface, reqs []*portolanv1.PlanRequest, tokens bool) error {
	var answers []proto.Message
	var token []string
	refused := false
	for _, req := range reqs {
		r, err := portolanv1.NewWorkloadServiceClient(cc).Plan(ctx, req)
		if err != nil {
			return err
		}
		answers = append(answers, r)
		token = append(token, r.GetToken())
		refused = refused || len(r.GetAdmission()) > 0
	}
	if a.output == "json" || a.output == "yaml" {
		_, err := a.machine(len(answers) == 1, answers)
		return err
	}
	for _, m := range answers {
		a.showPlan(m.(*portolanv1.PlanResponse))
	}
	switch {
	case refused:
		return errors.New("admission would refuse this: see above")
	case tokens:
		a.printf("\nto do exactly this: portolan apply -f … --plan %s\n", strings.Join(token, "."))
	}
	return nil
}

func (a *app) showPlan(p *portolanv1.PlanResponse) {
	t := newTable("WORKLOAD", "CLUSTER", "REPLICAS", "COST/H", "WHY")
	unplaced := 0
	for _, w := range p.GetWorkloads() {
		name := short(w.GetWorkload())
		for _, x := range w.GetPlacements() {
			t.add(name, x.GetCluster(), beforeAfter(x.GetReplicasBefore(), x.GetReplicasAfter()), "", reasonsText(x.GetReasons()))
			name = ""
		}
		t.add(name, "", fmt.Sprintf("%d wanted", w.GetDesiredReplicas()), moneyChange(w.GetCostBeforeMicros(), w.GetCostAfterMicros()), reasonsText(w.GetReasons()))
		for _, d := range w.GetDisplaced() {
			t.add("", d.GetCluster(), fmt.Sprintf("-%d", d.GetReplicas()), "", "displaces "+short(d.GetWorkload())+", of lower priority")
		}
		unplaced += int(w.GetUnplacedReplicas())
	}
	if len(p.GetWorkloads()) == 0 {
		a.printf("nothing changes\n")
		return
	}
	a.print(t)
	a.printf("\ncost per hour %s", moneyChange(p.GetCostBeforeMicros(), p.GetCostAfterMicros()))
	if unplaced > 0 {
		a.printf("; %d replicas would have no place", unplaced)
	}
	a.printf("\n")
	for _, r := range p.GetAdmission() {
		a.printf("refused: %s\n", r.GetMessage())
	}
}

func beforeAfter(before, after int32) string {
	if before == after {
		return fmt.Sprint(after)
	}
	return fmt.Sprintf("%d → %d", before, after)
}

// moneyChange shows amounts of currency per hour, given in micro-units.
func moneyChange(before, after int64) string {
	if before == after {
		return fmt.Sprintf("%.4f", float64(after)/1e6)
	}
	return fmt.Sprintf("%.4f → %.4f", float64(before)/1e6, float64(after)/1e6)
}

// splitPlan gives each workload of the objects its token.
func splitPlan(token string, objs []manifest.Object) (map[string]string, error) {
	if token == "" {
		return nil, nil
	}
	parts := strings.Split(token, ".")
	out := map[string]string{}
	for _, obj := range objs {
		if obj.Kind.Name != "Workload" {
			continue
		}
		if len(parts) == 0 {
			break
		}
		out[obj.Name()], parts = parts[0], parts[1:]
	}
	if len(parts) > 0 || len(out) == 0 || len(out) != strings.Count(token, ".")+1 {
		return nil, errors.New("the plan is of other files: plan these again")
	}
	return out, nil
}

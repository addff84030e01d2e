package cli

import (
	"cmp"
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
		Long: `Nothing is changed. The manifests may have one workload; of several, each would
be planned as if the others were as they are. It ends with a token: given to
apply with --plan, the workload is refused when its change would do something
else by then, before anything of the files is stored.
For a cluster it shows what moves and what would find no place.`,
		Example: `  portolan plan -f web.yaml
  portolan apply -f web.yaml --plan 5b2c…   # what was shown, or nothing
  portolan plan --delete web -t shop
  portolan plan --lost eu-west              # is there room elsewhere?
  portolan plan --added ap-south --region ap-south --cpu 64 --memory 256Gi`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			req, err := a.planRequest(o)
			if err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			return a.plan(cmd.Context(), cc, req, len(o.files) > 0)
		},
	}
	f := c.Flags()
	f.StringArrayVarP(&o.files, "filename", "f", nil, "file, folder or - for stdin, of which the workload is planned")
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

// planRequest turns the flags into what the server is asked.
func (a *app) planRequest(o planOptions) (*portolanv1.PlanRequest, error) {
	cluster := func(kind portolanv1.ClusterChange_Kind, c *portolanv1.Cluster) *portolanv1.PlanRequest {
		return &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_Cluster{Cluster: &portolanv1.ClusterChange{Kind: kind, Cluster: c}}}
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
		return &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_DeleteWorkload{DeleteWorkload: name}}, nil
	}
	objs, err := manifest.ReadPaths(o.files, a.in)
	if err != nil {
		return nil, err
	}
	w, err := plannedWorkload(objs)
	if err != nil {
		return nil, err
	}
	return &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_Workload{Workload: w}}, nil
}

// plannedWorkload is the one workload of the objects. Plans of several, each made as
// if the others were as they are, could promise one room twice.
func plannedWorkload(objs []manifest.Object) (*portolanv1.Workload, error) {
	var found []*portolanv1.Workload
	var names []string
	for _, obj := range objs {
		if w, ok := obj.Message.(*portolanv1.Workload); ok {
			found, names = append(found, w), append(names, short(w.GetName()))
		}
	}
	switch len(found) {
	case 0:
		return nil, errors.New("there is no workload in these files: other objects are not placed, see `portolan diff`")
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("a plan is of one workload, and there are %d in these files (%s): give each a file, plan and apply it, and then the next",
		len(found), strings.Join(names, ", "))
}

func (a *app) planAdded(o planOptions, cluster func(portolanv1.ClusterChange_Kind, *portolanv1.Cluster) *portolanv1.PlanRequest) (*portolanv1.PlanRequest, error) {
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

func (a *app) plan(ctx context.Context, cc grpc.ClientConnInterface, req *portolanv1.PlanRequest, token bool) error {
	p, err := portolanv1.NewWorkloadServiceClient(cc).Plan(ctx, req)
	if err != nil {
		return err
	}
	if a.output == "json" || a.output == "yaml" {
		_, err := a.machine(true, []proto.Message{p})
		return err
	}
	a.showPlan(p)
	switch {
	case len(p.GetAdmission()) > 0:
		return errors.New("admission would refuse this: see above")
	case token:
		a.printf("\nto do this: portolan apply -f … --plan %s\n", p.GetToken())
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
			t.add("", d.GetCluster(), fmt.Sprintf("-%d", d.GetReplicas()), "", "displaces "+cmp.Or(short(d.GetWorkload()), "other tenants")+", of lower priority")
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

// checkPlan asks the server whether the workload of the objects may be changed under
// a plan's token, before anything is stored. It gives the tokens by workload.
func checkPlan(ctx context.Context, o objects, token string, objs []manifest.Object) (map[string]string, error) {
	if token == "" {
		return nil, nil
	}
	w, err := plannedWorkload(objs)
	if err != nil {
		return nil, err
	}
	o.plans = map[string]string{w.GetName(): token}
	for _, obj := range objs {
		if obj.Message == proto.Message(w) {
			if _, err := o.put(ctx, obj, true); err != nil {
				return nil, err
			}
		}
	}
	return o.plans, nil
}

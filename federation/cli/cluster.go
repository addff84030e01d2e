package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func (a *app) clusterCommand() *cobra.Command {
	c := &cobra.Command{Use: "cluster", Short: "Register clusters and nodes", GroupID: "fleet", Example: "  portolan cluster add ap-south --region ap-south\n  portolan cluster list"}
	list := &cobra.Command{
		Use: "list", Short: "Show clusters", Args: cobra.NoArgs, Example: "  portolan cluster list -o wide",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			return a.getObjects(cmd, []string{"clusters"}, nil)
		},
	}
	a.outputFlag(list)
	c.AddCommand(list, a.clusterAddCommand(), &cobra.Command{
		Use: "token NAME", Short: "Make a one-time token with which a registered cluster joins", Args: cobra.ExactArgs(1),
		Long:    "The token is valid once and for at most ten minutes. It is printed alone, so that it can go into a file.",
		Example: "  portolan cluster token ap-south > /etc/portolan/join-token",
		RunE: func(cmd *cobra.Command, args []string) error {
			cc, err := a.dial()
			if err != nil {
				return err
			}
			return a.token(portolanv1.NewClusterServiceClient(cc).CreateClusterJoinToken(cmd.Context(), &portolanv1.CreateClusterJoinTokenRequest{Name: api.ClusterName(last(args[0]))}))
		},
	}, &cobra.Command{
		Use: "node-token CLUSTER NODE", Short: "Make a one-time token with which a node joins a cluster", Args: cobra.ExactArgs(2),
		Long:    "The cluster itself makes the token; it must be connected.",
		Example: "  portolan cluster node-token eu-west eu-west-3 > /etc/portolan/join-token",
		RunE: func(cmd *cobra.Command, args []string) error {
			cc, err := a.dial()
			if err != nil {
				return err
			}
			return a.token(portolanv1.NewClusterServiceClient(cc).CreateNodeJoinToken(cmd.Context(), &portolanv1.CreateNodeJoinTokenRequest{Cluster: api.ClusterName(last(args[0])), Node: args[1]}))
		},
	})
	return c
}

// token prints a token, and when it ends to stderr.
func (a *app) token(t interface{ GetToken() string }, err error) error {
	if err != nil {
		return err
	}
	a.printf("%s\n", t.GetToken())
	return nil
}

func (a *app) clusterAddCommand() *cobra.Command {
	var spec portolanv1.ClusterSpec
	var labels map[string]string
	var taints []string
	var cpu, mem float64
	c := &cobra.Command{
		Use: "add NAME", Short: "Register a cluster and print its join token", Args: cobra.ExactArgs(1),
		Example: `  portolan cluster add ap-south --region ap-south --zone ap-south-1a --cpu-price 0.04 \
    --taint gpu=true:no-schedule`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, s := range taints {
				t, err := parseTaint(s)
				if err != nil {
					return err
				}
				spec.Taints = append(spec.Taints, t)
			}
			spec.CpuCoreHourMicros, spec.MemoryGibHourMicros = int64(cpu*1e6), int64(mem*1e6)
			cc, err := a.dial()
			if err != nil {
				return err
			}
			clusters := portolanv1.NewClusterServiceClient(cc)
			name := api.ClusterName(args[0])
			if _, err := clusters.CreateCluster(cmd.Context(), &portolanv1.CreateClusterRequest{Cluster: &portolanv1.Cluster{Name: name, Labels: labels, Spec: &spec}}); err != nil {
				return err
			}
			a.notef("%s is registered. Put this token into the cluster's tokenFile within ten minutes:\n", name)
			return a.token(clusters.CreateClusterJoinToken(cmd.Context(), &portolanv1.CreateClusterJoinTokenRequest{Name: name}))
		},
	}
	f := c.Flags()
	f.StringVar(&spec.Region, "region", "", "region")
	f.StringVar(&spec.Zone, "zone", "", "zone")
	f.StringVar(&spec.Provider, "provider", "", "provider")
	f.Float64Var(&cpu, "cpu-price", 0, "price of a core-hour")
	f.Float64Var(&mem, "memory-price", 0, "price of a GiB-hour")
	f.StringToStringVar(&labels, "labels", nil, "k=v,…")
	f.StringArrayVar(&taints, "taint", nil, "key=value:effect; effects: no-schedule, prefer-no-schedule, no-execute")
	_ = c.MarkFlagRequired("region")
	return c
}

func parseTaint(s string) (*portolanv1.Taint, error) {
	kv, effect, ok := strings.Cut(s, ":")
	key, value, _ := strings.Cut(kv, "=")
	e, known := portolanv1.TaintEffect_value["TAINT_EFFECT_"+strings.ToUpper(strings.ReplaceAll(effect, "-", "_"))]
	if !ok || key == "" || !known || e == 0 {
		return nil, fmt.Errorf("taint %q: say key=value:no-schedule, :prefer-no-schedule or :no-execute", s)
	}
	return &portolanv1.Taint{Key: key, Value: value, Effect: portolanv1.TaintEffect(e)}, nil
}

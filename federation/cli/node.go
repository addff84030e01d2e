package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// pollNodes is how often a drain that is waited for is looked at.
const pollNodes = 500 * time.Millisecond

func (a *app) nodeCommand() *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "Cordon, drain and delete nodes", GroupID: "fleet", Example: "  portolan node list\n  portolan node drain eu-west/eu-west-1"}
	list := &cobra.Command{
		Use: "list [CLUSTER]", Short: "Show nodes", Args: cobra.MaximumNArgs(1), Example: "  portolan node list eu-west -o wide",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			return a.getNodes(cmd, strings.Join(args, ""))
		},
	}
	a.outputFlag(list)
	c.AddCommand(list, a.nodeDrainCommand(), a.nodeDeleteCommand(),
		a.nodeModeCommand("cordon", "Bind nothing new to a node", "What runs there stays.", portolanv1.NodeMode_NODE_MODE_CORDONED),
		a.nodeModeCommand("uncordon", "Use a node again", "Ends a cordon or a drain.", portolanv1.NodeMode_NODE_MODE_UNSPECIFIED))
	return c
}

// nodeNames turns "eu-west/eu-west-1", or "eu-west" with a pool, into a name.
func nodeName(arg, pool string) (string, error) {
	cluster, node, ok := strings.Cut(strings.TrimPrefix(arg, "clusters/"), "/")
	node = strings.TrimPrefix(node, "nodes/")
	switch {
	case pool != "" && !ok:
		return api.ClusterName(cluster) + "/pools/" + pool, nil
	case pool != "":
		return "", errors.New("say CLUSTER with --pool, or CLUSTER/NODE without")
	case !ok || node == "":
		return "", fmt.Errorf("which node? say CLUSTER/NODE, as in `portolan node drain %s/%s-1`", cluster, cluster)
	}
	return api.ClusterName(cluster) + "/nodes/" + node, nil
}

func (a *app) nodeModeCommand(verb, short, long string, mode portolanv1.NodeMode) *cobra.Command {
	var pool string
	c := &cobra.Command{
		Use: verb + " (CLUSTER/NODE | CLUSTER --pool POOL)", Short: short, Long: long, Args: cobra.ExactArgs(1),
		Example: fmt.Sprintf("  portolan node %s eu-west/eu-west-1\n  portolan node %s eu-west --pool spot", verb, verb),
		RunE: func(cmd *cobra.Command, args []string) error {
			nodes, err := a.setMode(cmd.Context(), args[0], pool, mode, 0)
			if err != nil {
				return err
			}
			for _, n := range nodes {
				a.printf("%s %sed\n", strings.TrimPrefix(n.GetName(), "clusters/"), verb)
			}
			return nil
		},
	}
	c.Flags().StringVar(&pool, "pool", "", "all nodes of a pool")
	return c
}

func (a *app) setMode(ctx context.Context, arg, pool string, mode portolanv1.NodeMode, deadline time.Duration) ([]*portolanv1.NodeInfo, error) {
	name, err := nodeName(arg, pool)
	if err != nil {
		return nil, err
	}
	cc, err := a.dial()
	if err != nil {
		return nil, err
	}
	req := &portolanv1.SetNodeModeRequest{Name: name, Mode: mode}
	if deadline > 0 {
		req.Deadline = durationpb.New(deadline)
	}
	r, err := portolanv1.NewClusterServiceClient(cc).SetNodeMode(ctx, req)
	return r.GetNodes(), err
}

func (a *app) nodeDrainCommand() *cobra.Command {
	var pool string
	var deadline, timeout time.Duration
	var wait bool
	c := &cobra.Command{
		Use: "drain (CLUSTER/NODE | CLUSTER --pool POOL)", Short: "Have everything leave a node, within its disruption budgets", Args: cobra.ExactArgs(1),
		Long: `Nothing new is bound to the node, and what runs there is replaced elsewhere,
as fast as the workloads' disruption budgets allow. After --deadline budgets no
longer hold. The node stays drained until "portolan node uncordon".`,
		Example: `  portolan node drain eu-west/eu-west-1
  portolan node drain eu-west --pool spot --deadline 30m
  portolan node uncordon eu-west/eu-west-1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			nodes, err := a.setMode(cmd.Context(), args[0], pool, portolanv1.NodeMode_NODE_MODE_DRAINING, deadline)
			if err != nil {
				return err
			}
			names := map[string]bool{}
			for _, n := range nodes {
				names[n.GetName()] = true
				a.printf("%s is draining\n", strings.TrimPrefix(n.GetName(), "clusters/"))
			}
			if !wait {
				return nil
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return a.waitDrained(ctx, strings.SplitN(strings.TrimPrefix(args[0], "clusters/"), "/", 2)[0], names)
		},
	}
	f := c.Flags()
	f.StringVar(&pool, "pool", "", "all nodes of a pool")
	f.DurationVar(&deadline, "deadline", 0, "after this long, budgets no longer hold; never when 0")
	f.BoolVar(&wait, "wait", true, "wait until they are empty; daemons leave last")
	f.DurationVar(&timeout, "timeout", 30*time.Minute, "how long --wait waits")
	return c
}

func (a *app) nodeDeleteCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "delete CLUSTER/NODE", Short: "Take a lost node out of its cluster", Args: cobra.ExactArgs(1),
		Long: `Its certificate is worth nothing afterwards, its replicas are made elsewhere, and
volumes on it are given up. A node that is not lost is taken out only with --force:
drain it first.`,
		Example: "  portolan node delete eu-west/eu-west-2\n  portolan node delete eu-west/eu-west-2 --force",
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := nodeName(args[0], "")
			if err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			if _, err := portolanv1.NewClusterServiceClient(cc).DeleteNode(cmd.Context(), &portolanv1.DeleteNodeRequest{Name: name, Force: force}); err != nil {
				return err
			}
			a.printf("%s deleted\n", strings.TrimPrefix(name, "clusters/"))
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also a node that is not lost")
	return c
}

// waitDrained shows what still blocks until nothing does.
func (a *app) waitDrained(ctx context.Context, cluster string, names map[string]bool) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	began, shown := time.Now(), ""
	for {
		nodes, err := a.nodes(ctx, cc, cluster)
		if err != nil {
			return err
		}
		blocked, err := stillThere(nodes, names)
		if err != nil {
			return err
		}
		if len(blocked) == 0 {
			a.printf("drained after %s\n", time.Since(began).Round(100*time.Millisecond))
			return nil
		}
		if now := strings.Join(blocked, "\n  "); now != shown && time.Since(began) > 2*time.Second {
			a.notef("waiting for\n  %s\n", now)
			shown = now
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not drained in time; still there:\n  %s\nthe drain goes on: see `portolan describe cluster %s`", strings.Join(blocked, "\n  "), cluster)
		case <-time.After(pollNodes):
		}
	}
}

// stillThere says of drained nodes what still runs there. What runs is as of now;
// the reasons are as of the cluster's last look, which may be one before the drain.
func stillThere(nodes []*portolanv1.NodeInfo, drained map[string]bool) ([]string, error) {
	var out []string
	for _, n := range nodes {
		if !drained[n.GetName()] || n.GetReplicas() == 0 {
			continue
		}
		if n.GetMode() != portolanv1.NodeMode_NODE_MODE_DRAINING {
			return nil, fmt.Errorf("%s is drained no more: it takes replicas again, and has %s", last(n.GetName()), replicasText(n.GetReplicas()))
		}
		why := replicasText(n.GetReplicas())
		if len(n.GetBlocked()) > 0 {
			why = reasonsText(n.GetBlocked())
		}
		out = append(out, last(n.GetName())+": "+why)
	}
	return out, nil
}

// replicasText counts replicas.
func replicasText(n int32) string {
	if n == 1 {
		return "1 replica"
	}
	return fmt.Sprintf("%d replicas", n)
}

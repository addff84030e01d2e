// Command portolan-node is a machine of a cluster: `agent` holds the session up
// and runs containers, `warden` serves them from the last good generation on
// disk. They are two processes of one binary, so that neither's crash or upgrade
// disturbs the other.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "portolan-node:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	c := &cobra.Command{Use: "portolan-node", Short: "A machine of a Portolan cluster", SilenceUsage: true, SilenceErrors: true}
	c.AddCommand(
		verb("agent", "Run what the cluster assigned to this node", runAgent),
		verb("warden", "Serve the replicas of this node from disk: proxies, names, authorization, identities", runWarden),
		verb("decisions", "Show the warden's newest authorization decisions, one JSON object a line, newest first", func(ctx context.Context, c *config, _ *slog.Logger) error {
			return showDecisions(ctx, filepath.Join(c.RunDir, "warden.sock"), os.Stdout)
		}),
	)
	return c
}

func verb(use, short string, run func(context.Context, *config, *slog.Logger) error) *cobra.Command {
	var file string
	c := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(file)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.level}))
			return run(cmd.Context(), cfg, log.With("node", cfg.Node, "part", use))
		},
	}
	c.Flags().StringVar(&file, "config", "", "path of node.yaml")
	_ = c.MarkFlagRequired("config")
	return c
}

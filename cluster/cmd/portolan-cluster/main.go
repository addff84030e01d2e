// Command portolan-cluster is the regional control plane of one cluster: its
// state, its authority, the manager, the link to the federation and the service
// for its nodes. It wires them and owns the process: configuration, signals,
// ports, logs. Once it has joined a fleet it starts and works without the
// federation.
//
// Concurrency: every part runs in one group; the first that fails ends all.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "portolan-cluster:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "portolan-cluster", Short: "Portolan's control plane of one cluster",
		SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
	}
	cmd := &cobra.Command{Use: "serve", Short: "Serve the cluster until SIGTERM", Args: cobra.NoArgs}
	file := cmd.Flags().String("config", "", "file of the configuration (cluster.yaml)")
	_ = cmd.MarkFlagRequired("config")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := LoadConfig(*file)
		if err != nil {
			return err
		}
		return serve(cmd.Context(), c)
	}
	root.AddCommand(cmd)
	return root
}

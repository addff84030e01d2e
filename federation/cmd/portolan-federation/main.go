// Command portolan-federation is one replica of the global control plane: the
// tenants' API, the control loops, and the clusters' link, over one store. It
// wires them and owns the process: configuration, signals, ports, logs.
//
// Concurrency: every part runs in one group; the first that fails ends all.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "portolan-federation:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "portolan-federation", Short: "One replica of Portolan's global control plane",
		SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
	}
	root.AddCommand(serveCommand(), bootstrapCommand(), serverCertCommand(), userCommand())
	return root
}

// configured gives a command a --config flag and its content.
func configured(cmd *cobra.Command, run func(ctx context.Context, c *Config) error) *cobra.Command {
	file := cmd.Flags().String("config", "", "file of the configuration (federation.yaml)")
	_ = cmd.MarkFlagRequired("config")
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := LoadConfig(*file)
		if err != nil {
			return err
		}
		return run(cmd.Context(), c)
	}
	return cmd
}

func serveCommand() *cobra.Command {
	return configured(&cobra.Command{Use: "serve", Short: "Serve the API and the clusters until SIGTERM"}, serve)
}

func bootstrapCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "bootstrap", Short: "Make a fleet: authority, schema, first admin. May be repeated"}
	admin := cmd.Flags().String("admin", "admin", "name of the first fleet admin")
	out := cmd.Flags().String("out", "", "folder for the admin's key.pem, cert.pem and bundle.pem")
	_ = cmd.MarkFlagRequired("out")
	return configured(cmd, func(ctx context.Context, c *Config) error { return bootstrap(ctx, c, *admin, *out) })
}

func serverCertCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "issue-server-cert", Short: "Issue a certificate for a server of the fleet that is not Portolan's, a registry for example"}
	name := cmd.Flags().String("name", "", "DNS name under the fleet's domain")
	out := cmd.Flags().String("out", "", "folder for key.pem, cert.pem and bundle.pem")
	ttl := cmd.Flags().Duration("ttl", 90*24*time.Hour, "life of the certificate")
	_ = cmd.MarkFlagRequired("name")
	_ = cmd.MarkFlagRequired("out")
	return configured(cmd, func(ctx context.Context, c *Config) error { return issueServerCert(ctx, c, *name, *out, *ttl) })
}

func userCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "issue-user", Short: "Issue a certificate for a person or a machine that calls the API",
		Long:    "The certificate says who; bind a role to spiffe://<fleet>/user/<name> to say what they may.",
		Example: "  portolan-federation issue-user --config federation.yaml --name ada --out ./ada",
	}
	name := cmd.Flags().String("name", "", "name of the user")
	out := cmd.Flags().String("out", "", "folder for key.pem, cert.pem and bundle.pem")
	ttl := cmd.Flags().Duration("ttl", 30*24*time.Hour, "life of the certificate")
	_ = cmd.MarkFlagRequired("name")
	_ = cmd.MarkFlagRequired("out")
	return configured(cmd, func(ctx context.Context, c *Config) error { return issueUser(ctx, c, *name, *out, *ttl) })
}

// Command portolan is the CLI: verbs over the federation's API, and a whole
// local fleet.
package main

import (
	"context"
	"os"
	"os/signal"

	"github.com/portolan-io/portolan/federation/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

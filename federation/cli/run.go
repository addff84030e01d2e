package cli

import (
	"context"
	"io"

	"charm.land/fang/v2"
	"github.com/spf13/cobra"
)

// run executes with fang's help pages and completion; errors are printed once,
// by Main.
func run(ctx context.Context, root *cobra.Command) error {
	return fang.Execute(ctx, root,
		fang.WithErrorHandler(func(io.Writer, fang.Styles, error) {}),
		fang.WithoutManpage(),
	)
}

// Package cli is the command line over the API: verbs like kubectl's, words like
// the API's. It owns how things look to people; it decides nothing and stores
// nothing but contexts. Each command runs in one goroutine, but for streams.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/portolan-io/portolan/federation/client"
)

// app is what every command shares.
type app struct {
	in       io.Reader
	out, err io.Writer

	contexts string // file
	context  string // name
	tenant   string
	output   string

	conn *grpc.ClientConn
}

// New makes the root command. Output goes to the given writers.
func New(in io.Reader, out, errOut io.Writer) *cobra.Command {
	a := &app{in: in, out: out, err: errOut}
	root := &cobra.Command{
		Use:   "portolan",
		Short: "One fleet over many regional clusters",
		Long: `Portolan places workloads over regional clusters, connects them in a mesh with
identities and policy, and says why.

Start with a local fleet: portolan up --detach`,
		Example: `  portolan up --detach                    # a whole fleet on this machine
  portolan apply -f shop/ --wait          # say what should run
  portolan get workloads --tenant shop    # see it
  portolan explain workload web -t shop   # and why it is where it is`,
		SilenceUsage: true, SilenceErrors: true,
		PersistentPostRun: func(*cobra.Command, []string) { a.close() },
	}
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	f := root.PersistentFlags()
	f.StringVar(&a.contexts, "config", "", "file with contexts (default $PORTOLAN_CONFIG, else in the user's configuration folder)")
	f.StringVar(&a.context, "context", "", "context to use (default the current one)")
	f.StringVarP(&a.tenant, "tenant", "t", "", "tenant (default the context's)")
	root.AddGroup(
		&cobra.Group{ID: "objects", Title: "Objects:"},
		&cobra.Group{ID: "runtime", Title: "What runs:"},
		&cobra.Group{ID: "fleet", Title: "Fleet:"},
		&cobra.Group{ID: "local", Title: "On this machine:"},
	)
	root.AddCommand(
		a.applyCommand(), a.getCommand(), a.describeCommand(), a.deleteCommand(), a.diffCommand(), a.explainCommand(), a.waitCommand(),
		a.logsCommand(), a.execCommand(), a.eventsCommand(),
		a.clusterCommand(), a.capacityCommand(), a.costCommand(), a.policyCommand(), a.configCommand(),
		a.upCommand(), a.downCommand(), a.statusCommand(), a.localCommand(),
	)
	return root
}

// Main runs the CLI and returns the exit code.
func Main(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	root := New(in, out, errOut)
	root.SetArgs(args)
	err := run(ctx, root)
	if err == nil {
		return 0
	}
	if code, ok := errors.AsType[exitCode](err); ok {
		return int(code)
	}
	fmt.Fprintln(errOut, "portolan: "+explainError(err))
	return 1
}

// exitCode ends the CLI with a code and without words.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// load reads contexts and fills defaults.
func (a *app) load() (client.File, error) {
	if a.contexts == "" {
		p, err := client.DefaultPath()
		if err != nil {
			return client.File{}, err
		}
		a.contexts = p
	}
	return client.Load(a.contexts)
}

// dial connects to the federation of the chosen context.
func (a *app) dial() (*grpc.ClientConn, error) {
	if a.conn != nil {
		return a.conn, nil
	}
	f, err := a.load()
	if err != nil {
		return nil, err
	}
	c, err := f.Get(a.context)
	if err != nil {
		return nil, err
	}
	if a.tenant == "" {
		a.tenant = c.Tenant
	}
	a.conn, err = client.Dial(c)
	return a.conn, err
}

func (a *app) close() {
	if a.conn != nil {
		_ = a.conn.Close()
		a.conn = nil
	}
}

// needTenant gives the tenant, or says how to choose one.
func (a *app) needTenant() (string, error) {
	if a.tenant == "" {
		return "", errors.New("which tenant? say --tenant NAME, or set one in the context: portolan config set-context --tenant NAME")
	}
	return a.tenant, nil
}

// explainError turns an error into what a person needs: the sentence, one line
// per field, and what to do next.
func explainError(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	msg := s.Message()
	for _, d := range s.Details() {
		bad, ok := d.(*errdetails.BadRequest)
		if !ok || len(bad.GetFieldViolations()) == 0 {
			continue
		}
		head, _, _ := strings.Cut(msg, ": ")
		lines := []string{head + " was refused:"}
		for _, v := range bad.GetFieldViolations() {
			line := "  " + v.GetDescription()
			if v.GetField() != "" {
				line = "  " + v.GetField() + ": " + v.GetDescription()
			}
			lines = append(lines, line)
		}
		return strings.Join(lines, "\n")
	}
	switch s.Code() {
	case codes.Unavailable:
		return "the federation does not answer (" + msg + "); is it running? For a local fleet see `portolan status`"
	case codes.Unauthenticated:
		return msg + "; the context's certificate is not accepted: see `portolan config list`"
	case codes.Unimplemented:
		return "this federation is older than the CLI: " + msg
	}
	return msg
}

// terminal says whether the output is one, and how wide.
func (a *app) terminal() (width int, ok bool) {
	f, isFile := a.out.(*os.File)
	if !isFile || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	w, _, err := term.GetSize(int(f.Fd()))
	return w, err == nil && w > 20
}

func (a *app) printf(format string, args ...any) { fmt.Fprintf(a.out, format, args...) }
func (a *app) notef(format string, args ...any)  { fmt.Fprintf(a.err, format, args...) }

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

func (a *app) logsCommand() *cobra.Command {
	var follow, previous bool
	var container string
	var tail int32
	c := &cobra.Command{
		Use: "logs (WORKLOAD | REPLICA)", Short: "Print what a workload's replicas wrote", GroupID: "runtime", Args: cobra.ExactArgs(1),
		Example: `  portolan logs web -t shop              # all replicas, each line with its replica
  portolan logs -f web-x7k2p -t shop
  portolan logs --previous web-x7k2p -t shop   # before the last restart`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cc, err := a.dial()
			if err != nil {
				return err
			}
			rs, err := a.targets(cmd.Context(), cc, args[0])
			if err != nil {
				return err
			}
			var mu sync.Mutex
			errs := make([]error, len(rs))
			var wg sync.WaitGroup
			for i, r := range rs {
				prefix := ""
				if len(rs) > 1 {
					prefix = last(r.GetName()) + "  "
				}
				wg.Go(func() {
					errs[i] = a.streamLogs(cmd.Context(), cc, &portolanv1.LogsRequest{Replica: r.GetName(), Container: container, Follow: follow, Previous: previous, TailLines: tail}, prefix, &mu)
				})
			}
			wg.Wait()
			return errors.Join(errs...)
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on as lines come")
	c.Flags().BoolVarP(&previous, "previous", "p", false, "the instance before the last restart")
	c.Flags().StringVarP(&container, "container", "c", "", "container (default the first)")
	c.Flags().Int32Var(&tail, "tail", 0, "only the last lines")
	return c
}

// targets are the replicas that a word names: one replica, or all of a workload.
func (a *app) targets(ctx context.Context, cc grpc.ClientConnInterface, word string) ([]*portolanv1.Replica, error) {
	tenant, err := a.needTenant()
	if api.TenantOf(word) != "" {
		tenant, err = api.TenantOf(word), nil
	}
	if err != nil {
		return nil, err
	}
	rs, err := a.replicas(ctx, cc, tenant, "-", "")
	if err != nil {
		return nil, err
	}
	var of []*portolanv1.Replica
	for _, r := range rs {
		if last(r.GetName()) == last(word) {
			return []*portolanv1.Replica{r}, nil
		}
		if workloadOf(r.GetName()) == last(word) {
			of = append(of, r)
		}
	}
	if len(of) == 0 {
		return nil, api.E(api.NotFound, "find replicas of "+last(word), "no workload or replica of that name runs in tenant %s: see `portolan get replicas -t %s`", tenant, tenant)
	}
	return of, nil
}

// maxLogLine is how much of a line is kept until its end comes.
const maxLogLine = 64 << 10

// lines prints whole lines, each with the prefix; of one that is longer than it
// keeps, a part as it comes.
type lines struct {
	prefix string
	rest   []byte
	inside bool // the beginning of rest's line is printed
}

func (l *lines) take(b []byte, printf func(string, ...any)) {
	l.rest = append(l.rest, b...)
	for {
		i := bytes.IndexByte(l.rest, '\n')
		if i < 0 {
			break
		}
		l.print(l.rest[:i], "\n", printf)
		l.rest, l.inside = l.rest[i+1:], false
	}
	if len(l.rest) > maxLogLine {
		l.print(l.rest, "", printf)
		l.rest, l.inside = nil, true
	}
}

// end prints what no line end followed.
func (l *lines) end(printf func(string, ...any)) {
	if len(l.rest) > 0 || l.inside {
		l.print(l.rest, "\n", printf)
	}
	l.rest, l.inside = nil, false
}

func (l *lines) print(b []byte, end string, printf func(string, ...any)) {
	prefix := l.prefix
	if l.inside {
		prefix = ""
	}
	printf("%s%s%s", prefix, b, end)
}

// streamLogs prints what comes until the stream ends.
func (a *app) streamLogs(ctx context.Context, cc grpc.ClientConnInterface, req *portolanv1.LogsRequest, prefix string, mu *sync.Mutex) error {
	stream, err := portolanv1.NewRuntimeServiceClient(cc).Logs(ctx, req)
	if err != nil {
		return err
	}
	l := &lines{prefix: prefix}
	for {
		m, err := stream.Recv()
		mu.Lock()
		if err == nil {
			l.take(m.GetData(), a.printf)
		} else {
			l.end(a.printf)
		}
		mu.Unlock()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the user ended it
			}
			return err
		}
	}
}

func (a *app) execCommand() *cobra.Command {
	var tty, interactive bool
	var container string
	c := &cobra.Command{
		Use: "exec (WORKLOAD | REPLICA) -- COMMAND…", Short: "Run a command beside a container's own", GroupID: "runtime", Args: cobra.MinimumNArgs(2),
		Example: `  portolan exec redis -t shop -- redis-cli dbsize
  portolan exec -i --tty web-x7k2p -t shop -- /bin/sh`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cc, err := a.dial()
			if err != nil {
				return err
			}
			rs, err := a.targets(cmd.Context(), cc, args[0])
			if err != nil {
				return err
			}
			target := rs[0]
			for _, r := range rs {
				if r.GetReady() {
					target = r
					break
				}
			}
			return a.exec(cmd.Context(), cc, &portolanv1.ExecRequest_Start{Replica: target.GetName(), Container: container, Command: args[1:], Tty: tty}, interactive || tty)
		},
	}
	c.Flags().BoolVarP(&interactive, "stdin", "i", false, "pass stdin on")
	c.Flags().BoolVar(&tty, "tty", false, "give it a terminal")
	c.Flags().StringVarP(&container, "container", "c", "", "container (default the first)")
	return c
}

func (a *app) exec(ctx context.Context, cc grpc.ClientConnInterface, start *portolanv1.ExecRequest_Start, stdin bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := portolanv1.NewRuntimeServiceClient(cc).Exec(ctx)
	if err != nil {
		return err
	}
	s := &execSender{stream: stream}
	if err := s.send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_Start_{Start: start}}); err != nil {
		return err
	}
	if in, ok := a.in.(*os.File); ok && start.GetTty() && term.IsTerminal(int(in.Fd())) {
		old, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return fmt.Errorf("prepare the terminal: %w", err)
		}
		defer func() { _ = term.Restore(int(in.Fd()), old) }()
		go s.resize(ctx, int(in.Fd()))
	}
	if stdin {
		go s.input(a.in)
	} else if err := s.send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_CloseStdin{CloseStdin: true}}); err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		switch v := m.GetMessage().(type) {
		case *portolanv1.ExecResponse_Stdout:
			_, _ = a.out.Write(v.Stdout)
		case *portolanv1.ExecResponse_Stderr:
			_, _ = a.err.Write(v.Stderr)
		case *portolanv1.ExecResponse_ExitCode:
			if v.ExitCode != 0 {
				return exitCode(v.ExitCode)
			}
			return nil
		}
	}
}

// execSender serialises what several sources send.
type execSender struct {
	mu     sync.Mutex
	stream grpc.BidiStreamingClient[portolanv1.ExecRequest, portolanv1.ExecResponse]
}

func (s *execSender) send(m *portolanv1.ExecRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(m)
}

func (s *execSender) input(r io.Reader) {
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 && s.send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_Stdin{Stdin: bytes.Clone(buf[:n])}}) != nil {
			return
		}
		if err != nil {
			_ = s.send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_CloseStdin{CloseStdin: true}})
			return
		}
	}
}

func (s *execSender) resize(ctx context.Context, fd int) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGWINCH)
	defer signal.Stop(ch)
	for {
		if w, h, err := term.GetSize(fd); err == nil {
			_ = s.send(&portolanv1.ExecRequest{Message: &portolanv1.ExecRequest_Resize{Resize: &portolanv1.TerminalSize{Rows: int32(h), Columns: int32(w)}}})
		}
		select {
		case <-ctx.Done():
			return
		case <-ch:
		}
	}
}

func (a *app) eventsCommand() *cobra.Command {
	var limit int32
	var cluster string
	var follow bool
	c := &cobra.Command{
		Use: "events [WORKLOAD | REPLICA]", Short: "What happened, oldest first", GroupID: "runtime", Args: cobra.MaximumNArgs(1),
		Example: `  portolan events -t shop
  portolan events web -t shop
  portolan events --cluster eu-west -f`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			parent := ""
			if a.tenant != "" {
				parent = api.TenantName(a.tenant)
			}
			if len(args) == 1 {
				rs, err := a.targets(cmd.Context(), cc, args[0])
				if err != nil {
					return err
				}
				parent = api.WorkloadName(api.TenantOf(rs[0].GetName()), workloadOf(rs[0].GetName()))
				if last(rs[0].GetName()) == last(args[0]) {
					parent = rs[0].GetName()
				}
			}
			return a.events(cmd.Context(), cc, &portolanv1.ListEventsRequest{Parent: parent, Cluster: cluster, Limit: limit}, follow)
		},
	}
	a.outputFlag(c)
	c.Flags().Int32Var(&limit, "limit", 200, "at most so many")
	c.Flags().StringVar(&cluster, "cluster", "", "only this cluster")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on as they come")
	return c
}

func (a *app) events(ctx context.Context, cc grpc.ClientConnInterface, req *portolanv1.ListEventsRequest, follow bool) error {
	seen := map[string]bool{}
	for first := true; ; first = false {
		r, err := portolanv1.NewRuntimeServiceClient(cc).ListEvents(ctx, req)
		if err != nil {
			return err
		}
		if first {
			a.silent(r.GetSilentClusters())
		}
		var fresh []*portolanv1.Event
		now := map[string]bool{}
		for _, e := range r.GetEvents() {
			key := fmt.Sprint(e.GetTime().AsTime().UnixNano(), e.GetObject(), e.GetType(), e.GetCluster(), e.GetCount())
			now[key] = true
			if !seen[key] {
				fresh = append(fresh, e)
			}
		}
		seen = now
		msgs := make([]proto.Message, len(fresh))
		for i, e := range fresh {
			msgs[i] = e
		}
		if done, err := a.machine(false, msgs); done {
			if err != nil || !follow {
				return err
			}
		} else if len(fresh) > 0 {
			t := eventTable(fresh, time.Now())
			if !first {
				t.head = []string{"", "", "", "", ""}
			}
			a.print(t)
		} else if first && !follow {
			a.notef("no events\n")
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// splitList reads a comma-separated flag.
func splitList(s string) []string {
	var out []string
	for p := range strings.SplitSeq(s, ",") {
		if p = strings.TrimSpace(p); p != "" {
			out = append(out, p)
		}
	}
	return out
}

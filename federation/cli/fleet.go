package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/cli/manifest"
	"github.com/portolan-io/portolan/federation/client"
	"github.com/portolan-io/portolan/federation/localfleet"
)

const defaultDataDir = "/var/lib/portolan"

// dataDirFlag is shared by all verbs of the local fleet.
func dataDirFlag(c *cobra.Command, p *string) {
	def := os.Getenv("PORTOLAN_DATA_DIR")
	if def == "" {
		def = defaultDataDir
	}
	c.PersistentFlags().StringVar(p, "data-dir", def, "folder of the local fleet's data")
}

type upOptions struct {
	dataDir, fleet string
	detach         bool
	supervise      bool
	timeout        time.Duration
}

func (a *app) upCommand() *cobra.Command {
	var o upOptions
	c := &cobra.Command{
		Use: "up", Short: "Run a whole fleet on this machine", GroupID: "local", Args: cobra.NoArgs,
		Long: `Runs database, registry, federation and clusters as real processes, each cluster
and node in a network namespace of its own. Resumes what the data folder holds. A
context named local is written for the CLI.`,
		Example: `  portolan up --detach                     # in the background; returns when it answers
  portolan up --fleet fleet.yaml           # your own clusters, in the foreground
  portolan down --purge                    # take all of it away again`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.up(cmd.Context(), o) },
	}
	dataDirFlag(c, &o.dataDir)
	f := c.Flags()
	f.StringVar(&o.fleet, "fleet", "", "fleet file (default: two clusters of two nodes)")
	f.BoolVarP(&o.detach, "detach", "d", false, "run in the background, return when ready")
	f.DurationVar(&o.timeout, "timeout", 10*time.Minute, "how long --detach waits")
	f.BoolVar(&o.supervise, "supervise", false, "be the supervisor in the background")
	_ = f.MarkHidden("supervise")
	return c
}

func (a *app) up(ctx context.Context, o upOptions) error {
	dirs, err := localfleet.NewDirs(o.dataDir)
	if err != nil {
		return err
	}
	fleet, err := localfleet.LoadFleet(o.fleet)
	if err != nil {
		return err
	}
	remote := localfleet.NewRemote(dirs)
	if !o.supervise && remote.Running(ctx) {
		if !o.detach {
			return api.E(api.Precondition, "start the fleet", "a fleet runs on %s already: see `portolan status`, or stop it with `portolan down`", dirs.Data)
		}
		a.notef("a fleet runs on %s already\n", dirs.Data)
		return a.watchStart(ctx, remote, o.timeout, nil)
	}
	if !o.supervise {
		// What a killed supervisor left would stand in the way of its successor.
		if localfleet.Leftovers(dirs) && os.Geteuid() == 0 {
			a.notef("taking away what an earlier supervisor left behind\n")
			if err := localfleet.Clean(ctx, dirs, false); err != nil {
				return err
			}
		}
	}
	tools, err := localfleet.FindTools()
	if err != nil {
		return err
	}
	if !o.supervise {
		if err := localfleet.Check(ctx, &fleet, dirs, tools); err != nil {
			return err
		}
		if err := localfleet.Claim(dirs); err != nil {
			return err
		}
	}
	if o.detach {
		return a.detach(ctx, dirs, remote, o)
	}
	if _, err := a.load(); err != nil {
		return err
	}
	var progress localfleet.Progress
	var ready func(context.Context, localfleet.Status)
	if !o.supervise {
		progress = &printer{app: a}
		ready = func(ctx context.Context, st localfleet.Status) {
			a.welcome(ctx, st)
			a.printf("\nCtrl-C stops it; its data stays.\n")
		}
	}
	sup, err := localfleet.NewSupervisor(localfleet.Config{
		Dirs: dirs, Fleet: fleet, Tools: tools, Contexts: a.contexts, Progress: progress, Ready: ready,
		Log: slog.New(slog.NewJSONHandler(a.err, nil)), Apply: a.applyFiles,
	})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return sup.Run(ctx)
}

// applyFiles is `apply -f` for the supervisor.
func (a *app) applyFiles(ctx context.Context, contexts string, files []string) error {
	f, err := client.Load(contexts)
	if err != nil {
		return err
	}
	c, err := f.Get(localfleet.ContextName)
	if err != nil {
		return err
	}
	objs, err := manifest.ReadPaths(files, nil)
	if err != nil {
		return err
	}
	cc, err := client.Dial(c)
	if err != nil {
		return err
	}
	defer func() { _ = cc.Close() }()
	quiet := &app{out: io.Discard, err: a.err}
	_, err = quiet.apply(ctx, objects{cc}, objs, false)
	return err
}

// detach starts the supervisor as a process of its own and shows its progress.
func (a *app) detach(ctx context.Context, dirs localfleet.Dirs, remote *localfleet.Remote, o upOptions) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dirs.Data, "logs"), 0o711); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	logFile := filepath.Join(dirs.Data, "logs", "supervisor.log")
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	args := []string{"up", "--supervise", "--data-dir", dirs.Data}
	if o.fleet != "" {
		args = append(args, "--fleet", o.fleet)
	}
	if a.contexts != "" {
		args = append(args, "--config", a.contexts)
	}
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the supervisor: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := a.watchStart(ctx, remote, o.timeout, ended); err != nil {
		return fmt.Errorf("%w\nlogs are in %s; take away what was made with `portolan down`", err, filepath.Dir(logFile))
	}
	return nil
}

// watchStart shows each step until the fleet is ready.
func (a *app) watchStart(ctx context.Context, remote *localfleet.Remote, limit time.Duration, ended <-chan error) error {
	p := &printer{app: a}
	shown := ""
	for end := time.Now().Add(limit); time.Now().Before(end); {
		st, err := remote.Status(ctx)
		switch {
		case err == nil && st.Fault != "":
			p.End(errors.New("failed"))
			return errors.New(st.Fault)
		case err == nil && st.Ready:
			p.finish(nil)
			a.welcome(ctx, st)
			return nil
		case err == nil && st.Phase != "" && st.Phase != shown:
			p.finish(nil)
			p.Begin(st.Phase)
			shown = st.Phase
		}
		p.tick()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			p.finish(errors.New("failed"))
			return fmt.Errorf("the supervisor ended before the fleet was ready: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("the fleet is not ready after %s (at step: %s)", limit, shown)
}

// printer shows steps: one line each, with the time it took; a terminal sees
// the seconds pass.
type printer struct {
	app   *app
	step  string
	began time.Time
	drawn int
}

func (p *printer) Begin(step string) {
	p.step, p.began, p.drawn = step, time.Now(), -1
	p.tick()
}

func (p *printer) tick() {
	f, ok := p.app.err.(*os.File)
	if p.step == "" || !ok {
		return
	}
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return
	}
	if s := int(time.Since(p.began).Seconds()); s != p.drawn {
		p.drawn = s
		p.app.notef("\r  … %s (%ds) ", p.step, s)
	}
}

func (p *printer) End(err error) { p.finish(err) }

func (p *printer) finish(err error) {
	if p.step == "" {
		return
	}
	mark := "✓"
	if err != nil {
		mark = "✗"
	}
	lead := ""
	if p.drawn >= 0 {
		lead = "\r"
	}
	p.app.notef("%s  %s %s (%.1fs)        \n", lead, mark, p.step, time.Since(p.began).Seconds())
	p.step = ""
}

// welcome is the one screen after a start.
func (a *app) welcome(ctx context.Context, st localfleet.Status) {
	a.printf("\nThe fleet %s is up.\n\n", st.Fleet)
	sub := &app{in: a.in, out: a.out, err: a.err, contexts: a.contexts, context: localfleet.ContextName, output: "table"}
	defer sub.close()
	for _, kind := range []string{"clusters", "workloads"} {
		cmd := sub.getCommand()
		cmd.SetContext(ctx)
		if err := sub.getObjects(cmd, []string{kind}, nil); err != nil {
			a.notef("%s: %s\n", kind, explainError(err))
		}
		a.printf("\n")
	}
	if st.URL != "" {
		a.printf("Ingress: %s\n", st.URL)
	}
	if len(st.Try) > 0 {
		a.printf("\nTry:\n")
		for _, t := range st.Try {
			a.printf("  %s\n", t)
		}
	}
}

func (a *app) downCommand() *cobra.Command {
	var dataDir string
	var purge bool
	c := &cobra.Command{
		Use: "down", Short: "Stop the local fleet", GroupID: "local", Args: cobra.NoArgs,
		Long: `Stops every process and container of the local fleet and removes its network
namespaces, mounts and links, whatever state it is in; may be run twice. Data
stays for the next up, unless --purge. A folder that up did not make its own is
left alone.`,
		Example: "  portolan down\n  portolan down --purge",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("the local fleet belongs to root: run this as root (sudo)")
			}
			dirs, err := localfleet.NewDirs(dataDir)
			if err != nil {
				return err
			}
			p := &printer{app: a}
			p.Begin("stopping the fleet on " + dirs.Data)
			err = localfleet.Clean(cmd.Context(), dirs, purge)
			p.finish(err)
			if err != nil || !purge {
				return err
			}
			return a.dropContext(dirs)
		},
	}
	dataDirFlag(c, &dataDir)
	c.Flags().BoolVar(&purge, "purge", false, "delete the data too")
	return c
}

// dropContext removes the local context when it points into the purged data.
func (a *app) dropContext(dirs localfleet.Dirs) error {
	f, err := a.load()
	if err != nil {
		return err
	}
	c, err := f.Get(localfleet.ContextName)
	if err != nil || !strings.HasPrefix(c.CertFile, dirs.Data+"/") {
		return nil //nolint:nilerr // no such context, or another fleet's: nothing to do
	}
	f.Remove(c.Name)
	return f.Save(a.contexts)
}

func (a *app) statusCommand() *cobra.Command {
	var dataDir string
	c := &cobra.Command{
		Use: "status", Short: "Show every process of the local fleet", GroupID: "local", Args: cobra.NoArgs,
		Example: "  portolan status\n  portolan status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkOutput(); err != nil {
				return err
			}
			dirs, err := localfleet.NewDirs(dataDir)
			if err != nil {
				return err
			}
			st, err := localfleet.NewRemote(dirs).Status(cmd.Context())
			if err != nil {
				return err
			}
			if a.output == "json" || a.output == "yaml" {
				return a.encode(st)
			}
			t := newTable("PROCESS", "STATE", "HEALTH", "PID", "RESTARTS", "ADDRESS", "AGE", "LOG")
			for _, p := range st.Processes {
				if a.output == "name" {
					a.printf("%s\n", p.Name)
					continue
				}
				t.add(p.Name, p.State, p.Health, fmt.Sprint(p.Pid), fmt.Sprint(p.Restarts), p.Address, span(time.Since(p.Started)), p.LogFile)
			}
			if a.output == "name" {
				return nil
			}
			a.print(t)
			if len(st.Cut) > 0 {
				a.printf("\ncut off: %s\n", strings.Join(st.Cut, ", "))
			}
			if st.Fault != "" {
				a.printf("\nfault: %s\n", st.Fault)
			}
			if !st.Ready {
				a.printf("\nstill starting: %s\n", st.Phase)
			}
			return nil
		},
	}
	dataDirFlag(c, &dataDir)
	a.outputFlag(c)
	return c
}

func (a *app) localCommand() *cobra.Command {
	var dataDir string
	c := &cobra.Command{
		Use: "local", Short: "Make and mend faults in the local fleet", GroupID: "local",
		Long: `Faults by name: processes as portolan status shows them, clusters, nodes, and
proxies as NODE/envoy/REPLICA.`,
		Example: `  portolan local cut us-east               # take a cluster's link down
  portolan local heal us-east
  portolan local kill federation-1         # it is restarted
  portolan local kill --hold federation-1  # it stays down
  portolan local start federation-1
  portolan local freeze eu-west-1/agent    # SIGSTOP`,
	}
	dataDirFlag(c, &dataDir)
	for _, v := range []struct{ verb, short string }{
		{"stop", "Stop a process and hold it down"},
		{"start", "Start a held process, thaw a frozen one"},
		{"kill", "Kill a process; it is restarted, unless --hold"},
		{"freeze", "Stop a process in its tracks (SIGSTOP)"},
		{"thaw", "Let a frozen process go on"},
		{"cut", "Take the link of a cluster or node down"},
		{"heal", "Set the link of a cluster or node up"},
	} {
		var hold bool
		sub := &cobra.Command{
			Use: v.verb + " NAME…", Short: v.short, Args: cobra.MinimumNArgs(1), Example: "  portolan local " + v.verb + " eu-west",
			ValidArgsFunction: a.completeProcesses(&dataDir),
			RunE: func(cmd *cobra.Command, args []string) error {
				dirs, err := localfleet.NewDirs(dataDir)
				if err != nil {
					return err
				}
				for _, name := range args {
					if err := localfleet.NewRemote(dirs).Fault(cmd.Context(), localfleet.Fault{Verb: v.verb, Name: name, Hold: hold}); err != nil {
						return err
					}
					a.printf("%s: %s\n", name, map[string]string{"stop": "stopped", "start": "started", "kill": "killed", "freeze": "frozen", "thaw": "thawed", "cut": "cut off", "heal": "healed"}[v.verb])
				}
				return nil
			},
		}
		if v.verb == "kill" {
			sub.Flags().BoolVar(&hold, "hold", false, "do not restart it until start")
		}
		c.AddCommand(sub)
	}
	c.AddCommand(a.serveRegistryCommand(), a.serveIngressCommand())
	return c
}

func (a *app) completeProcesses(dataDir *string) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		dirs, err := localfleet.NewDirs(*dataDir)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		st, err := localfleet.NewRemote(dirs).Status(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for _, p := range st.Processes {
			names = append(names, p.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// The local fleet's own servers are processes of this binary.
func (a *app) serveRegistryCommand() *cobra.Command {
	var c localfleet.RegistryConfig
	var listen string
	cmd := &cobra.Command{Use: "serve-registry", Hidden: true, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		c.Listen = splitList(listen)
		return localfleet.ServeRegistry(ctx, c, a.err)
	}}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "", "")
	f.StringVar(&c.CertFile, "cert", "", "")
	f.StringVar(&c.KeyFile, "key", "", "")
	f.StringVar(&c.Data, "data", "", "")
	f.StringVar(&c.Images, "images", "", "")
	f.StringVar(&c.Name, "name", "", "")
	return cmd
}

func (a *app) serveIngressCommand() *cobra.Command {
	var c localfleet.IngressConfig
	var backends string
	cmd := &cobra.Command{Use: "serve-ingress", Hidden: true, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		c.Backends = splitList(backends)
		return localfleet.ServeIngress(ctx, c)
	}}
	cmd.Flags().StringVar(&c.Listen, "listen", "", "")
	cmd.Flags().StringVar(&backends, "backends", "", "")
	return cmd
}

func (a *app) configCommand() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Contexts: which federation, as whom", GroupID: "fleet", Example: "  portolan config list\n  portolan config use local"}
	c.AddCommand(&cobra.Command{
		Use: "list", Short: "Show contexts", Args: cobra.NoArgs, Example: "  portolan config list",
		RunE: func(*cobra.Command, []string) error {
			f, err := a.load()
			if err != nil {
				return err
			}
			t := newTable("", "NAME", "ADDRESSES", "TENANT", "CERTIFICATE")
			for _, x := range f.Contexts {
				mark := ""
				if x.Name == f.Current {
					mark = "*"
				}
				t.add(mark, x.Name, strings.Join(x.Addresses, ","), orDash(x.Tenant), x.CertFile)
			}
			a.print(t)
			return nil
		},
	}, &cobra.Command{
		Use: "use NAME", Short: "Make a context the current one", Args: cobra.ExactArgs(1), Example: "  portolan config use local",
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := a.load()
			if err != nil {
				return err
			}
			if _, err := f.Get(args[0]); err != nil {
				return err
			}
			f.Current = args[0]
			return f.Save(a.contexts)
		},
	}, a.setContextCommand())
	return c
}

func (a *app) setContextCommand() *cobra.Command {
	var n client.Context
	var addresses string
	c := &cobra.Command{
		Use: "set-context [NAME]", Short: "Add a context, or change one", Args: cobra.MaximumNArgs(1),
		Example: `  portolan config set-context --tenant shop          # the current one's default tenant
  portolan config set-context prod --addresses fed.example:7443 --server-name federation.example \
    --cert me.pem --key me.key --bundle roots.pem`,
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := a.load()
			if err != nil {
				return err
			}
			name := f.Current
			if len(args) == 1 {
				name = args[0]
			}
			if name == "" {
				return errors.New("which context? give its name")
			}
			x, err := f.Get(name)
			if err != nil && api.KindOf(err) != api.NotFound && api.KindOf(err) != api.Precondition {
				return err
			}
			x.Name = name
			n.Tenant = a.tenant
			n.Addresses = splitList(addresses)
			merge(&x, n)
			f.Put(x)
			if f.Current == "" {
				f.Current = name
			}
			return f.Save(a.contexts)
		},
	}
	fl := c.Flags()
	fl.StringVar(&addresses, "addresses", "", "host:port of the federation's replicas, comma-separated")
	fl.StringVar(&n.ServerName, "server-name", "", "name in the federation's certificate")
	fl.StringVar(&n.CertFile, "cert", "", "your certificate (PEM)")
	fl.StringVar(&n.KeyFile, "key", "", "your key (PEM)")
	fl.StringVar(&n.BundleFile, "bundle", "", "the fleet's roots (PEM)")
	return c
}

func merge(x *client.Context, n client.Context) {
	if len(n.Addresses) > 0 {
		x.Addresses = n.Addresses
	}
	for _, p := range []struct{ dst, src *string }{{&x.ServerName, &n.ServerName}, {&x.CertFile, &n.CertFile}, {&x.KeyFile, &n.KeyFile}, {&x.BundleFile, &n.BundleFile}, {&x.Tenant, &n.Tenant}} {
		if *p.src != "" {
			*p.dst = *p.src
		}
	}
}

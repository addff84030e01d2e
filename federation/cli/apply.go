package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

func (a *app) applyCommand() *cobra.Command {
	var files []string
	var dryRun, wait bool
	var timeout time.Duration
	var plan string
	c := &cobra.Command{
		Use: "apply -f FILE…", Short: "Create or change objects to be as in files", GroupID: "objects", Args: cobra.NoArgs,
		Long: `Makes objects as the manifests say. Files, folders and stdin (-) are read, all
checked before the first is sent, and sent in the order in which they depend on
each other. Repeating it is harmless.`,
		Example: `  portolan apply -f shop/                  # a folder
  portolan apply -f web.yaml --dry-run     # what would happen, and whether it is allowed
  portolan apply -f web.yaml --wait        # return when it serves everywhere
  portolan apply -f web.yaml --plan 5b2c…  # what plan showed, or nothing
  cat web.yaml | portolan apply -f -`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			objs, err := manifest.ReadPaths(files, a.in)
			if err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			o := objects{cc: cc}
			if o.plans, err = checkPlan(cmd.Context(), o, plan, objs); err != nil {
				return err
			}
			newest, err := a.apply(cmd.Context(), o, objs, dryRun)
			if err != nil || !wait || dryRun {
				return err
			}
			return a.waitApplied(cmd.Context(), objs, newest, timeout)
		},
	}
	c.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder or - for stdin; may be given again")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "check with the server, store nothing")
	c.Flags().StringVar(&plan, "plan", "", "token of `portolan plan`: store nothing when the workload's change would do something else by now")
	c.Flags().BoolVar(&wait, "wait", false, "wait until every live proxy and node has it and workloads are ready")
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long --wait waits")
	_ = c.MarkFlagRequired("filename")
	return c
}

// apply sends objects in order and says what became of each; it returns the
// newest revision. All are tried, so that all faults show.
func (a *app) apply(ctx context.Context, o objects, objs []manifest.Object, dryRun bool) (int64, error) {
	var newest int64
	var failed []string
	for _, obj := range objs {
		before, err := o.get(ctx, obj.Kind, obj.Name())
		if err != nil && api.KindOf(err) != api.NotFound {
			return newest, err
		}
		exists := err == nil
		after, err := o.put(ctx, obj, dryRun)
		if err != nil {
			if k := api.KindOf(err); k == api.Unavailable || k == api.Unknown {
				return newest, err
			}
			a.notef("%s %s\n", short(obj.Name()), "refused")
			failed = append(failed, obj.Where+": "+explainError(err))
			continue
		}
		verb := "unchanged"
		switch {
		case !exists:
			verb = "created"
		case text(before, "etag") != text(after, "etag"):
			verb = "changed"
		}
		if dryRun {
			verb += " (dry run)"
		}
		a.printf("%s %s\n", short(obj.Name()), verb)
		newest = max(newest, number(after, "revision"))
	}
	if len(failed) > 0 {
		return newest, errors.New(strings.Join(failed, "\n"))
	}
	return newest, nil
}

// short form of a name: tenants/shop/workloads/web → shop/workloads/web.
func short(name string) string { return strings.TrimPrefix(name, "tenants/") }

// waitApplied waits for convergence, then for workloads to be ready.
func (a *app) waitApplied(ctx context.Context, objs []manifest.Object, revision int64, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := a.waitRevision(ctx, revision, nil, timeout); err != nil {
		return err
	}
	for _, obj := range objs {
		if obj.Kind.Name == "Workload" {
			if err := a.waitWorkload(ctx, obj.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *app) deleteCommand() *cobra.Command {
	var files []string
	c := &cobra.Command{
		Use: "delete (KIND NAME… | -f FILE…)", Short: "Delete objects", GroupID: "objects",
		Example: `  portolan delete workload web -t shop
  portolan delete -f shop/                # in the order that dependencies ask for`,
		RunE: func(cmd *cobra.Command, args []string) error {
			type target struct {
				kind manifest.Kind
				name string
			}
			var targets []target
			if len(files) > 0 {
				objs, err := manifest.ReadPaths(files, a.in)
				if err != nil {
					return err
				}
				for _, obj := range slices.Backward(objs) {
					targets = append(targets, target{obj.Kind, obj.Name()})
				}
			} else if len(args) < 2 {
				return errors.New("say what to delete: KIND NAME…, or -f FILE")
			} else {
				k, err := manifest.FindKind(args[0])
				if err != nil {
					return err
				}
				for _, id := range args[1:] {
					name, err := k.FullName(a.tenant, id)
					if err != nil {
						return err
					}
					targets = append(targets, target{k, name})
				}
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			for _, t := range targets {
				if t.kind.ReadOnly {
					return fmt.Errorf("a %s cannot be deleted: it follows from other objects", strings.ToLower(t.kind.Name))
				}
				if err := (objects{cc: cc}).remove(cmd.Context(), t.kind, t.name, len(files) > 0); err != nil {
					return err
				}
				a.printf("%s deleted\n", short(t.name))
			}
			return nil
		},
	}
	c.Flags().StringArrayVarP(&files, "filename", "f", nil, "delete what these files name")
	return c
}

func (a *app) diffCommand() *cobra.Command {
	var files []string
	c := &cobra.Command{
		Use: "diff -f FILE…", Short: "Show what apply would change", GroupID: "objects", Args: cobra.NoArgs,
		Long: `Compares objects as they are with what they would be after apply, defaults
included. The exit code is 0 without and 1 with differences.`,
		Example: `  portolan diff -f shop/`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			objs, err := manifest.ReadPaths(files, a.in)
			if err != nil {
				return err
			}
			cc, err := a.dial()
			if err != nil {
				return err
			}
			o := objects{cc: cc}
			differs := false
			for _, obj := range objs {
				var before proto.Message
				if m, err := o.get(cmd.Context(), obj.Kind, obj.Name()); err == nil {
					before = m
				} else if api.KindOf(err) != api.NotFound {
					return err
				}
				after, err := o.put(cmd.Context(), obj, true)
				if err != nil {
					return fmt.Errorf("%s: %s", obj.Where, explainError(err))
				}
				d, err := diffObjects(obj.Name(), before, after)
				if err != nil {
					return err
				}
				differs = differs || d != ""
				a.printf("%s", d)
			}
			if differs {
				return exitCode(1)
			}
			return nil
		},
	}
	c.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder or - for stdin; may be given again")
	_ = c.MarkFlagRequired("filename")
	return c
}

// diffObjects is a line diff of labels and spec as YAML.
func diffObjects(name string, before, after proto.Message) (string, error) {
	a, err := specYAML(before)
	if err != nil {
		return "", err
	}
	b, err := specYAML(after)
	if err != nil || a == b {
		return "", err
	}
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s as it is\n+++ %s after apply\n", short(name), short(name))
	for _, l := range lineDiff(strings.Split(strings.TrimSuffix(a, "\n"), "\n"), strings.Split(strings.TrimSuffix(b, "\n"), "\n")) {
		out.WriteString(l + "\n")
	}
	return out.String(), nil
}

func specYAML(m proto.Message) (string, error) {
	if m == nil {
		return "", nil
	}
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return "", err
	}
	var v map[string]any
	if err := yaml.Unmarshal(b, &v); err != nil {
		return "", err
	}
	shown := map[string]any{"spec": v["spec"]}
	if v["labels"] != nil {
		shown["labels"] = v["labels"]
	}
	y, err := yaml.Marshal(shown)
	return string(y), err
}

// lineDiff is the longest common subsequence's diff, with all lines.
func lineDiff(a, b []string) []string {
	n := make([][]int, len(a)+1)
	for i := range n {
		n[i] = make([]int, len(b)+1)
	}
	for i, v := range slices.Backward(a) {
		for j := len(b) - 1; j >= 0; j-- {
			if v == b[j] {
				n[i][j] = n[i+1][j+1] + 1
			} else {
				n[i][j] = max(n[i+1][j], n[i][j+1])
			}
		}
	}
	var out []string
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			out = append(out, "  "+a[i])
			i, j = i+1, j+1
		case j < len(b) && (i == len(a) || n[i][j+1] > n[i+1][j]):
			out = append(out, "+ "+b[j])
			j++
		default:
			out = append(out, "- "+a[i])
			i++
		}
	}
	return out
}

func (a *app) waitCommand() *cobra.Command {
	var revision int64
	var clusters []string
	var timeout time.Duration
	c := &cobra.Command{
		Use: "wait [workload NAME…]", Short: "Wait until a change is live everywhere, or workloads are ready", GroupID: "objects",
		Long: `Without arguments: returns when every live node and proxy in scope has applied
the revision (default: the newest), deletes included, or names the laggards and
ends with code 1. With a workload: returns when it is ready in its current revision.`,
		Example: `  portolan wait                            # everything so far is live
  portolan wait --revision 1204 --cluster eu-west
  portolan wait workload web -t shop`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout+5*time.Second)
			defer cancel()
			if _, err := a.dial(); err != nil {
				return err
			}
			if len(args) == 0 {
				return a.waitRevision(ctx, revision, clusters, timeout)
			}
			k, err := manifest.FindKind(args[0])
			if err != nil {
				return err
			}
			if k.Name != "Workload" || len(args) < 2 {
				return errors.New("say: portolan wait workload NAME…")
			}
			for _, id := range args[1:] {
				name, err := k.FullName(a.tenant, id)
				if err != nil {
					return err
				}
				if err := a.waitWorkload(ctx, name); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().Int64Var(&revision, "revision", 0, "revision to wait for; 0 is the newest")
	c.Flags().StringSliceVar(&clusters, "cluster", nil, "only these clusters")
	c.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long")
	return c
}

// waitRevision shows progress while it waits for convergence.
func (a *app) waitRevision(ctx context.Context, revision int64, clusters []string, timeout time.Duration) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	var names []string
	for _, c := range clusters {
		if !strings.Contains(c, "/") {
			c = api.ClusterName(c)
		}
		names = append(names, c)
	}
	stream, err := portolanv1.NewConvergenceServiceClient(cc).WaitConverged(ctx, &portolanv1.WaitConvergedRequest{Revision: revision, Clusters: names, Timeout: durationpb.New(timeout)})
	if err != nil {
		return err
	}
	began := time.Now()
	shown := ""
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if m.GetConverged() {
			a.printf("revision %d is live everywhere (%.2fs)\n", m.GetRevision(), time.Since(began).Seconds())
			return nil
		}
		lag := laggardsText(m.GetLaggards())
		if m.GetFinal() {
			a.notef("revision %d is not live everywhere after %s; behind:\n%s", m.GetRevision(), timeout, lag)
			return exitCode(1)
		}
		if time.Since(began) > 2*time.Second && lag != shown {
			a.notef("waiting for revision %d; behind:\n%s", m.GetRevision(), lag)
			shown = lag
		}
	}
}

func laggardsText(ls []*portolanv1.Laggard) string {
	var b strings.Builder
	for _, l := range ls {
		fmt.Fprintf(&b, "  %s at %d", l.GetName(), l.GetAppliedRevision())
		if l.GetDetail() != "" {
			b.WriteString(": " + l.GetDetail())
		}
		b.WriteString("\n")
	}
	if len(ls) == 0 {
		return "  control loops that have not looked yet\n"
	}
	return b.String()
}

// waitWorkload returns when all replicas are ready in the current revision, or
// the job is complete.
func (a *app) waitWorkload(ctx context.Context, name string) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	began, shown := time.Now(), ""
	for {
		w, err := portolanv1.NewWorkloadServiceClient(cc).GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: name})
		if err != nil {
			return err
		}
		s := w.GetStatus()
		state := fmt.Sprintf("%d of %d ready", s.GetReadyReplicas(), s.GetDesiredReplicas())
		for _, c := range s.GetConditions() {
			on := c.GetState() == portolanv1.ConditionState_CONDITION_STATE_TRUE
			if on && c.GetType() == "Complete" {
				a.printf("%s is complete\n", short(name))
				return nil
			}
			if on && (c.GetType() == "Failed" || c.GetType() == "Halted") {
				return fmt.Errorf("%s: %s: %s; see `portolan describe workload %s -t %s`", short(name), c.GetReason(), c.GetMessage(), last(name), api.TenantOf(name))
			}
		}
		if r := s.GetRollout(); r.GetState() == portolanv1.RolloutState_ROLLOUT_STATE_ROLLED_BACK && r.GetReason().GetCode() == "RolledBack" {
			return fmt.Errorf("%s went %s", short(name), r.GetReason().GetMessage())
		}
		if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_CRON && s.GetObservedGeneration() >= w.GetGeneration() {
			a.printf("%s runs at its times: %s\n", short(name), w.GetSpec().GetCron().GetSchedule())
			return nil
		}
		job := w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB
		if !job && current(s) >= s.GetDesiredReplicas() && s.GetObservedGeneration() >= w.GetGeneration() {
			a.printf("%s is ready: %s\n", short(name), state)
			return nil
		}
		if time.Since(began) > 2*time.Second && state != shown {
			a.notef("%s: %s\n", short(name), state)
			shown = state
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready in time: %s; see `portolan describe workload %s -t %s`", short(name), state, last(name), api.TenantOf(name))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// current counts ready replicas of the current revision.
func current(s *portolanv1.WorkloadStatus) int32 {
	var n int32
	for _, p := range s.GetPlacements() {
		for _, r := range p.GetRevisions() {
			if r.GetRevision() == s.GetCurrentRevision() {
				n += r.GetReadyReplicas()
			}
		}
	}
	return n
}

package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/cli/manifest"
	"github.com/portolan-io/portolan/federation/localfleet"
)

// Every verb explains itself: a sentence and an example that begins with the
// program's name.
func TestEveryVerbHasHelp(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Short == "" {
			t.Errorf("%s: no short description", c.CommandPath())
		}
		if !strings.Contains(c.Example, "portolan "+strings.TrimPrefix(strings.TrimPrefix(c.CommandPath(), "portolan"), " ")) {
			t.Errorf("%s: no example of itself:\n%s", c.CommandPath(), c.Example)
		}
		for line := range strings.Lines(strings.ReplaceAll(c.Example, "\\\n", " ")) {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "portolan "); ok {
				documentedCommand(t, "help of "+c.CommandPath(), rest)
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(New(strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{}))
}

// A line that is longer than what is kept comes out once, whole, with one prefix.
func TestLongLinesOfLogs(t *testing.T) {
	long := strings.Repeat("0123456789", maxLogLine/4)
	var out strings.Builder
	printf := func(f string, args ...any) { fmt.Fprintf(&out, f, args...) }
	l := &lines{prefix: "web-1 | "}
	for chunk := range slices.Chunk([]byte("short\n"+long+"\nafter\n"+long), 10_000) {
		l.take(chunk, printf)
		if len(l.rest) > maxLogLine {
			t.Fatalf("%d bytes are kept", len(l.rest))
		}
	}
	l.end(printf)
	want := "web-1 | short\nweb-1 | " + long + "\nweb-1 | after\nweb-1 | " + long + "\n"
	if out.String() != want {
		t.Errorf("%d bytes were printed, want %d", out.Len(), len(want))
	}
}

func run1(t *testing.T, args ...string) (string, string, int) {
	t.Helper()
	t.Setenv("PORTOLAN_CONFIG", filepath.Join(t.TempDir(), "config.yaml"))
	var out, errOut bytes.Buffer
	code := Main(t.Context(), args, strings.NewReader(""), &out, &errOut)
	return out.String(), errOut.String(), code
}

// up beside a fleet that runs says so: its ports are busy because of itself, and
// to end what listens there would be bad advice.
func TestUpBesideARunningFleet(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("missing: root, to serve a fleet's control socket")
	}
	data := t.TempDir()
	dirs, err := localfleet.NewDirs(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dirs.Run, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.RemoveAll(dirs.Run)
		_ = os.Remove(filepath.Dir(dirs.Run)) // unless others have a fleet
	})
	l, err := net.Listen("unix", filepath.Join(dirs.Run, "supervisor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"ready": true, "fleet": "test"}`)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	_, errOut, code := run1(t, "up", "--data-dir", data)
	if code == 0 || !strings.Contains(errOut, "a fleet runs on "+data+" already") || !strings.Contains(errOut, "portolan down") {
		t.Errorf("code %d, %s", code, errOut)
	}
}

// Errors say what to do next.
func TestErrorsShowTheWayOut(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"get", "workloads"}, "portolan up"},
		{[]string{"get", "pods"}, "there are: tenants"},
		{[]string{"get", "workloads", "-o", "xml"}, "table|wide|json|yaml|name"},
		{[]string{"delete", "workload"}, "KIND NAME…, or -f FILE"},
		{[]string{"explain", "service", "x"}, "portolan explain workload NAME"},
		{[]string{"status", "--data-dir", t.TempDir()}, "portolan up"},
		{[]string{"local", "cut", "x", "--data-dir", t.TempDir()}, "portolan up"},
		{[]string{"config", "use", "nowhere"}, "there is"},
		{[]string{"cluster", "add", "x", "--region", "r", "--taint", "odd"}, "key=value:no-schedule"},
		{[]string{"up", "--fleet", "/nowhere.yaml"}, "no such file"},
		{[]string{"apply", "-f", "/nowhere"}, "no such file"},
		{[]string{"frobnicate"}, "unknown command"},
	} {
		_, errOut, code := run1(t, c.args...)
		if code != 1 || !strings.Contains(errOut, c.want) || !strings.HasPrefix(errOut, "portolan: ") {
			t.Errorf("%v: code %d, %q; want it to contain %q", c.args, code, errOut, c.want)
		}
	}
}

func TestContexts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	call := func(args ...string) string {
		t.Helper()
		var out, errOut bytes.Buffer
		if code := Main(t.Context(), append([]string{"--config", file}, args...), nil, &out, &errOut); code != 0 {
			t.Fatalf("%v: %s", args, errOut.String())
		}
		return out.String()
	}
	call("config", "set-context", "prod", "--addresses", "a:1,b:2", "--server-name", "federation.x", "--cert", "c", "--key", "k", "--bundle", "b")
	call("config", "set-context", "other", "--addresses", "z:1")
	call("config", "use", "other")
	call("config", "set-context", "--tenant", "shop")
	out := call("config", "list")
	if !strings.Contains(out, "*  other") || !strings.Contains(out, "a:1,b:2") || !strings.Contains(out, "shop") {
		t.Errorf("contexts:\n%s", out)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file with contexts: %v %v", st, err)
	}
}

func TestRefusalNamesFields(t *testing.T) {
	err := api.InvalidFields("update tenants/a/workloads/b", []api.Violation{{Field: "spec.replicas", Message: "must not be negative"}, {Message: "a CPU limit is required", Rule: "r", File: "f.rego", Line: 3}})
	var e *api.Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	got := explainError(e.GRPCStatus().Err())
	want := "update tenants/a/workloads/b was refused:\n  a CPU limit is required (rule r, f.rego:3)\n  spec.replicas: must not be negative"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestTablesFit(t *testing.T) {
	var out bytes.Buffer
	a := &app{out: &out, output: "table"}
	tab := newTable("NAME", "+HIDDEN", "WHY")
	tab.add("web", "secret", "because")
	tab.add("catalog", "secret", "of\nthis")
	a.print(tab)
	if want := "NAME     WHY\nweb      because\ncatalog  of this\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	width := []int{10, 60, 20}
	shrink(width, 60)
	if total := width[0] + width[1] + width[2] + 4; total > 60 || width[0] != 10 {
		t.Errorf("shrunk to %v", width)
	}
}

func TestWorkloadRow(t *testing.T) {
	now := time.Unix(1000, 0)
	w := &portolanv1.Workload{
		Name: "tenants/shop/workloads/web", CreateTime: timestamppb.New(now.Add(-90 * time.Second)),
		Spec: &portolanv1.WorkloadSpec{Kind: portolanv1.WorkloadKind_WORKLOAD_KIND_SERVICE},
		Status: &portolanv1.WorkloadStatus{CurrentRevision: "v2", DesiredReplicas: 3, ReadyReplicas: 2, Placements: []*portolanv1.PlacementSummary{
			{Cluster: "eu", ReadyReplicas: 2, Revisions: []*portolanv1.RevisionReplicas{{Revision: "v2", Replicas: 3}}},
		}, Conditions: []*portolanv1.Condition{{Type: "Available", State: portolanv1.ConditionState_CONDITION_STATE_FALSE, Reason: "NotReady"}}},
	}
	tab := workloadTable([]proto.Message{w}, now)
	got := strings.Join(tab.rows[0], "|")
	if want := "shop|web|service|2/3|v2|eu 2/3|NotReady||90s"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestDiff(t *testing.T) {
	one, two := int32(1), int32(2)
	before := &portolanv1.Workload{Name: "tenants/a/workloads/w", Spec: &portolanv1.WorkloadSpec{Replicas: &one, Revision: "v1"}}
	after := &portolanv1.Workload{Name: "tenants/a/workloads/w", Spec: &portolanv1.WorkloadSpec{Replicas: &two, Revision: "v1"}}
	got, err := diffObjects("tenants/a/workloads/w", before, after)
	if err != nil {
		t.Fatal(err)
	}
	want := "--- a/workloads/w as it is\n+++ a/workloads/w after apply\n  spec:\n-   replicas: 1\n+   replicas: 2\n    revision: v1\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if same, err := diffObjects("x", before, before); err != nil || same != "" {
		t.Errorf("no change shows as %q (%v)", same, err)
	}
}

// The requests' fields are found by kind, for every kind that can be applied.
func TestObjectsKnowEveryKind(t *testing.T) {
	for _, k := range manifest.Kinds {
		if k.ReadOnly {
			continue
		}
		req, err := message("Update" + k.Name + "Request")
		if err != nil {
			t.Errorf("%s: %v", k.Name, err)
			continue
		}
		if f := field(k, req); f == "" {
			t.Errorf("%s: no field of its kind in the update request", k.Name)
		}
		for _, m := range []string{"Get" + k.Name + "Request", "List" + k.Plural + "Request", "Delete" + k.Name + "Request"} {
			if _, err := message(m); err != nil {
				t.Errorf("%s: %v", k.Name, err)
			}
		}
		if tab := objectTable(k, []proto.Message{k.New()}, time.Unix(0, 0)); len(tab.rows) != 1 {
			t.Errorf("%s has no table", k.Name)
		}
	}
}

func TestLineRanges(t *testing.T) {
	if got := lineRanges([]int{3, 4, 5, 9}); got != "3-5, 9" {
		t.Errorf("got %q", got)
	}
}

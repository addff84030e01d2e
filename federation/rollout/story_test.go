package rollout

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/api/storev1"
)

// The stories in testdata/stories. Commands:
//
//	spec target=v2 [type=blue-green] [active=v1] [switch=30s] [keep=5m] [auto=false]
//	cluster eu want=(v2:2) available=(v2:1) running=(v1:1,v2:1) [stale] [incomplete] [halted=v2 why=…]
//	gone v1                      the revision exists no more
//	step [after=30s]             time goes on, and the rollout is looked at
func TestStories(t *testing.T) {
	told := 0
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		told++
		w := newWorld()
		datadriven.RunTest(t, path, w.command)
	})
	if told == 0 {
		t.Error("no story was told")
	}
}

type world struct {
	in   Input
	gone map[string]bool
	r    *storev1.Rollout
}

func newWorld() *world {
	w := &world{gone: map[string]bool{}}
	w.in = Input{Now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), UID: "u", Update: &portolanv1.WorkloadSpec_UpdateStrategy{}}
	w.in.Exists = func(rev string) bool { return !w.gone[rev] }
	return w
}

func (w *world) command(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	switch d.Cmd {
	case "spec":
		w.spec(t, d)
	case "cluster":
		w.cluster(t, d)
	case "gone":
		w.gone[d.CmdArgs[0].Key] = true
	case "step":
		for _, a := range d.CmdArgs {
			after, err := time.ParseDuration(a.Vals[0])
			if err != nil {
				t.Fatal(err)
			}
			w.in.Now = w.in.Now.Add(after)
		}
		return w.step(t)
	default:
		t.Fatalf("command %s is not known", d.Cmd)
	}
	return ""
}

func (w *world) spec(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	w.in.Generation++
	u := &portolanv1.WorkloadSpec_UpdateStrategy{}
	w.in.Update = u
	blueGreen := func() *portolanv1.WorkloadSpec_BlueGreen {
		if u.BlueGreen == nil {
			u.BlueGreen = &portolanv1.WorkloadSpec_BlueGreen{}
		}
		return u.BlueGreen
	}
	length := func(s string) *durationpb.Duration {
		v, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		return durationpb.New(v)
	}
	for _, a := range d.CmdArgs {
		switch a.Key {
		case "target":
			w.in.Target = a.Vals[0]
		case "type":
			u.Type = portolanv1.UpdateType_UPDATE_TYPE_BLUE_GREEN
		case "active":
			blueGreen().Active = a.Vals[0]
		case "switch":
			blueGreen().SwitchAfter = length(a.Vals[0])
		case "keep":
			blueGreen().KeepOld = length(a.Vals[0])
		case "auto":
			u.AutoRollback = new(a.Vals[0] == "true")
		default:
			t.Fatalf("argument %s is not known", a.Key)
		}
	}
}

func counts(t *testing.T, vals []string) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, v := range vals {
		rev, n, _ := strings.Cut(v, ":")
		count, err := strconv.Atoi(n)
		if err != nil {
			t.Fatal(err)
		}
		out[rev] = count
	}
	return out
}

func (w *world) cluster(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	c := Cluster{ID: d.CmdArgs[0].Key, Current: true}
	for _, a := range d.CmdArgs[1:] {
		switch a.Key {
		case "want":
			c.Want = counts(t, a.Vals)
		case "available":
			c.Available = counts(t, a.Vals)
		case "running":
			c.Running = counts(t, a.Vals)
		case "stale":
			c.Current = false
		case "incomplete":
			c.Incomplete = true
		case "halted":
			c.Halted = a.Vals[0]
		case "why":
			c.Why = strings.Join(a.Vals, " ")
		default:
			t.Fatalf("argument %s is not known", a.Key)
		}
	}
	w.in.Clusters = slices.DeleteFunc(w.in.Clusters, func(o Cluster) bool { return o.ID == c.ID })
	w.in.Clusters = append(w.in.Clusters, c)
}

// step also holds what must hold always: a second look changes nothing, the
// stored record is left alone, and what serves runs.
func (w *world) step(t *testing.T) string {
	t.Helper()
	before := proto.CloneOf(w.r)
	next, d := Step(w.r, w.in)
	if !proto.Equal(before, w.r) {
		t.Fatal("the stored record was changed")
	}
	again, d2 := Step(next, w.in)
	if again != next || !slices.Equal(d.Revisions, d2.Revisions) || d.Active != d2.Active || !d.Again.Equal(d2.Again) {
		t.Fatalf("a second look says otherwise:\n%v %+v\n%v %+v", next, d, again, d2)
	}
	if d.Active != "" && !slices.Contains(d.Revisions, d.Active) {
		t.Fatalf("%s serves and does not run: %+v", d.Active, d)
	}
	w.r = next
	st := next.GetStatus()
	out := fmt.Sprintf("%s %s: %s\nrun %s", strings.ToLower(strings.TrimPrefix(st.GetState().String(), "ROLLOUT_STATE_")), st.GetReason().GetCode(), st.GetReason().GetMessage(), strings.Join(d.Revisions, ", "))
	if d.Active != "" {
		out += ", " + d.Active + " serves"
	}
	out += "; stable " + st.GetStable()
	if !d.Again.IsZero() {
		out += "; again in " + d.Again.Sub(w.in.Now).String()
	}
	return out + "\n"
}

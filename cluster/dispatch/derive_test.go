package dispatch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/cluster/state"
	"github.com/portolan-io/portolan/federation/api/clusterv1"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var testFacts = Facts{Cluster: "eu", Fleet: "portolan.internal", VirtualIPs: "10.68.0.0/16"}

func emptySnapshot() *state.Snapshot {
	return &state.Snapshot{
		Intents: map[string]*linkv1.Intent{}, Nodes: map[string]*clusterv1.Node{}, Allocations: map[string]*clusterv1.Allocation{},
		NodeStatus: map[string]*state.NodeStatus{}, Volumes: map[string]*clusterv1.Volume{},
	}
}

// TestDirectives runs scripted scenarios: "set" changes the snapshot by lines
// ("intent NAME JSON", "node NAME JSON", "alloc JSON", "drop NAME", "status NODE
// ALLOCATION STATE [ready]", "volume JSON", "lost NODE", "back NODE", "settled N"), "derive"
// prints what a node is told.
func TestDirectives(t *testing.T) {
	datadriven.Walk(t, "testdata/derive", func(t *testing.T, path string) {
		s := emptySnapshot()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "set":
				s.Generation++
				for line := range strings.Lines(d.Input) {
					if err := set(s, strings.TrimSpace(line)); err != nil {
						t.Fatalf("%s: %v", line, err)
					}
				}
				return ""
			case "derive":
				return printDirectives(t, s, d)
			}
			t.Fatalf("unknown command %q", d.Cmd)
			return ""
		})
	})
}

func set(s *state.Snapshot, line string) error {
	verb, rest, _ := strings.Cut(line, " ")
	name, body, _ := strings.Cut(rest, " ")
	switch verb {
	case "intent":
		i := &linkv1.Intent{}
		s.Intents[name] = i
		return protojson.Unmarshal([]byte(body), i)
	case "node":
		n := &clusterv1.Node{Node: name}
		s.Nodes[name] = n
		s.NodeStatus[name] = &state.NodeStatus{Session: 1, Connected: true, Allocations: map[string]*nodev1.AllocationStatus{}}
		err := protojson.Unmarshal([]byte(body), n)
		n.Node = name
		return err
	case "alloc":
		a := &clusterv1.Allocation{}
		err := protojson.Unmarshal([]byte(rest), a)
		s.Allocations[a.GetAllocation()] = a
		return err
	case "volume":
		v := &clusterv1.Volume{}
		err := protojson.Unmarshal([]byte(rest), v)
		s.Volumes[v.GetVolume()] = v
		return err
	case "drop":
		delete(s.Allocations, name)
		delete(s.Intents, name)
	case "status":
		f := strings.Fields(body)
		st := &nodev1.AllocationStatus{Allocation: f[0], State: portolanv1.ReplicaState(portolanv1.ReplicaState_value["REPLICA_STATE_"+f[1]]), Ready: len(f) > 2}
		s.NodeStatus[name].Allocations[f[0]] = st
	case "lost":
		s.Nodes[name].LostTime = timestamppb.New(time.Unix(1, 0))
	case "back":
		s.Nodes[name].LostTime = nil
	case "settled":
		_, err := fmt.Sscan(rest, &s.Settled)
		return err
	default:
		return fmt.Errorf("unknown verb %q", verb)
	}
	return nil
}

func printDirectives(t *testing.T, s *state.Snapshot, d *datadriven.TestData) string {
	var node, only string
	d.ScanArgs(t, "node", &node)
	if d.HasArg("only") {
		d.ScanArgs(t, "only", &only)
	}
	all := Directives(s, testFacts, node)
	var b strings.Builder
	for _, n := range slices.Sorted(maps.Keys(all)) {
		if !strings.HasPrefix(n, only) {
			continue
		}
		if d.HasArg("names") {
			fmt.Fprintln(&b, n)
			continue
		}
		m := proto.CloneOf(all[n])
		rev := m.GetRevision()
		m.Revision = 0
		raw, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var line bytes.Buffer
		if err := json.Compact(&line, raw); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s @%d %s\n", n, rev, line.String())
	}
	return b.String()
}

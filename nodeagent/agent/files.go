package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/nodeagent/task"
)

// writeFile is atomic for readers: a temporary file beside it, then rename.
func writeFile(path string, b []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// savedTask is an allocation as an earlier agent left it.
type savedTask struct {
	assignment *nodev1.Assignment
	state      *task.State
}

type taskFile struct {
	Assignment json.RawMessage `json:"assignment"`
	State      *task.State     `json:"state"`
}

func (a *Agent) taskPath(allocation string) string {
	return a.path("agent", "tasks", allocation+".json")
}

// encodeTask leaves out what is only of the moment, so that equal bytes mean
// that nothing needs writing.
func encodeTask(as *nodev1.Assignment, s *task.State) ([]byte, error) {
	raw, err := protojson.Marshal(as)
	if err != nil {
		return nil, err
	}
	lean := *s
	lean.Containers = append([]task.Container(nil), s.Containers...)
	for i := range lean.Containers {
		c := &lean.Containers[i]
		c.Memory = 0
		for k := range c.Probes {
			c.Probes[k] = task.Streak{}
		}
	}
	// protojson's spacing is random by design.
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, err
	}
	if raw, err = json.Marshal(v); err != nil {
		return nil, err
	}
	return json.Marshal(taskFile{raw, &lean})
}

// loadTasks reads what an earlier agent wrote; a broken file is left out.
func (a *Agent) loadTasks() []savedTask {
	files, err := os.ReadDir(a.path("agent", "tasks"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Error("tasks on disk cannot be listed", "error", err)
	}
	var out []savedTask
	for _, f := range files {
		id, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok || strings.HasPrefix(id, ".") {
			continue
		}
		s, err := readTask(a.taskPath(id))
		if err == nil {
			err = checkAssignment(s.assignment)
		}
		if err != nil || s.assignment.GetAllocation() != id {
			a.log.Error("task on disk is broken and was left out", "allocation", id, "error", err)
			continue
		}
		out = append(out, s)
	}
	return out
}

func readTask(path string) (savedTask, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return savedTask{}, err
	}
	var f taskFile
	if err := json.Unmarshal(b, &f); err != nil {
		return savedTask{}, err
	}
	as := &nodev1.Assignment{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(f.Assignment, as); err != nil {
		return savedTask{}, err
	}
	if f.State == nil {
		return savedTask{}, errors.New("no state")
	}
	return savedTask{as, f.State}, nil
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/nodev1"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/nodeagent/engine"
)

// This file keeps volumes: a directory for each, under dataDir/volumes and never
// outside it. A volume is made when a container needs it, and stays, whatever
// becomes of replicas and agents, until the cluster says that it is to go.

// volumePattern is "<tenant>.<workload>-<index>.<name>": one path element.
var volumePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?){2}$`)

const (
	// volumeMode keeps others on the node out; the engine gives the directory to the
	// container's user.
	volumeMode   = 0o770
	maxVolumeID  = 200
	volumeRetry  = 5 * time.Second
	maxMountPath = 4096
)

func checkVolumeID(id string) error {
	if len(id) > maxVolumeID || !volumePattern.MatchString(id) {
		return fmt.Errorf("%q is no volume ID", id)
	}
	return nil
}

// checkVolumes refuses what would lead outside of the volumes' folder, and mounts
// of volumes that are not there.
func checkVolumes(a *nodev1.Assignment) error {
	known := map[string]bool{}
	for i, v := range a.GetVolumes() {
		if err := checkVolumeID(v.GetVolume()); err != nil {
			return fmt.Errorf("assignment.volumes[%d].volume: %w", i, err)
		}
		known[v.GetName()] = true
	}
	for _, c := range a.GetSpec().GetContainers() {
		for i, m := range c.GetMounts() {
			switch {
			case !known[m.GetVolume()]:
				return fmt.Errorf("assignment.spec container %q: mounts[%d].volume: there is no volume %q", c.GetName(), i, m.GetVolume())
			case !path.IsAbs(m.GetPath()) || path.Clean(m.GetPath()) != m.GetPath() || m.GetPath() == "/" || len(m.GetPath()) > maxMountPath:
				return fmt.Errorf("assignment.spec container %q: mounts[%d].path: %q is no absolute, clean path below the root", c.GetName(), i, m.GetPath())
			}
		}
	}
	return nil
}

// volumeMounts makes the directories that a container mounts, if they are not
// there, and gives the binds.
func (a *Agent) volumeMounts(as *nodev1.Assignment, c *portolanv1.Container) ([]engine.Mount, error) {
	if len(c.GetMounts()) == 0 {
		return nil, nil
	}
	byName := map[string]string{}
	for _, v := range as.GetVolumes() {
		byName[v.GetName()] = v.GetVolume()
	}
	out := make([]engine.Mount, 0, len(c.GetMounts()))
	for _, m := range c.GetMounts() {
		id := byName[m.GetVolume()]
		if err := a.makeVolume(id); err != nil {
			return nil, err
		}
		out = append(out, engine.Mount{Source: a.path("volumes", id), Target: m.GetPath(), ReadOnly: m.GetReadOnly(), Own: true})
	}
	return out, nil
}

func (a *Agent) makeVolume(id string) error {
	doing := "make volume " + id
	if err := checkVolumeID(id); err != nil {
		return api.E(api.Invalid, doing, "%w", err)
	}
	root, err := os.OpenRoot(a.path("volumes"))
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	defer func() { _ = root.Close() }()
	a.volumeMu.Lock()
	defer a.volumeMu.Unlock()
	if err := root.Mkdir(id, volumeMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return api.E(api.Internal, doing, "%w", err)
	}
	fi, err := root.Lstat(id)
	if err == nil && !fi.IsDir() {
		err = errors.New("it is no directory")
	}
	if err == nil {
		err = root.Chmod(id, volumeMode) // past the umask
	}
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	return nil
}

// volumeLoop deletes the volumes that are to go, once nothing uses them.
func (a *Agent) volumeLoop(ctx context.Context) error {
	for {
		left := a.removeVolumes(ctx)
		var retry <-chan time.Time
		if left {
			retry = time.After(volumeRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.volumeWake:
		case <-retry:
		}
	}
}

// removeVolumes says whether any is left.
func (a *Agent) removeVolumes(ctx context.Context) (left bool) {
	a.mu.Lock()
	going := maps.Clone(a.going)
	a.mu.Unlock()
	for id := range going {
		if ctx.Err() != nil {
			return true
		}
		if a.inUse(id) {
			left = true
			continue
		}
		if err := a.removeVolume(id); err != nil {
			a.log.Error("volume not deleted", "volume", id, "error", err)
			left = true
			continue
		}
		a.board.volumeGone(id)
	}
	return left
}

func (a *Agent) removeVolume(id string) error {
	root, err := os.OpenRoot(a.path("volumes"))
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	a.volumeMu.Lock()
	defer a.volumeMu.Unlock()
	if _, err := root.Lstat(id); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := root.RemoveAll(id); err != nil {
		return err
	}
	a.log.Info("volume deleted", "volume", id)
	return nil
}

// inUse says whether anything that may still run mounts a volume. Before the engine
// has told what runs, anything may.
func (a *Agent) inUse(volume string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.adopted {
		return true
	}
	for _, r := range a.runners {
		if r.uses(volume) {
			return true
		}
	}
	// Of an orphan nothing is known but its name, which its volumes carry.
	for id := range a.orphans {
		if strings.Contains(volume, "."+id+".") {
			return true
		}
	}
	return false
}

// uses says whether the replica has the volume.
func (r *runner) uses(volume string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, as := range []*nodev1.Assignment{r.assignment, r.next} {
		for _, v := range as.GetVolumes() {
			if v.GetVolume() == volume {
				return true
			}
		}
	}
	return false
}

// setGoing takes the volumes that the cluster wants gone.
func (a *Agent) setGoing(removals map[string]bool) {
	a.mu.Lock()
	a.going = removals
	a.mu.Unlock()
	a.board.keepRemovals(removals)
	select {
	case a.volumeWake <- struct{}{}:
	default:
	}
}

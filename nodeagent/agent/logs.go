package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

const logPoll = 100 * time.Millisecond

func (a *Agent) logPath(allocation, container string, attempt int) string {
	return a.path("logs", allocation, container, strconv.Itoa(attempt)+".log")
}

// pruneLogs makes room for an attempt: the two newest stay, "previous" and this.
func (r *runner) pruneLogs(container string, attempt int) error {
	dir := filepath.Dir(r.a.logPath(r.id, container, attempt))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		n, ok := attemptOfLog(f.Name())
		if ok && n < attempt-1 {
			if err := os.Remove(filepath.Join(dir, f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// attemptOfLog reads "<attempt>.log" and "<attempt>.log.<n>".
func attemptOfLog(name string) (int, bool) {
	digits, _, ok := strings.Cut(name, ".log")
	n, err := strconv.Atoi(digits)
	return n, ok && err == nil
}

// rotateLoop bounds logs. The shim keeps the file open, so it is copied and
// truncated; what is written in between the two is lost, at most some lines.
func (a *Agent) rotateLoop(ctx context.Context) error {
	for sleep(ctx, a.jittered(5*time.Second)) {
		for _, in := range a.liveNow() {
			path := a.logPath(in.r.id, in.container, in.attempt)
			if err := rotate(path, a.cfg.LogBytes, a.cfg.LogFiles); err != nil {
				a.log.Error("log not rotated", "path", path, "error", err)
			}
		}
	}
	return nil
}

// rotate keeps files in all: path, path.1 (newer) … path.<files-1>.
func rotate(path string, limit int64, files int) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() < limit {
		return nil
	}
	if err != nil {
		return err
	}
	if files < 2 {
		return os.Truncate(path, 0)
	}
	for i := files - 1; i > 1; i-- {
		if err := os.Rename(rotated(path, i-1), rotated(path, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := copyFile(path, rotated(path, 1)); err != nil {
		return err
	}
	return os.Truncate(path, 0)
}

func rotated(path string, n int) string { return path + "." + strconv.Itoa(n) }

func copyFile(from, to string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// logReader reads one attempt's log, rotated parts first, and can follow it.
type logReader struct {
	path  string
	files int
	send  func([]byte) error
	buf   []byte
	// pos in the present file.
	pos int64
}

// rest sends what is in the file beyond pos, and notices a rotation.
func (l *logReader) rest() error {
	info, err := os.Stat(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() < l.pos {
		// Copied and truncated: the tail that was not read yet is in the copy.
		if _, err := l.from(rotated(l.path, 1), l.pos); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		l.pos = 0
	}
	l.pos, err = l.from(l.path, l.pos)
	return err
}

func (l *logReader) from(path string, pos int64) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return pos, err
	}
	defer func() { _ = f.Close() }()
	for {
		n, err := f.ReadAt(l.buf, pos)
		if n > 0 {
			pos += int64(n)
			if err := l.send(l.buf[:n]); err != nil {
				return pos, err
			}
		}
		if errors.Is(err, io.EOF) {
			return pos, nil
		}
		if err != nil {
			return pos, err
		}
	}
}

// start sends what there is, or its last lines.
func (l *logReader) start(tail int) error {
	parts := make([]string, 0, l.files)
	for i := l.files - 1; i > 0; i-- {
		parts = append(parts, rotated(l.path, i))
	}
	if tail <= 0 {
		for _, p := range parts {
			if _, err := l.from(p, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return l.rest()
	}
	pos, err := tailOffset(l.path, &tail)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	type piece struct {
		path string
		pos  int64
	}
	var before []piece
	for _, p := range slices.Backward(parts) {
		if tail <= 0 {
			break
		}
		at, err := tailOffset(p, &tail)
		if err != nil {
			break // there are no older parts
		}
		before = append(before, piece{p, at})
	}
	for _, p := range slices.Backward(before) {
		if _, err := l.from(p.path, p.pos); err != nil {
			return err
		}
	}
	l.pos = pos
	return l.rest()
}

// tailOffset finds where the last lines of a file begin, and takes those it
// found off the count.
func tailOffset(path string, lines *int) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	end := info.Size()
	buf := make([]byte, 32<<10)
	last := true // the newline that ends the file counts for no line
	for end > 0 {
		n := min(end, int64(len(buf)))
		if _, err := f.ReadAt(buf[:n], end-n); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		for i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0; i = bytes.LastIndexByte(buf[:i], '\n') {
			if last && end-n+int64(i) == info.Size()-1 {
				continue
			}
			if *lines--; *lines == 0 {
				return end - n + int64(i) + 1, nil
			}
		}
		last = false
		end -= n
	}
	if info.Size() > 0 {
		*lines--
	}
	return 0, nil
}

// readLogs sends a container's log; with follow it goes on, across restarts,
// until ctx ends or the replica is gone.
func (a *Agent) readLogs(ctx context.Context, allocation, container string, previous, follow bool, tail int, send func([]byte) error) error {
	attempts, err := a.logAttempts(allocation, container)
	if err != nil {
		return err
	}
	newest := attempts[len(attempts)-1]
	if previous {
		i := len(attempts) - 2
		if i < 0 {
			return api.E(api.NotFound, "read logs of "+allocation, "container %s has no previous instance", container)
		}
		newest, follow = attempts[i], false
	}
	l := &logReader{path: a.logPath(allocation, container, newest), files: a.cfg.LogFiles, send: send, buf: make([]byte, 32<<10)}
	if err := l.start(tail); err != nil || !follow {
		return err
	}
	for sleep(ctx, logPoll) {
		if _, ok := a.board.get(allocation); !ok {
			return nil
		}
		if err := l.rest(); err != nil {
			return err
		}
		attempts, err := a.logAttempts(allocation, container)
		if err != nil {
			return nil //nolint:nilerr // the log went with the replica
		}
		if n := attempts[len(attempts)-1]; n > newest {
			if err := l.rest(); err != nil {
				return err
			}
			newest = n
			l.path, l.pos = a.logPath(allocation, container, n), 0
		}
	}
	return nil
}

// logAttempts gives the attempts that have logs, oldest first; at least one.
func (a *Agent) logAttempts(allocation, container string) ([]int, error) {
	files, err := os.ReadDir(filepath.Dir(a.logPath(allocation, container, 0)))
	var out []int
	for _, f := range files {
		if n, ok := attemptOfLog(f.Name()); ok && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list logs: %w", err)
	}
	if len(out) == 0 {
		return nil, api.E(api.NotFound, "read logs of "+allocation, "container %s has not started yet", container)
	}
	slices.Sort(out)
	return out, nil
}

package envoy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// record is the pid file: enough to tell the process from another one that got
// the same number later.
type record struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot.
	Start uint64 `json:"start"`
	Boot  string `json:"boot"`
	// Spec is the digest of what it was started with.
	Spec string `json:"spec"`
}

// process is a running proxy, own child or adopted.
type process struct {
	record
	fd   *os.File  // pidfd
	cmd  *exec.Cmd // nil when adopted
	done chan struct{}
}

var errGone = errors.New("process is gone")

// openProcess takes hold of a recorded process; errGone when it ended.
func openProcess(r record) (*process, error) {
	fd, err := unix.PidfdOpen(r.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of %d: %w", r.PID, err)
	}
	p := &process{record: r, fd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	// Read after the descriptor is open: from now on the number is not reused.
	start, err := startTicks(r.PID)
	if err != nil || start != r.Start || r.Boot != bootID() {
		_ = p.fd.Close()
		return nil, errGone
	}
	go p.wait()
	return p, nil
}

// wait closes done when the process ends, or when the descriptor is closed.
func (p *process) wait() {
	defer close(p.done)
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if p.cmd != nil && p.ended() {
		_ = p.cmd.Wait()
	}
}

// ended says whether the process is over, a zombie included.
func (p *process) ended() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		return true
	}
	i := bytes.LastIndexByte(b, ')')
	return i < 0 || len(b) < i+3 || b[i+2] == 'Z' || b[i+2] == 'X'
}

// signal ignores a process that has ended.
func (p *process) signal(s unix.Signal) error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal %d: %w", p.PID, err)
	}
	var sigErr error
	if err := raw.Control(func(fd uintptr) { sigErr = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		return fmt.Errorf("signal %d: %w", p.PID, err)
	}
	if sigErr != nil && !errors.Is(sigErr, unix.ESRCH) {
		return fmt.Errorf("signal %d: %w", p.PID, sigErr)
	}
	return nil
}

// release lets go without ending the process.
func (p *process) release() { _ = p.fd.Close() }

// end sends SIGTERM, waits for grace, then SIGKILL, and waits.
func (p *process) end(grace time.Duration) error {
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.done:
		return nil
	case <-t.C:
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// spawn starts the command apart from this process's session, so that it
// survives, and writes the pid file.
func spawn(argv []string, dir, pidFile, logFile, spec string) (*process, error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	defer func() { _ = out.Close() }()
	pidfd := -1
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	if pidfd < 0 {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, errors.New("start: this kernel gives no pidfd")
	}
	if err := unix.SetNonblock(pidfd, true); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("start: pidfd: %w", err)
	}
	p := &process{cmd: cmd, fd: os.NewFile(uintptr(pidfd), "pidfd"), done: make(chan struct{})}
	p.PID, p.Boot, p.Spec = cmd.Process.Pid, bootID(), spec
	p.Start, err = startTicks(p.PID)
	if err == nil {
		err = writeRecord(pidFile, p.record)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = p.fd.Close()
		return nil, fmt.Errorf("record process: %w", err)
	}
	go p.wait()
	return p, nil
}

func writeRecord(path string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeFile(path, b, 0o600)
}

// writeFile replaces the file in one step and follows no link.
func writeFile(path string, b []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func readRecord(path string) (record, bool) {
	var r record
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &r) != nil || r.PID <= 1 {
		return record{}, false
	}
	return r, true
}

// How often and how long it is waited for a process that executes another file.
const (
	execTries = 100
	execPause = 10 * time.Millisecond
)

// findOrphan looks for a process that was started in the proxy's directory but
// whose record was not written before its parent died.
func findOrphan(dir string) (record, bool) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return record{}, false
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil || cwd != dir {
			continue
		}
		cmdline, err := readCmdline(e.Name())
		if err != nil || !bytes.Contains(cmdline, []byte("\x00"+configFlag+"\x00")) {
			continue
		}
		if start, err := startTicks(pid); err == nil {
			return record{PID: pid, Start: start, Boot: bootID()}, true
		}
	}
	return record{}, false
}

// readCmdline reads the arguments of a process. They are empty for the moment in
// which it executes another file, as ours does on its way to Envoy: that is waited for.
func readCmdline(pid string) ([]byte, error) {
	for tries := 0; ; tries++ {
		b, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		if err != nil || len(b) > 0 || tries == execTries {
			return b, err
		}
		time.Sleep(execPause)
	}
}

// startTicks is field 22 of /proc/<pid>/stat, see proc_pid_stat(5). The fields
// after the name are counted, because the name may hold anything.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("stat of %d is cut off", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Package pgtest starts throwaway database servers for tests: a PostgreSQL from
// the machine's packages, run as an unprivileged user in a temporary directory
// and reached over a Unix socket, and a CockroachDB where there is one. It owns
// its processes and directories and removes them at the end of the test; it
// never touches a server that was there before. A server is safe for concurrent
// use.
package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is a running database server.
type Server struct {
	// admin is the URL of a database to connect to first.
	admin url.URL
	next  atomic.Int64
}

// startTimeout of a server until it answers.
const startTimeout = 60 * time.Second

// Postgres starts a PostgreSQL, or skips the test when the machine has none. It
// does not sync its disk, unless a setting ("fsync=on") says so.
func Postgres(t testing.TB, settings ...string) *Server {
	t.Helper()
	bin, err := postgresDir()
	if err != nil {
		t.Skip(err)
	}
	cred, err := unprivileged()
	if err != nil {
		t.Skip(err)
	}
	dir := tempDir(t, cred)
	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "portolan", "-A", "trust", "-E", "UTF8", "--no-sync")
	initdb.SysProcAttr, initdb.Dir = &syscall.SysProcAttr{Credential: cred}, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	args := []string{"-D", data, "-k", dir}
	for _, s := range append([]string{"listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=200", "shared_buffers=64MB"}, settings...) {
		args = append(args, "-c", s)
	}
	start(t, exec.Command(filepath.Join(bin, "postgres"), args...), cred, dir, syscall.SIGQUIT)
	s := &Server{admin: url.URL{Scheme: "postgres", User: url.User("portolan"), Path: "/postgres", RawQuery: "host=" + url.QueryEscape(dir)}}
	s.await(t)
	return s
}

// Cockroach starts a single CockroachDB node in memory, or skips the test when
// neither COCKROACH_BINARY nor PATH has one.
func Cockroach(t testing.TB) *Server {
	t.Helper()
	bin := os.Getenv("COCKROACH_BINARY")
	if bin == "" {
		bin, _ = exec.LookPath("cockroach")
	}
	if bin == "" {
		t.Skip("no CockroachDB: COCKROACH_BINARY is not set and cockroach is not on PATH")
	}
	dir := tempDir(t, nil)
	file := filepath.Join(dir, "url")
	start(t, exec.Command(bin, "start-single-node", "--insecure", "--store=type=mem,size=512MiB", "--listen-addr=127.0.0.1:0",
		"--http-addr=127.0.0.1:0", "--listening-url-file="+file), nil, dir, syscall.SIGKILL)
	var text []byte
	eventually(t, func() error {
		var err error
		text, err = os.ReadFile(file)
		if err == nil && len(bytes.TrimSpace(text)) == 0 {
			err = errors.New("the url file is empty")
		}
		return err
	})
	u, err := url.Parse(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatalf("url of CockroachDB: %v", err)
	}
	s := &Server{admin: *u}
	s.await(t)
	return s
}

// Database makes an empty database and gives its URL.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	name := "test" + strconv.FormatInt(s.next.Add(1), 10)
	if err := s.exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatalf("create database: %v", err)
	}
	u := s.admin
	u.Path = "/" + name
	return u.String()
}

func (s *Server) exec(ctx context.Context, sql string) error {
	c, err := pgx.Connect(ctx, s.admin.String())
	if err != nil {
		return err
	}
	_, err = c.Exec(ctx, sql)
	return errors.Join(err, c.Close(ctx))
}

func (s *Server) await(t testing.TB) {
	t.Helper()
	eventually(t, func() error { return s.exec(t.Context(), "SELECT 1") })
}

// eventually asks again until there is no error: another process decides when
// it is ready, and says so only by answering.
func eventually(t testing.TB, ask func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the database server does not answer: %v", err)
		}
	}
}

// start runs a server until the end of the test, which stops it by the signal.
func start(t testing.TB, cmd *exec.Cmd, cred *syscall.Credential, dir string, stop syscall.Signal) {
	t.Helper()
	log, err := os.Create(filepath.Join(dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Pdeathsig: stop, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(stop); err != nil {
			t.Errorf("stop %s: %v", cmd.Path, err)
		}
		_ = cmd.Wait() // it was told to end
		if t.Failed() {
			if text, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("end of the server's log:\n%s", text[max(0, len(text)-4096):])
			}
		}
		_ = log.Close()
	})
}

// tempDir makes a directory that the user owns; those of testing lie below one
// that only the test's own user may enter.
func tempDir(t testing.TB, cred *syscall.Credential) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the server's directory: %v", err)
		}
	})
	if cred != nil {
		if err := os.Chown(dir, int(cred.Uid), int(cred.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// postgresDir finds the folder with initdb and postgres: beside the initdb on
// PATH, or the newest of Debian's.
func postgresDir() (string, error) {
	var dirs []string
	if p, err := exec.LookPath("initdb"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			dirs = append(dirs, filepath.Dir(p))
		}
	}
	debian, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	sort.Slice(debian, func(i, j int) bool { return version(debian[i]) > version(debian[j]) })
	for _, d := range append(dirs, debian...) {
		if executable(filepath.Join(d, "initdb")) && executable(filepath.Join(d, "postgres")) {
			return d, nil
		}
	}
	return "", errors.New("no PostgreSQL: initdb and postgres are neither on PATH nor in /usr/lib/postgresql")
}

func version(dir string) int {
	n, err := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
	if err != nil {
		return 0
	}
	return n
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// unprivileged is the user to run PostgreSQL as, which refuses root; nil when the
// test itself is not root.
func unprivileged() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("no user postgres or nobody to run PostgreSQL as, which refuses root")
}

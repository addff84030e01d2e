// Package ownns runs the tests of a package in network and mount namespaces of
// their own, so that what they make on the machine neither meets what runs there
// nor outlives them. It is for TestMain only.
package ownns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside is set in the child that runs the tests.
const inside = "PORTOLAN_OWN_NAMESPACES"

// Inside says that the tests run in namespaces of their own.
func Inside() bool { return os.Getenv(inside) != "" }

// Main runs the tests in a child with its own namespaces and exits as it does.
// Without the right to make namespaces they run here, and those that need them
// skip.
func Main(m *testing.M) {
	if Inside() {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the tests' namespaces:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(exit.ExitCode())
	}
	if err != nil { // namespaces are not allowed here
		os.Exit(m.Run())
	}
	os.Exit(0)
}

// prepare hides the machine's named namespaces and sets the loopback up.
func prepare() error {
	const names = "/run/netns"
	if err := os.MkdirAll(names, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", names, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount %s: %w", names, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

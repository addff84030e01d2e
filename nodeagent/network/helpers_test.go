package network_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func setns(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNET) }

// originalDst asks the kernel where a captured connection was going.
func originalDst(t *testing.T, c net.Conn) string {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var got string
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		// A sockaddr_in fits into the 16 bytes of this structure.
		mreq, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, 80) // SO_ORIGINAL_DST
		if err != nil {
			optErr = err
			return
		}
		b := mreq.Multiaddr
		got = fmt.Sprintf("%d.%d.%d.%d:%d", b[4], b[5], b[6], b[7], binary.BigEndian.Uint16(b[2:4]))
	}); err != nil {
		t.Fatal(err)
	}
	if optErr != nil {
		t.Fatal(optErr)
	}
	return got
}

type lineReader struct{ r *bufio.Reader }

func newLineReader(r io.Reader) *lineReader { return &lineReader{bufio.NewReader(r)} }

func (l *lineReader) next() (string, error) {
	s, err := l.r.ReadString('\n')
	return strings.TrimSpace(s), err
}
